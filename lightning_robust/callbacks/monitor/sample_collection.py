"""Copies of the selected samples of one pass over a loader, joined into groups that are measured together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from lightning_robust.callbacks.monitor.batches import Batch
from lightning_robust.callbacks.monitor.sample_selection import LoaderShare, ReservoirSelection, StratifiedSelection
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional.curvature.signs import keys_of


class SampleCollector:
    """Gathers the selected samples of one pass over a loader, batch by batch.

    Args:
        share: What this process sees of the loader.
        max_samples: How many samples are wanted over all processes.
        rank: Number of this process.
        num_processes: Number of processes. Without a distributed sampler, each takes every ``num_processes``-th of the
            selected samples; together these are all of them if the processes see the same loader. With one, if
            positions are not known, each selects its share of ``max_samples``.
        seed: Chooses the samples.

    Attributes:
        irregular: Whether batches turned out not to hold the loader's samples one by one (a collate function may join
            or split them), so that positions are not known beforehand.
    """

    def __init__(
        self, share: LoaderShare, *, max_samples: int, rank: int = 0, num_processes: int = 1, seed: int
    ) -> None:
        self._share = share
        own = len(range(rank, max_samples, num_processes)) if share.distributed else max_samples
        self._reservoir = ReservoirSelection(own, seed=seed)
        self._selection: ReservoirSelection | StratifiedSelection = self._reservoir
        if share.size is not None:
            self._selection = StratifiedSelection(share.size, max_samples, seed=seed)
        self._rank, self._num_processes = rank, num_processes
        self.irregular = False
        self._seen = 0
        self._largest_batch = 1
        self._kept: list[tuple[list[int], Batch]] = []  # positions of samples, ascending, and copies of them

    def __len__(self) -> int:
        total = sum(len(positions) for positions, _ in self._kept)
        return len(range(self._rank, total, self._num_processes)) if self.presumes else total

    @property
    def is_empty(self) -> bool:
        """Whether no batch has come yet."""
        return self._seen == 0

    def add(self, batch: Batch) -> list[int]:
        """Copy the selected samples of the next batch, and return their rows in it."""
        if self._seen == 0 and len(batch) != self._expected(len(batch)):
            self.irregular = True
            self._selection = self._reservoir
        self._largest_batch = max(self._largest_batch, len(batch))
        wanted: dict[int, int] = {}  # rows, by position
        revoked: set[int] = set()
        for row in range(len(batch)):
            position = self._share.position(self._seen + row)
            if self._selection.offer(position):
                wanted[position] = row
            out = self._selection.revoked()
            if out is not None and wanted.pop(out, None) is None:
                revoked.add(out)
        self._seen += len(batch)
        if revoked:
            self._kept = [kept for kept in (_without(*kept, revoked) for kept in self._kept) if kept[0]]
        if wanted:
            self._kept.append((list(wanted), batch.copied(list(wanted.values()))))
        return list(wanted.values())

    def _expected(self, otherwise: int) -> int:
        """Number of samples in the first batch, if the loader tells."""
        if self._share.size is None or self._share.batch_size is None:
            return otherwise
        return min(self._share.batch_size, -(-self._share.size // self._share.stride))

    def _chosen(self) -> Iterator[Batch]:
        """The samples that this process measures, in order."""
        if not self.presumes:
            yield from (batch for _, batch in self._kept)
            return
        positions = sorted(chain.from_iterable(positions for positions, _ in self._kept))
        others = set(positions) - set(positions[self._rank :: self._num_processes])
        yield from (_without(*kept, others)[1] for kept in self._kept)

    @property
    def presumes(self) -> bool:
        """Whether the choice relies on all processes seeing the same samples."""
        return not self._share.distributed and self._num_processes > 1

    def key(self) -> int:
        """A number that depends on the contents of the first kept sample; -1 without one."""
        first = self._kept[0][1].inputs[:1] if self._kept else None
        return -1 if first is None else keys_of(full_precision(first))[0]

    def targets(self) -> list[int]:
        """Targets of the samples, in order. If they change, so have the samples."""
        return list(chain.from_iterable(batch.targets.tolist() for batch in self._chosen()))  # of any shapes

    def callables(self) -> list[object]:
        """Every model, module and loss that takes part, once each."""
        names = ("model", "module", "loss_fn")
        found = [batch.options.get(name) for _, batch in self._kept for name in names]
        return list({id(part): part for part in found if part is not None}.values())

    def groups(self) -> Iterator[Batch]:
        """The samples in order. Those of a group match, and are no more than the largest batch held."""
        group: list[Batch] = []
        for batch in self._chosen():
            start = 0
            while start < len(batch):
                room = self._largest_batch - sum(map(len, group))
                if group and (not room or not batch.matches(group[0])):
                    yield Batch.joined(group)
                    group = []
                else:
                    group.append(batch[start : start + room])
                    start += room
        if group:
            yield Batch.joined(group)


def _without(positions: list[int], batch: Batch, others: set[int]) -> tuple[list[int], Batch]:
    """Keep the samples whose positions are not among ``others``."""
    rows = [row for row, position in enumerate(positions) if position not in others]
    if len(rows) == len(positions):
        return positions, batch
    return [positions[row] for row in rows], batch.copied(rows)
