"""What forward passes do to somebody else's network besides returning outputs, and how to take it back.

Passes cache features, count, fill tables on demand, append to lists and draw random numbers. All of it is taken back
after each measurement function, so that the numbers do not depend on what was measured before, and nothing else is:

- **Attributes, buffers, submodules and containers** are compared by identity, and put back where they differ.
- **Tensors**, wherever they are kept, are guarded by copies that are made the moment a pass is about to write to them.
  The first pass runs under a dispatch mode that sees every operator whose schema writes to an argument. So a tensor
  that passes do not write to is never copied and never written to: predictions kept in a list, memory-mapped tables,
  tensors that other threads write to. A tensor that only some later pass writes to goes unnoticed.
- **NumPy arrays** have no such operators. Small writable ones are replaced by copies for the time being.
- **Random generators** are set back to the state that they had.

What it does not look into: objects of other classes, arrays of more than 2¹⁶ elements or in tuples, containers of more
than 10,000 items inside others.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
_INTERNALS = frozenset(vars(nn.Module()))
_CONTAINERS = (dict, list, set, deque)
_MANY_ITEMS = 10_000  # a container of more holds data rather than what a forward pass keeps
_SMALL_ARRAY, _SMALL_ARRAYS = 2**16, 2**20  # elements of an array that is copied, and of all of them together
_UNDECLARED_WRITES = frozenset({"running_mean", "running_var"})  # of batch normalisation in train mode


class SideEffects:
    """A record of how modules were, to which they can be set back.

    Args:
        modules: Whose attributes, and what is kept in them, are looked after.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = {id(module) for module in modules}
        self.written: dict[int, tuple[UntypedStorage, UntypedStorage]] = {}  # and what it held before, by identity
        self._steps: list[Callable[[], object]] = []
        self._arrays = _ArrayCopies(modules)
        for module in modules:
            for attributes in (vars(module), module._buffers, module._modules):
                # those of a scripted module are no dictionaries
                self._steps.append(partial(_assign, attributes, dict(attributes.items())))
            own = [value for key, value in vars(module).items() if key not in _INTERNALS]
            self._steps += [
                partial(_refill, value, _contents(value)) for value in own if isinstance(value, _CONTAINERS)
            ]
            self._steps += _steps_within(own)

    def revert(self) -> None:
        """Take back what passes have done so far."""
        for step in reversed(self._steps):
            step()
        for storage, contents in self.written.values():
            storage.copy_(contents)
        self._arrays.refresh()

    def close(self) -> None:
        """Take it back for good."""
        self.revert()
        self._arrays.put_back()


_records: list[SideEffects] = []  # of the contexts that are open, outermost first
_watch_next_pass = False


@contextmanager
def side_effects_reverted(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Take back what forward passes inside have done, also to modules that an outer context looks after."""
    global _watch_next_pass  # noqa: PLW0603
    known = {module for record in _records for module in record.modules}
    new = [module for module in modules if id(module) not in known]
    if new:
        _records.append(SideEffects(new))
    _watch_next_pass = True
    try:
        yield
    finally:
        if new:
            _records.pop().close()
        for record in _records:
            record.revert()
        _watch_next_pass = True


def call(function: Callable[..., T], *args: object) -> T:
    """Make a forward pass; the first one in a context finds out to which tensors passes write."""
    global _watch_next_pass  # noqa: PLW0603
    if not _records or not _watch_next_pass:
        return function(*args)
    _watch_next_pass = False
    with _CopiesBeforeWriting(_records[-1].written, args):
        return function(*args)


class _CopiesBeforeWriting(TorchDispatchMode):
    """Copies each storage that was there before, the moment an operator is about to write to it."""

    supports_higher_order_operators = True

    def __init__(self, copies: dict[int, tuple[UntypedStorage, UntypedStorage]], own: object) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._copies = copies
        self._new = {key: _weak(storage) for key, storage in _storages(own)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in _written_arguments(func, args, kwargs):
            for key, storage in _storages(value):
                if key not in self._new and key not in self._copies:
                    self._copies[key] = storage, storage.clone()  # type: ignore[no-untyped-call]
        outputs = func(*args, **kwargs)
        given = {key for key, _ in _storages((args, kwargs))}
        # a weak reference keeps the address, so that no later storage is taken for this one
        self._new |= {key: _weak(s) for key, s in _storages(outputs) if key not in given and key not in self._new}
        return outputs


def _weak(storage: UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _written_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Values of the arguments to which an operator writes, by its schema."""
    schema = getattr(func, "_schema", None)
    for place, argument in enumerate(schema.arguments if schema is not None else ()):
        declared = argument.alias_info is not None and argument.alias_info.is_write
        if declared or argument.name in _UNDECLARED_WRITES:
            yield args[place] if place < len(args) else kwargs.get(argument.name)


def _storages(values: object) -> Iterator[tuple[int, UntypedStorage]]:
    """The storage of each tensor, by its identity; sparse and similar tensors have none."""
    for tensor in tree_leaves(values):
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta:
            storage = tensor.untyped_storage()
            yield storage._cdata, storage


class _ArrayCopies:
    """Copies that take the places of small writable arrays, so that passes write to those."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._places: list[tuple[Any, Any, Any, Any]] = []  # container, key, array, copy
        numpy: Any = sys.modules.get("numpy")
        left = _SMALL_ARRAYS
        for container in _with_containers(vars(module) for module in modules) if numpy is not None else ():
            items = dict.items(container) if isinstance(container, dict) else enumerate(container)
            for key, value in list(items) if isinstance(container, dict | list) else ():
                if type(value) is numpy.ndarray and value.flags.writeable and value.size <= min(left, _SMALL_ARRAY):
                    left -= value.size
                    self._places.append((container, key, value, value.copy()))
        for container, key, _, copy in self._places:
            _set_item(container, key, copy)

    def refresh(self) -> None:
        for _, _, array, copy in self._places:
            copy[...] = array

    def put_back(self) -> None:
        for container, key, array, _ in self._places:
            _set_item(container, key, array)


def _set_item(container: Any, key: Any, value: Any) -> None:
    """Bypass what the container's own class makes of it."""
    (dict if isinstance(container, dict) else list).__setitem__(container, key, value)


def _with_containers(values: Iterable[Any]) -> Iterator[Any]:
    """Containers, and those inside them."""
    pending, seen = list(values), set[int]()
    while pending:
        value = pending.pop()
        if id(value) in seen or not isinstance(value, (*_CONTAINERS, tuple)):
            continue
        seen.add(id(value))
        yield value
        items = dict.values(value) if isinstance(value, dict) else value
        if len(value) <= _MANY_ITEMS:
            pending.extend(item for item in items if isinstance(item, (*_CONTAINERS, tuple)))


def _steps_within(values: list[Any]) -> Iterator[Callable[[], object]]:
    """Steps that give containers within containers, and generators, the contents that they have now."""
    numpy: Any = sys.modules.get("numpy")
    generators = list(values)
    for container in _with_containers(values):
        items = list(dict.values(container) if isinstance(container, dict) else container)
        if len(items) <= _MANY_ITEMS:
            yield from (partial(_refill, item, _contents(item)) for item in items if isinstance(item, _CONTAINERS))
            generators += items
    for value in generators:
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
