"""The best stretch of a series so far, with which later measurements are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Stretch:
    """Consecutive measurements whose mean is the reference.

    Attributes:
        mean: Their mean, or a fixed reference.
        rows: Their indices; empty for a fixed reference.
        best: Index of the best of them; None for a fixed reference.
    """

    mean: float
    rows: range
    best: int | None


class BestStretch:
    """Finds the best stretch among the measurements so far; looks at each stretch once.

    Args:
        series: The measurements.
        sign: 1 where higher is better, −1 where lower is better.
        size: Measurements in a stretch; fewer until there are that many.
        first: Index of the first measurement after warm-up.
    """

    def __init__(self, series: list[float], *, sign: float, size: int, first: int) -> None:
        self._series, self._sign = series, sign
        self._size, self._first, self._end = size, first, first
        self._best: Stretch | None = None

    def before(self, end: int) -> Stretch | None:
        """The best stretch that ends before index ``end``, which must not decrease from call to call."""
        while self._end < end:
            self._end += 1
            size = min(self._size, self._end - self._first)
            rows = range(self._end - size, self._end)
            mean = mean_of([self._series[i] for i in rows])
            short = self._end - self._first <= self._size  # the first whole stretch replaces shorter ones
            if short or self._best is None or self._sign * (mean - self._best.mean) > 0:
                best = max(rows, key=lambda i: self._sign * self._series[i])
                self._best = Stretch(mean, rows, best)
        return self._best


def mean_of(values: list[float]) -> float:
    """Mean that stays between the smallest and the largest value despite rounding, and whose sum cannot overflow."""
    mean = math.fsum(value / len(values) for value in values)
    return min(max(mean, min(values)), max(values))
