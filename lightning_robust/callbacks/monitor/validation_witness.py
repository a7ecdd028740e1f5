"""Compares what the user's validation step computes with what is measured, on a few samples of one batch per run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_robust.callbacks.monitor.batches import Batch
from lightning_robust.functional._isolation.stand_ins import plain_tensor
from lightning_robust.functional._validation.scales import magnitudes
from lightning_robust.metrics.keys import is_plain_accuracy

_FEW = 8  # samples that are compared
_CALLS = 8  # of one module in one step that are remembered
# The step may run in half precision, which rounds to 0.4 %; what differs on purpose differs by more.
_INPUT_TOLERANCE, _OUTPUT_TOLERANCE = 0.02, 0.1
OF_THE_STEP = "`validation_step`"  # begins the sentences about what differs
_REMEDY = "Say what is to be measured: `probe_fn=lambda module, batch: Probe("


def other_accuracy(logged: Mapping[str, float], clean: float, *, num_samples: int) -> str | None:
    """Compare the accuracy of the measured samples with the accuracies that the module has logged.

    Args:
        logged: What the module logged in this validation, by key.
        clean: Share of the measured samples that is classified correctly.
        num_samples: How many these are.

    Returns:
        A sentence if the module logs an accuracy, and none of them agrees within four standard errors.
    """
    found = {key: value for key, value in logged.items() if is_plain_accuracy(key) and 0 <= value <= 100}
    shares = {key: value / 100 if value > 1 else value for key, value in found.items()}

    def agrees(share: float) -> bool:
        middle = (share + clean) / 2
        return abs(share - clean) <= 4 * math.sqrt(middle * (1 - middle) / num_samples) + 0.02

    if not shares or any(map(agrees, shares.values())):
        return None
    key, value = next(iter(shares.items()))
    return (
        f"The module logs `{key}` {value:.3g}, but of the {num_samples} samples that RobustnessMonitor measures, the"
        f" network classifies {clean:.3g} correctly, so the numbers are not about what is validated. Does"
        " `validation_step` prepare its inputs, or go on after `forward`? (Averages over classes differ without harm.)"
        f" {_REMEDY}lambda x: module.head(module(x)), prepare(batch[0]), batch[1], module=module)`."
    )


class _Call(NamedTuple):
    """First rows of what a module saw and gave; None where it is no tensor with rows."""

    inputs: Tensor | None
    outputs: Tensor | None


class ValidationWitness:
    """Listens to a module, and to its direct children, while the user's own validation step calls them.

    Modules that are compiled are left alone: a hook would compile them anew.
    """

    def __init__(self, pl_module: LightningModule, batch: Batch) -> None:
        children = {} if getattr(pl_module, "_compiler_ctx", None) else dict(pl_module.named_children())
        with_weights = {name: child for name, child in children.items() if any(True for _ in child.parameters())}
        self._modules: dict[str, nn.Module] = {"": pl_module, **with_weights}
        self._batch = batch.copied(range(min(_FEW, len(batch))))
        self._handles: list[RemovableHandle] = []
        self._in_step = self._listen()

    def _listen(self) -> dict[str, list[_Call]]:
        """Hook the modules; the dictionary fills in the order of first calls."""
        calls: dict[str, list[_Call]] = {}

        def note(name: str, inputs: object, outputs: object) -> None:
            known = calls.setdefault(name, [])
            if len(known) < _CALLS:
                known.append(_Call(_first_rows(inputs), _first_rows(outputs)))

        for name, module in self._modules.items():
            if not hasattr(module, "_orig_mod"):
                self._handles.append(
                    module.register_forward_hook(
                        lambda _, args, kwargs, outputs, name=name: note(name, (args, kwargs), outputs),
                        with_kwargs=True,
                    )
                )
        return calls

    def stop(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def discrepancy(self) -> str | None:
        """Show the same samples to what is measured; a sentence if that is not what the step has computed."""
        self.stop()
        if not self._in_step:
            return None
        probe = self._batch.probe()
        measured = self._listen()
        try:
            probe.outputs(probe.inputs)
        finally:
            self.stop()
        # where the step calls the module itself, what it passes to children is no news
        names = [""] if "" in self._in_step and "" in measured else [n for n in self._in_step if n in measured]
        sentences = (_difference(name, self._in_step[name], measured[name][0]) for name in names)
        return next(filter(None, sentences), None) or self._left_out(measured)

    def _left_out(self, measured: Mapping[str, object]) -> str | None:
        """The step ends with a child that has weights, and that what is measured leaves out."""
        last = next(reversed([name for name in self._in_step if name]), None)
        if last is None or last in measured:
            return None
        outputs = self._in_step[last][0].outputs
        if outputs is None or outputs.ndim != 2:
            return None
        return (
            f"{OF_THE_STEP} goes on after what RobustnessMonitor measures: it calls `{last}`, too, which returns"
            f" {outputs.shape[1]} numbers per sample. If these are the logits, the numbers are about something else."
            f" {_REMEDY}lambda x: module.{last}(module(x)), batch[0], batch[1], module=module)`."
        )


def _difference(name: str, in_step: list[_Call], measured: _Call) -> str | None:
    called = f"`{name}`" if name else "the module"
    same = [call for call in in_step if not _differ(call.inputs, measured.inputs, _INPUT_TOLERANCE, whole=not name)]
    if not same:
        return (
            f"{OF_THE_STEP} does not call {called} on the inputs that RobustnessMonitor measures: it passes"
            f" {_shown(in_step[0].inputs)}, and the monitor {_shown(measured.inputs)}. So every number is about other"
            " inputs than the accuracy beside it. If the step normalises them, move that into `forward` or into the"
            f" data. {_REMEDY}module, normalise(batch[0]), batch[1], input_mean=…, input_std=…)`."
        )
    if all(_differ(call.outputs, measured.outputs, _OUTPUT_TOLERANCE, whole=not name) for call in same):
        return (
            f"{OF_THE_STEP} gets other outputs from {called} than RobustnessMonitor does on the same inputs, so the"
            f" numbers are not about what is validated. Does the step pass further arguments? {_REMEDY}module,"
            " batch[0], batch[1], extras={'name': …})`."
        )
    return None


def _first_rows(value: object) -> Tensor | None:
    """Copies of the first rows of the first tensor inside."""
    found = next(_tensors(value), None)
    return None if found is None else plain_tensor(found.detach())[:_FEW].clone()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.ndim > 0 and not value.is_complex():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _differ(a: Tensor | None, b: Tensor | None, tolerance: float, *, whole: bool) -> bool:
    """Whether rows of the same samples differ by more than the precision of the step explains.

    Inside a network the first dimension need not be that of samples: other shapes tell only about the ``whole``.
    """
    if a is None or b is None:
        return False
    if a.shape != b.shape:
        return whole
    finite = a.isfinite() & b.isfinite()
    a, b = (values.double().masked_fill(~finite, 0) for values in (a, b))
    if not a.numel():
        return False
    return bool(((a - b).abs() > tolerance * torch.maximum(magnitudes(a), magnitudes(b))).any())


def _shown(inputs: Tensor | None) -> str:
    assert inputs is not None  # or they would not differ
    shape = "×".join(map(str, inputs.shape[1:]))
    return f"{shape or 'single'} values from {float(inputs.min()):.3g} to {float(inputs.max()):.3g}"
