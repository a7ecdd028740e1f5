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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_robust.functional._isolation.arrays import ArrayCopies
from lightning_robust.functional._isolation.holdings import (
    assign,
    attributes_of,
    contents_of,
    refill,
    storages,
    values_of,
    with_containers,
)

_LARGE_STORAGE = 2**26  # bytes
_UNDECLARED_WRITES = frozenset({"running_mean", "running_var"})  # of batch normalisation in train mode


class SideEffects(TorchDispatchMode):
    """A record of modules' attributes, and of what is kept in them, to which they can be set back."""

    supports_higher_order_operators = True

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules = {id(module) for module in modules}
        containers = list(with_containers(value for module in modules for value in attributes_of(module).values()))
        self._contents: dict[int, tuple[UntypedStorage, UntypedStorage]] = {}  # of storages that passes write to
        self._guarded = dict(storages(values_of(modules, containers)))  # held, so that no other has their identity
        self.backward_seen = False
        self._arrays = ArrayCopies(modules, containers)  # after what may fail on unusual tensors
        self._steps: list[Callable[[], object]] = []
        for module in modules:
            for attributes in (vars(module), module._buffers, module._modules):
                # those of a scripted module are not dictionaries
                self._steps.append(partial(assign, attributes, dict(attributes.items())))
        mutable = [container for container in containers if not isinstance(container, tuple)]
        self._steps += [partial(refill, container, contents_of(container)) for container in mutable]
        self._steps += _generator_steps(values_of(modules, containers))

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
            for key, storage in storages(tree_leaves(args[place] if place < len(args) else kwargs.get(name))):
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


_records: list[SideEffects] = []  # of the contexts that are open, outermost first
_afterwards: list[Callable[[], object]] = []  # steps that belong to the state to which passes are undone


def start_anew() -> None:
    """Undo what passes have done so far, to all modules that a context looks after."""
    with ExitStack() as steps:
        for step in reversed(_afterwards):
            steps.callback(step)
        for record in _records:
            steps.callback(record.revert)


@contextmanager
def side_effects_reverted(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Undo what passes before and inside have done, also to modules that an outer context looks after."""
    known = {module for record in _records for module in record.modules}
    new = [module for module in modules if id(module) not in known]
    with ExitStack() as stack:
        stack.callback(start_anew)
        start_anew()
        if new:
            record = SideEffects(new)
            stack.callback(record.close)
            _records.append(record)
            stack.callback(_records.pop)
        yield


@contextmanager
def each_time(step: Callable[[], object]) -> Iterator[None]:
    """Take a step now, and whenever side effects have been undone."""
    _afterwards.append(step)
    try:
        start_anew()
        yield
    finally:
        _afterwards.remove(step)
        start_anew()


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
