"""Scales of outputs that no masked class and no diverged sample sets, and the finiteness of logits with masks.

Classifiers mask classes by logits of −∞, −1e9 or −1e4: classes not met yet, actions that are not allowed. And training
may diverge on a few samples, whose outputs are then a million times larger. Neither says anything about the size of
the other logits, by which temperatures are searched and differences are judged.

Source: ours.
Cost: a sort of each row of logits; no forward or backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

# exp(−746) is 0 in double precision.
_IMPOSSIBLE = 746.0
# A mask lies further below than this many times the range of the logits that it leaves.
_FAR = 30.0
# A diverged sample is larger than this many times the typical one.
_DIVERGED = 100.0
# Share of the samples that are never larger than typical ones.
_TYPICAL = 0.9
# Outputs that differ by less than this share of their size count as equal.
_EQUAL = 1e-4


def masked_classes(logits: Tensor) -> Tensor:
    """Mark the classes that a sample cannot have: (N, C), bool, for logits (N, C) without NaN or +∞.

    A logit of −∞ is a mask. A finite one is if it lies below a gap in the sorted logits of its sample

    - of more than 746 nats: the probability is exactly 0, also in double precision; and
    - of more than 30 times the range of the logits above the gap, in this sample and in nine of ten samples: at any
      temperature that suits those, the probability stays negligible.

    Networks with logits of ordinary size (differences below 746) have no finite masks. If a gap leaves a single class,
    the others must also lie closer together than a thirtieth of the gap, and other samples must show the range of
    logits, because a diverged sample of few classes looks alike.
    """
    masked = logits.isneginf()
    if logits.shape[1] < 3 or not len(logits):
        return masked
    z, ordered = _sorted(logits)
    gaps, wide, spans = _gaps(ordered)
    spans = spans[~wide[:, 0]]
    if not len(spans):
        return masked
    wide &= gaps > _FAR * typical(spans)
    last = ordered.gather(1, wide.int().argmax(dim=1, keepdim=True))  # the lowest logit above the gap
    return masked | ((z < last) & wide.any(dim=1, keepdim=True))


def gaps_below_a_class(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Measure the gap below the first class of each sample (N, C), for :func:`are_alone` to judge over all batches.

    Returns:
        The gap (N,) below the first class of a sample if it is wide and only the other samples can tell what it means,
        ∞ if all others are masked by −∞, else 0; and the range (N,) of the logits above any wide gap.
    """
    gaps, wide, spans = _gaps(_sorted(logits)[1])
    below = gaps[:, 0] * (wide[:, 0] & (logits.shape[1] > 2))
    return below.masked_fill((~logits.isneginf()).sum(dim=1) == 1, torch.inf), spans


def are_alone(gaps: Tensor, spans: Tensor) -> Tensor:
    """Mark the samples (N,) with a single unmasked class, given :func:`gaps_below_a_class` of all samples."""
    others = spans[gaps == 0]
    return gaps > (_FAR * typical(others) if len(others) else torch.finfo(gaps.dtype).max)


def _sorted(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits without masks of −∞, which add no gap, and the same in descending order."""
    masked = logits.isneginf()
    lowest = logits.masked_fill(masked, torch.inf).amin(dim=1, keepdim=True)
    z = torch.where(masked, lowest, logits)
    return z, z.sort(dim=1, descending=True).values


def _gaps(ordered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gaps (N, C − 1) of sorted logits, which of them are wide, and the range (N,) of the logits above the first."""
    gaps = ordered[:, :-1] - ordered[:, 1:]
    above, below = ordered[:, :1] - ordered[:, :-1], ordered[:, 1:] - ordered[:, -1:]
    wide = (gaps > _IMPOSSIBLE) & (gaps > _FAR * above)
    wide[:, 0] &= gaps[:, 0] > _FAR * below[:, 0]
    first = wide.int().argmax(dim=1, keepdim=True)
    spans = torch.where(wide.any(dim=1), above.gather(1, first)[:, 0], ordered[:, 0] - ordered[:, -1])
    return gaps, wide, spans


def ordinary(sizes: Tensor) -> Tensor:
    """Mark the samples that have not diverged, (N,), bool, by a size ≥ 0 of each (N,).

    A sample has diverged if it is more than a hundred times larger than nine of ten samples (of those larger than 0).
    """
    positive = sizes[sizes > 0]
    return sizes <= _DIVERGED * typical(positive) if len(positive) else torch.ones_like(sizes, dtype=torch.bool)


def typical(sizes: Tensor) -> Tensor:
    """A size (0-d) that at least one in ten of N ≥ 2 samples (N,) exceeds or equals, and that no few of them set."""
    rank = int(_TYPICAL * (len(sizes) - 1))
    return sizes.sort().values[rank]


def magnitudes(outputs: Tensor) -> Tensor:
    """Size of outputs (N, ...) by which their differences are judged, of the same shape.

    That is the largest output of each sample, or of the median sample if that is larger. Masked classes do not count,
    but by themselves: a mask of −1e4 is rounded more coarsely than other logits are.
    """
    hidden = masked_classes(outputs) if outputs.ndim == 2 else outputs.isneginf()
    sizes = outputs.abs().masked_fill(hidden, 0)
    of_samples = sizes.reshape(len(outputs), -1).amax(dim=1)
    scale = torch.maximum(of_samples, of_samples.median()).view(-1, *(1,) * (outputs.ndim - 1))
    return torch.maximum(scale, outputs.abs().masked_fill(outputs.isneginf(), 0))


def tolerances(outputs: Tensor) -> Tensor:
    """How much each of the outputs (N, ...) may differ and count as equal."""
    return _EQUAL * magnitudes(outputs)


def computable(logits: Tensor, before: Tensor) -> Tensor:
    """Mark the samples, (N,), bool, whose logits (N, C) are finite but for classes that were masked ``before``."""
    return (logits.isfinite() | (logits.isneginf() & before.isneginf())).all(dim=1)
