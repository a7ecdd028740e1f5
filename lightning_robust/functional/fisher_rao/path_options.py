"""Options of Fisher–Rao paths: their defaults and checks."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

from lightning_robust.functional._validation.arguments import (
    as_number,
    check_choice,
    check_positive_integer,
    expected_but_got,
)

Solver = Literal["gram", "cg"]
Mode = Literal["path", "unit_steps"]
# Default damping, as a share of the largest eigenvalue that the gradient at the start would have at even odds, ‖g‖²/4.
DAMPING = 1e-2
# Default Euclidean bound of a step, as a share of the way to the boundary of the network linearised at the start, if
# that boundary were one nat further away.
SHARE_OF_THE_WAY = 0.25
# With a ResNet-20 and small networks on CIFAR-10, paths take 3 to 8 steps of this length, and their margins are within
# 1 % in the median of those of steps eight times shorter. 0.2 would take up to half as many steps again for no gain.
_STEP_LENGTH = 0.4


class PathOptions(NamedTuple):
    """Options of :func:`~lightning_robust.functional.trace_fisher_rao_paths` that say how to trace a path."""

    damping: float | None
    step_length: float
    max_euclidean_step: float | None
    max_steps: int
    solver: Solver
    mode: Mode


def check_path_options(
    *,
    damping: float | None,
    step_length: float | None,
    max_euclidean_step: float | None,
    max_steps: int,
    solver: Solver,
    mode: Mode = "path",
) -> PathOptions:
    """Return the options with defaults filled in, or raise a ``ValueError``."""
    lengths = {"damping": damping, "step_length": step_length, "max_euclidean_step": max_euclidean_step}
    for name, value in lengths.items():
        if value is not None and not 0 < as_number(value) < math.inf:
            raise ValueError(expected_but_got(name, "a positive number or None", value))
    check_positive_integer("max_steps", max_steps)
    check_choice("solver", solver, get_args(Solver))
    check_choice("mode", mode, get_args(Mode))
    if mode == "unit_steps" and step_length is not None:
        raise ValueError(
            expected_but_got("step_length", "None in mode 'unit_steps', whose steps have length 1", step_length)
        )
    return PathOptions(
        damping=None if damping is None else as_number(damping),
        step_length=_STEP_LENGTH if step_length is None else as_number(step_length),
        max_euclidean_step=None if max_euclidean_step is None else as_number(max_euclidean_step),
        max_steps=max_steps,
        solver=solver,
        mode=mode,
    )
