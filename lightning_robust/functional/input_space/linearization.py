"""The linearisation of a network around its inputs: the pass that every input-side quantity shares.

For each sample with logits ``z = f(x)`` and Jacobian ``J = ∂z/∂x`` (C, D), the small matrix ``K = J Jᵀ`` (C, C) and the
logits are a sufficient statistic for the spectral norm and the trace of the input Fisher information at any
temperature, and for all L2 linearised margins. L∞ margins need one (N, C) tensor more: the L1 norms of the gradient
gaps ``∇(z_ŷ − z_k)`` with ``ŷ`` the predicted class, taken in the same pass.

Inputs often have a range that perturbations cannot leave: no pixel is blacker than black. A feature i that can move by
``room_i`` in the direction that closes a gap then contributes ``|d_i| min(ε, room_i)`` to what a perturbation of size ε
achieves, ``d`` the gradient gap, and the boundary is where these add up to ``z_ŷ − z_k``. That ε takes the place of gap
over L1 norm (ours). On digits, half of whose pixels are black or white, this is the difference between a prediction of
32 % and one of 55 % where an attack finds 56 %.

Source: ours (an exact reformulation of arXiv 2606.04767 and arXiv 1511.04599).
Cost: one forward pass and C first-order backward passes with respect to the input, on the whole chunk at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.side_effects import call
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.arguments import (
    as_number,
    check_function,
    check_positive_integer,
    class_of,
    expected_but_got,
)
from lightning_robust.functional._validation.tensors import (
    check_finite,
    check_inputs,
)
from lightning_robust.functional.input_space.attacks import Norm, check_norm
from lightning_robust.functional.input_space.jacobian import (
    BoxConstraint,
    count_classes,
    input_gradient,
    linearized_chunk,
    samples_at_once,
)
from lightning_robust.functional.input_space.units import Units


@dataclass(frozen=True)
class Linearization:
    """What the first-order behaviour of a network around N inputs depends on.

    Attributes:
        logits: ``(N, C)``, the network's outputs.
        gram: ``(N, C, C)``, ``J Jᵀ`` with ``J`` in logits per unit of un-normalised input, in float64: margins and
            Fisher information are differences of its entries, which a component common to all rows of ``J`` would
            drown.
        gap_l1: ``(N, C)``, ``‖∇(z_ŷ − z_k)‖₁`` for every class ``k`` against the predicted class ``ŷ = argmax z``, or
            ``None`` where the method that made the linearisation cannot know it. With a valid range, what a
            perturbation within it achieves on average per unit of its size on the way to the boundary:
            ``(z_ŷ − z_k) / ε``, and 0 where it cannot get there.
    """

    logits: Tensor
    gram: Tensor
    gap_l1: Tensor | None


def linearize(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    input_std: float | Sequence[float] | Tensor | None = None,
    input_mean: float | Sequence[float] | Tensor | None = None,
    valid_range: tuple[float, float] | None = None,
    chunk_size: int | None = None,
) -> Linearization:
    """Linearise ``model`` around each of ``inputs``, exactly.

    A module (or its method) runs in eval mode and float32, or float64 if it is in float64; nothing of it is changed. A
    plain function is called as it is.

    Args:
        model: Maps inputs ``(N, ...)`` to logits ``(N, C)``, sample by sample.
        inputs: ``(N, ...)``, floating point, any shape.
        input_std: Standard deviation by which the inputs were divided, one number or one per channel (dimension 1).
            With it all results are in units of the un-normalised input.
        input_mean: What was subtracted from them before that, likewise; 0 by default. Only ``valid_range`` needs it.
        valid_range: Smallest and largest value of an un-normalised input, e.g. ``(0, 1)``, which perturbations cannot
            leave. It changes ``gap_l1`` and with it L∞ margins, nothing else. By default there is none.
        chunk_size: Largest number of Jacobian rows (one per sample and class, each of the size of an input) held in
            memory at once; ``chunk_size // C`` samples pass through the network together. Below ``C`` the samples pass
            one by one and the classes in blocks, which costs more backward passes; three rows are the least. By default
            the Jacobian of a chunk is kept below 256 MiB in float32 (but never less than one sample's), and on a CPU
            small enough for the caches.

    Returns:
        A :class:`Linearization` of N samples.

    Raises:
        TypeError: If ``inputs`` are not floating point or the model does not return a tensor.
        ValueError: If an argument has a wrong shape or value, the logits are not ``(N, C)`` with ``C ≥ 2``, or inputs,
            logits or gradients are not finite.

    Source: ours; see the module's docstring.
    """
    if chunk_size is not None:
        check_positive_integer("chunk_size", chunk_size)
    check_function("model", model)
    check_inputs(inputs)
    units = Units.of(inputs, std=input_std, mean=input_mean, valid_range=valid_range)
    with differentiable(model):
        x = full_precision(inputs)
        num_classes = count_classes(model, x)
        max_rows = num_classes if chunk_size is None else chunk_size
        chunks = [
            linearized_chunk(model, chunk, units.std, BoxConstraint.of(chunk, units), max_rows)
            for chunk in torch.split(x, samples_at_once(x, num_classes, chunk_size))
        ]
    return _joined(chunks)


def relinearize(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    linearization: Linearization,
    *,
    norm: Norm = "linf",
    fraction: float = 0.9,
    input_std: float | Sequence[float] | Tensor | None = None,
    input_mean: float | Sequence[float] | Tensor | None = None,
    valid_range: tuple[float, float] | None = None,
    chunk_size: int | None = None,
) -> Linearization:
    """Linearise once more, close to the boundary that a linearisation predicts.

    Each input moves by ``fraction`` of its linearised margin straight to the nearest boundary (or not at all, where the
    network cannot compute anything finite there). The gradients are taken there, the gaps between logits stay those of
    the input itself: margins of the result are the distances at which these gaps close if the slopes are those near
    the boundary. Where gradients change on the way, as they do in deep standard networks, that is closer to what
    attacks find.

    Args:
        model: As in :func:`linearize`.
        inputs: ``(N, ...)``, those of the linearisation.
        linearization: What :func:`linearize` returned, with the same options.
        norm: ``"linf"`` or ``"l2"``, in which the way is the shortest. Margins of the result are meant in that norm.
        fraction: Of the way to the predicted boundary, between 0 and 1.
        input_std: As in :func:`linearize`.
        input_mean: As in :func:`linearize`.
        valid_range: As in :func:`linearize`; the way in L∞ stays within it.
        chunk_size: As in :func:`linearize`.

    Returns:
        A :class:`Linearization` with the logits of the inputs and the gradients at the points near the boundary.

    Raises:
        TypeError: As :func:`linearize`.
        ValueError: As :func:`linearize`, or if the linearisation is one of other inputs, has no ``gap_l1`` for
            L∞, or an option has a wrong value.

    Source: ours.
    Cost: that of :func:`linearize`, and two forward and one backward pass.
    """
    if chunk_size is not None:
        check_positive_integer("chunk_size", chunk_size)
    check_function("model", model)
    check_inputs(inputs)
    check_norm(norm)
    if not 0 <= as_number(fraction) <= 1:
        raise ValueError(expected_but_got("fraction", "a number between 0 and 1", fraction))
    given: object = linearization
    if not isinstance(given, Linearization):
        raise TypeError(f"Expected argument `linearization` to be a Linearization, but got {class_of(given)}.")
    if len(linearization.logits) != len(inputs):
        came = f"{len(linearization.logits)} samples"
        raise ValueError(f"Expected argument `linearization` to be one of the {len(inputs)} inputs, but it has {came}.")
    if norm == "linf" and linearization.gap_l1 is None:
        raise ValueError("Expected a linearisation with `gap_l1` for norm 'linf', but it has none.")
    units = Units.of(inputs, std=input_std, mean=input_mean, valid_range=valid_range)
    with differentiable(model):
        x = full_precision(inputs)
        num_classes = linearization.logits.shape[1]
        max_rows = num_classes if chunk_size is None else chunk_size
        chunks, start = [], 0
        for chunk in torch.split(x, samples_at_once(x, num_classes, chunk_size)):
            rows = slice(start, start + len(chunk))
            gap_l1 = None if linearization.gap_l1 is None else linearization.gap_l1[rows]
            here = Linearization(linearization.logits[rows], linearization.gram[rows], gap_l1)
            box = BoxConstraint.of(chunk, units)
            moved = _towards_boundary(model, chunk, here, units, norm, as_number(fraction), box)
            chunks.append(linearized_chunk(model, moved, units.std, box, max_rows, logits_before=here.logits))
            start += len(chunk)
    return _joined(chunks)


def _joined(chunks: list[tuple[Tensor, Tensor, Tensor]]) -> Linearization:
    logits, gram, gap_l1 = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    check_finite(gram, "gradients of the logits with respect to the inputs")
    return Linearization(logits=logits, gram=gram, gap_l1=gap_l1)


def _towards_boundary(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    linearization: Linearization,
    units: Units,
    norm: Norm,
    fraction: float,
    box: BoxConstraint | None,
) -> Tensor:
    """The points that lie at a fraction of the way from ``x`` to the nearest linearised boundary."""
    logits = linearization.logits
    predicted = logits.argmax(dim=1, keepdim=True)
    gaps = logits.gather(1, predicted) - logits
    if norm == "linf":
        assert linearization.gap_l1 is not None
        slopes = linearization.gap_l1
    else:
        squares = linearization.gram.diagonal(dim1=1, dim2=2)
        rows = linearization.gram.take_along_dim(predicted[..., None], dim=1)[:, 0]
        slopes = (squares.gather(1, predicted) - 2 * rows + squares).clamp_min(0).sqrt().to(logits)
    ratios = (gaps / slopes).scatter(1, predicted, torch.inf).nan_to_num(nan=torch.inf, posinf=torch.inf)
    margin, nearest = ratios.min(dim=1)
    leaf = x.clone().requires_grad_()
    outputs = call(model, leaf.clone())
    if outputs.shape != logits.shape:
        came = f"{logits.shape[1]} in the linearisation and {outputs.shape[1]} in the model"
        raise ValueError(f"Expected as many classes before as now, but got {came}.")
    closing = (outputs.gather(1, nearest[:, None]) - outputs.gather(1, predicted))[:, 0]
    direction = input_gradient(closing, leaf, units.std)  # (n, D), of the un-normalised input
    step = direction.sign() if norm == "linf" else direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    step = step * torch.where(margin.isfinite(), margin, 0.0)[:, None]
    if norm == "linf" and box is not None:
        step = box.within(step)
    step = fraction * step.nan_to_num(nan=0.0).reshape(x.shape)
    moved: Tensor = (x + units.change(step)).detach()
    # the boundary of a sample that is all but flat may lie beyond what the network can compute
    with torch.no_grad():
        computable = model(moved.clone()).isfinite().all(dim=1)
    return torch.where(computable.view(-1, *(1,) * (x.ndim - 1)), moved, x)


def to_float64(tensor: Tensor) -> Tensor:
    """Float64, on the CPU where the device has none: C × C algebra is cheap, and margins live on differences."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
