"""Rows of tensors are found again by value, and arguments by name, from copies of a bounded size."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.callbacks.monitor.step_calls import Calls, Listener, Rows
from tests.helpers.networks import random

LARGE = random(0, 12, 3, 40, 40, dtype=torch.float32)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_permuted_rows_are_found_again(memory_format: torch.memory_format) -> None:
    order = torch.tensor([7, 3, 0, 11])
    some = LARGE[order].to(memory_format=memory_format)
    found = Rows.of(some).equal(Rows.of(LARGE), tolerance=0.0)
    assert torch.equal(found, order[:, None] == torch.arange(12))
    assert Rows.of(some).values.shape == (4, 1024)
    assert not Rows.of(some + 0.1).equal(Rows.of(LARGE), tolerance=0.01).any()


def test_a_copy_does_not_follow_its_tensor() -> None:
    for x in (LARGE.clone(), LARGE[:, 0, 0].clone()):
        rows, before = Rows.of(x), x.clone()
        x.zero_()
        assert rows.equal(Rows.of(before), tolerance=0.0).diagonal().all()


def test_integers_are_the_same_or_not_and_numbers_within_a_share_of_their_size() -> None:
    ids = Rows.of(torch.tensor([[30000, 1], [30001, 1]]))
    assert torch.equal(ids.equal(ids, tolerance=0.02), torch.eye(2, dtype=torch.bool))
    numbers = Rows.of(torch.tensor([[30000.0, 1.0], [30001.0, 1.0], [0.0, 1.0]]))
    assert numbers.equal(numbers, tolerance=0.02).tolist() == [[True, True, False]] * 2 + [[False, False, True]]


class Takes(nn.Module):
    def forward(self, x: Tensor, *others: Tensor, scale: float = 1.0, **more: Any) -> Any:
        return SimpleNamespace(z=scale * x, nothing=None, loss=x.sum())


def test_arguments_and_outputs_have_names() -> None:
    module, x = Takes(), torch.ones(4, 2)
    listener = Listener({"": module})
    module(x, scale=2.0, mask=x.bool(), ids={"a": x[:, 0].long(), "b": "no tensor"})
    module(x, x, x)
    listener.stop()
    module(x)
    first, second = listener.calls.of[""]
    assert first.arguments == {"x", "scale", "mask", "ids"}
    assert first.inputs.keys() == {"x", "mask", "ids.a"}
    assert second.inputs.keys() == {"x", "others.0", "others.1"}
    assert first.outputs.keys() == {"z"}


def test_only_the_first_calls_and_rows_are_kept() -> None:
    def heard(*inputs: Tensor) -> Calls:
        module = nn.Identity()
        listener = Listener({"": module})
        for x in inputs:
            module(x)
        listener.stop()
        return listener.calls

    assert heard(*[torch.ones(2, 3)] * 64).cut == set()
    many = heard(*[torch.ones(2, 3)] * 70)
    assert len(many.of[""]) == 64
    assert many.cut == {""}
    long = heard(torch.ones(5000, 3))
    assert len(long.of[""][0].inputs["input"].values) == 4096
    assert long.cut == {""}


def test_tensors_without_rows_are_left_out() -> None:
    module = Takes()
    listener = Listener({"": module})
    module(torch.eye(3).to_sparse(), scale=1.0, wave=torch.ones(2, dtype=torch.complex64))
    listener.stop()
    assert listener.calls.of[""][0].inputs == {}


def test_a_step_that_maps_a_module_over_samples_is_not_disturbed() -> None:
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    module = Doubles()
    listener = Listener({"": module})
    assert torch.equal(torch.vmap(module)(torch.ones(3, 2)), torch.full((3, 2), 2.0))
    listener.stop()
    for call in listener.calls.of.get("", []):
        assert all(rows.equal(rows, tolerance=0.0).any() for rows in call.inputs.values())
