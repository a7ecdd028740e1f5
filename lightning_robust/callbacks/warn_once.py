"""Warnings on rank zero, most of them once per run."""

from __future__ import annotations

import warnings

from lightning.pytorch.utilities import rank_zero_warn


class RobustnessWarning(UserWarning):
    """A measurement was skipped, or its numbers need care."""


# By default Python shows a sentence once per process, but every run of a sweep needs it.
warnings.filterwarnings("always", category=RobustnessWarning, append=True)


class WarnOnce:
    """Gives warnings, and remembers those of a run."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def forget(self) -> None:
        """Begin a new run."""
        self._said.clear()

    def warn(self, sentence: str) -> None:
        """Warn on rank zero."""
        rank_zero_warn(sentence, category=RobustnessWarning)

    def warn_here(self, sentence: str) -> None:
        """Warn in this process, whatever its rank, because the cause may be specific to it."""
        warnings.warn(sentence, category=RobustnessWarning, stacklevel=2)

    def once(self, *sentences: str, here: bool = False) -> None:
        """Warn of each sentence that is new in this run; on rank zero, or ``here``, in this process."""
        for sentence in sentences:
            if sentence not in self._said:
                self._said.add(sentence)
                (self.warn_here if here else self.warn)(sentence)

    def were(self, beginning: str | tuple[str, ...]) -> bool:
        """Whether a sentence with this beginning has been given."""
        return any(sentence.startswith(beginning) for sentence in self._said)
