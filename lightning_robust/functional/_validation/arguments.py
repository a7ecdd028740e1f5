"""Checks of arguments of any kind. Each error says what was expected and what was given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
V = TypeVar("V")
S = TypeVar("S", bound=str)

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST_INTEGER = 2**63 - 1  # that torch takes
_LONGEST_REPR = 200


def expected_but_got(name: str, expected: str, value: object) -> str:
    """The text of an error: shows the value if its repr is short, else its type; of tensors type and shape."""
    return f"Expected argument `{name}` to be {expected}, but got {_shown(value)}."


def _shown(value: object) -> str:
    if isinstance(value, Tensor) and value.ndim > 1:
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    try:
        text = repr(value)
    except Exception:  # Python does not print integers of thousands of digits
        text = ""
    if 0 < len(text) <= _LONGEST_REPR:
        return text
    too_long = f"{type(value).__name__} too long to show"
    return f"{too_long}, of shape {tuple(value.shape)}" if isinstance(value, Tensor) else too_long


def class_of(value: object) -> str:
    """Name of a value's class, or of the class that the value is."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def as_number(value: object) -> float:
    """A real number as a float; NaN for anything else, including booleans and integers too large for a float."""
    value = plain(value) if isinstance(value, Tensor) and value.ndim == 0 else value
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def as_numbers(value: object) -> list[float] | None:
    """The entries of a flat sequence, tensor or array, each as :func:`as_number`; None for text or any other value."""
    entries = as_sequence(value)
    return None if entries is None else [as_number(entry) for entry in entries]


def as_sequence(value: object) -> Sequence[object] | None:
    """A list, tuple or other sequence (configuration files bring their own), tensor or array; None for anything else.

    Text and bytes do not count: they would be sequences of letters.
    """
    entries = plain(value)
    return entries if isinstance(entries, Sequence) and not isinstance(entries, str | bytes | bytearray) else None


def plain(value: object) -> object:
    """Convert tensors and arrays to Python lists or numbers; None for tensors of complex numbers or booleans."""
    if isinstance(value, Tensor) and (value.is_complex() or value.dtype == torch.bool):
        return None
    to_list: Any = None if isinstance(value, type) else getattr(value, "tolist", None)
    return to_list() if callable(to_list) else value


def optional(
    check: Callable[Concatenate[str, V, P], T], name: str, value: V | None, *args: P.args, **options: P.kwargs
) -> T | None:
    """Return what a check makes of ``value``; None if that is None."""
    return None if value is None else check(name, value, *args, **options)


def check_number(
    name: str,
    value: object,
    expected: str,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> float:
    """Return ``value`` as a float, or raise unless it is a finite number within the bounds."""
    number = as_number(value)
    if not (math.isfinite(number) and above < number and at_least <= number <= at_most):
        raise ValueError(expected_but_got(name, expected, value))
    return number


def check_positive_integer(name: str, value: int) -> int:
    """Return ``value``, or raise unless it is an integer of at least 1."""
    return check_integer(name, value, at_least=1, expected="a positive integer")


def check_integer(name: str, value: int, *, at_least: int, expected: str | None = None) -> int:
    """Return ``value``, or raise unless it is an integer of at least ``at_least`` that fits into 64 bits."""
    given: object = value  # NumPy's integers, which are no `int`, come from ranges of hyperparameters
    integer = isinstance(given, Integral) and not isinstance(given, bool)
    expected = expected or f"an integer of at least {at_least}"
    if integer and value > _LARGEST_INTEGER:
        expected += f" and at most {_LARGEST_INTEGER}"
    if not integer or not at_least <= value <= _LARGEST_INTEGER:
        raise ValueError(expected_but_got(name, expected, value))
    return int(value)


def check_boolean(name: str, value: bool) -> bool:
    """Return ``value``, or raise unless it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(expected_but_got(name, "True or False", value))
    return value


def check_choice(name: str, value: S, choices: Sequence[str]) -> S:
    """Return ``value``, or raise unless it is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(expected_but_got(name, f"one of {tuple(choices)}", value))
    return value


def check_kind(name: str, value: object, kind: type, expected: str | None = None) -> None:
    """Raise a ``TypeError`` unless ``value`` is of a kind; ``expected`` is for the message."""
    if not isinstance(value, kind):
        expected = expected or f"a {kind.__name__}"
        raise TypeError(f"Expected argument `{name}` to be {expected}, but got {class_of(value)}.")


def check_function(name: str, value: object) -> None:
    """Raise a ``TypeError`` unless ``value`` can be called; a class does not count, as it is yet to be instantiated."""
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"Expected argument `{name}` to be a function or a module, but got {class_of(value)}.")


def check_floating(name: str, value: Tensor, shape: str) -> None:
    """Raise a ``TypeError`` unless ``value`` is a tensor of floating-point numbers; ``shape`` is for the message."""
    check_kind(name, value, Tensor, f"a tensor {shape}")
    if value.dtype not in FLOATING:
        raise TypeError(f"Expected argument `{name}` to be floating point, but got {value.dtype}.")
