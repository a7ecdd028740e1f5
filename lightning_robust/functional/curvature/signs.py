"""Random signs that belong to a sample, whatever batch, process or epoch it is met in.

Averages over samples then do not depend on how the samples were batched or spread over processes, and a curve over
epochs carries the same noise at every point: differences along it are known better than the error bars say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_BITS = 32  # of a key: torch's generator on the CPU looks at no more of a seed
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def keys_of(inputs: Tensor) -> list[int]:
    """A number for each sample of ``(N, ...)`` that depends on its contents alone (a multilinear hash, then mixed)."""
    rows = inputs.detach().reshape(len(inputs), -1).contiguous()
    words = rows.view(_INTEGERS[rows.element_size()])
    factors = torch.randint(2**62, words.shape[1:], generator=torch.Generator().manual_seed(0)).to(words.device)
    return [_mixed(int((row.long() * factors).sum())) for row in words]  # the sum is modulo 2⁶⁴


def random_keys(count: int, generator: torch.Generator) -> list[int]:
    """The same, drawn at random."""
    return torch.randint(2**_BITS, (count,), generator=generator, device=generator.device).tolist()


def _mixed(*numbers: int) -> int:
    """A key of which every bit depends on all bits of all numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=_BITS // 8).digest())


def sample_signs(keys: Sequence[int], probes: range, size: int) -> Tensor:
    """Independent random signs for each probe and sample, ``(len(probes), N, size)``."""
    signs = [
        torch.randint(2, (probes.stop, size), generator=torch.Generator().manual_seed(key), dtype=torch.int8)[
            probes.start :
        ]
        for key in keys
    ]
    return torch.stack(signs, dim=1) * 2 - 1


def weight_signs(tensors: Sequence[Tensor], *keys: int) -> list[Tensor]:
    """Independent random signs of the shapes of these tensors, as a function of all keys together."""
    if not tensors:
        return []
    generator = torch.Generator(tensors[0].device).manual_seed(_mixed(*keys))
    return [
        torch.randint(2, tensor.shape, generator=generator, device=tensor.device, dtype=torch.int8).to(tensor) * 2 - 1
        for tensor in tensors
    ]
