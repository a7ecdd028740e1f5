"""Checks of constructor arguments, which configuration files also write. Each says what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_robust.functional._checks import check_units
from lightning_robust.functional._losses import LossFn, check_loss_fn
from lightning_robust.metrics import (
    METRICS,
    FisherSpectralNorm,
    HessianTrace,
    LinearizedAccuracy,
    ProbeMetric,
    WeightCurvatureIndex,
)


def as_metrics(metrics: Sequence[str | ProbeMetric] | None) -> list[ProbeMetric]:
    """Return the metrics that are meant, the default ones for None, or raise."""
    if metrics is None:
        return [FisherSpectralNorm(), LinearizedAccuracy(), HessianTrace(), WeightCurvatureIndex()]
    if isinstance(metrics, str) or not isinstance(metrics, Sequence) or not metrics:
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
    """Return ``value``, or raise unless it is an integer of at least ``at_least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise MisconfigurationException(
            f"Expected argument `{name}` to be an integer of at least {at_least}, but got {value!r}."
        )
    return value


def check_constant(
    name: str, value: float | Sequence[float] | Tensor | None, *, positive: bool = False
) -> float | list[float] | None:
    """Return ``value`` as plain numbers, or raise unless it is a finite (positive) number or a list of them."""
    if value is None:
        return None
    plain = value.tolist() if isinstance(value, Tensor) else value
    numbers: list[Any] = list(plain) if isinstance(plain, tuple | list) else [plain]
    for number in numbers or [None]:
        if not (isinstance(number, Real) and math.isfinite(number) and (float(number) > 0 or not positive)):
            raise MisconfigurationException(
                f"Expected argument `{name}` to be a {'positive' if positive else 'finite'} number, or a list of one"
                f" per channel, but got {value!r}."
            )
    return numbers if isinstance(plain, tuple | list) else float(numbers[0])


def check_loss(value: LossFn | None) -> LossFn | None:
    """Return the loss function, or raise unless it is one."""
    try:
        check_loss_fn(value)
    except TypeError as error:
        raise MisconfigurationException(str(error)) from error
    return value


def check_range(
    value: tuple[float, float] | None,
    *,
    input_std: float | list[float] | None,
    input_mean: float | list[float] | None,
) -> tuple[float, float] | None:
    """Return the valid range, or raise unless it is sound beside the normalisation."""
    try:
        check_units(input_std=input_std, input_mean=input_mean, valid_range=value)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    return value
