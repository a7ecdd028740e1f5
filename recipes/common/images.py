"""Images from files: reading, normalising and choosing them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# mean and standard deviation per channel, of pixels in [0, 1]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)


def read_images(path: str | Path) -> tuple[Tensor, Tensor]:
    """Return images in bytes, (N, channels, S, S), and classes, (N,), from an npz file with arrays ``x`` and ``y``.

    Raises:
        ValueError: If ``x`` does not hold bytes of shape (N, S, S) or (N, S, S, channels), or ``y`` as many classes.
    """
    arrays = np.load(path)
    shapes = {name: (arrays[name].dtype, arrays[name].shape) for name in arrays.files}
    kind, shape = shapes.get("x", (None, ()))
    if kind != np.uint8 or len(shape) not in (3, 4) or shapes.get("y", (None, ()))[1] != shape[:1]:
        found = ", ".join(f"`{name}`, {dtype} of shape {size}" for name, (dtype, size) in shapes.items())
        raise ValueError(
            f"Expected {path} to hold `x`, bytes of shape (N, S, S) or (N, S, S, channels), and `y`, classes of shape"
            f" (N,), but got {found}."
        )
    images = torch.tensor(arrays["x"])
    return images.permute(0, 3, 1, 2) if images.ndim == 4 else images[:, None], torch.tensor(arrays["y"]).long()


def normalised(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Scale images in bytes, (N, channels, S, S), to [0, 1]; subtract a mean and divide by a deviation per channel."""
    unit = images.float() / 255
    shift, scale = (None if part is None else torch.tensor(part).view(-1, 1, 1) for part in (mean, std))
    unit = unit if shift is None else unit - shift
    return unit if scale is None else unit / scale


def evenly(images: Tensor, labels: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """Choose images spread evenly over the classes, the first of each class first, and keep their order."""
    if num_images < 1:
        raise ValueError(f"Expected --num_images of at least 1, but got {num_images}.")
    turns = torch.zeros_like(labels)
    for c in sorted(set(labels.tolist())):
        own = labels == c
        turns[own] = torch.arange(int(own.sum()))
    rows = turns.argsort(stable=True)[:num_images].sort().values
    return images[rows], labels[rows]
