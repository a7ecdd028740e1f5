"""The Weight-Curvature Index: how much the loss can rise when each layer's weights move by a share of their norm.

``WCI = Σ_k √(‖W_k‖_F² tr H_k)`` over weight tensors with at least two dimensions (biases and normalisation are left
out). Multiplying the weights of one layer of a piecewise linear network by a constant and dividing those of the next
layer by it does not change the index, but changes the trace.

The standard error is that of the delta method. The root of a noisy trace is biased downwards by
``‖W_k‖ Var(tr H_k) / 8 tr H_k^{3/2}`` on average: a few 10⁻⁴ of the index at the error of a few percent that two probes
leave.

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

    A negative trace counts as 0. Noise can make a trace negative; on smooth networks the true trace can be, too.

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
    """Frobenius norm, 0-d, of each trained parameter tensor with at least two dimensions, by name.

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
    """``‖W_k‖_F √(tr H_k)`` of each layer, ``(L,)``; 0 where the trace is negative."""
    return weight_norms * traces.clamp_min(0).sqrt()


def curvature_slopes(weight_norms: Tensor, traces: Tensor, stderr: Tensor) -> Tensor:
    """Derivatives of the terms with respect to the traces, for the delta method, ``(L,)``.

    The square root has no derivative at 0. Its secant over one standard error approaches the derivative for small
    errors, and stays finite for large ones.

    Args:
        weight_norms: ``(L,)``.
        traces: ``(L,)``.
        stderr: ``(L,)``, standard errors of the traces.
    """
    there = traces.clamp_min(0)
    rise = (there + stderr).sqrt() - there.sqrt()
    slopes = torch.where(stderr > 1e-6 * there, rise / stderr, 0.5 / there.sqrt())
    return weight_norms * torch.where(slopes.isfinite(), slopes, 0)
