"""Tensors that take the place of a network's own while it is measured, so that nothing can reach the user's.

Every parameter is replaced by a detached view of itself: no derivative can reach a weight or its ``.grad``. Small
buffers, and small parameters that are not trained, are replaced by copies, because forward passes count and average in
them; :mod:`~lightning_robust.functional._isolation.side_effects` guards the large ones, which are rarely written and
would cost memory. Tensors of subclasses become plain ones and those in half precision float32 copies. Tensors born
under inference mode become ordinary ones, also small ones in attributes and containers, where passes of a validation
leave them. The user's own tensors are put back afterwards, untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.functional._isolation.holdings import attributes_of, get, places_in, put, with_containers

HALF = (torch.float16, torch.bfloat16)
_SMALL = 2**16  # elements of a tensor that is copied rather than guarded
_FEW = 64  # items of a container; those of a larger one are data rather than what a forward pass needs
_ORIGINAL = "_stands_in_for"


def full_precision(tensor: Tensor) -> Tensor:
    """Return ``tensor`` detached and plain, in float32 if it was in half precision, and usable by autograd."""
    tensor = plain_tensor(tensor.detach())
    if tensor.dtype in HALF:
        return tensor.float()
    return tensor.clone() if tensor.is_inference() else tensor


def plain_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor of a subclass, such as an image with metadata, as a plain one that shares memory and graph.

    Metadata would have to follow through every step of every measurement. Subclasses that compute by operators of
    their own (``__torch_dispatch__``: quantised, distributed) are returned as they are.
    """
    kind = type(tensor)
    if kind in (Tensor, nn.Parameter) or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def original(parameter: Tensor) -> Tensor:
    """The user's own tensor that a stand-in replaces, or the tensor itself."""
    tensor: Tensor = getattr(parameter, _ORIGINAL, parameter)
    return tensor


def as_stand_in(tensor: Tensor, of: Tensor) -> Tensor:
    """Mark ``tensor`` as standing in for ``of``, whose attributes it takes over."""
    vars(tensor).update(vars(of))
    setattr(tensor, _ORIGINAL, original(of))
    return tensor


@contextmanager
def stand_in_tensors(modules: list[nn.Module]) -> Iterator[None]:
    """Replace the parameters and buffers of ``modules``; tied tensors stay tied."""
    stand_ins: dict[int, Tensor] = {}  # by identity of the originals
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    held: list[tuple[Any, Any, Any]] = []  # a place and what was there

    def replace(tensors: dict[str, Any], stand_in: Callable[[Tensor], Tensor]) -> None:
        before.append((tensors, dict(tensors)))
        for name, tensor in before[-1][1].items():
            if tensor is not None:
                if id(tensor) not in stand_ins:
                    stand_ins[id(tensor)] = stand_in(tensor)
                tensors[name] = stand_ins[id(tensor)]

    try:
        for module in modules:
            renormalises = getattr(module, "max_norm", None) is not None  # an embedding that writes into its weights
            replace(module._parameters, _copied_parameter if renormalises else _parameter)
            replace(module._buffers, _buffer)
        _make_usable(modules, stand_ins, held)
        yield
    finally:
        for container, key, value in held:
            put(value, [(container, key)])
        for tensors, originals in before:
            for name in set(tensors.keys()) - originals.keys():  # registered by a forward pass
                del tensors[name]
            for name, tensor in originals.items():
                tensors[name] = tensor


def _make_usable(modules: list[nn.Module], stand_ins: dict[int, Tensor], held: list[tuple[Any, Any, Any]]) -> None:
    """Replace tensors in attributes and containers that autograd refuses, and append each place and its value."""
    containers = list(with_containers(value for module in modules for value in attributes_of(module).values()))
    few = [container for container in containers if len(container) <= _FEW]
    for container, key in list(places_in(modules, few)):
        value = get(container, key)
        usable = _usable(value, stand_ins)
        if usable is not value:
            put(usable, [(container, key)])
            held.append((container, key, value))


def _usable(value: Any, stand_ins: dict[int, Tensor]) -> Any:
    """A small tensor that was born under inference mode as one that autograd takes; tuples likewise."""
    if isinstance(value, Tensor):
        small = value.is_inference() and value.numel() <= _SMALL
        return stand_ins.setdefault(id(value), value.clone()) if small else value
    if type(value) is tuple and len(value) <= _FEW:
        items = tuple(_usable(item, stand_ins) for item in value)
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value


def _parameter(parameter: Tensor) -> Tensor:
    statistic = parameter.ndim < 2 and not parameter.requires_grad
    return as_stand_in(_buffer(parameter) if statistic else full_precision(parameter), parameter)


def _copied_parameter(parameter: Tensor) -> Tensor:
    return as_stand_in(full_precision(parameter).clone(), parameter)


def _buffer(tensor: Tensor) -> Tensor:
    stand_in = full_precision(tensor)
    return stand_in.clone() if tensor.numel() <= _SMALL else stand_in
