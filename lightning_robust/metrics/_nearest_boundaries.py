"""Linearised margins of a probe, to all classes or to as many of the most probable ones as it takes.

The nearest boundary of a sample leads to a class that is probable already, or else to one towards which the logits
change faster. A class beyond those that were looked at has at least the next gap ``g`` to close. Unless its gradient is
steeper than any that was seen, its boundary is no nearer than ``g`` over the steepest slope. Where that leaves room for
a nearer one, more classes are looked at.

Source: ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_robust.functional._validation.tensors import check_finite
from lightning_robust.functional.input_space.attacks import Norm
from lightning_robust.functional.input_space.likelihoods import column_likelihood_of
from lightning_robust.functional.input_space.linearization import Linearization
from lightning_robust.functional.input_space.linearized_margin import linearized_margin, linearized_margin_linf
from lightning_robust.probe import Probe

MORE_OTHERS = 40  # classes to which boundaries are sought where ten leave doubt
_STEEPER = 1.25  # by so much, gradients of classes that nobody has looked at may be steeper than all others


class Margins(NamedTuple):
    """Margins of N samples.

    Attributes:
        values: ``(N,)``.
        logits: ``(N, K)``, of the classes that were looked at first.
        doubtful: ``(N,)``, bool, whether a class that was not looked at may be nearer.
    """

    values: Tensor
    logits: Tensor
    doubtful: Tensor


def margins_of(probe: Probe, norm: Norm, *, order: int, num_targets: int | None) -> Margins:
    """Margins of all samples; by default as many other classes (``num_targets``) are looked at as it takes."""
    found = _among(probe, num_targets, norm, order)
    if num_targets is None and found.doubtful.any():
        rows = found.doubtful.nonzero()[:, 0]
        few = probe.rows(rows)
        more = _among(few, min(MORE_OTHERS, few.own_outputs.shape[1] - 1), norm, order)
        values, doubtful = found.values.clone(), found.doubtful.clone()
        values[rows], doubtful[rows] = more.values, more.doubtful
        found = Margins(values, found.logits, doubtful)
    return found


def _among(probe: Probe, num_targets: int | None, norm: Norm, order: int) -> Margins:
    few = probe.among_probable_classes(num_targets)
    linearization = few.linearized if order == 1 else few.relinearized(norm)
    options: dict[str, Any] = {"likelihood": few.likelihood, "tolerance": few.tolerance}
    targets, logits = few.reading.beside(linearization.logits), linearization.logits
    if norm == "l2":
        values = linearized_margin(logits, linearization.gram, targets, **options)
    elif linearization.gap_l1 is not None:
        values = linearized_margin_linf(logits, linearization.gap_l1, targets, **options)
    else:
        raise ValueError(
            "Expected a linearisation with `gap_l1` for norm 'linf', but it has none, as those by queries: use"
            " `LinearizedAccuracy(norm='l2')`."
        )
    check_finite(values.masked_fill(values.isposinf(), 0.0), "gradients of the logits")
    doubtful = torch.zeros_like(values, dtype=torch.bool)
    if few is not probe:
        doubtful = (values > 0) & values.isfinite() & (_nearest_beyond(probe, few, linearization, norm) < values)
    return Margins(values, logits, doubtful)


def _nearest_beyond(probe: Probe, few: Probe, linearization: Linearization, norm: Norm) -> Tensor:
    """Distance (N,) below which there is no boundary to classes that were not looked at."""
    outputs, count = probe.own_outputs, linearization.logits.shape[1]
    if count == outputs.shape[1]:
        return torch.full_like(outputs[:, 0], torch.inf)
    top = outputs.topk(count + 1, dim=1).values
    if norm == "l2":
        kind = column_likelihood_of(few.likelihood, few.tolerance)
        slopes = kind.slopes_l2(linearization.logits, linearization.gram).to(outputs)
    else:
        assert linearization.gap_l1 is not None
        slopes = linearization.gap_l1
    distances: Tensor = (top[:, 0] - top[:, count]) / (_STEEPER * slopes.amax(dim=1))
    return distances
