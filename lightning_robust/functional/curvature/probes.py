"""Taking probes of the curvature: Gauss–Newton on single samples, Hutchinson on blocks of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._isolation.weights import Weights, differentiable_weights
from lightning_robust.functional._validation.tensors import check_finite, check_inputs, outputs_of
from lightning_robust.functional.curvature._piecewise_linear import no_second_derivative, refuse_missing_derivatives
from lightning_robust.functional.curvature._sample_gradients import SampleGradients
from lightning_robust.functional.curvature.losses import LossFn, SampleLoss
from lightning_robust.functional.curvature.plan import Plan
from lightning_robust.functional.curvature.signs import keys_of, random_keys, sample_signs, weight_signs
from lightning_robust.functional.curvature.sums import NUM_BLOCKS, CurvatureSums


@dataclass(frozen=True)
class ProbeSeeds:
    """What the probes of some samples are functions of.

    Attributes:
        keys: A number for each sample.
        blocks: The block of each sample, below ``NUM_BLOCKS``.
        seed: Of the signs of weights.
    """

    keys: list[int]
    blocks: list[int]
    seed: int = 0

    @classmethod
    def of(cls, inputs: Tensor) -> ProbeSeeds:
        """By the contents of the samples."""
        keys = keys_of(full_precision(inputs))
        return cls(keys, [key % NUM_BLOCKS for key in keys])

    @classmethod
    def random(cls, num_samples: int, generator: torch.Generator) -> ProbeSeeds:
        """At random."""
        keys, seed = random_keys(num_samples, generator), random_keys(1, generator)[0]
        return cls(keys, [row % NUM_BLOCKS for row in range(num_samples)], seed)


def curvature_sums(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor | None,
    *,
    plan: Plan,
    seeds: ProbeSeeds,
    probes: tuple[range, range],
    loss_fn: LossFn | None = None,
    module: nn.Module | None = None,
    chunk_size: int | None = None,
) -> CurvatureSums:
    """Take probes of some samples: the part of :func:`hessian_trace` that adds up over batches and processes.

    Args:
        model: See :func:`hessian_trace`.
        inputs: ``(N, ...)``.
        targets: See :func:`hessian_trace`.
        plan: See :func:`make_plan`.
        seeds: See :class:`ProbeSeeds`.
        probes: Numbers of the Gauss–Newton and of the Hutchinson probes.
        loss_fn: See :func:`hessian_trace`.
        module: See :func:`hessian_trace`.
        chunk_size: See :func:`hessian_trace`.

    Raises:
        ValueError: If a second derivative that is needed does not exist, or a number is not finite.
    """
    check_inputs(inputs)
    loss = SampleLoss(loss_fn)
    with differentiable_weights(model, loss_fn, module=module) as weights:
        blocks = torch.tensor(seeds.blocks)
        parts = tuple(torch.zeros(len(part), NUM_BLOCKS, len(plan.names), dtype=torch.float64) for part in probes)
        counts = torch.zeros(NUM_BLOCKS, dtype=torch.float64)
        x = full_precision(inputs)
        y = None if targets is None else loss.prepared(full_precision(targets), num_samples=len(x))
        gradients = SampleGradients(model, weights, plan.gauss_newton)
        size = gradients.samples_at_once(x) if chunk_size is None else chunk_size
        examined: list[Tensor] = []
        exact = False
        for rows in torch.split(torch.arange(len(x)), size):
            chunk, labels = x[rows], None if y is None else y[rows]
            with torch.no_grad():
                outputs = outputs_of(model, chunk)
            loss.check(outputs, labels)
            if loss.is_foreign:
                examined.append(outputs)
            counts.index_add_(0, blocks[rows], loss.weights(outputs, labels).cpu())
            if probes[0]:
                keys = [seeds.keys[row] for row in rows]
                forms, exact = _gauss_newton_forms(gradients, loss, chunk, outputs, labels, keys, probes[0])
                parts[0].index_add_(1, blocks[rows], forms.cpu())
        if examined and y is not None:
            loss.examine(torch.cat(examined), y)
        places = [plan.names.index(name) for name in plan.hutchinson]
        for block in sorted(set(seeds.blocks)) if probes[1] else ():
            of_weights = [(seeds.seed, block, probe) for probe in probes[1]]
            for rows in torch.split((blocks == block).nonzero()[:, 0], chunk_size or -(-len(x) // 4)):
                assert y is not None
                forms = _quadratic_forms(model, weights, loss, x[rows], y[rows], of_weights, plan)
                parts[1][:, block, places] += forms.cpu()
    if not counts.any():
        raise ValueError("Expected at least one sample that counts in the loss, but all have the ignored index.")
    for part in parts:
        check_finite(part.flatten(1), "curvature")
    return CurvatureSums(plan.names, parts, counts, exact)


def _gauss_newton_forms(
    gradients: SampleGradients,
    loss: SampleLoss,
    x: Tensor,
    outputs: Tensor,
    y: Tensor | None,
    keys: Sequence[int],
    probes: range,
) -> tuple[Tensor, bool]:
    """``‖∂(wᵀz)/∂W_k‖²`` for each probe, sample and layer, ``(M, N, L)``, and whether these are the traces themselves.

    Where there are as many probes as columns of the root, these are taken one by one: nothing is left to chance.
    """
    columns, size = loss.num_columns(outputs), outputs[0].numel()
    exact = columns <= probes.stop
    if exact:
        signs = torch.eye(columns, size, dtype=torch.int8).unsqueeze(1).expand(-1, len(x), -1)
    else:
        signs = sample_signs(keys, probes, size)
    forms = gradients.squared_norms(x, loss.cotangents(outputs, y, signs.to(outputs.device)))
    return (forms.sum(dim=0).expand(len(probes), -1, -1) if exact else forms), exact


def _quadratic_forms(
    model: Callable[[Tensor], Tensor],
    weights: Weights,
    loss: SampleLoss,
    x: Tensor,
    y: Tensor,
    keys: Sequence[tuple[int, ...]],
    plan: Plan,
) -> Tensor:
    """``v_kᵀ(Hv)_k``, or with ``R`` for ``H``, summed over samples, for each key and layer, ``(M, L)``."""
    tensors = [weights.tensors[name] for name in plan.hutchinson]
    forms = torch.zeros(len(keys), len(tensors), dtype=torch.float64)
    outputs = outputs_of(model, x)
    refuse_missing_derivatives(outputs, weights)
    if plan.residual:
        objective = (loss.gradients(outputs, y) * outputs).sum()
    else:
        losses = loss.values(outputs, y)
        check_finite(losses, "losses")
        objective = losses.sum()
    if not objective.requires_grad:
        return forms
    slopes: tuple[Tensor | None, ...] = ()
    try:
        slopes = torch.autograd.grad(objective, tensors, create_graph=True, allow_unused=True)
        for m, key in enumerate(keys):
            signs = weight_signs(tensors, *key)
            terms = [(s * v).sum() for s, v in zip(slopes, signs, strict=True) if s is not None and s.requires_grad]
            if not terms:
                break
            products = torch.autograd.grad(
                torch.stack(terms).sum(), tensors, retain_graph=m + 1 < len(keys), allow_unused=True
            )
            forms[m] = torch.stack([(v * (0 if p is None else p)).sum() for p, v in zip(products, signs, strict=True)])
    except RuntimeError as error:
        names = [name for name, s, w in zip(plan.hutchinson, slopes, tensors, strict=False) if not _has_product(s, w)]
        raise no_second_derivative(f"in layer {names[0]!r}: {error}" if names else error) from error
    return forms


def _has_product(slope: Tensor | None, tensor: Tensor) -> bool:
    if slope is None or not slope.requires_grad:
        return True
    try:
        torch.autograd.grad(slope.sum(), tensor, retain_graph=True, allow_unused=True)
    except RuntimeError:
        return False
    return True
