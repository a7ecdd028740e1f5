"""What measuring costs: its share of a run's wall time, and when the next measurement fits a budget.

A measurement is made if the share would be within the budget after it, were it to cost what the last one did:

    (spent + cost) / (elapsed + cost) ≤ budget.

The first one is always made, because nothing is known without it. Processes have their own clocks and must decide
alike, so the largest of their times counts on all of them.

Source: ours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from lightning_robust.functional._validation.arguments import as_number, expected_but_got


class Times(NamedTuple):
    """Seconds of wall time of one process, or the largest of all.

    Attributes:
        elapsed: Since the beginning of the run, including the time before it was resumed.
        spent: The part of it that went into measuring.
        cost: The part that went into the last measurement; 0 before the first.
    """

    elapsed: float = 0.0
    spent: float = 0.0
    cost: float = 0.0

    @classmethod
    def largest(cls, parts: Sequence[Times]) -> Times:
        """The largest of each over all processes."""
        return cls(*map(max, zip(*parts, strict=True)))

    @property
    def nothing_measured(self) -> bool:
        """Whether the cost of a measurement is still unknown."""
        return self.cost == 0

    @property
    def share(self) -> float:
        """Share of the wall time that was spent on measuring."""
        return self.spent / self.elapsed if self.elapsed else 0.0

    def affords(self, budget: float) -> bool:
        """Whether the share would be within a budget after one more measurement."""
        return self.nothing_measured or self.spent + self.cost <= budget * (self.elapsed + self.cost)


class Overhead:
    """The clocks of one process.

    Attributes:
        made: Measurements made under a budget.
        left_out: Measurements that the budget left out.
    """

    def __init__(self) -> None:
        self._begun: float | None = None
        self._before = 0.0  # seconds of the run before it was resumed
        self._spent = self._cost = 0.0
        self._counting_since: float | None = None
        self.made = self.left_out = 0

    def begin(self) -> None:
        """Start the clock of a run."""
        self._begun = time.perf_counter()

    def end(self) -> None:
        """Stop it."""
        self._before, self._spent, self._cost = self.times
        self._begun = None

    def begin_measurement(self) -> None:
        """Start to count the cost of one measurement, if the clock runs."""
        self._cost = self._cost if self._begun is None else 0.0

    @contextmanager
    def counted(self, *, as_cost: bool = True) -> Iterator[None]:
        """Count the time inside as spent on measuring, and as part of one measurement's cost, while the clock runs."""
        if self._begun is None:
            yield
            return
        self._counting_since = time.perf_counter()
        try:
            yield
        finally:
            _, self._spent, cost = self.times
            self._cost = cost if as_cost else self._cost
            self._counting_since = None

    @property
    def times(self) -> Times:
        """What the clocks show."""
        now = time.perf_counter()
        running = 0.0 if self._begun is None else now - self._begun
        counting = 0.0 if self._counting_since is None else now - self._counting_since
        return Times(self._before + running, self._spent + counting, self._cost + counting)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return self.times._asdict() | {"made": self.made, "left_out": self.left_out}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on counting from there."""
        state = dict(state_dict)
        self.made, self.left_out = state.pop("made", 0), state.pop("left_out", 0)
        self._before, self._spent, self._cost = Times(**state)


def check_budget(budget: float | None) -> float | None:
    """Return a budget as a float, or raise a ``ValueError`` unless it is a share or None."""
    if budget is None:
        return None
    if not 0 < as_number(budget) <= 1:
        raise ValueError(
            expected_but_got("overhead_budget", "a share of the wall time above 0 and at most 1, or None", budget)
        )
    return as_number(budget)
