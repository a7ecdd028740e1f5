"""What one validation has logged for the keys that a drift stopper follows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_robust.callbacks.drift_stopping import messages
from lightning_robust.callbacks.drift_stopping.record import Record
from lightning_robust.callbacks.monitor.callback import RobustnessMonitor, monitors_of
from lightning_robust.metrics.keys import clean_accuracy_key


@dataclass
class Readings:
    """New, finite values of one validation.

    Attributes:
        values: Value by key. The other mappings have entries for these keys only.
        stderrs: Standard errors, 0 where none is logged.
        per_sample: Value on each sample, (N,), where known.
        higher_is_better: Directions.
        not_finite: Keys with a new value that is not finite.
        best_untrained: Keys whose values are best at initialisation.
        accuracy: Key and value of clean accuracy, if a new value is logged.
        error: What is wrong with the keys, if anything is.
    """

    values: dict[str, float] = field(default_factory=dict)
    stderrs: dict[str, float] = field(default_factory=dict)
    per_sample: dict[str, Tensor] = field(default_factory=dict)
    higher_is_better: dict[str, bool] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    best_untrained: list[str] = field(default_factory=list)
    accuracy: tuple[str, float] | None = None
    error: str | None = None


def read(
    trainer: Trainer,
    keys: Iterable[str],
    *,
    old: Mapping[str, Tensor],
    record: Record,
    mode: str | None,
    strict: bool,
) -> Readings:
    """Read the callback metrics at the end of a validation.

    Args:
        trainer: Holds the metrics.
        keys: Keys that are followed.
        old: Callback metrics from before the validation.
        record: Earlier measurements. Their keys may be missing in the first validations of a resumed run.
        mode: The user's direction, for keys whose metric does not have one. If all metrics have one, it must agree.
        strict: Whether a missing key is an error once all keys should have been logged.
    """
    logged, readings = trainer.callback_metrics, Readings()
    # Lightning keeps the values of earlier validations. A value that is logged again is another tensor.
    new = {key: value for key, value in logged.items() if value is not old.get(key)}
    owners = {key: owner_of(trainer, key) for key in keys}
    check_mode = mode is not None and None not in owners.values()  # otherwise `mode` is for keys without an owner
    for key, owner in owners.items():
        if key not in logged:
            if strict and key not in record.series and not _comes_later(owner, key):
                readings.error = readings.error or messages.unknown(key, logged, measured=owner is not None)
        elif key not in new:
            continue
        elif not math.isfinite(new[key]):
            readings.not_finite.append(key)
        else:
            stderr = float(new.get(f"{key}_stderr", math.nan))
            readings.values[key] = float(new[key])
            readings.stderrs[key] = stderr if math.isfinite(stderr) else 0.0
            known = None if owner is None else owner.directions.get(key)
            readings.higher_is_better[key] = mode == "max" if known is None else known
            if known is None and mode is None:
                readings.error = readings.error or no_direction(trainer, key)
            elif known is not None and check_mode and known != (mode == "max"):
                readings.error = readings.error or messages.contradiction(key, mode, higher_is_better=known)
            if owner is not None and key in owner.per_sample and owner.per_sample[key].isfinite().all():
                readings.per_sample[key] = owner.per_sample[key]
            if owner is not None and key in owner.best_untrained:
                readings.best_untrained.append(key)
    accuracy_key = record.accuracy_key
    if accuracy_key is None:
        prefixes = [monitor.log_key_prefix for monitor in monitors_of(trainer)]
        accuracy_key = clean_accuracy_key((key for key in logged if key not in owners), prefixes=prefixes)
    if accuracy_key in new:
        readings.accuracy = accuracy_key, float(new[accuracy_key])
    return readings


def _comes_later(owner: RobustnessMonitor | None, key: str) -> bool:
    """Whether a missing key belongs to a monitor that has not measured everything yet."""
    return owner is not None and (owner.incomplete or not owner.directions or key in owner.directions)


def remedy(trainer: Trainer, counts: Mapping[str, int]) -> str:
    """What to do about keys that were measured so many times, which was too few."""
    owners = {key: owner_of(trainer, key) for key in counts}
    monitors = [owner for owner in owners.values() if owner is not None]
    if any(owner.num_measurements == 0 and counts[key] == 0 for key, owner in owners.items() if owner is not None):
        return messages.NOTHING_MEASURED
    if missing := next((key for key, owner in owners.items() if owner is None and counts[key] == 0), None):
        return messages.never_logged(missing)
    return messages.more_measurements(
        every_n_epochs=max((owner.every_n_epochs for owner in monitors), default=1),
        has_budget=any(owner.overhead_budget is not None for owner in monitors),
        check_val_every_n_epoch=trainer.check_val_every_n_epoch,
    )


def no_direction(trainer: Trainer, key: str) -> str:
    """Error for a key whose direction is unknown."""
    owner, prefixes = owner_of(trainer, key), [monitor.log_key_prefix for monitor in monitors_of(trainer)]
    return messages.no_direction(key, prefixes=prefixes, measured=owner is not None and key in owner.directions)


def owner_of(trainer: Trainer, key: str) -> RobustnessMonitor | None:
    """The monitor that logs a key. If several prefixes fit, the longest one decides."""
    owners = [monitor for monitor in monitors_of(trainer) if key.startswith(monitor.log_key_prefix)]
    return max(owners, key=lambda monitor: len(monitor.log_key_prefix), default=None)
