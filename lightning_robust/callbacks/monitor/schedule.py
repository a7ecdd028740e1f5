"""When the monitor measures: every n epochs, within a budget of time."""

from __future__ import annotations

import gc
from typing import Any

from lightning_robust.callbacks.monitor.overhead import Overhead, Times
from lightning_robust.callbacks.monitor.status import synchronised


class Schedule:
    """The cadence and the budget of one run.

    Args:
        every_n_epochs: Epochs from one measurement to the next.
        budget: Share of the wall time that measuring may take; None for any.

    Attributes:
        overhead: The clocks.
        last_epoch: Epoch of the last measurement in ``fit``.
        share: Share of the time spent measuring so far, if the budget has left out the measurement that was due; else
            None.
    """

    def __init__(self, every_n_epochs: int, budget: float | None) -> None:
        self._every_n_epochs = every_n_epochs
        self._budget = budget
        self.overhead = Overhead()
        self.last_epoch: int | None = None
        self.share: float | None = None

    def is_due(self, epoch: int) -> bool:
        """Whether enough epochs of ``fit`` have passed."""
        return self.last_epoch is None or epoch <= self.last_epoch or epoch - self.last_epoch >= self._every_n_epochs

    def is_affordable(self) -> bool:
        """Whether the budget lasts for one more measurement. Under a budget, every process must call this."""
        if self._budget is None:
            return True
        times = Times.largest(synchronised(self.overhead.times))
        if times.nothing_measured:
            # Collect the many objects of the start-up now. Within the first measurement, this would take as long as a
            # small measurement and count as the cost of the next.
            gc.collect()
        if times.affords(self._budget):
            self.overhead.made += 1
            return True
        self.overhead.left_out += 1
        self.share = times.share
        return False

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"last_epoch": self.last_epoch, "times": self.overhead.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.last_epoch = state_dict.get("last_epoch")
        self.overhead.load_state_dict(state_dict.get("times", {}))
