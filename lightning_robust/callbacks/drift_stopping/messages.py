"""What a drift stopper says, in plain words."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping

from lightning_robust.callbacks.drift_stopping.record import Record, Series
from lightning_robust.functional.drift.rule import Drift

_CLEAN_ACCURACY = re.compile(r"(?:^|[_/])val\w*[_/](?:\w*_)?acc(?:uracy)?(?:/dataloader_idx_0)?$", re.IGNORECASE)
_OTHER_ACCURACY = re.compile(r"adv|attack|pgd|fgsm|robust|noise|corrupt", re.IGNORECASE)
_DETAIL = re.compile(r"_(?:stderr|lower|upper|stderr_probes)$")


def reason(record: Record, drifts: Mapping[str, Drift]) -> str:
    """Why a run is stopped: each key that has drifted, and what became of clean accuracy meanwhile."""
    said = [_of_key(key, drift, record.series[key]) for key, drift in drifts.items() if drift.drifted]
    changes = [
        series.accuracies[-1] - series.accuracies[drift.best]
        for series, drift in ((record.series[key], drift) for key, drift in drifts.items())
        if drift.drifted and drift.best is not None
    ]
    known = [change for change in changes if math.isfinite(change)]
    return "; ".join([*said, *(_of_accuracy(record.accuracy_key, 100 * change) for change in known[:1])]) + "."


def _of_key(key: str, drift: Drift, series: Series) -> str:
    verb, side = ("fell", "below") if series.higher_is_better else ("rose", "above")
    by = abs(drift.reference - drift.mean)
    amount = f"{100 * by:.1f} points" if _is_accuracy(key, drift) else f"{100 * by / abs(drift.reference or 1):.1f} %"
    if drift.best is None:
        than, change = f"its reference {drift.reference:.4g}", f"{drift.mean:#.4g}"
    else:
        than = f"its best at epoch {series.epochs[drift.best]}"
        change = f"{drift.reference:#.4g} to {drift.mean:#.4g}"
    over = f"1 measurement ({change})" if drift.length == 1 else f"{drift.length} measurements (on average {change})"
    return f"{key} {verb} {amount} {side} {than} over {over}"


def _is_accuracy(key: str, drift: Drift) -> bool:
    return "acc" in key.lower() and 0 <= drift.reference <= 1


def _of_accuracy(key: str | None, points: float) -> str:
    verb = "stayed" if abs(points) < 0.05 else "rose" if points > 0 else "fell"
    amount = "" if verb == "stayed" else f" {abs(points):.1f} points"
    return f"clean accuracy {verb}{amount} ({key})"


def clean_accuracy(keys: Iterable[str], *, prefixes: Iterable[str]) -> str | None:
    """The key of clean accuracy: on the measured samples if it is logged, else one of the user's own."""
    keys = list(keys)
    for prefix in prefixes:
        ours = [key for key in keys if re.fullmatch(rf"{re.escape(prefix)}linearized_accuracy_[^_]+_0", key)]
        if ours:
            return ours[0]
    theirs = [key for key in keys if _CLEAN_ACCURACY.search(key) and not _OTHER_ACCURACY.search(key)]
    return min(theirs, key=len, default=None)


def unknown(key: str, keys: Iterable[str], *, measured: bool) -> str:
    """A key is not logged, but these are."""
    available = sorted(other for other in keys if not _DETAIL.search(other))
    close = difflib.get_close_matches(key, available, n=1)
    meant = f" Did you mean `{close[0]}`?" if close else ""
    later = "" if measured else " If it is logged later in the run, pass `strict=False`."
    return (
        f"RobustnessDriftStopping follows `{key}`, which is not logged.{meant}{later} Available:"
        f" {', '.join(f'`{other}`' for other in available) or 'nothing'}."
    )


def no_direction(key: str, *, prefixes: list[str]) -> str:
    """It is not known whether high values of a key are good."""
    if prefixes:
        why = (
            f"the RobustnessMonitor of this Trainer logs under {' and '.join(map(repr, prefixes))}, and does not log it"
        )
    else:
        why = "there is no RobustnessMonitor in this Trainer"
    return (
        f"RobustnessDriftStopping does not know whether high values of `{key}` are good: {why}. Pass `mode='max'` or"
        " `mode='min'` if you log it yourself in validation."
    )


def endless_tolerance(tolerance: float) -> str:
    """No fall is as large as what is tolerated."""
    return (
        "Expected argument `tolerance` to be a share of the best value, below 1 where high values are good, but got"
        f" {tolerance:g}, so that nothing is a drift."
    )


def best_untrained(key: str) -> str:
    """The best value of a quantity is that of an untrained network."""
    return (
        f"RobustnessDriftStopping follows `{key}`, which is best in a network that has learnt nothing, and takes what"
        " rises with learning for a drift. `warmup` leaves out the first measurements."
    )


def no_best_weights(epoch: int) -> str:
    """The weights of the best measurement were made in a run that did not keep them."""
    return (
        f"RobustnessDriftStopping cannot put back the weights of epoch {epoch}: the run that was resumed did not keep"
        " them. Those of the last epoch stay."
    )


def contradiction(key: str, mode: str, *, higher_is_better: bool) -> str:
    """The user's direction is not that of the metric."""
    return (
        f"Expected argument `mode` to be None or {'max' if higher_is_better else 'min'!r} for `{key}`, of which"
        f" {'higher' if higher_is_better else 'lower'} values are better, but got {mode!r}."
    )


def could_not_stop(counts: Mapping[str, int], *, least: int) -> str:
    """A run has ended with too few measurements to stop it."""
    seen = ", ".join(
        f"`{key}` was {'never logged in a validation' if not count else 'measured once' if count == 1 else many}"
        for key, count, many in ((key, count, f"measured {count} times") for key, count in counts.items())
    )
    return (
        f"RobustnessDriftStopping could not have stopped this run: {seen}, and it takes {least} measurements. Measure"
        " more often (the monitor's `every_n_epochs` and `overhead_budget`, the Trainer's `check_val_every_n_epoch`),"
        " or lower `patience` or `warmup`."
    )
