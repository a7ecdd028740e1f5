"""The callback that measures robustness inside the validation loop and logs it beside accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_robust.callbacks._arguments import as_metrics, check_constant, check_integer, check_range
from lightning_robust.callbacks.batches import default_probe
from lightning_robust.callbacks.measurement import Measurement, Values
from lightning_robust.callbacks.outcome import Verdict
from lightning_robust.callbacks.sample_selection import LoaderShare, SampleCollector
from lightning_robust.dashboard.tensorboard_layout import write_layout
from lightning_robust.metrics import ProbeMetric
from lightning_robust.probe import Probe, find_flaws


class RobustnessWarning(UserWarning):
    """A measurement was skipped, or its numbers need care."""


class RobustnessMonitor(Callback):
    """Measures, on a fixed subset of the validation samples, how robust the network is becoming, without attacks.

    The subset is spread evenly over the whole validation loader and is the same at every measurement, whatever the
    batch size and the number of processes, so that curves are paired. The first measurement is made in the first
    validation of ``fit``, later ones once ``every_n_epochs`` epochs have passed, in every validation run of such an
    epoch; ``trainer.validate`` and ``trainer.test`` always measure. Sanity checking does not.

    Nothing of the training changes: weights, gradients, buffers, modes and random states are as without the callback.

    **Logged metrics**

    - those of each metric under ``log_key_prefix``, by default ``robust/fim_spectral_norm…`` and
      ``robust/linearized_accuracy…`` (see :class:`~lightning_robust.FisherSpectralNorm` and
      :class:`~lightning_robust.LinearizedAccuracy`)
    - ``robust/num_samples``: samples measured, over all processes
    - ``robust/seconds``: wall time of the measurement, on the slowest process

    Values that are not finite are not logged. With a TensorBoard logger a Custom Scalars layout is written once, which
    puts whatever accuracy the module logs on one chart with the predicted robust accuracy.

    Args:
        metrics: Metrics to measure, by object or by name; by default ``fisher_spectral_norm`` and
            ``linearized_accuracy``.
        every_n_epochs: Epochs from one measurement to the next.
        max_samples: Size of the subset, over all processes.
        log_key_prefix: What the logged keys begin with; several monitors in one Trainer need several.
        input_std: Standard deviation by which the data module divides the inputs, one number or one per channel. With
            it, ε, margins and Fisher information are in units of the un-normalised input.
        input_mean: What it subtracts, likewise; ``valid_range`` needs it.
        valid_range: Smallest and largest value of an un-normalised input, e.g. ``(0, 1)`` for images, which
            perturbations cannot leave. L∞ margins and attacks respect it. Where many inputs lie at an end of their
            range, as black pixels do, robustness is underestimated without it.
        probe_fn: Makes a :class:`~lightning_robust.Probe` of ``(pl_module, batch)``, for batches other than ``(x, y)``
            or dictionaries. A method ``robustness_probe(batch)`` of the module does the same.
        chunk_size: Bound on memory, see :func:`~lightning_robust.functional.linearize`. At most as many samples as in
            the largest validation batch pass through the network together in any case.
        dataloader_idx: Which of several validation loaders to measure on.
        prog_bar: Show the first value of each metric in the progress bar, and a line of text per measurement above it.
        on_error: ``"warn"`` turns any failure of a measurement into one warning, and the run goes on, on every process;
            ``"raise"`` lets it through.
        seed: Chooses the subset.

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
        log_key_prefix: str = "robust/",
        input_std: float | Sequence[float] | None = None,
        input_mean: float | Sequence[float] | None = None,
        valid_range: tuple[float, float] | None = None,
        probe_fn: Callable[[LightningModule, Any], Probe] | None = None,
        chunk_size: int | None = None,
        dataloader_idx: int = 0,
        prog_bar: bool = False,
        on_error: Literal["warn", "raise"] = "warn",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.metrics = as_metrics(metrics)
        self.every_n_epochs = check_integer("every_n_epochs", every_n_epochs, at_least=1)
        self.max_samples = check_integer("max_samples", max_samples, at_least=1)
        self.chunk_size = None if chunk_size is None else check_integer("chunk_size", chunk_size, at_least=1)
        self.dataloader_idx = check_integer("dataloader_idx", dataloader_idx, at_least=0)
        self.seed = check_integer("seed", seed, at_least=0)
        if on_error not in ("warn", "raise"):
            raise MisconfigurationException(
                f"Expected argument `on_error` to be 'warn' or 'raise', but got {on_error!r}."
            )
        if probe_fn is not None and not callable(probe_fn):
            raise MisconfigurationException(
                f"Expected argument `probe_fn` to be callable, but got {type(probe_fn).__name__}."
            )
        if not isinstance(log_key_prefix, str) or not log_key_prefix:
            raise MisconfigurationException(
                f"Expected argument `log_key_prefix` to be a non-empty string, but got {log_key_prefix!r}."
            )
        self.log_key_prefix = log_key_prefix
        self.input_std = check_constant("input_std", input_std, positive=True)
        self.input_mean = check_constant("input_mean", input_mean)
        self.valid_range = check_range("valid_range", valid_range)
        if self.valid_range is not None and self.input_std is not None and self.input_mean is None:
            raise MisconfigurationException(
                "Expected argument `input_mean` beside `input_std` and `valid_range`, but got None. Pass 0.0 if nothing"
                " was subtracted."
            )
        self.probe_fn = probe_fn
        self.prog_bar = prog_bar
        self.on_error = on_error
        self._last_epoch: int | None = None  # of the last measurement in `fit`
        self._said: set[str] = set()  # what is said once in a run
        self._unexamined = True
        self._logged: list[str] = []  # keys of the last measurement
        self._laid_out: set[str] = set()  # directories that have a layout
        self._measurement: Measurement | None = None  # in progress

    # ---- state -------------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Distinguishes several monitors in one checkpoint by the keys that they log."""
        return self._generate_state_key(log_key_prefix=self.log_key_prefix)

    def state_dict(self) -> dict[str, Any]:
        """Epoch of the last measurement, so that a resumed run keeps the cadence."""
        return {"last_epoch": self._last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._last_epoch = state_dict["last_epoch"]

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a new run."""
        self._last_epoch = None
        self._unexamined = True
        self._said.clear()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it if nothing will ever be measured."""
        if trainer.barebones:
            self._say_once("`Trainer(barebones=True)` logs nothing, so RobustnessMonitor measures nothing.")
        elif not trainer.enable_validation:
            self._say_once(
                "RobustnessMonitor measures inside the validation loop, but this run has none, so nothing will be"
                " measured. Define `validation_step` and a validation dataloader, with `limit_val_batches` above 0."
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            watched = str(getattr(callback, "monitor", ""))
            if self.every_n_epochs > 1 and type(callback) is EarlyStopping and watched.startswith(self.log_key_prefix):
                self._say_once(
                    f"EarlyStopping follows `{watched}`, which is measured every {self.every_n_epochs} epochs, and"
                    " takes the old value for no improvement in between. Its `patience` counts validations: set it to"
                    f" at least {self.every_n_epochs} times the number of measurements that it should wait."
                )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a measurement, if one is due."""
        self._begin(trainer)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a measurement."""
        self._begin(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep this batch's share of the measured samples (before the module has a chance to change the batch)."""
        self._collect(pl_module, batch, dataloader_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep this batch's share of the measured samples."""
        self._collect(pl_module, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        self._finish(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        self._finish(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay out TensorBoard's Custom Scalars page, once."""
        self._lay_out(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay out TensorBoard's Custom Scalars page, once."""
        self._lay_out(trainer)

    # ---- one measurement ---------------------------------------------------------------------------------------------

    def _begin(self, trainer: Trainer) -> None:
        self._measurement = None
        if trainer.sanity_checking or trainer.barebones or not self._is_due(trainer):
            return
        loaders = CombinedLoader(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders).flattened
        if self.dataloader_idx >= len(loaders):
            self._say_once(
                f"RobustnessMonitor was told to measure on `dataloader_idx={self.dataloader_idx}`, but there are"
                f" {len(loaders)} loaders, so nothing is measured."
            )
            return
        measurement = Measurement(self.metrics, on_error=self.on_error)
        measurement.attempt(lambda: self._choose(trainer, loaders[self.dataloader_idx], measurement))
        self._measurement = measurement

    def _choose(self, trainer: Trainer, loader: Iterable[object], measurement: Measurement) -> None:
        """Choose the samples of this loader that will be measured."""
        num_batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        limit = num_batches[self.dataloader_idx] if isinstance(num_batches, list) else num_batches
        share = LoaderShare.of(loader, num_batches=limit)
        measurement.collector = SampleCollector(
            share, max_samples=self.max_samples, num_processes=trainer.world_size, seed=self.seed
        )
        if share.size is None:
            self._say_once(
                "RobustnessMonitor cannot tell beforehand how many samples the validation loader holds, so it measures"
                f" a uniformly random subset of {self.max_samples} (reservoir sampling): the same one at every"
                " measurement only as long as the loader yields the same samples in the same order. A loader with a"
                " length is safer."
            )
        if share.shuffled:
            self._say_once(
                "The validation loader shuffles, so RobustnessMonitor measures other samples at every measurement, and"
                " its curves carry the noise of that. Pass `shuffle=False` to the validation DataLoader."
            )

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.state.fn != TrainerFn.FITTING:
            return True
        epoch, last = trainer.current_epoch, self._last_epoch
        return last is None or epoch <= last or epoch - last >= self.every_n_epochs

    def _collect(self, pl_module: LightningModule, batch: object, dataloader_idx: int) -> None:
        measurement = self._measurement
        if measurement is not None and dataloader_idx == self.dataloader_idx:

            def add() -> None:
                assert measurement.collector is not None
                measurement.collector.add(self._probe(pl_module, batch))

            measurement.attempt(add)

    def _probe(self, pl_module: LightningModule, batch: object) -> Probe:
        make: Callable[[LightningModule, Any], Probe] = self.probe_fn or default_probe
        if self.probe_fn is None and callable(method := getattr(pl_module, "robustness_probe", None)):
            probe = method(batch)
        else:
            probe = make(pl_module, batch)
        if not isinstance(probe, Probe):
            raise MisconfigurationException(
                f"Expected `probe_fn` to return a Probe(model, inputs, targets), but got {type(probe).__name__}."
            )
        return replace(
            probe,
            input_std=self.input_std if probe.input_std is None else probe.input_std,
            input_mean=self.input_mean if probe.input_mean is None else probe.input_mean,
            valid_range=self.valid_range if probe.valid_range is None else probe.valid_range,
            chunk_size=self.chunk_size if probe.chunk_size is None else probe.chunk_size,
        )

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log: the same collectives on every process."""
        measurement, self._measurement = self._measurement, None
        if measurement is None:
            return
        if trainer.state.fn == TrainerFn.FITTING:
            self._last_epoch = trainer.current_epoch
        # Metal has no float64, in which the states are kept; nor does it run several processes
        device = torch.device("cpu") if pl_module.device.type == "mps" else pl_module.device
        measurement.attempt(lambda: measurement.update(pl_module, device, examine=self._examine))
        verdict, values = measurement.conclude(device)
        if verdict.sound:
            self._log(trainer, pl_module, values, verdict)
        else:
            cause = verdict.cause.rstrip(".")
            self._warn(
                f"RobustnessMonitor skipped the measurement in epoch {trainer.current_epoch}: {cause}. The run goes on;"
                " pass `on_error='raise'` to stop with a traceback instead."
            )

    def _examine(self, probe: Probe) -> None:
        """Once in a run, say what makes the numbers mean something else than they seem to."""
        if not self._unexamined:
            return
        for flaw in find_flaws(probe):
            self._say_once(flaw)
        low, high = float(probe.inputs.min()), float(probe.inputs.max())
        if probe.input_std is None and (low < 0 or high > 1):
            remedy = (
                "For bytes from 0 to 255 pass `input_std=1/255`"
                if low >= 0
                else "If they are normalised images, pass the standard deviation of each channel as `input_std`"
            )
            self._say_once(
                f"Validation inputs range from {low:.3g} to {high:.3g} and no `input_std` was given, so ε, margins and"
                f" Fisher information are in units of the inputs as the network receives them. {remedy}: then ε is in"
                " units of pixels between 0 and 1."
            )
        if probe.valid_range is not None:
            raw = probe.unnormalised_inputs
            low, high = float(raw.min()), float(raw.max())
            slack = 0.01 * (probe.valid_range[1] - probe.valid_range[0])
            if low < probe.valid_range[0] - slack or high > probe.valid_range[1] + slack:
                self._say_once(
                    f"Validation inputs range from {low:.3g} to {high:.3g} before normalisation, beyond the"
                    f" `valid_range` {tuple(probe.valid_range)}, so L∞ margins and attacks are wrong. If the inputs are"
                    " normalised, pass the `input_mean` and `input_std` with which it was done."
                )
        self._unexamined = False

    def _log(self, trainer: Trainer, pl_module: LightningModule, values: Values, verdict: Verdict) -> None:
        headlines = [next(iter(computed)) for computed in values]
        flat = {key: float(value) for computed in values for key, value in computed.items()}
        flat |= {"num_samples": float(verdict.num_samples), "seconds": verdict.seconds}
        self._logged = [self.log_key_prefix + key for key in flat]
        for key, value in flat.items():
            if math.isfinite(value):
                pl_module.log(
                    self.log_key_prefix + key,
                    value,
                    prog_bar=self.prog_bar and key in headlines,
                    on_step=False,
                    on_epoch=True,
                    sync_dist=True,
                    batch_size=1,
                )
            else:
                self._say_once(f"`{self.log_key_prefix}{key}` is not finite and is not logged where it is so.")
        if self.prog_bar and trainer.progress_bar_callback is not None:
            summary = ", ".join(f"{key} {flat[key]:.4g}" for key in headlines)
            trainer.progress_bar_callback.print(
                f"robustness in epoch {trainer.current_epoch}, on {verdict.num_samples} samples: {summary}"
                f" ({verdict.seconds:.1f} s)"
            )

    def _lay_out(self, trainer: Trainer) -> None:
        """Write one layout for all monitors of the trainer, once per directory of logs; the first monitor does it."""
        monitors = _monitors(trainer)
        keys = {monitor.log_key_prefix: monitor._logged for monitor in monitors if monitor._logged}
        if not keys or self is not monitors[0] or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and logger.log_dir not in self._laid_out:
                self._laid_out.add(logger.log_dir)
                write_layout(logger, keys)

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self._warn(message)

    def _warn(self, message: str) -> None:
        rank_zero_warn(message, category=RobustnessWarning)


def _monitors(trainer: Trainer) -> list[RobustnessMonitor]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, RobustnessMonitor)]
