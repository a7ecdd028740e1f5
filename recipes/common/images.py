"""Images from files, as bytes, and how they are normalised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_images(path: str | Path) -> tuple[Tensor, Tensor]:
    """Images in bytes, (N, channels, S, S), and their classes, (N,), from a file (npz) with arrays ``x`` and ``y``.

    Raises:
        ValueError: If these are not bytes of shape (N, S, S) or (N, S, S, channels), and as many classes.
    """
    arrays = np.load(path)
    shapes = {name: (arrays[name].dtype, arrays[name].shape) for name in arrays.files}
    kind, shape = shapes.get("x", (None, ()))
    if kind != np.uint8 or len(shape) not in (3, 4) or shapes.get("y", (None, ()))[1] != shape[:1]:
        came = ", ".join(f"`{name}`, {dtype} of shape {size}" for name, (dtype, size) in shapes.items())
        raise ValueError(
            f"Expected {path} to hold `x`, bytes of shape (N, S, S) or (N, S, S, channels), and `y`, classes of shape"
            f" (N,), but got {came}."
        )
    images = torch.tensor(arrays["x"])
    return images.permute(0, 3, 1, 2) if images.ndim == 4 else images[:, None], torch.tensor(arrays["y"]).long()


def normalised(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Images in bytes, (N, channels, S, S), brought to [0, 1], less a mean, over a standard deviation per channel."""
    unit = images.float() / 255
    shift, scale = (None if part is None else torch.tensor(part).view(-1, 1, 1) for part in (mean, std))
    unit = unit if shift is None else unit - shift
    return unit if scale is None else unit / scale


def evenly(images: Tensor, labels: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """The first of each class, then the second of each, and so on, in the order in which they come."""
    if num_images < 1:
        raise ValueError(f"Expected --num_images of at least 1, but got {num_images}.")
    turns = torch.zeros_like(labels)
    for c in sorted(set(labels.tolist())):
        own = labels == c
        turns[own] = torch.arange(int(own.sum()))
    rows = turns.argsort(stable=True)[:num_images].sort().values
    return images[rows], labels[rows]
