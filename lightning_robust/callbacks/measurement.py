"""One measurement, from the first batch to values that all processes agree on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_robust.callbacks.outcome import Outcome, Verdict
from lightning_robust.callbacks.sample_selection import SampleCollector
from lightning_robust.callbacks.undisturbed import undisturbed
from lightning_robust.functional._grad_mode import differentiable
from lightning_robust.metrics import ProbeMetric
from lightning_robust.probe import Probe

Values = list[dict[str, Tensor]]


class Measurement:
    """Collects samples, shows them to the metrics, and gathers the values.

    Everything that may fail goes through :meth:`attempt`. A failure is kept, later attempts are left out, and
    :meth:`conclude` issues the same collectives on every process whatever happened on any.

    Args:
        metrics: What to measure; they are reset.
        on_error: ``"raise"`` lets failures through.
    """

    def __init__(self, metrics: Sequence[ProbeMetric], *, on_error: Literal["warn", "raise"]) -> None:
        self._metrics = metrics
        self._on_error = on_error
        self._error: Exception | None = None
        self._seconds = 0.0
        self._updated = False
        self.collector: SampleCollector | None = None
        self.last_batch: int | None = None  # index of the loader's last batch, where it is known
        for metric in metrics:
            metric.reset()

    def attempt(self, step: Callable[[], None]) -> None:
        """Take a step, against the clock and without a trace in the global random states, unless one has failed."""
        if self._error is not None:
            return
        start = time.perf_counter()
        try:
            with isolate_rng():
                step()
        except Exception as error:
            if self._on_error == "raise":
                raise
            self._error = error
        self._seconds += time.perf_counter() - start

    def update(self, pl_module: LightningModule, device: torch.device, *, examine: Callable[[Probe], None]) -> None:
        """Show the collected samples to the metrics, once, after the first of them have been examined."""
        if self._updated or self.collector is None:
            return
        self._updated = True
        for metric in self._metrics:
            metric.to(device)
        with undisturbed(pl_module), differentiable(pl_module):
            for probe in self.collector.probes():
                examine(probe)
                for metric in self._metrics:
                    metric.update(probe)
            if not len(self.collector):  # torchmetrics complains about a metric that is computed without an update
                for metric in self._metrics:
                    metric.update(Probe(pl_module, torch.empty(0), torch.empty(0, dtype=torch.long)))

    def conclude(self, device: torch.device) -> tuple[Verdict, Values]:
        """Agree with the other processes; the values of each metric if, and only if, nothing failed on any of them.

        The metrics are empty afterwards: some hold much memory.
        """
        updated = self._agree(device)
        computed, values = updated, Values()
        if updated.sound:
            for metric in self._metrics:  # each computes, even after a failure, because computing is a collective
                self._compute(metric, values)
            computed = self._agree(device)
        for metric in self._metrics:
            metric.reset()
        return (updated, values) if computed.sound else (computed, [])

    def _compute(self, metric: ProbeMetric, values: Values) -> None:
        try:
            computed = metric.compute()
            if twice := {key for earlier in values for key in earlier}.intersection(computed):
                raise ValueError(f"Expected each metric to log its own keys, but two log {sorted(twice)}.")
            values.append(computed)
        except Exception as error:
            if self._on_error == "raise":
                raise
            self._error = error

    def _agree(self, device: torch.device) -> Verdict:
        outcome = Outcome().to(device)
        num_samples = 0 if self.collector is None else len(self.collector)
        outcome.update(error=self._error, num_samples=num_samples, seconds=self._seconds)
        verdict: Verdict = outcome.compute()
        return verdict
