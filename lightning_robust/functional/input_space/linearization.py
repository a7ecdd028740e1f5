"""The linearisation of a network around its inputs: the pass that every input-side quantity shares.

For each sample with logits ``z = f(x)`` and Jacobian ``J = ∂z/∂x`` (C, D), the small matrix ``K = J Jᵀ`` (C, C) and the
logits are a sufficient statistic for the spectral norm and the trace of the input Fisher information at any
temperature, and for all L2 linearised margins. L∞ margins need one more (N, C) tensor: the L1 norms of the gradient
gaps ``∇(z_ŷ − z_k)``, where ``ŷ`` is the predicted class. They come from the same pass.

Inputs often have a range that perturbations cannot leave: no pixel is darker than black. Let ``d`` be a gradient gap,
and let feature i be able to move by ``box_i`` in the direction that closes it. A perturbation of size ε then achieves
``Σ_i |d_i| min(ε, box_i)``, and the boundary is where this sum equals ``z_ŷ − z_k``. That ε replaces the ratio of gap
to L1 norm (ours). On digits, where half of the pixels are black or white, this changes the prediction from 32 % to
55 %, where an attack finds 56 %.

Source: ours (an exact reformulation of arXiv 2606.04767 and arXiv 1511.04599).
Cost: one forward pass and C first-order backward passes with respect to the input, on a whole chunk at once. Without a
chunk size, one more forward pass of the first chunk if the number of classes calls for chunks of another size. A plain
function whose samples pass in several chunks takes two more forward passes without gradients, which show whether it
closes over tensors of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional._validation.independence import check_place
from lightning_robust.functional._validation.tensors import check_finite, check_pass
from lightning_robust.functional.input_space.jacobian import (
    BoxConstraint,
    gram_and_gaps,
    leaf_and_logits,
    samples_at_once,
)
from lightning_robust.functional.input_space.likelihoods import LikelihoodName, column_likelihood_of
from lightning_robust.functional.input_space.missing_gradients import refuse_missing_gradients
from lightning_robust.functional.input_space.units import Units


@dataclass(frozen=True)
class Linearization:
    """First-order behaviour of a network around N inputs.

    Attributes:
        logits: ``(N, C)``, the network's outputs; −∞ where a class is masked.
        gram: ``(N, C, C)``, ``J Jᵀ`` with ``J`` in logits per unit of un-normalised input. It is float64 because
            margins and Fisher information are differences of its entries, in which a component common to all rows of
            ``J`` cancels.
        gap_l1: ``(N, C)``, ``‖∇(z_ŷ − z_k)‖₁`` for every class ``k`` against the predicted class ``ŷ = argmax z``;
            ``None`` if the linearisation was made without it. With a valid range it is ``(z_ŷ − z_k) / ε`` instead,
            where ε is the size of the smallest perturbation within the range that closes the gap, and 0 if none does.
            With likelihood ``"bernoulli"`` or ``"gaussian"`` the gap of output ``k`` is its own, |z_k| or the
            tolerance: ``‖∇z_k‖₁``, or the gap over ε.
        gram_variance: Relative variance of the diagonal of ``gram``: 0 if it is exact, positive if it was estimated
            along random directions (see :func:`~lightning_robust.functional.linearize_by_queries`).
    """

    logits: Tensor
    gram: Tensor
    gap_l1: Tensor | None
    gram_variance: float = 0.0


def linearize(
    model: Callable[..., Tensor],
    inputs: Tensor,
    *,
    extras: Mapping[str, Tensor] | None = None,
    input_std: float | Sequence[float] | Tensor | None = None,
    input_mean: float | Sequence[float] | Tensor | None = None,
    valid_range: tuple[float, float] | None = None,
    chunk_size: int | None = None,
    likelihood: LikelihoodName = "categorical",
    tolerance: float | None = None,
) -> Linearization:
    """Linearise ``model`` around each of ``inputs``, exactly.

    A module (or one of its methods) runs in eval mode and float32, or in float64 if its weights are float64, and is
    left unchanged. A plain function is called as it is.

    Args:
        model: Maps inputs ``(N, ...)`` to logits ``(N, C)``, sample by sample.
        inputs: ``(N, ...)``, floating point, any shape.
        extras: Further arguments of the model, passed on by keyword: tensors ``(N, ...)`` whose rows belong to the
            samples, such as padding masks. They are never perturbed.
        input_std: Standard deviation by which the inputs were divided, one number or one per channel (dimension 1).
            If given, all results are in units of the un-normalised input.
        input_mean: Mean that was subtracted before the division, one number or one per channel; 0 by default. Only
            ``valid_range`` needs it.
        valid_range: Smallest and largest value of an un-normalised input, e.g. ``(0, 1)``, which perturbations cannot
            leave; unbounded by default. It affects ``gap_l1``, and through it L∞ margins, and nothing else.
        chunk_size: Largest number of samples that pass through the network together. Their Jacobians, C gradients of
            the size of an input per sample, are held at the same time. By default the Jacobians of a chunk stay below
            256 MiB in float32 (or are those of a single sample), and on a CPU small enough for the caches.
        likelihood: What the outputs mean: logits of classes, ``"categorical"``; of C ≥ 1 labels, ``"bernoulli"``; or
            C ≥ 1 predictions, ``"gaussian"``.
        tolerance: How far a prediction may move, in its own units, for ``"gaussian"`` with a ``valid_range``; without
            it there is then no ``gap_l1``.

    Returns:
        A :class:`Linearization` of N samples.

    Raises:
        TypeError: If ``inputs`` are not floating point or the model does not return a tensor.
        ValueError: If an argument has a wrong shape or value, the logits are not ``(N, C)`` with ``C ≥ 2``, inputs,
            logits or gradients are not finite, the outputs change without gradients, or a function whose samples pass
            in several chunks gives them other outputs there, because it closes over tensors of the batch.

    A logit of −∞ masks its class: no margin, information or attack depends on that class.

    Source: ours; see the module's docstring.
    """
    found = linearize_up_to(
        None,
        model,
        inputs,
        extras=extras,
        input_std=input_std,
        input_mean=input_mean,
        valid_range=valid_range,
        chunk_size=chunk_size,
        likelihood=likelihood,
        tolerance=tolerance,
    )
    assert found is not None
    return found


def linearize_up_to(
    most_outputs: int | None,
    model: Callable[..., Tensor],
    inputs: Tensor,
    *,
    extras: Mapping[str, Tensor] | None = None,
    input_std: float | Sequence[float] | Tensor | None = None,
    input_mean: float | Sequence[float] | Tensor | None = None,
    valid_range: tuple[float, float] | None = None,
    chunk_size: int | None = None,
    likelihood: LikelihoodName = "categorical",
    tolerance: float | None = None,
) -> Linearization | None:
    """Linearise a network as :func:`linearize` does, or return None if it has more outputs than ``most_outputs``.

    That is known after the first forward pass, and nothing else is then done.
    """
    check_pass(model, inputs, chunk_size=chunk_size)
    network = SampleModel(model, extras, num_samples=len(inputs))
    units = Units.of(inputs, std=input_std, mean=input_mean, valid_range=valid_range)
    kind = column_likelihood_of(likelihood, tolerance)
    with differentiable(model):
        x = full_precision(inputs)
        chunks, start = [], 0
        size, fitted, checked = samples_at_once(x, chunk_size), False, False
        while start < len(x):
            if size < len(x) and not checked:
                check_place(network, x)
                checked = True
            rows = slice(start, start + size)
            chunk = x[rows]
            leaf, logits = leaf_and_logits(network.on(rows), chunk, check=kind.check_outputs)
            if most_outputs is not None and logits.shape[1] > most_outputs:
                return None
            fitting = size if fitted else samples_at_once(x, chunk_size, num_classes=logits.shape[1])
            fits = fitting == size
            if fits:
                box = BoxConstraint.of(chunk, units)
                chunks.append(gram_and_gaps(logits, leaf, units.std, box, likelihood=kind))
                start += len(chunk)
            size, fitted = fitting, True
            del leaf, logits  # free the graph before the next pass builds another
            if fits:
                refuse_flat(network, chunk, start - len(chunk), chunks[-1])
    return joined(chunks)


def refuse_flat(network: SampleModel, x: Tensor, start: int, chunk: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """Examine the samples of a chunk all of whose gradients are exactly zero, by their squared norms."""
    flat = (~chunk[1].diagonal(dim1=1, dim2=2).any(dim=1)).nonzero()[:, 0]
    if len(flat):
        refuse_missing_gradients(network.on(start + flat), x[flat])


def joined(chunks: list[tuple[Tensor, Tensor, Tensor | None]]) -> Linearization:
    """One linearisation of all chunks, or a ``ValueError`` if gradients are not finite."""
    logits, gram = (torch.cat(parts) for parts in zip(*((z, gram) for z, gram, _ in chunks), strict=True))
    gaps = [gap for _, _, gap in chunks if gap is not None]
    gap_l1 = torch.cat(gaps) if gaps else None
    check_finite(gram, "gradients of the logits with respect to the inputs")
    return Linearization(logits=logits, gram=gram, gap_l1=gap_l1)
