"""What :class:`FisherSpectralNorm` keeps of a sample beside targets and logits, and what follows from that of all.

Of an exact linearisation it is the Gram matrix; of a Krylov subspace, norms at two temperatures and a derivative.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_robust.functional.input_space.fisher_information import (
    CalibratedSpectralNorm,
    calibrated_fim_spectral_norm,
    fim_spectral_norm,
    fim_trace,
    with_error_of_temperature,
)
from lightning_robust.functional.input_space.input_information import InputInformation
from lightning_robust.functional.input_space.likelihoods import LikelihoodName, likelihood_of

NUM_SUMMARIES = 7
_APART = 1e-3  # difference of two log T, below which one value tells all


class Measured(NamedTuple):
    """What is known of all samples.

    Attributes:
        norms: ``(N,)``.
        calibrated: Norms at the fitted temperature.
        traces: ``(N,)``.
        converged: ``(N,)``, whether norms are final; None if all are exact.
    """

    norms: Tensor
    calibrated: CalibratedSpectralNorm
    traces: Tensor
    converged: Tensor | None


def upper_triangles(gram: Tensor) -> Tensor:
    """Upper triangles ``(N, C(C + 1)/2)`` of Gram matrices ``(N, C, C)``."""
    i, j = torch.triu_indices(gram.shape[1], gram.shape[1], device=gram.device)
    return gram[:, i, j]


def from_triangles(
    logits: Tensor,
    targets: Tensor,
    triangles: Iterable[Tensor],
    likelihood: LikelihoodName,
    *,
    gram_variance: float = 0.0,
) -> Measured:
    """Results from the upper triangles of all samples, in the memory of the Gram matrices ``(N, C, C)`` alone."""
    c = logits.shape[1]
    i, j = torch.triu_indices(c, c, device=logits.device)
    gram = logits.new_zeros(len(logits), c, c)
    for matrix, triangle in zip(gram, triangles, strict=True):
        matrix[i, j] = triangle
        matrix[j, i] = triangle
    return Measured(
        fim_spectral_norm(logits, gram, likelihood=likelihood, gram_variance=gram_variance),
        calibrated_fim_spectral_norm(logits, gram, targets, likelihood=likelihood, gram_variance=gram_variance),
        fim_trace(logits, gram, likelihood=likelihood),
        converged=None,
    )


def summaries(information: InputInformation) -> Tensor:
    """Seven numbers for each of N samples, float64, from norms at a temperature T and at 1."""
    (calibrated, norm), (slope, slope_at_one) = information.value, information.slope
    log_temperature = torch.full_like(norm, information.temperatures[0]).log()
    converged = information.converged.all(dim=0).to(norm)
    columns = (norm, slope_at_one, calibrated, slope, log_temperature, information.trace.to(norm), converged)
    return torch.stack(columns, dim=1)


def from_summaries(evidence: Tensor, numbers: Tensor, likelihood: LikelihoodName) -> Measured:
    """Results from the evidence ``(N, E)`` of the temperature and the summaries ``(N, 7)`` of all samples.

    The temperature that fits all is the one that a sample was measured at, if it was told that. Otherwise λ follows
    from its values and derivatives at that temperature and at 1.
    """
    norms, slopes_at_one, calibrated, slopes, log_temperatures, traces, converged = numbers.unbind(dim=1)
    fit = likelihood_of(likelihood).fit_evidence(evidence)
    step = 1e-4
    at, below, above = (
        _interpolated(fit.temperature.log() + shift, (log_temperatures, calibrated, slopes), (norms, slopes_at_one))
        for shift in (0.0, -step, step)
    )
    derivatives = -(above - below) / (2 * step) / fit.temperature * fit.temperature.square()  # with respect to 1/T
    return Measured(norms, with_error_of_temperature(at, derivatives, fit), traces, converged)


def _interpolated(
    log_temperature: Tensor, given: tuple[Tensor, Tensor, Tensor], at_one: tuple[Tensor, Tensor]
) -> Tensor:
    """λ (N,) at a temperature: a cubic of log λ in log T between two temperatures, its tangents outside.

    Args:
        log_temperature: log T.
        given: Where λ is known, log T, with its value and the derivative of log λ in log T.
        at_one: Value and derivative at T = 1.
    """
    (start, value, slope), (norm, slope_at_one) = given, at_one
    from_start, from_one = log_temperature - start, log_temperature
    span = torch.where(start.abs() > _APART, -start, 1.0)
    u = from_start / span
    y, y_one = value.log(), norm.log()
    cubic = (
        (1 + 2 * u) * (1 - u).square() * y
        + u * (1 - u).square() * span * slope
        + u.square() * (3 - 2 * u) * y_one
        + u.square() * (u - 1) * span * slope_at_one
    )
    between = (start.abs() > _APART) & (value > 0) & (norm > 0) & (u >= 0) & (u <= 1)
    beyond = (start.abs() > _APART) & (u > 1)
    tangent = torch.where(beyond, norm * (slope_at_one * from_one).exp(), value * (slope * from_start).exp())
    return torch.where(between, cubic.exp(), tangent)
