"""How samples are chosen: a fixed subset of the validation samples, spread over the whole loader.

Loaders are often sorted by class, so the first samples will not do; some repeat the classes in turn, so every n-th will
not do either. If the number of samples is known, the loader is cut into as many stretches as samples are wanted, and
one sample is drawn from each (stratified sampling). If it is unknown, every sample draws a random number and the
smallest ones stay, a uniformly random subset of a stream of any length (reservoir sampling). Both depend on the seed
and the order of the samples alone: not on the batch size, the epoch, or the number of processes.
"""

from __future__ import annotations

import math
import random
from bisect import insort
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Selection(Protocol):
    """A choice among samples that are offered in order."""

    def offer(self, position: int) -> bool:
        """Whether the sample at this position is wanted, as far as is known so far."""

    def revoked(self) -> int | None:
        """Position of the sample that the last offer pushed out, if any."""


class StratifiedSelection:
    """One sample from each of ``count`` equal stretches of ``size`` positions; all of them if there are not more."""

    def __init__(self, size: int, count: int, *, seed: int) -> None:
        draw = random.Random(seed)
        count = min(size, count)
        borders = [stretch * size // count for stretch in range(count + 1)] if count else [0]
        self.positions = frozenset(draw.randrange(start, stop) for start, stop in pairwise(borders))

    def offer(self, position: int) -> bool:
        """Whether the position was drawn."""
        return position in self.positions

    def revoked(self) -> None:
        """Return nothing: the choice was made beforehand."""


class ReservoirSelection:
    """``count`` samples, uniformly at random, from a stream of unknown length."""

    def __init__(self, count: int, *, seed: int) -> None:
        self._draw = random.Random(seed)
        self._count = count
        self._kept: list[tuple[float, int]] = []  # ascending
        self._revoked: int | None = None

    def offer(self, position: int) -> bool:
        """Whether the position is among the best so far. Positions must be offered once each, in order."""
        entry = (self._draw.random(), position)
        insort(self._kept, entry)
        self._revoked = self._kept.pop()[1] if len(self._kept) > self._count else None
        return self._revoked != position

    def revoked(self) -> int | None:
        """Position that the last offer pushed out, if any."""
        return self._revoked


@dataclass(frozen=True)
class LoaderShare:
    """The part of a validation loader that one of several processes sees.

    Attributes:
        size: Number of samples, or None if it is not known beforehand.
        first: Position of this process's first sample among the samples of all processes.
        stride: Distance between the positions of two successive samples of this process.
        shuffled: Whether the order of the samples changes from one pass to the next.
        distributed: Whether this process sees samples that no other one does. Positions and size, if known, are then
            those of all processes together; otherwise they are this process's own.
        batch_size: Number of samples in all batches but the last.
    """

    size: int | None
    first: int = 0
    stride: int = 1
    shuffled: bool = False
    distributed: bool = False
    batch_size: int | None = None

    @classmethod
    def of(cls, loader: Iterable[object], *, num_batches: float) -> LoaderShare:
        """Read off a loader of which each process draws up to ``num_batches`` batches (``inf`` for all)."""
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return cls(size=None)
        sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
        if isinstance(sampler, DistributedSampler) and type(loader.batch_sampler) is not BatchSampler:
            return cls(size=None, shuffled=sampler.shuffle, distributed=True)  # in whatever order
        batch_size = getattr(loader.batch_sampler, "batch_size", loader.batch_size)
        samples: object = sampler
        total = math.inf
        first, stride, shuffled, distributed = 0, 1, isinstance(sampler, _SHUFFLING), False
        if isinstance(sampler, DistributedSampler):
            samples, total = sampler.dataset, sampler.total_size  # less than the data set if it drops the last round
            first, stride, shuffled, distributed = sampler.rank, sampler.num_replicas, sampler.shuffle, True
        if not isinstance(samples, Sized) or not isinstance(batch_size, int):
            return cls(size=None, shuffled=shuffled)
        size = int(min(len(samples), total))
        drops = getattr(loader.batch_sampler, "drop_last", loader.drop_last)
        if num_batches < len(loader) or drops:  # otherwise all samples come, in batches of any size
            size = min(size, int(num_batches) * batch_size * stride)
        return cls(size, first, stride, shuffled, distributed, batch_size)

    def position(self, index: int) -> int:
        """Position, among the samples of all processes, of this process's sample number ``index``.

        A distributed sampler repeats samples to fill up its last round; their positions lie beyond ``size``.
        """
        return self.first + self.stride * index
