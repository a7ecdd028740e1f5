"""What a predict function answers: any callable that returns one row of scores per sample.

It gets what the user has: tensors if the inputs are tensors, NumPy arrays if they are arrays. Its answers may be
tensors or arrays of either, and lie in a list, tuple or dictionary where it is evident which they are.

They are logits or log-probabilities, unless all are non-negative and each row sums to one: then they are probabilities,
whose logarithms are taken. Logits that look so by chance would have to hit 1 to 1e-5 in every row.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_robust.functional._isolation.stand_ins import HALF
from lightning_robust.functional._validation.arguments import class_of
from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional._validation.tensors import outputs_of

Predict = Callable[..., Any]
_SUM = 1e-5  # how far from 1 probabilities in float32 add up to
# Rows of numbers between 0 and 1 that sum to 1 up to this are probabilities that something has spoilt, not logits.
_NEAR = 0.2
_MOST_DIGITS = {torch.float32: 5, torch.float64: 8}  # at which rounding can be told from chance
_FEWEST_VALUES = 4  # that tell
_LABELS = (
    "Labels have no slope: pass a function that returns scores, such as `predict_proba`, or measure"
    " `lightning_robust.functional.decision_margin`, which needs labels alone."
)


def is_array(value: object) -> bool:
    """Whether a value is a NumPy array, or becomes one by itself as data frames do; tensors do not count."""
    return not isinstance(value, Tensor | type) and hasattr(value, "__array__")


def as_tensor(array: Any) -> Tensor:
    """A tensor with a copy of an array."""
    return torch.tensor(array.__array__())


def given_tensors(predict: Predict, inputs: Any, extras: Mapping[str, Any] | None) -> tuple[Predict, Any, Any]:
    """Inputs and extras as tensors, and a function of tensors that hands them on as arrays, if the inputs were."""
    if not is_array(inputs):
        return predict, inputs, extras
    extras = extras and {name: as_tensor(extra) if is_array(extra) else extra for name, extra in extras.items()}
    return types.MethodType(_on_arrays, predict), as_tensor(inputs), extras


def _on_arrays(predict: Predict, x: Tensor, **extras: Tensor) -> Any:
    return predict(_array(x), **{name: _array(extra) for name, extra in extras.items()})


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()


def answering(predict: Predict) -> Callable[..., Any]:
    """The same function with tensors in place of arrays among its answers, and without derivatives."""
    return types.MethodType(_answer, predict)


def _answer(predict: Predict, x: Tensor, **extras: Tensor) -> Any:
    return _in_tensors(predict(x.detach(), **extras))


def _in_tensors(answer: Any) -> Any:
    if isinstance(answer, Mapping):
        return {name: _in_tensors(entry) for name, entry in answer.items()}
    if type(answer) in (list, tuple):
        return type(answer)(map(_in_tensors, answer))
    try:
        return as_tensor(answer) if is_array(answer) else answer
    except TypeError:  # an array of text, or of objects
        return answer


def answering_logits(predict: Predict) -> Callable[..., Any]:
    """The same function with tensors of logits, or of logarithms of probabilities, for answers."""
    return types.MethodType(_logits, answering(predict))


def _logits(answer: Callable[..., Any], x: Tensor, **extras: Tensor) -> Any:
    outputs = SampleModel(answer, None, num_samples=len(x))(x, **extras)
    is_matrix = isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.is_floating_point()
    if not is_matrix:
        return outputs
    if are_probabilities(outputs):
        return outputs.log()
    refuse_unnormalised(outputs)
    return outputs


def refuse_unnormalised(outputs: Tensor) -> None:
    """Raise a ``ValueError`` if outputs (n, C) are probabilities in all but that their rows do not sum to one."""
    sums = outputs.double().sum(dim=1)
    low, high = float(sums.min()), float(sums.max())
    if bool((outputs < 0).any()) or not low > 0:
        return
    near_one = bool((outputs <= 1).all()) and low > 1 - _NEAR and high < 1 + _NEAR
    if near_one or (len(outputs) > 1 and outputs.shape[1] > 1 and high - low <= _SUM * high):
        raise ValueError(
            "Expected the predict function to return logits, or probabilities that sum to one in each row, but got rows"
            f" without a negative number that sum to {low:.6g} to {high:.6g}. If they are probabilities, return"
            " `p / p.sum(axis=1, keepdims=True)`; clipped ones are better not clipped."
        )


def are_probabilities(outputs: Tensor) -> bool:
    """Whether outputs (n, C) are non-negative in rows that sum to one, up to their rounding."""
    if not bool((outputs >= 0).all()):
        return False
    digits, c = rounded_digits(outputs), outputs.shape[1]
    rounding = torch.finfo(outputs.dtype).eps if outputs.dtype in HALF else 0.0 if digits is None else 10.0**-digits
    return bool(((outputs.double().sum(dim=1) - 1).abs() <= _SUM + 4 * math.sqrt(c / 12) * rounding).all())


def rounded_digits(values: Tensor) -> int | None:
    """How many decimals values were rounded to; None if they were not, or there are too few values to tell."""
    told: Tensor = torch.unique(values[(values != 0) & (values.abs() != 1)])
    if len(told) < _FEWEST_VALUES:
        return None
    wide, slack = told.double(), 2 * torch.finfo(values.dtype).eps * told.double().abs()
    for digits in range(1, _MOST_DIGITS.get(values.dtype, 0) + 1):
        grid = (wide * 10.0**digits).round() / 10.0**digits
        if bool(((wide - grid).abs() <= slack).all()):
            return digits
    return None


class Answers:
    """A predict function and its samples; checks what it answers to queries.

    Args:
        predict: A function of tensors.
        extras: Further arguments, with a row per sample.
        num_samples: N.
        rows_at_once: How many rows a call may have.
    """

    def __init__(
        self, predict: Predict, extras: Mapping[str, Tensor] | None, *, num_samples: int, rows_at_once: int
    ) -> None:
        self._model = SampleModel(answering(predict), extras, num_samples=num_samples)
        self._rows_at_once = rows_at_once
        self._kind: tuple[int, torch.dtype] | None = None  # number of classes, and type

    @property
    def dtype(self) -> torch.dtype:
        """The type of all answers so far."""
        assert self._kind is not None
        return self._kind[1]

    def __call__(self, points: Tensor, rows: Tensor) -> Tensor:
        """Answers (n, C) at points (n, ...), in their own type, on the CPU.

        Args:
            points: Inputs.
            rows: ``(n,)``, the numbers of the samples to which they belong.

        Raises:
            TypeError: If the function does not return floating-point numbers.
            ValueError: If the answers have a wrong shape, change their shape or type from call to call, or are not
                finite.
        """
        parts = zip(*(torch.split(part, self._rows_at_once) for part in (points, rows)), strict=True)
        return torch.cat([self._answer(*part) for part in parts])

    def _answer(self, points: Tensor, rows: Tensor) -> Tensor:
        n = len(points)
        outputs = outputs_of(self._model.on(rows), points, check=None)
        error = "Expected the predict function to return scores of shape (N, C) with C ≥ 2 classes, but for"
        if not isinstance(outputs, Tensor):
            raise TypeError(f"{error} {n} inputs it returned {class_of(outputs)}. {_LABELS}")
        if not outputs.is_floating_point():
            raise TypeError(
                f"{error} {n} inputs it returned {outputs.dtype} of shape {tuple(outputs.shape)}. {_LABELS}"
            )
        if outputs.shape in ((n,), (n, 1)):
            raise ValueError(
                f"{error} {n} inputs it returned shape {tuple(outputs.shape)}. A probability p of two classes becomes"
                " `np.stack([1 - p, p], axis=1)`, and a logit z `np.stack([0 * z, z], axis=1)`."
            )
        if outputs.ndim != 2 or len(outputs) != n or outputs.shape[1] < 2:
            raise ValueError(f"{error} {n} inputs it returned shape {tuple(outputs.shape)}.")
        kind = (outputs.shape[1], outputs.dtype)
        if self._kind is not None and kind != self._kind:
            before, now = (f"{dtype} with {c} classes" for c, dtype in (self._kind, kind))
            raise ValueError(
                f"Expected the predict function to return the same shape and type at every call, but it returned"
                f" {before} first and {now} later, so its answers cannot be compared."
            )
        self._kind = kind
        wrong = (outputs.isnan() | outputs.isposinf() | outputs.isneginf().all(dim=1, keepdim=True)).any(dim=1)
        if wrong.any():
            first = int(rows[wrong.nonzero()[0, 0]])
            raise ValueError(
                f"Expected finite answers of the predict function, but got NaN or infinity for {int(wrong.sum())} of"
                f" {n} queries (first: around sample {first}). Can it be called on inputs beside the samples?"
            )
        return outputs.detach().cpu()
