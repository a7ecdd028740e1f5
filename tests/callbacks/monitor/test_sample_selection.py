import random
from collections import Counter

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from lightning_robust.callbacks.monitor.batches import Batch
from lightning_robust.callbacks.monitor.sample_collection import SampleCollector
from lightning_robust.callbacks.monitor.sample_selection import LoaderShare, ReservoirSelection, StratifiedSelection
from tests.helpers.training import loader, samples


def chosen(selection: StratifiedSelection | ReservoirSelection, size: int) -> set[int]:
    kept = set()
    for position in range(size):
        if selection.offer(position):
            kept.add(position)
        kept.discard(selection.revoked())
    return kept


@pytest.mark.parametrize(
    ("size", "count"), [(1000, 256), (256, 256), (257, 256), (10, 256), (1, 1), (0, 5), (7919, 100)]
)
def test_one_sample_from_each_stretch(size: int, count: int) -> None:
    positions = sorted(chosen(StratifiedSelection(size, count, seed=3), size))
    assert len(positions) == min(size, count)
    for stretch, position in enumerate(positions):
        assert stretch * size // len(positions) <= position < (stretch + 1) * size // len(positions)


def test_a_loader_whose_classes_take_turns_still_gives_every_class() -> None:
    """Every tenth of 2,560 samples would be one class of ten."""
    classes = Counter(position % 10 for position in chosen(StratifiedSelection(2560, 256, seed=0), 2560))
    assert len(classes) == 10
    assert max(classes.values()) < 50


def test_reservoir_keeps_as_many_as_wanted_and_every_sample_with_the_same_probability() -> None:
    counts: Counter[int] = Counter()
    for seed in range(2000):
        kept = chosen(ReservoirSelection(5, seed=seed), 20)
        assert len(kept) == 5
        counts.update(kept)
    expected, spread = 2000 * 5 / 20, (2000 * 0.25 * 0.75) ** 0.5
    assert all(abs(counts[position] - expected) < 4 * spread for position in range(20))


def test_reservoir_of_a_short_stream_keeps_all_of_it() -> None:
    assert chosen(ReservoirSelection(30, seed=0), 20) == set(range(20))


@pytest.mark.parametrize("make", [lambda: StratifiedSelection(500, 40, seed=1), lambda: ReservoirSelection(40, seed=1)])
def test_selection_leaves_the_global_generator_alone(make) -> None:
    state = random.getstate()
    chosen(make(), 500)
    assert random.getstate() == state


def test_share_of_an_ordinary_loader() -> None:
    assert LoaderShare.of(loader(), num_batches=float("inf")) == LoaderShare(size=120, batch_size=64)
    assert LoaderShare.of(loader(), num_batches=2) == LoaderShare(size=120, batch_size=64)
    assert LoaderShare.of(loader(), num_batches=1) == LoaderShare(size=64, batch_size=64)
    assert LoaderShare.of(loader(drop_last=True), num_batches=1) == LoaderShare(size=64, batch_size=64)
    batch_sampler = BatchSampler(SequentialSampler(samples()), 50, drop_last=False)
    assert LoaderShare.of(DataLoader(samples(), batch_sampler=batch_sampler), num_batches=2).size == 100


def test_shuffling_is_noticed() -> None:
    assert LoaderShare.of(loader(shuffle=True), num_batches=4).shuffled
    assert LoaderShare.of(loader(sampler=torch.utils.data.SubsetRandomSampler(range(50))), num_batches=2).shuffled
    assert not LoaderShare.of(loader(), num_batches=4).shuffled


def test_unknown_sizes_are_admitted() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            yield from range(3)

    assert LoaderShare.of(DataLoader(Stream()), num_batches=float("inf")).size is None
    assert LoaderShare.of([1, 2, 3], num_batches=3).size is None
    odd = DataLoader(samples(), batch_sampler=[[0, 1], [2], [3, 4, 5]])
    assert LoaderShare.of(odd, num_batches=3).size is None


@pytest.mark.parametrize("num_processes", [2, 3, 7])
@pytest.mark.parametrize("size", [20, 23])
def test_processes_share_the_samples_of_one_process_and_padding_is_not_counted(num_processes: int, size: int) -> None:
    dataset = samples(size)
    alone = chosen(StratifiedSelection(size, 12, seed=0), size)
    together: list[int] = []
    for rank in range(num_processes):
        sampler = DistributedSampler(dataset, num_processes, rank, shuffle=False)
        share = LoaderShare.of(loader(dataset, 4, sampler=sampler), num_batches=float("inf"))
        selection = StratifiedSelection(share.size, 12, seed=0)
        for index, position in enumerate(sampler):
            if selection.offer(share.position(index)):
                together.append(position)
                assert share.position(index) == position
    assert sorted(together) == sorted(alone)


@pytest.mark.parametrize("batch_size", [1, 7, 32, 200])
@pytest.mark.parametrize("size", [120, None])
def test_the_same_samples_whatever_the_batch_size(batch_size: int, size: int | None) -> None:
    def collect(batch_size: int) -> SampleCollector:
        collector = SampleCollector(LoaderShare(size), max_samples=30, seed=0)
        for x, y in loader(batch_size=batch_size):
            collector.add(Batch(x, y, {"model": len}))
        return collector

    reference = torch.cat([probe.inputs for probe in collect(120).groups()])
    collector = collect(batch_size)
    probes = list(collector.groups())
    assert len(collector) == 30
    assert torch.equal(torch.cat([probe.inputs for probe in probes]), reference)
    assert all(len(probe) <= batch_size for probe in probes)


def test_a_sorted_loader_gives_every_class_in_proportion() -> None:
    collector = SampleCollector(LoaderShare(120), max_samples=40, seed=0)
    for x, y in loader():
        collector.add(Batch(x, y, {"model": len}))
    targets = torch.cat([probe.targets for probe in collector.groups()])
    assert torch.bincount(targets).tolist() == [10, 10, 10, 10]


@pytest.mark.parametrize("known", [True, False])
def test_processes_that_see_the_same_loader_share_the_samples_out(known: bool) -> None:
    """Without a distributed sampler, every process sees all samples."""
    alone = SampleCollector(LoaderShare(120 if known else None), max_samples=30, seed=0)
    ranks = [
        SampleCollector(LoaderShare(120 if known else None), max_samples=30, rank=rank, num_processes=4, seed=0)
        for rank in range(4)
    ]
    for x, y in loader():
        for collector in (alone, *ranks):
            collector.add(Batch(x, y, {"model": len}))
    together = torch.cat([probe.inputs for collector in ranks for probe in collector.groups()])
    expected = torch.cat([probe.inputs for probe in alone.groups()])
    assert sorted(together.flatten(1).tolist()) == sorted(expected.flatten(1).tolist())
    assert [len(collector) for collector in ranks] == [8, 8, 7, 7]


@pytest.mark.parametrize("joined", [5, 1 / 5])
def test_batches_that_are_not_made_of_single_samples_are_noticed_and_the_subset_spread(
    joined: float,
) -> None:
    """A data set of ready batches, or a collate function that splits samples."""
    x, y = samples(200).tensors
    size = round(8 * joined)
    share = LoaderShare(round(200 / joined), batch_size=8)
    collector = SampleCollector(share, max_samples=40, seed=0)
    for start in range(0, 200, size):
        collector.add(Batch(x[start : start + size], y[start : start + size], {"model": len}))
    assert collector.irregular
    assert len(collector) == 40
    targets = torch.tensor(collector.targets())
    assert torch.bincount(targets, minlength=4).min() > 4


def test_a_distributed_sampler_that_drops_the_last_round_is_regular() -> None:
    dataset = samples(10)
    together = []
    for rank in range(3):
        sampler = DistributedSampler(dataset, 3, rank, shuffle=False, drop_last=True)
        batches = loader(dataset, 8, sampler=sampler)
        share = LoaderShare.of(batches, num_batches=1)
        collector = SampleCollector(share, max_samples=40, rank=rank, num_processes=3, seed=0)
        for x, y in batches:
            collector.add(Batch(x, y, {"model": len}))
        assert not collector.irregular
        together.append(len(collector))
    assert together == [3, 3, 3]
