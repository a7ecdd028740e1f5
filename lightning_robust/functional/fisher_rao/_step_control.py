"""Step control of Fisher–Rao paths: shorten steps that do not approach the target, and locate the class boundary.

Nothing here knows a network or a metric: both functions take callables.

Source: ours.
Cost: forward passes only, apart from one natural gradient of each path that has to be shortened.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust.functional._validation.scales import masked_classes
from lightning_robust.functional.fisher_rao._state import Paths
from lightning_robust.functional.fisher_rao.geometry import other_classes

# A crossing is located to a gap of this many nats between two logits, or of this many times their rounding error, or
# with at most this many trials.
_GAP = 1e-6
_ROUNDINGS = 64
_TRIALS = 30
# A step that leads no closer to the target is tried at most this often, with half the length each time.
_HALVINGS = 20


def approach_target(
    paths: Paths,
    ahead: Tensor,
    logits: Tensor,
    *,
    step_at: Callable[[Paths, Tensor], Tensor],
    logits_at: Callable[[Paths, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Replace steps after which the gap to the target has not shrunk by shorter ones.

    The middle of a step may lie where no gradient is left, and a step may overshoot, so that a path goes round in
    circles. The step at ``paths.x`` itself closes the gap if it is short enough. Returns the points ``ahead`` (m, ...)
    and their logits (m, C), both changed in place.
    """
    gap = paths.gap(paths.logits)
    rows = (~(paths.gap(logits) < gap)).nonzero()[:, 0]  # includes NaN
    if not len(rows):
        return ahead, logits
    there = paths.rows(rows)
    step = step_at(there, there.x)
    for _ in range(_HALVINGS):
        shorter = there.within_bounds(there.x - step)
        found = logits_at(there, shorter)
        closer = there.gap(found) < gap[rows]
        ahead[rows[closer]], logits[rows[closer]] = shorter[closer], found[closer]
        rows, there, step = rows[~closer], there.rows(~closer), step[~closer] / 2
        if not len(rows):
            break
    return ahead, logits


def locate_crossing(
    paths: Paths, ahead: Tensor, logits: Tensor, *, logits_at: Callable[[Paths, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Find where segments from ``paths.x``, inside a class, to points ``ahead`` (m, ...), outside, cross the boundary.

    Returns points just beyond the boundary, and their logits (m, C).
    """
    shape = (-1, *(1,) * (ahead.ndim - 1))
    before, beyond = paths.x, ahead
    lead_before, lead_beyond = _lead(paths.logits, paths.source), _lead(logits, paths.source)
    rounding = torch.finfo(logits.dtype).eps * logits.abs().masked_fill(masked_classes(logits), 0).amax(dim=1)
    allowed = (_ROUNDINGS * rounding).clamp_min(_GAP)
    for trial in range(_TRIALS):
        # regula falsi towards half of the allowed gap beyond; bisection every third time, lest one end never move
        share = (lead_before + allowed / 2) / (lead_before - lead_beyond)
        share = share.nan_to_num(nan=0.5).clamp(0, 1) if trial % 3 < 2 else torch.full_like(share, 0.5)
        middle = before + share.to(ahead).view(shape) * (beyond - before)
        found = logits_at(paths, middle)
        lead, outside = _lead(found, paths.source), found.argmax(dim=1) != paths.source
        logits = torch.where(outside[:, None], found, logits)
        lead_before, lead_beyond = torch.where(outside, lead_before, lead), torch.where(outside, lead, lead_beyond)
        outside = outside.view(shape)
        before, beyond = torch.where(outside, before, middle), torch.where(outside, middle, beyond)
        if (lead_beyond >= -allowed).all():
            break
    return beyond, logits


def _lead(logits: Tensor, source: Tensor) -> Tensor:
    """Lead (n,) of the source's logit over the largest other one."""
    others = logits.gather(1, other_classes(source, logits.shape[1]))
    return logits.gather(1, source[:, None])[:, 0] - others.amax(dim=1)
