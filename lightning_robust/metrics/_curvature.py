"""Base of the curvature metrics: one measurement whose sums add up over batches and processes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_robust.functional._validation.arguments import check_boolean, check_positive_integer
from lightning_robust.functional.curvature.plan import Estimator, check_estimator
from lightning_robust.functional.curvature.sums import NUM_BLOCKS, CurvatureSums
from lightning_robust.functional.curvature.weight_curvature_index import weight_norms
from lightning_robust.metrics.base import ProbeMetric, code_points, text_of
from lightning_robust.probe import Attack, Probe


class Curvature(NamedTuple):
    """Curvature of all samples of all processes.

    Attributes:
        sums: Traces as sums over samples.
        norms: ``(L,)``, Frobenius norms of the weights, NaN for tensors with fewer than two dimensions.
    """

    sums: CurvatureSums
    norms: Tensor


class CurvatureMetric(ProbeMetric):
    """Base of the curvature metrics.

    State: ``B + L + 2 M B L`` numbers for M probes, B = 16 blocks of samples and L parameter tensors, and the names of
    the tensors, because a process without samples does not know them.

    Args:
        estimator: See :func:`~lightning_robust.functional.hessian_trace`.
        num_probes: Probes per sample.
        per_layer: Whether to return the value of each layer, too.

    Raises:
        ValueError: If ``estimator`` is unknown, ``num_probes`` is not positive, or ``per_layer`` is not a boolean.
    """

    higher_is_better = False
    best_untrained = True
    rows: list[Tensor] | Tensor
    text: list[Tensor] | Tensor

    def __init__(self, estimator: Estimator = "auto", num_probes: int = 2, per_layer: bool = True) -> None:
        super().__init__()
        self.estimator = check_estimator(estimator)
        check_positive_integer("num_probes", num_probes)
        self.num_probes = num_probes
        self.per_layer = check_boolean("per_layer", per_layer)
        self.attack: Attack | None = None
        self.add_configuration(estimator, num_probes)
        self.add_float64_rows("rows")
        self.add_float64_rows("text")

    def _add(self, probe: Probe) -> None:
        sums = probe.curvature(estimator=self.estimator, num_probes=self.num_probes, attack=self.attack)
        known = weight_norms(probe.model, module=probe.module)
        norms = torch.tensor([float(known.get(name, torch.nan)) for name in sums.names], dtype=torch.float64)
        assert isinstance(self.rows, list)
        assert isinstance(self.text, list)
        parts = [part if len(part) else part.new_zeros(self.num_probes, *part.shape[1:]) for part in sums.parts]
        row = torch.cat([norms, sums.weights, *(part.flatten() for part in parts)]).to(self.device)
        text = code_points("\n".join(sums.names) + "\0", like=row)
        if self.rows and not torch.equal(text, self.text[0]):
            raise ValueError("Expected the trained parameters of the model to be those of earlier updates.")
        if self.rows:
            row[len(norms) :] += self.rows[0][len(norms) :]
        self.rows, self.text = [row], [text]

    def _key(self, key: str) -> str:
        """The key itself for the Hessian; a key of its own for the Gauss–Newton matrix."""
        return f"{key}_gauss_newton" if self.estimator == "gauss_newton" else key

    def _gathered(self) -> Curvature | None:
        """Curvature of all processes; None if no process has seen a sample."""
        text = text_of(dim_zero_cat(self.text)) if len(self.text) else ""
        if not text:
            return None
        names = tuple(text.split("\0", 1)[0].split("\n"))
        num_layers = len(names)
        shape = (self.num_probes, NUM_BLOCKS, num_layers)
        sizes = [num_layers, NUM_BLOCKS, math.prod(shape), math.prod(shape)]
        rows = dim_zero_cat(self.rows).view(-1, sum(sizes))
        norms, weights, *parts = torch.split(rows, sizes, dim=1)
        sums = CurvatureSums(names, tuple(part.sum(dim=0).view(shape) for part in parts), weights.sum(dim=0))
        return Curvature(sums, norms[0])


def stderr_of_probes(key: str, stderr: Tensor) -> dict[str, Tensor]:
    """The standard error that more probes would reduce; left out if it is unknown, after a single probe."""
    return {} if stderr.isnan() else {f"{key}_stderr_probes": stderr}
