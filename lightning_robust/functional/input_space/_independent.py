"""Outputs that are independent of each other, so that ``A`` and its root are diagonal: labels, and measured numbers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_robust.functional._validation.arguments import check_kind
from lightning_robust.functional._validation.scales import ordinary
from lightning_robust.functional._validation.tensors import check_columns, check_finite
from lightning_robust.functional.input_space._likelihood import SATURATED_ABOVE, ColumnLikelihood
from lightning_robust.functional.input_space.float64 import float64_dtype, to_float64
from lightning_robust.functional.input_space.temperature import TemperatureFit


@dataclass(frozen=True)
class Independent(ColumnLikelihood):
    """Outputs ``(N, C)``, each with a target of its own: ``A = diag(w²)``."""

    def check_outputs(self, outputs: object, *, num_samples: int, inputs: Tensor | None = None) -> None:
        """See :meth:`Likelihood.check_outputs`."""
        check_columns(outputs, num_samples=num_samples, inputs=inputs)

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return targets ``(N, C)``, float64; a single output takes them of shape ``(N,)``, too."""
        check_kind("targets", targets, Tensor, "a tensor (N, C)")
        n, c = outputs.shape
        if targets.shape[:1] != (n,) or targets.numel() != n * c or targets.is_complex():
            raise ValueError(
                f"Expected argument `targets` of the shape of the outputs, ({n}, {c}), with likelihood {self.name!r},"
                f" but got {targets.dtype} of shape {tuple(targets.shape)}. {self._remedy(targets, c)}"
            )
        observed = targets.detach().to(outputs.device, float64_dtype(outputs)).reshape(n, c)
        check_finite(observed, "targets")
        self._check_values(observed)
        return observed

    @abstractmethod
    def _remedy(self, targets: Tensor, num_outputs: int) -> str:
        """What to do about targets of another shape."""

    @abstractmethod
    def _check_values(self, observed: Tensor) -> None:
        """Raise unless targets ``(N, C)`` are possible."""

    @abstractmethod
    def _root(self, z: Tensor) -> Tensor:
        """``w`` of each output, ``(N, C)``."""

    def information(self, z: Tensor, gram: Tensor) -> Tensor:
        """``w K wᵀ``, entry by entry."""
        root = self._root(z)
        return root[:, :, None] * gram * root[:, None, :]

    def information_times(self, z: Tensor, vectors: Tensor) -> Tensor:
        """``w² v``."""
        return self._root(z).square()[:, :, None] * vectors

    def transposed_root_times(self, z: Tensor, vectors: Tensor) -> Tensor:
        """``w v``."""
        return self._root(z)[:, :, None] * vectors

    def root_times(self, z: Tensor, signs: Tensor) -> Tensor:
        """``w u``."""
        return self._root(z) * signs

    def steepest(self, z: Tensor) -> Tensor:
        """The outputs that weigh most."""
        root = self._root(z)
        return torch.where(root == root.amax(dim=1, keepdim=True), 1.0, 0.0).to(z)

    def evidence_size(self, num_outputs: int) -> int:
        """A target for each output."""
        return 2 * num_outputs

    def apart(self, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`ColumnLikelihood.apart`."""
        targets, outputs = evidence.chunk(2, dim=1)
        return outputs, targets

    def slopes_l2(self, outputs: Tensor, gram: Tensor) -> Tensor:
        """``‖∇f_k‖₂ = √K_kk``."""
        return to_float64(gram).diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Bernoulli(Independent):
    """Targets are labels, 0 or 1, of which a sample has several; outputs are their logits: ``w² = σ(z)(1 − σ(z))``.

    A margin is the distance at which any label flips. It is 0 if any is wrong: a sample is classified correctly only if
    all its labels are (exact match).
    """

    name: ClassVar[str] = "bernoulli"
    loss: ClassVar[type[nn.Module]] = nn.BCEWithLogitsLoss

    def _remedy(self, targets: Tensor, num_outputs: int) -> str:
        if targets.ndim == 1 and not targets.is_floating_point():
            return (
                "A 0 or 1 for each label makes multi-hot rows; class indices go with likelihood 'categorical', the"
                " default."
            )
        return f"Each sample needs a 0 or 1 for each of the {num_outputs} labels."

    def _check_values(self, observed: Tensor) -> None:
        if ((observed == 0) | (observed == 1)).all():
            return
        low, high = float(observed.min()), float(observed.max())
        raise ValueError(
            f"Expected argument `targets` to be 0 or 1 with likelihood {self.name!r}, but got values from {low:.3g} to"
            f" {high:.3g}. Class indices go with likelihood 'categorical', numbers with 'gaussian'. With soft labels"
            " only curvature can be measured."
        )

    def _root(self, z: Tensor) -> Tensor:
        return (z.sigmoid() * (-z).sigmoid()).sqrt()

    def fit(self, outputs: Tensor, targets: Tensor) -> TemperatureFit:
        """Fit the temperature to all labels of all samples, each a choice between the logits 0 and z.

        The smoothing of separable data is half a pseudo-label. Labels whose logits have diverged do not count.
        """
        z = self.prepared(outputs)
        y = self.check(outputs, targets).to(z.device).long()
        labels = TemperatureFit.of(torch.stack([torch.zeros_like(z), z], dim=2).flatten(0, 1), y.flatten())
        return TemperatureFit(labels.temperature, labels.influences.view(z.shape).mean(dim=1))

    def saturated(self, outputs: Tensor) -> Tensor:
        """Samples with a probability beyond 0.999, or below 0.001, for every label."""
        return to_float64(outputs).abs().amin(dim=1).sigmoid().gt(SATURATED_ABOVE)

    def gaps(self, outputs: Tensor) -> Tensor:
        """``|z_k|``."""
        return outputs.abs()

    def gap_gradients(self, outputs: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """See :meth:`ColumnLikelihood.gap_gradients`."""
        signs = _signs(outputs).to(rows)
        for c in range(rows.shape[1]):
            yield (signs[:, c, None] * rows[:, c],)

    def closing(self, outputs: Tensor, before: Tensor, which: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`ColumnLikelihood.closing`."""
        return ((-_signs(before) * outputs).gather(1, which[:, None])[:, 0],)

    def margins(self, outputs: Tensor, slopes: Tensor, targets: Tensor) -> Tensor:
        """Smallest ``|z_k| / slope_k``; 0 unless every label is right, which one of logit 0 is not."""
        correct = ((outputs > 0) == (targets > 0)) & (outputs != 0)
        return torch.where(correct.all(dim=1), (outputs.abs() / slopes).amin(dim=1), 0.0)


@dataclass(frozen=True)
class Gaussian(Independent):
    """Targets are numbers ``(N, C)``, measured with errors of one standard deviation T: ``w = 1``.

    The temperature thus plays the role of σ, and λ at T = σ is ‖J‖²/σ². A margin is the distance at which any output
    moves by the tolerance. What a network has learnt does not enter: also a wrong prediction has such a distance.
    """

    name: ClassVar[str] = "gaussian"
    loss: ClassVar[type[nn.Module]] = nn.MSELoss
    needs_tolerance: ClassVar[bool] = True

    def _remedy(self, targets: Tensor, num_outputs: int) -> str:
        if targets.ndim == 1 and num_outputs > 1 and not targets.is_floating_point():
            return "Class indices go with likelihood 'categorical', the default."
        if targets.shape[:1] and targets.numel() == len(targets):
            return (
                "If one of the outputs is the prediction and the others its variance or quantiles, let the model return"
                " the prediction alone (in a callback: `probe_fn=lambda module, batch: Probe(lambda x: module(x)[:, 0],"
                " batch[0], batch[1], module=module)`)."
            )
        return "Let the model return one number per target."

    def _check_values(self, observed: Tensor) -> None:
        """Every finite number is possible."""

    def _root(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)

    def fit(self, outputs: Tensor, targets: Tensor) -> TemperatureFit:
        """Root mean square residual over samples and outputs.

        Samples that have diverged (their residual is more than a hundred times larger than that of nine of ten) do not
        count. Without any residual the temperature is 1.
        """
        z = self.prepared(outputs)
        squares = (z - self.check(outputs, targets).to(z)).square().mean(dim=1)
        counted = ordinary(squares.sqrt())
        influences, variance = torch.zeros_like(squares), squares[counted].mean()
        if not variance > 0:
            return TemperatureFit(z.new_ones(()), influences)
        # β = s^(−1/2) for the mean s of the squares
        share = len(squares) / counted.sum()
        influences[counted] = -0.5 * share * variance**-1.5 * (squares[counted] - variance)
        return TemperatureFit(variance.sqrt(), influences)

    def saturated(self, outputs: Tensor) -> None:
        """No confidence enters the information."""

    def gaps(self, outputs: Tensor) -> Tensor | None:
        """The tolerance."""
        return None if self.tolerance is None else torch.full_like(outputs, self.tolerance)

    def gap_gradients(self, outputs: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """An output can fall or rise by the tolerance."""
        for c in range(rows.shape[1]):
            yield rows[:, c], -rows[:, c]

    def closing(self, outputs: Tensor, before: Tensor, which: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`ColumnLikelihood.closing`."""
        moving = outputs.gather(1, which[:, None])[:, 0]
        return -moving, moving

    def margins(self, outputs: Tensor, slopes: Tensor, targets: Tensor) -> Tensor:
        """Smallest ``tolerance / slope_k``."""
        if self.tolerance is None:
            raise ValueError(self.without_tolerance(targets))
        return (self.tolerance / slopes).amin(dim=1)


def _signs(outputs: Tensor) -> Tensor:
    """1 where a label is predicted, else −1."""
    return torch.where(outputs > 0, 1.0, -1.0).to(outputs)
