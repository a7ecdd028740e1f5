"""Records what happens to a network: passes through it, its state afterwards, and the memory they take."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_robust.functional.input_space import input_information
from lightning_robust.functional.input_space.jacobian_products import JacobianProducts


class Record:
    """Notes outside of the module: measurements revert what a forward pass writes to module attributes."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []
        self.num_input_backwards = 0
        self.any_training: list[bool] = []
        self.any_parameter_requires_grad: list[bool] = []

    def count(self, _: Tensor) -> None:
        self.num_input_backwards += 1


class Recorder(nn.Module):
    """A network that records every forward pass."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.record = Record()

    def forward(self, x: Tensor) -> Tensor:
        record = self.record
        record.batch_sizes.append(len(x))
        record.any_training.append(any(module.training for module in self.modules()))
        record.any_parameter_requires_grad.append(any(p.requires_grad for p in self.parameters()))
        if x.requires_grad:
            x.register_hook(record.count)
        return self.model(x)


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything that a measurement must leave unchanged, in a form that ``==`` compares bit by bit."""
    state: dict[str, object] = {name: module.training for name, module in model.named_modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            state[f"{name}:{key}"] = tensor if tensor is None else (id(tensor), tensor.requires_grad, _bytes(tensor))
            if tensor is not None and tensor.is_leaf and tensor.grad is not None:
                state[f"{name}:{key}:grad"] = (id(tensor.grad), _bytes(tensor.grad))
    return state


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes()


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors created inside it, exactly and on any device: ``peak`` of those alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tree_map_only(Tensor, lambda given: self._watch(given, created=False), (args, kwargs))
        result = func(*args, **kwargs)
        tree_map_only(Tensor, lambda new: self._watch(new, created=True), result)
        return result

    def _watch(self, tensor: Tensor, *, created: bool) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size = storage.nbytes() if created else 0  # tensors that existed before do not count
        self._known.add(storage._cdata)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Traffic(TorchDispatchMode):
    """Counts what this process sends to others while the context is active.

    Attributes:
        calls: Number of calls, by name of the collective.
        bytes_sent: Bytes of the tensors passed to them, by name of the collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes_sent: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            self.calls[name] += 1
            sent = args[1] if "gather" in name else args[0]  # gathering collectives take the output first
            self.bytes_sent[name] += sum(tensor.nbytes for tensor in tree_leaves(sent) if isinstance(tensor, Tensor))
        return func(*args, **(kwargs or {}))


def counted_passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count passes of single samples from now on: forward and backward passes, and products with Jacobians."""
    counts: Counter[str] = Counter()

    class Counted(JacobianProducts):
        def __init__(self, network: Any, x: Tensor, *args: Any, **options: Any) -> None:
            counts.update(forward=len(x), backward=len(x))
            super().__init__(network, x, *args, **options)

        def transposed(self, vectors: Tensor) -> Tensor:
            counts.update(backward=len(vectors))
            return super().transposed(vectors)

        def times(self, directions: Tensor) -> Tensor:
            counts.update(products=len(directions))
            return super().times(directions)

    monkeypatch.setattr(input_information, "JacobianProducts", Counted)
    return counts
