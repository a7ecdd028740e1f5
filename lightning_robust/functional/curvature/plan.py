"""Which estimator measures each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_robust.functional._validation.arguments import check_choice

Estimator = Literal["auto", "hutchinson", "gauss_newton"]


@dataclass(frozen=True)
class Plan:
    """Which layers Gauss–Newton probes measure, and which Hutchinson probes.

    Attributes:
        gauss_newton: Layers with a Gauss–Newton part: all or none.
        hutchinson: Layers with a Hutchinson part: of the residual ``R`` if there is a Gauss–Newton part, else of the
            whole Hessian.
        is_hessian: Whether the parts add up to the Hessian in every layer.
    """

    gauss_newton: tuple[str, ...]
    hutchinson: tuple[str, ...]
    is_hessian: bool = True

    def probes(self, start: int, stop: int) -> tuple[range, range]:
        """Numbers ``start`` to ``stop`` of both kinds of probes; an empty range for a kind that no layer needs."""
        probes, nothing = range(start, stop), range(start, start)
        return probes if self.gauss_newton else nothing, probes if self.hutchinson else nothing

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all layers."""
        return self.gauss_newton or self.hutchinson


def check_estimator(estimator: Estimator) -> Estimator:
    """Return ``estimator``, or raise a ``ValueError`` if it is unknown."""
    check_choice("estimator", estimator, get_args(Estimator))
    return estimator
