"""How far chance alone moves a measurement away from the mean of others."""

from __future__ import annotations

import math
from bisect import insort
from statistics import median_low

from torch import Tensor

from lightning_robust.functional.drift._pairing import covariances

_MEDIAN_STEP = 0.9539  # median |step| between independent normal values, in standard deviations: √2 · 0.6745


class Noise:
    """Standard deviation of the difference between a measurement and the mean of earlier ones.

    Args:
        series: T measurements.
        stderrs: Their standard errors.
        per_sample: Their values per sample, (N,), or None where these are not known.
        first: Index of the first measurement after warm-up; fluctuations are estimated from there on.
    """

    def __init__(
        self, series: list[float], stderrs: list[float], per_sample: list[Tensor | None], *, first: int
    ) -> None:
        # Squares of very large errors would overflow. Dividing by a power of two changes no digit.
        self._unit = math.ldexp(1.0, math.frexp(max(stderrs, default=0.0))[1] - 1)
        self._covariances = covariances([error / self._unit for error in stderrs], per_sample)
        self._fluctuations = _fluctuations(series, first=first)

    def of_difference(self, t: int, rows: range) -> float:
        """The larger of sampling error and fluctuation, for measurement ``t`` against the mean of ``rows``.

        With empty ``rows`` the comparison is with a number that has no error.
        """
        return max(self._sampling_error(t, rows), self._fluctuation(t, rows))

    def _sampling_error(self, t: int, rows: range) -> float:
        variance = self._covariances[t, t]
        if rows:
            others = slice(rows.start, rows.stop)
            variance = variance + self._covariances[others, others].mean() - 2 * self._covariances[t, others].mean()
        return self._unit * math.sqrt(max(0.0, float(variance)))

    def _fluctuation(self, t: int, rows: range) -> float:
        """All measurements count as independent."""
        deviation = self._fluctuations[t]
        return deviation * math.sqrt(1 + 1 / len(rows)) if rows else deviation


def _fluctuations(series: list[float], *, first: int) -> list[float]:
    """Standard deviation that the median step before each measurement suggests; 0 before there are steps."""
    steps: list[float] = []
    deviations = [0.0] * len(series)
    for t in range(first, len(series)):
        if steps:
            deviations[t] = median_low(steps) / _MEDIAN_STEP
        if t > first:
            insort(steps, abs(series[t] - series[t - 1]))
    return deviations
