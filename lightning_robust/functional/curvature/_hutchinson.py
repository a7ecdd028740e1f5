"""Hutchinson's estimator: quadratic forms ``v_kᵀ(Hv)_k`` of the Hessian with random signs, by double backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_robust.functional._isolation.weights import Weights
from lightning_robust.functional.curvature._autograd_graph import (
    in_order_of_computation,
    is_differentiable_once,
    leaf_of,
)
from lightning_robust.functional.curvature.signs import weight_signs


def quadratic_forms(objective: Tensor, tensors: dict[str, Tensor], keys: Sequence[tuple[int, ...]]) -> Tensor:
    """Multiply the Hessian of a scalar with random signs from both sides, for each of M keys and L parameter tensors.

    Returns ``(M, L)``, float64; raises a ``ValueError`` if a second derivative is not implemented.
    """
    wanted = list(tensors.values())
    forms = torch.zeros(len(keys), len(wanted), dtype=torch.float64)
    if not objective.requires_grad:
        return forms
    slopes: tuple[Tensor | None, ...] = ()
    try:
        slopes = torch.autograd.grad(objective, wanted, create_graph=True, allow_unused=True)
        for m, key in enumerate(keys):
            forms[m] = _forms(slopes, wanted, weight_signs(wanted, *key), last=m + 1 == len(keys)).to(forms)
    except RuntimeError as error:
        names = [name for (name, w), s in zip(tensors.items(), slopes, strict=False) if not _has_product(s, w)]
        raise _no_second_derivative(f"in layer {names[0]!r}: {error}" if names else error) from error
    return forms


def refuse_missing_derivatives(outputs: Tensor, weights: Weights) -> None:
    """Raise a ``ValueError`` if a function that can be differentiated only once stands between weights and outputs.

    torch promises an error when a ``@once_differentiable`` function is differentiated twice. It raises only if the
    function's incoming gradient requires a derivative itself; otherwise the second derivative is silently zero.
    """
    names = {id(tensor): name for name, tensor in weights.tensors.items()}
    for node in in_order_of_computation(outputs.grad_fn):
        if is_differentiable_once(node):
            for below in in_order_of_computation(node):
                name = names.get(id(leaf_of(below)))
                if name is not None:
                    raise _no_second_derivative(f"in layer {name!r}: {node.name()} is marked with @once_differentiable")


def _forms(slopes: Sequence[Tensor | None], wanted: Sequence[Tensor], signs: Sequence[Tensor], *, last: bool) -> Tensor:
    """``v_kᵀ(Hv)_k`` of each tensor, ``(L,)``, for signs ``v``. What takes the memory of all weights ends with it."""
    zero = signs[0].new_zeros(())
    pairs = [(s, v) for s, v in zip(slopes, signs, strict=True) if s is not None and s.requires_grad]
    if not pairs:
        return zero.expand(len(wanted))
    curved, directions = zip(*pairs, strict=True)
    products = torch.autograd.grad(curved, wanted, directions, retain_graph=not last, allow_unused=True)
    return torch.stack(
        [zero if p is None else torch.dot(p.flatten(), v.flatten()) for p, v in zip(products, signs, strict=True)]
    )


def _no_second_derivative(cause: object) -> ValueError:
    return ValueError(
        "Expected a model that can be differentiated twice with respect to its weights, but that failed"
        f" {str(cause).rstrip('.')}. Use estimator='gauss_newton', which needs first derivatives only."
    )


def _has_product(slope: Tensor | None, tensor: Tensor) -> bool:
    if slope is None or not slope.requires_grad:
        return True
    try:
        torch.autograd.grad(slope.sum(), tensor, retain_graph=True, allow_unused=True)
    except RuntimeError:
        return False
    return True
