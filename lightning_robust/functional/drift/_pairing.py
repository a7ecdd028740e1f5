"""Errors of measurements that are made on the same samples: how well is their difference known?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def covariances(stderrs: Sequence[float], per_sample: Sequence[Tensor | None]) -> Tensor:
    """Of the errors of several measurements, from what each of them found on each sample.

    Whatever luck the choice of the samples had in one measurement it had in the next, too, and their difference is
    known better than either. Measurements of equally many samples are taken to be made on the same ones, in the same
    order; where they were not, their values do not go together, and the errors come out as independent.

    Args:
        stderrs: Standard errors of T measurements.
        per_sample: Finite values, (N,) for each measurement, or None where they are not known. Its error is independent
            of the others then, as that of equal values, whose mean has none.

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
        values = _rescaled(values)  # squares of very large or small numbers are none
        centred = _rescaled(values - values.mean(dim=1, keepdim=True))
        norms = centred.norm(dim=1, keepdim=True)
        units = torch.where(norms > 0, centred / norms, 0.0)
        correlations[paired[:, None], paired] = units @ units.T
    correlations.fill_diagonal_(1.0)
    return errors[:, None] * correlations * errors


def _rescaled(values: Tensor) -> Tensor:
    """Each row divided by its largest entry; zeros stay."""
    largest = values.abs().amax(dim=1, keepdim=True)
    return torch.where(largest > 0, values / largest, 0.0)
