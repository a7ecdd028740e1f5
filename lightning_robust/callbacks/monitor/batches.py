"""How a batch of an ordinary LightningModule becomes a probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_robust.callbacks.monitor.muted_logging import muted_logging
from lightning_robust.functional._isolation.context import owner_of
from lightning_robust.functional.curvature.losses import LossFn
from lightning_robust.probe import Probe

_INPUT_KEYS = ("x", "input", "inputs", "image", "images", "img", "pixel_values", "data", "features")
_TARGET_KEYS = ("y", "target", "targets", "label", "labels")


def make_probe(
    pl_module: LightningModule,
    batch: object,
    *,
    probe_fn: Callable[[LightningModule, Any], Probe] | None,
    defaults: Mapping[str, Any],
) -> Probe:
    """Make a probe of a batch: by ``probe_fn``, else by the module's ``robustness_probe``, else by customary keys.

    Args:
        pl_module: The module that is trained.
        batch: What its loader yields.
        probe_fn: Given by the user, or None.
        defaults: Options of the probe, for those that it leaves open.

    Raises:
        MisconfigurationException: If no probe comes of it.
    """
    method = getattr(pl_module, "robustness_probe", None)
    if probe_fn is not None:
        with muted_logging(pl_module):
            probe = probe_fn(pl_module, batch)
    elif callable(method):
        with muted_logging(pl_module):
            probe = method(batch)
    else:
        probe = _default_probe(pl_module, batch, defaults.get("loss_fn"))
    if not isinstance(probe, Probe):
        raise MisconfigurationException(
            f"Expected `probe_fn` to return a Probe(model, inputs, targets), but got {type(probe).__name__}."
        )
    if probe.module is None and owner_of(probe.model) is None:
        probe = replace(probe, module=pl_module)
    return replace(probe, **{name: value for name, value in defaults.items() if getattr(probe, name) is None})


def _default_probe(pl_module: LightningModule, batch: object, loss_fn: LossFn | None) -> Probe:
    """The module's ``forward`` on a batch ``(x, y)``, or on a dictionary with customary keys."""
    inputs, targets = None, None
    if isinstance(batch, Mapping):
        inputs = next((batch[key] for key in _INPUT_KEYS if key in batch), None)
        targets = next((batch[key] for key in _TARGET_KEYS if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, targets = batch
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
        raise MisconfigurationException(
            "Expected batches `(inputs, targets)` of two tensors, or dictionaries with keys such as 'x' and 'y' or"
            f" 'image' and 'label', but got {_describe(batch)}. Pass `probe_fn=lambda pl_module, batch:"
            " Probe(pl_module, inputs, targets)` with inputs and targets taken from your batch, or define"
            " `robustness_probe(self, batch)` on the LightningModule."
        )
    return Probe(pl_module, inputs, targets, loss_fn=loss_fn)


def _describe(batch: object) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with keys {[str(key) for key in batch]}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(type(item).__name__ for item in batch)})"
    return f"a {type(batch).__name__}"
