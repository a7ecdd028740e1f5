"""A root of the softmax's Fisher information, for estimates of traces from random signs.

With ``F Fᵀ = diag(p) − p pᵀ`` and random signs ``u``, ``‖Jᵀ F u‖²`` has the mean ``tr Jᵀ (diag(p) − p pᵀ) J``. Its
variance, twice the sum of squares off the diagonal of ``Fᵀ J Jᵀ F``, depends on the choice of the root. The obvious
ones are bad: a sample torn between two classes has a matrix of rank one, but ``diag(√p) − p √pᵀ`` and the symmetric
root spread it over two columns that cancel for half of all signs (an error of 100 % per sample). Here the root takes
the multinomial apart one class at a time, most probable first: column ``j`` sets class ``j`` against the mean of the
classes after it. On a CIFAR ResNet-20 this lowers the variance 21-fold, on small CNNs 2 to 9-fold, at no cost.

Source: closed-form Cholesky factor of the multinomial covariance, Tanabe & Sagae 1992; its use here is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.functional.input_space.float64 import float64_dtype

_SORTED = 32  # of many classes


def softmax_root(logits: Tensor, signs: Tensor) -> Tensor:
    """``F u`` with ``F Fᵀ = diag(p) − p pᵀ`` and ``p = softmax(logits)``, taking classes apart most probable first.

    With probabilities sorted in descending order and ``t_j = Σ_{i ≥ j} p_i``, column ``j`` has ``√(p_j t_{j+1} / t_j)``
    at ``j``, ``−p_i √(p_j / (t_j t_{j+1}))`` at ``i > j`` and zeros before. Signs and the result, float64, are
    ``(M, N, C)``; signs of the last column have no effect.
    """
    p, order = logits.detach().double().softmax(dim=1).sort(dim=1, descending=True)
    in_order = _apart(p, signs)
    return torch.zeros_like(in_order).scatter_(2, order.expand_as(in_order), in_order)


def softmax_root_of_many(logits: Tensor, signs: Tensor) -> Tensor:
    """The same for many classes, of which only the most probable are sorted: any order of the rest gives a root.

    Signs and the result are ``(N, C)``, the result in the precision of the logits, ``(N, C)``.
    """
    p = logits.detach().to(float64_dtype(logits)).softmax(dim=1)
    top = p.topk(min(_SORTED, p.shape[1]), dim=1)
    in_order = torch.cat([top.values, p.scatter(1, top.indices, 0.0)], dim=1)
    of_order = torch.cat([signs.gather(1, top.indices), signs], dim=1)
    found = _apart(in_order, of_order[None])[0].to(logits)
    sorted_ones = top.indices.shape[1]
    return found[:, sorted_ones:].scatter(1, top.indices, found[:, :sorted_ones])


def _apart(p: Tensor, signs: Tensor) -> Tensor:
    """``F u`` (M, N, C) for probabilities (N, C), one class taken apart from those after it at a time."""
    tails = _cumulated(p.flip(1)).flip(1)
    after = torch.cat([tails[:, 1:], torch.zeros_like(tails[:, :1])], dim=1)
    slopes = (p / (tails * after)).sqrt()
    slopes = torch.where((tails * after > 0) & slopes.isfinite(), slopes, 0)
    weighted = signs.to(slopes) * slopes  # (M, N, C)
    before = _cumulated(weighted) - weighted
    return weighted * after - p * before


def _cumulated(values: Tensor) -> Tensor:
    """Cumulative sums along the last dimension; on the CPU if deterministic algorithms rule out the GPU's own."""
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return values.cpu().cumsum(dim=-1).to(values.device)
    return values.cumsum(dim=-1)
