"""Reads batches of ordinary LightningModules as probes, and copies, compares and joins these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_robust.callbacks.monitor.muted_logging import muted_logging
from lightning_robust.functional._isolation.context import owner_of
from lightning_robust.functional._validation.arguments import as_number, as_numbers
from lightning_robust.probe import Probe

_INPUT_KEYS = ("x", "input", "inputs", "image", "images", "img", "pixel_values", "data", "features")
_TARGET_KEYS = ("y", "target", "targets", "label", "labels")


def read_batch(
    pl_module: LightningModule,
    batch: object,
    *,
    probe_fn: Callable[[LightningModule, Any], Probe] | None,
    defaults: Mapping[str, Any],
) -> Probe:
    """Read a batch by ``probe_fn``, else by the module's ``robustness_probe``, else by customary keys.

    Args:
        pl_module: The module that is trained.
        batch: What its loader yields.
        probe_fn: The user's function, or None.
        defaults: Options for the probe, where the user's own probe leaves them open.

    Raises:
        MisconfigurationException: If the batch cannot be read, or ``probe_fn`` returns no probe.
    """
    method = getattr(pl_module, "robustness_probe", None)
    if probe_fn is None and not callable(method):
        return Probe(pl_module, *_inputs_and_targets(batch), **defaults)
    with muted_logging(pl_module):
        probe: object = probe_fn(pl_module, batch) if probe_fn is not None else method(batch)  # type: ignore[misc]
    if not isinstance(probe, Probe):
        raise MisconfigurationException(
            f"Expected `probe_fn` to return a Probe(model, inputs, targets), but got {type(probe).__name__}."
        )
    options = {name: value for name, value in defaults.items() if getattr(probe, name) is None}
    if probe.module is None and owner_of(probe.model) is None:
        options["module"] = pl_module
    return replace(probe, **options)


def copied(probe: Probe, rows: Sequence[int]) -> Probe:
    """Copy some samples, so that later changes of the batch do not reach them."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach()[torch.tensor(rows, dtype=torch.long, device=tensor.device)]

    return replace(probe, inputs=copy(probe.inputs), targets=copy(probe.targets))


def match(a: Probe, b: Probe) -> bool:
    """Whether the samples of both can pass through the network together."""
    names = [field.name for field in fields(a) if field.init and field.name not in ("inputs", "targets")]
    return all(_same(name, getattr(a, name), getattr(b, name)) for name in names) and all(
        x.shape[1:] == y.shape[1:] and x.dtype == y.dtype for x, y in ((a.inputs, b.inputs), (a.targets, b.targets))
    )


def joined(parts: Sequence[Probe]) -> Probe:
    """The samples of probes that match, in order."""
    if len(parts) == 1:
        return parts[0]
    inputs, targets = (torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets"))
    return replace(parts[0], inputs=inputs, targets=targets)


def _same(name: str, a: object, b: object) -> bool:
    if a is None or b is None or name not in ("input_std", "input_mean"):
        return a is b or bool(a == b)
    one, other = (as_numbers(constant) or [as_number(constant)] for constant in (a, b))  # lists, tensors or numbers
    return one == other


def _inputs_and_targets(batch: object) -> tuple[Tensor, Tensor]:
    """Find them in a pair ``(x, y)``, or in a dictionary with customary keys."""
    inputs, targets = None, None
    if isinstance(batch, Mapping):
        inputs = next((batch[key] for key in _INPUT_KEYS if key in batch), None)
        targets = next((batch[key] for key in _TARGET_KEYS if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = batch
    if isinstance(inputs, Tensor) and isinstance(targets, Tensor):
        return inputs, targets
    raise MisconfigurationException(
        "Expected batches `(inputs, targets)` of two tensors, or dictionaries with keys such as 'x' and 'y' or"
        f" 'image' and 'label', but got {_describe(batch)}. Pass `probe_fn=lambda pl_module, batch:"
        " Probe(pl_module, inputs, targets)` with inputs and targets taken from your batch, or define"
        " `robustness_probe(self, batch)` on the LightningModule."
    )


def _describe(batch: object) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with keys {[str(key) for key in batch]}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(type(item).__name__ for item in batch)})"
    return f"a {type(batch).__name__}"
