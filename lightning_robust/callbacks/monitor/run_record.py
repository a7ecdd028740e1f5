"""What happened in a run: what was measured, and which failures were explained, so that each is explained once."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass
class Failures:
    """Failures that have one cause.

    Attributes:
        what: The metric that could not be measured; None for all of them.
        first_epoch: Epoch in which it was explained.
        again: How often it came afterwards.
    """

    what: str | None
    first_epoch: int
    again: int = 0


@dataclass
class RunRecord:
    """What happened in a run.

    Attributes:
        first_epoch: Epoch in which the run began or was resumed.
        first_step: Step in which it did.
        validations: Validations of the run, without the sanity check.
        begun: Measurements that began.
        measured: Measurements with at least one value.
        impossible: Whether an obstacle to all measurements was explained.
        failures: By cause.
        not_finite: Keys whose values were not finite at least once.
        explained: Keys whose values were explained by a caveat.
    """

    first_epoch: int = 0
    first_step: int = 0
    validations: int = 0
    begun: int = 0
    measured: int = 0
    impossible: bool = False
    failures: dict[Hashable, Failures] = field(default_factory=dict)
    not_finite: set[str] = field(default_factory=set)
    explained: set[str] = field(default_factory=set)

    def is_new(self, number: int, what: str | None, message: str, *, epoch: int) -> bool:
        """Count the failure of a metric, by its index; whether the cause is new.

        Messages that differ in nothing but numbers have one cause.
        """
        cause = number, _NUMBER.sub("#", message)
        if cause in self.failures:
            self.failures[cause].again += 1
            return False
        self.failures[cause] = Failures(what, epoch)
        return True

    def newly_not_finite(self, values: Mapping[str, float]) -> list[str]:
        """Keys whose value is not finite for the first time."""
        new = [key for key, value in values.items() if not math.isfinite(value) and key not in self.not_finite]
        self.not_finite.update(new)
        return new

    def newly_explained(self, sentences: Mapping[str, str]) -> list[str]:
        """Sentences about keys that had none: their numbers change from measurement to measurement."""
        new = [sentence for key, sentence in sentences.items() if key not in self.explained]
        self.explained.update(sentences)
        return new
