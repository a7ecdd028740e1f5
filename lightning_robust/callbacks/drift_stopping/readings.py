"""What one validation has logged of the keys that a drift stopper follows."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_robust.callbacks.drift_stopping import messages
from lightning_robust.callbacks.monitor.callback import RobustnessMonitor, monitors_of


@dataclass
class Readings:
    """Those that are new and finite.

    Attributes:
        values: By key.
        stderrs: Their standard errors, likewise, 0 where none is logged.
        per_sample: What was found on each sample, likewise, of those of which it is known.
        higher_is_better: Their directions, likewise.
        not_finite: Keys that were new, but not finite.
        best_untrained: Keys whose best values are those of a network that has learnt nothing.
        accuracy: Key of clean accuracy, and its value, if there is a new one.
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
    """Read the callback metrics.

    Args:
        trainer: At the end of a validation.
        keys: Which are followed.
        old: What stood there when the validation began. Lightning keeps the values of earlier validations; those
            logged anew are other tensors.
        known: Keys that have been logged before; a resumed run may log them later.
        mode: The user's, for keys of which nothing else is known. If there are none of that kind, it must fit the
            others.
        strict: Whether it is an error if a key is missing although everything has been logged that will be.
        tolerance: Relative change that does not matter.
        accuracy_key: That of clean accuracy, where it is known from before.
    """
    logged, readings = trainer.callback_metrics, Readings()
    owners = {key: owner_of(trainer, key) for key in keys}
    for_others = None in owners.values()
    for key, owner in owners.items():
        value = logged.get(key)
        if value is None:
            if strict and key not in known and not _comes_later(owner, key):
                measured = owner is not None
                readings.error = readings.error or messages.unknown(key, logged, measured=measured)
        elif value is old.get(key):
            continue
        elif not math.isfinite(value):
            readings.not_finite.append(key)
        else:
            stderr = logged.get(f"{key}_stderr")
            new = stderr is not None and stderr is not old.get(f"{key}_stderr") and math.isfinite(stderr)
            readings.values[key] = float(value)
            readings.stderrs[key] = float(stderr) if stderr is not None and new else 0.0
            higher_is_better, error = _direction(trainer, owner, key, mode, for_others=for_others)
            readings.higher_is_better[key] = higher_is_better
            readings.error = readings.error or error
            if owner is not None and key in owner.per_sample and owner.per_sample[key].isfinite().all():
                readings.per_sample[key] = owner.per_sample[key]
            if owner is not None and key in owner.best_untrained:
                readings.best_untrained.append(key)
    if readings.error is None and tolerance >= 1 and any(readings.higher_is_better.values()):
        readings.error = messages.endless_tolerance(tolerance)
    prefixes = [monitor.log_key_prefix for monitor in monitors_of(trainer)]
    candidates = [key for key in logged if key not in owners]
    accuracy_key = accuracy_key or messages.clean_accuracy(candidates, prefixes=prefixes)
    if accuracy_key in logged and logged[accuracy_key] is not old.get(accuracy_key):
        readings.accuracy = accuracy_key, float(logged[accuracy_key])
    return readings


def _comes_later(owner: RobustnessMonitor | None, key: str) -> bool:
    """Whether a key that has not been logged belongs to a monitor that has not measured everything yet."""
    return owner is not None and (owner.incomplete or not owner.directions or key in owner.directions)


def _direction(
    trainer: Trainer, owner: RobustnessMonitor | None, key: str, mode: str | None, *, for_others: bool
) -> tuple[bool, str | None]:
    """Whether higher values are better, and what is wrong if that is not known."""
    known = None if owner is None else owner.directions.get(key)
    if known is None:
        return mode == "max", no_direction(trainer, key) if mode is None else None
    if not for_others and mode is not None and known != (mode == "max"):
        return known, messages.contradiction(key, mode, higher_is_better=known)
    return known, None


def no_direction(trainer: Trainer, key: str) -> str:
    """It is not known whether high values of a key are good."""
    return messages.no_direction(key, prefixes=[monitor.log_key_prefix for monitor in monitors_of(trainer)])


def owner_of(trainer: Trainer, key: str) -> RobustnessMonitor | None:
    """The monitor that logs a key: with several, the one with the longest prefix that fits."""
    owners = [monitor for monitor in monitors_of(trainer) if key.startswith(monitor.log_key_prefix)]
    return max(owners, key=lambda monitor: len(monitor.log_key_prefix), default=None)
