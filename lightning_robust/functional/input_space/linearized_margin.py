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
from lightning_robust.functional._validation.tensors import check_gap_l1, check_gram
from lightning_robust.functional.input_space.likelihoods import LikelihoodName, column_likelihood_of


def linearized_margin(
    logits: Tensor,
    gram: Tensor,
    targets: Tensor,
    *,
    likelihood: LikelihoodName = "categorical",
    tolerance: float | None = None,
) -> Tensor:
    """Linearised L2 margin of each sample.

    Args:
        logits: ``(N, C)``.
        gram: ``(N, C, C)``, ``J Jᵀ``.
        targets: ``(N,)``, class indices; ``(N, C)`` with the other likelihoods.
        likelihood: What the logits mean. With ``"bernoulli"``, those of C labels, the margin is the distance at which
            any label flips, ``min_k |z_k| / ‖∇z_k‖``, and 0 if any is wrong. With ``"gaussian"``, predictions, it is
            the distance at which any of them moves by ``tolerance``, ``min_k tolerance / ‖∇z_k‖``.
        tolerance: How far a prediction may move, in its own units; for ``"gaussian"``.

    Returns:
        ``(N,)``, in input units; 0 if misclassified or tied, infinity if no gradient leads to another class, or all
        others are masked (see :func:`~lightning_robust.functional.fit_temperature`).

    Raises:
        ValueError: If shapes do not match, a target is not a class, label or number, or there is no tolerance where one
            is needed.

    Source: arXiv 1511.04599; for other likelihoods than ``"categorical"`` ours.
    """
    kind = column_likelihood_of(likelihood, tolerance)
    check_gram(logits, gram, fewest=kind.fewest_outputs)
    y = kind.check(logits, targets).to(logits.device)
    return kind.margins(logits, kind.slopes_l2(logits, gram).to(logits), y)


def linearized_margin_linf(
    logits: Tensor,
    gap_l1: Tensor,
    targets: Tensor,
    *,
    likelihood: LikelihoodName = "categorical",
    tolerance: float | None = None,
) -> Tensor:
    """Linearised L∞ margin of each sample; result and errors are as in :func:`linearized_margin`.

    Args:
        logits: ``(N, C)``.
        gap_l1: ``(N, C)``, L1 norms of the gradient gaps to the predicted class, from
            :func:`~lightning_robust.functional.linearize` with the same likelihood and tolerance. (If the predicted
            class is not the target, the margin is 0, so no other reference is needed.)
        targets: As in :func:`linearized_margin`.
        likelihood: As in :func:`linearized_margin`.
        tolerance: As in :func:`linearized_margin`.

    Source: arXiv 1511.04599, arXiv 1705.08475.
    """
    kind = column_likelihood_of(likelihood, tolerance)
    check_gap_l1(logits, gap_l1, fewest=kind.fewest_outputs)
    y = kind.check(logits, targets).to(logits.device)
    return kind.margins(logits, gap_l1, y)


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
