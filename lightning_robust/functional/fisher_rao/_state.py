"""State of Fisher–Rao paths that are traced together: one row per path."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.functional.input_space.float64 import float64_dtype


class Paths(NamedTuple):
    """Paths, one per row; points and steps are normalised like the inputs."""

    number: Tensor  # (m,), index of the path
    sample: Tensor  # (m,), index of its sample
    source: Tensor  # (m,), class to leave
    target: Tensor  # (m,), class to aim at
    start: Tensor  # (m, ...), starting point
    x: Tensor  # (m, ...), current point
    move: Tensor  # (m, ...), last step, or at the start the expected next one
    lower: Tensor  # (m, ...), lower bound of ``x``, of a shape that broadcasts
    upper: Tensor  # (m, ...), upper bound of ``x``, of a shape that broadcasts
    logits: Tensor  # (m, C), at ``x``
    length: Tensor  # (m,), float64, length on the simplex so far
    steps: Tensor  # (m,), number of steps so far
    damping: Tensor  # (m,), float64, λ
    longest: Tensor  # (m,), float64, Euclidean bound of a step, un-normalised

    def rows(self, chosen: Tensor) -> Paths:
        """Select some of the paths."""
        return Paths(*(part[chosen] for part in self))

    @property
    def samples(self) -> tuple[Tensor, Tensor]:
        """One path of each sample (n,), and for each path the position of its sample among these (m,)."""
        _, which = self.sample.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        rows = torch.arange(len(which), device=which.device)
        return rows.new_zeros(int(which.max()) + 1).scatter_(0, which, rows), which

    @property
    def contrast(self) -> Tensor:
        """``e_source − e_target`` (m, C), float64, whose inner product with the logits is the gap."""
        c = self.logits.shape[1]
        return (F.one_hot(self.source, c) - F.one_hot(self.target, c)).to(float64_dtype(self.logits))

    def gap(self, logits: Tensor) -> Tensor:
        """Gap (m,) between source and target at given logits (m, C)."""
        return (logits.gather(1, self.source[:, None]) - logits.gather(1, self.target[:, None]))[:, 0]

    def within_bounds(self, x: Tensor) -> Tensor:
        """Clamp points (m, ...) to the bounds."""
        return torch.minimum(torch.maximum(x, self.lower), self.upper)


def joined(*groups: Paths) -> Paths:
    """Join groups of paths, in order."""
    return Paths(*map(torch.cat, zip(*groups, strict=True)))


def flat(x: Tensor) -> Tensor:
    """Samples (n, ...) as rows (n, D); n may be 0."""
    return x.reshape(len(x), math.prod(x.shape[1:]))
