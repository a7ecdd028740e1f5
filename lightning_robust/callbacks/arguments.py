"""Constructor arguments, which configuration files also write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_robust.functional._validation.arguments import as_numbers, expected_but_got
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
    """Give a wrong type or value the name that Lightning has for it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(str(error)) from error


def as_metrics(metrics: Sequence[str | ProbeMetric] | None) -> list[ProbeMetric]:
    """Return the metrics that are meant, the default ones for None, or raise a ``ValueError``."""
    if metrics is None:
        return [FisherSpectralNorm(), LinearizedAccuracy(), HessianTrace(), WeightCurvatureIndex()]
    if isinstance(metrics, str | bytes) or not isinstance(metrics, Sequence) or not metrics:
        raise ValueError(expected_but_got("metrics", "a non-empty list of metrics or their names", metrics))
    for metric in metrics:
        if not isinstance(metric, ProbeMetric) and not (isinstance(metric, str) and metric in METRICS):
            expected = f"a list of metrics of lightning_robust.metrics or names among {sorted(METRICS)}"
            raise ValueError(expected_but_got("metrics", expected, metric))
    for number, metric in enumerate(metrics):
        if any(metric is other for other in metrics[:number]):  # an object would count every sample twice
            raise ValueError(expected_but_got("metrics", "a list that holds each metric once", list(metrics)))
    return [METRICS[metric]() if isinstance(metric, str) else metric for metric in metrics]


def as_constant(
    name: str, value: float | Sequence[float] | Tensor | None, *, positive: bool = True
) -> float | list[float] | None:
    """Return plain numbers, or raise a ``ValueError`` unless it is a finite (positive) number or a list of them."""
    if value is None:
        return None
    numbers = check_constant(name, value, positive=positive)
    return numbers[0] if as_numbers(value) is None else numbers
