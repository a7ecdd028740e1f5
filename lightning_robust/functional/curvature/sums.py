"""Per-layer traces as sums over samples, and what their spread says about the error.

Samples fall into blocks, and each probe has signs of its own in every block. What is summed, ``(M, B, L)`` for M
probes, B blocks and L layers, is all that any of the estimates and error bars depends on, and it adds up over batches
and processes. Two errors follow from it:

- from *probes*: had other signs been drawn on the same samples. Blocks are independent, so that the variances between
  probes within each of them add up: even two probes give B degrees of freedom. In a trained network a few uncertain
  samples may make most of the noise, and leave fewer: as many as Welch and Satterthwaite count. The error is widened as
  Student's distribution demands, so that ± 2 standard errors are still 95 % (without: 85 % on 256 samples of a small
  trained network, two probes; with: 90 %);
- from *samples*: had other samples been drawn (and other signs): the spread between blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_BLOCKS = 16


@dataclass(frozen=True)
class CurvatureSums:
    """Sums over the samples of each block, for each probe.

    Attributes:
        names: Of the L parameter tensors.
        parts: Independent terms of which each trace is the sum, ``(M, B, L)`` each, float64: traces summed over
            samples. Each may have taken another number M of probes; one without any counts as 0.
        weights: ``(B,)``, what the samples count in the mean, summed.
        exact: Whether the first part was not left to chance: its probes are all equal, and no more are needed.
    """

    names: tuple[str, ...]
    parts: tuple[Tensor, ...]
    weights: Tensor
    exact: bool = False

    def combined(self, coefficients: Tensor) -> CurvatureSums:
        """Linear combinations of layers, with coefficients ``(L, K)``; they have no names."""
        return CurvatureSums((), tuple(part @ coefficients.to(part) for part in self.parts), self.weights, self.exact)

    def total(self) -> CurvatureSums:
        """The sum of all layers, as one."""
        return CurvatureSums((), tuple(part.sum(dim=2, keepdim=True) for part in self.parts), self.weights, self.exact)

    def means(self) -> Tensor:
        """Traces of the mean loss, ``(L,)``."""
        return self._block_sums().sum(dim=0) / self.weights.sum()

    def probe_stderr(self) -> Tensor:
        """Standard errors from the choice of probes, ``(L,)``; NaN for a single probe."""
        return torch.stack(self.probe_variances()).sum(dim=0).sqrt()

    def probe_variances(self) -> list[Tensor]:
        """What each part contributes to the squares of these, ``(L,)``."""
        of_blocks = [_variance_of_mean(part) for part in self.parts]  # (B, L)
        if self.exact:
            of_blocks[0] = torch.zeros_like(of_blocks[0])
        total = torch.stack([v.sum(dim=0) for v in of_blocks]).sum(dim=0)
        squares = [v.square().sum(dim=0) / (len(p) + 1) for v, p in zip(of_blocks, self.parts, strict=True)]
        freedom = total.square() / torch.stack(squares).sum(dim=0) - 2
        return [v.sum(dim=0) * student_t_factor(freedom) ** 2 / self.weights.sum() ** 2 for v in of_blocks]

    def sample_stderr(self) -> Tensor:
        """Standard errors from the choice of samples and probes, ``(L,)``; NaN if all samples are in one block.

        Never below that of probes alone, which is a part of it.
        """
        used = self.weights > 0
        num_blocks = int(used.sum())
        residuals = self._block_sums() - self.weights[:, None] * self.means()
        if num_blocks < 2:
            return torch.full_like(residuals[0], math.nan)
        variance = residuals[used].square().sum(dim=0) * num_blocks / (num_blocks - 1)
        return torch.maximum(variance.sqrt() / self.weights.sum(), self.probe_stderr().nan_to_num(nan=0.0))

    def _block_sums(self) -> Tensor:
        return torch.stack([part.mean(dim=0) for part in self.parts if len(part)]).sum(dim=0)


def joined(earlier: CurvatureSums, more: CurvatureSums) -> CurvatureSums:
    """The same samples with more probes."""
    first, *others = (torch.cat(pair) for pair in zip(earlier.parts, more.parts, strict=True))
    if more.exact:
        first = more.parts[0][:1].expand_as(first)
    return CurvatureSums(earlier.names, (first, *others), earlier.weights, earlier.exact or more.exact)


def student_t_factor(freedom: Tensor) -> Tensor:
    """97.5 % quantile of Student's distribution over that of the normal one, to 1 %; 1 where there is no error."""
    x = 1 / freedom.clamp_min(1)
    return (x * (1.21 + 0.73 * x - 0.07 * x**2)).exp().nan_to_num(nan=1.0)


def _variance_of_mean(part: Tensor) -> Tensor:
    """Over probes, for each block and layer, ``(B, L)``."""
    if len(part) == 0:
        return part.new_zeros(part.shape[1:])
    return part.var(dim=0) / len(part) if len(part) > 1 else torch.full_like(part[0], math.nan)
