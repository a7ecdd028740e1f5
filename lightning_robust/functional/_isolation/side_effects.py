"""Reverts what passes through a user's network do besides returning outputs and gradients.

Passes cache features, count, fill tables on demand, append to lists and draw random numbers. All of it is reverted
after each measurement function, so that numbers do not depend on what was measured before, and nothing else is:

- **Attributes, buffers, submodules and containers** are compared by identity, and put back where they differ.
- **Tensors** in any of these are copied the moment a pass is about to write to them: forward passes, and the first
  backward pass, run under a dispatch mode that sees every operator whose schema writes to an argument. Tensors that
  passes do not write to are never copied and never written to: predictions kept in a list, memory-mapped tables,
  tensors that other threads write to.
- **NumPy arrays** have no such operators. Small ones that nothing else holds are replaced by copies for the time being.
- **Random generators** are set back.

It does not revert what passes do to objects of other classes, to storages of more than 2²⁶ bytes, to a tensor through
NumPy, from a thread of their own or in later backward passes, or to arrays that are large, views, in tuples, or held by
something else, too.

Cost: some microseconds per operator of a forward pass.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_INTERNALS = frozenset(vars(nn.Module()))
_CONTAINERS = (dict, list, set, deque)
_MANY_ITEMS = 10_000  # a container of more holds data rather than what a forward pass keeps
_LARGE_STORAGE = 2**26  # bytes
_LARGE_ARRAYS = 2**18  # elements of all of them together, the smallest ones first
_UNDECLARED_WRITES = frozenset({"running_mean", "running_var"})  # of batch normalisation in train mode


class SideEffects(TorchDispatchMode):
    """A record of modules' attributes, and of what is kept in them, to which they can be set back."""

    supports_higher_order_operators = True

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules = {id(module) for module in modules}
        containers = list(_with_containers(value for module in modules for value in _attributes(module).values()))
        self._contents: dict[int, tuple[UntypedStorage, UntypedStorage]] = {}  # of storages that passes write to
        self._guarded = dict(_storages(_values(modules, containers)))  # held, so that no other has their identity
        self.backward_seen = False
        self._arrays = _ArrayCopies(modules, containers)  # after what may fail on unusual tensors
        self._steps: list[Callable[[], object]] = []
        for module in modules:
            for attributes in (vars(module), module._buffers, module._modules):
                # those of a scripted module are not dictionaries
                self._steps.append(partial(_assign, attributes, dict(attributes.items())))
        mutable = [container for container in containers if not isinstance(container, tuple)]
        self._steps += [partial(_refill, container, _contents(container)) for container in mutable]
        self._steps += _generator_steps(_values(modules, containers))

    def revert(self) -> None:
        """Undo what passes have done so far; where one step fails, the others are taken."""
        self.backward_seen = False
        with ExitStack() as steps:
            steps.callback(self._arrays.refresh)
            for step in self._steps:
                steps.callback(step)
            for storage, contents in self._contents.values():
                if storage.nbytes() == contents.nbytes():  # otherwise it is a workspace that passes resize
                    steps.callback(storage.copy_, contents)

    def close(self) -> None:
        """Revert, and put the user's own arrays back."""
        try:
            self.revert()
        finally:
            self._arrays.put_back()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, name in _written_arguments(func):
            for key, storage in _storages(tree_leaves(args[place] if place < len(args) else kwargs.get(name))):
                if key in self._guarded and key not in self._contents and storage.nbytes() <= _LARGE_STORAGE:
                    self._contents[key] = storage, storage.clone()  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


@cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments to which an operator writes, by its schema."""
    schema = getattr(func, "_schema", None)
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments if schema is not None else ())
        if (argument.alias_info is not None and argument.alias_info.is_write) or argument.name in _UNDECLARED_WRITES
    )


def _storages(values: Iterable[object]) -> Iterator[tuple[int, UntypedStorage]]:
    """The storage of each tensor, by its identity; sparse, nested and similar tensors have none."""
    for tensor in values:
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_nested):
            storage = tensor.untyped_storage()
            yield storage._cdata, storage


_records: list[SideEffects] = []  # of the contexts that are open, outermost first


@contextmanager
def side_effects_reverted(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Undo what passes inside have done, also to modules that an outer context looks after."""
    known = {module for record in _records for module in record.modules}
    new = [module for module in modules if id(module) not in known]
    with ExitStack() as stack:
        for record in _records:
            stack.callback(record.revert)
        if new:
            record = SideEffects(new)
            stack.callback(record.close)
            _records.append(record)
            stack.callback(_records.pop)
        yield


@contextmanager
def watched() -> Iterator[None]:
    """Guard what a pass inside writes to; where nothing is to be reverted, do nothing."""
    with ExitStack() as modes:
        for record in _records:
            modes.enter_context(record)
        yield


@contextmanager
def watched_once() -> Iterator[None]:
    """Guard what a backward pass inside writes to, the first time since side effects were reverted.

    A mode that sees every operator costs some 10 % of the many backward passes, and few hooks write to anything.
    """
    unwatched = [record for record in _records if not record.backward_seen]
    with ExitStack() as modes:
        for record in unwatched:
            record.backward_seen = True
            modes.enter_context(record)
        yield


class _ArrayCopies:
    """Copies that take the places of arrays, so that passes write to those.

    Arrays stay where they are if they share memory or if something else holds them, too: passes would write to one and
    read the other, and what other threads write would be lost.
    """

    def __init__(self, modules: list[nn.Module], containers: list[Any]) -> None:
        self._copies: list[tuple[Any, Any, list[tuple[Any, Any]]]] = []  # array, copy, places
        numpy: Any = sys.modules.get("numpy")
        if numpy is None:
            return
        places: dict[int, list[tuple[Any, Any]]] = {}  # container and key, by the identity of the array
        for container, key in _places(modules, containers):
            value = _get(container, key)
            if type(value) is numpy.ndarray and value.flags.writeable and value.flags.owndata:
                places.setdefault(id(value), []).append((container, key))
        if not places:
            return
        shared = {storage.data_ptr() for _, storage in _storages(_values(modules, containers))}
        shared |= {id(value.base) for value in _values(modules, containers) if isinstance(value, numpy.ndarray)}
        del value  # lest it count as a holder
        left = _LARGE_ARRAYS
        for held in sorted(places.values(), key=lambda held: _get(*held[0]).size):
            array = _get(*held[0])
            alone = sys.getrefcount(array) == len(held) + 2  # the variable, and the argument of the call
            if alone and not shared & {id(array), array.ctypes.data} and array.size <= left:
                left -= array.size
                self._copies.append((array, array.copy(), held))
        for _, copy, held in self._copies:
            _put(copy, held)

    def refresh(self) -> None:
        for array, copy, _ in self._copies:
            copy[...] = array

    def put_back(self) -> None:
        for array, _, held in self._copies:
            _put(array, held)


def _get(container: Any, key: Any) -> Any:
    return _base(container).__getitem__(container, key)


def _put(value: object, places: Iterable[tuple[Any, Any]]) -> None:
    for container, key in places:
        _base(container).__setitem__(container, key, value)


def _base(container: Any) -> Any:
    """The built-in class whose methods to use: those of a subclass may refuse."""
    return next(kind for kind in _CONTAINERS if isinstance(container, kind))


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes that are neither parameters, buffers, submodules nor hooks."""
    return {key: value for key, value in vars(module).items() if key not in _INTERNALS}


def _items(container: Any) -> Iterator[Any]:
    """What a container holds, if it is not many."""
    if len(container) <= _MANY_ITEMS:
        yield from dict.values(container) if isinstance(container, dict) else container


def _places(modules: list[nn.Module], containers: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Where something can be replaced: a dictionary and a key, or a list and an index."""
    for module in modules:
        yield from ((vars(module), key) for key in list(_attributes(module)))
    for container in containers:
        if isinstance(container, dict):
            yield from ((container, key) for key in list(dict.keys(container)))
        elif isinstance(container, list | deque):
            yield from ((container, index) for index in range(len(container)))


def _with_containers(values: Iterable[Any]) -> Iterator[Any]:
    """The containers and tuples among ``values``, and those inside them."""
    pending, seen = list(values), set[int]()
    while pending:
        value = pending.pop()
        if isinstance(value, (*_CONTAINERS, tuple)) and id(value) not in seen:
            seen.add(id(value))
            yield value
            pending.extend(_items(value))


def _values(modules: list[nn.Module], containers: list[Any]) -> Iterator[Any]:
    """Parameters, buffers and attributes of modules, and what containers hold."""
    for module in modules:
        for held in (module._parameters, module._buffers, _attributes(module)):
            yield from held.values()
    for container in containers:
        yield from _items(container)


def _generator_steps(values: Iterable[Any]) -> Iterator[Callable[[], object]]:
    """Steps that set random generators back to the state that they have now."""
    numpy: Any = sys.modules.get("numpy")
    for value in values:
        if isinstance(value, torch.Generator):
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            yield partial(value.setstate, value.getstate())
        elif numpy is not None and isinstance(value, numpy.random.Generator):
            yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)


def _assign(attributes: Any, earlier: dict[str, Any]) -> None:
    now = dict(attributes.items())
    for key in {*now, *earlier}:
        if key not in earlier:
            del attributes[key]
        elif key not in now or now[key] is not earlier[key]:
            attributes[key] = earlier[key]


def _contents(container: Any) -> list[Any]:
    return list(dict.items(container)) if isinstance(container, dict) else list(container)


def _refill(container: Any, contents: list[Any]) -> None:
    """Put the contents back if others are there, by methods of the built-in class: those of a subclass may refuse."""
    now = _contents(container)
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
