"""What modules hold besides parameters and buffers: attributes, and what is in containers among them."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

_INTERNALS = frozenset(vars(nn.Module()))
CONTAINERS = (dict, list, set, deque)
_MANY_ITEMS = 10_000  # a container of more holds data rather than what a forward pass keeps


def get(container: Any, key: Any) -> Any:
    return _base(container).__getitem__(container, key)


def put(value: object, places: Iterable[tuple[Any, Any]]) -> None:
    for container, key in places:
        _base(container).__setitem__(container, key, value)


def _base(container: Any) -> Any:
    """The built-in class whose methods to use: those of a subclass may refuse."""
    return next(kind for kind in CONTAINERS if isinstance(container, kind))


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The attributes that are neither parameters, buffers, submodules nor hooks."""
    return {key: value for key, value in vars(module).items() if key not in _INTERNALS}


def items_of(container: Any) -> Iterator[Any]:
    """What a container holds, if it is not many."""
    if len(container) <= _MANY_ITEMS:
        yield from dict.values(container) if isinstance(container, dict) else container


def places_in(modules: list[nn.Module], containers: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Where something can be replaced: a dictionary and a key, or a list and an index."""
    for module in modules:
        yield from ((vars(module), key) for key in list(attributes_of(module)))
    for container in containers:
        if isinstance(container, dict):
            yield from ((container, key) for key in list(dict.keys(container)))
        elif isinstance(container, list | deque):
            yield from ((container, index) for index in range(len(container)))


def with_containers(values: Iterable[Any]) -> Iterator[Any]:
    """The containers and tuples among ``values``, and those inside them."""
    pending, seen = list(values), set[int]()
    while pending:
        value = pending.pop()
        if isinstance(value, (*CONTAINERS, tuple)) and id(value) not in seen:
            seen.add(id(value))
            yield value
            pending.extend(items_of(value))


def values_of(modules: list[nn.Module], containers: list[Any]) -> Iterator[Any]:
    """Parameters, buffers and attributes of modules, and what containers hold."""
    for module in modules:
        for held in (module._parameters, module._buffers, attributes_of(module)):
            yield from held.values()
    for container in containers:
        yield from items_of(container)


def assign(attributes: Any, earlier: dict[str, Any]) -> None:
    now = dict(attributes.items())
    for key in {*now, *earlier}:
        if key not in earlier:
            del attributes[key]
        elif key not in now or now[key] is not earlier[key]:
            attributes[key] = earlier[key]


def contents_of(container: Any) -> list[Any]:
    return list(dict.items(container)) if isinstance(container, dict) else list(container)


def refill(container: Any, contents: list[Any]) -> None:
    """Put the contents back if others are there, by methods of the built-in class: those of a subclass may refuse."""
    now = contents_of(container)
    if isinstance(container, dict):
        if len(now) != len(contents) or not all(
            a is c and b is d for (a, b), (c, d) in zip(now, contents, strict=True)
        ):
            base: Any = OrderedDict if isinstance(container, OrderedDict) else dict
            base.clear(container)
            for key, value in contents:
                base.__setitem__(container, key, value)
    elif len(now) == len(contents) and all(map(is_, now, contents)):
        return
    elif isinstance(container, list):
        list.__setitem__(container, slice(None), contents)
    elif isinstance(container, set):
        set.clear(container)
        set.update(container, contents)
    else:
        deque.clear(container)
        deque.extend(container, contents)


def storages(values: Iterable[object]) -> Iterator[tuple[int, UntypedStorage]]:
    """The storage of each tensor, by its identity; sparse, nested and similar tensors have none."""
    for tensor in values:
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_nested):
            storage = tensor.untyped_storage()
            yield storage._cdata, storage
