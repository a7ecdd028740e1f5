"""One class of several per sample, from logits ``(N, C)``: ``A = diag(p) − p pᵀ`` with ``p = softmax(z)``.

Its root has the rows ``F_c = √p_c (e_c − p)ᵀ``. A margin is the distance to the nearest other class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_robust.functional._validation.scales import masked_classes
from lightning_robust.functional._validation.tensors import check_logits, check_targets
from lightning_robust.functional.input_space._likelihood import SATURATED_ABOVE, ColumnLikelihood
from lightning_robust.functional.input_space.float64 import to_float64
from lightning_robust.functional.input_space.softmax_root import softmax_root
from lightning_robust.functional.input_space.temperature import TemperatureFit, with_masks


@dataclass(frozen=True)
class Categorical(ColumnLikelihood):
    """Targets are class indices ``(N,)``. Logits of −∞, or far below all others, mask classes."""

    name: ClassVar[str] = "categorical"
    loss: ClassVar[type[nn.Module]] = nn.CrossEntropyLoss
    fewest_outputs: ClassVar[int] = 2

    def check_outputs(self, outputs: object, *, num_samples: int, inputs: Tensor | None = None) -> None:
        """See :meth:`Likelihood.check_outputs`."""
        check_logits(outputs, num_samples=num_samples, inputs=inputs)

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return class indices ``(N,)``, int64."""
        return check_targets(targets, num_samples=len(outputs), num_classes=outputs.shape[1])

    def prepared(self, outputs: Tensor) -> Tensor:
        """Logits in float64, −∞ for classes that are left out."""
        return with_masks(outputs)

    def information(self, z: Tensor, gram: Tensor) -> Tensor:
        """See :meth:`ColumnLikelihood.information`."""
        probs = z.softmax(dim=1)
        identity = torch.eye(z.shape[1], dtype=probs.dtype, device=probs.device)
        factor = probs.sqrt()[:, :, None] * (identity - probs[:, None, :])
        return factor @ gram @ factor.mT

    def information_times(self, z: Tensor, vectors: Tensor) -> Tensor:
        """``p v − p (pᵀ v)``."""
        probs = z.softmax(dim=1)[:, :, None]
        # what all classes have in common has no information, but would drown the rest where one has all probability
        weighted = probs * (vectors - vectors.take_along_dim(_predicted(z)[..., None], dim=1))
        return weighted - probs * weighted.sum(dim=1, keepdim=True)

    def transposed_root_times(self, z: Tensor, vectors: Tensor) -> Tensor:
        """``√p v − p (√pᵀ v)``."""
        probs = z.softmax(dim=1)[:, :, None]
        weighted = probs.sqrt() * vectors
        return weighted - probs * weighted.sum(dim=1, keepdim=True)

    def root_times(self, z: Tensor, signs: Tensor) -> Tensor:
        """See :func:`softmax_root`."""
        return softmax_root(z, signs[None])[0]

    def steepest(self, z: Tensor) -> Tensor:
        """``e_ŷ − e_k`` for the most probable class ŷ and the next."""
        top = z.topk(2, dim=1).indices
        return torch.zeros_like(z).scatter(1, top, z.new_tensor([[1.0, -1.0]]).expand(len(z), -1))

    def evidence_size(self, num_outputs: int) -> int:
        """A class index beside the logits."""
        return 1 + num_outputs

    def apart(self, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`ColumnLikelihood.apart`."""
        return evidence[:, 1:], evidence[:, 0].long()

    def fit(self, outputs: Tensor, targets: Tensor) -> TemperatureFit:
        """See :func:`~lightning_robust.functional.fit_temperature`."""
        z = self.prepared(outputs)
        return TemperatureFit.of(z, self.check(outputs, targets).to(z.device))

    def saturated(self, outputs: Tensor) -> Tensor:
        """Predictions whose probability is beyond 0.999."""
        return to_float64(outputs).softmax(dim=1).amax(dim=1).gt(SATURATED_ABOVE)

    def gaps(self, outputs: Tensor) -> Tensor:
        """``z_ŷ − z_k`` for the predicted class ŷ: 0 for itself, infinity for classes masked by −∞."""
        return outputs.gather(1, _predicted(outputs)) - outputs

    def gap_gradients(self, outputs: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """See :meth:`ColumnLikelihood.gap_gradients`."""
        top = rows.take_along_dim(_predicted(outputs)[..., None], dim=1)[:, 0]
        for c in range(rows.shape[1]):
            yield (top - rows[:, c],)

    def slopes_l2(self, outputs: Tensor, gram: Tensor) -> Tensor:
        """``‖∇(z_ŷ − z_k)‖₂ = √(K_ŷŷ − 2 K_ŷk + K_kk)``."""
        wide = to_float64(gram)
        y = _predicted(outputs).to(wide.device)
        squared = wide.diagonal(dim1=1, dim2=2)
        distances = squared.gather(1, y) - 2 * wide.take_along_dim(y[..., None], dim=1)[:, 0] + squared
        return distances.clamp_min(0).sqrt()

    def closing(self, outputs: Tensor, before: Tensor, which: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`ColumnLikelihood.closing`."""
        return ((outputs.gather(1, which[:, None]) - outputs.gather(1, _predicted(before)))[:, 0],)

    def distances(self, outputs: Tensor, slopes: Tensor) -> Tensor:
        """See :meth:`ColumnLikelihood.distances`. No boundary leads to the predicted class, or to a masked one."""
        ratios = (self.gaps(outputs) / slopes).scatter(1, _predicted(outputs), torch.inf)
        return ratios.nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(masked_classes(outputs), torch.inf)

    def margins(self, outputs: Tensor, slopes: Tensor, targets: Tensor) -> Tensor:
        """Smallest (z_y − z_k)/slope_k over k ≠ y; 0 unless all gaps are positive."""
        gaps = outputs.gather(1, targets[:, None]) - outputs
        others = torch.ones_like(outputs, dtype=torch.bool).scatter(1, targets[:, None], value=False)
        correct = (gaps > 0).logical_or(~others).all(dim=1)
        ratios = torch.where(others & ~masked_classes(outputs), gaps / slopes, torch.inf)
        return torch.where(correct, ratios.amin(dim=1), 0.0)


def _predicted(outputs: Tensor) -> Tensor:
    """Class of the largest logit, ``(N, 1)``."""
    return outputs.argmax(dim=1, keepdim=True)


CATEGORICAL = Categorical()
