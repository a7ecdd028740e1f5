"""Finds the logits in what networks return: in a tuple, dictionary or object, or one logit for two classes.

A network may return features, losses or confidences beside its logits. What is measured must be evident: the entry
``logits``, else the only one whose name says that it holds logits, else the only one whose shape does.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

_LOGITS = ({"logit", "logits"}, {"score", "scores", "pred", "preds", "prediction", "predictions", "output", "out"})
_FEATURES = frozenset(
    {"embedding", "embeddings", "embed", "embeds", "emb", "feature", "features", "feat", "feats", "hidden", "latent"}
    | {"latents", "representation", "representations", "pooled", "pooler", "penultimate"}
)
_ASIDE = frozenset(  # single numbers per sample beside the logits
    {"loss", "losses", "confidence", "confidences", "uncertainty", "entropy", "prob", "probs", "probability", "weight"}
    | {"weights", "value", "values", "length", "lengths", "mask", "energy", "variance"}
)
Entries = Mapping[Any, Tensor]
IGNORED = -100  # target of a position that does not count, as torch's losses have it
COUNTED = "counted_positions"  # name of an extra


def logits_in(outputs: object, *, num_samples: int, binary: bool | None = None) -> Any:
    """Return the tensor that is evidently meant, or ``outputs`` themselves if none is.

    That is the tensor itself; else the entry or attribute ``logits``; else the only entry that could be logits, by its
    name, or by its shape ``(num_samples, C)`` with C ≥ 2; else the only tensor with a row per sample.

    A single number per sample could be the logit of a binary classifier, and rows of C numbers beside it its features.
    It is not taken for one if its name says otherwise; if there are more than two classes, or there are two and C is 2;
    or if nothing is known of the classes, and numbers of shape ``(num_samples,)`` follow the rows, as losses do.

    Args:
        outputs: What the network has returned.
        num_samples: For how many samples.
        binary: Whether all targets are 0 or 1, if targets are known and are classes.

    Raises:
        ValueError: If several entries could be the logits, or the only one is called features.
    """
    if isinstance(outputs, Tensor):
        return outputs
    entries = _entries(outputs)
    if isinstance(entries.get("logits"), Tensor):
        return entries["logits"]
    tensors = _with_a_row_each(entries, num_samples)
    wide = {name: entry for name, entry in tensors.items() if entry.ndim == 2 and entry.shape[1] > 1}
    evident = wide and (binary is False or (binary is True and all(entry.shape[1] == 2 for entry in wide.values())))
    single = {} if evident else _single(tensors, num_samples)
    candidates = {name: tensors[name] for name in tensors if name in wide or name in single} if wide else tensors
    named = _by_name(candidates, _LOGITS[0])
    if not named:
        first = next((place for place, name in enumerate(tensors) if name in wide), len(tensors))
        after = [name for place, name in enumerate(tensors) if place > first and tensors[name].ndim == 1 and not binary]
        candidates = {name: entry for name, entry in candidates.items() if name not in after}
        features = _by_name(candidates, _FEATURES)
        named = _by_name({name: candidates[name] for name in candidates if name not in features}, _LOGITS[1])
    candidates = named or candidates
    if len(candidates) > 1:
        raise ValueError(_choice(outputs, candidates))
    if not named and features:
        ((name, entry),) = candidates.items()
        raise ValueError(
            f"Expected the model to return logits (N, C), but the only tensor in the {type(outputs).__name__} that it"
            f" returned is {name!r} of shape {tuple(entry.shape)}: features, by its name. If it holds the logits,"
            f" pass `{_line(outputs, name, entry)}`; otherwise put a function that returns them in place of the lambda."
        )
    return next(iter(candidates.values()), outputs)


def _single(tensors: Entries, num_samples: int) -> dict[Any, Tensor]:
    """Single numbers per sample that could be logits."""
    single = {name: entry for name, entry in tensors.items() if entry.numel() == num_samples}
    return {name: entry for name, entry in single.items() if not _words(name) & _ASIDE}


def _with_a_row_each(entries: Mapping[Any, object], num_samples: int) -> dict[Any, Tensor]:
    return {
        name: entry
        for name, entry in entries.items()
        if isinstance(entry, Tensor) and entry.is_floating_point() and entry.shape[:1] == (num_samples,)
    }


def _by_name(entries: Entries, words: Iterable[str]) -> dict[Any, Tensor]:
    return {name: entry for name, entry in entries.items() if not _words(name).isdisjoint(words)}


def _words(name: object) -> set[str]:
    return set(re.findall("[a-z]+", name.lower())) if isinstance(name, str) else set()


def _choice(outputs: object, candidates: Entries, *, classes: bool = True) -> str:
    shown = " and ".join(f"[{name!r}] of shape {tuple(entry.shape)}" for name, entry in candidates.items())
    return (
        f"Expected the model to return {'logits' if classes else 'outputs'} (N, C), but it returned"
        f" {type(outputs).__name__} with several entries that could be the {'logits' if classes else 'outputs'}:"
        f" {shown}. Choose one, as in `{_line(outputs, *next(iter(candidates.items())), classes=classes)}`."
    )


def _line(outputs: object, name: Any, entry: Tensor, *, classes: bool = True) -> str:
    """The option of a monitor that takes an entry for the logits."""
    by_key = isinstance(outputs, Mapping) or not isinstance(name, str)
    loss = ", loss_fn=nn.BCEWithLogitsLoss()" if classes and entry.numel() == len(entry) else ""
    return (
        f"probe_fn=lambda module, batch: Probe(lambda x: module(x){f'[{name!r}]' if by_key else f'.{name}'}, batch[0],"
        f" batch[1], module=module{loss})"
    )


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


def as_classifier(model: Callable[..., Tensor], targets: Tensor) -> Callable[..., Tensor]:
    """A classifier whose logits are found with what is known of its classes, if targets are classes (N,)."""
    if targets.is_floating_point() or targets.ndim != 1:
        return model
    return types.MethodType(_several_classes if (targets > 1).any() else _zero_and_one, model)


def as_columns(model: Callable[..., Tensor], targets: Tensor) -> Callable[..., Tensor]:
    """A model with outputs (N, ...), each with a target of its own, as one with outputs (N, C)."""
    return types.MethodType(_Columns(targets[:1].numel()), model)


def as_restricted(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A classifier with only those classes of each sample, ``(n, K)``, that the extra ``classes_of_samples`` names."""
    return types.MethodType(_restricted, model)


def as_positions(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A model with logits (N, T, V) as one that is certain where the extra ``counted_positions`` (N, T) is False.

    Whatever the model returns there, the logits are 0 for word 0 and −∞ for all others: a probability of exactly 1 at
    any temperature, without derivatives.
    """
    return types.MethodType(_certain_elsewhere, model)


def as_dense_classes(model: Callable[..., Tensor], num_positions: int) -> Callable[..., Tensor]:
    """A model with logits (N, T, V) as one with (N, V, T), as torch's losses of classes take them."""
    return types.MethodType(_DenseClasses(num_positions), model)


def unwrapped(model: object) -> object:
    """The user's own model behind those that these functions return."""
    while isinstance(model, types.MethodType) and (
        model.__func__ in _OWN or isinstance(model.__func__, _Columns | _DenseClasses)
    ):
        model = model.__self__
    return model


def _several_classes(model: Callable[..., Tensor], x: Tensor, **extras: Tensor) -> Any:
    return logits_in(model(x, **extras), num_samples=len(x), binary=False)


def _zero_and_one(model: Callable[..., Tensor], x: Tensor, **extras: Tensor) -> Any:
    return logits_in(model(x, **extras), num_samples=len(x), binary=True)


def _one_logit(model: Callable[..., Tensor], x: Tensor, **extras: Tensor) -> Tensor:
    outputs = _one_logit_in(model(x, **extras), num_samples=len(x))
    if not isinstance(outputs, Tensor) or outputs.numel() != len(x):
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            "Expected the model to return one logit per sample, because its loss is BCEWithLogitsLoss with one target"
            f" each, but for {len(x)} inputs it returned {got}. If it returns one logit per class, pass"
            " `loss_fn=nn.CrossEntropyLoss()`."
        )
    return outputs.reshape(len(x))


def _one_logit_in(outputs: object, *, num_samples: int) -> Any:
    """The only entry with a single number per sample, by its name if there are several; else as :func:`logits_in`."""
    if isinstance(outputs, Tensor):
        return outputs
    entries = _entries(outputs)
    if "logits" in entries and isinstance(entries["logits"], Tensor):
        return entries["logits"]
    single = _single(_with_a_row_each(entries, num_samples), num_samples)
    single = next(filter(None, (_by_name(single, words) for words in _LOGITS)), single)
    if len(single) > 1:
        raise ValueError(_choice(outputs, single))
    return next(iter(single.values())) if single else logits_in(outputs, num_samples=num_samples)


def _restricted(model: Callable[..., Tensor], x: Tensor, *, classes_of_samples: Tensor, **extras: Tensor) -> Tensor:
    logits: Tensor = logits_in(model(x, **extras), num_samples=len(x))
    return logits.gather(1, classes_of_samples)


def _two_classes(model: Callable[..., Tensor], x: Tensor, **extras: Tensor) -> Tensor:
    logit = _one_logit(model, x, **extras)
    return torch.stack([torch.zeros_like(logit), logit], dim=1)


def _certain_elsewhere(model: Callable[..., Tensor], x: Tensor, *, counted_positions: Tensor, **extras: Tensor) -> Any:
    logits = _logits_of_positions(model(x, **extras), *counted_positions.shape)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        return logits
    certain = logits.new_full(logits.shape[2:], -torch.inf)
    certain[:1] = 0
    return torch.where(counted_positions[..., None], logits, certain)


@dataclass(frozen=True)
class _DenseClasses:
    num_positions: int

    def __call__(self, model: Callable[..., Tensor], x: Tensor, **extras: Tensor) -> Any:
        logits = _logits_of_positions(model(x, **extras), len(x), self.num_positions)
        return logits.movedim(2, 1) if isinstance(logits, Tensor) and logits.ndim == 3 else logits


def _logits_of_positions(outputs: object, num_samples: int, num_positions: int) -> Any:
    """Logits (N, T, V): of several tensors the entry ``logits``, or the only one with a row per position, by its name.

    Raises:
        ValueError: If several could be it, or the only one has another number of positions.
    """
    logits: object = outputs
    if not isinstance(outputs, Tensor):
        entries = _entries(outputs)
        rows = _with_a_row_each(entries, num_samples)
        fitting = {n: e for n, e in rows.items() if e.ndim == 3 and e.shape[1] == num_positions}
        found = _by_name(fitting, _LOGITS[0]) or {n: e for n, e in fitting.items() if not _words(n) & _FEATURES}
        if "logits" not in entries and len(found) > 1:
            raise ValueError(_choice(outputs, found).replace("(N, C)", "(N, T, V)"))
        logits = entries["logits"] if "logits" in entries else next(iter(found.values()), outputs)
    if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[1] != num_positions:
        last = " Words belong into the last dimension." if logits.shape[2] == num_positions else ""
        raise ValueError(
            f"Expected the model to return logits (N, {num_positions}, V) for targets (N, {num_positions}), of words at"
            f" each position, but it returned shape {tuple(logits.shape)}.{last} Pass a model and targets of the same"
            " positions, in a callback through `probe_fn`."
        )
    return logits


@dataclass(frozen=True)
class _Columns:
    """Outputs (N, C): of several tensors the entry ``logits``, or the only one with C numbers per sample, if any is."""

    num_columns: int

    def __call__(self, model: Callable[..., Tensor], x: Tensor, **extras: Tensor) -> Any:
        outputs: Any = model(x, **extras)
        if not isinstance(outputs, Tensor):
            outputs = self._in(outputs, num_samples=len(x))
        rows = isinstance(outputs, Tensor) and (outputs.shape[:1] == x.shape[:1] or len(x) == 1)
        return outputs.reshape(len(x), -1) if rows and outputs.numel() else outputs

    def _in(self, outputs: object, *, num_samples: int) -> Any:
        entries = _entries(outputs)
        if isinstance(entries.get("logits"), Tensor):
            return entries["logits"]
        tensors = _with_a_row_each(entries, num_samples)
        fitting = {name: entry for name, entry in tensors.items() if entry.numel() == num_samples * self.num_columns}
        fitting = {name: entry for name, entry in fitting.items() if not _words(name) & _ASIDE} or fitting
        found = next(filter(None, (_by_name(fitting, words) for words in _LOGITS)), fitting)
        if len(found) > 1:
            raise ValueError(_choice(outputs, found, classes=False))
        return next(iter(found.values())) if found else logits_in(outputs, num_samples=num_samples)


_OWN = (_two_classes, _one_logit, _several_classes, _zero_and_one, _restricted, _certain_elsewhere)
