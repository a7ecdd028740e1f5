"""The damped natural gradient of a contrast of logits, by two ways to solve the same D × D system.

At an input with Jacobian ``J`` (C, D) and probabilities ``p`` the Fisher information is ``G = Jᵀ S J`` with
``S = diag(p) − p pᵀ``, the gradient of ``aᵀ z`` is ``g = Jᵀ a``, and wanted is ``v = (G + λI)⁻¹ g``.

- **gram**: ``v = Jᵀ w`` with ``(λI + S K) w = a`` and ``K = J Jᵀ`` (the push-through identity), so that a C × C system
  is solved exactly, in float64, and D appears in products only.
- **cg**: conjugate gradients on the D × D system, which need no more of it than ``J p`` and ``Jᵀ u``. G has rank C − 1,
  so that C steps would be exact without rounding; with many classes few of which matter, far fewer do.

Nothing here knows a network.

Source: De & Säfken, "The Myth of Robust Classes" (conjugate gradients); the exact solution is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_robust.functional.input_space.jacobian import combination, float64_dtype, products

# Conjugate gradients end when the residual is below this share of the gradient, or after so many steps.
_TOLERANCE = 1e-8
_STEPS_PER_CLASS = 4


class NaturalGradient(NamedTuple):
    """What ``n`` systems have given.

    Attributes:
        direction: ``v``, (n, D).
        change: ``J v``, (n, C): how the logits change along it.
        squared_norm: ``gᵀ v = vᵀ (G + λI) v``, (n,).
    """

    direction: Tensor
    change: Tensor
    squared_norm: Tensor


def softmax_metric(probs: Tensor, change: Tensor) -> Tensor:
    """``S u`` for ``u`` (n, C), at probabilities (n, C)."""
    return probs * (change - (probs * change).sum(dim=1, keepdim=True))


def fisher_rao_speed(probs: Tensor, change: Tensor) -> Tensor:
    """``√(uᵀ S u)``, (n,): how fast the prediction moves on the simplex while the logits change by ``u``."""
    centred = change - (probs * change).sum(dim=1, keepdim=True)
    return (probs * centred.square()).sum(dim=1).sqrt()


def solve_by_gram(probs: Tensor, rows: Tensor, contrast: Tensor, damping: Tensor, *, which: Tensor) -> NaturalGradient:
    """Solve exactly, from whole Jacobians.

    Args:
        probs: (n, C), float64; all classes, or all but one if rows and contrast are relative to that one.
        rows: ``J``, (m, C, D), which systems may share.
        contrast: ``a``, (n, C), float64.
        damping: ``λ``, (n,), float64, positive.
        which: (n,), which of them each system has.
    """
    gram = products(rows, rows).to(probs)[which]
    information = probs[:, :, None] * (gram - (probs[:, None] @ gram))  # S K
    identity = torch.eye(probs.shape[1], dtype=probs.dtype, device=probs.device)
    weights: Tensor = torch.linalg.solve(information + damping[:, None, None] * identity, contrast)
    change = (gram @ weights[..., None])[..., 0]
    return NaturalGradient(combination(weights, rows, which), change, (contrast * change).sum(dim=1))


def solve_by_conjugate_gradients(
    probs: Tensor,
    push: Callable[[Tensor], Tensor],
    pull: Callable[[Tensor], Tensor],
    contrast: Tensor,
    damping: Tensor,
) -> NaturalGradient:
    """Solve step by step; all systems advance together, and those that have ended wait.

    Args:
        probs: (n, C), float64.
        push: ``p ↦ J p``, (n, D) → (n, C).
        pull: ``u ↦ Jᵀ u``, (n, C) → (n, D).
        contrast: ``a``, (n, C), float64.
        damping: ``λ``, (n,), float64, positive.
    """
    gradient = pull(contrast)
    gradient = gradient.to(float64_dtype(gradient))
    direction, change = torch.zeros_like(gradient), torch.zeros_like(contrast)
    residual = search = gradient
    squared = squared_before = residual.square().sum(dim=1)
    enough = _TOLERANCE**2 * squared
    for _ in range(_STEPS_PER_CLASS * probs.shape[1]):
        going = squared > enough
        if not going.any():
            break
        moved = push(search).to(contrast)
        image = pull(softmax_metric(probs, moved)).to(search) + damping.to(search)[:, None] * search
        length = torch.where(going, squared / (search * image).sum(dim=1), 0)
        direction = direction + length[:, None] * search
        change = change + length.to(change)[:, None] * moved
        residual = residual - length[:, None] * image
        squared_before, squared = squared, torch.where(going, residual.square().sum(dim=1), squared)
        search = residual + torch.where(going, squared / squared_before, 0)[:, None] * search
    return NaturalGradient(direction, change, (contrast * change).sum(dim=1))
