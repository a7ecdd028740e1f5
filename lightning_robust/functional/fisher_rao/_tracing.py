"""The passes behind Fisher–Rao paths: all paths advance together, and those that have ended make room for others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.functional.fisher_rao._natural_gradient import (
    NaturalGradient,
    fisher_rao_speed,
    solve_by_conjugate_gradients,
    solve_by_gram,
)
from lightning_robust.functional.fisher_rao.path_options import DAMPING, SHARE_OF_THE_WAY, PathOptions
from lightning_robust.functional.input_space.jacobian import float64_dtype, input_gradient, jacobian_rows
from lightning_robust.functional.input_space.units import Units

# A crossing is located up to a gap of so many nats between two logits, or of so many times their rounding error, or in
# so many trials.
_GAP = 1e-6
_ROUNDINGS = 64
_TRIALS = 30
# A step that leads no closer to the target is halved so often at the most.
_SHORTER = 20


class Paths(NamedTuple):
    """Paths, one in each row, normalised as the inputs are.

    Attributes:
        number: (m,), which paths they are.
        sample: (m,), of which samples.
        source: (m,), class that is to be left.
        target: (m,), class that is aimed at.
        start: (m, ...), where they begin.
        x: (m, ...), where they are.
        move: (m, ...), their last step, or at the start what the next one is expected to be.
        lower: (m, ...), what ``x`` may not fall below, of a shape that broadcasts.
        upper: (m, ...), what it may not exceed, likewise.
        logits: (m, C), at ``x``.
        length: (m,), float64, way on the simplex so far.
        steps: (m,), so far.
        damping: (m,), float64, λ.
        longest: (m,), float64, Euclidean bound of a step, un-normalised.
    """

    number: Tensor
    sample: Tensor
    source: Tensor
    target: Tensor
    start: Tensor
    x: Tensor
    move: Tensor
    lower: Tensor
    upper: Tensor
    logits: Tensor
    length: Tensor
    steps: Tensor
    damping: Tensor
    longest: Tensor

    def rows(self, chosen: Tensor) -> Paths:
        """Some of them."""
        return Paths(*(part[chosen] for part in self))

    @property
    def samples(self) -> tuple[Tensor, Tensor]:
        """One path of each of their samples, (n,), and which of these has the sample of each, (m,)."""
        _, which = self.sample.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        rows = torch.arange(len(which), device=which.device)
        return rows.new_zeros(int(which.max()) + 1).scatter_(0, which, rows), which

    def gap(self, logits: Tensor) -> Tensor:
        """Gap between source and target at some logits (m, C), (m,)."""
        return (logits.gather(1, self.source[:, None]) - logits.gather(1, self.target[:, None]))[:, 0]

    @property
    def contrast(self) -> Tensor:
        """``e_source − e_target``, (m, C), float64: what the logits are multiplied with to give the gap."""
        c = self.logits.shape[1]
        return (F.one_hot(self.source, c) - F.one_hot(self.target, c)).to(float64_dtype(self.logits))


def distance_of_logits(first: Tensor, second: Tensor) -> Tensor:
    """Fisher–Rao distance of the predictions of two rows of logits, (n, C) each, (n,) in float64."""
    roots, others = ((_to_float64(z).log_softmax(dim=1) / 2).exp() for z in (first, second))
    return distance_of_roots(roots, others)


def distance_of_roots(first: Tensor, second: Tensor) -> Tensor:
    """The same of the square roots of probabilities: by their chord, because cosines of small angles are 1."""
    chord: Tensor = torch.linalg.vector_norm(first - second, dim=-1)
    return 4 * (chord / 2).clamp_max(1).asin()


class Ended(NamedTuple):
    """Paths that have ended, and whether they have left their class."""

    paths: Paths
    success: bool


class Tracer:
    """Follows the natural gradient of the gap to a target through a network, downwards.

    Args:
        model: Maps inputs (n, ...) to logits (n, C).
        units: How inputs were normalised.
        settings: See there.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], units: Units, settings: PathOptions) -> None:
        self._model = model
        self._units = units
        self._settings = settings
        self._poster = settings.mode == "poster"

    def trace(self, begin: Callable[[Tensor], Paths], num_paths: int, *, at_once: int) -> Iterator[Ended]:
        """Trace paths to their ends, which come in any order.

        Args:
            begin: Makes the paths of given numbers, (m,), at their starts.
            num_paths: How many there are.
            at_once: How many advance together, at the most.
        """
        if not num_paths:
            return
        going = self._prepared(begin(torch.arange(min(at_once, num_paths))))
        begun = len(going.x)
        while len(going.x):
            going, *ended = self._advance(going)
            yield from (group for group in ended if len(group.paths.x))
            numbers = torch.arange(begun, min(begun + at_once - len(going.x), num_paths))
            if len(numbers):
                begun += len(numbers)
                going = Paths(*map(torch.cat, zip(going, self._prepared(begin(numbers)), strict=True)))

    def logits(self, x: Tensor) -> Tensor:
        """Of points (m, ...), without a graph."""
        with torch.no_grad():
            return self._outputs(x)

    def _outputs(self, x: Tensor) -> Tensor:
        outputs = self._model(x.clone())
        # a network that squeezes its outputs loses the dimension of a single sample
        return outputs[None] if len(x) == 1 and outputs.ndim == 1 else outputs

    def _prepared(self, paths: Paths) -> Paths:
        """Paths at their starts, with damping, bound of a step, and first move, which follow from the start."""
        settings, leaf = self._settings, paths.x.clone().requires_grad_()
        logits = self._outputs(leaf)
        gap = paths.gap(logits)
        slope = _to_float64(input_gradient(gap, leaf, self._units.std)).square().sum(dim=1)
        if settings.damping is None:
            damping = torch.where(slope > 0, slope * (DAMPING / 4), 1)  # from a flat start no path leads anywhere
        else:
            damping = torch.full_like(slope, settings.damping)
        if settings.max_euclidean_step is None and not self._poster:
            longest = SHARE_OF_THE_WAY * (_to_float64(gap.detach()).abs() + 1) / slope.sqrt()
        else:
            longest = torch.full_like(slope, settings.max_euclidean_step or torch.inf)
        paths = paths._replace(damping=damping, longest=longest)
        # paths of one sample begin together, and are linearised together
        return paths if self._poster else paths._replace(move=-self._step(paths, paths.x, *paths.samples))

    def _advance(self, paths: Paths) -> tuple[Paths, Ended, Ended]:
        """Take one step of each path: those that go on, those that have left their class, and those that never will."""
        # the midpoint rule, of second order also if the step before says where about the middle is
        middle = paths.x if self._poster else _inside(paths, paths.x + paths.move / 2)
        ahead = _inside(paths, paths.x - self._step_at(paths, middle))
        logits = self.logits(ahead)
        if not self._poster:
            ahead, logits = self._descending(paths, ahead, logits)
        computable = flat(ahead).isfinite().all(dim=1) & logits.isfinite().all(dim=1)
        moved = computable & (flat(ahead) != flat(paths.x)).any(dim=1)
        crossed = moved & (logits.argmax(dim=1) != paths.source)
        if not self._poster and crossed.any():
            rows = crossed.nonzero()[:, 0]
            ahead[rows], logits[rows] = self._crossing(paths.rows(rows), ahead[rows], logits[rows])
        way = 1.0 if self._poster else distance_of_logits(paths.logits, logits)
        there = paths._replace(
            x=ahead, move=ahead - paths.x, logits=logits, length=paths.length + way, steps=paths.steps + 1
        )
        on = moved & ~crossed & (there.steps < self._settings.max_steps)
        lost = paths.rows(~moved), there.rows(moved & ~crossed & ~on)
        never = Paths(*map(torch.cat, zip(*lost, strict=True)))
        return there.rows(on), Ended(there.rows(crossed), success=True), Ended(never, success=False)

    def _descending(self, paths: Paths, ahead: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Where to go from ``x``, and the logits there: shorter steps for paths whose gap to the target has not closed.

        The middle of the step may lie beyond all that has a gradient, or a step may overshoot, and go round in circles
        for ever. The step at ``x`` itself, if it is short enough, closes the gap.
        """
        gap = paths.gap(paths.logits)
        rows = (~(paths.gap(logits) < gap)).nonzero()[:, 0]  # not a number, too
        if not len(rows):
            return ahead, logits
        there = paths.rows(rows)
        step = self._step_at(there, there.x)
        for _ in range(_SHORTER):
            shorter = _inside(there, there.x - step)
            found = self.logits(shorter)
            closer = there.gap(found) < gap[rows]
            ahead[rows[closer]], logits[rows[closer]] = shorter[closer], found[closer]
            rows, there, step = rows[~closer], there.rows(~closer), step[~closer] / 2
            if not len(rows):
                break
        return ahead, logits

    def _step_at(self, paths: Paths, x: Tensor) -> Tensor:
        """The step at points (m, ...), one of each path."""
        every = torch.arange(len(x), device=x.device)
        return self._step(paths, x, every, every)

    def _step(self, paths: Paths, x: Tensor, some: Tensor, which: Tensor) -> Tensor:
        """The step at points (m, ...), whose lengths are bounded as the settings say; normalised as they are.

        Points ``x[some]`` are all that there are: path i is at ``x[some[which[i]]]``.
        """
        if self._settings.solver == "gram":
            probs, natural = self._by_gram(paths, x[some], paths.source[some], which)
        else:
            probs, natural = self._by_conjugate_gradients(paths, x)
        euclidean = torch.linalg.vector_norm(natural.direction, dim=1).to(probs)
        if self._poster:
            length = 1 / natural.squared_norm.sqrt()
        else:
            length = self._settings.step_length / fisher_rao_speed(probs, natural.change)
        length = torch.minimum(length, paths.longest / euclidean)
        return self._units.change((length[:, None] * natural.direction).to(x).reshape(x.shape))

    def _by_gram(self, paths: Paths, x: Tensor, source: Tensor, which: Tensor) -> tuple[Tensor, NaturalGradient]:
        """Predictions and natural gradients of paths at points ``x[which]``, which leave ``source[which]``."""
        leaf = x.clone().requires_grad_()
        logits = self._outputs(leaf)
        probs = _to_float64(logits.detach()).softmax(dim=1)[which]
        # S has no part in what is common to all logits: relative to the source, one backward pass less will do
        others = other_classes(source, logits.shape[1])
        relative = logits.gather(1, others) - logits.gather(1, source[:, None])
        rows = jacobian_rows(relative, leaf, self._units.std, range(others.shape[1]))
        others = others[which]
        natural = solve_by_gram(
            probs.gather(1, others), rows, paths.contrast.gather(1, others), paths.damping, which=which
        )
        return probs, natural._replace(change=torch.zeros_like(probs).scatter(1, others, natural.change))

    def _by_conjugate_gradients(self, paths: Paths, x: Tensor) -> tuple[Tensor, NaturalGradient]:
        """The same of paths at points ``x``, without their Jacobians."""
        leaf = x.clone().requires_grad_()
        logits = self._outputs(leaf)
        probs = _to_float64(logits.detach()).softmax(dim=1)
        cotangent = torch.zeros_like(logits, requires_grad=True)
        pulled = torch.zeros_like(leaf)
        if logits.requires_grad:  # they depend on the input
            (pulled,) = torch.autograd.grad(logits, leaf, cotangent, create_graph=True, materialize_grads=True)

        def push(rows: Tensor) -> Tensor:
            """``J p``: the derivative of ``Jᵀ u``, which is linear in ``u``, along ``p``."""
            if not pulled.requires_grad:
                return torch.zeros_like(logits)
            along = self._units.change(rows.to(leaf).reshape(leaf.shape))
            (pushed,) = torch.autograd.grad(pulled, cotangent, along, retain_graph=True, materialize_grads=True)
            return pushed

        def pull(changes: Tensor) -> Tensor:
            return input_gradient((changes.to(logits) * logits).sum(dim=1), leaf, self._units.std)

        return probs, solve_by_conjugate_gradients(probs, push, pull, paths.contrast, paths.damping)

    def _crossing(self, paths: Paths, ahead: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The crossing on the way from ``x`` to points outside the class: just beyond it, and the logits there."""
        shape = (-1, *(1,) * (ahead.ndim - 1))
        before, beyond = paths.x, ahead
        gap_before, gap_beyond = _lead(paths.logits, paths.source), _lead(logits, paths.source)
        rounding = torch.finfo(logits.dtype).eps * logits.abs().amax(dim=1)
        allowed = (_ROUNDINGS * rounding).clamp_min(_GAP)
        for trial in range(_TRIALS):
            # if it closes evenly, half of what is allowed beyond; every third time the middle, lest one end stays
            share = (gap_before + allowed / 2) / (gap_before - gap_beyond)
            share = share.nan_to_num(nan=0.5).clamp(0, 1) if trial % 3 < 2 else torch.full_like(share, 0.5)
            middle = before + share.to(ahead).view(shape) * (beyond - before)
            found = self.logits(middle)
            lead, outside = _lead(found, paths.source), found.argmax(dim=1) != paths.source
            logits = torch.where(outside[:, None], found, logits)
            gap_before, gap_beyond = torch.where(outside, gap_before, lead), torch.where(outside, lead, gap_beyond)
            outside = outside.view(shape)
            before, beyond = torch.where(outside, before, middle), torch.where(outside, middle, beyond)
            if (gap_beyond >= -allowed).all():
                break
        return beyond, logits


def other_classes(source: Tensor, num_classes: int) -> Tensor:
    """All classes but each sample's own, in order: (n, C − 1)."""
    others = torch.arange(num_classes - 1, device=source.device).expand(len(source), -1)
    return others + (others >= source[:, None])


def _lead(logits: Tensor, source: Tensor) -> Tensor:
    """By how much the logit of the source exceeds the largest other one, (n,)."""
    others = logits.gather(1, other_classes(source, logits.shape[1]))
    return logits.gather(1, source[:, None])[:, 0] - others.amax(dim=1)


def _inside(paths: Paths, x: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, paths.lower), paths.upper)


def flat(x: Tensor) -> Tensor:
    """Samples (n, ...), none of them, too, as (n, D)."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _to_float64(tensor: Tensor) -> Tensor:
    return tensor.to(float64_dtype(tensor))
