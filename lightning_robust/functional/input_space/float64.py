"""Double precision for quantities that are differences of large numbers, also on devices without it (Metal)."""

from __future__ import annotations

import torch
from torch import Tensor


def float64_dtype(like: Tensor) -> torch.dtype:
    """Float64, or float32 on a device without float64 (Metal)."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """Convert to :func:`float64_dtype` and stay on the device."""
    return tensor.to(float64_dtype(tensor))


def working(outputs: Tensor) -> Tensor:
    """Outputs (n, C) in :func:`float64_dtype`. Those of many positions, (n, ...), are too many; float32 does."""
    if outputs.ndim > 2 and outputs.dtype in (torch.float32, torch.float64):
        return outputs
    return widened(outputs) if outputs.ndim == 2 else outputs.float()


def to_float64(tensor: Tensor) -> Tensor:
    """Convert to float64, and move to the CPU if the device has none. Meant for C × C algebra, which is cheap."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
