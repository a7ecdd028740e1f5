"""torch's losses of class indices, of one class per sample, ``(N, C)``, or per pixel or token, ``(N, C, ...)``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_robust.functional._validation.tensors import check_logits, check_targets

ClassLoss = nn.CrossEntropyLoss | nn.NLLLoss


def check_classes(loss: ClassLoss, outputs: Tensor, targets: Tensor | None) -> None:
    """Raise unless outputs and targets are what the loss takes, with every class index among the classes.

    torch checks class indices itself, but on a GPU it aborts the process.
    """
    if outputs.ndim < 3 or targets is None or targets.shape == outputs.shape[:1]:
        check_logits(outputs, num_samples=len(outputs))
    elif outputs.shape[1] < 2:
        raise ValueError(
            "Expected the model to return scores of C ≥ 2 classes, (N, C, ...), but it returned shape"
            f" {tuple(outputs.shape)}. Take `loss_fn=nn.BCEWithLogitsLoss()` for a single score per position."
        )
    if loss.weight is not None and loss.weight.shape != outputs.shape[1:2]:
        raise ValueError(
            f"Expected argument `loss_fn` to have one class weight for each of {outputs.shape[1]} classes, but it"
            f" has shape {tuple(loss.weight.shape)}."
        )
    if targets is None:
        return
    if outputs.ndim > 2:
        _check_positions(outputs, targets)
    if not targets.is_floating_point():
        labels = targets.flatten() if outputs.ndim > 2 else check_targets(targets, num_samples=len(outputs))
        counted = labels[labels != loss.ignore_index]
        check_targets(counted, num_samples=len(counted), num_classes=outputs.shape[1])
    elif targets.shape != outputs.shape:
        raise ValueError(
            f"Expected argument `targets` to hold class indices ({len(outputs)},) or probabilities"
            f" {tuple(outputs.shape)}, but got {targets.dtype} of shape {tuple(targets.shape)}."
        )


def _check_positions(outputs: Tensor, targets: Tensor) -> None:
    """Raise unless targets are a class per position of outputs ``(N, C, ...)``, or probabilities of their shape."""
    shape = outputs.shape[:1] + outputs.shape[2:]
    if targets.is_floating_point() and targets.shape == outputs.shape:
        return
    if targets.shape == shape and not (targets.is_floating_point() or targets.dtype == torch.bool):
        return
    remedy = ""
    if targets.shape == shape:
        remedy = " Take `.long()` of classes in another type."
    elif targets.shape == (shape[0], 1, *shape[1:]):
        remedy = " Take `.squeeze(1)` of the targets."
    elif targets.shape == outputs.shape[:-1]:
        remedy = " Classes belong into dimension 1: wrap the model so that it returns `outputs.movedim(-1, 1)`."
    raise ValueError(
        f"Expected argument `targets` to hold one class index per position of outputs {_named(outputs)}, an integer"
        f" tensor {_named(outputs[:, 0])}, or probabilities of the shape of the outputs, but got {targets.dtype} of"
        f" shape {_named(targets)}.{remedy}"
    )


def _named(tensor: Tensor) -> str:
    """Shape of a batch of any size, ``(N, 3, 8, 8)``."""
    return f"({', '.join(['N', *map(str, tensor.shape[1:])])})"


def weights_of_classes(loss: ClassLoss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Weight of each sample in torch's mean, ``(N,)``, float64: that of all its positions that are not ignored."""
    ones = outputs.new_ones(len(outputs), dtype=torch.float64)
    if targets.is_floating_point():
        return ones * outputs[0, 0].numel()  # torch does not weigh probabilities
    counted = targets != loss.ignore_index
    weights = counted.to(ones) if loss.weight is None else loss.weight.to(ones)[targets.where(counted, 0)] * counted
    return weights.reshape(len(outputs), -1).sum(dim=1)
