"""Means and shares with standard errors over samples, also where a sample has several paths.

A mean or share over paths is a ratio ``r = Σ_n a_n / Σ_n b_n`` of sums over samples, where ``b_n`` is the number of
paths of a sample that count and ``a_n`` the sum of their values. Paths of one sample are not independent draws, so the
error is over samples. To first order the variance is

    n / (n − 1) · Σ_n (a_n − r b_n)² / (Σ_n b_n)²,

where n is the number of samples with paths that count. All of this follows from six sums, which can be added up over
batches and processes.

The plain formula gives a share of 0 or 1 no error at all. Errors of shares are therefore those of Agresti & Coull
(1998): two samples whose paths all count as hits and two without a hit are added for the error, not for the share. For
samples with several paths this is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """Estimates of any shape, and their standard errors.

    Attributes:
        value: ``(...)``, float64; NaN if there is nothing to estimate from.
        stderr: ``(...)``, standard error over samples; NaN if fewer than two samples count.
    """

    value: Tensor
    stderr: Tensor


def ratio_sums(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Sums from which a ratio and its error follow.

    Args:
        numerator: ``a``, (n, ...), one row per sample.
        denominator: ``b``, of a shape that broadcasts against ``a``.

    Returns:
        (6, ...), float64: the number of samples with ``b > 0``, and the sums of a, b, a², a b and b².
    """
    a, b = torch.broadcast_tensors(numerator.double(), denominator.double())  # type: ignore[no-untyped-call]
    return torch.stack([part.sum(dim=0) for part in ((b > 0).double(), a, b, a.square(), a * b, b.square())])


def ratio_of_sums(sums: Tensor, *, share: bool) -> Estimate:
    """Ratio of sums (6, ...) with its error; ``share`` says that ``0 ≤ a ≤ b`` in every sample."""
    n, a, b, *_ = sums
    count, top, bottom, a_a, a_b, b_b = _agresti_coull(sums) if share else sums
    ratio = top / bottom
    scatter = (a_a - 2 * ratio * a_b + ratio.square() * b_b).clamp_min(0)
    stderr = (count / (count - 1) * scatter).sqrt() / bottom
    return Estimate(a / b, torch.where(n > 1, stderr, torch.nan))


def share_of_hits(hits: Tensor) -> Estimate:
    """Share of hits among N samples, 0 or 1 each (N,), with the error of a binomial share, also for N = 1."""
    sums = ratio_sums(hits, torch.ones_like(hits))
    _, top, bottom, *_ = _agresti_coull(sums)
    smoothed = top / bottom
    return Estimate(sums[1] / sums[2], (smoothed * (1 - smoothed) / bottom).sqrt())


def _agresti_coull(sums: Tensor) -> Tensor:
    """Add two samples full of hits and two without any, each of average size."""
    n, _, b, *_ = sums
    each = b / n
    return sums + torch.stack([4 + 0 * n, 2 * each, 4 * each, 2 * each.square(), 2 * each.square(), 4 * each.square()])
