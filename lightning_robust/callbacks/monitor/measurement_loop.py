"""The steps of measurements within a validation loop: begin, collect, measure, conclude."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_robust.callbacks.monitor import diagnostics, run_diagnostics
from lightning_robust.callbacks.monitor.announced_cost import on_cost
from lightning_robust.callbacks.monitor.batch_reading import check_batch
from lightning_robust.callbacks.monitor.batches import Batch
from lightning_robust.callbacks.monitor.measurement import Measurement, Values
from lightning_robust.callbacks.monitor.overhead import Times
from lightning_robust.callbacks.monitor.probe_code import ProbeCode
from lightning_robust.callbacks.monitor.reporting import Reporter
from lightning_robust.callbacks.monitor.run_record import RunRecord
from lightning_robust.callbacks.monitor.sample_collection import SampleCollector
from lightning_robust.callbacks.monitor.sample_selection import LoaderShare
from lightning_robust.callbacks.monitor.schedule import Schedule
from lightning_robust.callbacks.monitor.status import WHOLE, Failure, JointStatus, in_words
from lightning_robust.callbacks.monitor.step_comparison import StepComparison
from lightning_robust.callbacks.monitor.validation_witness import OF_THE_STEP
from lightning_robust.callbacks.warn_once import WarnOnce
from lightning_robust.functional._validation.independence import places_known
from lightning_robust.metrics import ProbeMetric
from lightning_robust.probe import Probe

_COMPARE = "compare its samples with `validation_step`"


class MeasurementLoop:
    """Makes the measurements of one monitor, whose docstring explains the options.

    Args:
        metrics: What to measure.
        reporter: Logs the values.
        read: Reads a batch of the module.

    Attributes:
        schedule: When to measure; a run begins with a new one.
        warnings: The sentences of this run.
        record: What happened in this run.
        incomplete: Whether anything failed in the last measurement.
        per_sample: By key without the prefix, per-sample values of the last measurement.
    """

    def __init__(
        self,
        metrics: Sequence[ProbeMetric],
        reporter: Reporter,
        read: Callable[[LightningModule, Any], Batch],
        *,
        max_samples: int,
        dataloader_idx: int,
        seed: int,
        on_error: Literal["warn", "raise"],
    ) -> None:
        self._metrics, self._reporter, self._read, self._on_error = metrics, reporter, read, on_error
        self._max_samples, self._dataloader_idx, self._seed = max_samples, dataloader_idx, seed
        self.schedule = Schedule(1, None)
        self.warnings = WarnOnce()
        self.record = RunRecord()
        self.incomplete = False
        self.per_sample: dict[str, Tensor] = {}
        self._unexamined = True
        self._has_classes = True  # or outputs have another meaning, as far as this process knows
        self._places_known = True  # functions were found not to depend on the places of samples in a batch
        self._samples_at_once: int | None = None  # that fit into memory
        self._measurement: Measurement | None = None  # in progress
        self._comparison = StepComparison()
        self._code: ProbeCode | None = None  # how the last batch was read
        self._num_loaders = 1
        self._targets: list[int] | None = None  # of the last measurement in `fit`

    def begin_run(self, schedule: Schedule | None) -> None:
        """Begin a new run; with a schedule, a new ``fit``."""
        self._unexamined = self._places_known = True
        self.warnings.forget()
        self.record = RunRecord()
        if schedule is not None:
            self.schedule, self._targets = schedule, None

    def begin(self, trainer: Trainer) -> None:
        """Begin a measurement, if one is due, possible and affordable."""
        self._measurement = self.schedule.share = None
        self._comparison.begin(trainer.callback_metrics)
        fitting, schedule, index = trainer.state.fn == TrainerFn.FITTING, self.schedule, self._dataloader_idx
        if trainer.sanity_checking:
            return
        self.record.validations += 1
        if fitting and not schedule.is_due(trainer.current_epoch):
            return
        loaders = CombinedLoader(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders).flattened
        self._num_loaders = len(loaders)
        obstacle = run_diagnostics.obstacle(trainer)
        if obstacle is None and index >= len(loaders):
            obstacle = run_diagnostics.no_such_loader(index, num_loaders=len(loaders))
        if obstacle is not None:
            self.record.impossible = True
            self.warnings.once(obstacle)
            return
        with schedule.overhead.counted(as_cost=False):
            if fitting and not schedule.is_affordable():
                return
        self.record.begun += 1
        schedule.overhead.begin_measurement()
        with schedule.overhead.counted():
            measurement = Measurement(
                self._metrics, self._examine, on_error=self._on_error, samples_at_once=self._samples_at_once
            )
            num_batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
            limit = num_batches[index] if isinstance(num_batches, list) else num_batches
            measurement.last_batch = None if limit == math.inf else int(limit) - 1
            measurement.attempt(lambda: self._choose(trainer, loaders[index], limit, measurement))
            self._measurement = measurement

    def _choose(self, trainer: Trainer, loader: Iterable[object], num_batches: float, measurement: Measurement) -> None:
        share = LoaderShare.of(loader, num_batches=num_batches)
        measurement.collector = SampleCollector(
            share,
            max_samples=self._max_samples,
            rank=trainer.global_rank,
            num_processes=trainer.world_size,
            seed=self._seed,
        )
        self.warnings.once(*diagnostics.on_loader(share, max_samples=self._max_samples))

    def collect(self, pl_module: LightningModule, batch: object, *, dataloader_idx: int) -> None:
        """Copy the selected samples of a batch."""
        measurement = self._measurement
        if measurement is not None and dataloader_idx == self._dataloader_idx:
            with self.schedule.overhead.counted():
                measurement.attempt(lambda: self._collect(measurement, pl_module, batch))

    def _collect(self, measurement: Measurement, pl_module: LightningModule, batch: object) -> None:
        assert measurement.collector is not None
        samples = self._read(pl_module, batch)
        self._code = samples.code
        is_first = measurement.collector.is_empty and len(samples) > 0
        rows = measurement.collector.add(samples)
        if self._unexamined:
            checked = check_batch(pl_module, samples, rows)
            self._places_known = self._places_known and checked
            if is_first:
                self.guard(lambda: self._comparison.listen(pl_module, samples), _COMPARE)
        if measurement.collector.irregular:
            self.warnings.once(diagnostics.reservoir(self._max_samples))

    def measure(self, pl_module: LightningModule, *, batch_idx: int, dataloader_idx: int) -> None:
        """Measure after the last batch, on the weights that were validated: a later hook may exchange them."""
        measurement = self._measurement
        self._comparison.stop()
        at = (dataloader_idx, batch_idx)
        if measurement is not None and at == (self._dataloader_idx, measurement.last_batch):
            with self.schedule.overhead.counted():
                self._update(measurement, pl_module)

    def _update(self, measurement: Measurement, pl_module: LightningModule) -> None:
        with places_known() if self._places_known else nullcontext():
            measurement.update(pl_module)

    def conclude(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree with the other processes and log: the same collectives on every process."""
        measurement, self._measurement, share = self._measurement, None, self.schedule.share
        if measurement is not None:
            with self.schedule.overhead.counted():
                self._conclude(trainer, pl_module, measurement)
        elif share is not None:
            with self.schedule.overhead.counted(as_cost=False):
                self.guard(lambda: self._reporter.log(pl_module, {"overhead": share}), "log its share of the time")

    def _conclude(self, trainer: Trainer, pl_module: LightningModule, measurement: Measurement) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.schedule.last_epoch = trainer.current_epoch
            measurement.attempt(lambda: self._compare(measurement))
        self._update(measurement, pl_module)
        status, values = measurement.conclude(times=lambda: self.schedule.overhead.times if fitting else Times())
        self.incomplete = bool(status.failures)
        samples_at_once = measurement.samples_at_once
        if samples_at_once is not None and samples_at_once != self._samples_at_once:
            self._samples_at_once = samples_at_once
            self.warnings.once(diagnostics.out_of_memory(samples_at_once))
        if status.disagree:
            self.warnings.once(diagnostics.UNSHARED)
        self.per_sample = {key: found for number in values for key, found in measurement.per_sample[number].items()}
        if values:
            self.record.measured += 1
            self.guard(lambda: self._report(trainer, pl_module, values, status), "log a measurement")
            if self.record.measured == 1:
                self.guard(lambda: self._note_for_comparison(measurement, values, status), _COMPARE)
        if status.failures:
            self._explain(status.failures, epoch=trainer.current_epoch)

    def _explain(self, failures: Mapping[int, Failure], *, epoch: int) -> None:
        """Warn of failures whose cause is new in this run."""
        names = {number: type(metric).__name__ for number, metric in enumerate(self._metrics)}
        if WHOLE in failures or failures.keys() >= names.keys():
            first = failures[min(failures)]
            new = dict(failures) if self.record.is_new(WHOLE, None, first.message, epoch=epoch) else {}
        else:
            is_new = functools.partial(self.record.is_new, epoch=epoch)
            new = {number: found for number, found in failures.items() if is_new(number, names[number], found.message)}
        if new:
            self.warnings.warn(diagnostics.skipped(new, names, epoch=epoch, code=self._code))

    def _examine(self, probe: Probe, *, num_samples: int) -> None:
        """Once per run, warn of anything that makes the numbers mean something else than they seem to, or take long."""
        start = time.perf_counter()
        self._has_classes = probe.reading.has_classes

        def cost(outputs: Tensor) -> list[str]:
            seconds = time.perf_counter() - start
            return on_cost(self._metrics, probe, outputs, num_samples=num_samples, seconds=seconds)

        if self._unexamined:
            units_matter = any(metric.depends_on_units for metric in self._metrics)
            self.warnings.once(*diagnostics.on_probe(probe, units_matter=units_matter, more=cost))
            if units_matter and (note := diagnostics.note_on(probe)):
                rank_zero_info(note)
            self.guard(self._compare_with_step, _COMPARE)
            self._unexamined = False

    def _compare_with_step(self) -> None:
        found = self._comparison.of_samples()
        if found is not None and not self.warnings.were(diagnostics.OF_THE_MODEL):
            self.warnings.once(found)

    def _compare(self, measurement: Measurement) -> None:
        """Warn if the samples differ from those of the last measurement."""
        if measurement.collector is not None:
            before, self._targets = self._targets, measurement.collector.targets()
            if before is not None and before != self._targets and not self.warnings.were(diagnostics.SHUFFLES):
                self.warnings.once(diagnostics.OTHER_SAMPLES)

    def _note_for_comparison(self, measurement: Measurement, values: Values, status: JointStatus) -> None:
        if not self._has_classes:  # what the module logs as an accuracy may count anything
            self._comparison.without_classes()
            return
        targets = [] if measurement.collector is None else measurement.collector.targets()
        flat = {key: float(value) for computed in values.values() for key, value in computed.items()}
        self._comparison.note(flat, self.per_sample, targets, status.num_samples)

    def compare_accuracy(self, trainer: Trainer, *, prefixes: Sequence[str]) -> None:
        """After the first measurement of a run, compare the accuracy of the samples with what the module has logged."""
        if self.record.measured == 1 and not self.warnings.were((diagnostics.OF_THE_MODEL, OF_THE_STEP)):
            metrics = trainer.callback_metrics.items()
            logged = {key: float(value) for key, value in metrics if not key.startswith(tuple(prefixes))}
            loaders = {"loader": self._dataloader_idx, "num_loaders": self._num_loaders}
            if sentence := self._comparison.of_accuracies(logged, **loaders):
                self.warnings.once(sentence)

    def _report(self, trainer: Trainer, pl_module: LightningModule, values: Values, status: JointStatus) -> None:
        logged = self._reporter.report(trainer, pl_module, self._metrics, values, status)
        if trainer.state.fn == TrainerFn.FITTING:
            directions, untrained = self._reporter.directions, self._reporter.best_untrained
            self.warnings.once(*run_diagnostics.on_directions(trainer, directions, untrained))
        prefix, measured = self._reporter.prefix, [self._metrics[number] for number in values]
        self.warnings.once(*diagnostics.on_keys(self._reporter.values, trainer.callback_metrics, prefix=prefix))
        self.warnings.once(*diagnostics.not_finite(self.record.newly_not_finite(logged), prefix=prefix))
        if not self.warnings.were(diagnostics.OF_THE_MODEL):
            caveats = diagnostics.on_values(measured, logged, prefix=prefix)
            self.warnings.once(*self.record.newly_explained(caveats))

    def abandon(self) -> None:
        """Drop a measurement that will not be finished, with its samples."""
        self._comparison.abandon()
        self._measurement = None

    def guard(self, step: Callable[[], None], purpose: str) -> None:
        """Take a step whose failure must not end a run."""
        try:
            step()
        except Exception as error:
            if self._on_error == "raise":
                raise
            self.warnings.once(f"RobustnessMonitor could not {purpose}: {in_words(error)}. The run goes on.", here=True)
