"""Finds the logits in what networks return: in a tuple, dictionary or object, or one logit for two classes."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def logits_in(outputs: object, *, num_samples: int) -> Any:
    """Return the tensor that is evidently meant, or ``outputs`` themselves if none is.

    That is the tensor itself; else the entry or attribute ``logits``; else the only entry that could be logits, of
    shape ``(num_samples, C)`` with C ≥ 2; else the only tensor with a row per sample.

    Raises:
        ValueError: If several entries could be the logits.
    """
    if isinstance(outputs, Tensor):
        return outputs
    entries = _entries(outputs)
    if isinstance(entries.get("logits"), Tensor):
        return entries["logits"]
    tensors = {
        name: entry
        for name, entry in entries.items()
        if isinstance(entry, Tensor) and entry.is_floating_point() and entry.shape[:1] == (num_samples,)
    }
    likely = {name: entry for name, entry in tensors.items() if entry.ndim == 2 and entry.shape[1] > 1}
    candidates = likely or tensors
    if len(candidates) > 1:
        shown = " and ".join(f"[{name!r}] of shape {tuple(entry.shape)}" for name, entry in candidates.items())
        raise ValueError(
            f"Expected the model to return logits (N, C), but it returned {type(outputs).__name__} with several entries"
            f" that could be the logits: {shown}. Choose one, e.g. by `Probe(lambda x: model(x)"
            f"[{next(iter(candidates))!r}], inputs, targets, module=model)` (in a callback, through `probe_fn`)."
        )
    return next(iter(candidates.values()), outputs)


def _entries(outputs: object) -> dict[Any, object]:
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if isinstance(outputs, tuple) and hasattr(outputs, "_asdict"):
        return dict(outputs._asdict())
    if isinstance(outputs, tuple | list):
        return dict(enumerate(outputs))
    if is_dataclass(outputs):
        return {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    return {"logits": getattr(outputs, "logits", None)}


def as_two_classes(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A binary classifier with one logit z per sample as one with the logits (0, z)."""
    return types.MethodType(_two_classes, model)


def as_one_logit(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A binary classifier with outputs (N,) or (N, 1) as one with outputs (N,)."""
    return types.MethodType(_one_logit, model)


def _one_logit(model: Callable[..., Tensor], x: Tensor, **extras: Tensor) -> Tensor:
    outputs = logits_in(model(x, **extras), num_samples=len(x))
    if not isinstance(outputs, Tensor) or outputs.numel() != len(x):
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            "Expected the model to return one logit per sample, because its loss is BCEWithLogitsLoss with one target"
            f" each, but for {len(x)} inputs it returned {got}. If it returns one logit per class, pass"
            " `loss_fn=nn.CrossEntropyLoss()`."
        )
    return outputs.reshape(len(x))


def _two_classes(model: Callable[..., Tensor], x: Tensor, **extras: Tensor) -> Tensor:
    logit = _one_logit(model, x, **extras)
    return torch.stack([torch.zeros_like(logit), logit], dim=1)
