"""What a drift stopper says, in plain words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from lightning_robust.callbacks.drift_record import Record, Series
from lightning_robust.functional.drift import Drift

_DETAIL = re.compile(r"_(?:stderr|lower|upper|stderr_probes)$")


def reason(record: Record, drifts: Mapping[str, Drift]) -> str:
    """Why a run is stopped: each key that has drifted, and what became of clean accuracy meanwhile."""
    said = [_of_key(key, drift, record.series[key]) for key, drift in drifts.items() if drift.drifted]
    bests = {key: drift.best for key, drift in drifts.items() if drift.drifted and drift.best is not None}
    since = [record.series[key].epochs[best] for key, best in bests.items()]
    return "; ".join([*said, *_of_accuracy(record, since=min(since, default=None))]) + "."


def _of_key(key: str, drift: Drift, series: Series) -> str:
    verb, side = ("fell", "below") if series.higher_is_better else ("rose", "above")
    by = abs(drift.reference - drift.mean)
    amount = f"{100 * by:.1f} points" if _is_accuracy(key, drift) else f"{100 * by / abs(drift.reference or 1):.1f} %"
    if drift.best is None:
        than = f"its reference {drift.reference:.4g}"
    else:
        than = f"its best at epoch {series.epochs[drift.best]}"
    count = "1 measurement" if drift.length == 1 else f"{drift.length} measurements"
    return f"{key} {verb} {amount} {side} {than} over {count} ({drift.reference:.4g} to {drift.mean:.4g})"


def _is_accuracy(key: str, drift: Drift) -> bool:
    return "acc" in key.lower() and 0 <= drift.reference <= 1


def _of_accuracy(record: Record, *, since: int | None) -> list[str]:
    epochs = list(record.accuracy)
    if since not in record.accuracy or len(epochs) < 2:
        return []
    change = 100 * (record.accuracy[epochs[-1]] - record.accuracy[since])
    verb = "stayed" if abs(change) < 0.05 else "rose" if change > 0 else "fell"
    return [
        f"clean accuracy {verb}"
        + ("" if verb == "stayed" else f" {abs(change):.1f} points")
        + f" ({record.accuracy_key})"
    ]


def clean_accuracy(keys: Iterable[str], *, prefixes: Iterable[str]) -> str | None:
    """The key of clean accuracy: on the measured samples if it is logged, else one of the user's own."""
    keys = list(keys)
    for prefix in prefixes:
        ours = [key for key in keys if re.fullmatch(rf"{re.escape(prefix)}linearized_accuracy_[^_]+_0", key)]
        if ours:
            return ours[0]
    return next((key for key in keys if re.search(r"(?:^|[_/])val\w*[_/](?:\w*_)?acc(?:uracy)?$", key)), None)


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


def no_direction(key: str) -> str:
    """It is not known whether high values of a key are good."""
    return (
        f"RobustnessDriftStopping needs `mode='max'` or `mode='min'` for `{key}`: it is known without only of keys that"
        " metrics of a RobustnessMonitor in the same Trainer log."
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
        f"`{key}` was {'never measured' if count == 0 else f'measured {count} times' if count > 1 else 'measured once'}"
        for key, count in counts.items()
    )
    return (
        f"RobustnessDriftStopping could not have stopped this run: {seen}, and it takes {least} measurements. Measure"
        " more often (the monitor's `every_n_epochs` and `overhead_budget`, the Trainer's `check_val_every_n_epoch`),"
        " or lower `patience` or `warmup`."
    )
