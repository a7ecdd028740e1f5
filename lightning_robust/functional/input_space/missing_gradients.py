"""Refuses networks whose outputs change with their inputs, but without gradients.

Every measurement that takes gradients with respect to inputs would call such a network perfectly robust: one that runs
under ``torch.no_grad()``, detaches, rounds, quantises or takes an argmax of its inputs, or is a forest of trees.

A gradient of zero is no proof. A network may be constant at a sample, or its units dead or saturated there. So the
network is called elsewhere, and where the outputs of a sample differ, bisection follows them back to where they begin
to change. A continuous network has a gradient there; one without is refused. Every sample is followed for itself,
because a network may have gradients for some samples and none for others: one that leaves early, under ``no_grad``,
where it is sure.

Where outputs jump, the slope may be steeper than floating-point inputs resolve. Samples at a jump are refused only if
no gradient was met on the way of any sample.

Source: ours.
Cost: none for samples with a gradient. For the others a few forward and backward passes, and 30 of each at a jump.
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
    """What a forward and a backward pass show of a network at some points."""

    at: Tensor
    outputs: Tensor
    depends: bool  # whether autograd leads from the outputs to the inputs at all
    has_gradient: Tensor  # (n,), whether any gradient of a sample differs from zero

    def where(self, chosen: Tensor, other: _Pass) -> _Pass:
        """This pass for chosen samples (n,), the other one for the rest."""
        at, outputs = (
            torch.where(_like(chosen, mine), mine, its) for mine, its in zip(self[:2], other[:2], strict=True)
        )
        has_gradient = torch.where(chosen, self.has_gradient, other.has_gradient)
        return _Pass(at, outputs, self.depends or other.depends, has_gradient)


def refuse_missing_gradients(network: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Call this with the samples ``x`` (n, ...) all of whose gradients are exactly zero.

    Raises:
        ValueError: If the outputs of the network change with its inputs, but without gradients.
    """
    here = _pass(network, x)
    tolerance = tolerances(here.outputs)
    left = ~here.has_gradient  # samples of which nothing is known
    for others in _elsewhere(x):
        if not left.any():
            return
        there = _pass(network, others)
        moved = left & _differ(there, here, tolerance)
        left = left & ~moved & ~there.has_gradient
        if moved.any() and (here.depends or there.depends):
            moved = _change_without_gradient(network, here, there, moved, tolerance)
        if moved.any():
            raise ValueError(
                "Expected a model whose outputs have gradients with respect to its inputs, but they change without any"
                f" ({int(moved.sum())} of {len(x)} samples with gradients of 0), and every number would claim perfect"
                " robustness. Does its forward pass use `torch.no_grad()`, `detach()` or rounding, or"
                " `torch.autograd.grad` without `create_graph=True` or of a piecewise linear function? A model without"
                " gradients is measured by its answers: `Probe(predict, inputs, targets, queries=200)`."
            )


def _elsewhere(x: Tensor) -> Iterator[Tensor]:
    """Other inputs in the range of these, because some networks refuse any others: of other samples, then of none."""
    if len(x) > 1:
        yield x.roll(1, dims=0)
    flat = x.reshape(len(x), -1)
    for others in (flat / 2, flat.roll(1, dims=1), flat.flip(1), 0 * flat):
        yield others.reshape(x.shape)


def _change_without_gradient(
    network: Callable[[Tensor], Tensor], here: _Pass, there: _Pass, moved: Tensor, tolerance: Tensor
) -> Tensor:
    """Which of the samples that have ``moved`` (n,) have outputs that begin to change without a gradient, (n,)."""
    near, far = here, there
    has_left = torch.zeros_like(moved)  # whether a point away from the sample is known where nothing has changed
    met = bool((moved & there.has_gradient).any())
    for _ in range(_BISECTIONS):
        middle = _pass(network, near.at + (far.at - near.at) / 2)
        met = met or bool((moved & middle.has_gradient).any())
        beyond = _differ(middle, here, tolerance)
        near, far = near.where(beyond, middle), middle.where(beyond, far)
        has_left = has_left | ~beyond
        moved = moved & ~(has_left & (near.has_gradient | far.has_gradient))
        if not moved.any():
            break
    return moved & ~_differ(far, near, tolerance) if met else moved


def _differ(one: _Pass, other: _Pass, tolerance: Tensor) -> Tensor:
    """Which samples (n,) have other outputs at one point than at another."""
    differences = (one.outputs - other.outputs).abs() > tolerance
    return differences.reshape(len(differences), -1).any(dim=1)


def _pass(network: Callable[[Tensor], Tensor], x: Tensor) -> _Pass:
    leaf = x.detach().clone().requires_grad_()
    outputs = outputs_of(network, leaf, check=None)
    gradient = None
    if outputs.requires_grad:
        # random weights: outputs that always add up to the same have a gradient, too
        weights = torch.rand(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
        with watched_once():
            (gradient,) = torch.autograd.grad((weights * outputs).sum(), leaf, allow_unused=True)
    nothing = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    has_gradient = nothing if gradient is None else gradient.reshape(len(x), -1).any(dim=1)
    return _Pass(x, outputs.detach().clone(), gradient is not None, has_gradient)


def _like(flags: Tensor, values: Tensor) -> Tensor:
    """Flags (n,), shaped to broadcast with values (n, ...)."""
    return flags.view(-1, *(1,) * (values.ndim - 1))
