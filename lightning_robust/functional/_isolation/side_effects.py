"""What passes through somebody else's network leave behind besides outputs, and how to take it back."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

_INTERNALS = frozenset(vars(nn.Module()))
_CONTAINERS = (dict, list, set, deque)
_MANY_ITEMS = 10_000  # what holds more is data rather than something that a forward pass keeps
_MANY_ELEMENTS = 2**24
_deeply: set[int] = set()  # modules whose nested contents are being looked after


@contextmanager
def side_effects_reverted(modules: list[nn.Module]) -> Iterator[None]:
    """Take back what forward passes do to these modules.

    That is what they assign to buffers, submodules and attributes, and what they put into lists, dictionaries and the
    like among these. The outermost of several contexts also takes back what they write into tensors and arrays that are
    attributes, do to nested containers, and draw from generators (of up to 10,000 items and 2²⁴ elements each). What it
    does not look into: objects of other classes, and parameters.
    """
    with ExitStack() as undo:
        for module in modules:
            for attributes in (vars(module), module._buffers, module._modules):
                undo.callback(_assign, attributes, dict(attributes.items()))  # of a scripted module no dictionaries
            for key, value in vars(module).items():
                if key not in _INTERNALS and isinstance(value, _CONTAINERS):
                    undo.callback(_refill, value, _contents(value))
        new = [module for module in modules if id(module) not in _deeply]
        _deeply.update(map(id, new))
        undo.callback(_deeply.difference_update, set(map(id, new)))
        for step in _deep_steps(value for m in new for key, value in vars(m).items() if key not in _INTERNALS):
            undo.callback(step)
        yield


def _assign(attributes: Any, earlier: dict[str, Any]) -> None:
    now = dict(attributes.items())
    for key in {*now, *earlier}:
        if key not in earlier:
            del attributes[key]
        elif key not in now or now[key] is not earlier[key]:
            attributes[key] = earlier[key]


def _deep_steps(values: Iterable[Any]) -> Iterator[Callable[[], object]]:
    """Steps that give containers within containers, tensors, arrays and generators the contents that they have now."""
    numpy: Any = sys.modules.get("numpy")
    pending, seen = list(values), set[int]()
    while pending:
        value = pending.pop()
        if isinstance(value, str | int | float) or value is None or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (*_CONTAINERS, tuple)):
            if len(value) <= _MANY_ITEMS:
                items = dict.values(value) if isinstance(value, dict) else value
                yield from (partial(_refill, item, _contents(item)) for item in items if isinstance(item, _CONTAINERS))
                pending.extend(items)
        elif type(value) is Tensor:
            plain = value.layout == torch.strided and not (value.is_meta or value.is_quantized or value.is_inference())
            if plain and value.numel() <= _MANY_ELEMENTS:
                yield partial(_rewrite, value.detach(), value.detach().clone())
        elif isinstance(value, torch.Generator):
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            yield partial(value.setstate, value.getstate())
        elif numpy is not None and isinstance(value, numpy.random.Generator):
            yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif numpy is not None and isinstance(value, numpy.ndarray) and _may_change(value):
            yield partial(value.__setitem__, ..., value.copy())


def _may_change(array: Any) -> bool:
    """Whether an array can be written to, and is none of many elements."""
    return bool(array.flags.writeable) and array.size <= _MANY_ELEMENTS


def _contents(container: Any) -> list[Any]:
    return list(dict.items(container)) if isinstance(container, dict) else list(container)


def _refill(container: Any, contents: list[Any]) -> None:
    """Put the contents back, if they are others, by the methods of the class underneath: its own may refuse."""
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


def _rewrite(tensor: Tensor, contents: Tensor) -> None:
    if not torch.equal(tensor, contents):
        tensor.copy_(contents)


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
