"""Units of inputs: how they were normalised, and the range of their un-normalised values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.arguments import as_number, as_numbers, expected_but_got, plain

_SMALLEST_IMAGE = 20  # pixels per side
Constant = float | Sequence[float] | Tensor  # one number, or one per channel


class Units(NamedTuple):
    """Normalisation of inputs ``(N, channels, ...)``: ``(raw − mean) / std``, with ``raw`` in the valid range."""

    std: Tensor | None  # of a shape that broadcasts against the inputs; None for 1
    mean: Tensor | None  # of such a shape; None for 0
    valid_range: tuple[float, float] | None  # smallest and largest un-normalised value; None if unbounded

    @classmethod
    def of(
        cls,
        inputs: Tensor,
        *,
        std: Constant | None,
        mean: Constant | None,
        valid_range: tuple[float, float] | None = None,
    ) -> Units:
        """Read the arguments ``input_std``, ``input_mean`` and ``valid_range``, or raise a ``ValueError``."""
        return cls(
            std=None if std is None else _channelwise("input_std", std, inputs),
            mean=None if mean is None else _channelwise("input_mean", mean, inputs, positive=False),
            valid_range=check_valid_range(valid_range),
        )

    def raw(self, x: Tensor) -> Tensor:
        """Undo the normalisation of inputs."""
        raw = self.raw_change(x)
        return raw if self.mean is None else raw + self.mean

    def raw_change(self, change: Tensor) -> Tensor:
        """Convert a change of normalised inputs to un-normalised units."""
        return change if self.std is None else change * self.std

    def change(self, raw_change: Tensor) -> Tensor:
        """Convert a change of un-normalised inputs to normalised units."""
        return raw_change if self.std is None else raw_change / self.std


def are_images(inputs: Tensor) -> bool:
    """Whether inputs (N, channels, H, W, ...) or (N, H, W) are images rather than tables (N, D) or sequences (N, T, D).

    Of three dimensions only square images of some size can be told from sequences.
    """
    side = inputs.shape[-1] if inputs.ndim else 0
    return inputs.ndim > 3 or (inputs.ndim == 3 and inputs.shape[1] == side >= _SMALLEST_IMAGE)


def are_images_of_unknown_scale(inputs: Tensor, std: Constant | None) -> bool:
    """Whether inputs are images beyond the range from 0 to 1, without a word on how they were scaled."""
    return std is None and are_images(inputs) and bool((inputs.amin() < 0) | (inputs.amax() > 1))


def _channelwise(name: str, value: Constant, inputs: Tensor, *, positive: bool = True) -> Tensor:
    """Check a scalar or per-channel constant, and shape it to broadcast against ``inputs`` ``(N, channels, ...)``."""
    entries = as_numbers(value)
    shape = () if entries is None else tuple(getattr(value, "shape", (len(entries),)))
    channels = inputs.shape[1] if inputs.ndim > 1 else 1
    if len(shape) > 1 or shape not in ((), (1,), (channels,)):
        raise ValueError(
            f"Expected argument `{name}` to be one number or one per channel, {channels} for inputs of"
            f" shape {tuple(inputs.shape)} (channels are dimension 1), but got shape {shape}."
        )
    numbers = check_constant(name, value, positive=positive)
    constant = torch.tensor(numbers, dtype=full_precision(inputs[:0]).dtype)
    check_constant(name, constant, positive=positive)  # after rounding to its precision
    constant = constant.to(inputs.device)
    return constant.reshape(1, -1, *(1,) * (inputs.ndim - 2)) if inputs.ndim > 1 else constant


def check_constant(name: str, value: Constant, *, positive: bool = True) -> list[float]:
    """Return the entries, or raise unless ``value`` is a finite (positive) number or a list of such numbers."""
    entries = as_numbers(value)
    numbers = [as_number(plain(value))] if entries is None else entries
    finite = all(map(math.isfinite, numbers))
    if not numbers or not finite or (positive and min(numbers) <= 0):
        expected = f"a {'positive' if positive and finite else 'finite'} number, or a list of one per channel"
        raise ValueError(expected_but_got(name, expected, value))
    return numbers


def changes_within(raw: Tensor, valid_range: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Lower (≤ 0) and upper (≥ 0) bounds of changes of un-normalised inputs; an input outside the range may stay."""
    return (valid_range[0] - raw).clamp_max(0), (valid_range[1] - raw).clamp_min(0)


def check_valid_range(valid_range: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return ``valid_range`` as floats, or raise unless it is None or two numbers in ascending order."""
    if valid_range is None:
        return None
    ends = as_numbers(valid_range)
    if ends is None or len(ends) != 2 or not ends[0] < ends[1]:
        raise ValueError(expected_but_got("valid_range", "(low, high) with low < high", valid_range))
    return ends[0], ends[1]


def check_units(
    *, input_std: Constant | None, input_mean: Constant | None, valid_range: tuple[float, float] | None
) -> None:
    """Raise unless all three are valid, and normalised inputs with a ``valid_range`` come with their mean."""
    if input_std is not None:
        check_constant("input_std", input_std)
    if input_mean is not None:
        check_constant("input_mean", input_mean, positive=False)
    check_valid_range(valid_range)
    if valid_range is not None and input_std is not None and input_mean is None:
        raise ValueError(
            "Expected argument `input_mean` beside `input_std` and `valid_range`, because the range is one of"
            " un-normalised inputs, but got None. Pass 0.0 if nothing was subtracted."
        )
