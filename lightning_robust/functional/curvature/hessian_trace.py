"""Trace of the Hessian of the mean loss with respect to the weights, for each parameter tensor, with error bars.

The Hessian of a sample's loss is ``H = G + R``: the Gauss–Newton matrix ``G = Jᵀ A J``, with ``J = ∂z/∂W`` and ``A``
the Hessian of the loss with respect to the outputs ``z``; and ``R``, the Hessian of ``rᵀz`` with ``r = ∂loss/∂z`` held
constant.

- ``tr G_k = E‖∂(wᵀz)/∂W_k‖²`` with ``w`` a root of ``A`` times random signs: one first-order backward pass per probe
  for all layers, never negative. Each sample has signs and a gradient of its own, which leaves little noise (see
  ``_gauss_newton_root.py`` for the root, ``_sample_gradients.py`` for gradients of single samples).
- ``tr R_k = E[v_kᵀ(Rv)_k]`` with ``v`` random signs: one Hessian-vector product per probe for all layers. It is exactly
  zero for every parameter tensor in which ``z`` is piecewise linear: every tensor of a ReLU network with batch
  normalisation in eval mode, and the last layer of any network. Autograd's graph tells which tensors these are (see
  ``_piecewise_linear.py``), so no second derivative is ever taken of a piecewise linear network.

The Gauss–Newton trace thus serves as a control variate that is known with little noise, and only the residual is left
to Hutchinson's estimator. Plain Hutchinson, ``E[v_kᵀ(Hv)_k]``, is there for comparison and for losses without a known
root.

Sources: Hutchinson 1989; PyHessian (arXiv 1912.07145); Schraudolph 2002; Dangel et al. 2020 (arXiv 1912.10985). The
decomposition into an exact test of linearity, single-sample Gauss–Newton probes and a residual is ours.

Cost in forward passes of a batch of 128: 6 to 14 for two Gauss–Newton probes of every layer, including one that also
finds the piecewise linear layers. Where layers are curved, each probe adds a Hessian-vector product, 8 to 20 passes
(``docs/performance.md`` has a table).

Second derivatives of a custom ``torch.autograd.Function`` are trusted unless its backward pass is marked with
``@once_differentiable``; ``torch.autograd.gradgradcheck`` checks them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_robust.functional._validation.arguments import (
    check_function,
    check_kind,
    check_number,
    check_positive_integer,
    optional,
)
from lightning_robust.functional.curvature.losses import LossFn
from lightning_robust.functional.curvature.plan import Estimator, Plan, check_estimator
from lightning_robust.functional.curvature.problem import CurvatureProblem
from lightning_robust.functional.curvature.signs import ProbeSeeds
from lightning_robust.functional.curvature.sums import CurvatureSums, joined

_ENOUGH = 256  # single-sample probes that make an error bar trustworthy
_COSTS = (1.0, 3.0)  # relative, of a Gauss–Newton and a Hutchinson probe


@dataclass(frozen=True)
class TraceEstimate:
    """Traces of the Hessian of the mean loss, in units of loss per squared unit of weight.

    Attributes:
        layers: Trace of the diagonal block of each trained parameter tensor to which a gradient leads from the
            outputs, by its name; 0-d, float64.
        stderr: Standard error of each trace on these samples, from the choice of probes; NaN for a single probe.
        sample_stderr: Standard error of each trace as an estimate for the population, from the choice of samples and
            probes; NaN if all samples are in one block.
        total: Trace of the whole Hessian.
        total_stderr: Standard error of the total from probes.
        total_sample_stderr: Standard error of the total from samples and probes.
        estimator: How each trace was estimated: ``"gauss_newton"`` without second derivatives, ``"hutchinson"`` with.
        matrix: Whose trace each number is: ``"hessian"``, or ``"gauss_newton"`` with that estimator, which does not
            check whether the two are equal.
        num_probes: Number of probes, of the kind that took more.
        unreached: Names of the trained parameter tensors to which no gradient leads, so that they are left out: the
            forward pass does not use them in eval mode, or takes numbers that were computed from them before.
    """

    layers: dict[str, Tensor]
    stderr: dict[str, Tensor]
    sample_stderr: dict[str, Tensor]
    total: Tensor
    total_stderr: Tensor
    total_sample_stderr: Tensor
    estimator: dict[str, str]
    matrix: dict[str, str]
    num_probes: int
    unreached: tuple[str, ...] = ()


def hessian_trace(
    model: Callable[..., Tensor],
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    extras: Mapping[str, Tensor] | None = None,
    estimator: Estimator = "auto",
    num_probes: int | None = None,
    rtol: float | None = 0.05,
    max_probes: int = 64,
    loss_fn: LossFn | None = None,
    module: nn.Module | None = None,
    chunk_size: int | None = None,
    generator: torch.Generator | None = None,
) -> TraceEstimate:
    """Estimate the trace of the Hessian of the mean loss over samples, for each trained parameter tensor.

    The network runs in eval mode and float32, or float64 if it is in float64; it is left unchanged. Parameters with
    ``requires_grad=False`` are left out, tied parameters count once. Unused parameters are left out, too: a trace of 0
    means that the loss is linear in a parameter.

    Args:
        model: Maps inputs ``(N, ...)`` to logits ``(N, C)``, sample by sample: a module, or a method of one.
        inputs: ``(N, ...)``, floating point, or integers such as token ids; with NaN only if the network fills it in.
        targets: Targets as the loss takes them, ``(N,)`` class indices for cross-entropy, or ``(N, ...)`` with one
            per position of outputs ``(N, C, ...)``. They may be None where the
            Gauss–Newton matrix suffices and does not depend on them (cross-entropy without class weights).
        extras: As in :func:`~lightning_robust.functional.linearize`.
        estimator: ``"gauss_newton"`` measures the Gauss–Newton matrix instead of the Hessian in every layer;
            ``"hutchinson"`` multiplies the Hessian with random signs; ``"auto"`` finds the layers in which the two
            matrices are equal, and adds the trace of their difference in the others.
        num_probes: Number of probes to begin with; an error bar takes at least two. By default two, or as many as give
            256 single-sample probes in total: in a trained network a few uncertain samples make most of the trace, and
            two probes of 40 samples may agree by chance (their error bar was too small in one case of three). With as
            many probes as the loss has degrees of freedom, one less than classes, the Gauss–Newton part has no error.
        rtol: Take probes until the standard error of the total from probes is below this share of the total; None takes
            exactly ``num_probes``.
        max_probes: Largest number of probes, unless ``num_probes`` asks for more and ``rtol`` is None.
        loss_fn: Maps outputs and targets to a loss, cross-entropy by default. Gauss–Newton roots are known for torch's
            ``CrossEntropyLoss`` (with class weights and label smoothing), ``MSELoss`` and ``BCEWithLogitsLoss``, as
            modules, functions or ``functools.partial`` of either. Outputs ``(N, C, ...)`` with a class per pixel or
            token have the loss that torch gives the batch, a mean over the positions that count. Any other loss is
            measured by Hutchinson probes; if it returns the mean over a batch, it is called on single samples.
        module: The module whose parameters are meant, by default the one that ``model`` is or belongs to.
        chunk_size: Largest number of samples that pass through the network together. By default a measurement takes at
            most twice the memory of a training step, or three times that of the weights if they are most of it.
        generator: Draws the probes. By default the probes of a sample are a function of its contents, so the same
            samples always give the same numbers, however they are batched.

    Returns:
        A :class:`TraceEstimate`.

    Raises:
        TypeError: If ``inputs`` are not a tensor of real numbers.
        ValueError: If an argument has a wrong value, no sample counts in the loss, the estimator needs targets or a
            Gauss–Newton root of the loss that are missing, the model has no trained weights to which a gradient leads,
            or lacks a second derivative that is needed, or a number is not finite.

    Source: see the module's docstring.
    """
    check_estimator(estimator)
    check_positive_integer("max_probes", max_probes)
    optional(check_positive_integer, "num_probes", num_probes)
    optional(check_positive_integer, "chunk_size", chunk_size)
    rtol = optional(check_number, "rtol", rtol, "a positive number or None", above=0)
    check_function("model", model)
    optional(check_kind, "targets", targets, Tensor)
    optional(check_kind, "module", module, nn.Module)
    optional(check_kind, "generator", generator, torch.Generator)
    problem = CurvatureProblem(
        model,
        inputs,
        targets,
        extras=extras,
        estimator=estimator,
        loss_fn=loss_fn,
        module=module,
        chunk_size=chunk_size,
    )
    seeds = ProbeSeeds.from_contents(inputs) if generator is None else ProbeSeeds.random(len(inputs), generator)
    first = min(max(2, -(-_ENOUGH // len(inputs))), max_probes) if num_probes is None else num_probes
    with problem.examined() as examined:
        plan = examined.plan
        sums = examined.sums(seeds, plan.probes(0, first if rtol is None else min(first, max_probes)))
        sums.check_weights()
        while rtol is not None and any(more := _more_probes(sums, rtol=rtol, max_probes=max_probes)):
            sums = joined(sums, examined.sums(seeds, more))
    return _estimate(sums, plan)


def _more_probes(sums: CurvatureSums, *, rtol: float, max_probes: int) -> tuple[range, range]:
    """Numbers of the further probes of each kind that the error so far asks for, at most as many as there are already.

    The two kinds share the allowed error at the least cost: their numbers are in the ratio of the square roots of
    variance over cost.
    """
    total = sums.total()
    there = [len(part) for part in sums.parts]
    variances = [float(variance) for variance in total.probe_variances()]
    allowed = (rtol * float(total.means())) ** 2
    stops = there
    if not sum(variances) <= allowed:  # or they are NaN, after a single probe
        of_one = [variance * m for variance, m in zip(variances, there, strict=True)]
        scale = sum(math.sqrt(v * cost) for v, cost in zip(of_one, _COSTS, strict=True)) / max(allowed, 1e-300)

        def wanted(m: int, variance: float, cost: float) -> int:
            best = math.sqrt(variance / cost) * scale
            return int(best) + 1 if best < 2 * m else 2 * m

        stops = [min(wanted(*known), max_probes) for known in zip(there, of_one, _COSTS, strict=True)]
    return range(there[0], stops[0]), range(there[1], stops[1])


def _estimate(all_sums: CurvatureSums, plan: Plan) -> TraceEstimate:
    sums = all_sums.where_reached()
    total = sums.total()
    return TraceEstimate(
        layers=dict(zip(sums.names, sums.means(), strict=True)),
        stderr=dict(zip(sums.names, sums.probe_stderr(), strict=True)),
        sample_stderr=dict(zip(sums.names, sums.sample_stderr(), strict=True)),
        total=total.means()[0],
        total_stderr=total.probe_stderr()[0],
        total_sample_stderr=total.sample_stderr()[0],
        estimator={name: "hutchinson" if name in plan.hutchinson else "gauss_newton" for name in sums.names},
        matrix=dict.fromkeys(sums.names, "hessian" if plan.is_hessian else "gauss_newton"),
        num_probes=max(len(part) for part in sums.parts),
        unreached=all_sums.unreached(),
    )
