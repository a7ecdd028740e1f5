"""What a drift stopper tells the user: reasons, warnings and errors."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence

from lightning_robust.callbacks.drift_stopping.record import Record, Series
from lightning_robust.functional.drift.rule import Drift
from lightning_robust.metrics.keys import is_accuracy, is_error_bar

# ---- reports ---------------------------------------------------------------------------------------------------------


def reason(record: Record, drifts: Mapping[str, Drift]) -> str:
    """Why a run is stopped: each key that has drifted, and the change of clean accuracy since the best measurement."""
    drifted = {key: drift for key, drift in drifts.items() if drift.drifted}
    said = [_of_key(key, drift, record.series[key]) for key, drift in drifted.items()]
    accuracies = _accuracies(record, {key: drift.best for key, drift in drifted.items()})
    if accuracies is not None:
        points = accuracies[1] - accuracies[0]
        verb = "rose" if points > 0 else "fell"
        change = "stayed" if abs(points) < 0.05 else f"{verb} {abs(points):.1f} points"
        said.append(f"clean accuracy {change} ({record.accuracy_key})")
    return "; ".join(said) + "."


def _of_key(key: str, drift: Drift, series: Series) -> str:
    verb, side = ("fell", "below") if series.higher_is_better else ("rose", "above")
    by = abs(drift.reference - drift.mean)
    in_points = is_accuracy(key) and 0 <= drift.reference <= 1
    amount = f"{100 * by:.1f} points" if in_points else f"{100 * by / abs(drift.reference or 1):.1f} %"
    if drift.best is None:
        than, change = f"its reference {drift.reference:.4g}", f"{drift.mean:#.4g}"
    else:
        than = f"its best at epoch {series.epochs[drift.best]}"
        change = f"{drift.reference:#.4g} to {drift.mean:#.4g}"
    over = f"1 measurement ({change})" if drift.length == 1 else f"{drift.length} measurements (on average {change})"
    return f"{key} {verb} {amount} {side} {than} over {over}"


def _accuracies(record: Record, best: Mapping[str, int | None]) -> tuple[float, float] | None:
    """Clean accuracy in percent at the best measurement, given by its index in each series, and at the last one."""
    for key, index in best.items():
        accuracies = record.series[key].accuracies
        pair = (math.nan, math.nan) if index is None else (accuracies[index], accuracies[-1])
        if all(map(math.isfinite, pair)):
            return pair if max(pair) > 1 else (100 * pair[0], 100 * pair[1])
    return None


def put_back(record: Record) -> str:
    """Which weights were put back, and what that gains and costs compared with the last measurement."""
    best = {key: index for key in record.series if (index := record.index_of_best(key)) is not None}
    said = [
        f"{key} {series.values[best[key]]:#.4g} instead of {series.values[-1]:#.4g} at epoch {series.epochs[-1]}"
        for key, series in record.series.items()
        if key in best
    ]
    advice, accuracies = "", _accuracies(record, best)
    if accuracies is not None:
        before, after = (f"{accuracy:.1f} %" for accuracy in accuracies)
        change = f"still {before}" if before == after else f"{before} instead of {after}"
        said.append(f"clean accuracy {change} ({record.accuracy_key})")
        if before != after and accuracies[0] < accuracies[1]:
            advice = " To keep the last weights, pass `restore_best_weights=False`."
    changes = f": {', '.join(said)}" if said else ""
    return f"RobustnessDriftStopping put back the weights of epoch {record.best_epoch}{changes}.{advice}"


# ---- warnings --------------------------------------------------------------------------------------------------------


def not_finite(key: str) -> str:
    """A followed key was logged with NaN or infinity."""
    return (
        f"RobustnessDriftStopping skips values of `{key}` that are not finite: they count neither as best nor as drift."
    )


def best_untrained(key: str) -> str:
    """A followed key is best at initialisation, and no measurement is left out."""
    return (
        f"RobustnessDriftStopping follows `{key}`, which is best at initialisation and gets worse while the network"
        " learns. That counts as drift and may stop the run too early. Skip the first measurements, e.g. with"
        " `warmup=10`."
    )


def no_best_weights(epoch: int) -> str:
    """The checkpoint of a resumed run holds no best weights."""
    return (
        f"RobustnessDriftStopping cannot put back the weights of epoch {epoch}: the run that was resumed did not keep"
        " them. The module has the weights of the last epoch. To keep the best ones, pass `restore_best_weights=True`"
        " from the first run on."
    )


def other_structure(record: Record, reason: str) -> str:
    """The network is no longer the one whose weights were kept."""
    key, series = next(iter(record.series.items()))
    mode = "max" if series.higher_is_better else "min"
    return (
        f"RobustnessDriftStopping did not put back the weights of epoch {record.best_epoch}: the network has changed"
        f" since then ({reason}). The module has the weights of the last epoch. To keep the best ones in a file, add"
        f" `ModelCheckpoint(monitor={key!r}, mode={mode!r})`."
    )


def could_not_stop(counts: Mapping[str, int], *, least: int, remedy: str) -> str:
    """A run ended with too few measurements to stop it; :func:`more_measurements` makes the remedy."""
    times = {0: "never logged in a validation", 1: "measured once"}
    seen = ", ".join(f"`{key}` was {times.get(count, f'measured {count} times')}" for key, count in counts.items())
    return (
        f"RobustnessDriftStopping could not have stopped this run: {seen}, but a drift takes at least {least}"
        f" measurements. {remedy}"
    )


def more_measurements(*, every_n_epochs: int, has_budget: bool, check_val_every_n_epoch: int | None) -> str:
    """What would have given more measurements of keys that were measured."""
    ways = []
    if every_n_epochs > 1:
        ways.append(f"a smaller `every_n_epochs` than {every_n_epochs} in the RobustnessMonitor")
    if has_budget:
        ways.append("a larger `overhead_budget` in the RobustnessMonitor")
    if (check_val_every_n_epoch or 1) > 1:
        ways.append(f"a smaller `check_val_every_n_epoch` than {check_val_every_n_epoch} in the Trainer")
    often = f"Measure more often ({', '.join(ways)}), train" if ways else "Train"
    return f"{often} for more epochs, or lower `patience` or `warmup`."


NOTHING_MEASURED = "RobustnessMonitor measured nothing in this run; its own warning says why."


def never_logged(key: str) -> str:
    """How to log a key of the user's own."""
    return f"Log it there, e.g. `self.log({key!r}, value)` in `validation_step`."


# ---- errors ----------------------------------------------------------------------------------------------------------


def unknown(key: str, keys: Iterable[str], *, measured: bool) -> str:
    """A followed key is not logged; names the keys that are."""
    available = sorted(other for other in keys if not is_error_bar(other))
    close = difflib.get_close_matches(key, available, n=1)
    meant = f" Did you mean `{close[0]}`?" if close else ""
    later = "" if measured else " If it is logged later in the run, pass `strict=False`."
    return (
        f"RobustnessDriftStopping follows `{key}`, which is not logged.{meant}{later} Available:"
        f" {', '.join(f'`{other}`' for other in available) or 'nothing'}."
    )


def no_direction(key: str, *, prefixes: Sequence[str], measured: bool = False) -> str:
    """Nothing tells whether high values of a key are good, be it ``measured`` or not."""
    if measured:
        return (
            f"RobustnessDriftStopping does not know whether high values of `{key}` are good: its metric says that"
            " neither direction is better. To follow it all the same, pass `mode='max'` or `mode='min'`."
        )
    if prefixes:
        why = f"the RobustnessMonitor of this Trainer logs under {' and '.join(map(repr, prefixes))}, but not this key"
    else:
        why = "there is no RobustnessMonitor in this Trainer"
    return (
        f"RobustnessDriftStopping does not know whether high values of `{key}` are good: {why}. If you log it yourself"
        " in validation, pass `mode='max'` or `mode='min'`."
    )


def contradiction(key: str, mode: str | None, *, higher_is_better: bool) -> str:
    """The user's direction is not that of the metric."""
    return (
        f"Expected argument `mode` to be None or {'max' if higher_is_better else 'min'!r} for `{key}`, whose"
        f" {'higher' if higher_is_better else 'lower'} values are better, but got {mode!r}."
    )


def endless_tolerance(tolerance: float) -> str:
    """No fall can exceed the tolerance."""
    return (
        "Expected argument `tolerance` to be a share of the best value, below 1 where high values are good, but got"
        f" {tolerance:g}, which no fall exceeds."
    )
