"""Fisher information of a classifier with respect to its input: spectral norm and trace, raw and calibrated.

For one input with logits ``z``, ``p = softmax(z)`` and Jacobian ``J`` the information matrix is

    G(x) = Σ_c p_c g_c g_cᵀ = Jᵀ (diag(p) − p pᵀ) J,    g_c = ∇_x log p_c = Jᵀ(e_c − p)          (arXiv 2606.04767)

Its non-zero eigenvalues are those of the C × C matrix ``F K Fᵀ`` with ``K = J Jᵀ`` and rows ``F_c = √p_c (e_c − p)ᵀ``,
because ``Fᵀ F = diag(p) − p pᵀ``. Everything here is therefore algebra on a linearisation and takes no pass through the
network. At temperature ``T`` the logits are ``z/T`` and the Jacobian is ``J/T``.

Why calibrate: confident networks saturate the softmax, so λ tends to 0 on most samples and explodes on the rest.
Multiplying all logits by a constant changes no decision, yet moves every statistic by orders of magnitude. Dividing by
a temperature fitted to the same samples (Guo et al. 2017, arXiv 1706.04599) removes exactly that freedom.

Cost: N eigenvalue problems of size C; no forward or backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_robust.functional._validation.arguments import check_number
from lightning_robust.functional._validation.tensors import check_given_logits, check_gram
from lightning_robust.functional.input_space.float64 import to_float64
from lightning_robust.functional.input_space.likelihoods import (
    ColumnLikelihood,
    LikelihoodName,
    check_temperature,
    column_likelihood_of,
)
from lightning_robust.functional.input_space.query_bias import largest_without_bias
from lightning_robust.functional.input_space.temperature import TemperatureFit

# Elements of C × C matrices processed at once: 64 MiB. Blocks below 32 MiB stay on the heap of glibc, which then grows
# by gigabytes.
_MATRIX_ELEMENTS = 2**23


@dataclass(frozen=True)
class CalibratedSpectralNorm:
    """Spectral norms at the fitted temperature, with the error bar of their mean.

    Attributes:
        value: ``(N,)``, spectral norm of each sample at ``temperature``.
        mean: ``()``, mean over samples.
        stderr: ``()``, standard error of the mean, including the error of the temperature; NaN for N = 1.
        temperature: ``()``, from :func:`~lightning_robust.functional.fit_temperature`.
    """

    value: Tensor
    mean: Tensor
    stderr: Tensor
    temperature: Tensor


def fim_spectral_norm(
    logits: Tensor,
    gram: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    likelihood: LikelihoodName = "categorical",
    gram_variance: float = 0.0,
) -> Tensor:
    """Largest eigenvalue of each sample's input Fisher information matrix.

    Args:
        logits: ``(N, C)``.
        gram: ``(N, C, C)``, ``J Jᵀ``, as given by :func:`~lightning_robust.functional.linearize`.
        temperature: Divides the logits, and thus the Jacobian.
        likelihood: What the logits mean: those of classes, ``"categorical"``; of C independent labels,
            ``"bernoulli"``; or predictions of C numbers, ``"gaussian"``, whose errors have the standard deviation
            ``temperature``. For these λ is ‖J‖² / temperature².
        gram_variance: That of the linearisation, if ``gram`` was estimated along random directions: the bias which this
            noise gives the largest eigenvalue is then removed.

    Returns:
        ``(N,)``, in squared nats per squared input unit; never negative; 0 if the prediction is exactly one-hot.

    Raises:
        ValueError: If shapes do not match or ``temperature`` is not positive.

    Source: arXiv 2606.04767; the reduction to C × C is ours.
    """
    kind = column_likelihood_of(likelihood)
    check_gram(logits, gram, fewest=kind.fewest_outputs)
    variance = check_number("gram_variance", gram_variance, "a number ≥ 0", at_least=0)
    parts = (_information(kind, *part, temperature) for part in _chunks(kind.prepared(logits), gram))
    largest = [largest_without_bias(torch.linalg.eigvalsh(part), variance).clone() for part in parts]
    return torch.cat(largest).clamp_min(0).to(logits)


def fim_trace(
    logits: Tensor, gram: Tensor, *, temperature: float | Tensor = 1.0, likelihood: LikelihoodName = "categorical"
) -> Tensor:
    """Trace of each sample's input Fisher information matrix: the expected squared norm of the score.

    It lies between λ and ``(C − 1) λ``, or ``C λ`` where the likelihood is not ``"categorical"``. Arguments and errors
    are those of :func:`fim_spectral_norm`.

    Returns:
        ``(N,)``, in squared nats per squared input unit; never negative.

    Source: arXiv 2606.04767, which estimates it; here it is exact.
    """
    kind = column_likelihood_of(likelihood)
    check_gram(logits, gram, fewest=kind.fewest_outputs)
    matrices = (_information(kind, *part, temperature) for part in _chunks(kind.prepared(logits), gram))
    traces = [matrix.diagonal(dim1=1, dim2=2).sum(dim=1) for matrix in matrices]
    return torch.cat(traces).clamp_min(0).to(logits)


def saturated(logits: Tensor, *, likelihood: LikelihoodName = "categorical") -> Tensor:
    """Mark predictions so confident that their Fisher information says little: ``max_c p_c > 0.999``.

    Args:
        logits: ``(N, C)``.
        likelihood: With ``"bernoulli"``, samples are marked whose every label is that confident.

    Returns:
        ``(N,)``, bool.

    Raises:
        ValueError: If ``logits`` are not ``(N, C)`` or not finite, or the likelihood is ``"gaussian"``, whose
            information does not depend on confidence.

    Source: ours.
    """
    kind = column_likelihood_of(likelihood)
    check_given_logits(logits, fewest=kind.fewest_outputs)
    marked = kind.saturated(logits)
    if marked is None:
        raise ValueError(f"Expected a likelihood with probabilities that can saturate, but {likelihood!r} has none.")
    return marked.to(logits.device)


def calibrated_fim_spectral_norm(
    logits: Tensor,
    gram: Tensor,
    targets: Tensor,
    *,
    likelihood: LikelihoodName = "categorical",
    gram_variance: float = 0.0,
) -> CalibratedSpectralNorm:
    """Spectral norms at the temperature that fits these samples, with the standard error of their mean.

    The temperature is fitted to the same samples, so the mean depends on each sample in two ways. The standard error
    covers both through the influence function: sample i shifts the inverse temperature ``β = 1/T`` by
    ``−ℓ'_i(β)/Σℓ''``, where ``ℓ`` is the negative log-likelihood, and thereby the mean by its derivative in β times
    that shift.

    Args:
        logits: ``(N, C)``.
        gram: ``(N, C, C)``, ``J Jᵀ``.
        targets: ``(N,)``, class indices; ``(N, C)`` with the other likelihoods.
        likelihood: As in :func:`fim_spectral_norm`. With ``"gaussian"`` the temperature is the root mean square
            residual σ, so that the value is ‖J‖² / σ², where :func:`fim_spectral_norm` gives that at σ = 1.
        gram_variance: As in :func:`fim_spectral_norm`.

    Returns:
        A :class:`CalibratedSpectralNorm`.

    Raises:
        ValueError: As :func:`fim_spectral_norm` and :func:`~lightning_robust.functional.fit_temperature`.

    Source: ours.
    """
    kind = column_likelihood_of(likelihood)
    check_gram(logits, gram, fewest=kind.fewest_outputs)
    z, wide_gram = kind.prepared(logits), to_float64(gram)
    fit = kind.fit(logits, targets)
    temperature = fit.temperature
    value, vectors = _largest_eigenpairs(kind, z, wide_gram, temperature)
    if check_number("gram_variance", gram_variance, "a number ≥ 0", at_least=0) > 0:
        noise = gram_variance
        value = fim_spectral_norm(z, wide_gram, temperature=temperature, likelihood=likelihood, gram_variance=noise)

    step = 1e-4
    # to first order an eigenvalue changes as the quadratic form of its eigenvector does
    up, down = (_rayleigh(kind, z, wide_gram, temperature / (1 + s), vectors) for s in (step, -step))
    derivative = (up - down) / (2 * step) * temperature
    found = with_error_of_temperature(value, derivative, fit)
    return CalibratedSpectralNorm(*(getattr(found, field.name).to(logits) for field in fields(found)))


def with_error_of_temperature(value: Tensor, derivative: Tensor, fit: TemperatureFit) -> CalibratedSpectralNorm:
    """Values at a fitted temperature, with the standard error of their mean (see the source above).

    Args:
        value: ``(N,)``, float64.
        derivative: ``(N,)``, derivatives of the values with respect to ``β = 1/T``.
        fit: The temperature, fitted to the same samples.
    """
    n = len(value)
    influence = value - value.mean() + derivative.mean() * fit.influences
    stderr = influence.square().sum().div(n * (n - 1)).sqrt() if n > 1 else value.new_tensor(math.nan)
    return CalibratedSpectralNorm(value, value.mean(), stderr, fit.temperature)


def _information(kind: ColumnLikelihood, outputs: Tensor, gram: Tensor, temperature: float | Tensor) -> Tensor:
    """``F K Fᵀ / T²``, (N, C, C) in float64."""
    scale = check_temperature(temperature)
    return kind.information(outputs / scale, to_float64(gram)) / scale**2


def _largest_eigenpairs(kind: ColumnLikelihood, z: Tensor, gram: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue (N,) of each information matrix, with its eigenvector (N, C)."""
    values, vectors = [], []
    for part, part_gram in _chunks(z, gram):
        eigenvalues, eigenvectors = torch.linalg.eigh(_information(kind, part, part_gram, temperature))
        values.append(eigenvalues[:, -1].clamp_min(0))
        vectors.append(eigenvectors[:, :, -1].clone())  # a view would keep all eigenvectors of all samples
    return torch.cat(values), torch.cat(vectors)


def _rayleigh(kind: ColumnLikelihood, z: Tensor, gram: Tensor, temperature: Tensor, vectors: Tensor) -> Tensor:
    """``vᵀ F K Fᵀ v / T²``, (N,), without forming the matrix."""
    projected = kind.transposed_root_times(z / temperature, vectors[:, :, None])[:, :, 0]
    return torch.einsum("nc,ncd,nd->n", projected, gram, projected) / temperature**2


def _chunks(logits: Tensor, gram: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split samples into parts whose C × C matrices together stay small."""
    size = max(1, _MATRIX_ELEMENTS // logits.shape[1] ** 2)
    return zip(torch.split(logits, size), torch.split(gram, size), strict=True)
