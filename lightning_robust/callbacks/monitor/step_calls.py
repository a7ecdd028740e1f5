"""Notes what modules are called with and what they return, a few numbers of each row.

Rows are compared by value, so that samples are found again wherever they stand: a step may permute, filter or split its
batch, or pass the labels first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import islice
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_robust.functional._isolation.stand_ins import plain_tensor
from lightning_robust.functional._validation.scales import magnitudes

_ENTRIES = 1024  # of each row that are kept
_TENSORS = 16  # of the arguments, and of the outputs, of a call that are looked at
_MOST_CALLS, _MOST_ROWS = 64, 4096  # of one module that are kept


class Rows(NamedTuple):
    """A tensor with rows.

    Attributes:
        shape: Of the tensor, (rows, ...).
        values: Entries of the first 4,096 rows, (rows, at most 1,024), the same places in all tensors of a shape.
    """

    shape: torch.Size
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Rows:
        """Copy what is compared: the tensor may be overwritten later."""
        rows = plain_tensor(tensor.detach())[:_MOST_ROWS]
        inner = rows.shape[1:]
        size = inner.numel()
        if size <= _ENTRIES:
            return cls(tensor.shape, rows.reshape(len(rows), size).clone())
        places = torch.arange(_ENTRIES, device=rows.device) * (size - 1) // (_ENTRIES - 1)
        everywhere: tuple[Any, ...] = (slice(None), *torch.unravel_index(places, inner))
        return cls(tensor.shape, rows[everywhere])

    @property
    def are_all(self) -> bool:
        """Whether no row was left out."""
        return len(self.values) == self.shape[0]

    def comparable(self, other: Rows) -> bool:
        """Whether rows of both have one shape."""
        return self.shape[1:] == other.shape[1:]

    def equal(self, others: Rows, *, tolerance: float) -> Tensor:
        """Which rows (n) are equal to which others (m), (n, m), bool. Integers must be the same, whatever their size.

        Args:
            others: Rows of the same shape.
            tolerance: By how much they may differ, as a share of their size.
        """
        exact = not (self.values.is_floating_point() or others.values.is_floating_point())
        a, b = (rows.values.cpu().double() for rows in (self, others))
        if not a.shape[1] or not len(a) or not len(b):
            return torch.ones(len(a), len(b), dtype=torch.bool)
        a_finite, b_finite = a.isfinite(), b.isfinite()
        a, b = a.masked_fill(~a_finite, 0), b.masked_fill(~b_finite, 0)
        a_size, b_size = magnitudes(a), magnitudes(b)

        def row(i: int) -> Tensor:
            allowed = 0.0 if exact else tolerance * torch.maximum(a_size[i], b_size)
            return (((a[i] - b).abs() <= allowed) | ~(a_finite[i] & b_finite)).all(dim=1)

        return torch.stack([row(i) for i in range(len(a))])


class Call(NamedTuple):
    """One call of a module.

    Attributes:
        arguments: Their names.
        inputs: Tensors with rows among them, by name.
        outputs: Tensors with rows that it returned, by name.
    """

    arguments: frozenset[str]
    inputs: dict[str, Rows]
    outputs: dict[str, Rows]


@dataclass
class Calls:
    """Calls of the modules that were listened to.

    Attributes:
        of: By name of the module, in the order of first calls.
        cut: Modules of whose calls only the first were kept.
        error: What went wrong while listening, if anything did. It must not reach the caller of the module.
    """

    of: dict[str, list[Call]] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    error: Exception | None = None


class Listener:
    """Listens to modules until it is stopped. Modules that take no hook are left out.

    Args:
        modules: By name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.calls = Calls()
        self._handles: list[RemovableHandle] = []
        try:
            for name, module in modules.items():
                if takes_hooks(module):
                    hook = _Hook(name, self.calls, _signature(module))
                    self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def takes_hooks(module: nn.Module) -> bool:
    """Whether a hook would be called and harmless: scripted modules refuse hooks, compiled ones are compiled anew."""
    return not isinstance(module, torch.jit.ScriptModule) and not hasattr(module, "_orig_mod")


class _Hook:
    """A forward hook that notes calls. In copies of the module, also pickled ones, it does nothing."""

    def __init__(self, name: str = "", calls: Calls | None = None, signature: inspect.Signature | None = None) -> None:
        self._name, self._calls, self._signature = name, calls, signature

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Hook, ())

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        if self._calls is None or self._calls.error is not None:
            return
        try:
            self._note(self._calls, args, kwargs, outputs)
        except Exception as error:
            self._calls.error = error

    def _note(self, calls: Calls, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        known = calls.of.setdefault(self._name, [])
        rows = sum(max((len(found.values) for found in call.inputs.values()), default=0) for call in known)
        if len(known) >= _MOST_CALLS or rows >= _MOST_ROWS:
            calls.cut.add(self._name)
            return
        named = _named(self._signature, args, kwargs)
        known.append(Call(frozenset(named), _rows_inside(named), _rows_inside({"": outputs})))
        if not all(found.are_all for found in known[-1].inputs.values()):
            calls.cut.add(self._name)


def _signature(module: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):  # of a kind that leaves no signature
        return None


def _named(signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; by position where that is unknown."""
    by_position = {**{str(number): value for number, value in enumerate(args)}, **kwargs}
    if signature is None:
        return by_position
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:  # `forward` was another function for this call
        return by_position
    rest = [name for name, parameter in signature.parameters.items() if parameter.kind == parameter.VAR_KEYWORD]
    others = bound.arguments.pop(rest[0], {}) if rest else {}
    return {**bound.arguments, **others}


def _rows_inside(values: Mapping[str, Any]) -> dict[str, Rows]:
    found = ((name, tensor) for key, value in values.items() for name, tensor in _tensors(key, value))
    return {name: Rows.of(tensor) for name, tensor in islice(found, _TENSORS)}


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors with rows inside a value, with names."""
    inside: dict[Any, Any] = {}
    if isinstance(value, Tensor):
        if _is_plain(value):
            yield name, value
    elif isinstance(value, Mapping):
        inside = dict(value)
    elif isinstance(value, tuple | list):
        inside = dict(enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        inside = {entry.name: getattr(value, entry.name) for entry in fields(value)}
    elif isinstance(value, SimpleNamespace):
        inside = vars(value)
    for key, item in inside.items():
        yield from _tensors(f"{name}.{key}" if name else str(key), item)


def _is_plain(tensor: Tensor) -> bool:
    """Whether rows of real numbers can be taken from it."""
    if tensor.ndim == 0 or tensor.is_complex() or tensor.is_quantized or tensor.is_nested:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # no copy may leave the function that is mapped
        return False
    return tensor.layout == torch.strided and tensor.device.type != "meta"


def partners(name: str, of: Mapping[str, Rows], others: Mapping[str, Rows]) -> list[Rows]:
    """What may hold the rows of a tensor in another call: that of the same name, else all whose name is new there."""
    found = [others[name]] if name in others else [rows for key, rows in others.items() if key not in of]
    return [rows for rows in found if rows.comparable(of[name])]
