"""What a drift stopper has seen: one series per key, and the best measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Series:
    """The measurements of one key.

    Attributes:
        higher_is_better: Its direction.
        epochs: In which it was measured.
        values: What was measured.
        stderrs: Standard errors, 0 where none was logged.
        accuracies: Clean accuracy beside them, NaN where it is not known, for the words of a warning.
        per_sample: What was found on each sample, (N,), None where that is not known.
    """

    higher_is_better: bool
    epochs: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    stderrs: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    per_sample: list[Tensor | None] = field(default_factory=list)

    def improvement(self, value: float, than: float) -> float:
        """By how much a value is better than another, relative to that."""
        gain = (value - than) if self.higher_is_better else (than - value)
        return gain / abs(than) if than else gain * float("inf") if gain else 0.0


@dataclass
class Record:
    """All series, and the best measurement so far.

    Attributes:
        series: By key.
        best: Values of the best measurement, by key.
        best_epoch: When it was made.
        best_is_latest: Whether none has been made since.
        accuracy_key: As what clean accuracy is logged.
    """

    series: dict[str, Series] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_epoch: int | None = None
    best_is_latest: bool = False
    accuracy_key: str | None = None

    def keep_if_better(self, epoch: int, values: Mapping[str, float], weights: Mapping[str, float]) -> bool:
        """Keep a measurement as the best if the weighted mean of the relative changes from the best so far is positive.

        A key that has never been measured before has not changed, nor has one that is missing.
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

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Record:
        """The record with that state."""
        series = {key: Series(**values) for key, values in state["series"].items()}
        return cls(**{**state, "series": series})
