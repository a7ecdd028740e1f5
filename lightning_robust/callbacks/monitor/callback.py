"""The callback that measures robustness inside the validation loop and logs it beside accuracy."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

from lightning_robust.callbacks.arguments import as_constant, as_metrics, misconfiguration
from lightning_robust.callbacks.monitor import diagnostics, reporting
from lightning_robust.callbacks.monitor.batches import make_probe
from lightning_robust.callbacks.monitor.measurement import Measurement, Values, in_words
from lightning_robust.callbacks.monitor.overhead import Overhead, Times, check_budget, largest
from lightning_robust.callbacks.monitor.sample_selection import LoaderShare, SampleCollector
from lightning_robust.callbacks.monitor.status import Verdict
from lightning_robust.callbacks.warn_once import WarnOnce
from lightning_robust.dashboard.tensorboard_layout import write_layout
from lightning_robust.functional._validation.arguments import (
    check_boolean,
    check_choice,
    check_function,
    check_integer,
    expected_but_got,
)
from lightning_robust.functional.curvature.losses import check_loss_fn
from lightning_robust.functional.input_space.units import check_units, check_valid_range
from lightning_robust.metrics import ProbeMetric
from lightning_robust.probe import Probe


class RobustnessMonitor(Callback):
    """Measures, on a fixed subset of the validation samples, how robust the network is becoming, without attacks.

    The subset is spread evenly over the whole validation loader and is the same at every measurement, whatever the
    batch size and the number of processes, so that curves are paired. The first measurement is made in the first
    validation of ``fit``, later ones once ``every_n_epochs`` epochs have passed, in every validation run of such an
    epoch; ``trainer.validate`` and ``trainer.test`` always measure. Sanity checking does not.

    Nothing of the training changes: weights, gradients, buffers, modes and random states are as without the callback.

    **Logged metrics**

    - those of each metric under ``log_key_prefix``, by default ``robust/fim_spectral_norm…``,
      ``robust/linearized_accuracy…``, ``robust/hessian_trace…`` and ``robust/wci…`` (see
      :class:`~lightning_robust.FisherSpectralNorm`, :class:`~lightning_robust.LinearizedAccuracy`,
      :class:`~lightning_robust.HessianTrace` and :class:`~lightning_robust.WeightCurvatureIndex`)
    - ``robust/num_samples``: samples measured, over all processes
    - ``robust/seconds``: wall time of the measurement, on the slowest process
    - ``robust/overhead``: share of the wall time of ``fit`` so far that was spent measuring; also in validations that a
      budget leaves out

    Values that are not finite are not logged. With a TensorBoard logger a Custom Scalars layout is written once, which
    puts whatever accuracy the module logs on one chart with the predicted robust accuracy.

    Args:
        metrics: Metrics to measure, by object or by name; by default ``fisher_spectral_norm``,
            ``linearized_accuracy``, ``hessian_trace`` and ``weight_curvature_index``.
        every_n_epochs: Epochs from one measurement to the next.
        max_samples: Size of the subset, over all processes.
        overhead_budget: Share of the wall time of ``fit``, e.g. 0.05, within which measuring is kept by leaving
            measurements out; those that are made stay the same, so that curves stay paired. All processes decide alike.
            The first one is always made. By default there is no bound.
        log_key_prefix: What the logged keys begin with; several monitors in one Trainer need several.
        input_std: Standard deviation by which the data module divides the inputs, one number or one per channel. With
            it, ε, margins and Fisher information are in units of the un-normalised input.
        input_mean: What it subtracts, likewise; ``valid_range`` needs it.
        valid_range: Smallest and largest value of an un-normalised input, e.g. ``(0, 1)`` for images, which
            perturbations cannot leave. L∞ margins and attacks respect it. Where many inputs lie at an end of their
            range, as black pixels do, robustness is underestimated without it.
        probe_fn: Makes a :class:`~lightning_robust.Probe` of ``(pl_module, batch)``, for batches other than ``(x, y)``
            or dictionaries. A method ``robustness_probe(batch)`` of the module does the same. What the probe leaves
            open of the other options is filled in.
        loss_fn: Maps logits and targets to the loss whose curvature is measured, e.g.
            ``nn.CrossEntropyLoss(label_smoothing=0.1)``; cross-entropy by default.
        chunk_size: Bound on memory, see :func:`~lightning_robust.functional.linearize`. At most as many samples as in
            the largest validation batch pass through the network together in any case.
        dataloader_idx: Which of several validation loaders to measure on.
        prog_bar: Show the first value of each metric in the progress bar, and a line of text per measurement above it.
        on_error: ``"warn"`` turns any failure of a measurement into one warning, and the run goes on, on every process,
            as do the metrics that it does not concern; ``"raise"`` lets it through.
        seed: Chooses the subset.

    Attributes:
        directions: For each key that its metrics have computed, whether higher values are better; None if nobody can
            say so.
        best_untrained: Those keys that are best in a network that has learnt nothing.
        incomplete: Whether something has failed in the last measurement.
        per_sample: By key, what the last measurement found on each sample where the value is their mean, (N,), of all
            processes, float32 on the CPU.

    Raises:
        MisconfigurationException: If an argument has a wrong type or value.

    Example::

        trainer = Trainer(callbacks=[RobustnessMonitor()])
    """

    def __init__(
        self,
        metrics: Sequence[str | ProbeMetric] | None = None,
        *,
        every_n_epochs: int = 1,
        max_samples: int = 256,
        overhead_budget: float | None = None,
        log_key_prefix: str = "robust/",
        input_std: float | Sequence[float] | None = None,
        input_mean: float | Sequence[float] | None = None,
        valid_range: tuple[float, float] | None = None,
        probe_fn: Callable[[LightningModule, Any], Probe] | None = None,
        loss_fn: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        chunk_size: int | None = None,
        dataloader_idx: int = 0,
        prog_bar: bool = False,
        on_error: Literal["warn", "raise"] = "warn",
        seed: int = 0,
    ) -> None:
        super().__init__()
        with misconfiguration():
            self.metrics = as_metrics(metrics)
            self.every_n_epochs = check_integer("every_n_epochs", every_n_epochs, at_least=1)
            self.max_samples = check_integer("max_samples", max_samples, at_least=1)
            self.overhead_budget = check_budget(overhead_budget)
            if not isinstance(log_key_prefix, str) or not log_key_prefix:
                raise ValueError(expected_but_got("log_key_prefix", "a non-empty string", log_key_prefix))
            self.log_key_prefix = log_key_prefix
            self.input_std = as_constant("input_std", input_std)
            self.input_mean = as_constant("input_mean", input_mean, positive=False)
            self.valid_range = check_valid_range(valid_range)
            check_units(input_std=self.input_std, input_mean=self.input_mean, valid_range=self.valid_range)
            if probe_fn is not None:
                check_function("probe_fn", probe_fn)
            self.probe_fn = probe_fn
            check_loss_fn(loss_fn)
            self.chunk_size = None if chunk_size is None else check_integer("chunk_size", chunk_size, at_least=1)
            self.dataloader_idx = check_integer("dataloader_idx", dataloader_idx, at_least=0)
            self.prog_bar = check_boolean("prog_bar", prog_bar)
            check_choice("on_error", on_error, ("warn", "raise"))
            self.on_error = on_error
            self.seed = check_integer("seed", seed, at_least=0)
        self._probe_options = {
            "input_std": self.input_std,
            "input_mean": self.input_mean,
            "valid_range": self.valid_range,
            "chunk_size": self.chunk_size,
            "loss_fn": loss_fn,
        }
        self.directions: dict[str, bool | None] = {}
        self.best_untrained: set[str] = set()
        self.incomplete = False
        self.per_sample: dict[str, Tensor] = {}
        self._last_epoch: int | None = None  # of the last measurement in `fit`
        self._overhead = Overhead()
        self._warnings = WarnOnce()
        self._unexamined = True
        self._values: dict[str, float] = {}  # the last ones logged in this run, by the keys under which they are
        self._samples_at_once: int | None = None  # for which memory has lasted
        self._laid_out: set[str] = set()  # directories that have a layout
        self._measurement: Measurement | None = None  # in progress
        self._share: float | None = None  # of measuring, in a validation for whose measurement there is no time
        self._targets: list[int] | None = None  # of the last measurement in `fit`

    # ---- state -------------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Distinguishes several monitors in one checkpoint by the keys that they log."""
        return self._generate_state_key(log_key_prefix=self.log_key_prefix)

    def state_dict(self) -> dict[str, Any]:
        """Cadence, times for the budget, and the last values, which other callbacks go on seeing."""
        times = self._overhead.state_dict()
        return {"last_epoch": self._last_epoch, "values": dict(self._values), "times": times}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._last_epoch = state_dict.get("last_epoch")
        self._values = dict(state_dict.get("values", {}))
        self._overhead.load_state_dict(state_dict.get("times", {}))

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a new run; what is validated or tested after one is no part of it."""
        self._unexamined = True
        self._warnings.forget()
        if stage == "fit":
            self._last_epoch = None
            self._values = {}
            self._targets = None
            self._overhead = Overhead()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it if nothing will ever be measured, or if a stopper will count what is not."""
        self._overhead.begin()
        sentences = diagnostics.before_fit(
            trainer, prefix=self.log_key_prefix, every_n_epochs=self.every_n_epochs, budget=self.overhead_budget
        )
        self._warnings.once(*sentences)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last values to the callbacks of a resumed run, which an uninterrupted one would still show them."""
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in self._values.items()})

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a measurement, if one is due."""
        self._begin(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep this batch's share of the measured samples (before the module has a chance to change the batch)."""
        self._collect(pl_module, batch, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure, after the last batch."""
        self._update(pl_module, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree with the other processes, and log."""
        self._finish(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay out TensorBoard's Custom Scalars page, once."""
        self._guard(lambda: self._lay_out(trainer), "lay out TensorBoard's page")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it if the budget has left hardly a curve."""
        self._overhead.end()
        if self._overhead.left_out and self.overhead_budget is not None:
            self._warnings.once(*diagnostics.hardly_a_curve(self._overhead, budget=self.overhead_budget))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the samples of a measurement that will not be finished."""
        self._overhead.end()
        self._measurement = None

    # a test run is measured as a validation run is
    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end

    # ---- one measurement ---------------------------------------------------------------------------------------------

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measurement = None
        if trainer.sanity_checking or not self._is_due(trainer):
            return
        loaders = CombinedLoader(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders).flattened
        obstacle = diagnostics.obstacle(trainer)
        if obstacle is None and self.dataloader_idx >= len(loaders):
            obstacle = diagnostics.no_such_loader(self.dataloader_idx, num_loaders=len(loaders))
        if obstacle is not None:
            self._warnings.once(obstacle)
            return
        with self._overhead.counted(as_cost=False):
            if not self._is_affordable(trainer, pl_module):
                return
        self._overhead.begin_measurement()
        with self._overhead.counted():
            self._measurement = self._new_measurement(trainer, loaders)

    def _new_measurement(self, trainer: Trainer, loaders: list[Any]) -> Measurement:
        measurement = Measurement(self.metrics, on_error=self.on_error, samples_at_once=self._samples_at_once)
        num_batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        limit = num_batches[self.dataloader_idx] if isinstance(num_batches, list) else num_batches
        measurement.last_batch = None if limit == math.inf else int(limit) - 1
        measurement.attempt(lambda: self._choose(trainer, loaders[self.dataloader_idx], limit, measurement))
        return measurement

    def _choose(self, trainer: Trainer, loader: Iterable[object], num_batches: float, measurement: Measurement) -> None:
        """Choose the samples of this loader that will be measured."""
        share = LoaderShare.of(loader, num_batches=num_batches)
        measurement.collector = SampleCollector(
            share,
            max_samples=self.max_samples,
            rank=trainer.global_rank,
            num_processes=trainer.world_size,
            seed=self.seed,
        )
        self._warnings.once(*diagnostics.on_loader(share, max_samples=self.max_samples))

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.state.fn != TrainerFn.FITTING:
            return True
        epoch, last = trainer.current_epoch, self._last_epoch
        return last is None or epoch <= last or epoch - last >= self.every_n_epochs

    def _is_affordable(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether the budget lasts: the same on every process."""
        if self.overhead_budget is None or trainer.state.fn != TrainerFn.FITTING:
            return True
        times = self._overhead.times
        if trainer.world_size > 1:
            times = largest(times, _device(pl_module))
        if times.nothing_measured:
            # It is due after the objects of a whole start-up, takes as long as a small measurement, and would count as
            # what the next one costs if it happened within the first.
            gc.collect()
        if times.affords(self.overhead_budget):
            self._overhead.made += 1
            return True
        self._overhead.left_out += 1
        self._share = times.share
        return False

    def _collect(self, pl_module: LightningModule, batch: object, dataloader_idx: int) -> None:
        measurement = self._measurement
        if measurement is not None and dataloader_idx == self.dataloader_idx:

            def add() -> None:
                assert measurement.collector is not None
                probe = make_probe(pl_module, batch, probe_fn=self.probe_fn, defaults=self._probe_options)
                measurement.collector.add(probe)
                if measurement.collector.irregular:
                    self._warnings.once(diagnostics.reservoir(self.max_samples))

            with self._overhead.counted():
                measurement.attempt(add)

    def _update(self, pl_module: LightningModule, batch_idx: int, dataloader_idx: int) -> None:
        """Measure after the last batch, on the weights that were validated: a later hook may exchange them."""
        measurement = self._measurement
        if measurement is not None and (dataloader_idx, batch_idx) == (self.dataloader_idx, measurement.last_batch):
            with self._overhead.counted():
                measurement.update(pl_module, _device(pl_module), examine=self._examine)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree and log: the same collectives on every process."""
        measurement, self._measurement = self._measurement, None
        share, self._share = self._share, None
        if measurement is not None:
            with self._overhead.counted():
                self._conclude(trainer, pl_module, measurement)
        elif share is not None:
            values = {"overhead": share}
            with self._overhead.counted(as_cost=False):
                self._guard(lambda: self._log_values(pl_module, values, in_bar=[]), "log its share of the time")

    def _conclude(self, trainer: Trainer, pl_module: LightningModule, measurement: Measurement) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._last_epoch = trainer.current_epoch
            measurement.attempt(lambda: self._compare(measurement))
        measurement.update(pl_module, _device(pl_module), examine=self._examine)
        verdict, values = measurement.conclude(
            _device(pl_module), times=lambda: self._overhead.times if fitting else Times()
        )
        self.incomplete = bool(verdict.causes)
        samples_at_once = measurement.samples_at_once
        if samples_at_once is not None and samples_at_once != self._samples_at_once:
            self._samples_at_once = samples_at_once
            self._warnings.once(diagnostics.out_of_memory(samples_at_once))
        if verdict.disagree:
            self._warnings.once(diagnostics.UNSHARED)
        self.per_sample = {
            self.log_key_prefix + key: found
            for number in values
            for key, found in measurement.per_sample[number].items()
        }
        if values:
            self._guard(lambda: self._log(trainer, pl_module, values, verdict), "log a measurement")
        if verdict.causes:
            names = {number: type(metric).__name__ for number, metric in enumerate(self.metrics)}
            self._warnings.warn(diagnostics.skipped(verdict.causes, names, epoch=trainer.current_epoch))

    def _examine(self, probe: Probe) -> None:
        """Once in a run, say what makes the numbers mean something else than they seem to."""
        if self._unexamined:
            self._warnings.once(*diagnostics.on_probe(probe))
            self._unexamined = False

    def _log(self, trainer: Trainer, pl_module: LightningModule, values: Values, verdict: Verdict) -> None:
        for number, computed in values.items():
            metric, keys = self.metrics[number], [self.log_key_prefix + key for key in computed]
            self.directions |= {self.log_key_prefix + key: metric.direction(key) for key in computed}
            if metric.best_untrained:
                self.best_untrained.update(keys)
        flat = reporting.flattened(values, verdict)
        headlines = reporting.headlines(values)
        in_bar = headlines if self.prog_bar else []
        self._log_values(pl_module, flat, in_bar=in_bar)
        self._warnings.once(
            *(
                f"`{self.log_key_prefix}{key}` is not finite and is not logged where it is so."
                for key, value in flat.items()
                if not math.isfinite(value)
            )
        )
        if not self._warnings.were("The model "):  # then every number is in doubt
            self._warnings.once(*diagnostics.on_values(flat, prefix=self.log_key_prefix))
        if self.prog_bar:
            reporting.print_line(trainer, flat, keys=headlines)

    def _log_values(self, pl_module: LightningModule, values: dict[str, float], *, in_bar: list[str]) -> None:
        self._values |= reporting.log(pl_module, values, prefix=self.log_key_prefix, in_bar=in_bar)

    def _lay_out(self, trainer: Trainer) -> None:
        """Write one layout for all monitors of the trainer, once per directory of logs; the first monitor does it."""
        monitors = monitors_of(trainer)
        keys = {monitor.log_key_prefix: list(monitor._values) for monitor in monitors if monitor._values}
        if not keys or self is not monitors[0] or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and logger.log_dir not in self._laid_out:
                self._laid_out.add(logger.log_dir)
                write_layout(logger, keys)

    def _compare(self, measurement: Measurement) -> None:
        """Say it if these are other samples than last time."""
        if measurement.collector is not None:
            before, self._targets = self._targets, measurement.collector.targets()
            if before is not None and before != self._targets and not self._warnings.were(diagnostics.SHUFFLES):
                self._warnings.once(diagnostics.OTHER_SAMPLES)

    def _guard(self, step: Callable[[], None], purpose: str) -> None:
        """Take a step that must not end a run."""
        try:
            step()
        except Exception as error:
            if self.on_error == "raise":
                raise
            self._warnings.warn_here(f"RobustnessMonitor could not {purpose}: {in_words(error)}. The run goes on.")


def _device(pl_module: LightningModule) -> torch.device:
    """Where the states are kept: Metal has no float64; nor does it run several processes."""
    return torch.device("cpu") if pl_module.device.type == "mps" else pl_module.device


def monitors_of(trainer: Trainer) -> list[RobustnessMonitor]:
    """The monitors of a trainer, in order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, RobustnessMonitor)]
