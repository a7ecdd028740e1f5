"""The damped natural gradient of a contrast of logits, by two methods for the same D × D system.

At an input with Jacobian ``J`` (C, D) and probabilities ``p``, the Fisher information is ``G = Jᵀ S J`` with
``S = diag(p) − p pᵀ``, the gradient of ``aᵀ z`` is ``g = Jᵀ a``, and the natural gradient is ``v = (G + λI)⁻¹ g``.

- **gram**: ``v = Jᵀ w`` with ``(λI + S K) w = a`` and ``K = J Jᵀ`` (the push-through identity). This solves a C × C
  system exactly, in float64; D appears in products only.
- **cg**: conjugate gradients on the D × D system, from products ``J p`` and ``Jᵀ u`` alone. G has rank C − 1, so C
  steps would be exact without rounding. If only a few of many classes matter, far fewer suffice.

The solvers know no network; ``natural_gradient_by_…`` apply them to one.

Source: De & Säfken, "The Myth of Robust Classes" (conjugate gradients); the exact solution is ours.
Cost: one forward pass, and C − 1 backward passes (gram) or two per step (cg).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional.fisher_rao._state import Paths
from lightning_robust.functional.fisher_rao.geometry import other_classes
from lightning_robust.functional.input_space.float64 import widened
from lightning_robust.functional.input_space.jacobian import (
    combination,
    gram_matrix,
    input_gradient,
    jacobian_rows,
    leaf_and_logits,
)
from lightning_robust.functional.input_space.units import Units

# Conjugate gradients end when the residual falls below this share of the gradient, or after this many steps per class.
_TOLERANCE = 1e-8
_STEPS_PER_CLASS = 4


class NaturalGradient(NamedTuple):
    """Solutions of ``n`` systems."""

    direction: Tensor  # ``v``, (n, D)
    change: Tensor  # ``J v``, (n, C): change of the logits along ``v``
    squared_norm: Tensor  # ``gᵀ v = vᵀ (G + λI) v``, (n,)


def natural_gradient_by_gram(
    model: SampleModel, units: Units, paths: Paths, x: Tensor, *, some: Tensor, which: Tensor
) -> tuple[Tensor, NaturalGradient]:
    """Probabilities (m, C) and natural gradients of paths at points ``x`` (m, ...), from whole Jacobians.

    The distinct points are ``x[some]``, and path i is at ``x[some[which[i]]]``: shared points are linearised once.
    """
    leaf, logits = leaf_and_logits(model.on(paths.sample[some]), x[some], check=None)
    source = paths.source[some]
    probs = widened(logits.detach()).softmax(dim=1)[which]
    # S ignores what is common to all logits, so logits relative to the source save one backward pass
    others = other_classes(source, logits.shape[1])
    relative = logits.gather(1, others) - logits.gather(1, source[:, None])
    rows = jacobian_rows(relative, leaf, units.std)
    others = others[which]
    natural = solve_by_gram(probs.gather(1, others), rows, paths.contrast.gather(1, others), paths.damping, which=which)
    return probs, natural._replace(change=torch.zeros_like(probs).scatter(1, others, natural.change))


def natural_gradient_by_cg(model: SampleModel, units: Units, paths: Paths, x: Tensor) -> tuple[Tensor, NaturalGradient]:
    """Probabilities (m, C) and natural gradients of paths at points ``x`` (m, ...), without Jacobians."""
    leaf, logits = leaf_and_logits(model.on(paths.sample), x, check=None)
    probs = widened(logits.detach()).softmax(dim=1)
    cotangent = torch.zeros_like(logits, requires_grad=True)
    pulled = torch.zeros_like(leaf)
    if logits.requires_grad:  # the logits depend on the input
        (pulled,) = torch.autograd.grad(logits, leaf, cotangent, create_graph=True, materialize_grads=True)

    def push(rows: Tensor) -> Tensor:
        """``J p``: the derivative of ``Jᵀ u``, which is linear in ``u``, along ``p``."""
        if not pulled.requires_grad:
            return torch.zeros_like(logits)
        along = units.change(rows.to(leaf).reshape(leaf.shape))
        (pushed,) = torch.autograd.grad(pulled, cotangent, along, retain_graph=True, materialize_grads=True)
        return pushed

    def pull(changes: Tensor) -> Tensor:
        return input_gradient((changes.to(logits) * logits).sum(dim=1), leaf, units.std)

    return probs, solve_by_conjugate_gradients(probs, push, pull, paths.contrast, paths.damping)


def solve_by_gram(probs: Tensor, rows: Tensor, contrast: Tensor, damping: Tensor, *, which: Tensor) -> NaturalGradient:
    """Solve exactly: ``probs`` and ``contrast`` (n, C), damping (n,), all float64, and whole Jacobians ``rows``.

    The Jacobian of system i is ``rows[which[i]]`` of (m, C, D). One class may be left out everywhere if ``rows`` and
    ``contrast`` are relative to it.
    """
    gram = gram_matrix(rows).to(probs)[which]
    information = probs[:, :, None] * (gram - (probs[:, None] @ gram))  # S K
    identity = torch.eye(probs.shape[1], dtype=probs.dtype, device=probs.device)
    weights: Tensor = torch.linalg.solve(information + damping[:, None, None] * identity, contrast)
    change = (gram @ weights[..., None])[..., 0]
    return NaturalGradient(combination(weights, rows, which), change, (contrast * change).sum(dim=1))


def solve_by_conjugate_gradients(
    probs: Tensor, push: Callable[[Tensor], Tensor], pull: Callable[[Tensor], Tensor], contrast: Tensor, damping: Tensor
) -> NaturalGradient:
    """Solve iteratively, as :func:`solve_by_gram` but with ``push``, ``p ↦ J p``, and ``pull``, ``u ↦ Jᵀ u``, alone.

    All systems advance together, and those that have converged stay as they are.
    """
    gradient = widened(pull(contrast))
    direction, change = torch.zeros_like(gradient), torch.zeros_like(contrast)
    residual = search = gradient
    squared = squared_before = residual.square().sum(dim=1)
    enough = _TOLERANCE**2 * squared
    for _ in range(_STEPS_PER_CLASS * probs.shape[1]):
        going = squared > enough
        if not going.any():
            break
        moved = push(search).to(contrast)
        centred = moved - (probs * moved).sum(dim=1, keepdim=True)
        image = pull(probs * centred).to(search) + damping.to(search)[:, None] * search  # (Jᵀ S J + λI) p
        length = torch.where(going, squared / (search * image).sum(dim=1), 0)
        direction = direction + length[:, None] * search
        change = change + length.to(change)[:, None] * moved
        residual = residual - length[:, None] * image
        squared_before, squared = squared, torch.where(going, residual.square().sum(dim=1), squared)
        search = residual + torch.where(going, squared / squared_before, 0)[:, None] * search
    return NaturalGradient(direction, change, (contrast * change).sum(dim=1))
