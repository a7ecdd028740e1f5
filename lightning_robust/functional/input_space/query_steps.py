"""How far apart a model is queried: far enough for the rounding of its answers, and near enough for its curvature.

Let ``ε`` be the rounding of inputs and answers, and ``h`` the step in units of the input's size. Rounding changes K,
which is made of squared slopes, by about ``(ε/h)²``; curvature changes it by ``h²`` and a kink by ``h``. ``h = √ε``
suits both: 3·10⁻⁴ of the size of a sample in float32, 10⁻⁸ of it in float64, 1 % of it for answers of four digits. It
is a guess, because float64 may hold answers that were computed in float32, and models differ in their curvature. So
differences over ±h and ±2h along a few directions must agree to a twentieth. Where they do not, other steps are tried.
What no step resolves is refused.

Piecewise constant models have no slope. Their outputs do not change at all at small steps, and jump at larger ones;
bisection finds such a jump down to the resolution of the inputs. Outputs that stay the same without a jump are those of
a continuous model which is flat at this sample.

Source: ours.
Cost: 16 queries per sample where the first step will do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_robust.functional._isolation.stand_ins import HALF
from lightning_robust.functional.input_space.query_answers import Answers
from lightning_robust.functional.input_space.query_reading import FEWEST_DIGITS, QueryReading, quanta, too_coarse

PILOTS = 4  # directions along which a step is tried
_AGREE, _AGREE_ROUNDED = 0.05, 0.08  # largest relative difference between slopes over ±h and ±2h
_FACTORS = (
    1.0,
    1 / 4,
    4.0,
    1 / 16,
    16.0,
    64.0,
    256.0,
    1024.0,
)  # of the first step, in the order in which they are tried
_LONGEST = 0.25  # step, in units of the size of a sample
_BISECTIONS = 40
_JUMP = 1e-4  # smallest change at the resolution of inputs that counts as a jump, beside the size of the outputs
_LABELS = "`lightning_robust.functional.decision_margin` measures distances by labels alone."

Shift = Callable[[Tensor, Tensor], Tensor]  # samples (n, ...) and changes (n, D) of the un-normalised input


class Queries(NamedTuple):
    """Some samples, and what it takes to query a model around them."""

    answers: Answers
    x: Tensor  # (n, ...)
    rows: Tensor  # (n,), their numbers among all samples
    moved: Shift
    size: Tensor  # (n,), typical length of the un-normalised inputs
    directions: Tensor  # (n, m, D), unit vectors of the un-normalised input

    def some(self, which: Tensor) -> Queries:
        """Some of the samples, by a mask or by their places."""
        x, rows, size, directions = (part[which] for part in (self.x, self.rows, self.size, self.directions))
        return self._replace(x=x, rows=rows, size=size, directions=directions)

    def around(self, step: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Answers (n, count, C) at either end of steps (n,) along the first directions."""
        along = self.directions[:, :count] * step.to(self.directions)[:, None, None]
        x = self.x[:, None].expand(-1, count, *self.x.shape[1:]).flatten(0, 1)
        change, rows = along.flatten(0, 1), self.rows.repeat_interleave(count)
        ends = torch.cat([self.moved(x, change), self.moved(x, -change)])
        answers = self.answers(ends, rows.repeat(2))
        up, down = answers.reshape(2, len(self.x), count, answers.shape[1])
        return up, down


def resolution(answers: Tensor, inputs: Tensor) -> float:
    """Relative rounding of answers and inputs, the coarser one; float64 may hold what was computed in float32."""
    dtype = answers.dtype
    if dtype == torch.float64 and torch.equal(answers.float().double(), answers):
        dtype = torch.float32
    return max(torch.finfo(dtype).eps, torch.finfo(inputs.dtype).eps)


def read(queries: Queries, first: Tensor, *, from_probabilities: bool) -> QueryReading:
    """Find out whether answers are rounded, also those around a sample, and refuse what is lost in it.

    Args:
        queries: The samples.
        first: Their answers (n, C).
        from_probabilities: Whether these are probabilities.
    """
    quantum = torch.zeros(len(first), dtype=torch.float64)
    if first.dtype not in HALF:
        grid = (first - (first.double() * 1e8).round().div(1e8)).abs() <= 2 * torch.finfo(first.dtype).eps * first.abs()
        maybe = grid.all(dim=1).nonzero()[:, 0]
        if len(maybe):
            some = queries.some(maybe)
            count = min(PILOTS, queries.directions.shape[1])
            ends = some.around(_rounded_step(torch.full((len(maybe),), 1e-4), some.size), count)
            quantum[maybe] = quanta(torch.cat([first[maybe][:, None], *ends], dim=1))
    return QueryReading.of(first, quantum, from_probabilities=from_probabilities)


def _rounded_step(rounding: Tensor, size: Tensor) -> Tensor:
    return rounding.double().sqrt().clamp_max(_LONGEST) * size


def steps(queries: Queries, reading: QueryReading, first: Tensor, step: float | None) -> Tensor:
    """The step (n,) of each sample, a length of the un-normalised input.

    Args:
        queries: The samples.
        reading: What their answers say.
        first: The answers themselves (n, C).
        step: The only one to try; chosen if None.

    Raises:
        ValueError: If the model is piecewise constant, or answers are too coarse for any step.
    """
    n, size = len(first), queries.size
    rounding = torch.where(reading.quantum > 0, reading.quantum, resolution(first, queries.x))
    start = _rounded_step(rounding, size) if step is None else torch.full((n,), step, dtype=torch.float64)
    chosen, apart = start.clone(), torch.full((n,), torch.inf, dtype=torch.float64)
    flat, left = torch.zeros(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool)
    for factor in _FACTORS if step is None else _FACTORS[:1]:
        h = factor * start
        which = (left & (h <= torch.maximum(_LONGEST * size, start))).nonzero()[:, 0]
        if not len(which):
            continue
        still, differ = _tried(queries.some(which), reading.some(which), first[which], h[which])
        if factor == 1:
            flat[which[still]] = True
        tolerance = torch.where(reading.quantum[which] > 0, _AGREE_ROUNDED, _AGREE)
        agree = (differ <= tolerance) & ~still
        doubtful = (agree & ((reading.quantum[which] > 0) | (factor > 1))).nonzero()[:, 0]
        if len(doubtful):  # votes of many trees look smooth from afar
            rows = which[doubtful]
            agree[doubtful] = ~_jumps(queries.some(rows), reading.quantum[rows], h[rows])
        apart[which] = torch.minimum(apart[which], torch.where(still, torch.inf, differ))
        chosen[which[agree]] = h[which[agree]]
        left[which[agree]] = False
        left &= ~flat
    _refuse(queries, reading, start, flat=flat, left=left, apart=apart)
    return chosen


def _tried(queries: Queries, reading: QueryReading, first: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Whether answers stay the same within ±2h, (n,), and how much slopes over ±h and ±2h differ, (n,)."""
    count = min(PILOTS, queries.directions.shape[1])
    near, far = (queries.around(width * h, count) for width in (1, 2))
    same = [(end == first[:, None]).flatten(1).all(dim=1) for end in (*near, *far)]
    return torch.stack(same).all(dim=0), reading.disagreement(reading.slopes(*near, h), reading.slopes(*far, 2 * h))


def _refuse(
    queries: Queries, reading: QueryReading, start: Tensor, *, flat: Tensor, left: Tensor, apart: Tensor
) -> None:
    """Raise a ``ValueError`` if samples that are ``flat``, or ``left`` without a step, cannot be measured."""
    n = len(start)
    if flat.any():
        some = queries.some(flat)
        jump = torch.zeros(len(some.rows), dtype=torch.bool)
        ends = [some.moved(some.x, some.directions[:, 0] * (_LONGEST * some.size).to(some.directions)[:, None])]
        ends += [queries.x.roll(1, dims=0)[flat], some.x / 2, 0 * some.x]
        for end in ends:
            if not jump.any():
                jump = _jumps_between(some, some.x, end, reading.quantum[flat])
        if jump.any():
            where = int(flat.nonzero()[jump.nonzero()[0, 0], 0])
            raise ValueError(
                f"The outputs do not change within ±{2 * float(start[where]):.2g} of {int(jump.sum())} of {n} samples"
                f" (first: sample {int(queries.rows[where])}), and jump further away: the model is piecewise constant,"
                " as forests of trees and nearest neighbours are, or its outputs are rounded. It has no slope"
                f" to measure. {_LABELS}"
            )
    coarse = too_coarse(reading.quantum) & ~flat
    if coarse.any():
        where = int(coarse.nonzero()[0, 0])
        raise ValueError(
            f"The outputs of {int(coarse.sum())} of {n} samples (first: sample {int(queries.rows[where])}) come in"
            f" steps of {float(reading.quantum[where]):g}, as rounded probabilities and votes of a forest of trees do,"
            f" so most do not change within ±{float(start[where]):.2g}. Let the model return at least {FEWEST_DIGITS}"
            f" digits, log-probabilities or logits. {_LABELS}"
        )
    if left.any():
        where = int(left.nonzero()[0, 0])
        if _jumps(queries.some(left), reading.quantum[left], start[left]).any():
            why = "The outputs jump, as those of forests of trees and of quantised networks do."
        elif reading.quantum[where] > 0:
            quantum = float(reading.quantum[where])
            why = f"The answers are rounded, to steps of {quantum:g}: let the model return more digits."
        else:
            why = "Are the answers random, or of less precision than their type? A longer `step` outweighs noise."
        raise ValueError(
            f"Differences of the outputs over ±h and ±2h disagree in {int(left.sum())} of {n} samples (first: sample"
            f" {int(queries.rows[where])}), by at least {float(apart[where]):.0%} around h = {float(start[where]):.2g},"
            f" so they show no slope. {why} {_LABELS}"
        )


def _jumps(queries: Queries, quantum: Tensor, step: Tensor) -> Tensor:
    """Whether outputs jump between the ends of a step along the first direction, (n,)."""
    change = queries.directions[:, 0] * step.to(queries.directions)[:, None]
    return _jumps_between(queries, queries.moved(queries.x, -change), queries.moved(queries.x, change), quantum)


def _jumps_between(queries: Queries, low: Tensor, high: Tensor, quantum: Tensor) -> Tensor:
    """Whether outputs change by more than their rounding between inputs that cannot be told apart, (n,)."""
    at_low, at_high = (queries.answers(end, queries.rows).double() for end in (low, high))
    size = at_low.nan_to_num(neginf=0).abs().amax(dim=1)
    for _ in range(_BISECTIONS):
        middle = low + (high - low) / 2
        at_middle = queries.answers(middle, queries.rows).double()
        below = _change(at_low, at_middle) >= _change(at_middle, at_high)
        low, high = torch.where(_like(below, low), low, middle), torch.where(_like(below, low), middle, high)
        at_low = torch.where(below[:, None], at_low, at_middle)
        at_high = torch.where(below[:, None], at_middle, at_high)
    return _change(at_low, at_high) > torch.maximum(_JUMP * size, 2.5 * quantum)


def _change(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).nan_to_num(nan=0.0).abs().amax(dim=1)


def _like(flags: Tensor, values: Tensor) -> Tensor:
    return flags.to(values.device).view(-1, *(1,) * (values.ndim - 1))
