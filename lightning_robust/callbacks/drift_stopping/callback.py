"""The callback that stops training when robustness drifts away from its best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_robust.callbacks.arguments import as_weights, misconfiguration
from lightning_robust.callbacks.drift_stopping import messages
from lightning_robust.callbacks.drift_stopping.readings import Readings, no_direction, owner_of, read
from lightning_robust.callbacks.drift_stopping.record import Record, Series
from lightning_robust.callbacks.warn_once import WarnOnce
from lightning_robust.functional._validation.arguments import (
    as_number,
    check_boolean,
    check_choice,
    check_integer,
    expected_but_got,
)
from lightning_robust.functional.drift.rule import (
    Combine,
    Drift,
    Rule,
    check_drift_options,
    drift,
    drifted_together,
    least_measurements,
)

DEFAULT_MONITOR = "robust/linearized_margin_linf_clipped"


class RobustnessDriftStopping(EarlyStopping):
    """Stops training once robustness has drifted, beyond chance, away from the best that it has reached.

    Put it beside a :class:`~lightning_robust.RobustnessMonitor`. It looks at each *measurement* once, however many
    validations lie between two of them, and leaves out those that are missing or not finite. The rule is that of
    :func:`lightning_robust.functional.drift.rule`: ``patience`` measurements in a row, each worse than the best mean of
    ``patience`` consecutive ones by more than ``tolerance`` (relative), by more than ``z`` standard errors of the
    difference, and by more than ``z`` times what the series goes up and down by itself. The standard errors come from
    ``<key>_stderr`` and, for the keys in the monitor's ``per_sample``, from what each measurement found on each sample,
    which is kept, 4 bytes each, also in checkpoints.

    It is Lightning's EarlyStopping otherwise: ``min_epochs``, ``trainer.should_stop``, ``stopped_epoch``,
    ``stopping_reason_message``, ``wait_count`` and ``best_score`` mean what they mean there. All processes follow the
    values of the first. It logs nothing.

    Args:
        monitor: Key to follow, several keys, or several with their weights, all logged in validation. The default is
            logged by the default metrics; ``LinearizedAccuracy`` of norm ``"l2"`` or of order 2 logs others.
        mode: ``"max"`` or ``"min"``, as in EarlyStopping: what is best, of keys that no RobustnessMonitor logs. Of the
            others it is what the metric says (``higher_is_better``).
        tolerance: Change that does not matter, relative to the best.
        z: Change that does not matter either, in standard errors or, if that is more, in standard deviations of the ups
            and downs from one measurement to the next.
        patience: Measurements that a drift takes.
        warmup: Measurements at the beginning that do not count, neither as the best nor as drift. λ, the trace and the
            index are lowest in a network that has learnt nothing, and need one.
        reference: A fixed value in place of the best so far, below which (above, where lower is better) values may fall
            by ``tolerance``; for one key.
        rule: ``"consecutive"``, or ``"cusum"`` for a cumulative sum, which reacts to a large fall faster than after
            ``patience`` measurements, and to a small one that single measurements interrupt.
        combine: Of several keys: ``"any"`` stops with the first that has drifted, ``"all"`` when all have,
            ``"majority"`` when those that have hold more than half of the weight. By default ``"any"``, and
            ``"majority"`` of keys with weights.
        action: ``"stop"``, or ``"warn"`` for one warning per drift.
        restore_best_weights: At the end of ``fit``, stopped or not, put the weights of the best measurement back (the
            best single one, after warm-up; of several keys the one with the best weighted relative change), unless it
            is the latest: weights after it are not known to be worse. Keeps one copy of the weights in main memory, and
            in checkpoints.
        strict: Whether a key that is not logged is an error, at the first validation that should have logged it.

    Raises:
        MisconfigurationException: If an argument has a wrong type or value, or contradicts another or the metric; in
            ``fit``, if no such key is logged (with those that are).

    Example::

        trainer = Trainer(callbacks=[RobustnessMonitor(), RobustnessDriftStopping()])

    Source: ours.
    """

    def __init__(
        self,
        monitor: str | Sequence[str] | Mapping[str, float] = DEFAULT_MONITOR,
        *,
        mode: Literal["min", "max"] | None = None,
        tolerance: float = 0.05,
        z: float = 2.0,
        patience: int = 5,
        warmup: int = 0,
        reference: float | None = None,
        rule: Rule = "consecutive",
        combine: Combine | None = None,
        action: Literal["stop", "warn"] = "stop",
        restore_best_weights: bool = False,
        strict: bool = True,
    ) -> None:
        with misconfiguration():
            self.weights = as_weights(monitor)
            check_integer("patience", patience, at_least=1)
            check_drift_options(
                window=patience, warmup=warmup, reference=reference, tolerance=tolerance, z=z, rule=rule
            )
            if mode is not None:
                check_choice("mode", mode, ("min", "max"))
            if combine is not None:
                check_choice("combine", combine, ("any", "all", "majority"))
                if len(self.weights) == 1:
                    raise ValueError(expected_but_got("combine", "None, since `monitor` is one key", combine))
                if isinstance(monitor, Mapping) and combine != "majority":
                    raise ValueError(
                        expected_but_got("combine", "'majority' or None, since `monitor` has weights", combine)
                    )
            if reference is not None and len(self.weights) > 1:
                raise ValueError(expected_but_got("reference", "None, since `monitor` has several keys", reference))
            check_choice("action", action, ("stop", "warn"))
            check_boolean("restore_best_weights", restore_best_weights)
            check_boolean("strict", strict)
        # EarlyStopping wants a direction; ours are known later, and are kept beside it
        super().__init__(
            monitor=next(iter(self.weights)),
            patience=patience,
            mode=mode or "max",
            strict=strict,
            verbose=True,  # of what `_evaluate_stopping_criteria` gives a reason for, which is when it stops
            check_finite=False,
            check_on_train_epoch_end=False,
            log_rank_zero_only=True,
        )
        self._mode = mode
        self.tolerance = as_number(tolerance)
        self.z = as_number(z)
        self.warmup = warmup
        self.reference = None if reference is None else as_number(reference)
        self.rule = rule
        self.combine = combine or ("majority" if isinstance(monitor, Mapping) else "any")
        self.action = action
        self.restore_best_weights = restore_best_weights
        self._warnings = WarnOnce()
        self._record = Record()
        self._best_weights: dict[str, Tensor] | None = None
        self._old: dict[str, Tensor] = {}  # what stood in `callback_metrics` when the validation began
        self._drifts: dict[str, Drift] = {}
        self._drifting = False

    # ---- state -------------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Distinguishes several stoppers in one checkpoint by what they follow, by which rule, and what they do."""
        return self._generate_state_key(
            monitor=self.weights, mode=self._mode, rule=self.rule, combine=self.combine, action=self.action
        )

    @property
    def drifted(self) -> bool:
        """Whether what it follows has drifted, after the latest measurement."""
        return self._drifting

    @property
    def best_epoch(self) -> int | None:
        """Epoch of the best measurement; None before there is one."""
        return self._record.best_epoch

    def state_dict(self) -> dict[str, Any]:
        """That of EarlyStopping, all measurements, and the best weights if they are to be restored."""
        ours = {"record": self._record.state_dict(), "drifting": self._drifting, "best_weights": self._best_weights}
        return super().state_dict() | ours

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state_dict)
        self._record = Record.of_state(state_dict["record"])
        self._drifting = state_dict["drifting"]
        self._best_weights = state_dict["best_weights"] if self.restore_best_weights else None

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a new run."""
        super().setup(trainer, pl_module, stage)
        if stage != TrainerFn.FITTING:
            return
        self._record, self._best_weights, self._drifts, self._drifting = Record(), None, {}, False
        self.wait_count, self.stopped_epoch, self.best_score = 0, 0, torch.tensor(-torch.inf)
        self.stopping_reason, self.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None
        self._warnings.forget()
        if self.restore_best_weights and isinstance(
            trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy
        ):
            raise MisconfigurationException(
                "Expected argument `restore_best_weights` to be False where weights are spread over processes, as"
                f" {type(trainer.strategy).__name__} does. A `ModelCheckpoint` that follows the same key keeps them."
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self.restore_best_weights and any(isinstance(callback, WeightAveraging) for callback in callbacks):
            raise MisconfigurationException(
                "Expected argument `restore_best_weights` to be False beside weight averaging, which puts its own in"
                " for a validation and at the end. A `ModelCheckpoint` that follows the same key keeps them."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complain of a key of which nobody can say whether it should be high or low."""
        for key in self.weights:
            if self._mode is None and owner_of(trainer, key) is None:
                raise MisconfigurationException(no_direction(trainer, key))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember which values are old."""
        self._old = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what has just been measured, and let EarlyStopping stop the run if it has drifted."""
        if self._should_skip_check(trainer):
            return
        readings = read(
            trainer,
            self.weights,
            old=self._old,
            known=self._record.series,
            mode=self._mode,
            strict=self.strict,
            tolerance=self.tolerance,
            accuracy_key=self._record.accuracy_key,
        )
        readings = trainer.strategy.broadcast(readings)  # of values that a user logs, each process has its own
        if readings.error is not None:
            raise MisconfigurationException(readings.error)
        if self.warmup == 0 and self.reference is None:
            self._warnings.once(*map(messages.best_untrained, readings.best_untrained))
        for key in readings.not_finite:
            self._warnings.once(f"RobustnessDriftStopping leaves out values of `{key}` that are not finite.")
        if readings.values:
            self._add(trainer, pl_module, readings)
            # EarlyStopping wants a key that is there, asks `_evaluate_stopping_criteria`, and does the rest
            self.monitor = next(iter(readings.values))
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best weights back, unless nothing is known of later ones."""
        if not self.restore_best_weights or self.best_epoch is None or self._record.best_is_latest:
            return
        if self._best_weights is None:
            self._warnings.once(messages.no_best_weights(self.best_epoch))
        else:
            pl_module.load_state_dict(self._best_weights, strict=pl_module.strict_loading)
            rank_zero_info(f"RobustnessDriftStopping put back the weights of epoch {self.best_epoch}.")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say it if the run could not have been stopped for want of measurements."""
        least = least_measurements(window=self.patience, warmup=self.warmup, reference=self.reference, rule=self.rule)
        series = self._record.series
        counts = {key: len(series[key].values) if key in series else 0 for key in self.weights}
        enough = {key: Drift(drifted=count >= least) for key, count in counts.items()}
        fast_dev_run: bool | int = trainer.fast_dev_run  # type: ignore[attr-defined]
        if not (fast_dev_run or self.stopped_epoch or drifted_together(enough, self.weights, self.combine)):
            self._warnings.once(messages.could_not_stop(counts, least=least))

    # ---- one measurement ---------------------------------------------------------------------------------------------

    def _add(self, trainer: Trainer, pl_module: LightningModule, measured: Readings) -> None:
        """Add to the record, and judge it."""
        record, epoch = self._record, trainer.current_epoch
        accuracy = math.nan
        if measured.accuracy is not None:
            record.accuracy_key, accuracy = measured.accuracy
        for key, value in measured.values.items():
            series = record.series.setdefault(key, Series(measured.higher_is_better[key]))
            series.epochs.append(epoch)
            series.values.append(value)
            series.stderrs.append(measured.stderrs[key])
            series.accuracies.append(accuracy)
            series.per_sample.append(measured.per_sample.get(key))
        self._drifts = {key: self._drift(series) for key, series in record.series.items()}
        self.wait_count = max(drift.length for drift in self._drifts.values())
        warm = {key: value for key, value in measured.values.items() if len(record.series[key].values) > self.warmup}
        if warm and record.keep_if_better(epoch, warm, self.weights):
            self.best_score = torch.tensor(next(iter(warm.values())))
            if self.restore_best_weights:
                self._best_weights = {
                    key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
                    for key, value in pl_module.state_dict().items()
                }

    def _drift(self, series: Series) -> Drift:
        return drift(
            series.values,
            series.stderrs,
            series.per_sample,
            higher_is_better=series.higher_is_better,
            window=self.patience,
            warmup=self.warmup,
            reference=self.reference,
            tolerance=self.tolerance,
            z=self.z,
            rule=self.rule,
        )

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        """Whether to stop, and why: EarlyStopping's question, with our answer."""
        was_drifting, self._drifting = self._drifting, drifted_together(self._drifts, self.weights, self.combine)
        if not self._drifting:
            return False, None
        reason = messages.reason(self._record, self._drifts)
        if self.action == "stop":
            self.stopping_reason = EarlyStoppingReason.PATIENCE_EXHAUSTED
            return True, f"RobustnessDriftStopping stops: {reason}"
        if not was_drifting:
            self._warnings.warn(f"RobustnessDriftStopping warns: {reason} Training goes on.")
        return False, None
