"""Jacobians of a network with respect to its inputs, and the part of them that a linearisation keeps.

Cost: one forward pass and C backward passes per chunk of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_robust.functional._isolation.side_effects import watched_once
from lightning_robust.functional._validation.tensors import check_logits, outputs_of
from lightning_robust.functional.input_space._categorical import CATEGORICAL
from lightning_robust.functional.input_space._likelihood import ColumnLikelihood
from lightning_robust.functional.input_space.float64 import float64_dtype
from lightning_robust.functional.input_space.units import Units, changes_within

# Without a chunk size, the Jacobian of a chunk has at most this many elements: 256 MiB in float32.
_DEFAULT_ELEMENTS = 2**26
# Without a chunk size, a chunk on a CPU has at most this many input elements (42 images of 3 × 32 × 32). Intermediate
# results of larger chunks leave the caches, and the allocator returns their memory to the system each time, which takes
# a third of the run time of a ResNet-20. Small networks on small inputs gain from larger chunks instead.
_DEFAULT_CPU_INPUT_ELEMENTS = 2**17
# Number of classes to plan for before the first forward pass tells the true one.
_ASSUMED_CLASSES = 32
# Jacobian elements converted to float64 at a time while inner products are summed: 8 MiB.
_GRAM_ELEMENTS = 2**20


def samples_at_once(x: Tensor, chunk_size: int | None, *, num_classes: int = _ASSUMED_CLASSES) -> int:
    """Number of samples per chunk; without a chunk size, the chunks are of about equal size."""
    most = largest_chunk(x, chunk_size, num_rows=num_classes)
    if chunk_size is not None:
        return most
    num_chunks = -(-len(x) // most)
    return -(-len(x) // num_chunks)


def largest_chunk(x: Tensor, chunk_size: int | None, *, num_rows: int = _ASSUMED_CLASSES) -> int:
    """Largest number of samples that may pass through the network together, if each holds ``num_rows`` gradients."""
    if chunk_size is not None:
        return chunk_size
    size = max(1, x[0].numel())
    samples = max(1, _DEFAULT_ELEMENTS // (size * num_rows))
    if x.device.type == "cpu":
        samples = min(samples, max(8, _DEFAULT_CPU_INPUT_ELEMENTS // size))
    return samples


def leaf_and_logits(
    model: Callable[[Tensor], Tensor], x: Tensor, *, check: Callable[..., None] | None = check_logits
) -> tuple[Tensor, Tensor]:
    """Return a leaf with the values of ``x`` (n, ...), and the logits (n, C) as a differentiable function of it."""
    leaf = x.clone().requires_grad_()
    return leaf, outputs_of(model, leaf, check=check)


def gram_and_gaps(
    logits: Tensor,
    leaf: Tensor,
    std: Tensor | None,
    box: BoxConstraint | None,
    *,
    likelihood: ColumnLikelihood = CATEGORICAL,
    logits_before: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, Gram matrices and L1 gaps of a chunk (see :class:`Linearization`).

    Gradients are those of ``logits`` (n, C) with respect to ``leaf`` (n, ...); the gaps that they are to close are
    between ``logits_before``, by default the same.
    """
    to_close = logits.detach() if logits_before is None else logits_before
    rows = jacobian_rows(logits, leaf, std)
    gram = gram_matrix(rows)
    gaps = None if box is None else likelihood.gaps(to_close)
    if box is not None and gaps is None:  # how far inputs must move in the range depends on what is to be closed
        return to_close, gram, None

    def slopes(c: int, ways: Sequence[Tensor]) -> Tensor:
        if box is None or gaps is None:
            return ways[0].abs().sum(dim=1)
        return torch.stack([box.slopes(way, gaps[:, c]) for way in ways]).amax(dim=0)

    found = [slopes(c, ways) for c, ways in enumerate(likelihood.gap_gradients(to_close, rows))]
    return to_close, gram, torch.stack(found, dim=1)


class BoxConstraint:
    """How far each feature can move, in either direction, before it leaves the valid range."""

    def __init__(self, raw: Tensor, valid_range: tuple[float, float]) -> None:
        fall, self._up = changes_within(raw.reshape(len(raw), -1).to(float64_dtype(raw)), valid_range)
        self._down = -fall

    @classmethod
    def of(cls, x: Tensor, units: Units) -> BoxConstraint | None:
        """Return the box around normalised inputs; None without a valid range."""
        return None if units.valid_range is None else cls(units.raw(x), units.valid_range)

    def within(self, steps: Tensor) -> Tensor:
        """Clip steps (n, D) of the un-normalised inputs to the range."""
        return torch.minimum(torch.maximum(steps.to(self._up), -self._down), self._up).to(steps)

    def slopes(self, differences: Tensor, gaps: Tensor) -> Tensor:
        """``gaps`` (n,), with gradients (n, D), over the size ε of the smallest perturbation that closes them.

        A perturbation of size ε achieves ``Σ_i |d_i| min(ε, box_i)``, which is concave and piecewise linear in ε.
        Newton's method from below therefore never overshoots. It ends after at most as many steps as there are pieces,
        in practice after three. An infinite gap, to a masked class, is closed by none: its slope is 0.
        """
        box = torch.where(differences > 0, self._down, self._up)
        weights, target = differences.abs().to(box), gaps.to(box)
        norms = weights.sum(dim=1)
        epsilon = target / norms
        for _ in range(box.shape[1]):
            missing = target - (weights * torch.minimum(box, epsilon[:, None])).sum(dim=1)
            step = missing / (weights * (box > epsilon[:, None])).sum(dim=1)
            step = torch.where((missing > 1e-12 * target) & epsilon.isfinite(), step, 0)
            if not (step > 0).any():
                break
            epsilon = epsilon + step
        slopes = torch.where(target > 0, target / epsilon, norms)
        return torch.where(target.isfinite(), slopes, 0).to(differences)


def input_gradient(outputs: Tensor, leaf: Tensor, std: Tensor | None) -> Tensor:
    """Gradient (n, D) of each sample's output with respect to its own un-normalised input."""
    if not outputs.requires_grad:  # the outputs do not depend on the input at all
        return torch.zeros_like(leaf).reshape(len(leaf), -1)
    with watched_once():
        (gradient,) = torch.autograd.grad(outputs.sum(), leaf, retain_graph=True, materialize_grads=True)
    return (gradient if std is None else gradient / std).reshape(len(leaf), -1)


def jacobian_rows(logits: Tensor, leaf: Tensor, std: Tensor | None) -> Tensor:
    """``J`` (n, C, D), one backward pass per class."""
    num_classes = logits.shape[1]
    rows = leaf.new_empty(len(leaf), num_classes, leaf[0].numel())
    for c in range(num_classes):
        rows[:, c] = input_gradient(logits[:, c], leaf, std)
    return rows


def gram_matrix(rows: Tensor) -> Tensor:
    """``J Jᵀ`` (n, C, C) of rows (n, C, D), summed in float64, which no global TF32 setting affects."""
    step = max(1, _GRAM_ELEMENTS // rows[..., 0].numel())
    gram = rows.new_zeros(len(rows), rows.shape[1], rows.shape[1], dtype=float64_dtype(rows))
    for part in torch.split(rows, step, dim=2):
        wide = part.to(gram.dtype)
        gram += wide @ wide.mT
    return gram


def combination(weights: Tensor, rows: Tensor, which: Tensor) -> Tensor:
    """Weighted sums of rows, (n, A) × (m, A, D) → (n, D), in float64; sum i takes the rows ``which[i]`` of the m."""
    step = max(1, _GRAM_ELEMENTS // weights.numel())
    left = weights[:, None].to(float64_dtype(rows))
    return torch.cat([(left @ part[which].to(left.dtype))[:, 0] for part in torch.split(rows, step, dim=2)], dim=1)
