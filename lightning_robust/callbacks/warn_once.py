"""Warnings on rank zero, most of them once per run."""

from __future__ import annotations

import warnings

from lightning.pytorch.utilities import rank_zero_warn


class RobustnessWarning(UserWarning):
    """A measurement was skipped, or its numbers need care."""


# Python shows a sentence once per process, but the second run of a sweep needs it as much as the first.
warnings.filterwarnings("always", category=RobustnessWarning, append=True)


class WarnOnce:
    """Warns, and remembers the sentences of a run."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def forget(self) -> None:
        """Begin a new run."""
        self._said.clear()

    def warn(self, sentence: str) -> None:
        """Warn on rank zero."""
        rank_zero_warn(sentence, category=RobustnessWarning)

    def warn_here(self, sentence: str) -> None:
        """Warn in this process, whatever its rank: the cause may be in no other."""
        warnings.warn(sentence, category=RobustnessWarning, stacklevel=2)

    def once(self, *sentences: str) -> None:
        """Warn of each sentence that is new in this run."""
        for sentence in sentences:
            if sentence not in self._said:
                self._said.add(sentence)
                self.warn(sentence)

    def were(self, beginning: str) -> bool:
        """Whether a sentence with this beginning has been said."""
        return any(sentence.startswith(beginning) for sentence in self._said)
