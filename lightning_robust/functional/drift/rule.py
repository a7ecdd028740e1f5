"""The drift rule: has a series of measurements fallen below its best by more than chance explains?

The **reference** is the best mean of ``patience`` consecutive measurements so far (of fewer until there are that many),
or a fixed number. A measurement ``x_t`` has **fallen** by ``d_t``. The fall counts if it exceeds the **limit** ``l_t``:

    d_t = reference − x_t   (the opposite sign where lower is better),
    l_t = max(tolerance · |reference|, z · s_t, z · f_t).

The series has **drifted** after ``patience`` measurements in a row with ``d_t > l_t``. The reference stays fixed while
falls are being counted.

``s_t`` and ``f_t`` measure two kinds of chance:

- ``s_t``, sampling error: the standard error of the difference. For independent measurements it is the square root of
  ``stderr``² plus the squared standard error of the mean. If values ``per_sample`` are given and all measurements use
  the same samples, most of the sampling error cancels in the difference, and ``s_t`` is often half as large.
- ``f_t``, fluctuations of training, which no standard error contains: the standard deviation estimated from the median
  step ``|x_i − x_{i−1}|`` so far, as on a control chart of moving ranges, times √(1 + 1/n) for a mean of n values.
  Fluctuations that persist for many measurements count as drift.

The reference is a mean, not the single best value, because the best of many noisy values exceeds the truth by luck: by
two standard errors among thirty values, but by less than one among thirty means of five.

False alarms on white noise within 100 measurements (tolerance 0, 1,000 series, ± 2 % at most):

    patience, z                          3, 2    3, 2.5   5, 1.5   5, 2    5, 2.5   10, 1   10, 1.5
    noise reported as standard error     20 %    2 %      7 %      0.3 %   0 %      0.4 %   0 %
    noise not reported                   40 %    14 %     16 %     4 %     1 %      0.7 %   0 %

With the default tolerance, unreported noise of 3 % of the value stops 2 % of series, noise of 5 % stops 4 %. The rule
cannot recognise a series that wanders: if each value keeps half of the last value's distance from the mean, with a
standard deviation of 3 %, it stops 60 % of series. With the defaults, it detects a fall of 3 or 4 standard errors after
5 measurements (median).

Source: ours.
Cost: T² N multiplications for T measurements of N samples: 0.1 s for a thousand measurements of a thousand samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lightning_robust.functional._validation.arguments import (
    as_number,
    as_numbers,
    check_boolean,
    check_choice,
    check_integer,
    check_number,
    check_positive_integer,
    expected_but_got,
    optional,
)
from lightning_robust.functional.drift._noise import Noise
from lightning_robust.functional.drift._reference import BestStretch, Stretch, mean_of

Combine = Literal["any", "all"]


@dataclass(frozen=True)
class Drift:
    """State of a series after its latest measurement.

    Attributes:
        reference: Value that measurements are compared with; NaN before there is one.
        best: Index of the best measurement among those that the reference is the mean of; None before there is one, and
            for a fixed reference.
        fall: How far the latest measurement is below the reference (above it, where lower is better), in units of the
            values; negative if it is better, NaN without a reference.
        limit: Fall that the latest measurement must exceed to count; NaN without a reference.
        length: Number of latest measurements in a row that have fallen by more than the limit.
        mean: Mean of these measurements; NaN if there are none.
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
    patience: int = 5,
    warmup: int = 0,
    reference: float | None = None,
    tolerance: float = 0.05,
    z: float = 2.0,
) -> Drift:
    """Judge a series after its latest measurement.

    Args:
        values: One finite number per measurement, in order.
        stderrs: Their standard errors; 0 by default.
        per_sample: For each measurement its value on each sample, finite, (N,), or None if unknown. Measurements with
            equally many samples are assumed to use the same samples in the same order.
        higher_is_better: True if a fall is a drift, False if a rise is.
        patience: Measurements in a row that must fall for a drift. The reference is the mean of as many.
        warmup: Measurements at the beginning that count neither as reference nor as drift.
        reference: Fixed reference, in units of the values and without an error; by default the best mean so far.
        tolerance: Fall that does not matter, relative to the reference.
        z: Fall that chance may explain, in standard deviations of the difference.

    Returns:
        A :class:`Drift`.

    Raises:
        ValueError: If an option has a wrong value, a value is not finite, a standard error is negative or not finite,
            or ``stderrs`` or ``per_sample`` do not fit ``values``.

    Source: ours; see the module's docstring.
    """
    states = drift_history(
        values,
        stderrs,
        per_sample,
        higher_is_better=higher_is_better,
        patience=patience,
        warmup=warmup,
        reference=reference,
        tolerance=tolerance,
        z=z,
    )
    return states[-1] if states else Drift()


def drift_history(
    values: Sequence[float],
    stderrs: Sequence[float] | None = None,
    per_sample: Sequence[Tensor | None] | None = None,
    *,
    higher_is_better: bool,
    patience: int = 5,
    warmup: int = 0,
    reference: float | None = None,
    tolerance: float = 0.05,
    z: float = 2.0,
) -> list[Drift]:
    """Judge a series after each of its measurements; the arguments and errors are those of :func:`drift`.

    Returns:
        One :class:`Drift` per measurement, in order. The last is what :func:`drift` returns.

    Source: ours; see the module's docstring.
    """
    check_drift_options(patience=patience, warmup=warmup, reference=reference, tolerance=tolerance, z=z)
    check_boolean("higher_is_better", higher_is_better)
    series = _checked(values)
    noise = Noise(series, *_checked_errors(len(series), stderrs, per_sample), first=warmup)
    sign, tolerance, z = 1.0 if higher_is_better else -1.0, as_number(tolerance), as_number(z)
    fixed = None if reference is None else Stretch(as_number(reference), range(0), None)
    best = BestStretch(series, sign=sign, size=patience, first=warmup)
    state = Drift() if fixed is None else Drift(fixed.mean)
    states = [state] * min(warmup, len(series))
    for t in range(warmup, len(series)):
        stretch = fixed or best.before(t - state.length)
        if stretch is None:
            states.append(state)
            continue
        fall = sign * (stretch.mean - series[t])
        limit = max(tolerance * abs(stretch.mean), z * noise.of_difference(t, stretch.rows))
        length = state.length + 1 if fall > limit else 0
        mean = mean_of(series[t + 1 - length : t + 1]) if length else math.nan
        state = Drift(stretch.mean, stretch.best, fall, limit, length, mean, drifted=length >= patience)
        states.append(state)
    return states


def drifted_together(drifts: Mapping[str, Drift], names: Iterable[str], combine: Combine) -> bool:
    """Tell whether several series have drifted together.

    Args:
        drifts: State of each series, by name.
        names: Series to look at; one that is missing in ``drifts`` has not drifted.
        combine: ``"any"`` if one drifted series is enough, ``"all"`` if all must have drifted.

    Raises:
        ValueError: If ``combine`` has a wrong value.

    Source: ours.
    """
    check_choice("combine", combine, get_args(Combine))
    drifted = [name in drifts and drifts[name].drifted for name in names]
    return any(drifted) if combine == "any" else all(drifted)


def least_measurements(*, patience: int, warmup: int, reference: float | None) -> int:
    """Smallest number of measurements after which a series can have drifted."""
    return warmup + (reference is None) + patience


def check_drift_options(*, patience: int, warmup: int, reference: float | None, tolerance: float, z: float) -> None:
    """Raise a ``ValueError`` if an option of :func:`drift` has a wrong value."""
    check_positive_integer("patience", patience)
    check_integer("warmup", warmup, at_least=0)
    optional(check_number, "reference", reference, "a finite number or None")
    check_number("tolerance", tolerance, "a finite number ≥ 0", at_least=0)
    check_number("z", z, "a finite number ≥ 0", at_least=0)


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
    expected = f"a list of {count} tensors (N,) of finite numbers, or None"
    if not isinstance(per_sample, Sequence) or len(per_sample) != count or not all(map(_is_vector, per_sample)):
        raise ValueError(expected_but_got("per_sample", expected, per_sample))
    return errors, list(per_sample)


def _is_vector(values: object) -> bool:
    if not isinstance(values, Tensor):
        return values is None  # not known
    return values.ndim == 1 and len(values) > 0 and bool(values.isfinite().all())
