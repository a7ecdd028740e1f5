"""The callback that stops training when robustness drifts away from its best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_robust.callbacks.arguments import as_monitor_weights, misconfiguration
from lightning_robust.callbacks.drift_stopping import messages
from lightning_robust.callbacks.drift_stopping.best_weights import (
    check_restorable,
    copy_of_weights,
    put_weights_back,
)
from lightning_robust.callbacks.drift_stopping.readings import Readings, no_direction, owner_of, read, remedy
from lightning_robust.callbacks.drift_stopping.record import Record, Series
from lightning_robust.callbacks.warn_once import WarnOnce
from lightning_robust.functional._validation.arguments import as_number, check_boolean, check_choice, expected_but_got
from lightning_robust.functional.drift.rule import (
    Combine,
    Drift,
    check_drift_options,
    drift,
    drifted_together,
    least_measurements,
)

DEFAULT_MONITOR = "robust/linearized_margin_linf_clipped"


class RobustnessDriftStopping(EarlyStopping):
    """Stops training when a robustness metric drifts away from its best by more than chance explains.

    Add it to a Trainer that has a :class:`~lightning_robust.RobustnessMonitor`. It stops the run after ``patience``
    measurements in a row that are worse than the best so far, each by more than

    - ``tolerance``, relative to the best,
    - ``z`` standard errors of the difference, and
    - ``z`` times the usual fluctuation from one measurement to the next.

    Only new, finite measurements count, not the validations between them. The best is the best mean of ``patience``
    consecutive measurements; :mod:`lightning_robust.functional.drift.rule` has formulas and rates of false alarms.

    Standard errors come from ``<key>_stderr``. Keys in the monitor's ``per_sample`` are compared sample by sample: more
    sensitive, but 4 bytes per sample and measurement are kept, also in checkpoints.

    **Restoring the best weights can cost clean accuracy.** In standard training, robustness to large perturbations can
    peak in the first epochs, long before accuracy does. For example, a CNN on Fashion-MNIST whose accuracy at
    ε = 8/255 fell from 54 % to 36 % was put back to epoch 2, with 86.1 % clean accuracy instead of 87.3 %. A message
    reports the trade. To avoid it, raise ``tolerance``, keep ``restore_best_weights=False``, or take the weights of a
    ``ModelCheckpoint`` that monitors accuracy.

    Everything else is as in Lightning's EarlyStopping: ``min_epochs``, ``trainer.should_stop``, ``stopped_epoch``,
    ``stopping_reason_message``, ``wait_count``, ``best_score``. All processes follow rank zero. It logs no values.

    Args:
        monitor: Key to follow, a list of keys, or a mapping of keys to weights, all logged in validation. A weight says
            how much its key counts when the best measurement is chosen. The default key is logged by the default
            metrics; ``LinearizedAccuracy`` with norm ``"l2"`` or order 2 logs other keys.
        mode: ``"max"`` or ``"min"``, the direction of keys that you log yourself. Metrics of the monitor have their own
            direction (``higher_is_better``).
        tolerance: Change that does not matter, relative to the best.
        z: Change that chance may explain, in standard errors of the difference or in standard deviations of the
            fluctuations, whichever is larger.
        patience: Measurements in a row that must be worse.
        warmup: Measurements at the beginning that count neither as best nor as drift. λ, the Hessian trace and the WCI
            are lowest at initialisation and need a warm-up.
        reference: Fixed value to compare with instead of the best so far; for one key.
        combine: With several keys, ``"any"`` stops when one has drifted, ``"all"`` when all have.
        action: ``"stop"``, or ``"warn"`` for one warning per drift while training goes on.
        restore_best_weights: At the end of ``fit``, stopped or not, put back the weights of the best single measurement
            after warm-up (of several keys: with the best weighted relative change). If that is the latest measurement,
            the weights stay; so they do, with a warning, if the network has been changed since (pruned, grown,
            quantised). Keeps one copy of the weights in main memory, and in checkpoints.
        strict: Raise an error if a key is still missing after the first validation that should have logged it.

    Attributes:
        monitor_weights: Weight of each followed key.

    Raises:
        MisconfigurationException: If an argument has a wrong type or value, or contradicts another argument or the
            metric; in ``fit``, if a key is not logged.

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
        combine: Combine = "any",
        action: Literal["stop", "warn"] = "stop",
        restore_best_weights: bool = False,
        strict: bool = True,
    ) -> None:
        with misconfiguration():
            self.monitor_weights = as_monitor_weights(monitor)
            check_drift_options(patience=patience, warmup=warmup, reference=reference, tolerance=tolerance, z=z)
            if mode is not None:
                check_choice("mode", mode, ("min", "max"))
            check_choice("combine", combine, get_args(Combine))
            if len(self.monitor_weights) == 1 and combine == "all":
                raise ValueError(expected_but_got("combine", "'any', since `monitor` is one key", combine))
            if len(self.monitor_weights) > 1 and reference is not None:
                raise ValueError(expected_but_got("reference", "None, since `monitor` has several keys", reference))
            check_choice("action", action, ("stop", "warn"))
            check_boolean("restore_best_weights", restore_best_weights)
            check_boolean("strict", strict)
        # EarlyStopping needs one key and one direction. The stopper finds the direction of each key while it reads.
        super().__init__(
            monitor=next(iter(self.monitor_weights)),
            patience=patience,
            mode=mode or "max",
            strict=strict,
            verbose=True,  # logs the reason for a stop
            check_finite=False,
            check_on_train_epoch_end=False,
            log_rank_zero_only=True,
        )
        self._mode = mode
        self.tolerance = as_number(tolerance)
        self.z = as_number(z)
        self.warmup = warmup
        self.reference = None if reference is None else as_number(reference)
        self.combine = combine
        self.action = action
        self.restore_best_weights = restore_best_weights
        self._warnings = WarnOnce()
        self._record = Record()
        self._best_weights: dict[str, Tensor] | None = None
        self._old: dict[str, Tensor] = {}  # `callback_metrics` from before the validation
        self._drifts: dict[str, Drift] = {}
        self._drifting = False

    # ---- state -------------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Tells several stoppers in one checkpoint apart."""
        # There is only one rule. Keys in earlier checkpoints contain its name.
        return self._generate_state_key(
            monitor=self.monitor_weights, mode=self._mode, rule="consecutive", combine=self.combine, action=self.action
        )

    @property
    def drifted(self) -> bool:
        """Whether the followed keys have drifted, as of the latest measurement."""
        return self._drifting

    @property
    def best_epoch(self) -> int | None:
        """Epoch of the best measurement, None before there is one."""
        return self._record.best_epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the state of EarlyStopping, all measurements, and the best weights if they are to be restored."""
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
        if self.restore_best_weights:
            check_restorable(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise an error for a key whose direction is unknown."""
        for key in self.monitor_weights:
            if self._mode is None and owner_of(trainer, key) is None:
                raise MisconfigurationException(no_direction(trainer, key))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the values of earlier validations, to recognise new values."""
        self._old = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record new measurements, and let EarlyStopping stop the run if they have drifted."""
        if self._should_skip_check(trainer):
            return
        readings = read(
            trainer, self.monitor_weights, old=self._old, record=self._record, mode=self._mode, strict=self.strict
        )
        readings = trainer.strategy.broadcast(readings)  # values that a user logs may differ between processes
        if readings.error is not None:
            raise MisconfigurationException(readings.error)
        if self.tolerance >= 1 and any(readings.higher_is_better.values()):
            raise MisconfigurationException(messages.endless_tolerance(self.tolerance))
        if self.warmup == 0 and self.reference is None:
            self._warnings.once(*map(messages.best_untrained, readings.best_untrained))
        self._warnings.once(*map(messages.not_finite, readings.not_finite))
        if readings.values:
            self._add(trainer, pl_module, readings)
            # EarlyStopping needs a key that is logged. It calls `_evaluate_stopping_criteria` and does the rest.
            self.monitor = next(iter(readings.values))
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best weights back, unless the best measurement is the latest or the network is no longer the same."""
        if not self.restore_best_weights or self.best_epoch is None or self._record.best_is_latest:
            return
        if self._best_weights is None:
            self._warnings.once(messages.no_best_weights(self.best_epoch))
        else:
            reason = put_weights_back(pl_module, self._best_weights)
            if reason is None:
                rank_zero_info(messages.put_back(self._record))
            else:
                self._warnings.once(messages.other_structure(self._record, reason))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if there were too few measurements to stop the run."""
        least = least_measurements(patience=self.patience, warmup=self.warmup, reference=self.reference)
        series = self._record.series
        counts = {key: len(series[key].values) if key in series else 0 for key in self.monitor_weights}
        enough = {key: Drift(drifted=count >= least) for key, count in counts.items()}
        fast_dev_run: bool | int = trainer.fast_dev_run  # type: ignore[attr-defined]
        if not (fast_dev_run or self.stopped_epoch or drifted_together(enough, self.monitor_weights, self.combine)):
            self._warnings.once(messages.could_not_stop(counts, least=least, remedy=remedy(trainer, counts)))

    # ---- one measurement ---------------------------------------------------------------------------------------------

    def _add(self, trainer: Trainer, pl_module: LightningModule, measured: Readings) -> None:
        """Record a measurement, judge each series, and keep the weights if it is the best."""
        record, epoch = self._record, trainer.current_epoch
        accuracy = math.nan
        if measured.accuracy is not None:
            record.accuracy_key, accuracy = measured.accuracy
        for key, value in measured.values.items():
            series = record.series.setdefault(key, Series(measured.higher_is_better[key]))
            series.add(epoch, value, measured.stderrs[key], accuracy, measured.per_sample.get(key))
        self._drifts = {
            key: drift(
                series.values,
                series.stderrs,
                series.per_sample,
                higher_is_better=series.higher_is_better,
                patience=self.patience,
                warmup=self.warmup,
                reference=self.reference,
                tolerance=self.tolerance,
                z=self.z,
            )
            for key, series in record.series.items()
        }
        self.wait_count = max(found.length for found in self._drifts.values())
        warm = {key: value for key, value in measured.values.items() if len(record.series[key].values) > self.warmup}
        if warm and record.keep_if_better(epoch, warm, self.monitor_weights):
            self.best_score = torch.tensor(next(iter(warm.values())))
            if self.restore_best_weights:
                self._best_weights = copy_of_weights(pl_module)

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        """Answer EarlyStopping whether to stop, and why."""
        was_drifting = self._drifting
        self._drifting = drifted_together(self._drifts, self.monitor_weights, self.combine)
        if not self._drifting:
            return False, None
        reason = messages.reason(self._record, self._drifts)
        if self.action == "stop":
            self.stopping_reason = EarlyStoppingReason.PATIENCE_EXHAUSTED
            return True, f"RobustnessDriftStopping stops: {reason}"
        if not was_drifting:
            self._warnings.warn(f"RobustnessDriftStopping warns: {reason} Training goes on.")
        return False, None
