"""The callback that measures robustness in the validation loop and logs it next to accuracy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_robust.callbacks.arguments import as_constant, as_metrics, check_prefix, check_unshared, misconfiguration
from lightning_robust.callbacks.monitor import run_diagnostics
from lightning_robust.callbacks.monitor.batch_reading import read_batch
from lightning_robust.callbacks.monitor.measurement_loop import MeasurementLoop
from lightning_robust.callbacks.monitor.overhead import check_budget
from lightning_robust.callbacks.monitor.reporting import Reporter
from lightning_robust.callbacks.monitor.schedule import Schedule
from lightning_robust.functional._validation.arguments import (
    check_boolean,
    check_choice,
    check_function,
    check_integer,
    expected_but_got,
    optional,
)
from lightning_robust.functional.curvature.losses import check_loss_fn
from lightning_robust.functional.input_space.likelihoods import LikelihoodName, column_likelihood_of, likelihood_of
from lightning_robust.functional.input_space.units import check_units, check_valid_range
from lightning_robust.metrics import ProbeMetric
from lightning_robust.probe import Probe
from lightning_robust.samples import LinearizationName

_UNITS = ("input_std", "input_mean", "valid_range")
_PROBE_OPTIONS = (*_UNITS, "chunk_size", "loss_fn", "likelihood", "tolerance", "linearization")
ProbeFn = Callable[[LightningModule, Any], Probe]


class RobustnessMonitor(Callback):
    """Measures, on a fixed subset of the validation samples, how robust the network is becoming, without attacks.

    The subset is spread evenly over the validation loader and is the same at every measurement, whatever the batch size
    and the number of processes, so that curves are paired. The first measurement is made in the first validation of
    ``fit``, later ones in every validation run of an epoch that is ``every_n_epochs`` after the last measured one;
    ``trainer.validate`` and ``trainer.test`` always measure, the sanity check never does.

    Training does not change: weights, gradients, buffers, modes and random states are the same as without the callback.

    **Logged metrics**

    - those of each metric under ``log_key_prefix``, by default ``robust/fim_spectral_norm…``,
      ``robust/linearized_accuracy…``, ``robust/hessian_trace…`` and ``robust/wci…`` (see the classes of these names)
    - ``robust/num_samples``: samples measured, over all processes
    - ``robust/seconds``: wall time of the measurement, on the slowest process
    - ``robust/overhead``: share of the wall time of ``fit`` so far that was spent measuring; also in validations that a
      budget leaves out

    Values that are not finite are not logged. With a TensorBoard logger a Custom Scalars layout is written once.

    Args:
        metrics: Metrics to measure, by object or by name, or a single one; by default ``fisher_spectral_norm``,
            ``linearized_accuracy``, ``hessian_trace`` and ``weight_curvature_index``. With likelihood ``"token"`` there
            are no margins, and ``linearized_accuracy`` is left out of these.
        every_n_epochs: Epochs from one measurement to the next.
        max_samples: Size of the subset, over all processes.
        overhead_budget: Share of the wall time of ``fit``, e.g. 0.05, that measuring may take. Measurements are skipped
            to keep it, but never the first. All processes decide alike. By default there is no limit.
        log_key_prefix: Beginning of the logged keys; several monitors in one Trainer need different ones.
        input_std: Standard deviation by which the data module divides the inputs, one number or one per channel. With
            it, ε, margins and Fisher information are in units of the un-normalised input.
        input_mean: Mean that it subtracts; ``valid_range`` needs it.
        valid_range: Smallest and largest value of an un-normalised input, e.g. ``(0, 1)`` for images, which
            perturbations cannot leave. Without it, robustness is underestimated where many inputs lie at the end of
            their range, such as black pixels.
        probe_fn: Makes a :class:`~lightning_robust.Probe` from ``(pl_module, batch)``, for batches other than
            ``(x, y)`` or dictionaries; the monitor fills in options that it leaves open. A method
            ``robustness_probe(batch)`` of the module does the same.
        loss_fn: Maps logits and targets to the loss whose curvature is measured, e.g.
            ``nn.CrossEntropyLoss(label_smoothing=0.1)``; by default that of the likelihood: cross-entropy, BCE or MSE.
        likelihood: What outputs mean; see :class:`~lightning_robust.Probe`.
        linearization: As in :class:`~lightning_robust.Probe`; by default ``"exact"`` up to 32 outputs.
        tolerance: How far a number may move before its prediction counts as changed, for likelihood ``"gaussian"``.
        chunk_size: Largest number of samples that pass through the network together, at most a validation batch.
        dataloader_idx: Which of several validation loaders to measure on.
        prog_bar: Show the first value of each metric in the progress bar, and a line of text per measurement above it.
        on_error: ``"warn"`` turns any failure of a measurement into one warning; the run and all unaffected metrics
            continue, on every process. ``"raise"`` raises it.
        seed: Chooses the subset.

    Raises:
        MisconfigurationException: If an argument has a wrong type or value.
    """

    def __init__(
        self,
        metrics: Sequence[str | ProbeMetric] | str | ProbeMetric | None = None,
        *,
        every_n_epochs: int = 1,
        max_samples: int = 256,
        overhead_budget: float | None = None,
        log_key_prefix: str = "robust/",
        input_std: float | Sequence[float] | None = None,
        input_mean: float | Sequence[float] | None = None,
        valid_range: tuple[float, float] | None = None,
        probe_fn: ProbeFn | None = None,
        loss_fn: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        likelihood: LikelihoodName = "categorical",
        tolerance: float | None = None,
        linearization: LinearizationName | None = None,
        chunk_size: int | None = None,
        dataloader_idx: int = 0,
        prog_bar: bool = False,
        on_error: Literal["warn", "raise"] = "warn",
        seed: int = 0,
    ) -> None:
        super().__init__()
        with misconfiguration():
            kind = likelihood_of(likelihood, tolerance)
            self.metrics = as_metrics(metrics, with_margins=not kind.has_positions)
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
            self.loss_fn = loss_fn
            self.likelihood, self.tolerance = likelihood, kind.tolerance
            optional(check_choice, "linearization", linearization, get_args(LinearizationName))
            if linearization == "exact":
                column_likelihood_of(likelihood, tolerance)
            self.linearization = linearization
            self.chunk_size = None if chunk_size is None else check_integer("chunk_size", chunk_size, at_least=1)
            self.dataloader_idx = check_integer("dataloader_idx", dataloader_idx, at_least=0)
            self.prog_bar = check_boolean("prog_bar", prog_bar)
            check_choice("on_error", on_error, ("warn", "raise"))
            self.on_error = on_error
            self.seed = check_integer("seed", seed, at_least=0)
        defaults = {name: getattr(self, name) for name in _PROBE_OPTIONS}
        self._reporter = Reporter(self.log_key_prefix, prog_bar=self.prog_bar)
        self._loop = MeasurementLoop(
            self.metrics,
            self._reporter,
            functools.partial(read_batch, probe_fn=self.probe_fn, defaults=defaults),
            max_samples=self.max_samples,
            dataloader_idx=self.dataloader_idx,
            seed=self.seed,
            on_error=on_error,
        )

    # ---- what other callbacks read -----------------------------------------------------------------------------------

    @property
    def directions(self) -> dict[str, bool | None]:
        """For each key that has been computed, whether higher values are better; None if neither direction is."""
        return self._reporter.directions

    @property
    def best_untrained(self) -> set[str]:
        """The keys whose best values are those of a network at initialisation."""
        return self._reporter.best_untrained

    @property
    def num_measurements(self) -> int:
        """How many measurements of this run have given values."""
        return self._loop.record.measured

    @property
    def incomplete(self) -> bool:
        """Whether anything failed in the last measurement."""
        return self._loop.incomplete

    @property
    def per_sample(self) -> dict[str, Tensor]:
        """Per-sample values of the last measurement, for keys whose logged value is their mean.

        Each is ``(N,)``, over all processes, float32 on the CPU.
        """
        return {self.log_key_prefix + key: found for key, found in self._loop.per_sample.items()}

    # ---- state -------------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Tells several monitors in one checkpoint apart by the keys that they log."""
        return self._generate_state_key(log_key_prefix=self.log_key_prefix)

    def state_dict(self) -> dict[str, Any]:
        """Return the cadence, the times for the budget, and the last values, which other callbacks keep seeing."""
        return {**self._loop.schedule.state_dict(), "values": dict(self._reporter.values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._loop.schedule.load_state_dict(state_dict)
        self._reporter.values = dict(state_dict.get("values", {}))

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a new run. Validations and tests after ``fit`` are not part of it.

        Raises:
            MisconfigurationException: If another monitor of the trainer has a metric of this one, or its prefix. (The
                Trainer itself refuses two with one prefix, because their state keys are equal.)
        """
        others = [monitor for monitor in monitors_of(trainer) if monitor is not self]
        with misconfiguration():
            check_unshared(self.metrics, [metric for monitor in others for metric in monitor.metrics])
            check_prefix(self.log_key_prefix, [monitor.log_key_prefix for monitor in others])
        fitting = stage == "fit"
        self._loop.begin_run(Schedule(self.every_n_epochs, self.overhead_budget) if fitting else None)
        if fitting:
            self._reporter.values = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock. Warn if nothing will be measured, or if others will misread the cadence."""
        self._loop.schedule.overhead.begin()
        sentences = run_diagnostics.before_fit(
            trainer,
            prefix=self.log_key_prefix,
            other_prefixes=[monitor.log_key_prefix for monitor in monitors_of(trainer)],
            every_n_epochs=self.every_n_epochs,
            budget=self.overhead_budget,
        )
        self._loop.warnings.once(*sentences)
        self._loop.record.impossible = run_diagnostics.no_measurement(trainer) is not None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the last values back in a resumed run, where other callbacks look for them."""
        self._loop.record.first_epoch, self._loop.record.first_step = trainer.current_epoch, trainer.global_step
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in self._reporter.values.items()})

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a measurement, if one is due."""
        self._loop.begin(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Copy the selected samples of this batch, before the module has a chance to change it."""
        self._loop.collect(pl_module, batch, dataloader_idx=dataloader_idx)

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
        self._loop.measure(pl_module, batch_idx=batch_idx, dataloader_idx=dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree with the other processes, and log."""
        self._loop.conclude(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare accuracies, and lay out TensorBoard's Custom Scalars page, one monitor for all of the trainer."""
        monitors = monitors_of(trainer)
        prefixes = [monitor.log_key_prefix for monitor in monitors]
        self._loop.guard(lambda: self._loop.compare_accuracy(trainer, prefixes=prefixes), "compare accuracies")
        if self is monitors[0] and trainer.is_global_zero:
            reporters = [monitor._reporter for monitor in monitors]
            self._loop.guard(lambda: self._reporter.lay_out(trainer, reporters), "lay out TensorBoard's page")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if nothing was measured, or less than it seems."""
        overhead = self._loop.schedule.overhead
        overhead.end()
        sentences = run_diagnostics.after_fit(trainer, self._loop.record, overhead, budget=self.overhead_budget)
        self._loop.warnings.once(*sentences)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the clock, and drop a measurement that will not be finished."""
        self._loop.schedule.overhead.end()
        self._loop.abandon()

    # test runs are measured like validation runs
    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end


def monitors_of(trainer: Trainer) -> list[RobustnessMonitor]:
    """The monitors of a trainer, in order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, RobustnessMonitor)]
