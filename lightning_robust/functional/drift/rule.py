"""The drift rule: has a series of measurements fallen, beyond chance, below the best that it has reached?

The **reference** is the best mean of ``window`` consecutive measurements so far (fewer, as long as there are no more),
or a fixed number. A measurement ``x_t`` has **fallen** by ``d_t``, which counts where it exceeds the **limit** ``l_t``:

    d_t = reference − x_t   (the other sign where lower is better),
    l_t = max(tolerance · |reference|, z · s_t, z · f_t),

of which chance has two shares:

- ``s_t``, the luck of the choice of samples: the standard error of the difference. Of independent measurements it is
  the square root of ``stderr``² + that of the mean². Where it is known what was found ``per_sample``, and all
  measurements are of the same samples, they have most of that luck in common, and ``s_t`` is smaller: often half.
- ``f_t``, the ups and downs of training itself, which are in no standard error: the standard deviation that the median
  step ``|x_i − x_{i−1}|`` so far suggests, as on a control chart of moving ranges, times √(1 + 1/n) for a mean of n.
  Ups and downs that last for many measurements it takes for drifts.

A mean of several takes the place of the single best value because the best of many noisy values is above their truth by
luck: by two standard errors among thirty, by less than one among as many means of five.

- ``"consecutive"``: the series has drifted after ``window`` measurements in a row with ``d_t > l_t``.
- ``"cusum"``: ``S_t = max(0, S_{t−1} + d_t / l_t − ¾)`` adds up what exceeds three quarters of the limit, and the
  series has drifted while ``S_t > window / 2``. A large fall is enough by itself, a small one takes longer; single
  measurements within the limit do not start it anew. ``S_t`` goes no further than ``window``, so that a series that
  recovers is found to.

Both leave the reference alone while a drift is in progress.

On noise that is drawn anew at every measurement they stop within 100 measurements with these probabilities (tolerance
0, 1,000 series, ± 2 % at most):

    window, z                3, 2     3, 2.5   5, 1.5   5, 2     5, 2.5   10, 1    10, 1.5
    its size is reported as standard error
    "consecutive"            20 %     2 %      7 %      0.3 %    0 %      0.4 %    0 %
    "cusum"                  34 %     4 %      43 %     3 %      0 %      46 %     3 %
    none is reported
    "consecutive"            40 %     14 %     16 %     4 %      1 %      0.7 %    0 %
    "cusum"                  83 %     67 %     84 %     64 %     56 %     82 %     59 %

With the default tolerance and none reported, noise of 3 % of the value stops 2 % (``"cusum"``: 13 %), of 5 % 4 %
(21 %). Of series that wander, each value keeping half of the distance of the last one from the mean, a deviation of 3 %
stops 60 %: that is no noise to any rule which looks at a hundred values. With the defaults, ``"consecutive"`` finds a
fall by 4 or 3 standard errors after 5 measurements, ``"cusum"`` after 3 and 4 (medians).

Source: ours; the cumulative sum is that of Page 1954, Biometrika 41, 100–115.
Cost: T² N multiplications for T measurements of N samples: 0.1 s for a thousand of a thousand.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Literal, get_args

from torch import Tensor

from lightning_robust.functional._validation.arguments import (
    as_number,
    as_numbers,
    check_boolean,
    check_choice,
    check_integer,
    check_positive_integer,
    expected_but_got,
)
from lightning_robust.functional.drift._pairing import covariances

Rule = Literal["consecutive", "cusum"]
Combine = Literal["any", "all", "majority"]
_SLACK = 0.75  # of the limit, that a cumulative sum does not count
_MEDIAN_STEP = 0.9539  # of the steps of independent normal values, in their standard deviations: √2 · 0.6745


@dataclass(frozen=True)
class Drift:
    """Where a series stands after its latest measurement.

    Attributes:
        reference: With what it is compared; NaN as long as there is nothing.
        best: Index of the best measurement among those whose mean the reference is; None without any.
        fall: Of the latest measurement below the reference (above it, where lower is better), in units of the values;
            negative where it is better, NaN without a reference.
        limit: The fall that counts, likewise.
        length: How many of the latest measurements, in a row, count towards a drift.
        mean: Mean of these; NaN if there is none.
        drifted: Whether the series has drifted.
    """

    reference: float = math.nan
    best: int | None = None
    fall: float = math.nan
    limit: float = math.nan
    length: int = 0
    mean: float = math.nan
    drifted: bool = False


def drift(
    values: Sequence[float],
    stderrs: Sequence[float] | None = None,
    per_sample: Sequence[Tensor | None] | None = None,
    *,
    higher_is_better: bool,
    window: int = 5,
    warmup: int = 0,
    reference: float | None = None,
    tolerance: float = 0.05,
    z: float = 2.0,
    rule: Rule = "consecutive",
) -> Drift:
    """Judge a series after its latest measurement.

    Args:
        values: One finite number per measurement, in order.
        stderrs: Their standard errors; 0 by default.
        per_sample: What each measurement found on each sample, finite numbers, (N,); None where that is not known.
            Measurements with equally many are taken to be made on the same samples, in the same order.
        higher_is_better: Whether a fall is a drift, or a rise.
        window: Measurements that a drift takes, and of as many the reference is a mean.
        warmup: Measurements at the beginning that count neither as reference nor as drift.
        reference: A fixed one, in units of the values and without an error; by default the best mean so far.
        tolerance: Fall that does not matter, relative to the reference.
        z: Fall that does not matter either, in standard errors.
        rule: ``"consecutive"`` or ``"cusum"``.

    Returns:
        A :class:`Drift`.

    Raises:
        ValueError: If a value is not finite, a standard error negative or there is not one for each value, likewise of
            the values per sample, or an option has a wrong value.

    Source: ours; see the module's docstring.
    """
    states = drift_history(
        values,
        stderrs,
        per_sample,
        higher_is_better=higher_is_better,
        window=window,
        warmup=warmup,
        reference=reference,
        tolerance=tolerance,
        z=z,
        rule=rule,
    )
    return states[-1] if states else Drift()


def drift_history(
    values: Sequence[float],
    stderrs: Sequence[float] | None = None,
    per_sample: Sequence[Tensor | None] | None = None,
    *,
    higher_is_better: bool,
    window: int = 5,
    warmup: int = 0,
    reference: float | None = None,
    tolerance: float = 0.05,
    z: float = 2.0,
    rule: Rule = "consecutive",
) -> list[Drift]:
    """What :func:`drift` says after each measurement of the series, in order."""
    check_drift_options(window=window, warmup=warmup, reference=reference, tolerance=tolerance, z=z, rule=rule)
    check_boolean("higher_is_better", higher_is_better)
    series = _checked(values)
    errors = _Errors(*_checked_errors(len(series), stderrs, per_sample))
    sign, tolerance, z = 1.0 if higher_is_better else -1.0, as_number(tolerance), as_number(z)
    fixed = None if reference is None else _Stretch(as_number(reference), range(0), None)
    stretches = _Stretches(series, sign=sign, window=window, first=warmup)
    fluctuations = _fluctuations(series, first=warmup)
    state, total = Drift() if fixed is None else Drift(fixed.mean), 0.0
    states = [state] * min(warmup, len(series))
    for t in range(warmup, len(series)):
        stretch = fixed or stretches.best_before(t - state.length)
        if stretch is None:
            states.append(state)
            continue
        fall = sign * (stretch.mean - series[t])
        chance = max(errors.of_difference(t, stretch.rows), _of_difference(fluctuations[t], stretch.rows))
        limit = max(tolerance * abs(stretch.mean), z * chance)
        if rule == "consecutive":
            counts = fall > limit
            drifted = counts and state.length + 1 >= window
        else:
            total = min(max(0.0, total + _ratio(fall, limit) - _SLACK), float(window))
            counts, drifted = total > 0, total > window / 2
        length = state.length + 1 if counts else 0
        mean = _mean(series[t + 1 - length : t + 1]) if length else math.nan
        state = Drift(stretch.mean, stretch.best, fall, limit, length, mean, drifted)
        states.append(state)
    return states


def drifted_together(drifts: Mapping[str, Drift], weights: Mapping[str, float], combine: Combine) -> bool:
    """Whether several series have drifted together.

    Args:
        drifts: Where each series stands, by its name; one that is missing has not drifted.
        weights: A positive number for each name.
        combine: ``"any"`` of them is enough, ``"all"`` are needed, or those that hold a ``"majority"``, more than half,
            of the weight.

    Source: ours.
    """
    check_choice("combine", combine, get_args(Combine))
    drifted = [name for name in weights if name in drifts and drifts[name].drifted]
    if combine == "majority":
        return 2 * math.fsum(weights[name] for name in drifted) > math.fsum(weights.values())
    return bool(drifted) if combine == "any" else len(drifted) == len(weights)


def least_measurements(*, window: int, warmup: int, reference: float | None, rule: Rule) -> int:
    """How many measurements there are before a series can have drifted at all."""
    return warmup + (reference is None) + (window if rule == "consecutive" else 1)


def check_drift_options(
    *, window: int, warmup: int, reference: float | None, tolerance: float, z: float, rule: Rule
) -> None:
    """Raise a ``ValueError`` unless the options of :func:`drift` have values that it takes."""
    check_positive_integer("window", window)
    check_integer("warmup", warmup, at_least=0)
    if reference is not None and not math.isfinite(as_number(reference)):
        raise ValueError(expected_but_got("reference", "a finite number or None", reference))
    for name, value in (("tolerance", tolerance), ("z", z)):
        if not 0 <= as_number(value) < math.inf:
            raise ValueError(expected_but_got(name, "a finite number ≥ 0", value))
    check_choice("rule", rule, get_args(Rule))


def _checked(values: Sequence[float]) -> list[float]:
    series = as_numbers(values)
    if series is None or not all(map(math.isfinite, series)):
        raise ValueError(expected_but_got("values", "a list of finite numbers", values))
    return series


def _checked_errors(
    count: int, stderrs: Sequence[float] | None, per_sample: Sequence[Tensor | None] | None
) -> tuple[list[float], list[Tensor | None]]:
    errors = [0.0] * count if stderrs is None else as_numbers(stderrs)
    if errors is None or len(errors) != count or not all(0 <= error < math.inf for error in errors):
        raise ValueError(expected_but_got("stderrs", f"a list of {count} finite numbers ≥ 0", stderrs))
    if per_sample is None:
        return errors, [None] * count
    if (
        not isinstance(per_sample, list | tuple)
        or len(per_sample) != count
        or not all(values is None or _is_flat_and_finite(values) for values in per_sample)
    ):
        raise ValueError(
            expected_but_got("per_sample", f"a list of {count} tensors (N,) of finite numbers, or None", per_sample)
        )
    return errors, list(per_sample)


def _is_flat_and_finite(values: object) -> bool:
    return isinstance(values, Tensor) and values.ndim == 1 and len(values) > 0 and bool(values.isfinite().all())


class _Errors:
    """Of differences between one measurement and the mean of others."""

    def __init__(self, stderrs: list[float], per_sample: list[Tensor | None]) -> None:
        # squares of the largest errors would be endless; a power of two changes nothing else
        self._unit = math.ldexp(1.0, math.frexp(max(stderrs, default=0.0))[1] - 1)
        self._covariances = covariances([error / self._unit for error in stderrs], per_sample)

    def of_difference(self, t: int, rows: range) -> float:
        """The standard error; that of measurement ``t`` where there are no others."""
        variance = self._covariances[t, t]
        if rows:
            others = slice(rows.start, rows.stop)
            variance = variance + self._covariances[others, others].mean() - 2 * self._covariances[t, others].mean()
        return self._unit * math.sqrt(max(0.0, float(variance)))


def _fluctuations(series: list[float], *, first: int) -> list[float]:
    """Standard deviation that the steps before each measurement suggest; 0 where there is none."""
    steps: list[float] = []
    deviations = [0.0] * len(series)
    for t in range(first, len(series)):
        if steps:
            deviations[t] = median_low(steps) / _MEDIAN_STEP
        if t > first:
            insort(steps, abs(series[t] - series[t - 1]))
    return deviations


def _of_difference(deviation: float, rows: range) -> float:
    """Standard deviation of the difference between one value and the mean of others, all independent."""
    return deviation * math.sqrt(1 + 1 / len(rows)) if rows else deviation


@dataclass(frozen=True)
class _Stretch:
    """Mean of consecutive measurements, which they are (none, if it is fixed), and the index of the best of them."""

    mean: float
    rows: range
    best: int | None


class _Stretches:
    """Finds the best stretch among the measurements so far, each stretch looked at once."""

    def __init__(self, series: list[float], *, sign: float, window: int, first: int) -> None:
        self._series, self._sign = series, sign
        self._window, self._first, self._end = window, first, first
        self._best: _Stretch | None = None

    def best_before(self, end: int) -> _Stretch | None:
        """The best stretch of those that end before index ``end``, which never decreases from call to call."""
        while self._end < end:
            self._end += 1
            size = min(self._window, self._end - self._first)
            rows = range(self._end - size, self._end)
            mean = _mean([self._series[i] for i in rows])
            short = self._end - self._first <= self._window  # the first whole stretch takes the place of shorter ones
            if short or self._best is None or self._sign * (mean - self._best.mean) > 0:
                best = max(rows, key=lambda i: self._sign * self._series[i])
                self._best = _Stretch(mean, rows, best)
        return self._best


def _mean(values: list[float]) -> float:
    """Their mean, which rounding does not carry beyond them, nor their sum beyond all floats."""
    mean = math.fsum(value / len(values) for value in values)
    return min(max(mean, min(values)), max(values))


def _ratio(fall: float, limit: float) -> float:
    """How many limits a fall is; without a limit, any fall is endless, and what is none counts as none."""
    if limit > 0:
        return fall / limit
    return math.inf if fall > 0 else 0.0
