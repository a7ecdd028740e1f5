"""Random orthonormal directions, as a function of a sample's contents and a seed.

Whatever its batch or process is, a sample is queried along the same directions. At every epoch of a training, too, so
that differences along a curve are known better than the error of its points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.functional.curvature.signs import keys_of, random_keys

_SEED_BITS = 2**32 - 1  # torch's CPU generator ignores all further ones


def direction_keys(inputs: Tensor, generator: torch.Generator | None) -> list[int]:
    """A seed for each sample of ``(N, ...)``: of its contents, and of one number that the generator draws."""
    drawn = 0 if generator is None else random_keys(1, generator)[0]
    return [(key ^ drawn * 0x9E3779B1) & _SEED_BITS for key in keys_of(inputs)]


def orthonormal_directions(keys: list[int], count: int, x: Tensor) -> Tensor:
    """``count`` orthonormal directions for each sample of ``x`` (n, ...), uniformly distributed, (n, count, D)."""
    return torch.stack([torch.linalg.qr(_normal(key, x[0].numel(), count, x))[0].mT for key in keys]).to(x.device)


def normal_directions(keys: list[int], count: int, x: Tensor) -> Tensor:
    """Normally distributed directions for each sample of ``x`` (n, ...), (n, count, D), each for itself."""
    return torch.stack([_normal(key, count, x[0].numel(), x) for key in keys]).to(x.device)


def _normal(key: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """Drawn on the CPU, so that values do not depend on the device."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(key), dtype=like.dtype)
