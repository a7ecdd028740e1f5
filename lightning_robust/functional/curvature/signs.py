"""Random signs of probes, as functions of a sample's contents, whatever its batch, process or epoch.

Averages over samples then do not depend on how samples are batched or spread over processes. A curve over epochs
carries the same noise at every point, so differences along it are known better than the error bars say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional.curvature.sums import NUM_BLOCKS

_BITS = 32  # of a key: torch's CPU generator ignores all further bits of a seed
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


@dataclass(frozen=True)
class ProbeSeeds:
    """Seeds of the random signs of all probes of some samples."""

    keys: list[int]  # of each sample, for signs of its outputs (Gauss–Newton probes)
    blocks: list[int]  # of each sample, below NUM_BLOCKS; a block shares signs of weights (Hutchinson probes)
    seed: int = 0  # of the signs of weights, together with the block and the number of the probe

    @classmethod
    def from_contents(cls, inputs: Tensor) -> ProbeSeeds:
        """Seeds that are a function of each sample of ``(N, ...)``."""
        keys = keys_of(full_precision(inputs))
        return cls(keys, [key % NUM_BLOCKS for key in keys])

    @classmethod
    def random(cls, num_samples: int, generator: torch.Generator) -> ProbeSeeds:
        """Seeds drawn by a generator."""
        keys, seed = random_keys(num_samples, generator), random_keys(1, generator)[0]
        return cls(keys, [row % NUM_BLOCKS for row in range(num_samples)], seed)


def keys_of(inputs: Tensor) -> list[int]:
    """A number for each sample of ``(N, ...)`` that depends on its contents alone (a multilinear hash, then mixed)."""
    rows = inputs.detach().reshape(len(inputs), -1).contiguous()
    words = rows.view(_INTEGERS[rows.element_size()])
    factors = torch.randint(2**62, words.shape[1:], generator=torch.Generator().manual_seed(0)).to(words.device)
    return [_mixed(int((row.long() * factors).sum())) for row in words]  # the sum is modulo 2⁶⁴


def random_keys(count: int, generator: torch.Generator) -> list[int]:
    """Random numbers in the range of :func:`keys_of`."""
    return torch.randint(2**_BITS, (count,), generator=generator, device=generator.device).tolist()


def _mixed(*numbers: int) -> int:
    """A key whose every bit depends on all bits of all numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=_BITS // 8).digest())


def sample_signs(keys: Sequence[int], probes: range, sizes: Sequence[int], *, width: int) -> Tensor:
    """Independent random signs for each probe and sample, ``(len(probes), N, width)``.

    Each of the N samples has as many random signs as ``sizes`` says; the rest is −1.
    """
    bits = torch.zeros(len(probes), len(keys), width, dtype=torch.int8)
    for n, (key, size) in enumerate(zip(keys, sizes, strict=True)):
        generator = torch.Generator().manual_seed(key)
        drawn = torch.randint(2, (probes.stop, size), generator=generator, dtype=torch.int8)
        bits[:, n, :size] = drawn[probes.start :]
    return bits * 2 - 1


def weight_signs(tensors: Sequence[Tensor], *keys: int) -> list[Tensor]:
    """Independent random signs in the shapes of these tensors, as a function of all keys together."""
    if not tensors:
        return []
    device = tensors[0].device
    generator = torch.Generator(device).manual_seed(_mixed(*keys))
    bits = [torch.randint(2, t.shape, generator=generator, device=t.device, dtype=torch.int8) for t in tensors]
    return [signs.mul_(2).sub_(1).to(tensor) for signs, tensor in zip(bits, tensors, strict=True)]
