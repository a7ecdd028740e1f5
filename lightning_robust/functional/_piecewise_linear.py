"""In which layers are the outputs of a network piecewise linear, and has it second derivatives at all?

Where they are, the Hessian of the loss and its Gauss–Newton matrix have the same diagonal block. With random ``w`` and
normal ``v`` on one parameter tensor, the Hessian of ``wᵀz`` times ``v`` vanishes in that tensor if, and only if,
the outputs are piecewise linear in it as far as automatic differentiation can tell. (Random signs will not do: equal
ones are in the null space of every softmax and normalisation. Second differences of the outputs
are no such test: they cross the kinks of ReLUs.)

Source: ours.
Cost: a Hessian-vector product on two samples for each parameter tensor; once per network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.functional._checks import check_outputs
from lightning_robust.functional._grad_mode import Weights, differentiable_weights, full_precision

_CLEARLY_CURVED = 1e-2  # the Hessian against the square of the gradient, beyond what rounding makes of zero in float32


def curved_layers(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    module: nn.Module | None = None,
    up_to_a_constant: bool = True,
    num_samples: int = 2,
) -> frozenset[str]:
    """Find the parameter tensors in which the outputs are not piecewise linear, or may not be.

    Tested on a few samples, and on copies of the weights that are disturbed at random, so that a branch that is
    initialised to zero is not taken for absent. In float32, where a piecewise linear layer has a Hessian of exactly
    zero and most others a large one; what lies between may be rounding, and is tested again in float64.

    Args:
        model: See :func:`hessian_trace`.
        inputs: ``(N, ...)``.
        module: See :func:`hessian_trace`.
        up_to_a_constant: Whether a number added to all outputs of a sample makes no difference, as for cross-entropy:
            then log-probabilities are as good as logits.
        num_samples: How many samples to look at.

    Returns:
        The names of the tensors.

    Raises:
        ValueError: If a second derivative does not exist.
    """
    few = inputs[:num_samples]

    def curvatures(dtype: torch.dtype) -> dict[str, float]:
        with differentiable_weights(model, module=module, dtype=dtype) as weights:
            outputs = _disturbed_outputs(model, weights, full_precision(few).to(dtype))
            return _curvatures(outputs, weights, up_to_a_constant=up_to_a_constant)

    first = curvatures(torch.float32)
    curved = {name for name, size in first.items() if size > _CLEARLY_CURVED}
    unclear = {name for name, size in first.items() if 0 < size <= _CLEARLY_CURVED}
    if unclear:
        try:
            second, tolerance = curvatures(torch.float64), 1e-9
        except Exception:  # whatever it is, float32 got over it: the device or the model insists on that
            second, tolerance = first, 1e-5
        curved |= {name for name in unclear if second[name] > tolerance}
    return frozenset(curved)


def _disturbed_outputs(model: Callable[[Tensor], Tensor], weights: Weights, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in weights.tensors.values():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            tensor.add_(0.1 * noise * tensor.square().mean().sqrt().clamp_min(1e-3))
    outputs = model(x.clone())
    check_outputs(outputs, num_samples=len(x))
    refuse_missing_derivatives(outputs, weights)
    return outputs.reshape(len(x), -1)


def _curvatures(outputs: Tensor, weights: Weights, *, up_to_a_constant: bool) -> dict[str, float]:
    """Size of the Hessian of random outputs in each tensor, against their squared gradient; infinite if unknown."""
    w = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1)).to(outputs)
    if up_to_a_constant:
        w = w - w.mean(dim=1, keepdim=True)
    tensors = list(weights.tensors.values())
    slopes: tuple[Tensor | None, ...] = (None,) * len(tensors)
    if outputs.requires_grad:
        slopes = torch.autograd.grad((w * outputs).sum(), tensors, create_graph=True, allow_unused=True)
    sizes = {}
    generator = torch.Generator().manual_seed(2)
    for (name, tensor), slope in zip(weights.tensors.items(), slopes, strict=True):
        product: Tensor | None = None
        if slope is not None and slope.requires_grad:
            v = torch.randn(tensor.shape, generator=generator).to(tensor)
            try:
                (product,) = torch.autograd.grad((slope * v).sum(), tensor, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise no_second_derivative(f"in layer {name!r}: {error}") from error
        if slope is None or (product is not None and not slope.any()):
            sizes[name] = math.inf  # these samples do not reach it, but others may
        else:
            sizes[name] = 0.0 if product is None else float(product.norm() / slope.detach().norm().square())
    return sizes


def refuse_missing_derivatives(outputs: Tensor, weights: Weights) -> None:
    """Raise if a function that can be differentiated only once stands between weights and outputs.

    ``once_differentiable`` promises an error when such a function is differentiated twice, but keeps it only where
    something else asks for a derivative of its incoming gradient: otherwise the second derivative is silently zero.

    Raises:
        ValueError: If there is one.
    """
    names = {id(tensor): name for name, tensor in weights.tensors.items()}
    for node in _nodes(outputs.grad_fn):
        backward: Any = getattr(getattr(node, "_forward_cls", None), "backward", None)
        wrapped = hasattr(backward, "__wrapped__")
        if not wrapped or backward.__code__.co_filename != torch.autograd.function.__file__:
            continue
        for below in _nodes(node):
            name = names.get(id(getattr(below, "variable", None)))
            if name is not None:
                raise no_second_derivative(f"in layer {name!r}: {node.name()} is marked with @once_differentiable")


def _nodes(start: torch.autograd.graph.Node | None) -> Iterator[torch.autograd.graph.Node]:
    stack, seen = [start], {None, start}
    while stack:
        node = stack.pop()
        if node is None:
            continue
        yield node
        for below, _ in node.next_functions:
            if below not in seen:
                seen.add(below)
                stack.append(below)


def no_second_derivative(cause: object) -> ValueError:
    """The error to raise where a second derivative is needed and fails."""
    return ValueError(
        f"Expected a model that can be differentiated twice with respect to its weights, but that failed {cause}. Use"
        " estimator='gauss_newton', which needs first derivatives only."
    )
