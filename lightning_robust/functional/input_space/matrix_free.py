"""Spectral norm of the input Fisher information without a gradient for every class.

An exact linearisation takes one backward pass per class. With a thousand classes, two to ten products with ``J`` and
``Jᵀ`` give the largest eigenvalue of ``G = Jᵀ (diag(p) − p pᵀ) J`` to a fraction of a percent
(:mod:`~lightning_robust.functional.input_space.krylov`), because the Fisher information of a classifier is nearly of
low rank. Truncating it to the most probable classes is no substitute: on an ImageNet network, twenty classes hold 76 to
93 % of λ.

Source: arXiv 2606.04767 for the quantity and power iteration; the method is ours.
Cost: two forward and three backward passes, and for each product about two more backward passes (two to three products
for a trained network, ten at the beginning of training).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.arguments import (
    as_number,
    as_numbers,
    check_choice,
    check_kind,
    check_number,
    check_positive_integer,
    expected_but_got,
    optional,
)
from lightning_robust.functional._validation.tensors import check_pass
from lightning_robust.functional.input_space.input_information import (
    ACCURACY,
    ACCURACY_OF_POSITIONS,
    Method,
    input_information,
)
from lightning_robust.functional.input_space.krylov import Accuracy
from lightning_robust.functional.input_space.likelihoods import LikelihoodName, likelihood_of


@dataclass(frozen=True)
class SpectralNormEstimate:
    """Spectral norms from below, and how far they may be off.

    Attributes:
        value: ``(N,)``, or ``(S, N)`` for S temperatures: Rayleigh quotients, never above the spectral norm but for
            rounding, in squared nats per squared input unit.
        residual: Of the same shape, ``‖G q − value · q‖`` of the unit vector q: an eigenvalue of ``G`` lies within this
            distance. Whether it is the largest, no residual tells.
        converged: Of the same shape, bool: whether the residual is as small as was asked for.
        num_products: ``(N,)``, products with ``J`` that each sample took. Each comes with one or two with ``Jᵀ``.
    """

    value: Tensor
    residual: Tensor
    converged: Tensor
    num_products: Tensor


def fim_spectral_norm_matrix_free(
    model: Callable[..., Tensor],
    inputs: Tensor,
    *,
    temperature: float | Sequence[float] | Tensor = 1.0,
    method: Method = "krylov",
    tolerance: float | None = None,
    max_products: int | None = None,
    extras: Mapping[str, Tensor] | None = None,
    input_std: float | Sequence[float] | Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    likelihood: LikelihoodName = "categorical",
) -> SpectralNormEstimate:
    """Largest eigenvalue of each sample's input Fisher information matrix, without a backward pass per class.

    Use it for many classes; up to about 32, :func:`~lightning_robust.functional.linearize` is as cheap and exact. The
    model runs as there.

    Args:
        model: Maps inputs ``(N, ...)`` to logits ``(N, C)``, sample by sample; to ``(N, T, V)`` with likelihood
            ``"token"``.
        inputs: ``(N, ...)``, floating point.
        temperature: Divides the logits; or several, one after the other on the same subspace, which is cheaper than
            one by one. The cheapest order begins with the one that fits best.
        method: ``"krylov"``, or ``"power"``: power iteration, the paper's method and our reference. It takes two to ten
            times as many products.
        tolerance: Largest residual, relative to the value, at which a value counts as converged. ``"krylov"`` asks
            for a quarter of it as the bound on the relative error, too, which is a stronger demand where the two
            largest eigenvalues are close. By default 0.03, and 0.003 for sequences, whose positions hide from each
            other.
        max_products: Most products with ``J`` for each sample (and temperature, with ``"power"``); by default 30, and
            40 for sequences.
        extras: As in :func:`~lightning_robust.functional.linearize`.
        input_std: As in :func:`~lightning_robust.functional.linearize`.
        generator: Draws the random signs with which the subspace begins. By default those of a sample are a function of
            its contents, so that the same samples give the same values in any batch.
        chunk_size: Largest number of samples that pass through the network together.
        likelihood: What the outputs mean, as in :func:`~lightning_robust.functional.fim_spectral_norm`; or ``"token"``:
            logits of V words at each of T positions of a sequence, whose information is summed. A position does not
            count if all its logits but one are −∞.

    Returns:
        A :class:`SpectralNormEstimate` of N samples.

    Raises:
        TypeError: As :func:`~lightning_robust.functional.linearize`.
        ValueError: As :func:`~lightning_robust.functional.linearize`, or if a temperature or an option has a wrong
            value.

    Source: arXiv 2606.04767 (the quantity, and power iteration); Krylov subspaces and their start are ours.
    """
    check_pass(model, inputs, chunk_size=chunk_size)
    several = as_numbers(temperature)
    temperatures = [as_number(temperature)] if several is None else several
    if not temperatures or not all(0 < one < math.inf and 0 < one * one < math.inf for one in temperatures):
        expected = "positive and finite, as its square must be, or a list of such numbers"
        raise ValueError(expected_but_got("temperature", expected, temperature))
    check_choice("method", method, get_args(Method))
    kind = likelihood_of(likelihood)
    usual = ACCURACY_OF_POSITIONS if kind.has_positions else ACCURACY
    residual = optional(check_number, "tolerance", tolerance, "a positive number or None", above=0)
    products = optional(check_positive_integer, "max_products", max_products) or usual.products
    accuracy = usual._replace(products=products) if residual is None else Accuracy(residual, residual / 4, products)
    optional(check_kind, "generator", generator, torch.Generator)
    found = input_information(
        model,
        inputs,
        temperatures=temperatures,
        method=method,
        accuracy=accuracy,
        extras=extras,
        input_std=input_std,
        generator=generator,
        chunk_size=chunk_size,
        likelihood=kind,
    )
    parts = (found.value, found.residual, found.converged)
    value, residuals, converged = (part if several is not None else part[0] for part in parts)
    like = full_precision(inputs) if found.logits is None else found.logits
    return SpectralNormEstimate(value.to(like), residuals.to(like), converged, found.num_products)
