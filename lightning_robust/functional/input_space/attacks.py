"""Projected gradient descent (PGD): the attack with which the estimators are compared. None of them depends on it.

Source: Madry et al. 2018, arXiv 1706.06083.
Cost: one forward and one backward pass with respect to the input per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.side_effects import watched_once
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.arguments import (
    check_choice,
    check_kind,
    check_number,
    check_positive_integer,
    optional,
)
from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional._validation.scales import masked_classes
from lightning_robust.functional._validation.tensors import check_logits, check_pass, check_targets, outputs_of
from lightning_robust.functional.input_space.missing_gradients import refuse_missing_gradients
from lightning_robust.functional.input_space.units import Units, changes_within

Norm = Literal["linf", "l2"]
Loss = Literal["cross_entropy", "dlr"]
Schedule = Literal["constant", "cosine"]


def pgd(
    model: Callable[..., Tensor],
    inputs: Tensor,
    targets: Tensor,
    *,
    epsilon: float,
    steps: int,
    norm: Norm = "linf",
    loss: Loss = "cross_entropy",
    step_size: float | None = None,
    schedule: Schedule = "constant",
    extras: Mapping[str, Tensor] | None = None,
    valid_range: tuple[float, float] | None = None,
    input_mean: float | Sequence[float] | Tensor | None = None,
    input_std: float | Sequence[float] | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Attack each input by projected gradient ascent on its loss.

    ``epsilon``, ``step_size`` and ``valid_range`` are in units of the un-normalised input ``x · std + mean``. The model
    runs as in :func:`~lightning_robust.functional.linearize`.

    Args:
        model: Maps inputs ``(N, ...)`` to logits ``(N, C)``, sample by sample.
        inputs: ``(N, ...)``, floating point.
        targets: ``(N,)``, class indices.
        epsilon: Radius of the ball around each input, ≥ 0.
        steps: Number of gradient steps, ≥ 1. One step of size ``epsilon`` is the fast gradient sign method.
        norm: ``"linf"`` or ``"l2"``, over all features of a sample.
        loss: ``"cross_entropy"``, or ``"dlr"``, the difference of logits ratio (Croce & Hein 2020, arXiv 2003.01690),
            whose gradient does not vanish when the network is confident; it needs at least three classes.
        step_size: Length of a step. By default 2.5 · epsilon / steps, as in the source, or epsilon / 2 with the cosine
            schedule.
        schedule: ``"constant"``, or ``"cosine"``, which lets the steps decay from ``step_size`` to zero.
        extras: As in :func:`~lightning_robust.functional.linearize`.
        valid_range: Smallest and largest value of an un-normalised input, to which the result is clamped; no clamping
            by default. An input outside the range, e.g. by rounding, may stay but not move further out.
        input_mean: As in :func:`~lightning_robust.functional.linearize`.
        input_std: As in :func:`~lightning_robust.functional.linearize`.
        generator: Draws the starting point uniformly from the ball. Without it the attack starts at the input itself
            and is deterministic.

    Returns:
        ``(N, ...)``, the attacked inputs after the last step, normalised as ``inputs`` are.

    Raises:
        TypeError: If ``inputs`` are not floating point or the model does not return a tensor.
        ValueError: If an argument has a wrong shape or value, the outputs change without gradients, or a sample has
            fewer than three classes that are not masked for ``"dlr"``.

    Source: arXiv 1706.06083.
    """
    epsilon = check_number("epsilon", epsilon, "a finite number ≥ 0", at_least=0)
    check_positive_integer("steps", steps)
    check_norm(norm)
    size = optional(check_number, "step_size", step_size, "a positive number or None", above=0)
    check_choice("loss", loss, get_args(Loss))
    check_choice("schedule", schedule, get_args(Schedule))
    optional(check_kind, "generator", generator, torch.Generator)
    check_pass(model, inputs)
    labels = check_targets(targets, num_samples=len(inputs))
    samples = SampleModel(model, extras, num_samples=len(inputs))
    network = samples.on_all()
    units = Units.of(inputs, std=input_std, mean=input_mean, valid_range=valid_range)
    if size is None:
        size = 2.5 * epsilon / steps if schedule == "constant" else epsilon / 2
    decay = [1.0 if schedule == "constant" else (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]

    def into_ball_and_range(delta: Tensor) -> Tensor:
        delta = _project(delta, epsilon, norm)
        if units.valid_range is None:
            return delta
        return delta.clamp(*changes_within(units.raw(clean), units.valid_range))

    with differentiable(model):
        clean, labels = full_precision(inputs), full_precision(labels)
        delta = torch.zeros_like(clean)
        if generator is not None:
            delta = into_ball_and_range(_uniform_in_ball(clean, epsilon, norm, generator))
        for step in range(steps):
            leaf = delta.detach().clone().requires_grad_()
            logits = outputs_of(network, clean + units.change(leaf), check=check_logits if step == 0 else None)
            if step == 0:  # later checks would only wait for the device
                check_targets(labels, num_samples=len(clean), num_classes=logits.shape[1])
                if loss == "dlr":
                    _check_three_classes(logits.detach())
            gradient, slopes = torch.zeros_like(leaf), torch.zeros_like(logits)
            if logits.requires_grad:
                with watched_once():
                    total = _total(loss, logits, labels)
                    gradient, slopes = torch.autograd.grad(total, (leaf, logits), materialize_grads=True)
            if step == 0:
                flat = _without_gradient(gradient, slopes)
                if len(flat):
                    refuse_missing_gradients(samples.on(flat), (clean + units.change(delta))[flat])
            if not logits.requires_grad:  # the logits do not depend on the input: there is nowhere to go
                break
            delta = into_ball_and_range(delta + decay[step] * size * _steepest(gradient, norm))
        attacked: Tensor = clean + units.change(delta)
    return attacked.detach()


def check_norm(norm: Norm) -> Norm:
    """Return ``norm``, or raise a ``ValueError`` if it is unknown."""
    return check_choice("norm", norm, get_args(Norm))


def _check_three_classes(logits: Tensor) -> None:
    if logits.shape[1] < 3:
        raise ValueError(f"Expected a model of three classes or more for `loss='dlr'`, but it has {logits.shape[1]}.")
    fewest = int((~masked_classes(logits)).sum(dim=1).min())
    if fewest < 3:
        raise ValueError(
            "Expected three classes or more that are not masked for `loss='dlr'`, but a sample has"
            f" {fewest}. Use `loss='cross_entropy'`."
        )


def _without_gradient(gradient: Tensor, slopes: Tensor) -> Tensor:
    """Samples whose gradients with respect to inputs are exactly zero, though those with respect to logits are not.

    All samples, if none has any gradient: a confident network has none for want of a loss.
    """
    flat = ~gradient.reshape(len(gradient), -1).any(dim=1)
    return (flat if flat.all() else flat & slopes.any(dim=1)).nonzero()[:, 0]


def _total(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the losses that the attack increases. A sum keeps the samples independent."""
    if loss == "cross_entropy":
        return F.cross_entropy(logits, labels, reduction="sum")
    first, second, third = logits.topk(3, dim=1).values.unbind(dim=1)
    own = logits.gather(1, labels[:, None])[:, 0]
    other = torch.where(logits.argmax(dim=1) == labels, second, first)
    ratios: Tensor = (other - own) / (first - third).clamp_min(1e-12)
    return ratios.sum()


def _steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """Unit step that increases the loss the most."""
    if norm == "linf":
        return gradient.sign()
    return gradient / _norms(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)


def _project(delta: Tensor, epsilon: float, norm: Norm) -> Tensor:
    if norm == "linf":
        return delta.clamp(-epsilon, epsilon)
    return delta * (epsilon / _norms(delta).clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max(1)


def _uniform_in_ball(like: Tensor, epsilon: float, norm: Norm, generator: torch.Generator) -> Tensor:
    start = like.new_empty(like.shape, device=generator.device)
    if norm == "linf":
        return start.uniform_(-epsilon, epsilon, generator=generator).to(like.device)
    start.normal_(generator=generator)
    radius = start.new_empty(len(like), *(1,) * (like.ndim - 1)).uniform_(generator=generator) ** (1 / like[0].numel())
    return (start / _norms(start) * radius * epsilon).to(like.device)


def _norms(values: Tensor) -> Tensor:
    """L2 norm of each sample, shaped to broadcast."""
    norms: Tensor = torch.linalg.vector_norm(values.reshape(len(values), -1), dim=1)
    return norms.reshape(-1, *(1,) * (values.ndim - 1))
