"""Gauss–Newton roots of losses: add the root of a new loss here, and its class to ``ROOTS``.

The Hessian ``A`` of a sample's loss with respect to its outputs enters the Gauss–Newton matrix ``G = Jᵀ A J`` through a
root ``A = F Fᵀ``: with random signs ``u``, ``‖Jᵀ F u‖²`` has the mean ``tr G``. A loss without a root here is measured
by second derivatives alone (Hutchinson). Each root is tested against autograd in
``tests/functional/curvature/test_losses.py``.
That of the softmax stands in ``functional/input_space/softmax_root.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.functional._validation.scales import masked_classes
from lightning_robust.functional.input_space.softmax_root import softmax_root


class GaussNewtonRoot(ABC):
    """``F`` with ``F Fᵀ = A``, the Hessian of each sample's loss with respect to its outputs.

    ``loss`` is of the class under which ``ROOTS`` lists the root; ``sample_losses`` maps outputs ``(N, ...)`` and
    targets to the loss of each sample, ``(N,)``: with ``averages`` the mean over its positions, else their sum.
    """

    def __init__(
        self, loss: nn.Module, sample_losses: Callable[[Tensor, Tensor], Tensor], *, averages: bool = False
    ) -> None:
        self._loss = loss
        self._sample_losses = sample_losses
        self._averages = averages

    @property
    def needs_targets(self) -> bool:
        """Whether the root depends on the targets."""
        return True

    def num_columns(self, outputs: Tensor) -> int:
        """How many columns of the root can differ from zero."""
        return outputs[0].numel()

    def num_signs(self, outputs: Tensor) -> list[int]:
        """How many of the first signs of each sample can have an effect."""
        return [outputs[0].numel()] * len(outputs)

    @abstractmethod
    def times(self, signs: Tensor, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Compute ``F u`` of each sample, ``(M, N, K)``, in the dtype of the outputs.

        ``signs`` are the ``u`` of M probes, ``(M, N, K)`` for outputs of K elements each; ``targets`` may be None
        unless :attr:`needs_targets`.
        """


class SoftmaxRoot(GaussNewtonRoot):
    """Root of cross-entropy with class weights, label smoothing and ignored classes, position by position.

    Logits are ``(N, C)``, or ``(N, C, ...)`` with a class per position.
    """

    @property
    def needs_targets(self) -> bool:
        """Only class weights make the root depend on the targets."""
        return self._loss.weight is not None

    def num_columns(self, outputs: Tensor) -> int:
        """One less than classes that are not masked; at every position, one less than classes."""
        if outputs.ndim > 2:
            return outputs[0].numel() - outputs[0, 0].numel()
        return max(2, *self.num_signs(outputs)) - 1

    def num_signs(self, outputs: Tensor) -> list[int]:
        """One for each class that is not masked, because the least probable classes come last."""
        if outputs.ndim > 2:
            return super().num_signs(outputs)
        counts: list[int] = (~masked_classes(outputs)).sum(dim=1).tolist()
        return counts

    def times(self, signs: Tensor, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """See the base class."""
        if outputs.ndim == 2:
            scale = self._scale(outputs, targets).sqrt()[:, None]
            return (scale * softmax_root(outputs, signs)).to(outputs)
        result = torch.empty(signs.shape, dtype=outputs.dtype, device=outputs.device)
        for rows in torch.split(torch.arange(len(outputs)), max(1, _ELEMENTS // signs[:, 0].numel())):
            part = self._at_positions(signs[:, rows], outputs[rows], None if targets is None else targets[rows])
            result[:, rows] = part.to(outputs)
        return result

    def _at_positions(self, signs: Tensor, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """``F u``, ``(M, n, K)``, of n samples: for the softmax, each of their T positions is a sample of its own."""
        (n, c), t = outputs.shape[:2], outputs[0, 0].numel()
        if targets is not None:
            targets = targets.flatten() if targets.ndim < outputs.ndim else _rows_of_classes(targets)
        logits = _rows_of_classes(outputs)  # (n T, C)
        scale = (self._scale(logits, targets) / (t if self._averages else 1)).sqrt()[:, None]
        root = scale * softmax_root(logits, signs.reshape(-1, n, c, t).transpose(2, 3).flatten(1, 2))
        return root.reshape(-1, n, t, c).transpose(2, 3).flatten(2)

    def _scale(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Factor of ``diag(p) − p pᵀ`` in each sample's Hessian, ``(N,)``: the total weight of its soft target."""
        loss = self._loss
        assert isinstance(loss, nn.CrossEntropyLoss)
        c = outputs.shape[1]
        weight = outputs.new_ones(c, dtype=torch.float64) if loss.weight is None else loss.weight.to(outputs).double()
        if targets is None:
            return weight.new_ones(len(outputs))
        if targets.is_floating_point():
            soft, counted = targets.double(), None
        else:
            counted = targets != loss.ignore_index
            soft = F.one_hot(targets.where(counted, 0), c).double()
        soft = (1 - loss.label_smoothing) * soft + loss.label_smoothing / c
        totals: Tensor = (soft * weight).sum(dim=1)
        return totals if counted is None else totals * counted


class ElementwiseRoot(GaussNewtonRoot):
    """Root of a loss that is a sum of convex functions of single outputs: the root of its second derivatives."""

    def times(self, signs: Tensor, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """See the base class."""
        assert targets is not None
        leaf = outputs.detach().double().requires_grad_()
        losses = self._sample_losses(leaf, targets.to(leaf))
        (slope,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
        (diagonal,) = torch.autograd.grad(slope.sum(), leaf, materialize_grads=True)
        return (diagonal.clamp_min(0).sqrt().reshape(len(outputs), -1) * signs).to(outputs)


_ELEMENTS = 2**16  # of dense logits, for all probes, whose root is taken together in float64


ROOTS: dict[type[nn.Module], type[GaussNewtonRoot]] = {
    nn.CrossEntropyLoss: SoftmaxRoot,
    nn.MSELoss: ElementwiseRoot,
    nn.BCEWithLogitsLoss: ElementwiseRoot,
}


def _rows_of_classes(values: Tensor) -> Tensor:
    """Values ``(N, C, ...)`` as ``(N T, C)``, one row for each of T positions."""
    return values.flatten(2).transpose(1, 2).flatten(0, 1)
