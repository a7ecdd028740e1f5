"""When the monitor measures: every n epochs, within a budget of time."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from lightning_robust.callbacks.monitor.overhead import Overhead, Times


class Schedule:
    """The cadence and the budget of one run.

    Args:
        every_n_epochs: Epochs from one measurement to the next.
        budget: Share of the wall time that measuring may take; None for any.

    Attributes:
        overhead: The clocks.
        last_epoch: Epoch of the last measurement in ``fit``.
        share: Share of the time spent measuring so far, after a measurement that the budget left out; else None.
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

    def is_affordable(self, largest: Callable[[Times], Times]) -> bool:
        """Whether the budget lasts for one more measurement.

        Args:
            largest: Finds the largest times over all processes, which must decide alike.
        """
        if self._budget is None:
            return True
        times = largest(self.overhead.times)
        if times.nothing_measured:
            # After the start-up's many objects a collection is due. It takes as long as a small measurement, and within
            # the first one it would count as the cost of the next.
            gc.collect()
        if times.affords(self._budget):
            self.overhead.made += 1
            return True
        self.overhead.left_out += 1
        self.share = times.share
        return False

    def take_share(self) -> float | None:
        """The share to log in a validation without a measurement, once."""
        share, self.share = self.share, None
        return share

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"last_epoch": self.last_epoch, "times": self.overhead.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.last_epoch = state_dict.get("last_epoch")
        self.overhead.load_state_dict(state_dict.get("times", {}))
