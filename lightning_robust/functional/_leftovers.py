"""What passes through somebody else's network leave behind besides outputs, and how to take it back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_INTERNALS = frozenset(vars(nn.Module()))


@contextmanager
def without_leftovers(modules: list[nn.Module]) -> Iterator[None]:
    """Take back what forward passes assign to buffers and attributes, and what they put into lists and dictionaries."""
    places = [attributes for module in modules for attributes in (vars(module), module._buffers)]
    before = [dict(attributes.items()) for attributes in places]  # of a scripted module they are no dictionaries
    containers = [
        (value, value.copy())
        for module in modules
        for key, value in vars(module).items()
        if key not in _INTERNALS and isinstance(value, dict | list | set)
    ]
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
        for container, contents in containers:
            container.clear()
            container.extend(contents) if isinstance(container, list) else container.update(contents)


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
