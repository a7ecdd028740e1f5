"""Removes the bias of the largest eigenvalue of a matrix that was estimated from random directions.

A Gram matrix from m random orthonormal directions out of D is unbiased, but its largest eigenvalue is not: it picks the
direction in which the noise was largest. To first order in the noise (Lawley 1956, Biometrika 43) the eigenvalues
``l_1 ≥ l_2 ≥ …`` of the estimate are too far apart by

    l_i − ν/2 · Σ_{j≠i} l_i l_j / (l_i − l_j),        ν = 2 (D − m) / (m (D + 2)),

where ``ν`` is the relative variance of a squared slope along the directions (a Beta distribution; 0 if m = D, so that
nothing is corrected). The formula fails where eigenvalues lie close together, as those of an untrained network do.
Averages of the corrected values over the k largest do not fail, because the terms within an average cancel, and the
largest of these averages is the first value of an isotonic regression (as Stein proposed for covariance matrices). That
is the estimate:

    λ = max_k  1/k · [ Σ_{i≤k} l_i − ν/2 · Σ_{i≤k<j} l_i l_j / (l_i − l_j) ].

Its relative variance is ν, whatever the other eigenvalues are.

Source: Lawley 1956; Stein's isotonised estimator as in Lin & Perlman 1985; the form with D directions is ours.
Cost: algebra on C eigenvalues per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_variance(num_directions: int, num_features: int) -> float:
    """Relative variance ``ν`` of a squared slope that is measured along m of D orthonormal directions."""
    return 2 * (num_features - num_directions) / (num_directions * (num_features + 2))


def largest_without_bias(eigenvalues: Tensor, gram_variance: float) -> Tensor:
    """Estimate the largest eigenvalue, (N,), from those of a noisy matrix, (N, C), ascending.

    Args:
        eigenvalues: As ``torch.linalg.eigvalsh`` gives them.
        gram_variance: ``ν``; 0 returns the largest as it is.
    """
    if gram_variance == 0:
        return eigenvalues[:, -1]
    values = eigenvalues.flip(-1).clamp_min(0)
    best = values.mean(dim=1)
    for k in range(1, values.shape[1]):
        upper, lower = values[:, :k, None], values[:, None, k:]
        terms = torch.where(upper > lower, upper * lower / (upper - lower), torch.inf)
        terms = torch.where(lower == 0, 0.0, terms)
        best = torch.maximum(best, (values[:, :k].sum(dim=1) - gram_variance / 2 * terms.sum(dim=(1, 2))) / k)
    return best
