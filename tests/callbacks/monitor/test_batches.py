"""Reading batches, and which of them are measured together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.callbacks.monitor.batches import Batch
from lightning_robust.callbacks.monitor.sample_collection import SampleCollector
from lightning_robust.callbacks.monitor.sample_selection import LoaderShare
from tests.helpers.networks import build, random


def pieces(sizes: list[int], model: Callable[[Tensor], Tensor], **options: Any) -> list[Batch]:
    inputs, targets = random(0, sum(sizes), 12, dtype=torch.float32), torch.arange(sum(sizes)) % 6
    parts = zip(inputs.split(sizes), targets.split(sizes), strict=True)
    return [Batch(x, y, {"model": model, **options}) for x, y in parts]


def groups(batches: list[Batch], *, largest: int) -> list[Batch]:
    """Groups of a collector that selects every sample, with a given size of the largest batch."""
    collector = SampleCollector(LoaderShare(sum(map(len, batches))), max_samples=10**6, seed=0)
    for batch in batches:
        collector.add(batch)
    collector._largest_batch = largest
    return list(collector.groups())


@pytest.mark.parametrize(
    ("sizes", "largest", "expected"),
    [
        ([1, 1, 1, 1], 2, [2, 2]),
        ([1, 1, 1, 1, 1], 2, [2, 2, 1]),
        ([3, 2, 4], 5, [5, 4]),
        ([3, 2, 4], 4, [4, 4, 1]),  # batches are cut where a group is full
        ([3, 2, 4], 100, [9]),
        ([], 5, []),
    ],
)
def test_samples_are_joined_in_order_as_far_as_there_is_room(
    sizes: list[int], largest: int, expected: list[int]
) -> None:
    parts = pieces(sizes, nn.Linear(12, 6), input_std=2.0, chunk_size=9) if sizes else []
    joined = groups(parts, largest=largest)
    assert [len(group) for group in joined] == expected
    assert all((group.probe().input_std, group.probe().chunk_size) == (2.0, 9) for group in joined)
    for field in ("inputs", "targets"):
        before, after = (
            torch.cat([torch.empty(0), *(getattr(p, field).flatten() for p in ps)]) for ps in (parts, joined)
        )
        assert torch.equal(before, after)


def test_joined_samples_have_the_values_of_their_parts() -> None:
    parts = pieces([2, 3], build("mlp")[0])
    (joined,) = groups(parts, largest=5)
    expected = torch.cat([part.probe().linearized.gram for part in parts])
    torch.testing.assert_close(joined.probe().linearized.gram, expected)


def test_bound_methods_of_one_network_are_one_network() -> None:
    model = build("mlp")[0]
    parts = [*pieces([2], model.forward), *pieces([2], model.forward)]
    assert [len(group) for group in groups(parts, largest=9)] == [4]


@pytest.mark.parametrize(
    "other",
    [
        {"model": nn.Linear(12, 6)},
        {"inputs": torch.ones(2, 13)},
        {"inputs": torch.ones(2, 12, dtype=torch.float64)},
        {"targets": torch.tensor([0, 1], dtype=torch.int32)},
        {"input_std": 1.0},
        {"input_std": torch.tensor([2.0, 3.0])},
        {"input_std": None},
        {"input_mean": 0.5},
        {"chunk_size": 4},
    ],
    ids=lambda other: next(iter(other)),
)
def test_samples_that_differ_are_not_joined(other: dict[str, Any]) -> None:
    def batch(**changes: Any) -> Batch:
        options = {"model": model, "input_std": 2.0, "input_mean": None, "chunk_size": None} | changes
        inputs, targets = options.pop("inputs", torch.ones(2, 12)), options.pop("targets", torch.tensor([0, 1]))
        return Batch(inputs, targets, options)

    model = nn.Linear(12, 6)
    assert [len(group) for group in groups([batch(), batch(**other), batch()], largest=9)] == [2, 2, 2]
    assert [len(group) for group in groups([batch(), batch(), batch()], largest=9)] == [6]


@pytest.mark.parametrize("twins", [(2, 2.0), ([2.0], torch.tensor([2.0])), ((1.0, 2.0), [1.0, 2.0])], ids=str)
def test_constants_are_compared_by_value(twins: tuple[Any, Any]) -> None:
    model, (inputs, targets) = nn.Linear(12, 6), (torch.ones(2, 12), torch.tensor([0, 1]))
    parts = [Batch(inputs, targets, {"model": model, "input_std": std}) for std in twins]
    assert [len(group) for group in groups(parts, largest=9)] == [4]


def test_extras_stay_with_their_samples() -> None:
    inputs, targets, mask = random(0, 9, 12), torch.arange(9), torch.arange(9.0)
    model = nn.Identity()
    parts = [Batch(inputs[r], targets[r], {"model": model}, {"mask": mask[r]}) for r in (slice(0, 4), slice(4, 9))]
    collector = SampleCollector(LoaderShare(9), max_samples=5, seed=0)
    for part in parts:
        collector.add(part)
    (group,) = collector.groups()
    assert len(group) == 5
    assert torch.equal(group.extras["mask"], group.targets.float())
    other = Batch(inputs, targets, {"model": model}, {"length": mask})
    longer = Batch(inputs, targets, {"model": model}, {"mask": mask[:, None]})
    assert not parts[0].matches(other)
    assert not parts[0].matches(longer)
    assert parts[0].matches(parts[1])


def test_kept_samples_do_not_follow_later_changes_of_the_batch() -> None:
    (batch,) = pieces([5], nn.Identity())
    inputs, targets = batch.inputs.clone(), batch.targets.clone()
    collector = SampleCollector(LoaderShare(5), max_samples=5, seed=0)
    collector.add(batch)
    batch.inputs.zero_()
    batch.targets.zero_()
    (group,) = collector.groups()
    assert torch.equal(group.inputs, inputs)
    assert torch.equal(group.targets, targets)


def test_a_stream_keeps_no_more_samples_than_it_measures() -> None:
    collector = SampleCollector(LoaderShare(None), max_samples=7, seed=0)
    for batch in pieces([50] * 20, nn.Identity()):
        collector.add(batch)
        assert sum(len(kept.inputs) for _, kept in collector._kept) == 7
        assert sum(kept.inputs.untyped_storage().nbytes() for _, kept in collector._kept) == 7 * 12 * 4
    assert len(collector) == 7
