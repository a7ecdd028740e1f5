"""The drift rule: what counts as a fall, when falls make a drift, and how often chance alone makes one."""

import math
import random
from collections.abc import Sequence
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_robust.functional.drift.rule import (
    Drift,
    drift,
    drift_history,
    drifted_together,
    least_measurements,
)


def first_drift(values: list[float], stderrs: list[float] | None = None, **options: Any) -> int | None:
    """Number of measurements after which the series has first drifted."""
    states = drift_history(values, stderrs, **{"higher_is_better": True} | options)
    return next((count for count, state in enumerate(states, start=1) if state.drifted), None)


def lengths(values: list[float], **options: Any) -> list[int]:
    return [state.length for state in drift_history(values, **{"higher_is_better": True} | options)]


def references(values: list[float], **options: Any) -> list[float]:
    return [state.reference for state in drift_history(values, **{"higher_is_better": True} | options)]


# --- measurements in a row ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_a_drift_takes_patience_measurements_in_a_row(patience: int) -> None:
    good, bad = [1.0] * 6, [0.5] * 8
    assert first_drift(good + bad, patience=patience) == 6 + patience
    assert first_drift(good + bad[: patience - 1], patience=patience) is None


def test_a_drift_goes_on_until_the_series_recovers() -> None:
    states = drift_history([1.0, 1.0, 0.5, 0.5, 0.5, 1.0], higher_is_better=True, patience=2)
    assert [state.drifted for state in states] == [False, False, False, True, True, False]


def test_one_outlier_is_no_drift() -> None:
    assert first_drift([1.0] * 6 + [0.0] + [1.0] * 6, patience=2) is None


def test_a_recovery_starts_anew() -> None:
    assert first_drift([1.0] * 5 + [0.5] * 4 + [1.0] + [0.5] * 4, patience=5) is None
    assert first_drift([1.0] * 5 + [0.5] * 4 + [1.0] + [0.5] * 5, patience=5) == 15


def test_single_measurements_within_the_limit_interrupt_a_row() -> None:
    assert first_drift([1.0] * 4 + [0.85, 0.85, 1.0] * 8, patience=4, tolerance=0.1, z=0) is None


def test_the_reference_is_left_alone_while_a_drift_is_in_progress() -> None:
    values = [1.0, 1.0, 0.9, 0.9, 0.9, 0.9, 0.9]
    assert references(values, patience=3)[1:] == [1.0] * 6
    assert lengths(values, patience=3) == [0, 0, 1, 2, 3, 4, 5]


def test_the_reference_is_the_best_mean_and_not_the_best_value() -> None:
    state = drift([1.0, 3.0, 1.0, 2.0, 2.0, 0.0], higher_is_better=True, patience=2, z=0)
    assert (state.reference, state.best) == (2.0, 1)  # of 3 and 1, the earliest of the two best means
    assert (state.fall, state.length, state.mean, state.drifted) == (2.0, 1, 0.0, False)


def test_until_there_are_patience_measurements_the_reference_is_the_mean_of_all() -> None:
    assert references([3.0, 6.0, 9.0, 9.0], patience=3)[1:] == [3.0, 4.5, 6.0]


def test_the_first_whole_stretch_replaces_shorter_ones() -> None:
    assert references([4.0, 3.9, 3.8, 3.8, 3.8], patience=3)[-1] == pytest.approx(3.9)  # and not 4, or 3.95


def test_a_drift_may_begin_before_there_is_a_whole_stretch() -> None:
    assert first_drift([1.0] * 2 + [0.5] * 5, patience=5) == 7
    assert first_drift([1.0] + [0.5] * 5, patience=5, z=0) == 6


def test_measurements_of_the_warm_up_count_neither_as_reference_nor_as_drift() -> None:
    values = [9.0, 9.0, 1.0, 1.0, 1.0, 0.5, 0.5]
    assert first_drift(values, patience=2) == 4
    assert first_drift(values, patience=2, warmup=2) == 7
    assert drift(values[:2], higher_is_better=True, warmup=2) == Drift()
    assert drift(values, higher_is_better=True, patience=2, warmup=2).best == 2


def test_a_fixed_reference_has_no_error_and_needs_no_measurement_before() -> None:
    assert first_drift([0.5, 0.5], patience=2, reference=1.0) == 2
    assert references([2.0, 3.0, 0.5], patience=2, reference=1.0) == [1.0] * 3
    assert drift([0.5], [0.1], higher_is_better=True, reference=1.0, tolerance=0, z=3).limit == pytest.approx(0.3)


def test_where_lower_is_better_a_rise_is_a_drift_and_a_fall_is_none() -> None:
    assert first_drift([1.0] * 5 + [1.5] * 5, patience=3, higher_is_better=False) == 8
    assert first_drift([1.0] * 5 + [0.5] * 5, patience=3, higher_is_better=False) is None
    assert drift([2.0, 1.0, 3.0], higher_is_better=False, patience=1).reference == 1.0


@pytest.mark.parametrize(("tolerance", "drifts"), [(0.24, True), (0.25, False), (0.26, False)])
@pytest.mark.parametrize("sign", [1, -1])
def test_tolerance_alone_is_relative_to_the_reference(tolerance: float, drifts: bool, sign: int) -> None:
    values = [4.0 * sign] * 3 + [4.0 * sign - 1] * 2
    assert (first_drift(values, patience=2, tolerance=tolerance, z=0) is not None) is drifts


def test_z_alone_is_in_standard_errors_of_the_measurement_and_the_mean() -> None:
    values, stderrs = [1.0, 1.0, 1.0, 1.0, 0.0], [0.2, 0.2, 0.2, 0.2, 0.3]
    state = drift(values, stderrs, higher_is_better=True, patience=4, tolerance=0, z=2)
    assert state.limit == pytest.approx(2 * math.sqrt(0.3**2 + 0.2**2 / 4))
    assert (state.fall, state.length) == (1.0, 1)
    assert drift(values, stderrs, higher_is_better=True, patience=4, tolerance=0, z=4).length == 0


def test_fluctuations_of_a_series_raise_the_limit() -> None:
    """The limit comes from the median step before the measurement; no standard errors are reported."""
    values = [0.0, 0.3, 0.0, 0.1, 0.0, 0.2, 0.1, -5.0]  # steps of 0.3, 0.3, 0.1, 0.1, 0.2, 0.1, and then 5.1
    state = drift(values, higher_is_better=True, patience=2, z=3)
    assert state.limit == pytest.approx(3 * 0.1 / (math.sqrt(2) * 0.67449) * math.sqrt(1 + 1 / 2), rel=1e-4)
    fixed = drift(values, higher_is_better=True, patience=2, reference=0.0, z=3)
    assert fixed.limit == pytest.approx(3 * 0.1 / (math.sqrt(2) * 0.67449), rel=1e-4)
    after_warmup = drift(values, higher_is_better=True, patience=2, warmup=3, reference=0.0, z=3)  # 0.1, 0.2 and 0.1
    assert after_warmup.limit == pytest.approx(fixed.limit)
    assert drift([9.0, *values], higher_is_better=True, patience=2, warmup=1, z=3).limit == pytest.approx(state.limit)


def test_steady_learning_is_no_fluctuation_that_hides_a_collapse() -> None:
    values = [0.1 * step for step in range(10)] + [0.3] * 8
    assert first_drift(values, patience=5) == 15


@pytest.mark.parametrize(("tolerance", "z", "limit"), [(0.1, 1, 0.4), (0.01, 1, 0.2), (0, 0, 0)])
def test_the_larger_of_both_limits_counts(tolerance: float, z: float, limit: float) -> None:
    state = drift([4.0, 4.0], [0.0, 0.2], higher_is_better=True, patience=1, tolerance=tolerance, z=z)
    assert state.limit == pytest.approx(limit)


# --- measurements of the same samples -------------------------------------------------------------------------------


def found(generator: torch.Generator, means: Sequence[float], *, num_samples: int, luck: float) -> list[Tensor]:
    """Values per sample: noise of standard deviation 1, plus ``luck`` that all measurements share."""
    same = luck * torch.randn(num_samples, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(means), num_samples, generator=generator, dtype=torch.float64)
    return list(torch.tensor(means, dtype=torch.float64)[:, None] + same + noise)


def reported(per_sample: list[Tensor]) -> tuple[list[float], list[float]]:
    """Means and standard errors as metrics log them."""
    return (
        [float(values.mean()) for values in per_sample],
        [float(values.std()) / math.sqrt(len(values)) for values in per_sample],
    )


def test_on_the_same_samples_the_error_is_that_of_paired_differences() -> None:
    per_sample = found(torch.Generator().manual_seed(1), [1.0] * 4 + [0.0], num_samples=50, luck=3.0)
    state = drift(*reported(per_sample), per_sample, higher_is_better=True, patience=4, tolerance=0, z=2)
    paired = torch.stack(per_sample[:4]).mean(dim=0) - per_sample[4]
    assert state.fall == pytest.approx(float(paired.mean()))
    assert state.limit == pytest.approx(2 * float(paired.std()) / math.sqrt(50))
    apart = drift(*reported(per_sample), higher_is_better=True, patience=4, tolerance=0, z=2)
    assert apart.limit > 2 * state.limit


def test_without_values_per_sample_errors_are_independent() -> None:
    values, stderrs = [1.0, 1.0, 0.5], [0.1, 0.2, 0.2]
    for per_sample in (None, [None] * 3, [torch.randn(n + 2) for n in range(3)]):
        state = drift(values, stderrs, per_sample, higher_is_better=True, patience=2, z=2)
        assert state.limit == pytest.approx(2 * math.hypot(0.2, math.hypot(0.1, 0.2) / 2))


def test_against_a_fixed_reference_samples_do_not_pair() -> None:
    per_sample = found(torch.Generator().manual_seed(0), [0.0] * 3, num_samples=50, luck=3.0)
    values, stderrs = reported(per_sample)
    options: dict[str, Any] = {"higher_is_better": True, "reference": 1.0, "tolerance": 0}
    assert drift(values, stderrs, per_sample, **options) == drift(values, stderrs, **options)
    assert drift(values, stderrs, per_sample, **options).limit == pytest.approx(2 * stderrs[-1])


def test_errors_of_any_size_are_paired() -> None:
    """Their squares would overflow."""
    per_sample = found(torch.Generator().manual_seed(0), [1.0, 0.0], num_samples=50, luck=3.0)
    values, stderrs = reported(per_sample)
    small = drift(values, stderrs, per_sample, higher_is_better=True, z=2)
    for scale in (2.0**-1000, 2.0**1000):
        scaled = [scale * error for error in stderrs]
        state = drift(values, scaled, per_sample, higher_is_better=True, tolerance=0, z=2)
        assert state.limit == pytest.approx(scale * small.limit, rel=1e-12)


# --- laws -----------------------------------------------------------------------------------------------------------

# Eighths of small integers and scales that are powers of two: nothing is rounded that would not be without a scale.
numbers = st.integers(-24, 24).map(lambda n: n / 8)
errors = st.integers(0, 8).map(lambda n: n / 8)
series = st.lists(st.tuples(numbers, errors), max_size=25)
options = st.fixed_dictionaries(
    {
        "patience": st.integers(1, 5),
        "warmup": st.integers(0, 3),
        "reference": st.none() | numbers,
        "tolerance": st.sampled_from([0.0, 0.05, 0.25]),
        "z": st.sampled_from([0.0, 0.5, 2.0]),
    }
)
some = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def split(series: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [value for value, _ in series], [error for _, error in series]


def marks(states: list[Drift]) -> list[tuple[int | None, int, bool]]:
    """The part of a state that does not depend on the unit."""
    return [(state.best, state.length, state.drifted) for state in states]


@some
@given(series, options, st.booleans(), st.integers(-30, 30).map(lambda n: 2.0**n))
def test_the_unit_of_the_values_does_not_matter(
    series: list[tuple[float, float]], options: dict[str, Any], higher_is_better: bool, scale: float
) -> None:
    values, stderrs = split(series)
    states = drift_history(values, stderrs, higher_is_better=higher_is_better, **options)
    if options["reference"] is not None:
        options = options | {"reference": scale * options["reference"]}
    scaled = [[scale * number for number in numbers] for numbers in (values, stderrs)]
    again = drift_history(*scaled, higher_is_better=higher_is_better, **options)
    assert marks(again) == marks(states)
    assert [state.fall for state in again] == pytest.approx([scale * state.fall for state in states], nan_ok=True)


@some
@given(series, options, st.booleans())
def test_the_negative_of_a_series_with_the_other_direction_drifts_alike(
    series: list[tuple[float, float]], options: dict[str, Any], higher_is_better: bool
) -> None:
    values, stderrs = split(series)
    states = drift_history(values, stderrs, higher_is_better=higher_is_better, **options)
    if options["reference"] is not None:
        options = options | {"reference": -options["reference"]}
    negative = drift_history([-value for value in values], stderrs, higher_is_better=not higher_is_better, **options)
    assert marks(negative) == marks(states)
    assert [state.limit for state in negative] == pytest.approx([state.limit for state in states], nan_ok=True)


@some
@given(series, options, st.booleans())
def test_later_measurements_do_not_change_earlier_states(
    series: list[tuple[float, float]], options: dict[str, Any], higher_is_better: bool
) -> None:
    values, stderrs = split(series)
    states = drift_history(values, stderrs, higher_is_better=higher_is_better, **options)
    assert len(states) == len(values)
    for count in range(len(values) + 1):
        state = drift(values[:count], stderrs[:count], higher_is_better=higher_is_better, **options)
        expected = states[count - 1] if count else Drift()
        assert repr(state) == repr(expected)  # NaN differs from itself


@some
@given(st.lists(st.floats(-1e6, 1e6), max_size=25).map(sorted), options, st.booleans())
def test_a_series_that_never_gets_worse_never_drifts(
    values: list[float], options: dict[str, Any], higher_is_better: bool
) -> None:
    if not higher_is_better:
        values = [-value for value in values]
    options = options | {"reference": None}
    assert first_drift(values, higher_is_better=higher_is_better, **options) is None


def test_a_constant_series_never_drifts_despite_rounding_of_its_mean() -> None:
    value = 1.6291691019727514
    assert math.fsum([value] * 5) / 5 > value
    for sign in (1, -1):
        assert first_drift([sign * value] * 30, tolerance=0, higher_is_better=sign > 0) is None


@some
@given(series, options, numbers, st.sampled_from([("tolerance", 2.0), ("z", 3.0)]))
def test_with_a_fixed_reference_larger_limits_never_drift_earlier(
    series: list[tuple[float, float]], options: dict[str, Any], reference: float, change: tuple[str, float]
) -> None:
    """For the best mean so far this does not hold: a fall that no longer counts enters the mean."""
    values, stderrs = split(series)
    options = options | {"reference": reference}
    name, factor = change
    sooner = first_drift(values, stderrs, **options)
    later = first_drift(values, stderrs, **options | {name: factor * options[name]})
    assert later is None or (sooner is not None and sooner <= later)


# --- chance ---------------------------------------------------------------------------------------------------------


def noise(generator: random.Random, count: int, mean: float = 0.0) -> list[float]:
    return [generator.gauss(mean, 1.0) for _ in range(count)]


@pytest.mark.long
def test_noise_of_the_reported_size_rarely_drifts_within_a_hundred_measurements() -> None:
    generator, num_series = random.Random(0), 1500
    false_stops = sum(
        first_drift(noise(generator, 100), [1.0] * 100, tolerance=0) is not None for _ in range(num_series)
    )
    assert 0 < false_stops <= 0.02 * num_series, f"{false_stops} of {num_series} series"


@pytest.mark.long
@pytest.mark.parametrize("reported", [0.0, 0.5])
def test_noise_that_is_in_no_reported_error_rarely_drifts(reported: float) -> None:
    """Like fluctuations of training."""
    generator, num_series = random.Random(0), 500
    errors = [reported] * 100
    stops = sum(first_drift(noise(generator, 100), errors, tolerance=0) is not None for _ in range(num_series))
    assert stops <= 0.06 * num_series, f"{stops} of {num_series} series"


def test_with_a_smaller_z_noise_drifts_often() -> None:
    """Shows that the levels above are due to the limit, not to a rule that never stops."""
    generator, num_series = random.Random(0), 200
    stops = sum(
        first_drift(noise(generator, 100), [1.0] * 100, tolerance=0, z=1) is not None for _ in range(num_series)
    )
    assert stops > 0.2 * num_series, f"{stops} of {num_series} series"


@pytest.mark.long
@pytest.mark.parametrize("luck", [0.0, 2.0])
def test_noise_beside_the_luck_of_the_samples_rarely_drifts(luck: float) -> None:
    generator, num_series = torch.Generator().manual_seed(0), 400
    false_stops = 0
    for _ in range(num_series):
        per_sample = found(generator, [0.0] * 100, num_samples=64, luck=luck)
        false_stops += first_drift(*reported(per_sample), per_sample=per_sample, tolerance=0) is not None
    assert false_stops <= 0.03 * num_series, f"{false_stops} of {num_series} series"


def test_beside_the_luck_of_the_samples_a_true_fall_is_found_that_is_within_the_errors() -> None:
    """The fall is four standard errors without the shared luck, and 0.9 standard errors with it."""
    generator, num_series, before = torch.Generator().manual_seed(0), 100, 20
    paired, apart = [], []
    for _ in range(num_series):
        means = [0.0] * before + [-4.0 / 8] * 40
        per_sample = found(generator, means, num_samples=64, luck=4.3)
        values, stderrs = reported(per_sample)
        for waited, samples in ((paired, per_sample), (apart, None)):
            after = first_drift(values, stderrs, per_sample=samples, tolerance=0)
            waited.append(math.inf if after is None else after - before)
    assert median(paired) == 5
    assert median(apart) == math.inf


@pytest.mark.parametrize("fall", [3, 4])
def test_a_true_fall_is_found_soon(fall: float) -> None:
    generator, before, after = random.Random(1), 20, 40
    waited = []
    for _ in range(301):
        values = noise(generator, before) + noise(generator, after, -fall)
        found = first_drift(values, [1.0] * len(values), tolerance=0)
        waited.append(math.inf if found is None else found - before)
    assert median(waited) == 5
    assert sum(count > 15 for count in waited) < 0.15 * len(waited)


# --- several series -------------------------------------------------------------------------------------------------

UP, DOWN = Drift(drifted=False), Drift(drifted=True)


@pytest.mark.parametrize(
    ("down", "one", "every"), [("", False, False), ("a", True, False), ("ab", True, False), ("abc", True, True)]
)
def test_any_or_all_of_several_series_drift_together(down: str, one: bool, every: bool) -> None:
    drifts = {name: DOWN if name in down else UP for name in "abc"}
    assert drifted_together(drifts, "abc", "any") is one
    assert drifted_together(drifts, "abc", "all") is every


def test_a_series_that_is_missing_has_not_drifted() -> None:
    assert drifted_together({"a": DOWN}, ["a", "b"], "any")
    assert not drifted_together({"a": DOWN}, ["a", "b"], "all")
    assert not drifted_together({}, ["a", "b"], "any")


@pytest.mark.parametrize("reference", [None, 1.0])
@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("patience", [1, 3])
def test_no_series_drifts_before_the_least_number_of_measurements_and_some_does_then(
    reference: float | None, warmup: int, patience: int
) -> None:
    options: dict[str, Any] = {"patience": patience, "warmup": warmup, "reference": reference}
    least = least_measurements(**options)
    worst = [1.0] * (warmup + 1 if reference is None else 0) + [-(10.0**n) for n in range(10)]
    assert first_drift(worst, **options) == least
    generator = random.Random(0)
    for _ in range(100):
        found = first_drift([generator.choice([1e9, 1.0, -1e9]) for _ in range(12)], **options)
        assert found is None or found >= least


# --- arguments ------------------------------------------------------------------------------------------------------


def test_a_series_without_measurements_has_no_state() -> None:
    assert drift([], higher_is_better=True) == Drift()
    assert drift_history([], higher_is_better=True) == []


def test_without_errors_they_are_zero() -> None:
    values = [1.0, 0.9, 1.2, 0.7]
    assert [repr(state) for state in drift_history(values, higher_is_better=True)] == [
        repr(state) for state in drift_history(values, [0.0] * 4, higher_is_better=True)
    ]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(
            ("values", value)
            for value in ([1.0, math.nan], [math.inf], [None], ["1"], [True], 1.0, None, "12", [[1.0]])
        ),
        *(("stderrs", value) for value in ([0.1], [0.1] * 3, [0.1, -0.1], [0.1, math.nan], [0.1, math.inf], 0.1, "ab")),
        *(
            ("per_sample", value)
            for value in (
                [None],
                [torch.ones(3), torch.ones(2, 3)],
                [torch.ones(3), torch.ones(0)],
                [torch.ones(3), torch.tensor([1.0, math.nan])],
                [None, [1.0, 2.0]],
                torch.ones(2, 3),
                3,
            )
        ),
        *(("higher_is_better", value) for value in (None, 1, 0, "max", math.nan)),
        *(("patience", value) for value in (0, -1, True, 1.5, 2.0, "5", None)),
        *(("warmup", value) for value in (-1, True, 1.5, "5", None)),
        *(("reference", value) for value in (math.nan, math.inf, True, "1", [1.0])),
        *(("tolerance", value) for value in (-0.1, math.nan, math.inf, True, "0.1", None)),
        *(("z", value) for value in (-0.1, math.nan, math.inf, False, "2", None)),
    ],
    ids=repr,
)
def test_a_wrong_argument_is_named_with_its_value(argument: str, value: Any) -> None:
    given = {"values": [1.0, 2.0], "higher_is_better": True} | {argument: value}
    for function in (drift, drift_history):
        with pytest.raises(ValueError, match=f"`{argument}`") as raised:
            function(**given)
        assert isinstance(value, Tensor) or str(raised.value).endswith(f"but got {value!r}.")


@pytest.mark.parametrize("value", ["most", "majority", "", None, 1, ("any",)], ids=repr)
def test_a_wrong_way_to_combine_is_named_with_its_value(value: Any) -> None:
    with pytest.raises(ValueError, match="`combine`") as raised:
        drifted_together({}, ["a"], value)
    assert str(raised.value).endswith(f"but got {value!r}.")


def test_finite_values_of_any_size_are_judged() -> None:
    huge = [1e308] * 6 + [-1e308] * 5
    assert first_drift(huge) == 11
