"""What must be true of a loss function of somebody's own before its curvature means anything.

Cost: a few calls of the loss, none of the network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_TWICE = "Expected argument `loss_fn` to be a loss that can be differentiated twice"


def check_sum(of_batch: Tensor, of_samples: Tensor) -> None:
    """Raise unless a loss is the mean, or the sum, of what it gives on single samples: class weights cancel there.

    Args:
        of_batch: 0-d, the loss of N samples together.
        of_samples: ``(N,)``, the losses of each alone.
    """
    slack = 1e-3 * float(of_samples.abs().mean())
    near = (abs(float(expected - of_batch)) <= slack for expected in (of_samples.mean(), of_samples.sum()))
    if not any(near):
        raise ValueError(
            f"Expected argument `loss_fn` to return a mean over samples, but its value on {len(of_samples)} samples is"
            f" {float(of_batch):.6g} where the mean of its values on each is {float(of_samples.mean()):.6g}. Class"
            " weights or an ignored class go into `nn.CrossEntropyLoss(weight=..., ignore_index=...)`; any other loss"
            " may return one value per sample."
        )


def check_second_derivative(loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor) -> None:
    """Raise if the second derivative is not that of the first: a backward pass written by hand may claim it constant.

    Compared with central differences, beside the outputs, where a kink is unlikely; in double precision if the loss
    has no constants of another type.

    Args:
        loss: Losses of single samples, ``(N,)``.
        outputs: ``(N, ...)``.
        targets: As the loss takes them.
    """
    generator = torch.Generator().manual_seed(0)
    factor, direction = (torch.randn(outputs.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    beside = outputs.detach().cpu().double() * (1 + 0.1 * factor)  # zeros, where kinks may be, stay and do not move

    def slope(at: Tensor) -> tuple[Tensor, Tensor]:
        at = at.detach().requires_grad_()
        total = loss(at, targets.to(at.dtype) if targets.is_floating_point() else targets).sum()
        flat = torch.zeros_like(at)
        return at, torch.autograd.grad(total, at, create_graph=True)[0] if total.requires_grad else flat

    step = 1e-5
    try:
        z = beside.to(outputs.device)
        at, there = slope(z)
    except (RuntimeError, TypeError):
        step = 1e-2
        z = beside.to(outputs)
        at, there = slope(z)
    v = z * direction.to(z)
    product = torch.zeros_like(z)
    try:
        if there.requires_grad:
            (product,) = torch.autograd.grad((there * v).sum(), at, materialize_grads=True)
    except RuntimeError as error:
        raise ValueError(f"{_TWICE}, but its second derivative failed: {error}") from error
    differences = (slope(z + step * v)[1] - slope(z - step * v)[1]).detach() / (2 * step)
    rounding = 100 * torch.finfo(z.dtype).eps * there.detach().abs().max() / step
    allowed = 0.05 * torch.maximum(differences.abs().max(), product.abs().max()) + rounding
    if ((product - differences).abs() > allowed).any():
        raise ValueError(
            f"{_TWICE}, but its second derivative is not that of its first. Is its backward pass written by hand?"
        )
