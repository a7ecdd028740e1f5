"""Trace of the Hessian of the mean loss with respect to the weights, for each parameter tensor, with error bars.

The Hessian of a sample's loss is ``H = G + R``: the Gauss–Newton matrix ``G = Jᵀ A J``, with ``J = ∂z/∂W`` and ``A``
the Hessian of the loss with respect to the outputs ``z``; and ``R``, the Hessian of ``rᵀz`` with ``r = ∂loss/∂z`` held
constant.

- ``tr G_k = E‖∂(wᵀz)/∂W_k‖²`` with ``w`` a root of ``A`` times random signs: one first-order backward pass per probe
  for all layers, never negative. Signs are independent for each sample and samples are taken singly, which leaves
  little noise (see ``_losses.py`` for the root, ``_sample_gradients.py`` for why singly).
- ``tr R_k = E[v_kᵀ(Rv)_k]`` with ``v`` random signs, one Hessian-vector product per probe for all layers. It is exactly
  zero for every parameter tensor in which ``z`` is piecewise linear: all of a ReLU network with batch normalisation in
  eval mode, the last layer of any. Which those are is read off autograd's graph (see ``_piecewise_linear.py``), so that
  no second derivative is ever taken of a piecewise linear network.

So the Gauss–Newton trace serves as a control variate, exactly known but for little noise, and only the rest is left to
Hutchinson's estimator. The plain one, ``E[v_kᵀ(Hv)_k]``, is there for comparison and for losses with an unknown root.

Sources: Hutchinson 1989; PyHessian (arXiv 1912.07145); Schraudolph 2002; Dangel et al. 2020 (arXiv 1912.10985). The
decomposition into an exact test of linearity, single-sample Gauss–Newton probes and a residual is ours.

Cost in forward passes of the batch, on a CIFAR ResNet-20: 9 for two Gauss–Newton probes of every layer, and one to find
out which are piecewise linear. A Hessian-vector product, where layers are not, costs 8 to 17 more per probe.

Second derivatives of functions with a backward pass of their own (``torch.autograd.Function``) are taken on trust,
unless it is marked with ``once_differentiable``: ``torch.autograd.gradgradcheck`` tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_robust.functional._validation.arguments import (
    as_number,
    check_function,
    check_kind,
    check_positive_integer,
    expected_but_got,
)
from lightning_robust.functional.curvature.losses import LossFn
from lightning_robust.functional.curvature.plan import Estimator, Plan, check_estimator, make_plan
from lightning_robust.functional.curvature.probes import ProbeSeeds, curvature_sums
from lightning_robust.functional.curvature.sums import CurvatureSums, joined

_ENOUGH = 256  # probes of single samples for an error bar to be trusted
_COSTS = (1.0, 3.0)  # of a Gauss–Newton and of a Hutchinson probe, against each other


@dataclass(frozen=True)
class TraceEstimate:
    """Traces of the Hessian of the mean loss, in units of loss per squared unit of weight.

    Attributes:
        layers: Trace of the diagonal block of each trained parameter tensor, by its name; 0-d, float64.
        stderr: Standard error of each from the choice of probes on these samples; NaN for a single probe.
        sample_stderr: Standard error of each as an estimate for all samples of their kind: from the choice of samples,
            probes included. NaN for fewer than two blocks of samples.
        total: Trace of the whole Hessian.
        total_stderr: Its standard error from probes.
        total_sample_stderr: Its standard error from samples and probes.
        estimator: How each number was made: ``"gauss_newton"`` without second derivatives, ``"hutchinson"`` with.
        matrix: Which matrix each number is the trace of: ``"hessian"``, or ``"gauss_newton"`` where that estimator was
            asked for and nobody knows whether the two are equal.
        num_probes: How many probes were taken, of the kind of which there were more.
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


def hessian_trace(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
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

    The network runs in eval mode and float32, or float64 if it is in float64; nothing of it is changed. Parameters with
    ``requires_grad=False`` are left out, tied ones count once, and a parameter that does not matter has trace 0.

    Args:
        model: Maps inputs ``(N, ...)`` to logits ``(N, C)``, sample by sample: a module, or a method of one.
        inputs: ``(N, ...)``, floating point.
        targets: As the loss takes them, ``(N,)`` class indices for cross-entropy. The Gauss–Newton matrix of
            cross-entropy without class weights does not depend on them.
        estimator: ``"gauss_newton"`` takes the Gauss–Newton matrix for the Hessian in every layer; ``"hutchinson"``
            multiplies the Hessian with random signs; ``"auto"`` finds out in which layers the two matrices are equal,
            and for the others adds the trace of their difference.
        num_probes: Probes to begin with; at least two for an error bar. By default two, or so many that all samples
            together see 256: of a trained network a few uncertain samples make most of the trace, and two probes of 40
            samples may agree by chance (their error bar was too small in one case of three). As many as the loss has
            degrees of freedom, one less than classes, leave no error.
        rtol: Go on until the standard error of the total from probes is below this share of it; None takes just
            ``num_probes``.
        max_probes: Never take more.
        loss_fn: Maps outputs and targets to a loss, cross-entropy by default. Gauss–Newton knows
            ``CrossEntropyLoss`` (with class weights and label smoothing), ``MSELoss`` and ``BCEWithLogitsLoss`` of
            torch, as modules, functions or ``functools.partial`` of those; others are left to Hutchinson. Means over
            a batch are taken apart by calling it on single samples.
        module: Whose parameters are meant, by default those of the module that ``model`` is or belongs to.
        chunk_size: Largest number of samples that pass through the network together; by default so many that a
            measurement takes no more than twice the memory of a training step, or 16 MiB (256 MiB on a GPU) for
            gradients of samples.
        generator: Draws the probes. By default they follow from the contents of each sample, so that the same samples
            always give the same numbers, however they are batched.

    Returns:
        A :class:`TraceEstimate`.

    Raises:
        TypeError: If ``inputs`` are not floating point.
        ValueError: If an argument has a wrong value, targets or a root of the loss are missing for the estimator, the
            model has no trained weights or no second derivative where one is needed, or a number is not finite.

    Source: see the module's docstring.
    """
    _check_options(
        estimator,
        num_probes=num_probes,
        rtol=rtol,
        max_probes=max_probes,
        chunk_size=chunk_size,
    )
    check_function("model", model)
    check_kind("targets", targets, Tensor)
    check_kind("module", module, nn.Module)
    check_kind("generator", generator, torch.Generator)
    plan = make_plan(model, inputs, targets, estimator=estimator, loss_fn=loss_fn, module=module, chunk_size=chunk_size)
    rtol = None if rtol is None else as_number(rtol)
    seeds = ProbeSeeds.of(inputs) if generator is None else ProbeSeeds.random(len(inputs), generator)

    def measured(probes: tuple[range, range]) -> CurvatureSums:
        return curvature_sums(
            model,
            inputs,
            targets,
            plan=plan,
            seeds=seeds,
            probes=probes,
            loss_fn=loss_fn,
            module=module,
            chunk_size=chunk_size,
        )

    first = min(max(2, -(-_ENOUGH // len(inputs))), max_probes) if num_probes is None else num_probes
    sums = measured(plan.probes(0, first if rtol is None else min(first, max_probes)))
    while rtol is not None and any(more := _more_probes(sums, rtol=rtol, max_probes=max_probes)):
        sums = joined(sums, measured(more))
    return _estimate(sums, plan)


def _more_probes(sums: CurvatureSums, *, rtol: float, max_probes: int) -> tuple[range, range]:
    """Which probes are missing, as far as the error so far tells, and at most as many again as there are.

    The two kinds share the allowed error so that the time is least: numbers of probes in the ratio of the roots of
    variance over cost.
    """
    total = sums.total()
    there = [len(part) for part in sums.parts]
    variances = [float(variance) for variance in total.probe_variances()]
    allowed = (rtol * float(total.means())) ** 2
    stops = there
    if not sum(variances) <= allowed:  # also if they are unknown, after a single probe
        of_one = [variance * m for variance, m in zip(variances, there, strict=True)]
        scale = sum(math.sqrt(v * cost) for v, cost in zip(of_one, _COSTS, strict=True)) / max(allowed, 1e-300)

        def wanted(m: int, variance: float, cost: float) -> int:
            best = math.sqrt(variance / cost) * scale
            return int(best) + 1 if best < 2 * m else 2 * m

        stops = [min(wanted(*known), max_probes) for known in zip(there, of_one, _COSTS, strict=True)]
    return range(there[0], stops[0]), range(there[1], stops[1])


def _estimate(sums: CurvatureSums, plan: Plan) -> TraceEstimate:
    def by_name(values: Tensor) -> dict[str, Tensor]:
        return dict(zip(sums.names, values, strict=True))

    total = sums.total()
    return TraceEstimate(
        layers=by_name(sums.means()),
        stderr=by_name(sums.probe_stderr()),
        sample_stderr=by_name(sums.sample_stderr()),
        total=total.means()[0],
        total_stderr=total.probe_stderr()[0],
        total_sample_stderr=total.sample_stderr()[0],
        estimator={name: "hutchinson" if name in plan.hutchinson else "gauss_newton" for name in sums.names},
        matrix=dict.fromkeys(sums.names, "hessian" if plan.is_hessian else "gauss_newton"),
        num_probes=max(len(part) for part in sums.parts),
    )


def _check_options(
    estimator: Estimator, *, num_probes: int | None, rtol: float | None, max_probes: int, chunk_size: int | None
) -> None:
    check_estimator(estimator)
    check_positive_integer("max_probes", max_probes)
    for name, value in (("num_probes", num_probes), ("chunk_size", chunk_size)):
        if value is not None:
            check_positive_integer(name, value)
    if rtol is not None and not 0 < as_number(rtol) < math.inf:
        raise ValueError(expected_but_got("rtol", "a positive number or None", rtol))
