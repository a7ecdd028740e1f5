"""Checks of constructor arguments, which configuration files also write. Each says what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_robust.metrics import METRICS, FisherSpectralNorm, LinearizedAccuracy, ProbeMetric


def as_metrics(metrics: Sequence[str | ProbeMetric] | None) -> list[ProbeMetric]:
    if metrics is None:
        return [FisherSpectralNorm(), LinearizedAccuracy()]
    if isinstance(metrics, str) or not metrics:
        raise MisconfigurationException(
            f"Expected argument `metrics` to be a non-empty list of metrics or their names, but got {metrics!r}."
        )
    for metric in metrics:
        if not isinstance(metric, ProbeMetric) and metric not in METRICS:
            raise MisconfigurationException(
                f"Expected argument `metrics` to hold metrics of lightning_robust.metrics or names among"
                f" {sorted(METRICS)}, but got {metric!r}."
            )
    return [METRICS[metric]() if isinstance(metric, str) else metric for metric in metrics]


def check_integer(name: str, value: int, *, at_least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise MisconfigurationException(
            f"Expected argument `{name}` to be an integer of at least {at_least}, but got {value!r}."
        )
    return value


def check_constant(name: str, value: float | Sequence[float] | None) -> float | list[float] | None:
    if value is None or isinstance(value, int | float):
        values = [] if value is None else [value]
    else:
        values = value = [float(entry) for entry in value]
    if not all(math.isfinite(entry) and (entry > 0 or name != "input_std") for entry in values):
        kind = "positive" if name == "input_std" else "finite"
        raise MisconfigurationException(f"Expected argument `{name}` to be {kind}, but got {value!r}.")
    return value


def check_range(name: str, value: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return ``value``, or raise unless it is None or two numbers in ascending order."""
    if value is not None and not (len(value) == 2 and value[0] < value[1]):
        raise MisconfigurationException(
            f"Expected argument `{name}` to be (low, high) with low < high, but got {value}."
        )
    return value
