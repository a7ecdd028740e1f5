"""Makes functions of weights anew that a network has kept from earlier passes.

In eval mode some networks compute a function of a weight once and keep it: LeViT, TinyViT and EfficientFormer keep the
biases of their attention. Passes of a validation have no gradients, so what they keep cuts the weight off: its gradient
would be zero, silently.

No rule tells such a tensor from a constant, so it is tried out. Candidates are the tensors in attributes, containers
and buffers outside the state dict that a pass reads. A candidate is taken away, or the module's own ``train(False)`` is
called if its class overrides that. If the network then has a tensor of the same values, which depends on trained
weights and not on the inputs, it was such a function, and stays away for the time being.

What is kept elsewhere is not found: in objects that are not modules, as Python numbers, by ``functools.lru_cache``.

Cost: nothing for networks without such tensors, else a forward pass of two samples, and two or more further ones when
it reads tensors for the first time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_robust.functional._isolation.holdings import attributes_of, items_of, storages
from lightning_robust.functional._isolation.side_effects import each_time, start_anew, watched
from lightning_robust.functional._isolation.weights import Weights

_FEW = 32  # candidates that are tried one by one if they cannot be taken away together
_constants = WeakTensorKeyDictionary()  # tensors that were tried in vain


@dataclass(frozen=True, eq=False)
class _Kept:
    """A tensor, the attribute or buffer of a module that holds it, and the places where it can be removed.

    ``places`` are those in containers inside containers, as a container and a key each, the innermost first.
    """

    tensor: Tensor
    module: nn.Module
    attributes: dict[str, Any]
    name: str
    places: tuple[tuple[Any, Any], ...]

    def remedies(self) -> Iterator[Callable[[], object]]:
        """Ways to be rid of it, the most specific first."""
        for container, key in self.places:
            yield partial(_take_out, container, key)
        yield lambda: self.attributes.update({self.name: None})
        if self.attributes is not self.module._buffers:
            yield lambda: self.attributes.pop(self.name, None)
        if type(self.module).train is not nn.Module.train:
            yield lambda: self.module.train(mode=False)

    def now(self) -> Iterator[Tensor]:
        """The tensors that its attribute holds."""
        if self.name in self.attributes:
            held = self.attributes[self.name]
            yield from (kept.tensor for kept in _inside(held, self.module, self.attributes, self.name))


def _take_out(container: Any, key: Any) -> None:
    if isinstance(container, dict):
        dict.pop(container, key, None)
    else:
        container.clear()  # rarely does one item of a list come back without the others


@contextmanager
def caches_made_anew(weights: Weights, model: Callable[[Tensor], object], samples: Tensor) -> Iterator[None]:
    """Let passes inside compute functions of the weights from the weights, whatever earlier passes have kept.

    Args:
        weights: The weights, as leaves.
        model: The network.
        samples: One or two ``(N, ...)``.
    """
    remedies = _remedies(weights, model, samples)
    if not remedies:
        yield
        return

    def renew() -> None:
        for remedy in remedies:
            remedy()

    with weights.renewing(renew), each_time(renew):
        yield


def _remedies(weights: Weights, model: Callable[[Tensor], object], samples: Tensor) -> list[Callable[[], object]]:
    """What to do before each pass to be rid of all kept functions of weights."""
    own = {key for module in weights.modules for key, _ in storages(module._parameters.values())}
    candidates = [kept for kept in _kept(weights.modules) if not own & {key for key, _ in storages([kept.tensor])}]
    if not candidates:
        return []
    with _Reads() as reads:
        outputs = _pass(model, samples)
    start_anew()
    left = [kept for kept in candidates if reads.storages & {key for key, _ in storages([kept.tensor])}]
    found: list[Callable[[], object]] = []
    trial = _Trial(weights, model, samples, outputs)
    attempt = 0
    while left:
        remedies = [(kept, remedy) for kept in left for remedy in list(kept.remedies())[attempt : attempt + 1]]
        _constants.update({kept.tensor: True for kept in left if not any(kept is tried for tried, _ in remedies)})
        made = trial.made_anew(remedies)
        found += [remedy for kept, remedy in remedies if kept in made]
        left = [kept for kept, _ in remedies if kept not in made]
        attempt += 1
    return found


@dataclass(frozen=True)
class _Trial:
    """Passes that show which tensors the network makes anew; ``outputs`` are those with all that it keeps."""

    weights: Weights
    model: Callable[[Tensor], object]
    samples: Tensor
    outputs: object

    def made_anew(self, remedies: Sequence[tuple[_Kept, Callable[[], object]]]) -> list[_Kept]:
        """Which tensors the network makes anew from weights after a remedy for each."""
        made = self._all_at_once(remedies)
        if made is None and 1 < len(remedies) <= _FEW:
            return [kept for remedy in remedies for kept in self._all_at_once([remedy]) or []]
        return made or []

    def _all_at_once(self, remedies: Sequence[tuple[_Kept, Callable[[], object]]]) -> list[_Kept] | None:
        """Which tensors it makes anew after all remedies together; None if they change what the network does."""
        leaf = self.samples.detach().clone()
        leaf.requires_grad_(leaf.is_floating_point())  # token ids are no leaves
        try:
            with watched():
                for _, remedy in remedies:
                    remedy()
            same = _near(_pass(self.model, leaf), self.outputs)
            return [kept for kept, _ in remedies if self._is_made_anew(kept, leaf)] if same else None
        except torch.OutOfMemoryError:
            raise
        except Exception:  # it cannot do without what was taken away
            return None
        finally:
            start_anew()

    def _is_made_anew(self, kept: _Kept, leaf: Tensor) -> bool:
        variables = [*self.weights.tensors.values(), *([leaf] if leaf.requires_grad else [])]
        for tensor in kept.now():
            if tensor is not kept.tensor and tensor.requires_grad and _near(tensor, kept.tensor):
                total = tensor.abs().sum() if tensor.is_complex() else tensor.sum()
                found: Any = torch.autograd.grad(total, variables, retain_graph=True, allow_unused=True)
                of_weights, of_input = found[: len(self.weights.tensors)], found[len(self.weights.tensors) :]
                return any(g is not None for g in of_weights) and all(g is None for g in of_input)
        return False


def _near(a: object, b: object) -> bool:
    """Whether tensors are equal but for rounding; either may be kept in half precision."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    a, b = a.detach(), b.detach().to(a)
    return bool(torch.linalg.vector_norm(a - b) <= 1e-2 * torch.linalg.vector_norm(b))


def _pass(model: Callable[[Tensor], object], samples: Tensor) -> object:
    with watched():
        return model(samples.clone())


class _Reads(TorchDispatchMode):
    """Notes the storages that operators are given."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.storages.update(key for key, _ in storages(tree_leaves((args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def _kept(modules: Sequence[nn.Module]) -> Iterator[_Kept]:
    for module in modules:
        for name, value in attributes_of(module).items():
            yield from _inside(value, module, vars(module), name)
        for name in module._non_persistent_buffers_set:
            yield from _inside(module._buffers.get(name), module, module._buffers, name)


def _inside(value: object, module: nn.Module, attributes: dict[str, Any], name: str) -> Iterator[_Kept]:
    """The tensors that an attribute holds, in containers and tuples, too."""
    pending: list[tuple[Any, tuple[tuple[Any, Any], ...]]] = [(value, ())]
    seen = set[int]()
    while pending:
        held, places = pending.pop()
        if isinstance(held, Tensor):
            if _may_be_a_function(held):
                yield _Kept(held, module, attributes, name, places)
        elif isinstance(held, dict | list | set | deque | tuple) and id(held) not in seen:
            seen.add(id(held))
            if isinstance(held, dict):
                items = list(zip(list(dict.keys(held)), items_of(held), strict=False))
                pending += [(item, ((held, key), *places)) for key, item in items]
            else:
                inside = places if isinstance(held, tuple) else ((held, None), *places)
                pending += [(item, inside) for item in items_of(held)]


def _may_be_a_function(tensor: Tensor) -> bool:
    if isinstance(tensor, nn.Parameter) or not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    return tensor not in _constants and any(True for _ in storages([tensor]))
