"""How the outputs of a network and the targets of its samples are read together, by likelihood and loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.outputs import (
    COUNTED,
    IGNORED,
    as_classifier,
    as_columns,
    as_dense_classes,
    as_one_logit,
    as_positions,
    as_two_classes,
)
from lightning_robust.functional._validation.tensors import check_targets
from lightning_robust.functional.curvature.losses import LossFn, SampleLoss
from lightning_robust.functional.input_space.likelihoods import Likelihood, check_positions


class Reading(NamedTuple):
    """A network, and targets of N samples."""

    model: Callable[..., Tensor]
    targets: Tensor
    likelihood: Likelihood
    loss_fn: LossFn | None

    @property
    def has_classes(self) -> bool:
        """Whether a sample has one class of several."""
        return self.likelihood.name == "categorical"

    @property
    def is_binary(self) -> bool:
        """Whether this is a binary classifier with one logit: its loss is BCE with logits, with one target each."""
        loss = SampleLoss(self.loss_fn)
        return self.has_classes and loss.is_binary_cross_entropy and self.targets.numel() == len(self.targets)

    @property
    def network(self) -> Callable[..., Tensor]:
        """The model, with one logit per class, or with outputs ``(N, C)`` that have a target each.

        One with logits ``(N, T, V)`` takes :attr:`own_extras`, too.
        """
        if self.likelihood.has_positions:
            return as_positions(self.model)
        if not self.has_classes:
            return as_columns(self.model, self.targets)
        return as_two_classes(self.model) if self.is_binary else as_classifier(self.model, self.targets)

    @property
    def own_extras(self) -> dict[str, Tensor]:
        """What the network takes beside the extras of the samples: which positions count, ``(N, T)``, if any may not.

        Raises a ``ValueError`` unless the targets are words at positions.
        """
        return {COUNTED: self._words != IGNORED} if self.likelihood.has_positions else {}

    @property
    def _words(self) -> Tensor:
        """Targets ``(N, T)`` with one number for all positions that do not count, whichever the loss has for them."""
        check_positions(self.targets, len(self.targets))
        other = SampleLoss(self.loss_fn).ignore_index
        return self.targets if other is None else self.targets.masked_fill(self.targets == other, IGNORED)

    @property
    def labels(self) -> Tensor:
        """Class indices ``(N,)``; raises a ``ValueError`` if the targets are no classes."""
        if not self.has_classes:
            others = "" if self.likelihood.has_positions else ", `linearized_accuracy`"
            raise ValueError(
                "Expected likelihood 'categorical', because attacks and paths lead to other classes, but got"
                f" {self.likelihood.name!r}. Leave this metric out; `fisher_spectral_norm`{others} and the metrics of"
                " curvature can be measured."
            )
        targets = full_precision(self.targets)
        if not self.is_binary:
            return check_targets(targets, num_samples=len(targets))
        if not ((targets == 0) | (targets == 1)).all():
            low, high = float(targets.min()), float(targets.max())
            raise ValueError(
                "Expected argument `targets` of a binary classifier to be 0 or 1, but got values from"
                f" {low:.3g} to {high:.3g}. With soft targets only curvature can be measured."
            )
        return targets.reshape(len(targets)).long()

    def beside(self, outputs: Tensor) -> Tensor:
        """The targets of outputs ``(N, ...)``: class indices ``(N,)``, or one number for each, ``(N, C)``.

        Of logits ``(N, T, V)`` they are words ``(N, T)``.
        """
        if self.likelihood.has_positions:
            return self.likelihood.check(outputs, self._words)
        return self.labels if self.has_classes else self.likelihood.check(outputs, full_precision(self.targets))

    def check_margins(self) -> None:
        """Raise a ``ValueError`` if there are no margins, or they need a tolerance and nobody has named one."""
        self.likelihood.check_margins(self.targets)

    def of_loss(self) -> tuple[Callable[..., Tensor], Tensor, LossFn | None]:
        """The model, targets and loss whose curvature is meant, in shapes that belong together."""
        if self.is_binary:
            return as_one_logit(self.model), full_precision(self.targets).float().flatten(), self.loss_fn
        if self.has_classes:
            return self.network, self.targets, self.loss_fn
        loss = SampleLoss(self.loss_fn)
        own = self.likelihood.loss() if self.loss_fn is None else self.loss_fn
        if self.likelihood.has_positions and loss.takes_classes:
            ignored = IGNORED if loss.ignore_index is None else loss.ignore_index
            words = self._words.masked_fill(self._words == IGNORED, ignored)
            return as_dense_classes(self.model, words.shape[1]), words, own
        if self.loss_fn is not None and (loss.is_custom or loss.takes_classes):
            return self.model, self.targets, self.loss_fn
        columns = full_precision(self.targets).reshape(len(self.targets), -1)
        columns = columns if columns.is_floating_point() else columns.float()
        return self.network, columns, own
