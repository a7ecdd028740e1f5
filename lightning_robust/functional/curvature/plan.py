"""By which estimator each layer is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from lightning_robust.functional._isolation.weights import differentiable_weights
from lightning_robust.functional._validation.arguments import check_choice
from lightning_robust.functional._validation.tensors import check_inputs
from lightning_robust.functional.curvature._piecewise_linear import curved_layers
from lightning_robust.functional.curvature.losses import LossFn, SampleLoss

Estimator = Literal["auto", "hutchinson", "gauss_newton"]


@dataclass(frozen=True)
class Plan:
    """By which estimator each layer is measured.

    Attributes:
        gauss_newton: Layers that have a Gauss–Newton part.
        hutchinson: Layers that have a Hutchinson part.
        residual: Whether the latter is that of the residual ``R``, rather than of the whole Hessian.
        is_hessian: Whether the sum is the Hessian everywhere.
    """

    gauss_newton: tuple[str, ...]
    hutchinson: tuple[str, ...]
    residual: bool
    is_hessian: bool

    def probes(self, start: int, stop: int) -> tuple[range, range]:
        """The same probes of both kinds, none of one that no layer has."""
        nothing = range(start, start)
        probes = range(start, stop)
        return probes if self.gauss_newton else nothing, probes if self.hutchinson else nothing

    @property
    def names(self) -> tuple[str, ...]:
        """Of all layers."""
        return self.gauss_newton or self.hutchinson


def make_plan(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor | None,
    *,
    estimator: Estimator,
    loss_fn: LossFn | None,
    module: nn.Module | None,
    chunk_size: int | None = None,
) -> Plan:
    """Decide how each layer is measured.

    Args:
        model: See :func:`hessian_trace`.
        inputs: See :func:`hessian_trace`.
        targets: See :func:`hessian_trace`.
        estimator: See :func:`hessian_trace`.
        loss_fn: See :func:`hessian_trace`.
        module: See :func:`hessian_trace`.
        chunk_size: See :func:`hessian_trace`.

    Raises:
        ValueError: If the estimator cannot be had.
    """
    check_inputs(inputs)
    loss = SampleLoss(loss_fn)
    if estimator == "gauss_newton" and not loss.has_root:
        raise ValueError(
            "Expected argument `loss_fn` to be torch's cross-entropy, MSE or BCE with logits for"
            f" estimator='gauss_newton', but got {_describe(loss_fn)}. Use estimator='hutchinson'."
        )
    with differentiable_weights(model, loss_fn, module=module) as weights:
        names = tuple(weights.tensors)
    if estimator == "gauss_newton":
        plan = Plan(names, (), residual=True, is_hessian=False)
    elif estimator == "hutchinson" or not loss.has_root:
        plan = Plan((), names, residual=False, is_hessian=True)
    else:
        curved = curved_layers(
            model, inputs, module=module, up_to_a_constant=loss.is_cross_entropy, chunk_size=chunk_size
        )
        plan = Plan(names, tuple(name for name in names if name in curved), residual=True, is_hessian=True)
    if targets is None and (plan.hutchinson or loss.root_needs_targets):
        raise ValueError(
            f"Expected argument `targets` to be a tensor, because estimator={estimator!r} needs the loss of this model,"
            " but got None."
        )
    return plan


def check_estimator(estimator: Estimator) -> Estimator:
    """Return ``estimator``, or raise a ``ValueError`` if it is unknown."""
    check_choice("estimator", estimator, get_args(Estimator))
    return estimator


def _describe(loss_fn: object) -> str:
    return getattr(loss_fn, "__name__", type(loss_fn).__name__)
