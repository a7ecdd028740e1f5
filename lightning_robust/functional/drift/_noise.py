"""How far chance alone moves a measurement away from the mean of others."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence
from statistics import median_low

import torch
from torch import Tensor

_MEDIAN_STEP = 0.9539  # median |step| between independent normal values, in standard deviations: √2 · 0.6745


class Noise:
    """Standard deviation of the difference between a measurement and the mean of earlier ones.

    Fluctuations are estimated from measurement ``first`` on, the first one after warm-up.
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


def covariances(stderrs: Sequence[float], per_sample: Sequence[Tensor | None]) -> Tensor:
    """Covariance matrix of the errors of T measurements, (T, T), float64, estimated from their values per sample.

    Measurements on the same samples share the luck of the draw, so their difference is more precise than either of
    them. Measurements with equally many samples are assumed to use the same samples in the same order. If they do not,
    their values per sample are uncorrelated, and so are the errors returned. Without values, or with N equal values,
    the error of a measurement counts as independent of the others. The result is positive semi-definite. Source: ours.
    """
    errors = torch.tensor(stderrs, dtype=torch.float64)
    correlations = torch.eye(len(errors), dtype=torch.float64)
    known = {t: values.detach().to("cpu", torch.float64) for t, values in enumerate(per_sample) if values is not None}
    for size in {len(values) for values in known.values()}:
        paired = torch.tensor([t for t, values in known.items() if len(values) == size])
        values = torch.stack([known[int(t)] for t in paired])
        values = _rescaled(values)  # squares of very large or very small numbers would overflow or vanish
        centred = _rescaled(values - values.mean(dim=1, keepdim=True))
        norms = centred.norm(dim=1, keepdim=True)
        units = torch.where(norms > 0, centred / norms, 0.0)
        correlations[paired[:, None], paired] = units @ units.T
    correlations.fill_diagonal_(1.0)
    return errors[:, None] * correlations * errors


def _rescaled(values: Tensor) -> Tensor:
    """Divide each row by its largest absolute entry; rows of zeros stay."""
    largest = values.abs().amax(dim=1, keepdim=True)
    return torch.where(largest > 0, values / largest, 0.0)
