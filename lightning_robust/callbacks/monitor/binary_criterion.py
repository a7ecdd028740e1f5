"""Finds the loss of a binary classifier with one logit among the attributes of its module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_robust.callbacks.monitor.muted_logging import muted_logging
from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.stand_ins import full_precision

_many_logits: WeakKeyDictionary[LightningModule, bool] = WeakKeyDictionary()  # of modules that were asked


def binary_criterion(
    pl_module: LightningModule,
    model: Callable[..., Any],
    inputs: Tensor,
    targets: Tensor,
    extras: Mapping[str, Tensor],
) -> nn.Module | None:
    """The module's criterion, if it is evidently that of a binary classifier with one logit.

    Targets 0 and 1 in floating point tell. Integers may be classes of many of which a batch holds two: then the outputs
    for one sample tell, once for a module.
    """
    losses = [inner for inner in pl_module.modules() if isinstance(inner, nn.BCEWithLogitsLoss | nn.CrossEntropyLoss)]
    binary = targets.numel() == len(targets) and bool(((targets == 0) | (targets == 1)).all())
    if len(losses) != 1 or not isinstance(losses[0], nn.BCEWithLogitsLoss) or not binary or not len(targets):
        return None
    if not targets.is_floating_point() and _has_many_logits(pl_module, model, inputs, extras):
        return None
    return losses[0]


def _has_many_logits(
    pl_module: LightningModule, model: Callable[..., Any], inputs: Tensor, extras: Mapping[str, Tensor]
) -> bool:
    known = _many_logits.get(pl_module)
    if known is not None:
        return known
    x, of_one = full_precision(inputs[:1]), {name: full_precision(extra[:1]) for name, extra in extras.items()}
    try:
        with muted_logging(pl_module), differentiable(pl_module), torch.no_grad():
            outputs = model(x.clone(), **of_one)
    except Exception:  # the measurement will raise it again, with what to do
        return False
    logits = outputs if isinstance(outputs, Tensor) else _entry(outputs)
    if logits is None:  # it is not evident which they are
        return False
    return _many_logits.setdefault(pl_module, logits.numel() > 1)


def _entry(outputs: object) -> Tensor | None:
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    return found if isinstance(found, Tensor) else None
