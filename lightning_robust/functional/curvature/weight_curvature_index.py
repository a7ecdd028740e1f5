"""The Weight-Curvature Index: how much the loss can rise when weights move by a share of their size.

``WCI = Σ_k √(‖W_k‖_F² tr H_k)`` over weight tensors with at least two dimensions (biases and normalisation are left
out). It does not change when the weights of one layer of a piecewise linear network are multiplied by a constant and
those of the next divided by it; the trace does.

Its error bar is that of the delta method: the root of a noisy trace is a little too small, on average by
``‖W_k‖ Var(tr H_k) / 8 tr H_k^{3/2}``, which at the probe errors of a few percent that two probes leave is a share of a
few 10⁻⁴.

Source: arXiv 2410.07719. The standard error is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_robust.functional._isolation.weights import differentiable_weights
from lightning_robust.functional._validation.arguments import FLOATING, as_numbers, expected_but_got


def weight_curvature_index(weight_norms: Tensor | Sequence[float], traces: Tensor | Sequence[float]) -> Tensor:
    """Sum of ``‖W_k‖_F √(tr H_k)`` over layers.

    A trace below 0, which happens by noise and, on smooth networks, in truth, counts as 0.

    Args:
        weight_norms: ``(L,)``, Frobenius norms ``‖W_k‖_F``.
        traces: ``(L,)``, traces of the layers' Hessian blocks.

    Returns:
        0-d, in units of the square root of the loss.

    Raises:
        ValueError: If the shapes differ or are not ``(L,)``, a norm is negative or a value is not finite.

    Source: arXiv 2410.07719.
    """
    norms = _of_layers("weight_norms", weight_norms, "one finite number ≥ 0 per layer", at_least=0)
    values = _of_layers("traces", traces, "one finite number per layer", at_least=-math.inf)
    if norms.shape != values.shape:
        raise ValueError(
            "Expected arguments `weight_norms` and `traces` of one number per layer each, but got shapes"
            f" {tuple(norms.shape)} and {tuple(values.shape)}."
        )
    return curvature_terms(norms, values).sum()


def weight_norms(model: Callable[[Tensor], Tensor], *, module: nn.Module | None = None) -> dict[str, Tensor]:
    """Frobenius norm, 0-d, of each trained parameter tensor with at least two dimensions, by its name.

    Args:
        model: See :func:`~lightning_robust.functional.hessian_trace`.
        module: See :func:`~lightning_robust.functional.hessian_trace`.
    """
    with differentiable_weights(model, module=module) as weights, torch.no_grad():
        return {name: tensor.norm() for name, tensor in weights.tensors.items() if tensor.ndim > 1}


def _of_layers(name: str, values: Tensor | Sequence[float], expected: str, *, at_least: float) -> Tensor:
    numbers = as_numbers(values)
    if numbers is None or not all(at_least <= number and math.isfinite(number) for number in numbers):
        raise ValueError(expected_but_got(name, expected, values))
    if isinstance(values, Tensor) and values.dtype not in FLOATING:
        return values.float()
    return torch.as_tensor(values if all(isinstance(value, float | Tensor) for value in values) else numbers)


def curvature_terms(weight_norms: Tensor, traces: Tensor) -> Tensor:
    """``‖W_k‖_F √(tr H_k)`` of each layer, ``(L,)``."""
    return weight_norms * traces.clamp_min(0).sqrt()


def curvature_slopes(weight_norms: Tensor, traces: Tensor, stderr: Tensor) -> Tensor:
    """Derivatives of the terms with respect to the traces, for the delta method, ``(L,)``.

    The square root has no derivative at 0. Its secant over one standard error is the derivative where the error is
    small, and stays finite where it is not.

    Args:
        weight_norms: ``(L,)``.
        traces: ``(L,)``.
        stderr: ``(L,)``, of the traces.
    """
    there = traces.clamp_min(0)
    rise = (there + stderr).sqrt() - there.sqrt()
    slopes = torch.where(stderr > 1e-6 * there, rise / stderr, 0.5 / there.sqrt())
    return weight_norms * torch.where(slopes.isfinite(), slopes, 0)
