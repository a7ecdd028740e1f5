"""The base of all metrics: updated with a probe, summed in float64, with error bars under common names."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_robust.functional.fisher_rao.ratios import share_of_hits
from lightning_robust.metrics.keys import is_standard_error
from lightning_robust.probe import Probe


class ProbeMetric(Metric, ABC):
    """A torchmetrics ``Metric`` of a network, updated with a :class:`~lightning_robust.Probe`.

    ``compute()`` returns a flat dictionary of 0-d tensors, the most telling first; it is empty if no sample was seen.

    States stay float64 when the module that holds the metric changes precision. Beyond negligible rounding, sums then
    do not depend on how samples are spread over updates or processes.

    Attributes:
        per_sample: After ``compute()``, the per-sample values, (N,), of those keys that are means over samples, process
            by process and in the order of the updates. They tell how well two measurements of the same samples can be
            told apart.
        best_untrained: Whether values are best at initialisation.
        linearizations: Names of the linearisations of a probe that updates take. Each costs a backward pass per class;
            metrics share those of one name.
        krylov_passes: Where not the gradients of all outputs are taken, roughly how many forward passes a sample takes
            instead of its linearisations; 0 if it takes these of a few classes.
        depends_on_units: Whether values depend on the units of the inputs: on perturbation sizes, or on gradients with
            respect to inputs.
    """

    full_state_update = False
    is_differentiable = False
    best_untrained = False
    linearizations: tuple[str, ...] = ()
    krylov_passes = 0.0
    depends_on_units = True

    def __init__(self) -> None:
        super().__init__()
        self.per_sample: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget all samples, also after an error within ``compute`` has left the states of all processes here."""
        if self._is_synced:
            self.unsync()
        super().reset()
        self.per_sample = {}

    def set_dtype(self, dst_type: str | torch.dtype) -> ProbeMetric:
        """Change nothing: states stay float64."""
        return self

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes, rows in one dtype; a process without rows sends an empty one."""
        for name, default in self._defaults.items():
            if isinstance(default, list):
                rows = getattr(self, name) or [torch.zeros(0, dtype=torch.float64, device=self.device)]
                setattr(self, name, [row.double() if row.is_floating_point() else row for row in rows])
        super().sync(*args, **kwargs)

    def add_float64_state(self, name: str, *shape: int, reduce: Literal["sum", "max"] = "sum") -> None:
        """Add a tensor of zeros. Processes exchange its sum or its maximum."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx=reduce)

    def add_float64_rows(self, name: str) -> None:
        """Add a list of one-dimensional tensors that is joined over processes."""
        self.add_state(name, [], dist_reduce_fx="cat")

    def add_configuration(self, *options: object) -> None:
        """Add a state that tells metrics of one class with different options apart.

        In a ``MetricCollection``, torchmetrics merges metrics whose states are equal after the first update. States of
        metrics with different options can be equal by chance.
        """
        digest = hashlib.blake2b(repr(options).encode(), digest_size=8).digest()
        self.add_state("configuration", torch.tensor(list(digest), dtype=torch.float64), dist_reduce_fx="max")

    def direction(self, key: str) -> bool | None:
        """Whether higher values of this key are better; None if neither direction is, as for standard errors."""
        return None if is_standard_error(key) else self.higher_is_better

    def seconds_per_sample(self, outputs: Tensor) -> float:
        """Roughly how long the algebra of one sample takes, beside all passes through the network.

        Args:
            outputs: Logits (N, C) of some samples.
        """
        return 0.0

    def bytes_per_sample(self, num_classes: int) -> float:
        """Roughly how much memory a sample takes at the end, beside that of passes through the network."""
        return 0.0

    def caveats(self, values: Mapping[str, float]) -> dict[str, str]:
        """Return warnings about the values of one measurement, by key; each continues a sentence that starts with it.

        Args:
            values: Everything that was measured, by key, ``num_samples`` included.
        """
        return {}

    def update(self, probe: Probe) -> None:
        """Add the samples of ``probe``. A probe without samples is valid and adds nothing.

        Raises:
            TypeError: If ``probe`` is not a Probe.
            ValueError: If its model is a function that closes over tensors of the batch, or the metric cannot measure
                it.
        """
        if not isinstance(probe, Probe):
            raise TypeError(
                f"Expected {type(self).__name__}.update to be given a Probe(model, inputs, targets), but got"
                f" {type(probe).__name__}."
            )
        if len(probe):
            probe.check_place()
            self._add(probe)

    @abstractmethod
    def _add(self, probe: Probe) -> None: ...

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """Return the values over all samples, as the class docstring lists them."""


def joined(rows: list[Tensor] | Tensor) -> Tensor:
    """Join the rows of all updates and processes, one-dimensional; without rows, return an empty tensor."""
    return dim_zero_cat(rows) if len(rows) else torch.empty(0, dtype=torch.float64)


def error_bar(key: str, mean: Tensor, stderr: Tensor) -> dict[str, Tensor]:
    """A mean under ``key``, with its standard error and a band of ± 2 standard errors under keys that charts can plot.

    A standard error of NaN, e.g. that of a single sample, is left out.
    """
    if stderr.isnan():
        return {key: mean}
    return {
        key: mean,
        f"{key}_stderr": stderr,
        f"{key}_lower": mean - 2 * stderr,
        f"{key}_upper": mean + 2 * stderr,
    }


def error_bar_of_mean(key: str, values: Tensor) -> dict[str, Tensor]:
    """Error bar of the mean of one value per sample (N,)."""
    n = len(values)
    return error_bar(key, values.mean(), values.std() / math.sqrt(n) if n > 1 else values.new_tensor(math.nan))


def error_bar_of_share(key: str, hits: Tensor) -> dict[str, Tensor]:
    """Error bar, within 0 and 1, of the share of hits among N samples, 0 or 1 each (N,)."""
    share = share_of_hits(hits)
    return {name: value.clamp(0, 1) for name, value in error_bar(key, share.value, share.stderr).items()}
