"""The passes behind a linearisation: rows of the Jacobian of one chunk of samples, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust.functional._isolation.side_effects import call
from lightning_robust.functional._validation.tensors import check_logits
from lightning_robust.functional.input_space.units import Units, changes_within

# Jacobian elements held at once when the user sets no bound: 256 MiB in float32.
_DEFAULT_ELEMENTS = 2**26
# Input elements that pass through the network together on a CPU when the user sets no bound (42 images of 3 × 32 × 32):
# larger intermediate results leave the caches, and the allocator gives them back to the system each time, a third of
# the run time of a ResNet-20. Small networks on small inputs gain from larger batches instead.
_DEFAULT_CPU_INPUT_ELEMENTS = 2**17
# Jacobian elements converted to float64 at once while the Gram matrices are accumulated: 8 MiB.
_GRAM_ELEMENTS = 2**20


def count_classes(model: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Number of classes, from two samples: the size of a chunk depends on it."""
    with torch.no_grad():
        logits = call(model, x[:2].clone())
    check_logits(logits, num_samples=min(2, len(x)))
    return logits.shape[1]


def samples_at_once(x: Tensor, num_classes: int, chunk_size: int | None) -> int:
    """How many samples pass through the network together."""
    most = largest_chunk(x, num_classes, chunk_size)
    if chunk_size is not None:
        return most
    num_chunks = -(-len(x) // most)
    return -(-len(x) // num_chunks)  # chunks of about equal size


def largest_chunk(x: Tensor, num_rows: int, chunk_size: int | None) -> int:
    """How many samples pass through the network together at the most, if each holds ``num_rows`` rows."""
    if chunk_size is not None:
        return max(1, chunk_size // num_rows)
    size = max(1, x[0].numel())
    samples = max(1, _DEFAULT_ELEMENTS // (size * num_rows))
    if x.device.type == "cpu":
        samples = min(samples, max(8, _DEFAULT_CPU_INPUT_ELEMENTS // size))
    return samples


def linearized_chunk(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    std: Tensor | None,
    box: BoxConstraint | None,
    max_rows: int,
    *,
    logits_before: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, Gram matrices and L1 gaps of a linearisation (see there).

    Args:
        model: Maps inputs (n, ...) to logits (n, C).
        x: (n, ...), where the gradients are taken.
        std: What the inputs were divided by.
        box: How far the un-normalised inputs can move.
        max_rows: Rows of the Jacobian that may be held at once.
        logits_before: (n, C), of the inputs whose gaps are to be closed; by default those at ``x``.
    """
    leaf = x.clone().requires_grad_()
    logits = model(leaf.clone())  # not the leaf itself: a network may begin with an in-place layer
    check_logits(logits, num_samples=len(x))
    num_samples, num_classes = logits.shape
    to_close = logits.detach() if logits_before is None else logits_before
    predicted = to_close.argmax(dim=1, keepdim=True)

    gaps = to_close.gather(1, predicted) - to_close

    def slopes(differences: Tensor, c: int) -> Tensor:
        """Column c of ``gap_l1``, from the gradient gaps (n, D) to that class."""
        return differences.abs().sum(dim=1) if box is None else box.slopes(differences, gaps[:, c])

    gram = x.new_empty(num_samples, num_classes, num_classes, dtype=float64_dtype(x))
    gap_l1 = x.new_empty(num_samples, num_classes)
    if num_classes <= max_rows:
        rows = jacobian_rows(logits, leaf, std, range(num_classes))
        top = rows.take_along_dim(predicted[..., None], dim=1)[:, 0]
        gram[:] = products(rows, rows)
        for c in range(num_classes):
            gap_l1[:, c] = slopes(top - rows[:, c], c)
    else:  # one sample with more classes than rows may be held: two blocks of classes at a time
        size = max(1, (max_rows - 1) // 2)
        blocks = [range(start, min(start + size, num_classes)) for start in range(0, num_classes, size)]
        top = input_gradient(logits.gather(1, predicted), leaf, std)
        for i, block in enumerate(blocks):
            rows = jacobian_rows(logits, leaf, std, block)
            here = slice(block.start, block.stop)
            gram[:, here, here] = products(rows, rows)
            for row, c in enumerate(block):
                gap_l1[:, c] = slopes(top - rows[:, row], c)
            for other in blocks[:i]:
                there = slice(other.start, other.stop)
                gram[:, here, there] = products(rows, jacobian_rows(logits, leaf, std, other))
                gram[:, there, here] = gram[:, here, there].mT
    return to_close, gram, gap_l1


class BoxConstraint:
    """How far each feature can move, in either direction, before it leaves the valid range."""

    def __init__(self, raw: Tensor, valid_range: tuple[float, float]) -> None:
        fall, self._up = changes_within(raw.reshape(len(raw), -1).to(float64_dtype(raw)), valid_range)
        self._down = -fall

    @classmethod
    def of(cls, x: Tensor, units: Units) -> BoxConstraint | None:
        """The box of normalised inputs; None without a valid range."""
        return None if units.valid_range is None else cls(units.raw(x), units.valid_range)

    def within(self, steps: Tensor) -> Tensor:
        """Steps (n, D) of the un-normalised inputs, cut off where they leave the range."""
        return torch.minimum(torch.maximum(steps.to(self._up), -self._down), self._up).to(steps)

    def slopes(self, differences: Tensor, gaps: Tensor) -> Tensor:
        """``gaps`` (n,), with gradients (n, D), over the size ε of the smallest perturbation that closes them.

        What a perturbation achieves, ``Σ_i |d_i| min(ε, room_i)``, is concave and piecewise linear in ε: Newton's
        method from below never oversteps and ends after as many steps as pieces at the most, in practice after three.
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
        return torch.where(target > 0, target / epsilon, norms).to(differences)


def input_gradient(outputs: Tensor, leaf: Tensor, std: Tensor | None) -> Tensor:
    """Gradient of each sample's output with respect to its own un-normalised input, (n, D)."""
    if not outputs.requires_grad:  # the outputs do not depend on the input at all
        return torch.zeros_like(leaf).reshape(len(leaf), -1)
    (gradient,) = torch.autograd.grad(outputs.sum(), leaf, retain_graph=True, materialize_grads=True)
    return (gradient if std is None else gradient / std).reshape(len(leaf), -1)


def jacobian_rows(logits: Tensor, leaf: Tensor, std: Tensor | None, classes: range) -> Tensor:
    """Rows of J for some classes, (n, len(classes), D)."""
    rows = leaf.new_empty(len(leaf), len(classes), leaf[0].numel())
    for row, c in enumerate(classes):
        rows[:, row] = input_gradient(logits[:, c], leaf, std)
    return rows


def products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, (n, A, D) × (n, B, D) → (n, A, B), in float64, which no global TF32 setting reaches."""
    step = max(1, _GRAM_ELEMENTS // max(a[..., 0].numel(), b[..., 0].numel()))
    sums = a.new_zeros(len(a), a.shape[1], b.shape[1], dtype=float64_dtype(a))
    for p, q in zip(torch.split(a, step, dim=2), torch.split(b, step, dim=2), strict=True):
        sums += p.to(sums.dtype) @ q.to(sums.dtype).mT
    return sums


def combination(weights: Tensor, rows: Tensor, which: Tensor) -> Tensor:
    """Sums of rows by weights, (n, A) × (m, A, D) → (n, D), likewise; ``which`` of the m, (n,), each of the n takes."""
    step = max(1, _GRAM_ELEMENTS // weights.numel())
    left = weights[:, None].to(float64_dtype(rows))
    return torch.cat([(left @ part[which].to(left.dtype))[:, 0] for part in torch.split(rows, step, dim=2)], dim=1)


def float64_dtype(like: Tensor) -> torch.dtype:
    """Float64, or float32 where the device has none (Metal)."""
    return torch.float32 if like.device.type == "mps" else torch.float64
