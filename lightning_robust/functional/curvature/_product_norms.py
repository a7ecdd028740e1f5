"""Norms of sums of outer products, without holding many products at once."""

from __future__ import annotations

import torch
from torch import Tensor

ELEMENTS = 2**20  # of products of all samples that are held at once


def product_norms(slopes: Tensor, inputs: Tensor) -> Tensor:
    """``‖Σ_t g_t a_tᵀ‖²`` of each sample, ``(N,)``, for slopes ``(N, O, T)`` and inputs ``(N, I, T)``."""
    num_out, num_in, positions = slopes.shape[1], inputs.shape[1], slopes.shape[2]
    if positions == 1:
        return squared_norms(slopes) * squared_norms(inputs)
    products = positions**2 * (num_out + num_in) < positions * num_out * num_in
    size = positions**2 if products else num_out * num_in
    parts = []
    for g, a in zip(*(torch.split(values, max(1, ELEMENTS // size)) for values in (slopes, inputs)), strict=True):
        if products:
            parts.append((torch.bmm(g.mT, g) * torch.bmm(a.mT, a)).sum(dim=(1, 2), dtype=torch.float64).clamp_min(0))
        else:
            parts.append(squared_norms(torch.bmm(g, a.mT)))
    return torch.cat(parts)


def squared_norms(gradients: Tensor) -> Tensor:
    """Squared norm of each of the gradients ``(N, ...)``, ``(N,)``, float64."""
    norms: Tensor = torch.linalg.vector_norm(gradients.reshape(len(gradients), -1), dim=1)
    return norms.double().square()
