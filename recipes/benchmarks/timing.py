"""CPU times, and how benchmarks print them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Return the CPU seconds of one call, and its result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of one call."""
    return timed(work)[0]


def median_and_range(ratios: Sequence[float], *, digits: int = 1) -> str:
    """Return the median, smallest and largest ratio of all rounds, in words."""
    median, least, most = (f"{value:.{digits}f}" for value in (statistics.median(ratios), min(ratios), max(ratios)))
    return f"median {median} (from {least} to {most} in {len(ratios)} rounds)"
