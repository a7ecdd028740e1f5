"""The linearisation of a network around its inputs: the pass that every input-side quantity shares.

For each sample with logits ``z = f(x)`` and Jacobian ``J = ∂z/∂x`` (C, D), the small matrix ``K = J Jᵀ`` (C, C) and the
logits are a sufficient statistic for the spectral norm and the trace of the input Fisher information at any
temperature, and for all L2 linearised margins. L∞ margins need one (N, C) tensor more: the L1 norms of the gradient
gaps ``∇(z_ŷ − z_k)`` with ``ŷ`` the predicted class, taken in the same pass.

Inputs often have a range that perturbations cannot leave: no pixel is blacker than black. A feature i that can move by
``room_i`` in the direction that closes a gap then contributes ``|d_i| min(ε, room_i)`` to what a perturbation of size ε
achieves, ``d`` the gradient gap, and the boundary is where these add up to ``z_ŷ − z_k``. That ε takes the place of gap
over L1 norm (ours). On digits, half of whose pixels are black or white, this is the difference between a prediction of
32 % and one of 55 % where an attack finds 56 %.

Source: ours (an exact reformulation of arXiv 2606.04767 and arXiv 1511.04599).
Cost: one forward pass and C first-order backward passes with respect to the input, on the whole chunk at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.functional._arguments import check_function, check_positive_integer
from lightning_robust.functional._checks import (
    channelwise,
    check_finite,
    check_inputs,
    check_logits,
    check_valid_range,
    unnormalised,
)
from lightning_robust.functional._grad_mode import differentiable, full_precision

# Jacobian elements held at once when the user sets no bound: 256 MiB in float32.
_DEFAULT_ELEMENTS = 2**26
# Input elements that pass through the network together on a CPU when the user sets no bound (42 images of 3 × 32 × 32):
# larger intermediate results leave the caches, and the allocator gives them back to the system each time, a third of
# the run time of a ResNet-20. Small networks on small inputs gain from larger batches instead.
_DEFAULT_CPU_INPUT_ELEMENTS = 2**17
# Jacobian elements converted to float64 at once while the Gram matrices are accumulated: 8 MiB.
_GRAM_ELEMENTS = 2**20


@dataclass(frozen=True)
class Linearization:
    """What the first-order behaviour of a network around N inputs depends on.

    Attributes:
        logits: ``(N, C)``, the network's outputs.
        gram: ``(N, C, C)``, ``J Jᵀ`` with ``J`` in logits per unit of un-normalised input, in float64: margins and
            Fisher information are differences of its entries, which a component common to all rows of ``J`` would
            drown.
        gap_l1: ``(N, C)``, ``‖∇(z_ŷ − z_k)‖₁`` for every class ``k`` against the predicted class ``ŷ = argmax z``, or
            ``None`` where the method that made the linearisation cannot know it. With a valid range, what a
            perturbation within it achieves on average per unit of its size on the way to the boundary:
            ``(z_ŷ − z_k) / ε``, and 0 where it cannot get there.
    """

    logits: Tensor
    gram: Tensor
    gap_l1: Tensor | None


def linearize(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    input_std: float | Sequence[float] | Tensor | None = None,
    input_mean: float | Sequence[float] | Tensor | None = None,
    valid_range: tuple[float, float] | None = None,
    chunk_size: int | None = None,
) -> Linearization:
    """Linearise ``model`` around each of ``inputs``, exactly.

    A module (or its method) runs in eval mode and float32, or float64 if it is in float64; nothing of it is changed. A
    plain function is called as it is.

    Args:
        model: Maps inputs ``(N, ...)`` to logits ``(N, C)``, sample by sample.
        inputs: ``(N, ...)``, floating point, any shape.
        input_std: Standard deviation by which the inputs were divided, one number or one per channel (dimension 1).
            With it all results are in units of the un-normalised input.
        input_mean: What was subtracted from them before that, likewise; 0 by default. Only ``valid_range`` needs it.
        valid_range: Smallest and largest value of an un-normalised input, e.g. ``(0, 1)``, which perturbations cannot
            leave. It changes ``gap_l1`` and with it L∞ margins, nothing else. By default there is none.
        chunk_size: Largest number of Jacobian rows (one per sample and class, each of the size of an input) held in
            memory at once; ``chunk_size // C`` samples pass through the network together. Below ``C`` the samples pass
            one by one and the classes in blocks, which costs more backward passes; three rows are the least. By default
            the Jacobian of a chunk is kept below 256 MiB in float32 (but never less than one sample's), and on a CPU
            small enough for the caches.

    Returns:
        A :class:`Linearization` of N samples.

    Raises:
        TypeError: If ``inputs`` are not floating point or the model does not return a tensor.
        ValueError: If an argument has a wrong shape or value, the logits are not ``(N, C)`` with ``C ≥ 2``, or inputs,
            logits or gradients are not finite.

    Source: ours; see the module's docstring.
    """
    if chunk_size is not None:
        check_positive_integer("chunk_size", chunk_size)
    check_function("model", model)
    check_inputs(inputs)
    valid_range = check_valid_range(valid_range)
    std = channelwise(input_std, inputs, name="input_std")
    mean = channelwise(input_mean, inputs, name="input_mean", positive=False)
    with differentiable(model):
        x = full_precision(inputs)
        num_classes = _count_classes(model, x)
        chunks = [
            _linearize_chunk(model, chunk, std, mean, valid_range, num_classes if chunk_size is None else chunk_size)
            for chunk in torch.split(x, _samples_at_once(x, num_classes, chunk_size))
        ]
    logits, gram, gap_l1 = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    check_finite(gram, "gradients of the logits with respect to the inputs")
    return Linearization(logits=logits, gram=gram, gap_l1=gap_l1)


def _samples_at_once(x: Tensor, num_classes: int, chunk_size: int | None) -> int:
    if chunk_size is not None:
        return max(1, chunk_size // num_classes)
    size = max(1, x[0].numel())
    samples = max(1, _DEFAULT_ELEMENTS // (size * num_classes))
    if x.device.type == "cpu":
        samples = min(samples, max(8, _DEFAULT_CPU_INPUT_ELEMENTS // size))
    num_chunks = -(-len(x) // samples)
    return -(-len(x) // num_chunks)  # chunks of about equal size


def _linearize_chunk(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    std: Tensor | None,
    mean: Tensor | None,
    valid_range: tuple[float, float] | None,
    max_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    logits = model(leaf.clone())  # not the leaf itself: a network may begin with an in-place layer
    check_logits(logits, num_samples=len(x))
    num_samples, num_classes = logits.shape
    predicted = logits.argmax(dim=1, keepdim=True)

    def jacobian(classes: range) -> Tensor:
        """Rows of J, (n, len(classes), D)."""
        rows = x.new_empty(num_samples, len(classes), x[0].numel())
        for row, c in enumerate(classes):
            rows[:, row] = _input_gradient(logits[:, c], leaf, std)
        return rows

    gaps = (logits.gather(1, predicted) - logits).detach()
    room = None if valid_range is None else _Room(unnormalised(x, std, mean), valid_range)

    def slopes(differences: Tensor, c: int) -> Tensor:
        """Column c of ``gap_l1``, from the gradient gaps (n, D) to that class."""
        return differences.abs().sum(dim=1) if room is None else room.slopes(differences, gaps[:, c])

    gram = x.new_empty(num_samples, num_classes, num_classes, dtype=_wide(x))
    gap_l1 = x.new_empty(num_samples, num_classes)
    if num_classes <= max_rows:
        rows = jacobian(range(num_classes))
        top = rows.take_along_dim(predicted[..., None], dim=1)[:, 0]
        gram[:] = _products(rows, rows)
        for c in range(num_classes):
            gap_l1[:, c] = slopes(top - rows[:, c], c)
    else:  # one sample with more classes than rows may be held: two blocks of classes at a time
        size = max(1, (max_rows - 1) // 2)
        blocks = [range(start, min(start + size, num_classes)) for start in range(0, num_classes, size)]
        top = _input_gradient(logits.gather(1, predicted), leaf, std)
        for i, block in enumerate(blocks):
            rows = jacobian(block)
            here = slice(block.start, block.stop)
            gram[:, here, here] = _products(rows, rows)
            for row, c in enumerate(block):
                gap_l1[:, c] = slopes(top - rows[:, row], c)
            for other in blocks[:i]:
                there = slice(other.start, other.stop)
                gram[:, here, there] = _products(rows, jacobian(other))
                gram[:, there, here] = gram[:, here, there].mT
    return logits.detach(), gram, gap_l1


class _Room:
    """How far each feature can move, in either direction, before it leaves the valid range."""

    def __init__(self, raw: Tensor, valid_range: tuple[float, float]) -> None:
        flat = raw.reshape(len(raw), -1).to(_wide(raw))
        self._down, self._up = (flat - valid_range[0]).clamp_min(0), (valid_range[1] - flat).clamp_min(0)

    def slopes(self, differences: Tensor, gaps: Tensor) -> Tensor:
        """``gaps`` (n,), with gradients (n, D), over the size ε of the smallest perturbation that closes them.

        What a perturbation achieves, ``Σ_i |d_i| min(ε, room_i)``, is concave and piecewise linear in ε: Newton's
        method from below never oversteps and ends after as many steps as pieces at the most, in practice after three.
        """
        room = torch.where(differences > 0, self._down, self._up)
        weights, target = differences.abs().to(room), gaps.to(room)
        norms = weights.sum(dim=1)
        epsilon = target / norms
        for _ in range(room.shape[1]):
            missing = target - (weights * torch.minimum(room, epsilon[:, None])).sum(dim=1)
            step = missing / (weights * (room > epsilon[:, None])).sum(dim=1)
            step = torch.where((missing > 1e-12 * target) & epsilon.isfinite(), step, 0)
            if not (step > 0).any():
                break
            epsilon = epsilon + step
        return torch.where(target > 0, target / epsilon, norms).to(differences)


def _input_gradient(outputs: Tensor, leaf: Tensor, std: Tensor | None) -> Tensor:
    """Gradient of each sample's output with respect to its own un-normalised input, (n, D)."""
    if not outputs.requires_grad:  # the outputs do not depend on the input at all
        return torch.zeros_like(leaf).reshape(len(leaf), -1)
    (gradient,) = torch.autograd.grad(outputs.sum(), leaf, retain_graph=True, materialize_grads=True)
    return (gradient if std is None else gradient / std).reshape(len(leaf), -1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of rows, (n, A, D) × (n, B, D) → (n, A, B), in float64, which no global TF32 setting reaches."""
    step = max(1, _GRAM_ELEMENTS // max(a[..., 0].numel(), b[..., 0].numel()))
    products = a.new_zeros(len(a), a.shape[1], b.shape[1], dtype=_wide(a))
    for p, q in zip(torch.split(a, step, dim=2), torch.split(b, step, dim=2), strict=True):
        products += p.to(products.dtype) @ q.to(products.dtype).mT
    return products


def _wide(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64


def _count_classes(model: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Number of classes, from two samples: the size of a chunk depends on it."""
    with torch.no_grad():
        logits = model(x[:2].clone())
    check_logits(logits, num_samples=min(2, len(x)))
    return logits.shape[1]


def widen(tensor: Tensor) -> Tensor:
    """Float64, on the CPU where the device has none: C × C algebra is cheap, and margins live on differences."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
