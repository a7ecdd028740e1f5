"""Statistics of small samples: rank correlation and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Return Spearman's rank correlation over the entries where both vectors are finite; NaN if either is constant."""
    known = first.isfinite() & second.isfinite()
    a, b = (_centred_ranks(values[known]) for values in (first, second))
    rho: Tensor = a @ b / (a.norm() * b.norm())
    return rho.float()


def _centred_ranks(values: Tensor) -> Tensor:
    """Return ranks less their mean, times two; ties share the mean of their ranks."""
    ascending = values.sort().values
    ranks = (torch.searchsorted(ascending, values) + torch.searchsorted(ascending, values, right=True)).double()
    return ranks - ranks.mean()


def interval(
    statistic: Callable[[Tensor], Tensor], n: int, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, ...]:
    """Return a statistic and the ends of its 95 % interval by the percentile bootstrap.

    Args:
        statistic: Maps indices of items, (n,), to the value of those items, 0-d.
        n: Number of items.
        resamples: Number of bootstrap samples, of n items each with replacement.
        seed: Seed of the resampling.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(resamples)]
    spread = torch.stack(draws).nan_to_num(0.0)  # copies of a single item have no correlation
    return float(statistic(torch.arange(n))), *torch.quantile(spread, torch.tensor([0.025, 0.975])).tolist()
