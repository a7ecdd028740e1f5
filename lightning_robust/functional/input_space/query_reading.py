"""Reads slopes of logits from answers around a sample: from logits, log-probabilities, or probabilities.

Of probabilities, logarithms are taken. The most probable class then has no slope of its own: where it is nearly
certain, its probability is rounded to 1, whereas the others still have all their digits. Its slope follows from them,
because ``Σ_c p_c ∇ log p_c = 0``.

Classes whose probability is lost in rounding have no slope, either. They count as masked (a logit of −∞) as long as
what is lost is small beside what is left, and are refused otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_robust.functional.input_space.query_answers import rounded_digits

_FEWEST_QUANTA = 20  # that a probability must have to be read: then its rounding is 2.5 % of it
_LOST = 0.1  # share of the probability beside the top class that may be lost
FEWEST_DIGITS = 4  # of rounded outputs


class QueryReading(NamedTuple):
    """The answers for n samples, and how those around them are read."""

    logits: Tensor  # (n, C), float64; −∞ for classes that are masked, or lost in rounding
    probs: Tensor  # (n, C)
    from_probabilities: bool
    quantum: Tensor  # (n,), to which answers were rounded; 0 if they were not

    @classmethod
    def of(cls, answers: Tensor, quantum: Tensor, *, from_probabilities: bool) -> QueryReading:
        """Read the answers (n, C) for the samples themselves."""
        if not from_probabilities:
            return cls(answers.double(), answers.double().softmax(dim=1), False, quantum)
        smallest = 4 * torch.finfo(answers.dtype).smallest_normal
        wide, least = answers.double(), (_FEWEST_QUANTA * quantum).clamp_min(smallest)
        usable = (wide >= least[:, None]) | (wide == wide.amax(dim=1, keepdim=True))
        return cls(torch.where(usable, wide, 0.0).log(), wide, True, quantum)

    def some(self, rows: Tensor) -> QueryReading:
        """The same for some of the samples."""
        return QueryReading(self.logits[rows], self.probs[rows], self.from_probabilities, self.quantum[rows])

    @property
    def saturated(self) -> Tensor:
        """Mark the samples, (n,), of which no probability but one is left."""
        return self.logits.isfinite().sum(dim=1) < 2 if self.from_probabilities else self.quantum < 0

    @property
    def lost(self) -> Tensor:
        """Mark the samples, (n,), of which too much probability was lost in rounding."""
        usable, quantum = self.logits.isfinite(), self.quantum[:, None]
        lost = torch.where(usable, 0.0, self.probs + quantum / 2).sum(dim=1)
        beside = 1 - self.probs.amax(dim=1)
        return (lost > _LOST * beside) & (self.quantum > 0) if self.from_probabilities else self.quantum < 0

    def slopes(self, up: Tensor, down: Tensor, step: Tensor) -> Tensor:
        """Slopes of the logits, (n, P, C), from answers (n, P, C) at either end of steps (n,)."""
        up, down, usable = up.double(), down.double(), self.logits.isfinite()[:, None]
        if self.from_probabilities:
            least = torch.finfo(torch.float64).smallest_normal
            up, down = up.clamp_min(least).log(), down.clamp_min(least).log()
        slopes = torch.where(usable, (up - down) / (2 * step[:, None, None]), 0.0)
        if not self.from_probabilities:
            return slopes
        top = self.probs.argmax(dim=1)[:, None, None].expand(-1, slopes.shape[1], 1)
        probs = torch.where(usable, self.probs[:, None], 0.0).expand_as(slopes)
        of_others = (probs * slopes).scatter(2, top, 0.0).sum(dim=2, keepdim=True)
        return slopes.scatter(2, top, -of_others / probs.gather(2, top))

    def disagreement(self, one: Tensor, other: Tensor) -> Tensor:
        """How much slopes (n, P, C) differ from others, relative to their size, (n,); that of nothing is 0.

        A component that all classes share does not count. Of rounded probabilities those count that are large.
        """
        top = self.probs.argmax(dim=1)[:, None, None].expand(-1, one.shape[1], 1)
        weights = torch.where(self.logits.isfinite(), 1.0, 0.0)
        weights = torch.where((self.quantum > 0)[:, None], weights * self.probs.sqrt(), weights)[:, None]
        one, other = (weights * (slopes - slopes.gather(2, top)) for slopes in (one, other))
        sizes = torch.maximum(one.square().sum(dim=(1, 2)), other.square().sum(dim=(1, 2)))
        ratios = (one - other).square().sum(dim=(1, 2)) / sizes
        return torch.where(sizes > 0, ratios, 0.0).sqrt()


def quanta(answers: Tensor) -> Tensor:
    """To which each sample's answers (n, A, C) were rounded, (n,); 0 if they were not."""
    digits = [rounded_digits(rows) for rows in answers]
    return torch.tensor([0.0 if d is None else 10.0**-d for d in digits], dtype=torch.float64)


def too_coarse(quantum: Tensor) -> Tensor:
    """Mark the samples, (n,), whose answers have too few digits to tell rounding from votes."""
    return quantum > 1.5 * 10.0**-FEWEST_DIGITS
