"""What a drift stopper has recorded: one series per key, and the best measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Series:
    """The measurements of one key.

    Attributes:
        higher_is_better: Direction of the key.
        epochs: Epoch of each measurement.
        values: Measured values.
        stderrs: Standard errors, 0 where none was logged.
        accuracies: Clean accuracy logged in the same validation, NaN where unknown; used in messages only.
        per_sample: Value on each sample, (N,), None where unknown.
    """

    higher_is_better: bool
    epochs: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    stderrs: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    per_sample: list[Tensor | None] = field(default_factory=list)

    def add(self, epoch: int, value: float, stderr: float, accuracy: float, per_sample: Tensor | None) -> None:
        """Add a measurement."""
        self.epochs.append(epoch)
        self.values.append(value)
        self.stderrs.append(stderr)
        self.accuracies.append(accuracy)
        self.per_sample.append(per_sample)

    def improvement(self, value: float, than: float) -> float:
        """Improvement of ``value`` over ``than``, relative to ``than``; negative if it is worse."""
        gain = (value - than) if self.higher_is_better else (than - value)
        return gain / abs(than) if than else gain * float("inf") if gain else 0.0


@dataclass
class Record:
    """All series, and the best measurement so far.

    Attributes:
        series: Series by key.
        best: Values of the best measurement by key. A key that was missing in it has an earlier or later value.
        best_epoch: Epoch of the best measurement.
        best_is_latest: Whether the latest measurement is the best.
        accuracy_key: Key under which clean accuracy is logged.
    """

    series: dict[str, Series] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_epoch: int | None = None
    best_is_latest: bool = False
    accuracy_key: str | None = None

    def keep_if_better(self, epoch: int, values: Mapping[str, float], weights: Mapping[str, float]) -> bool:
        """Keep a measurement as the best if the weighted mean of the relative improvements of its keys is positive.

        A key that is missing, or is measured for the first time, counts as unchanged.
        """
        changes = [
            weights[key] * self.series[key].improvement(value, self.best[key])
            for key, value in values.items()
            if key in self.best
        ]
        better = not self.best or sum(changes) > 0
        self.best_is_latest = better
        if better:
            self.best_epoch = epoch
        self.best = {**self.best, **values} if better else {**values, **self.best}
        return better

    def index_of_best(self, key: str) -> int | None:
        """Index of the best measurement in the series of a key; None if the key was missing in it."""
        series = self.series[key]
        found = zip(series.epochs, series.values, strict=True)
        return next((i for i, pair in enumerate(found) if pair == (self.best_epoch, self.best.get(key))), None)

    def state_dict(self) -> dict[str, Any]:
        """Return dictionaries, lists, numbers and tensors, which ``torch.load(weights_only=True)`` accepts."""
        return asdict(self)

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Record:
        """Rebuild a record from its state."""
        series = {key: Series(**values) for key, values in state["series"].items()}
        return cls(**{**state, "series": series})
