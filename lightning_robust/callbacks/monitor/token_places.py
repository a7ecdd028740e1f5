"""Finds token ids in what an embedding layer is called with: networks transpose, flatten, cut and extend them first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def places_in(argument: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor | None:
    """Tell from which token each entry of ``argument`` comes.

    Args:
        argument: What a layer was called with, of any shape.
        ids: Token ids ``(N, ...)``, ``(N, T)`` as a rule.
        mask: 0 at padding, of the shape of the ids.

    Returns:
        Numbers of tokens, counted through ``ids.flatten()``, in the shape of ``argument``; −1 for padding and for
        entries that the network has added. None if the argument is not the ids in an arrangement that is known: as they
        are, flattened, transposed, cut at one end or extended at one end.

    Raises:
        ValueError: If the argument agrees with several arrangements.
    """
    numbers = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    if mask is not None:
        numbers = numbers.masked_fill(mask == 0, -1)
    if is_same(argument, ids):  # no look at the values: they may agree by chance with those of another arrangement
        return numbers.view(argument.shape)
    found: list[Tensor] = []
    for places in _arrangements(numbers, argument.shape):
        agree = (places < 0) | (ids.flatten()[places.clamp(min=0)] == argument)
        if bool(agree.all()) and not any(torch.equal(places, other) for other in found):
            found.append(places)
    if len(found) > 1:
        shape = tuple(argument.shape)
        raise ValueError(f"it was called with a tensor of shape {shape} that agrees with them in several arrangements")
    return found[0] if found else None


def is_same(argument: Tensor, ids: Tensor) -> bool:
    """Whether a tensor is another, or a view of it with all entries in the same order."""
    if argument is ids:
        return True
    if argument.numel() != ids.numel() or not (argument.is_contiguous() and ids.is_contiguous()):
        return False
    return argument.data_ptr() == ids.data_ptr() and argument.dtype == ids.dtype


def argument_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The integers with which a layer was called."""
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return next((tensor for tensor in tensors if not tensor.is_floating_point()), None)


def _arrangements(numbers: Tensor, shape: torch.Size) -> Iterator[Tensor]:
    if numbers.numel() == shape.numel():
        yield numbers.view(shape)
    if numbers.ndim == len(shape) == 2:
        for (rows, columns), turned in ((shape, False), (shape[::-1], True)):
            if rows == len(numbers):
                more = columns - numbers.shape[1]  # less than 0 if the network cuts texts
                for before in {0, more}:
                    places = F.pad(numbers, (before, more - before), value=-1)
                    yield places.t() if turned else places
