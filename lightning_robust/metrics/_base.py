"""What all metrics share: they are updated with a probe, and put error bars under the same names."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_robust.probe import Probe


class ProbeMetric(Metric, ABC):
    """A torchmetrics ``Metric`` of a network, updated with a :class:`~lightning_robust.Probe`.

    States are sums or concatenations in float64, so that values do not depend on how the samples were spread over
    updates or processes. ``compute()`` returns a flat dictionary of 0-d tensors; it is empty if no sample was seen.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.set_dtype(torch.float64)  # a process without samples sends empty states, which must be of the same dtype

    def update(self, probe: Probe) -> None:
        """Add the samples of ``probe``. A probe without samples is valid and adds nothing.

        Raises:
            TypeError: If ``probe`` is not a Probe.
        """
        if not isinstance(probe, Probe):
            raise TypeError(
                f"Expected {type(self).__name__}.update to be given a Probe(model, inputs, targets), but got"
                f" {type(probe).__name__}."
            )
        if len(probe):
            self._add(probe)

    @abstractmethod
    def _add(self, probe: Probe) -> None: ...

    @abstractmethod
    def compute(self) -> dict[str, Tensor]: ...

    def add_sum(self, name: str, *shape: int) -> None:
        """Add a state that is summed over updates and processes."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")


def error_bar(key: str, mean: Tensor, stderr: Tensor) -> dict[str, Tensor]:
    """A mean under ``key``, beside its standard error and the band of ± 2 standard errors that charts need as keys.

    The error is left out where one sample alone does not tell it.
    """
    if stderr.isnan():
        return {key: mean}
    return {
        key: mean,
        f"{key}_stderr": stderr,
        f"{key}_lower": mean - 2 * stderr,
        f"{key}_upper": mean + 2 * stderr,
    }


def error_bar_from_sums(key: str, total: Tensor, total_of_squares: Tensor, num_samples: Tensor) -> dict[str, Tensor]:
    """The same, from the sum of the samples' values and the sum of their squares."""
    mean = total / num_samples
    if num_samples < 2:
        return error_bar(key, mean, mean.new_tensor(math.nan))
    variance = (total_of_squares - num_samples * mean.square()).clamp_min(0) / (num_samples - 1)
    return error_bar(key, mean, (variance / num_samples).sqrt())
