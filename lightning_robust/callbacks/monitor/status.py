"""How a measurement went, and how all processes agree on it, so that a failure in one has the same end in all."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import distributed

from lightning_robust.callbacks.monitor.overhead import Times

T = TypeVar("T")
WHOLE = -1  # origin of a failure that concerns the whole measurement rather than one metric
_LONGEST = 1000  # characters of an error that are sent to other processes and shown in a warning


@dataclass(frozen=True)
class Failure:
    """What went wrong.

    Attributes:
        origin: Index of the metric in which it did, or ``WHOLE``.
        kind: ``"refused"`` by one of this package's own checks, whose message says what to do, or ``"raised"`` by
            anything else: the network, the loader, torch.
        message: Class and text of the error, on one line.
    """

    origin: int
    kind: Literal["refused", "raised"]
    message: str

    @classmethod
    def of(cls, error: Exception, *, origin: int) -> Failure:
        """Describe an error (in words: its traceback would keep tensors alive)."""
        return cls(origin, "refused" if _is_refusal(error) else "raised", in_words(error))


@dataclass(frozen=True)
class Status:
    """How a measurement went in one process.

    Attributes:
        failures: What went wrong, at most once per origin.
        num_samples: Samples that this process measured.
        seconds: Wall time.
        key: Identifies this process's samples, where all processes should see the same ones.
        times: What its clocks show.
    """

    failures: tuple[Failure, ...] = ()
    num_samples: int = 0
    seconds: float = 0.0
    key: int | None = None
    times: Times = Times()  # noqa: RUF009 (immutable)


@dataclass(frozen=True)
class JointStatus:
    """How a measurement went in all processes together.

    Attributes:
        failures: By origin, as the first process met them.
        num_samples: Samples of all processes.
        seconds: Wall time of the slowest process.
        disagree: Whether processes that should see the same samples see different ones.
        overhead: Share of the wall time of the run so far that was spent measuring; 0 outside ``fit``.
    """

    failures: dict[int, Failure]
    num_samples: int
    seconds: float
    disagree: bool
    overhead: float

    @classmethod
    def of(cls, parts: Sequence[Status]) -> JointStatus:
        """Join the parts of all processes, in the order of their ranks."""
        failures: dict[int, Failure] = {}
        for failure in (failure for part in parts for failure in part.failures):
            failures.setdefault(failure.origin, failure)
        num_samples = sum(part.num_samples for part in parts)
        if not num_samples:
            message = "ValueError: Expected at least one validation sample, but the loop saw none."
            failures.setdefault(WHOLE, Failure(WHOLE, "refused", message))
        return cls(
            failures,
            num_samples,
            seconds=max(part.seconds for part in parts),
            disagree=len({part.key for part in parts} - {None}) > 1,
            overhead=Times.largest([part.times for part in parts]).share,
        )


def synchronised(part: T) -> list[T]:
    """Gather a picklable value from every process, by rank. Every process must call this."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [part]
    parts: list[T] = [part] * distributed.get_world_size()
    distributed.all_gather_object(parts, part)
    return parts


def in_words(error: Exception) -> str:
    """An error on one line of reasonable length."""
    try:
        message = str(error)
    except Exception:
        message = "its message cannot be written"
    text = " ".join(f"{type(error).__name__}: {message.strip() or 'no message'}".split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def _is_refusal(error: Exception) -> bool:
    """Whether this package raised an error on purpose: by its place, since torch, too, begins with "Expected"."""
    if not isinstance(error, ValueError | TypeError | MisconfigurationException):
        return False
    innermost = deque(traceback.walk_tb(error.__traceback__), maxlen=1)
    return any(frame.f_globals.get("__name__", "").startswith("lightning_robust.") for frame, _ in innermost)
