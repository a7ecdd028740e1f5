"""Reads batches of ordinary LightningModules: inputs, targets, and the options of a probe of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from lightning_robust.callbacks.monitor.muted_logging import muted_logging
from lightning_robust.functional._isolation.context import owner_of
from lightning_robust.functional._isolation.side_effects import side_effects_reverted
from lightning_robust.functional._isolation.stand_ins import plain_tensor
from lightning_robust.functional._validation.arguments import as_number, as_numbers
from lightning_robust.probe import Probe, check_samples

_INPUT_KEYS = ("x", "input", "inputs", "image", "images", "img", "pixel_values", "data", "features")
_TARGET_KEYS = ("y", "target", "targets", "label", "labels")


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples, and the other arguments of a probe of them.

    Attributes:
        inputs: ``(N, ...)``.
        targets: ``(N, ...)``.
        options: The other arguments of :class:`~lightning_robust.Probe`, ``model`` among them.
    """

    inputs: Tensor
    targets: Tensor
    options: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: slice) -> Batch:
        """Some of the samples, without a copy."""
        return Batch(self.inputs[rows], self.targets[rows], self.options)

    def copied(self, rows: Sequence[int]) -> Batch:
        """Copy some samples, so that later changes of the batch do not reach them."""

        def copy(tensor: Tensor) -> Tensor:
            return plain_tensor(tensor.detach())[torch.tensor(rows, dtype=torch.long, device=tensor.device)]

        return Batch(copy(self.inputs), copy(self.targets), self.options)

    def matches(self, other: Batch) -> bool:
        """Whether the samples of both can pass through the network together."""
        return (
            self.options.keys() == other.options.keys()
            and all(_same(key, value, other.options[key]) for key, value in self.options.items())
            and all(
                a.shape[1:] == b.shape[1:] and a.dtype == b.dtype
                for a, b in ((self.inputs, other.inputs), (self.targets, other.targets))
            )
        )

    def probe(self) -> Probe:
        """A probe of all samples."""
        return Probe(inputs=self.inputs, targets=self.targets, **self.options)

    @staticmethod
    def joined(parts: Sequence[Batch]) -> Batch:
        """The samples of batches that match, in order."""
        if len(parts) == 1:
            return parts[0]
        inputs, targets = (torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets"))
        return Batch(inputs, targets, parts[0].options)


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
        defaults: Options for the probe, where the user's own probe leaves them open.

    Raises:
        MisconfigurationException: If the batch cannot be read, or ``probe_fn`` returns no probe.
    """
    method = getattr(pl_module, "robustness_probe", None)
    if probe_fn is None and not callable(method):
        inputs, targets = _inputs_and_targets(batch)
        check_samples(inputs, targets, loss_fn=defaults.get("loss_fn"))
        return Batch(inputs, targets, {"model": pl_module, **defaults})
    metrics = [inner for module in pl_module.modules() if isinstance(module, Metric) for inner in module.modules()]
    with muted_logging(pl_module), side_effects_reverted(metrics):
        probe: object = probe_fn(pl_module, batch) if probe_fn is not None else method(batch)  # type: ignore[misc]
    if not isinstance(probe, Probe):
        raise MisconfigurationException(
            f"Expected `probe_fn` to return a Probe(model, inputs, targets), but got {type(probe).__name__}."
        )
    options = {field.name: getattr(probe, field.name) for field in fields(probe) if field.init}
    inputs, targets = options.pop("inputs"), options.pop("targets")
    if probe.module is None and owner_of(probe.model) is None:
        options["module"] = pl_module
    options |= {name: value for name, value in defaults.items() if options[name] is None}
    return Batch(inputs, targets, options)


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
