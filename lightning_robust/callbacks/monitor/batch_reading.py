"""Reads batches of ordinary LightningModules: inputs, targets, what else the network takes, and how it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_robust.callbacks.monitor.batches import Batch
from lightning_robust.callbacks.monitor.muted_logging import muted_logging
from lightning_robust.callbacks.monitor.token_embeddings import MASK, FromEmbeddings, embeddings_of
from lightning_robust.functional._isolation.context import owner_of
from lightning_robust.functional._isolation.side_effects import side_effects_reverted
from lightning_robust.functional._validation.arguments import class_of
from lightning_robust.functional._validation.extras import check_extras
from lightning_robust.probe import Probe, check_samples, checked_with

_INPUT_KEYS = (
    *("x", "input", "inputs", "image", "images", "img", "pixel_values", "data", "features"),
    *("input_ids", "inputs_embeds", "input_values", "input_features"),  # of text and speech
)
_TARGET_KEYS = ("y", "target", "targets", "label", "labels")
_TEXT_KEYS = (MASK, "token_type_ids", "position_ids")  # what transformers take beside token ids
_BATCH_NAMES = ("batch", "sample", "samples")  # of an argument that takes the whole dictionary


class Samples(NamedTuple):
    """What a batch holds: entries by name (a pair has its input under the name ``""``), and what they are."""

    entries: Mapping[str, Any]
    key: str  # of the inputs
    targets: Tensor
    target_key: str | None  # None for the second entry of a pair

    @property
    def inputs(self) -> Tensor:
        """``(N, ...)``."""
        inputs: Tensor = self.entries[self.key]
        return inputs


@dataclass(frozen=True)
class ByKeyword:
    """Calls a module with its inputs by name, or with a dictionary of all its arguments."""

    module: nn.Module
    key: str
    as_dictionary: bool = False

    @property
    def __self__(self) -> nn.Module:
        """The module, as of a bound method."""
        return self.module

    def __call__(self, x: Tensor, **extras: Tensor) -> Any:
        """Outputs of the module."""
        arguments = {self.key: x, **extras}
        return self.module(arguments) if self.as_dictionary else self.module(**arguments)


def read_batch(
    pl_module: LightningModule,
    batch: object,
    *,
    probe_fn: Callable[[LightningModule, Any], Probe] | None,
    defaults: Mapping[str, Any],
) -> Batch:
    """Read a batch by ``probe_fn``, else by the module's ``robustness_probe``, else by customary keys.

    Args:
        pl_module: The module that is trained.
        batch: What its loader yields.
        probe_fn: The user's function, or None.
        defaults: Options for the probe. The user's own probe is checked with them, where it leaves them open.

    Raises:
        MisconfigurationException: If the batch cannot be read, or ``probe_fn`` returns no probe.
    """
    method = getattr(pl_module, "robustness_probe", None)
    if probe_fn is None and not callable(method):
        return _read(pl_module, batch, defaults)
    metrics = [inner for module in pl_module.modules() if isinstance(module, Metric) for inner in module.modules()]
    with muted_logging(pl_module), side_effects_reverted(metrics), checked_with(defaults):
        probe: object = probe_fn(pl_module, batch) if probe_fn is not None else method(batch)  # type: ignore[misc]
    if not isinstance(probe, Probe):
        raise MisconfigurationException(
            f"Expected `probe_fn` to return a Probe(model, inputs, targets), but got {type(probe).__name__}."
        )
    options = {field.name: getattr(probe, field.name) for field in fields(probe) if field.init}
    inputs, targets, extras = (options.pop(name) for name in ("inputs", "targets", "extras"))
    if probe.module is None and owner_of(probe.model) is None:
        options["module"] = pl_module
    options |= {name: value for name, value in defaults.items() if options[name] is None}
    return Batch(inputs, targets, options, extras or {})


def _read(pl_module: LightningModule, batch: object, defaults: Mapping[str, Any]) -> Batch:
    """Read a batch whose inputs, targets and further arguments of the module are evident."""
    network = _network(pl_module)
    takes = _Arguments.of(network)
    samples = _samples(batch, takes)
    inputs, targets = samples.inputs, samples.targets
    extras = _extras(samples, takes)
    model = _call(network, samples.key, takes)
    options: dict[str, Any] = {"model": model, "module": pl_module, **defaults}
    if options.get("loss_fn") is None:
        options["loss_fn"] = _binary_loss(pl_module, targets)
    embeddings = None if inputs.is_floating_point() else embeddings_of(pl_module)
    if embeddings is not None:
        tokens = FromEmbeddings(model, embeddings, samples.key or "input_ids", MASK in extras, pl_module)
        options["model"] = tokens
        if options.get("input_std") is None:
            options["input_std"] = tokens.unit()
        mask = samples.entries.get(MASK)
        extras = {**extras, tokens.key: inputs, **({MASK: mask} if isinstance(mask, Tensor) else {})}
        inputs = tokens.embedded(inputs)
    check_samples(inputs, targets, loss_fn=options["loss_fn"])
    check_extras(extras, len(inputs))
    return Batch(inputs, targets, options, extras)


def _network(pl_module: LightningModule) -> nn.Module:
    """The module to call: its only child with weights, if it has no forward pass of its own."""
    if type(pl_module).forward is not LightningModule.forward or "forward" in vars(pl_module):
        return pl_module
    children = [child for child in pl_module.children() if any(True for _ in child.parameters())]
    return children[0] if len(children) == 1 else pl_module


class _Arguments(NamedTuple):
    """What the forward pass of a module takes."""

    first: str | None  # the first argument that can be given without its name
    required: frozenset[str]
    names: frozenset[str]
    any_name: bool  # **kwargs
    as_dictionary: bool  # the first argument is the whole batch

    @classmethod
    def of(cls, network: nn.Module) -> _Arguments:
        try:
            parameters = list(inspect.signature(network.forward).parameters.values())
        except (TypeError, ValueError):  # compiled or scripted by means that leave no signature
            return cls("", frozenset(), frozenset(), any_name=False, as_dictionary=False)
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        first = next((p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)), None)
        hint = "" if first is None or first.annotation is first.empty else str(first.annotation).lower()
        return cls(
            first=None if first is None else first.name,
            required=frozenset(p.name for p in named if p.default is p.empty),
            names=frozenset(p.name for p in named),
            any_name=any(p.kind == p.VAR_KEYWORD for p in parameters),
            as_dictionary=first is not None and (first.name in _BATCH_NAMES or "dict" in hint or "mapping" in hint),
        )

    def take(self, name: str) -> bool:
        """Whether an entry of this name is passed on beside the inputs."""
        return (
            self.as_dictionary or name in self.names or (self.any_name and (self.first is None or name in _TEXT_KEYS))
        )


def _samples(batch: object, takes: _Arguments) -> Samples:
    """Find inputs and targets in a pair ``(x, y)``, or in a dictionary with customary keys."""
    entries, targets, target_key = batch, None, None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        entries, targets = batch if isinstance(batch[0], Mapping) else ({"": batch[0]}, batch[1])
    if isinstance(entries, Mapping):
        if targets is None:
            target_key = next((key for key in _TARGET_KEYS if isinstance(entries.get(key), Tensor)), None)
            targets = None if target_key is None else entries[target_key]
        keys = [key for key in ("", *_INPUT_KEYS) if isinstance(entries.get(key), Tensor)]
        evident = [key for key in keys if key in takes.names] if len(keys) > 1 else keys
        if len(keys) > 1 and len(evident) != 1:
            shown = " and ".join(f"{key!r} {tuple(entries[key].shape)}" for key in keys)
            raise MisconfigurationException(
                f"Expected a batch with one input, but several entries could be it: {shown}. Choose one, as in"
                f" `probe_fn=lambda module, batch: Probe(module, batch[{keys[0]!r}], batch[{target_key or 'y'!r}])`."
            )
        if evident and isinstance(targets, Tensor):
            return Samples(entries, evident[0], targets, target_key)
    raise MisconfigurationException(
        "Expected batches `(inputs, targets)` of two tensors, or dictionaries with keys such as 'x' and 'y' or"
        f" 'image' and 'label', but got {_describe(batch)}. Pass `probe_fn=lambda pl_module, batch:"
        " Probe(pl_module, inputs, targets)` with inputs and targets taken from your batch, or define"
        " `robustness_probe(self, batch)` on the LightningModule."
    )


def _extras(samples: Samples, takes: _Arguments) -> dict[str, Tensor]:
    """The other entries that the network takes; raises unless they have a row per sample."""
    extras = {}
    for name, entry in samples.entries.items():
        if name == samples.key or (name == samples.target_key and name not in takes.required):
            continue
        if not isinstance(name, str) or not takes.take(name) or (entry is None and name not in takes.required):
            continue
        if isinstance(entry, Tensor) and entry.shape[:1] == samples.inputs.shape[:1]:
            extras[name] = entry
        elif isinstance(entry, Tensor) or name in takes.names:
            got = f"a tensor of shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else class_of(entry)
            raise MisconfigurationException(
                f"Expected the entry {name!r} of the batch, an argument of the module, to be a tensor with a row for"
                f" each of the {len(samples.inputs)} samples, but got {got}. Collate it so, or choose what the module"
                " is called with: `probe_fn=lambda module, batch: Probe(module, inputs, targets, extras={...})`."
            )
    return extras


def _call(network: nn.Module, key: str, takes: _Arguments) -> Callable[..., Any]:
    """The network as a function of its inputs, and of extras by keyword."""
    if key and takes.as_dictionary:
        return ByKeyword(network, key, as_dictionary=True)
    by_name = key in takes.names and takes.first != key
    return ByKeyword(network, key) if key and (by_name or (takes.first is None and takes.any_name)) else network


def _binary_loss(pl_module: LightningModule, targets: Tensor) -> nn.Module | None:
    """The module's criterion, if it is evidently that of a binary classifier with one logit."""
    losses = [inner for inner in pl_module.modules() if isinstance(inner, nn.BCEWithLogitsLoss | nn.CrossEntropyLoss)]
    binary = targets.numel() == len(targets) and bool(((targets == 0) | (targets == 1)).all())
    return losses[0] if len(losses) == 1 and isinstance(losses[0], nn.BCEWithLogitsLoss) and binary else None


def _describe(batch: object) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with keys {[str(key) for key in batch]}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(type(item).__name__ for item in batch)})"
    return f"a {type(batch).__name__}"
