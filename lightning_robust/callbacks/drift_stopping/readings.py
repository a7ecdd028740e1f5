"""What one validation has logged for the keys that a drift stopper follows."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_robust.callbacks.drift_stopping import messages
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
    known: Collection[str],
    mode: str | None,
    strict: bool,
    tolerance: float,
    accuracy_key: str | None,
) -> Readings:
    """Read the callback metrics at the end of a validation.

    Args:
        trainer: The Trainer.
        keys: Keys that are followed.
        old: Callback metrics from before the validation.
        known: Keys that have been logged before; they may be missing in the first validations of a resumed run.
        mode: The user's direction, for keys whose metric does not have one. If all metrics have one, it must agree.
        strict: Whether a missing key is an error once all keys should have been logged.
        tolerance: Relative change that does not matter.
        accuracy_key: Key of clean accuracy, if already known.
    """
    logged, readings = trainer.callback_metrics, Readings()
    # Lightning keeps the values of earlier validations. A value that is logged again is another tensor.
    new = {key: value for key, value in logged.items() if value is not old.get(key)}
    owners = {key: owner_of(trainer, key) for key in keys}
    for_others = None in owners.values()
    for key, owner in owners.items():
        if key not in logged:
            if strict and key not in known and not _comes_later(owner, key):
                measured = owner is not None
                readings.error = readings.error or messages.unknown(key, logged, measured=measured)
        elif key not in new:
            continue
        elif not math.isfinite(new[key]):
            readings.not_finite.append(key)
        else:
            stderr = float(new.get(f"{key}_stderr", math.nan))
            readings.values[key] = float(new[key])
            readings.stderrs[key] = stderr if math.isfinite(stderr) else 0.0
            higher_is_better, error = _direction(trainer, owner, key, mode, for_others=for_others)
            readings.higher_is_better[key] = higher_is_better
            readings.error = readings.error or error
            if owner is not None and key in owner.per_sample and owner.per_sample[key].isfinite().all():
                readings.per_sample[key] = owner.per_sample[key]
            if owner is not None and key in owner.best_untrained:
                readings.best_untrained.append(key)
    if readings.error is None and tolerance >= 1 and any(readings.higher_is_better.values()):
        readings.error = messages.endless_tolerance(tolerance)
    if accuracy_key is None:
        prefixes = [monitor.log_key_prefix for monitor in monitors_of(trainer)]
        accuracy_key = clean_accuracy_key((key for key in logged if key not in owners), prefixes=prefixes)
    if accuracy_key in new:
        readings.accuracy = accuracy_key, float(new[accuracy_key])
    return readings


def _comes_later(owner: RobustnessMonitor | None, key: str) -> bool:
    """Whether a missing key belongs to a monitor that has not measured everything yet."""
    return owner is not None and (owner.incomplete or not owner.directions or key in owner.directions)


def _direction(
    trainer: Trainer, owner: RobustnessMonitor | None, key: str, mode: str | None, *, for_others: bool
) -> tuple[bool, str | None]:
    """Whether higher values of a key are better, and an error if that is unknown or contradicts ``mode``."""
    known = None if owner is None else owner.directions.get(key)
    if known is None:
        return mode == "max", no_direction(trainer, key) if mode is None else None
    if not for_others and mode is not None and known != (mode == "max"):
        return known, messages.contradiction(key, mode, higher_is_better=known)
    return known, None


def no_direction(trainer: Trainer, key: str) -> str:
    """Error for a key whose direction is unknown."""
    return messages.no_direction(key, prefixes=[monitor.log_key_prefix for monitor in monitors_of(trainer)])


def owner_of(trainer: Trainer, key: str) -> RobustnessMonitor | None:
    """The monitor that logs a key. If several prefixes fit, the longest one decides."""
    owners = [monitor for monitor in monitors_of(trainer) if key.startswith(monitor.log_key_prefix)]
    return max(owners, key=lambda monitor: len(monitor.log_key_prefix), default=None)
