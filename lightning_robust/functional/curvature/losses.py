"""Takes a loss function apart into samples: value, gradient and weight of each.

Gauss–Newton roots, by which some losses need no second derivatives, are in ``_gauss_newton_root.py``.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.functional._validation.arguments import check_function, optional
from lightning_robust.functional._validation.scales import ordinary
from lightning_robust.functional._validation.tensors import check_finite
from lightning_robust.functional.curvature._class_losses import ClassLoss, check_classes, weights_of_classes
from lightning_robust.functional.curvature._gauss_newton_root import ROOTS, ElementwiseRoot, GaussNewtonRoot
from lightning_robust.functional.curvature._loss_checks import check_mean, check_second_derivative, check_weights

LossFn = Callable[[Tensor, Tensor], Tensor]

_MODULES: list[tuple[object, type[nn.Module]]] = [
    (None, nn.CrossEntropyLoss),
    (F.cross_entropy, nn.CrossEntropyLoss),
    (F.nll_loss, nn.NLLLoss),
    (F.mse_loss, nn.MSELoss),
    (F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss),
]


def check_loss_fn(loss_fn: LossFn | None) -> None:
    """Raise a ``TypeError`` unless ``loss_fn`` is None or can be called with outputs and targets."""
    optional(check_function, "loss_fn", loss_fn)


class SampleLoss:
    """A loss function, evaluated sample by sample.

    torch's own losses (modules, functions, or partial applications of either) return the losses of single samples when
    asked to, and the mean weighs samples as torch does (class weights). Where every pixel or token has a class, torch's
    mean is over positions rather than samples: the loss of a sample is then the sum over its positions, and its weight
    that of all positions that count. A custom loss is called on one sample at a time, unless it returns one loss per
    sample. The function itself is never changed.

    Args:
        loss_fn: Maps outputs ``(N, ...)`` and targets ``(N, ...)`` to a loss; None stands for cross-entropy.

    Attributes:
        is_custom: Whether the loss is not one of torch's.
    """

    def __init__(self, loss_fn: LossFn | None) -> None:
        check_loss_fn(loss_fn)
        self._function = _as_module(loss_fn)
        self._reduction = "mean"
        self.is_custom = not _is_of_torch(self._function)
        if not self.is_custom and "reduction" in vars(self._function):
            self._reduction = vars(self._function)["reduction"]
            self._function = copy.copy(self._function)
            vars(self._function)["reduction"] = "none"

    @property
    def is_cross_entropy(self) -> bool:
        """Whether it is torch's cross-entropy, which does not change when all outputs rise together."""
        return _is_exactly(self._function, nn.CrossEntropyLoss)

    @property
    def is_binary_cross_entropy(self) -> bool:
        """Whether it is torch's binary cross-entropy of logits."""
        return _is_exactly(self._function, nn.BCEWithLogitsLoss)

    @property
    def root(self) -> GaussNewtonRoot | None:
        """The root of the Hessian with respect to the outputs, if one is known."""
        for kind, root in ROOTS.items():
            if _is_exactly(self._function, kind):
                return root(cast(nn.Module, self._function), self.values, averages=self._averages)
        return None

    @property
    def takes_classes(self) -> bool:
        """Whether it is one of torch's losses of class indices."""
        return self.is_cross_entropy or _is_exactly(self._function, nn.NLLLoss)

    @property
    def ignore_index(self) -> int | None:
        """Class index of what it leaves out, if it is one of torch's losses of class indices."""
        return cast(ClassLoss, self._function).ignore_index if self.takes_classes else None

    @property
    def _averages(self) -> bool:
        """Whether the loss of a sample is the mean over its outputs, rather than their sum."""
        of_positions = self.takes_classes and self._reduction == "mean"
        return not of_positions and self._reduction not in ("sum", "batchmean")

    def prepared(self, targets: Tensor, *, num_samples: int) -> Tensor:
        """Return targets in the dtype that the loss takes, or raise a ``ValueError`` unless there is one per sample."""
        if targets.shape[:1] != (num_samples,):
            raise ValueError(
                f"Expected argument `targets` to hold one target per sample, a tensor of shape ({num_samples}, ...),"
                f" but got shape {tuple(targets.shape)}."
            )
        integer = not targets.is_floating_point() and targets.dtype != torch.bool
        return targets.long() if self.takes_classes and integer else targets

    def check(self, outputs: Tensor, targets: Tensor | None) -> None:
        """Raise unless outputs and targets have the shapes and class indices that the loss takes.

        torch checks class indices itself, but on a GPU it aborts the process.
        """
        if self.takes_classes:
            check_classes(cast(ClassLoss, self._function), outputs, targets)
        elif isinstance(self.root, ElementwiseRoot):
            check_finite(outputs, "outputs")  # these losses know no masked classes
        if isinstance(self.root, ElementwiseRoot) and targets is not None and targets.shape != outputs.shape:
            raise ValueError(
                f"Expected argument `targets` of the shape of the outputs, {tuple(outputs.shape)}, but got"
                f" {tuple(targets.shape)}."
            )

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each sample, ``(N,)``."""
        n = len(outputs)
        losses = self._called(outputs, targets)
        if losses.ndim == 0 and n == 1:
            return losses[None]
        if losses.ndim == 0:
            losses = torch.stack([self._called(outputs[i : i + 1], targets[i : i + 1]).sum() for i in range(n)])
        if losses.shape[:1] != (n,):
            raise ValueError(
                f"Expected argument `loss_fn` to return one loss per sample, shape ({n},), or their mean, but got shape"
                f" {tuple(losses.shape)}."
            )
        rest = losses.reshape(n, -1)
        return rest.mean(dim=1) if self._averages else rest.sum(dim=1)

    def _called(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses: object = self._function(outputs, targets)
        if not isinstance(losses, Tensor):
            raise TypeError(f"Expected argument `loss_fn` to return a tensor, but got {type(losses).__name__}.")
        return losses

    def examine(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise unless a custom loss is a mean over samples and has the second derivative that autograd computes."""
        leaf = outputs.detach().clone().requires_grad_()
        of_batch = self._called(leaf, targets)
        if of_batch.ndim == 0 and of_batch.isfinite():
            with torch.no_grad():
                check_mean(of_batch.detach(), self.values(outputs, targets))
            if of_batch.requires_grad:
                (slope,) = torch.autograd.grad(of_batch, leaf, materialize_grads=True)
                gradients = self.gradients(outputs, targets)
                # one that has diverged must not hide the others
                kept = ordinary(outputs.masked_fill(outputs.isneginf(), 0).reshape(len(outputs), -1).norm(dim=1))
                check_weights(slope[kept] * (len(kept) / int(kept.sum())), gradients[kept])
        check_second_derivative(self.values, outputs, targets)

    def gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Gradient of each sample's loss with respect to its outputs, in the shape of the outputs."""
        leaf = outputs.detach().clone().requires_grad_()
        losses = self.values(leaf, targets)
        check_finite(losses, "losses")
        if not losses.requires_grad:
            return torch.zeros_like(leaf)
        (gradients,) = torch.autograd.grad(losses.sum(), leaf, materialize_grads=True)
        return gradients

    def weights(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Weight of each sample in the mean, ``(N,)``, float64: 1, or the sum over the positions that count."""
        if self.takes_classes and self._reduction == "mean" and targets is not None:
            return weights_of_classes(cast(ClassLoss, self._function), outputs, targets)
        return outputs.new_ones(len(outputs), dtype=torch.float64)


def _as_module(loss_fn: LossFn | None) -> LossFn:
    """The original of a compiled loss; torch's module for one of torch's functions; else the loss itself."""
    function: Any = loss_fn
    if isinstance(function, nn.Module):
        return cast(LossFn, getattr(function, "_orig_mod", function))
    options = dict[str, Any]()
    if isinstance(function, functools.partial) and not function.args:
        function, options = function.func, function.keywords
    for known, module in _MODULES:
        if function is known and options.keys() <= inspect.signature(module).parameters.keys():
            return module(**options)
    return cast(LossFn, loss_fn)


def _is_of_torch(function: object) -> bool:
    """Whether it is a loss module of torch, or of a subclass that changes nothing but the constructor."""
    if not isinstance(function, nn.Module) or "forward" in vars(function):
        return False
    hooked = function._forward_hooks or function._forward_pre_hooks
    return not hooked and type(function).forward.__module__ == nn.modules.loss.__name__


def _is_exactly(function: object, kind: type[nn.Module]) -> bool:
    return _is_of_torch(function) and isinstance(function, kind) and type(function).forward is kind.forward
