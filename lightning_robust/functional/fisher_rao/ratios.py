"""Means and shares over paths, with the error of the choice of samples: paths of one sample are no independent draws.

A mean or a share over paths is a ratio ``r = Σ_n a_n / Σ_n b_n`` of sums over samples, ``b_n`` the number of a sample's
paths that count and ``a_n`` what they add up to. To first order its variance is

    n / (n − 1) · Σ_n (a_n − r b_n)² / (Σ_n b_n)²,

n the number of samples with paths that count. All of it follows from six sums, which may be added up over batches and
processes.

For shares two samples all of whose paths count and two of which none does are added for the error, not for the share
(Agresti & Coull 1998, for clusters ours): the plain formula says that a share of 0 or 1 is known exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """Estimates of any shape, and their standard errors.

    Attributes:
        value: ``(...)``, float64; NaN where there is nothing to estimate from.
        stderr: ``(...)``, over samples; NaN where fewer than two of them tell.
    """

    value: Tensor
    stderr: Tensor


def ratio_sums(numerator: Tensor, denominator: Tensor) -> Tensor:
    """What a ratio and its error follow from.

    Args:
        numerator: ``a``, (n, ...), one row for each sample.
        denominator: ``b``, likewise, of a shape that broadcasts.

    Returns:
        (6, ...), float64: the number of samples with ``b > 0``, and the sums of a, b, a², a b and b².
    """
    a, b = torch.broadcast_tensors(numerator.double(), denominator.double())  # type: ignore[no-untyped-call]
    return torch.stack([part.sum(dim=0) for part in ((b > 0).double(), a, b, a.square(), a * b, b.square())])


def ratio_of_sums(sums: Tensor, *, share: bool) -> Estimate:
    """The ratio of sums (6, ...), with its error; ``share`` says that ``0 ≤ a ≤ b`` in every sample."""
    n, a, b, *_ = sums
    centre = sums
    if share:
        each = b / n  # of an average sample
        extra = (4 + 0 * n, 2 * each, 4 * each, 2 * each.square(), 2 * each.square(), 4 * each.square())
        centre = sums + torch.stack(extra)
    count, top, bottom, a_a, a_b, b_b = centre
    ratio = top / bottom
    scatter = (a_a - 2 * ratio * a_b + ratio.square() * b_b).clamp_min(0)
    stderr = (count / (count - 1) * scatter).sqrt() / bottom
    return Estimate(a / b, torch.where(n > 1, stderr, torch.nan))
