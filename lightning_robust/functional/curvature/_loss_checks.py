"""Checks that a custom loss is a mean over samples and has a second derivative, without which curvature is wrong.

Cost: a few calls of the loss, no forward pass of the network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust.functional.curvature._autograd_graph import (
    in_order_of_computation,
    is_custom,
    is_differentiable_once,
)

_NUM_SAMPLES = 32
_SLOPE_SLACK = 2e-2  # a loss may be computed in half precision
_STEP = 1e-2  # of finite differences, relative to the size of the outputs: a loss may round to single precision
_MEAN = "Expected argument `loss_fn` to return a mean over samples"
_REMEDY = (
    "Class weights or an ignored class go into `nn.CrossEntropyLoss(weight=..., ignore_index=...)`; any other loss may"
    " return one value per sample."
)
_TWICE = "Expected argument `loss_fn` to be a loss that can be differentiated twice"


def check_mean(of_batch: Tensor, of_samples: Tensor) -> None:
    """Raise unless the loss of a batch, 0-d, is the mean of the losses of its samples, ``(N,)``.

    A counterexample is a weighted mean: class weights cancel on a single sample.
    """
    slack = max(3e-3, 4 * torch.finfo(of_batch.dtype).eps) * float(of_samples.abs().mean())
    if not abs(float(of_samples.mean() - of_batch)) <= slack:
        raise ValueError(
            f"{_MEAN}, but its value on {len(of_samples)} samples is {float(of_batch):.6g} where the mean of its values"
            f" on each is {float(of_samples.mean()):.6g}. {_REMEDY}"
        )


def check_weights(of_batch: Tensor, of_samples: Tensor) -> None:
    """Raise unless all samples have the same weight in a loss, by its gradients with respect to outputs ``(N, ...)``.

    :func:`check_mean` cannot tell for an untrained network, which has about the same loss on every sample.
    """
    size, apart = float(of_samples.norm()), float((of_batch * len(of_samples) - of_samples).norm())
    if apart > _SLOPE_SLACK * size:
        raise ValueError(
            f"{_MEAN}, but its gradient on {len(of_samples)} samples is {apart / max(size, 1e-30):.2g} of its size away"
            f" from the mean of its gradients on each. {_REMEDY}"
        )


def check_second_derivative(loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor) -> None:
    """Raise if a custom backward pass hides the second derivative.

    Many fused losses compute the gradient in the forward pass and return it as a constant. This check compares the
    second derivative with finite differences of the first, at a point near the outputs, which may themselves lie at a
    kink. It asks for agreement in most elements only, as a difference may cross a kink. If the loss fails near the
    outputs, its derivatives are trusted. ``loss`` maps outputs and targets to the loss of each sample, ``(N,)``.
    """
    z, y = outputs[:_NUM_SAMPLES].detach(), targets[:_NUM_SAMPLES]

    def slope(at: Tensor) -> tuple[Tensor, Tensor]:
        at = at.detach().requires_grad_()
        total = loss(at, y).sum()
        if not total.requires_grad:
            return at, torch.zeros_like(at)
        return at, torch.autograd.grad(total, at, create_graph=True, materialize_grads=True)[0]

    graph = loss(z.clone().requires_grad_(), y).sum().grad_fn
    custom = [node for node in in_order_of_computation(graph) if is_custom(node)]
    if any(is_differentiable_once(node) for node in custom):
        raise ValueError(f"{_TWICE}, but {custom[0].name()} is marked with @once_differentiable.")
    if not custom:
        return
    generator = torch.Generator().manual_seed(0)
    noise, direction = (torch.randn(z.shape, generator=generator).to(z) for _ in range(2))
    size = z.square().mean().sqrt().clamp(0.1, 10)
    try:
        at, there = slope(z + 0.1 * size * noise)
        step = _STEP * size * direction
        differences = (slope(at + step)[1] - slope(at - step)[1]).detach() / 2
    except Exception:  # a loss of probabilities may raise anything outside [0, 1]
        return
    product = torch.zeros_like(at)
    try:
        if there.requires_grad:
            (product,) = torch.autograd.grad((there * step).sum(), at, materialize_grads=True)
    except RuntimeError as error:
        raise ValueError(f"{_TWICE}, but its second derivative failed: {error}") from error
    both = product.abs() + differences.abs()
    of_sample = there.detach().abs().reshape(len(z), -1).amax(dim=1)  # one that has diverged must not hide the others
    rounding = (100 * torch.finfo(z.dtype).eps * of_sample).view(-1, *(1,) * (z.ndim - 1))
    counted = both > torch.maximum(0.01 * both.max(), rounding)
    wrong = (product - differences).abs() > 0.1 * both
    if counted.any() and wrong[counted].double().mean() > 0.5:
        raise ValueError(
            f"{_TWICE}, but {custom[0].name()} has another second derivative than finite differences show. Does it save"
            " its gradient in the forward pass?"
        )
