"""Errors of measurements on the same samples: how precisely is their difference known?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def covariances(stderrs: Sequence[float], per_sample: Sequence[Tensor | None]) -> Tensor:
    """Covariance matrix of the errors of several measurements, estimated from their values per sample.

    Measurements on the same samples share the luck of the draw, so their difference is more precise than either of
    them. Measurements with equally many samples are assumed to use the same samples in the same order. If they do not,
    their values per sample are uncorrelated, and so are the errors returned.

    Args:
        stderrs: Standard errors of T measurements.
        per_sample: Finite values, (N,), for each measurement, or None where they are not known. Without values, or with
            N equal values, the error of a measurement counts as independent of the others.

    Returns:
        (T, T), float64, positive semi-definite, with the squares of ``stderrs`` on the diagonal.

    Source: ours.
    """
    errors = torch.tensor(stderrs, dtype=torch.float64)
    correlations = torch.eye(len(errors), dtype=torch.float64)
    known = {t: values.detach().to("cpu", torch.float64) for t, values in enumerate(per_sample) if values is not None}
    for size in {len(values) for values in known.values()}:
        paired = torch.tensor([t for t, values in known.items() if len(values) == size])
        values = torch.stack([known[int(t)] for t in paired])
        values = _rescaled(values)  # squares of very large or very small numbers would overflow or vanish
        centred = _rescaled(values - values.mean(dim=1, keepdim=True))
        norms = centred.norm(dim=1, keepdim=True)
        units = torch.where(norms > 0, centred / norms, 0.0)
        correlations[paired[:, None], paired] = units @ units.T
    correlations.fill_diagonal_(1.0)
    return errors[:, None] * correlations * errors


def _rescaled(values: Tensor) -> Tensor:
    """Divide each row by its largest absolute entry; rows of zeros stay."""
    largest = values.abs().amax(dim=1, keepdim=True)
    return torch.where(largest > 0, values / largest, 0.0)
