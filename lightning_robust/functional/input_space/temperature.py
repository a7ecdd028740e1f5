"""The temperature at which a classifier is calibrated: its logits are divided by it.

With ``β = 1/T`` the negative log-likelihood of N samples is convex in β, and its derivative is

    Σ_i (E_p z − z_y),    p = softmax(βz)        (Guo et al. 2017, arXiv 1706.04599)

If every sample is classified correctly, it is negative everywhere and ``T → 0``; if a single sample is barely
misclassified, T depends on that sample alone. Therefore half a pseudo-sample is added, in the manner of Platt (1999).
It has two classes and is misclassified by ``G``, the median of the margins ``|z_y − max_{k≠y} z_k|``. True errors take
its place as far as they miss, until nothing of it is left:

    (½ − Σ_i (max_{k≠y} z_k − z_y)₊ / G)₊ log(1 + e^{βG})

The sum is convex, too. Its minimiser is finite, continuous in the logits, and proportional to them.

Nothing here needs to know which classes are masked, because nothing depends on a class without probability. The
likelihood weighs logits by probability, and a margin lies between the two classes of a sample that compete. A mean over
classes would be moved by a mask of −50 or log(1e-45) = −103 as by any other logit.

Source: ours, but for the likelihood.
Cost: 60 softmaxes of the logits; no forward or backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_robust.functional._validation.scales import masked_classes, ordinary
from lightning_robust.functional.input_space.float64 import to_float64

# Weight, in samples, of the smoothing that keeps a fitted temperature finite.
PSEUDO_SAMPLES = 0.5
# Temperatures are searched between the median margin over this number and the largest margin times this number.
_RANGE = 1e4


def with_masks(logits: Tensor) -> Tensor:
    """Logits in float64, −∞ for left-out classes (see :func:`~lightning_robust.functional.fit_temperature`)."""
    z = to_float64(logits)
    return z.masked_fill(masked_classes(z), -torch.inf)


@dataclass(frozen=True)
class TemperatureFit:
    """A fitted temperature, and how it depends on each sample.

    Attributes:
        temperature: ``()``.
        influences: ``(N,)``, N times the change of ``β = 1/T`` by which each sample has moved it: ``−ℓ'_i / mean ℓ''``.
            They are 0 for samples that do not count, and for all if no change of a sample would move it.
    """

    temperature: Tensor
    influences: Tensor

    @classmethod
    def of(cls, z: Tensor, y: Tensor) -> TemperatureFit:
        """Fit logits ``(N, C)`` with masks, float64, to class indices ``(N,)``."""
        margins = _margins(z, y)
        counted = ~z.gather(1, y[:, None])[:, 0].isneginf() & ordinary(margins.abs())
        influences = torch.zeros_like(margins)
        typical = margins[counted].abs()
        typical = typical[typical > 0]
        if not len(typical):
            return cls(z.new_ones(()), influences)
        gap = typical.quantile(0.5)
        missed = (-margins[counted]).clamp_min(0).sum() / gap
        likelihood = _Likelihood(z[counted], y[counted], gap, (PSEUDO_SAMPLES - missed).clamp_min(0))
        temperature = likelihood.minimiser(gap / _RANGE, typical.max() * _RANGE)
        slopes, curvature = likelihood.slopes(1 / temperature), likelihood.curvature(1 / temperature)
        fitted = slopes.mean().abs() <= 1e-6 * slopes.abs().mean()  # an end of the range would not move
        if fitted and curvature > 0:
            influences[counted] = -slopes / (curvature / len(z))
        return cls(temperature, influences)


@dataclass(frozen=True)
class _Likelihood:
    """Negative log-likelihood of samples ``(n, C)``, and of a pseudo-sample of this gap and weight, as functions of β.

    The pseudo-sample is spread evenly over the samples.
    """

    z: Tensor
    y: Tensor
    gap: Tensor
    weight: Tensor

    def minimiser(self, lowest: Tensor, highest: Tensor) -> Tensor:
        """Temperature in a range where the derivative changes its sign, by bisection of log β."""
        low, high = -highest.log(), -lowest.log()
        for _ in range(60):
            middle = (low + high) / 2
            rising = self.slopes(middle.exp()).mean() > 0
            low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
        return (-(low + high) / 2).exp()

    def slopes(self, beta: Tensor) -> Tensor:
        """First derivative of each sample's part, ``(n,)``."""
        expected = ((beta * self.z).softmax(dim=1) * self._finite()).sum(dim=1)
        pseudo = self.weight * self.gap * (beta * self.gap).sigmoid()
        return expected - self.z.gather(1, self.y[:, None])[:, 0] + pseudo / len(self.z)

    def curvature(self, beta: Tensor) -> Tensor:
        """Second derivative of the sum, ``()``."""
        probs, finite = (beta * self.z).softmax(dim=1), self._finite()
        expected = (probs * finite).sum(dim=1, keepdim=True)
        wrong = (beta * self.gap).sigmoid()
        pseudo = self.weight * self.gap.square() * wrong * (1 - wrong)
        return (probs * (finite - expected).square()).sum() + pseudo

    def _finite(self) -> Tensor:
        """Logits for sums weighted by probabilities: 0 in place of −∞, because 0 · −∞ is not a number."""
        return self.z.masked_fill(self.z.isneginf(), 0)


def _margins(z: Tensor, y: Tensor) -> Tensor:
    """``z_y − max_{k≠y} z_k`` of each sample (N,); 0 where either is masked, as no temperature changes the odds."""
    margins = z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).amax(dim=1)
    return margins.masked_fill(margins.isinf(), 0)
