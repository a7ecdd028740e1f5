"""Which validation samples are measured: a fixed subset, spread over the whole loader.

Loaders are often sorted by class, so the first samples will not do; and some repeat the classes in turn, so neither
will every n-th. With the number of samples known, the loader is cut into as many stretches as samples are wanted, and
one is drawn from each (stratified sampling). With it unknown, every sample draws a random number and the smallest ones
stay, a uniformly random subset of a stream of any length (reservoir sampling). Both depend on the seed and the order of
the samples alone: not on the batch size, the epoch, or the number of processes.
"""

from __future__ import annotations

import math
import random
from bisect import insort
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional.curvature.signs import keys_of
from lightning_robust.probe import Probe, merge

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Selection(Protocol):
    """A choice among samples that are offered in order."""

    def offer(self, position: int) -> bool:
        """Whether the sample at this position is wanted, as far as is known."""

    def revoked(self) -> int | None:
        """Position of a sample that the last offer has pushed out, if any."""


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
    """``count`` samples, uniformly at random, from a stream whose length nobody knows."""

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
    """What one of several processes sees of a validation loader.

    Attributes:
        size: Number of samples, or None if it is not known beforehand.
        first: Position, among the samples of all processes, of this one's first.
        stride: Distance between the positions of two successive samples of this process.
        shuffled: Whether the order of the samples changes from one pass to the next.
        distributed: Whether this process sees samples that no other one does; then positions and size, if known, are
            those of all processes together. If not, they are this one's.
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


class SampleCollector:
    """Gathers the selected samples of one pass over a loader, batch by batch.

    Args:
        share: What this process sees of the loader.
        max_samples: How many samples are wanted over all processes.
        rank: Number of this process.
        num_processes: Number of processes. Where no distributed sampler shares the samples out among them, each takes
            every ``num_processes``-th of those selected: all of them together, if they see the same loader. Where one
            does, but positions are not known, each selects its share of ``max_samples``.
        seed: Chooses the samples.

    Attributes:
        irregular: Whether batches turned out not to be made of the loader's samples one by one (a collate function may
            join or split them), so that positions are not known beforehand.
    """

    def __init__(
        self, share: LoaderShare, *, max_samples: int, rank: int = 0, num_processes: int = 1, seed: int
    ) -> None:
        self._share = share
        own = len(range(rank, max_samples, num_processes)) if share.distributed else max_samples
        self._reservoir = ReservoirSelection(own, seed=seed)
        self._selection: Selection = self._reservoir
        if share.size is not None:
            self._selection = StratifiedSelection(share.size, max_samples, seed=seed)
        self._rank, self._num_processes = rank, num_processes
        self.irregular = False
        self._seen = 0
        self._largest_batch = 1
        self._rows: dict[int, Probe] = {}  # single samples, by position

    def __len__(self) -> int:
        return len(self._chosen())

    def add(self, batch: Probe) -> None:
        """Take what is wanted of the next batch."""
        if self._seen == 0 and len(batch) != self._expected(len(batch)):
            self.irregular = True
            self._selection = self._reservoir
        self._largest_batch = max(self._largest_batch, len(batch))
        for row in range(len(batch)):
            position = self._share.position(self._seen)
            self._seen += 1
            if self._selection.offer(position):
                self._rows[position] = batch.select(slice(row, row + 1))
            revoked = self._selection.revoked()
            if revoked is not None:
                self._rows.pop(revoked, None)

    def _expected(self, otherwise: int) -> int:
        """Number of samples in the first batch, if it can be known."""
        if self._share.size is None or self._share.batch_size is None:
            return otherwise
        return min(self._share.batch_size, -(-self._share.size // self._share.stride))

    def _chosen(self) -> list[int]:
        positions = sorted(self._rows)
        return positions if self._share.distributed else positions[self._rank :: self._num_processes]

    @property
    def presumes(self) -> bool:
        """Whether the choice presumes that all processes see the same samples."""
        return not self._share.distributed and self._num_processes > 1

    def key(self) -> int:
        """A number that depends on the contents of the first sample that was offered and is kept; -1 without one."""
        first = min(self._rows, default=None)
        return -1 if first is None else keys_of(full_precision(self._rows[first].inputs))[0]

    def targets(self) -> list[int]:
        """Classes of the samples, in order: another list at another time means other samples."""
        rows = [self._rows[position].targets for position in self._chosen()]
        return torch.cat(rows).tolist() if rows else []

    def probes(self) -> Iterator[Probe]:
        """The samples in the order of their positions, never more together than the largest batch held."""
        return merge((self._rows[position] for position in self._chosen()), max_samples=self._largest_batch)
