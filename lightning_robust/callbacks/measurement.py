"""One measurement, from the first batch to values that all processes agree on."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_robust.callbacks.outcome import WHOLE, Outcome, Verdict
from lightning_robust.callbacks.sample_selection import SampleCollector
from lightning_robust.callbacks.undisturbed import undisturbed
from lightning_robust.functional._grad_mode import differentiable
from lightning_robust.metrics import ProbeMetric
from lightning_robust.probe import Probe

Values = dict[int, dict[str, Tensor]]  # of each metric, by its number


class Measurement:
    """Collects samples, shows them to the metrics, and gathers the values.

    Everything that may fail goes through :meth:`attempt`. A failure is kept, later attempts are left out, and
    :meth:`conclude` issues the same collectives on every process whatever happened on any. What goes wrong in one
    metric does not stop the others.

    Args:
        metrics: What to measure; they are reset.
        on_error: ``"raise"`` lets failures through.
    """

    def __init__(self, metrics: Sequence[ProbeMetric], *, on_error: Literal["warn", "raise"]) -> None:
        self._metrics = metrics
        self._on_error = on_error
        self._errors: dict[int, Exception] = {}
        self._seconds = 0.0
        self._updated = False
        self.collector: SampleCollector | None = None
        self.last_batch: int | None = None  # index of the loader's last batch, where it is known
        for metric in metrics:
            metric.reset()

    def attempt(self, step: Callable[[], None]) -> None:
        """Take a step, against the clock and without a trace in the global random states, unless one has failed."""
        if WHOLE in self._errors:
            return
        start = time.perf_counter()
        with isolate_rng():
            self._try(WHOLE, step)
        self._seconds += time.perf_counter() - start

    def _try(self, number: int, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:
            if self._on_error == "raise":
                raise
            self._errors[number] = error

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
                for number, metric in enumerate(self._metrics):
                    if number not in self._errors:
                        self._try(number, functools.partial(metric.update, probe))
            if not len(self.collector):  # torchmetrics complains about a metric that is computed without an update
                for metric in self._metrics:
                    metric.update(Probe(pl_module, torch.empty(0), torch.empty(0, dtype=torch.long)))

    def conclude(self, device: torch.device) -> tuple[Verdict, Values]:
        """Agree with the other processes; the values of those metrics in which nothing failed on any of them.

        The metrics are empty afterwards: some hold much memory.
        """
        verdict, values = self._agree(device), Values()
        if WHOLE not in verdict.causes:
            for number, metric in enumerate(self._metrics):
                if number not in verdict.causes:  # the same ones on every process, because computing is a collective
                    self._try(number, functools.partial(self._compute, number, metric, values))
            verdict = self._agree(device)
        for metric in self._metrics:
            metric.reset()
        return verdict, {number: value for number, value in values.items() if number not in verdict.causes}

    def _compute(self, number: int, metric: ProbeMetric, values: Values) -> None:
        computed = metric.compute()
        if twice := {key for earlier in values.values() for key in earlier}.intersection(computed):
            raise ValueError(
                f"Expected each metric to log its own keys, but two log {sorted(twice)[:3]}."
                " Another RobustnessMonitor with another `log_key_prefix` can measure the second."
            )
        values[number] = computed

    def _agree(self, device: torch.device) -> Verdict:
        outcome = Outcome().to(device)
        num_samples = 0 if self.collector is None else len(self.collector)
        outcome.update(errors=self._errors, num_samples=num_samples, seconds=self._seconds)
        verdict: Verdict = outcome.compute()
        return verdict
