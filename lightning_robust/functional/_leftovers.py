"""What passes through somebody else's network leave behind besides outputs, and how to take it back."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_INTERNALS = frozenset(vars(nn.Module()))


@contextmanager
def without_leftovers(modules: list[nn.Module]) -> Iterator[None]:
    """Take back what forward passes do to buffers and attributes of these modules, and to what attributes hold.

    That is what they assign to attributes, write into tensors that are attributes, put into lists, dictionaries and the
    like, nested or not, and draw from generators. Parameters are not looked after here.
    """
    places = [attributes for module in modules for attributes in (vars(module), module._buffers)]
    before = [dict(attributes.items()) for attributes in places]  # of a scripted module they are no dictionaries
    kept = [value for module in modules for key, value in vars(module).items() if key not in _INTERNALS]
    tensors = [value for value in kept if type(value) is Tensor and not value.is_inference()]
    contents = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors]
    seen: set[int] = set()
    undo = [step for value in kept for step in _undoing(value, seen)]
    try:
        yield
    finally:
        for attributes, earlier in zip(places, before, strict=True):
            now = dict(attributes.items())
            for key in {*now, *earlier}:
                if key not in earlier:
                    del attributes[key]
                elif key not in now or now[key] is not earlier[key]:
                    attributes[key] = earlier[key]
        for step in undo:
            step()
        for tensor, version, copy in contents:
            if tensor._version != version:
                tensor.detach().copy_(copy)


def _undoing(value: Any, seen: set[int]) -> Iterator[Callable[[], object]]:
    """Steps that give a container the items, and a generator the state, that it has now."""
    if isinstance(value, dict | list | set | deque | tuple):
        if id(value) in seen:
            return
        seen.add(id(value))
        if not isinstance(value, tuple):
            yield partial(_refill, value, value.copy())
        for item in value.values() if isinstance(value, dict) else value:
            if not isinstance(item, str | int | float | Tensor):
                yield from _undoing(item, seen)
    elif isinstance(value, torch.Generator):
        yield partial(value.set_state, value.get_state())
    elif isinstance(value, random.Random):
        yield partial(value.setstate, value.getstate())
    elif hasattr(type(value), "bit_generator"):  # of NumPy, which need not be there
        yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    container.extend(contents) if isinstance(container, list | deque) else container.update(contents)


@contextmanager
def without_backward_hooks(modules: list[nn.Module]) -> Iterator[None]:
    """Do not call hooks on backward passes."""
    hooked = [
        (module, name, vars(module)[name])
        for module in modules
        for name in ("_backward_hooks", "_backward_pre_hooks")
        if vars(module).get(name)
    ]
    for module, name, _ in hooked:
        vars(module)[name] = OrderedDict()
    try:
        yield
    finally:
        for module, name, hooks in hooked:
            vars(module)[name] = hooks
