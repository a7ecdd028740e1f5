"""Reads batches of ordinary LightningModules: inputs, targets, what else the network takes, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_robust.callbacks.monitor.batches import Batch
from lightning_robust.callbacks.monitor.binary_criterion import binary_criterion
from lightning_robust.callbacks.monitor.forward_arguments import Arguments, ByKeyword
from lightning_robust.callbacks.monitor.muted_logging import muted_logging
from lightning_robust.callbacks.monitor.probe_code import ProbeCode, code_of_unread
from lightning_robust.callbacks.monitor.token_embeddings import MASK, FromEmbeddings, embeddings_of
from lightning_robust.callbacks.monitor.token_targets import words_to_predict
from lightning_robust.functional._isolation.context import differentiable, owner_of
from lightning_robust.functional._isolation.sharding import is_distributed
from lightning_robust.functional._isolation.side_effects import side_effects_reverted
from lightning_robust.functional._validation.arguments import class_of
from lightning_robust.functional._validation.extras import check_extras
from lightning_robust.functional._validation.independence import BoundToBatchError, check_place
from lightning_robust.functional._validation.samples import check_samples, checked_with, completed
from lightning_robust.probe import Probe

_INPUT_KEYS = (
    *("x", "input", "inputs", "image", "images", "img", "pixel_values", "data", "features"),
    *("input_ids", "inputs_embeds", "input_values", "input_features"),  # of text and speech
)
_TARGET_KEYS = ("y", "target", "targets", "label", "labels")


class Samples(NamedTuple):
    """What a batch holds: entries by name (a pair has its input under the name ``""``), and what they are."""

    entries: Mapping[str, Any]
    key: str  # of the inputs
    targets: Tensor
    target_key: str | None  # None for the second entry of a pair
    paired: bool  # entries and targets are a pair

    @property
    def inputs(self) -> Tensor:
        """``(N, ...)``."""
        inputs: Tensor = self.entries[self.key]
        return inputs

    def code(self, name: str) -> str:
        """The code of an entry."""
        return f"batch{'[0]' if self.paired else ''}{f'[{name!r}]' if name else ''}"


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
    options = completed(options, defaults)
    return Batch(inputs, targets, options, extras or {})


def _read(pl_module: LightningModule, batch: object, defaults: Mapping[str, Any]) -> Batch:
    """Read a batch whose inputs, targets and further arguments of the module are evident."""
    network = _network(pl_module)
    takes = Arguments.of(network)
    samples = _samples(batch, takes)
    inputs, targets = samples.inputs, samples.targets
    if defaults.get("likelihood") == "token":
        targets = words_to_predict(inputs, targets, samples.entries.get(MASK))
    extras = _extras(samples, takes)
    model = takes.call(network, samples.key)
    options: dict[str, Any] = {"model": model, "module": pl_module, **defaults}
    has_classes = options.get("likelihood", "categorical") == "categorical"
    if options.get("loss_fn") is None and has_classes:
        options["loss_fn"] = binary_criterion(pl_module, model, inputs, targets, extras)
    embeddings = None if inputs.is_floating_point() else embeddings_of(pl_module)
    code = _code(samples, takes, extras, pl_module)
    if embeddings is not None:
        tokens = FromEmbeddings(model, embeddings, samples.key or "input_ids", MASK in extras, pl_module)
        options["model"] = tokens
        if options.get("input_std") is None:
            options["input_std"] = tokens.unit()
        mask = samples.entries.get(MASK)
        extras = {**extras, tokens.key: inputs, **({MASK: mask} if isinstance(mask, Tensor) else {})}
        inputs = tokens.embedded(inputs)
    try:
        check_samples(inputs, targets, any_targets=options.get("loss_fn") is not None or not has_classes)
    except ValueError as error:
        raise ValueError(f"{error}{_remedy(targets, code)}") from error
    check_extras(extras, len(inputs))
    return Batch(inputs, targets, options, extras, code)


def _code(samples: Samples, takes: Arguments, extras: Mapping[str, Tensor], pl_module: LightningModule) -> ProbeCode:
    """How the batch was read, for warnings."""
    named = {name: samples.code(name) for name in extras}
    others = [
        samples.code(name)
        for name, entry in samples.entries.items()
        if isinstance(entry, Tensor)
        and entry.shape[:1] == samples.inputs.shape[:1]
        and name not in (*extras, samples.key, samples.target_key)
    ]
    children = list(_children_with_weights(pl_module))
    embedding = None
    if samples.inputs.dtype in (torch.int32, torch.int64):
        embedding = next((name for name, layer in pl_module.named_modules() if isinstance(layer, nn.Embedding)), None)
    return ProbeCode(
        samples.code(samples.key),
        "batch[1]" if samples.target_key is None else samples.code(samples.target_key),
        named,
        others,
        by_name=samples.key if takes.as_dictionary or takes.by_name(samples.key) else None,
        as_dictionary=takes.as_dictionary,
        network=children[0] if len(children) == 1 else "network",
        embedding=embedding,
    )


def _remedy(targets: Tensor, code: ProbeCode) -> str:
    """The line to paste for targets that are no classes, one for each sample."""
    if targets.is_floating_point() and not bool((targets == targets.round()).all()):
        return ' Here, if these are numbers to predict: `RobustnessMonitor(likelihood="gaussian", tolerance=…)`.'
    if targets.ndim == 2 and targets.shape[1] == 1:
        if targets.is_floating_point() and bool(((targets == 0) | (targets == 1)).all()):
            return ""  # of a binary classifier, rather
        return f" Here: {code.line(targets='{}.squeeze(1)' + ('.long()' if targets.is_floating_point() else ''))}."
    if targets.ndim == 2 and bool(((targets != 0).sum(dim=1) == 1).all()) and bool((targets.sum(dim=1) == 1).all()):
        return f" Here: {code.line(targets='{}.argmax(dim=1)')}."
    return _remedy_of_many(targets)


def _remedy_of_many(targets: Tensor) -> str:
    """The option for targets of which a sample has several: labels, or classes of pixels or tokens."""
    if targets.ndim == 2 and bool(((targets == 0) | (targets == 1)).all()):
        return ' Here, if each is a label of its own: `RobustnessMonitor(likelihood="bernoulli")`.'
    if targets.ndim > 1 and not targets.is_floating_point():
        return (
            " If these are words at the positions of a text, with logits (N, T, V):"
            ' `RobustnessMonitor(likelihood="token")`.'
            " If every pixel has a class of its own:"
            ' `RobustnessMonitor(["hessian_trace", "weight_curvature_index"], loss_fn=nn.CrossEntropyLoss())`.'
        )
    return ""


def check_batch(pl_module: LightningModule, batch: Batch, rows: Sequence[int]) -> bool:
    """Check that a user's function returns the same outputs for the selected samples as for the whole batch.

    Costs up to three forward passes without gradients for a plain function, such as a lambda in a ``probe_fn``; nothing
    for modules.

    Args:
        pl_module: The module that is trained.
        batch: The whole batch, to which the function may be bound.
        rows: Numbers of the selected samples.

    Returns:
        Whether it could be checked: not where weights are spread over processes, or the function fails on the batch.

    Raises:
        ValueError: If the outputs depend on the place in the batch.
    """
    model = batch.options["model"]
    if not rows or isinstance(model, nn.Module | ByKeyword | FromEmbeddings):
        return True
    module = batch.options.get("module")
    if any(is_distributed(owner) for owner in (pl_module, module, owner_of(model)) if isinstance(owner, nn.Module)):
        return False
    probe = batch.probe()
    try:
        with muted_logging(pl_module), differentiable(pl_module):
            check_place(probe.network, probe.inputs, rows, module=module)
    except BoundToBatchError:
        raise
    except Exception:  # the function fails on the whole batch: the measurement will raise it again, with what to do
        return False
    return True


def _network(pl_module: LightningModule) -> nn.Module:
    """The module to call: its only child with weights, if it has no forward pass of its own."""
    if type(pl_module).forward is not LightningModule.forward or "forward" in vars(pl_module):
        return pl_module
    children = list(_children_with_weights(pl_module).values())
    return children[0] if len(children) == 1 else pl_module


def _children_with_weights(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}


def _samples(batch: object, takes: Arguments) -> Samples:
    """Find inputs and targets in a pair ``(x, y)``, or in a dictionary with customary keys."""
    entries, targets, target_key = batch, None, None
    paired = isinstance(batch, tuple | list) and len(batch) == 2
    if isinstance(batch, tuple | list) and paired:
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
                f"Expected a batch with one input, but several entries could be it: {shown}. Choose which is perturbed,"
                f" as in {_choice(entries, evident or keys, target_key, takes, paired=paired)}."
            )
        if evident and isinstance(targets, Tensor):
            return Samples(entries, evident[0], targets, target_key, paired)
    code = code_of_unread(batch, names=takes.positional, target_keys=_TARGET_KEYS)
    line = "`probe_fn=lambda module, batch: Probe(module, inputs, targets)`" if code is None else code.line()
    raise MisconfigurationException(
        "Expected batches `(inputs, targets)` of two tensors, or dictionaries with keys such as 'x' and 'y' or"
        f" 'image' and 'label', but got {_describe(batch)}. Pass {line}, with inputs and targets taken from your batch,"
        " or define `robustness_probe(self, batch)` on the LightningModule."
    )


def _choice(
    entries: Mapping[str, Any], keys: Sequence[str], target_key: str | None, takes: Arguments, *, paired: bool
) -> str:
    """The line that perturbs the first of several inputs, and passes on the others that the network takes."""
    first = takes.first if takes.first in keys else keys[0]
    samples = Samples(entries, str(first), entries[str(first)], target_key, paired)
    passed = [key for key in keys if key != first and takes.take(key)]
    passed += [key for key in takes.required if isinstance(entries.get(key), Tensor) and key not in (*keys, target_key)]
    return ProbeCode(
        samples.code(samples.key),
        "batch[1]" if target_key is None else samples.code(target_key),
        {name: samples.code(name) for name in passed},
        by_name=samples.key if takes.as_dictionary or takes.by_name(samples.key) else None,
        as_dictionary=takes.as_dictionary,
    ).line()


def _extras(samples: Samples, takes: Arguments) -> dict[str, Tensor]:
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


def _describe(batch: object) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with keys {[str(key) for key in batch]}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(type(item).__name__ for item in batch)})"
    return f"a {type(batch).__name__}"
