"""A second linearisation, close to the boundary that the first one predicts.

Source: ours.
Cost: one forward and one backward pass more than the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.arguments import check_kind, check_number
from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional._validation.independence import check_place
from lightning_robust.functional._validation.scales import computable
from lightning_robust.functional._validation.tensors import check_pass, outputs_of
from lightning_robust.functional.input_space.attacks import Norm, check_norm
from lightning_robust.functional.input_space.jacobian import (
    BoxConstraint,
    gram_and_gaps,
    input_gradient,
    leaf_and_logits,
    samples_at_once,
)
from lightning_robust.functional.input_space.likelihoods import ColumnLikelihood, LikelihoodName, column_likelihood_of
from lightning_robust.functional.input_space.linearization import Linearization, joined, refuse_flat
from lightning_robust.functional.input_space.units import Units


def relinearize(
    model: Callable[..., Tensor],
    inputs: Tensor,
    linearization: Linearization,
    *,
    extras: Mapping[str, Tensor] | None = None,
    norm: Norm = "linf",
    fraction: float = 0.9,
    input_std: float | Sequence[float] | Tensor | None = None,
    input_mean: float | Sequence[float] | Tensor | None = None,
    valid_range: tuple[float, float] | None = None,
    chunk_size: int | None = None,
    likelihood: LikelihoodName = "categorical",
    tolerance: float | None = None,
) -> Linearization:
    """Linearise once more, close to the boundary that a linearisation predicts.

    Each input moves by ``fraction`` of its linearised margin straight to the nearest boundary. It stays in place if the
    network has no finite logits there. The gradients are taken at the new point, whereas the gaps between logits stay
    those of the input itself. Margins of the result are therefore the distances at which these gaps close if the slopes
    are those near the boundary. Where gradients change on the way, as they do in deep standard networks, that is closer
    to the results of attacks.

    Args:
        model: As in :func:`linearize`.
        inputs: ``(N, ...)``, the inputs of the linearisation.
        linearization: Result of :func:`linearize` with the same options.
        extras: As in :func:`linearize`.
        norm: ``"linf"`` or ``"l2"``: the norm in which the way to the boundary is shortest, and in which margins of the
            result are valid.
        fraction: Share of the way to the predicted boundary, between 0 and 1.
        input_std: As in :func:`linearize`.
        input_mean: As in :func:`linearize`.
        valid_range: As in :func:`linearize`; the way in L∞ stays within it.
        chunk_size: As in :func:`linearize`.
        likelihood: As in :func:`linearize`. A ``"gaussian"`` output can fall or rise by the tolerance: each input goes
            the way on which the output that moves first moves further.
        tolerance: As in :func:`linearize`, but always needed for ``"gaussian"``.

    Returns:
        A :class:`Linearization` with the logits of the inputs and the gradients at the points near the boundary.

    Raises:
        TypeError: As :func:`linearize`.
        ValueError: As :func:`linearize`, or if the linearisation belongs to other inputs, has no ``gap_l1`` for L∞, or
            an option has a wrong value.

    Source: ours.
    Cost: one forward and one backward pass more than :func:`linearize`; another forward pass for a chunk with an input
    that stays in place for want of finite logits, and two for ``"gaussian"``, one for each way.
    """
    check_pass(model, inputs, chunk_size=chunk_size)
    check_norm(norm)
    fraction = check_number("fraction", fraction, "a number between 0 and 1", at_least=0, at_most=1)
    check_kind("linearization", linearization, Linearization)
    if len(linearization.logits) != len(inputs):
        raise ValueError(
            f"Expected argument `linearization` to be one of the {len(inputs)} inputs, but it has"
            f" {len(linearization.logits)} samples."
        )
    if norm == "linf" and linearization.gap_l1 is None:
        raise ValueError("Expected a linearisation with `gap_l1` for norm 'linf', but it has none.")
    network = SampleModel(model, extras, num_samples=len(inputs))
    units = Units.of(inputs, std=input_std, mean=input_mean, valid_range=valid_range)
    kind = column_likelihood_of(likelihood, tolerance)
    with differentiable(model):
        x = full_precision(inputs)
        size = samples_at_once(x, chunk_size, num_classes=linearization.logits.shape[1])
        if size < len(x):
            check_place(network, x)
        chunks = []
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            gap_l1 = None if linearization.gap_l1 is None else linearization.gap_l1[rows]
            here = Linearization(linearization.logits[rows], linearization.gram[rows], gap_l1)
            box = BoxConstraint.of(x[rows], units)
            moved = _near_boundary(network.on(rows), x[rows], here, units, norm, box, kind, fraction=fraction)
            leaf, logits = leaf_and_logits(network.on(rows), moved, check=None)
            # the boundary of a sample with almost no gradient may lie beyond what the network can compute
            able = computable(logits, here.logits)
            if not able.all():
                moved = torch.where(able.view(-1, *(1,) * (x.ndim - 1)), moved, x[rows])
                del leaf, logits
                leaf, logits = leaf_and_logits(network.on(rows), moved, check=None)
            kind.check_outputs(logits, num_samples=len(moved))
            chunks.append(gram_and_gaps(logits, leaf, units.std, box, likelihood=kind, logits_before=here.logits))
            del leaf, logits  # free the graph before the next pass builds another
            refuse_flat(network, moved, start, chunks[-1])
    return joined(chunks)


def _near_boundary(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    linearization: Linearization,
    units: Units,
    norm: Norm,
    box: BoxConstraint | None,
    likelihood: ColumnLikelihood,
    *,
    fraction: float,
) -> Tensor:
    """Inputs moved by a fraction of the straight way to the nearest linearised boundary; in place if there is none."""
    logits = linearization.logits
    slopes = linearization.gap_l1
    slopes = slopes if norm == "linf" else likelihood.slopes_l2(logits, linearization.gram).to(logits)
    assert slopes is not None
    margin, nearest = likelihood.distances(logits, slopes).min(dim=1)
    leaf, outputs = leaf_and_logits(model, x, check=likelihood.check_outputs)
    if outputs.shape != logits.shape:
        came = f"{logits.shape[1]} in the linearisation and {outputs.shape[1]} in the model"
        raise ValueError(f"Expected the same number of classes as before, but got {came}.")

    def moved(closing: Tensor) -> Tensor:
        step = input_gradient(closing, leaf, units.std)  # (n, D), of the un-normalised input
        step = step.sign() if norm == "linf" else step / torch.linalg.vector_norm(step, dim=1, keepdim=True)
        step = step * torch.where(margin.isfinite(), margin, 0.0)[:, None]
        if norm == "linf" and box is not None:
            step = box.within(step)
        return x + units.change(fraction * step.nan_to_num(nan=0.0).reshape(x.shape).detach())

    first, *others = [moved(closing) for closing in likelihood.closing(outputs, logits, nearest)]
    for other in others:
        with torch.no_grad():
            ends = [outputs_of(model, end, check=None) for end in (first, other)]
        here, there = ((end - logits).gather(1, nearest[:, None]).abs() for end in ends)
        first = torch.where((there > here).view(-1, *(1,) * (x.ndim - 1)), other, first)
    return first
