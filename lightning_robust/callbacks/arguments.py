"""Checks of constructor arguments, which may come from Python or from configuration files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from lightning_robust.functional._validation.arguments import as_number, as_numbers, as_sequence, expected_but_got
from lightning_robust.functional.input_space.units import check_constant
from lightning_robust.metrics import (
    METRICS,
    FisherSpectralNorm,
    HessianTrace,
    LinearizedAccuracy,
    ProbeMetric,
    WeightCurvatureIndex,
)


@contextmanager
def misconfiguration() -> Iterator[None]:
    """Turn a ``TypeError`` or ``ValueError`` into Lightning's ``MisconfigurationException``."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(str(error)) from error


def as_metrics(
    metrics: Sequence[str | ProbeMetric] | str | ProbeMetric | None, *, with_margins: bool = True
) -> list[ProbeMetric]:
    """Return metrics for a metric or a name, or several; the defaults for None; or raise a ``ValueError``."""
    if metrics is None:
        margins = [LinearizedAccuracy()] if with_margins else []
        return [FisherSpectralNorm(), *margins, HessianTrace(), WeightCurvatureIndex()]
    entries = [metrics] if isinstance(metrics, str | ProbeMetric) else as_sequence(metrics)
    if not entries:
        raise ValueError(expected_but_got("metrics", "a non-empty list of metrics or their names", metrics))
    found: list[ProbeMetric] = []
    for metric in entries:
        if not isinstance(metric, ProbeMetric) and not (isinstance(metric, str) and metric in METRICS):
            expected = f"a list of metrics of lightning_robust.metrics or names among {sorted(METRICS)}"
            raise ValueError(expected_but_got("metrics", expected, metric))
        if any(metric is other for other in found):  # an object would count every sample twice
            expected = "a list that holds each metric once (`metric.clone()` makes another)"
            raise ValueError(expected_but_got("metrics", expected, list(entries)))
        found.append(METRICS[metric]() if isinstance(metric, str) else metric)
    return found


def check_unshared(metrics: Sequence[ProbeMetric], others: Sequence[ProbeMetric]) -> None:
    """Raise a ``ValueError`` if a metric, or one within it, is also among those of another monitor."""
    theirs = {id(metric) for metric in _within(others)}
    if shared := next((metric for metric in _within(metrics) if id(metric) in theirs), None):
        name = type(shared).__name__
        raise ValueError(
            f"Expected argument `metrics` to hold metrics of one RobustnessMonitor alone, but got one {name} object in"
            f" two of them, which would add up the samples of both. Give each its own, e.g. `metrics=[metric.clone()]`."
        )


def check_prefix(prefix: str, others: Sequence[str]) -> None:
    """Raise a ``ValueError`` if the prefix of a monitor is also that of another."""
    if prefix in others:
        other = f"{prefix.rstrip('/')}_2/"
        raise ValueError(
            f"Expected argument `log_key_prefix` to differ between the RobustnessMonitors of a Trainer, but got"
            f" {prefix!r} in two of them, which would log under the same keys. Give the second its own, e.g. {other!r}."
        )


def _within(metrics: Sequence[ProbeMetric]) -> list[Metric]:
    return [inner for metric in metrics for inner in metric.modules() if isinstance(inner, Metric)]


def as_constant(
    name: str, value: float | Sequence[float] | Tensor | None, *, positive: bool = True
) -> float | list[float] | None:
    """Return a number or a list of numbers, or raise a ``ValueError`` unless all are finite (and positive)."""
    if value is None:
        return None
    numbers = check_constant(name, value, positive=positive)
    return numbers[0] if as_numbers(value) is None else numbers


def as_monitor_weights(monitor: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Return a weight for each key, 1 by default, or raise a ``ValueError``."""
    expected = "a key, a list of different keys, or a mapping of keys to positive numbers"
    given: Mapping[Any, Any] | None = monitor if isinstance(monitor, Mapping) else None
    keys = [monitor] if isinstance(monitor, str) else list(given or as_sequence(monitor) or [])
    weights: dict[str, float] = {}
    if all(isinstance(key, str) and key for key in keys):
        weights = {str(key): 1.0 if given is None else as_number(given[key]) for key in keys}
    if not keys or len(weights) < len(keys) or not all(0 < weight < math.inf for weight in weights.values()):
        raise ValueError(expected_but_got("monitor", expected, monitor))
    return weights
