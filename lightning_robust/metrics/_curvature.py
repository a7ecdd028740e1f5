"""Base of the curvature metrics: one measurement whose sums add up over batches and processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_robust.functional._validation.arguments import check_boolean, check_positive_integer
from lightning_robust.functional.curvature.plan import Estimator, check_estimator
from lightning_robust.functional.curvature.sums import NUM_BLOCKS, CurvatureSums
from lightning_robust.functional.curvature.weight_curvature_index import weight_norms
from lightning_robust.metrics.base import ProbeMetric, joined
from lightning_robust.metrics.keys import parameter_names_in_keys
from lightning_robust.probe import Attack, Probe


class CurvatureMetric(ProbeMetric):
    """Base of the curvature metrics.

    Parameters to which no gradient leads from the outputs of any sample, on any process, are left out. Those that some
    samples reach are measured. Samples that the loss ignores add nothing, also where they are all of a batch or of a
    process.

    State: ``B + 2 L + 2 M B L`` numbers for M probes, B = 16 blocks of samples and L parameter tensors. The names of
    the tensors are stored as well, as code points and as they appear in keys, because a process without samples does
    not know them.
    """

    higher_is_better = False
    best_untrained = True
    depends_on_units = False  # unless the inputs are attacked
    rows: list[Tensor]
    text: list[Tensor]

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
        self._left_out: tuple[str, ...] = ()  # the first time that any were
        self._is_forward = False  # or the model is a method or function: whoever chose it knows what it leaves out

    def _add(self, probe: Probe) -> None:
        sums = probe.curvature(estimator=self.estimator, num_probes=self.num_probes, attack=self.attack)
        self._is_forward = isinstance(probe.model, nn.Module)
        known = weight_norms(probe.model, module=probe.module)
        norms = torch.tensor([float(known.get(name, torch.nan)) for name in sums.names], dtype=torch.float64)
        parts = [part if len(part) else part.new_zeros(self.num_probes, *part.shape[1:]) for part in sums.parts]
        unreached = set(sums.unreached())
        reached = torch.tensor([name not in unreached for name in sums.names], dtype=torch.float64)
        row = torch.cat([norms, sums.weights, *(part.flatten() for part in parts), reached]).to(self.device)
        text = row.new_tensor([ord(char) for char in "\n".join(parameter_names_in_keys(sums.names)) + "\0"])
        if self.rows and not torch.equal(text, self.text[0]):
            raise ValueError("Expected the trained parameters of the model to be those of earlier updates.")
        if self.rows:
            row[len(norms) :] += self.rows[0][len(norms) :]
        self.rows, self.text = [row], [text]

    def _key(self, key: str) -> str:
        """The key itself for the Hessian; a key of its own for the Gauss–Newton matrix."""
        return f"{key}_gauss_newton" if self.estimator == "gauss_newton" else key

    def _gathered(self) -> tuple[CurvatureSums, Tensor] | None:
        """Sums over the samples of all processes, and Frobenius norms (L,) of the weights; None without samples.

        Only tensors to which a gradient leads are among them. Norms are NaN for tensors with fewer than two dimensions.
        Raises a ``ValueError`` if the loss ignores all samples.
        """
        text = "".join(chr(int(point)) for point in joined(self.text).tolist())
        if not text:
            return None
        names = tuple(text.split("\0", 1)[0].split("\n"))
        shape = (self.num_probes, NUM_BLOCKS, len(names))
        sizes = [len(names), NUM_BLOCKS, math.prod(shape), math.prod(shape), len(names)]
        rows = joined(self.rows).view(-1, sum(sizes))
        norms, weights, *parts, counts = torch.split(rows, sizes, dim=1)
        counted = counts.sum(dim=0) > 0
        reached = frozenset(name for name, is_reached in zip(names, counted.tolist(), strict=True) if is_reached)
        summed = tuple(part.sum(dim=0).view(shape) for part in parts)
        sums = CurvatureSums(names, summed, weights.sum(dim=0), reached=reached)
        sums.check_weights()
        self._left_out = self._left_out or (sums.unreached() if self._is_forward else ())
        return sums.where_reached(), norms[0][counted]

    def _about_left_out(self, key: str) -> dict[str, str]:
        """A caveat about parameters that are left out, under the key that the first of them would have."""
        if not self._left_out:
            return {}
        first, *others = self._left_out
        too = f", nor {'is another' if len(others) == 1 else f'are {len(others)} others'}" if others else ""
        return {
            f"{key}_per_layer/{first}": f"is not measured{too}: no gradient leads from the outputs to it, so `{key}`"
            " leaves it out. In eval mode the forward pass does not use it, or takes numbers that were computed from it"
            " before (a merged adapter, a cache). To count it, compute with it in every forward pass; if it is not"
            " meant to count, nothing is wrong."
        }


def stderr_of_probes(key: str, stderr: Tensor) -> dict[str, Tensor]:
    """Standard error that more probes would reduce. A single probe leaves it unknown, and it is left out."""
    return {} if stderr.isnan() else {f"{key}_stderr_probes": stderr}
