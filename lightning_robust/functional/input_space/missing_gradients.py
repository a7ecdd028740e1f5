"""Refuses networks whose outputs change with their inputs, but without gradients.

Every measurement that takes gradients with respect to inputs would call such a network perfectly robust: one that runs
under ``torch.no_grad()``, detaches, rounds, quantises or takes an argmax of its inputs, or is a forest of trees.

A gradient that is zero on all samples is no proof. A network may be constant, or its units dead or saturated there. So
the network is called elsewhere, and where its outputs differ, bisection follows them back to where they change. A
continuous network has a gradient there; one without is refused.

Source: ours.
Cost: none where any gradient differs from zero. Otherwise a few forward and backward passes, and 30 of each for a
network that rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_robust.functional._isolation.side_effects import watched_once
from lightning_robust.functional._validation.scales import tolerances
from lightning_robust.functional._validation.tensors import outputs_of

_BISECTIONS = 30  # down to the rounding of float32 inputs


class _Pass(NamedTuple):
    """What a forward and a backward pass show of a network."""

    outputs: Tensor
    depends: bool  # whether autograd leads from the outputs to the inputs at all
    has_gradient: bool  # whether any gradient differs from zero


def refuse_missing_gradients(network: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Call this where all gradients with respect to samples ``x`` (n, ...) are exactly zero.

    Raises:
        ValueError: If the outputs of the network change with its inputs, but without gradients.
    """
    here = _pass(network, x)
    if here.has_gradient:
        return
    tolerance = tolerances(here.outputs)

    def changed(outputs: Tensor) -> Tensor:
        return ((outputs - here.outputs).abs() > tolerance).reshape(len(x), -1).any(dim=1)

    for others in _elsewhere(x):
        there = _pass(network, others)
        if there.has_gradient:
            return
        if changed(there.outputs).any():
            if (here.depends or there.depends) and _has_gradient_between(network, x, others, changed):
                return
            raise ValueError(
                "Expected a model whose outputs have gradients with respect to its inputs, but they change without any,"
                " and every number would claim perfect robustness. Does its forward pass use `torch.no_grad()`,"
                " `detach()` or rounding, or `torch.autograd.grad` without `create_graph=True` or of a piecewise linear"
                " function?"
            )


def _elsewhere(x: Tensor) -> Iterator[Tensor]:
    """Other inputs in the range of these, because some networks refuse any others: of other samples, then of none."""
    if len(x) > 1:
        yield x.roll(1, dims=0)
    flat = x.reshape(len(x), -1)
    for others in (flat / 2, flat.roll(1, dims=1), flat.flip(1), 0 * flat):
        yield others.reshape(x.shape)


def _has_gradient_between(
    network: Callable[[Tensor], Tensor], x: Tensor, others: Tensor, changed: Callable[[Tensor], Tensor]
) -> bool:
    """Whether any gradient is met on the way back from other inputs to where the outputs change."""
    near, far = x, others
    for _ in range(_BISECTIONS):
        middle = near + (far - near) / 2
        found = _pass(network, middle)
        if found.has_gradient:
            return True
        beyond = changed(found.outputs).view(-1, *(1,) * (x.ndim - 1))
        near, far = torch.where(beyond, near, middle), torch.where(beyond, middle, far)
    return False


def _pass(network: Callable[[Tensor], Tensor], x: Tensor) -> _Pass:
    leaf = x.detach().clone().requires_grad_()
    outputs = outputs_of(network, leaf, check=None)
    if not outputs.requires_grad:
        return _Pass(outputs, depends=False, has_gradient=False)
    # random weights: outputs that always add up to the same have a gradient, too
    weights = torch.rand(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
    with watched_once():
        (gradient,) = torch.autograd.grad((weights * outputs).sum(), leaf, allow_unused=True)
    has_gradient = gradient is not None and bool(gradient.any())
    return _Pass(outputs.detach(), depends=gradient is not None, has_gradient=has_gradient)
