"""Linearised margins, and the robust accuracy they predict without running an attack.

The distance from ``x`` to the nearest decision boundary of the linearised network,

    r(x) = min_{k≠y} (z_y − z_k) / ‖∇_x(z_y − z_k)‖_q,    q dual to the norm of the perturbation (L2: 2, L∞: 1),

and 0 if the sample is misclassified. No boundary leads to a masked class. The share of samples with ``r(x) > ε``
predicts the accuracy under attacks of size ε, for every ε at once. A linearisation with a valid range gives L∞ margins
within that range.

Source: DeepFool, arXiv 1511.04599 (the linearised distance); Hein & Andriushchenko, arXiv 1705.08475 (dual norms); the
accuracy curve is ours.
Cost: algebra on a linearisation; no forward or backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_robust.functional._validation.arguments import as_numbers, check_floating, expected_but_got
from lightning_robust.functional._validation.scales import masked_classes
from lightning_robust.functional._validation.tensors import check_gap_l1, check_gram, check_targets
from lightning_robust.functional.input_space.float64 import to_float64


def linearized_margin(logits: Tensor, gram: Tensor, targets: Tensor) -> Tensor:
    """Linearised L2 margin of each sample.

    Args:
        logits: ``(N, C)``.
        gram: ``(N, C, C)``, ``J Jᵀ``.
        targets: ``(N,)``, class indices.

    Returns:
        ``(N,)``, in input units; 0 if misclassified or tied, infinity if no gradient leads to another class, or all
        others are masked (see :func:`~lightning_robust.functional.fit_temperature`).

    Raises:
        ValueError: If shapes do not match or a target is not a class.

    Source: arXiv 1511.04599.
    """
    check_gram(logits, gram)
    y = check_targets(targets, num_samples=len(logits), num_classes=logits.shape[1]).to(logits.device)
    return _smallest_ratio(logits, gap_l2(gram, y).to(logits), y)


def linearized_margin_linf(logits: Tensor, gap_l1: Tensor, targets: Tensor) -> Tensor:
    """Linearised L∞ margin of each sample; result and errors are as in :func:`linearized_margin`.

    Args:
        logits: ``(N, C)``.
        gap_l1: ``(N, C)``, L1 norms of the gradient gaps to the predicted class. (If the predicted class is not the
            target, the margin is 0, so no other reference is needed.)
        targets: ``(N,)``, class indices.

    Source: arXiv 1511.04599, arXiv 1705.08475.
    """
    check_gap_l1(logits, gap_l1)
    y = check_targets(targets, num_samples=len(logits), num_classes=logits.shape[1]).to(logits.device)
    return _smallest_ratio(logits, gap_l1, y)


def gap_l2(gram: Tensor, classes: Tensor) -> Tensor:
    """L2 norms ``‖∇(z_y − z_k)‖₂ = √(K_yy − 2 K_yk + K_kk)`` of the gradient gaps, ``(N, C)``, float64."""
    wide = to_float64(gram)
    y = classes.to(wide.device)
    squared = wide.diagonal(dim1=1, dim2=2)
    distances = squared.gather(1, y[:, None]) - 2 * wide.take_along_dim(y[:, None, None], dim=1)[:, 0] + squared
    return distances.clamp_min(0).sqrt()


def linearized_accuracy(margins: Tensor, epsilons: Sequence[float] | Tensor) -> Tensor:
    """Share of samples whose margin exceeds each ε: the robust accuracy predicted at that ε.

    Args:
        margins: ``(N,)``, from :func:`linearized_margin` or :func:`linearized_margin_linf`.
        epsilons: ``(E,)``, not negative, in input units. At 0 the result is the clean accuracy.

    Returns:
        ``(E,)``, between 0 and 1.

    Raises:
        ValueError: If ``margins`` is not a non-empty vector without NaN, or an ε is negative or NaN.

    Source: ours.
    """
    check_floating("margins", margins, "(N,)")
    if margins.ndim != 1 or len(margins) == 0 or margins.isnan().any():
        raise ValueError(
            f"Expected argument `margins` to be a non-empty vector without NaN, but got shape {tuple(margins.shape)}."
        )
    numbers = as_numbers(epsilons)
    if numbers is None or not all(number >= 0 for number in numbers):
        raise ValueError(expected_but_got("epsilons", "a vector of numbers ≥ 0", epsilons))
    eps = torch.tensor(numbers, dtype=margins.dtype, device=margins.device)
    return (margins[None, :] > eps[:, None]).to(margins.dtype).mean(dim=1)


def _smallest_ratio(logits: Tensor, distances: Tensor, targets: Tensor) -> Tensor:
    """Smallest (z_y − z_k)/distance_k over k ≠ y; 0 unless all gaps are positive."""
    gaps = logits.gather(1, targets[:, None]) - logits
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, targets[:, None], value=False)
    correct = (gaps > 0).logical_or(~others).all(dim=1)
    ratios = torch.where(others & ~masked_classes(logits), gaps / distances, torch.inf)
    return torch.where(correct, ratios.amin(dim=1), 0.0)
