"""Forward passes leave no trace, and nothing that they do not touch is copied or written back."""

import collections
import mmap
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, UntypedStorage, nn

from lightning_robust import Probe
from lightning_robust.functional import hessian_trace, linearize, pgd
from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._validation.tensors import outputs_of
from tests.helpers.networks import random


class Keeping(nn.Module):
    """A linear network that keeps something, and does something with it in every pass."""

    def __init__(self, kept: Any = None, act: Callable[[Any], object] = lambda kept: None) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.kept, self.act = kept, act

    def forward(self, x: Tensor) -> Tensor:
        self.act(self.kept)
        return self.head(x)


def inputs(num_samples: int = 5) -> Tensor:
    return random(0, num_samples, 4, dtype=torch.float32)


def measure(model: nn.Module) -> None:
    """By functions of which each makes several passes, on their own and inside one context."""
    targets = torch.tensor([0, 1, 2, 0, 1])
    linearize(model, inputs())
    with differentiable(model):
        linearize(model, inputs())
        hessian_trace(model, inputs(), targets, max_probes=2)
        Probe(model, inputs(), targets).outputs(inputs())


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes in bytes of the storages that are copied."""
    sizes: list[int] = []
    clone = UntypedStorage.clone

    def counting(storage: UntypedStorage) -> UntypedStorage:
        sizes.append(storage.nbytes())
        return clone(storage)

    monkeypatch.setattr(UntypedStorage, "clone", counting)
    return sizes


# --- what passes write to is put back -------------------------------------------------------------------------------


WRITES: dict[str, tuple[Callable[[], Any], Callable[[Any], object], Callable[[Any], Tensor]]] = {
    "a tensor": (lambda: torch.zeros(3), lambda t: t.add_(1), lambda t: t),
    "unnoticed by its version": (lambda: torch.zeros(3), lambda t: t.data.add_(1), lambda t: t),
    "through a view": (lambda: torch.zeros(3), lambda t: t[1:].fill_(2), lambda t: t),
    "by an index": (lambda: torch.zeros(3), lambda t: t.__setitem__(0, 5.0), lambda t: t),
    "as a result": (lambda: torch.zeros(3), lambda t: torch.ones(3, out=t), lambda t: t),
    "a tensor of integers": (lambda: torch.zeros(3, dtype=torch.long), lambda t: t.add_(1), lambda t: t),
    "deep inside": (lambda: {"a": ([torch.zeros(3)],)}, lambda k: k["a"][0][0].add_(1), lambda k: k["a"][0][0]),
    "all of them at once": (
        lambda: [torch.zeros(3), torch.zeros(3)],
        lambda kept: torch._foreach_add_(kept, 1),
        lambda kept: kept[1],
    ),
    "a tensor that is not a number": (lambda: torch.full((3,), torch.nan), lambda t: t.fill_(1), lambda t: t),
    "statistics of a batch norm in train mode": (
        lambda: torch.zeros(4),
        lambda t: nn.functional.batch_norm(inputs(), t, torch.ones(4), training=True),
        lambda t: t,
    ),
    "a large tensor": (lambda: torch.zeros(2**17), lambda t: t.add_(1), lambda t: t),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_passes_write_to_is_put_back(name: str) -> None:
    make, write, tensor_of = WRITES[name]
    model = Keeping(make(), write)
    tensor, before = tensor_of(model.kept), tensor_of(model.kept).clone()
    measure(model)
    assert tensor_of(model.kept) is tensor
    assert torch.equal(tensor.nan_to_num(nan=-1), before.nan_to_num(nan=-1))
    write(model.kept)  # as a pass of the user's own would
    assert not torch.equal(tensor_of(model.kept).nan_to_num(nan=-1), before.nan_to_num(nan=-1))


def test_a_weight_that_a_pass_writes_to_is_put_back() -> None:
    model = Keeping()
    model.act = lambda _: model.head.weight.data.mul_(0.9)
    before = model.head.weight.detach().clone()
    measure(model)
    assert torch.equal(model.head.weight, before)


def test_a_large_buffer_is_guarded_rather_than_copied(copied: list[int]) -> None:
    model = Keeping()
    model.register_buffer("table", torch.zeros(2**17))
    measure(model)
    assert copied == []
    model.act = lambda _: model.table.add_(1)
    measure(model)
    assert not model.table.any()
    assert set(copied) == {2**19}


def test_every_measurement_starts_from_the_same_state() -> None:
    """A network whose outputs depend on how often it was called has the same numbers first and last."""
    model = Keeping(torch.zeros(()), lambda kept: kept.add_(1))
    network = nn.Sequential(model, nn.Identity())
    network[1].forward = lambda z: z * model.kept
    with differentiable(network):
        first = linearize(network, inputs())
        hessian_trace(network, inputs(), torch.zeros(5, dtype=torch.long), max_probes=2)
        last = linearize(network, inputs())
    assert torch.equal(first.logits, last.logits)
    assert torch.equal(first.gram, last.gram)


# --- what they do not write to is left alone ------------------------------------------------------------------------


KEPT: dict[str, Callable[[], Any]] = {
    "predictions in a list": lambda: [torch.ones(2**16) for _ in range(20)],
    "arrays of predictions in a list": lambda: [np.ones(2**17) for _ in range(20)],
    "a tensor that is read": lambda: torch.ones(2**20),
    "a dictionary of lists": lambda: {"a": [torch.ones(2**16)], "b": [[torch.ones(2**16)]]},
}


@pytest.mark.parametrize("name", KEPT)
def test_what_passes_do_not_write_to_is_not_copied(
    name: str, copied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Keeping(KEPT[name]())
    cloned: list[int] = []
    clone = Tensor.clone

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cloned.append(tensor.numel())
        return clone(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "clone", counting)
    measure(model)
    assert copied == []
    assert max(cloned) < 2**10


def read_only_table() -> Tensor:
    """A table in a file that is mapped for reading; a write ends the process."""
    with tempfile.TemporaryFile() as file:
        table = np.random.default_rng(0).random((100, 4), dtype=np.float32)
        table[3] = np.nan
        file.write(table.tobytes())
        file.flush()
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    return torch.frombuffer(mapping, dtype=torch.float32).view(100, 4)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("place", ["attribute", "buffer", "list", "weight"])
def test_a_mapping_that_cannot_be_written_to_survives(place: str) -> None:
    """NaN is unequal to itself: what is put back where values differ is put back here."""
    table = read_only_table()
    model = Keeping([table] if place == "list" else table if place == "attribute" else None)
    if place == "buffer":
        model.register_buffer("table", table)
    if place == "weight":
        model.table = nn.Parameter(table, requires_grad=False)
    measure(model)
    assert table[3].isnan().all()
    assert (
        table.data_ptr()
        == {"attribute": lambda: model.kept, "list": lambda: model.kept[0]}.get(place, lambda: model.table)().data_ptr()
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(4),
        lambda: np.zeros(4),
        lambda: {"a": [np.zeros(4)]},
        lambda: torch.zeros(4).share_memory_(),
    ],
    ids=["tensor", "array", "array inside", "shared memory"],
)
def test_what_another_thread_writes_meanwhile_survives(make: Callable[[], Any]) -> None:
    shared = make()
    array = shared["a"][0] if isinstance(shared, dict) else shared
    inside, written = threading.Event(), threading.Event()

    def act(_: Any) -> None:
        inside.set()
        assert written.wait(timeout=60)

    def write() -> None:
        assert inside.wait(timeout=60)
        array[:] = 7.0
        written.set()

    thread = threading.Thread(target=write)
    thread.start()
    model = Keeping(shared, act)
    measure(model)
    thread.join()
    assert model.kept is shared
    assert [float(value) for value in array] == [7.0] * 4


def test_a_file_that_is_mapped_for_writing_is_not_copied(tmp_path: Path) -> None:
    table = np.memmap(tmp_path / "table", dtype=np.float32, mode="w+", shape=(10, 4))
    model = Keeping(table)
    with differentiable(model):
        assert model.kept is table
        outputs_of(model, inputs())
    assert model.kept is table


# --- networks that keep state in less usual ways ----------------------------------------------------------------------


class Experts(nn.Module):
    """Counts how often each expert is used: which ones depends on the samples, so later passes write to others."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(4, 3), nn.Linear(4, 3)
        self.used = [torch.zeros(()) for _ in range(3)]

    def forward(self, x: Tensor) -> Tensor:
        for expert in self.router(x).argmax(dim=1).tolist():
            self.used[expert] += 1
        return self.head(x)


class Ring(nn.Module):
    """Remembers its last inputs, each pass in another place."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.memory = [torch.zeros(4) for _ in range(3)]
        self.passes = torch.zeros((), dtype=torch.long)

    def forward(self, x: Tensor) -> Tensor:
        self.memory[int(self.passes) % 3].copy_(x.detach()[0])
        self.passes += 1
        return self.head(x)


class GradientStatistics(nn.Module):
    """Adds up gradients in a hook, during the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.total = nn.Linear(4, 3), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        if x.requires_grad:
            x.register_hook(self.count)
        return self.head(x)

    def count(self, gradient: Tensor) -> None:
        self.total += gradient.abs().sum()


class Workspace(nn.Module):
    """Grows a workspace with the batch, and counts in a tensor after it and in an array."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.workspace, self.counted, self.array = torch.zeros(0), torch.zeros(()), np.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.workspace.resize_(x.shape).copy_(x.detach())
        self.counted += 1
        self.array += 1
        return self.head(self.workspace + (x - x.detach()))


class Recent(nn.Module):
    """Keeps arrays in a queue, and one array under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.recent = collections.deque([np.zeros(4)])
        self.first = self.second = np.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.recent[0] += x.detach().numpy()[0]
        self.first += 1
        return self.head(x) * float(self.second[0])


def state(model: nn.Module) -> list[Any]:
    """Tensors and arrays in attributes other than parameters, with their identities."""
    kept = [value for key, value in sorted(vars(model).items()) if not key.startswith("_") and key != "workspace"]
    flat = [item for value in kept for item in (value if isinstance(value, list | collections.deque) else [value])]
    return [(id(item), item.tolist()) for item in flat if isinstance(item, Tensor | np.ndarray)]


@pytest.mark.parametrize("make", [Experts, Ring, GradientStatistics, Workspace, Recent])
def test_what_a_network_counts_and_remembers_is_as_before(make: Callable[[], nn.Module]) -> None:
    model = make()
    before = state(model)
    x = random(0, 12, 4, dtype=torch.float32)
    with differentiable(model):
        linearize(model, x, chunk_size=2)
        pgd(model, x, torch.arange(12) % 3, epsilon=0.1, steps=5)
        hessian_trace(model, x, torch.arange(12) % 3, max_probes=2)
    linearize(model, x, chunk_size=3)
    assert before
    assert state(model) == before
    model(x.requires_grad_()).sum().backward()  # as the training would
    assert state(model) != before


class Aliases(nn.Module):
    """Writes to an array, and reads the memory in another way."""

    def __init__(self, alias: Callable[[Any], Any]) -> None:
        super().__init__()
        self.head, self.array = nn.Linear(4, 3), np.ones(3, dtype=np.float32)
        self.alias = alias(self.array)

    def forward(self, x: Tensor) -> Tensor:
        self.array[:] = x.detach().numpy()[:, :3].mean(axis=0)
        alias = self.alias.array if isinstance(self.alias, Holder) else self.alias
        return self.head(x) + torch.tensor(alias.tolist())


class Holder:
    def __init__(self, array: Any) -> None:
        self.array = array


@pytest.mark.parametrize(
    "alias",
    [lambda array: array, torch.from_numpy, lambda array: array[:], Holder],
    ids=["another name", "tensor", "view", "object"],
)
def test_memory_that_is_read_under_another_name_is_that_to_which_passes_write(alias: Callable[[Any], Any]) -> None:
    model = Aliases(alias)
    x = inputs()
    expected = model.head(x) + x[:, :3].mean(dim=0)
    torch.testing.assert_close(linearize(model, x).logits, expected)


def test_a_step_back_that_fails_does_not_keep_the_others_from_being_taken() -> None:
    class Refuses(list[int]):
        def __iter__(self) -> Any:
            if refuses:
                raise TypeError("not this one")
            return super().__iter__()

    refuses = False
    model = Keeping({"refuses": Refuses(), "counted": torch.zeros(()), "array": np.zeros(1)})
    array = id(model.kept["array"])

    def act(kept: Any) -> None:
        nonlocal refuses
        kept["counted"] += 1
        kept["array"] += 1
        model.extra = 1
        refuses = True

    model.act = act
    with pytest.raises(TypeError, match="not this one"):
        linearize(model, inputs())
    assert model.kept["counted"] == 0
    assert id(model.kept["array"]) == array
    assert model.kept["array"][0] == 0
    assert not hasattr(model, "extra")
