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

NUM_SUMMARIES = 6


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
    """Six numbers for each of N samples, float64, from norms at a temperature T and at 1."""
    (calibrated, norm), slope = information.value, information.slope[0]
    log_temperature = torch.full_like(norm, information.temperatures[0]).log()
    converged = information.converged.all(dim=0).to(norm)
    return torch.stack([norm, calibrated, slope, log_temperature, information.trace.to(norm), converged], dim=1)


def from_summaries(evidence: Tensor, numbers: Tensor, likelihood: LikelihoodName) -> Measured:
    """Results from the evidence ``(N, E)`` of the temperature and the summaries ``(N, 6)`` of all samples.

    The temperature that fits all is the one that a sample was measured at, if it was told that; else λ follows by its
    derivative.
    """
    norms, calibrated, slopes, log_temperatures, traces, converged = numbers.unbind(dim=1)
    fit = likelihood_of(likelihood).fit_evidence(evidence)
    values = calibrated * (slopes * (fit.temperature.log() - log_temperatures)).exp()
    derivatives = -slopes * values * fit.temperature  # with respect to 1/T
    return Measured(norms, with_error_of_temperature(values, derivatives, fit), traces, converged)
