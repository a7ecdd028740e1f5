"""The loop that traces Fisher–Rao paths: many paths advance together, and those that end make room for others.

Each step follows the natural gradient (:mod:`_natural_gradient`), bounded in length, by the midpoint rule, and is then
checked and cut at the class boundary (:mod:`_step_control`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional._validation.scales import computable
from lightning_robust.functional._validation.tensors import outputs_of
from lightning_robust.functional.fisher_rao._natural_gradient import natural_gradient_by_cg, natural_gradient_by_gram
from lightning_robust.functional.fisher_rao._state import Paths, flat, joined
from lightning_robust.functional.fisher_rao._step_control import approach_target, locate_crossing
from lightning_robust.functional.fisher_rao.geometry import distance_of_logits, speed_on_simplex
from lightning_robust.functional.fisher_rao.path_options import DAMPING, SHARE_OF_THE_WAY, PathOptions
from lightning_robust.functional.input_space.float64 import widened
from lightning_robust.functional.input_space.jacobian import input_gradient, leaf_and_logits
from lightning_robust.functional.input_space.missing_gradients import refuse_missing_gradients
from lightning_robust.functional.input_space.units import Units


class Tracer:
    """Follows the natural gradient of the gap to a target through a network, downwards."""

    def __init__(self, model: SampleModel, units: Units, options: PathOptions) -> None:
        self._model = model
        self._units = units
        self._options = options
        self._unit_steps = options.mode == "unit_steps"
        self._examined: set[int] = set()  # samples without gradients

    def trace(self, begin: Callable[[Tensor], Paths], num_paths: int, *, at_once: int) -> Iterator[tuple[Paths, bool]]:
        """Trace paths to their ends, at most ``at_once`` together, and yield them in the order in which they end.

        ``begin`` maps indices of paths (m,) to these paths at their starts. With them comes whether they left their
        class.
        """
        if not num_paths:
            return
        going = self._prepared(begin(torch.arange(min(at_once, num_paths))))
        begun = len(going.x)
        while len(going.x):
            going, *ended = self._advance(going)
            yield from ((paths, has_left) for paths, has_left in zip(ended, (True, False), strict=True) if len(paths.x))
            numbers = torch.arange(begun, min(begun + at_once - len(going.x), num_paths))
            if len(numbers):
                begun += len(numbers)
                going = joined(going, self._prepared(begin(numbers)))

    def _prepared(self, paths: Paths) -> Paths:
        """Set damping, step bound and first move, which depend on the starting point."""
        options = self._options
        leaf, logits = leaf_and_logits(self._model.on(paths.sample), paths.x, check=None)
        gap = paths.gap(logits)
        slope = widened(input_gradient(gap, leaf, self._units.std)).square().sum(dim=1)
        self._refuse_missing_gradients(paths.rows((slope == 0).nonzero()[:, 0]))
        if options.damping is None:
            damping = torch.where(slope > 0, slope * (DAMPING / 4), 1)  # no path leads away from a flat start
        else:
            damping = torch.full_like(slope, options.damping)
        if options.max_euclidean_step is None and not self._unit_steps:
            longest = SHARE_OF_THE_WAY * (widened(gap.detach()).abs() + 1) / slope.sqrt()
        else:
            longest = torch.full_like(slope, options.max_euclidean_step or torch.inf)
        paths = paths._replace(damping=damping, longest=longest)
        # paths of the same sample start at the same point, which is linearised once
        return paths if self._unit_steps else paths._replace(move=-self._step(paths, paths.x, *paths.samples))

    def _refuse_missing_gradients(self, flat: Paths) -> None:
        """Examine the samples of paths whose gradients at the start are exactly zero, each sample once."""
        new = [n for n, sample in enumerate(flat.sample.tolist()) if sample not in self._examined]
        if new:
            refuse_missing_gradients(self._model.on(flat.sample[new]), flat.x[new])
            self._examined.update(flat.sample[new].tolist())

    def _advance(self, paths: Paths) -> tuple[Paths, Paths, Paths]:
        """Step once; return paths that go on, paths that left their class, and paths that end without leaving it."""
        # the midpoint rule stays of second order with a midpoint extrapolated from the previous step
        middle = paths.x if self._unit_steps else paths.within_bounds(paths.x + paths.move / 2)
        ahead = paths.within_bounds(paths.x - self._step_at(paths, middle))
        logits = self._logits_at(paths, ahead)
        if not self._unit_steps:
            ahead, logits = approach_target(paths, ahead, logits, step_at=self._step_at, logits_at=self._logits_at)
        able = flat(ahead).isfinite().all(dim=1) & computable(logits, paths.logits)
        moved = able & (flat(ahead) != flat(paths.x)).any(dim=1)
        crossed = moved & (logits.argmax(dim=1) != paths.source)
        if not self._unit_steps and crossed.any():
            rows = crossed.nonzero()[:, 0]
            ahead[rows], logits[rows] = locate_crossing(
                paths.rows(rows), ahead[rows], logits[rows], logits_at=self._logits_at
            )
        way = 1.0 if self._unit_steps else distance_of_logits(paths.logits, logits)
        there = paths._replace(
            x=ahead, move=ahead - paths.x, logits=logits, length=paths.length + way, steps=paths.steps + 1
        )
        on = moved & ~crossed & (there.steps < self._options.max_steps)
        stuck = joined(paths.rows(~moved), there.rows(moved & ~crossed & ~on))
        return there.rows(on), there.rows(crossed), stuck

    def _logits_at(self, paths: Paths, x: Tensor) -> Tensor:
        """Logits of paths at points (m, ...), without a graph. They need not be finite: a path ends there."""
        with torch.no_grad():
            outputs = outputs_of(self._model.on(paths.sample), x, check=None)
        return outputs.contiguous()  # an expanded one cannot be written to

    def _step_at(self, paths: Paths, x: Tensor) -> Tensor:
        """Steps of paths at points (m, ...) of their own."""
        every = torch.arange(len(x), device=x.device)
        return self._step(paths, x, every, every)

    def _step(self, paths: Paths, x: Tensor, some: Tensor, which: Tensor) -> Tensor:
        """Steps at points (m, ...), normalised like these, of bounded length.

        The distinct points are ``x[some]``, and path i is at ``x[some[which[i]]]``.
        """
        if self._options.solver == "gram":
            probs, natural = natural_gradient_by_gram(self._model, self._units, paths, x, some=some, which=which)
        else:
            probs, natural = natural_gradient_by_cg(self._model, self._units, paths, x)
        euclidean = torch.linalg.vector_norm(natural.direction, dim=1).to(probs)
        if self._unit_steps:
            length = 1 / natural.squared_norm.sqrt()
        else:
            length = self._options.step_length / speed_on_simplex(probs, natural.change)
        length = torch.minimum(length, paths.longest / euclidean)
        return self._units.change((length[:, None] * natural.direction).to(x).reshape(x.shape))
