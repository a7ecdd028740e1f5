"""Compares what the user's validation step computes with what is measured, on a few samples of one batch per run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_robust.callbacks.monitor.batches import Batch
from lightning_robust.callbacks.monitor.probe_code import ProbeCode
from lightning_robust.callbacks.monitor.step_calls import Call, Calls, Listener, Rows, partners, takes_hooks

_FEW = 8  # samples that are compared
# The step may run in half precision, which rounds to 0.4 %; what differs on purpose differs by more.
_INPUT_TOLERANCE, _OUTPUT_TOLERANCE = 0.02, 0.1
_SAME = 1e-3  # of outputs: inputs of another shape that give them hold the same
OF_THE_STEP = "`validation_step`"  # begins the sentences about what differs


class LeftOut(NamedTuple):
    """The last child that the step calls, if the measured network does not call it. It may be the classifier.

    Attributes:
        name: Of the child.
        width: How many numbers it returns per sample.
        measured: How many numbers what is measured returns; None if these are not numbers per class.
        takes_more: Whether it takes more than one tensor, as losses take targets.
        code: How the batch was read.
        plausible: Whether it may be the classifier, as far as is known.
    """

    name: str
    width: int
    measured: int | None
    takes_more: bool
    code: ProbeCode
    plausible: bool = True

    def sentence(self) -> str:
        """Warn that the classifier is not measured."""
        line = self.code.line(network=f"lambda x: module.{self.name}(module(x))", more="module=module")
        return (
            f"{OF_THE_STEP} goes on after what RobustnessMonitor measures: it calls `{self.name}`, too, which returns"
            f" {self.width} numbers per sample. If these are the logits, the numbers are about something else. Then"
            f" say what is to be measured: {line}."
        )

    def may_classify(self, targets: Sequence[object]) -> bool:
        """Whether it fits the classes of the targets better than the measured outputs do."""
        classes = [target for target in targets if isinstance(target, int)]
        if not classes or len(classes) < len(targets):
            return False  # soft ones
        num_classes = max(classes) + 1  # at least

        def fits(width: int) -> bool:
            return width >= num_classes or (width == 1 and num_classes <= 2)

        if not fits(self.width) or (self.measured is not None and self.takes_more and fits(self.measured)):
            return False
        if self.measured is None or not fits(self.measured):
            return True
        return self.width <= self.measured and (self.width == num_classes or self.measured != num_classes)


class ValidationWitness:
    """Listens to a module, and to its direct children, while the user's own validation step calls them.

    Containers that are never called themselves (``nn.ModuleList``, ``nn.ModuleDict``) pass it on to their children. A
    module compiled by Lightning is left alone: a hook would compile it anew.

    Args:
        pl_module: The module that is trained.
        samples: What was read from the batch that the step sees next.
    """

    def __init__(self, pl_module: LightningModule, samples: Batch) -> None:
        self._code = samples.code or ProbeCode()
        compiled = getattr(pl_module, "_compiler_ctx", None)
        self._modules: dict[str, nn.Module] = {"": pl_module, **({} if compiled else dict(_children(pl_module)))}
        trainer = pl_module._trainer
        self._is_wrapped = trainer is not None and trainer.strategy.model is not pl_module
        few = min(_FEW, len(samples))
        self._samples = samples.copied([len(samples) * number // few for number in range(few)])
        self._batch = [Rows.of(tensor) for tensor in (samples.inputs, *samples.extras.values())]
        self._listener = Listener(self._modules)

    def stop(self) -> None:
        """Stop listening."""
        self._listener.stop()

    def compare(self) -> str | LeftOut | None:
        """Run the measured network on the same samples.

        Returns:
            A warning if the step has computed something else; or a child that the measured network may lack.
        """
        self.stop()
        in_step = self._heard(self._listener)
        if self._is_wrapped and "" in in_step.of:
            # Lightning runs the step itself as the forward pass of the module, so that it passes through the wrapper
            in_step.of[""].pop()
            in_step.of = {name: calls for name, calls in in_step.of.items() if calls}
        if not in_step.of:
            return None
        probe = self._samples.probe()
        listener = Listener(self._modules)
        try:
            outputs = probe.outputs(probe.inputs)
        finally:
            listener.stop()
        measured = self._heard(listener)
        # where the step calls the module itself, what it passes to children is no news
        names = [""] if "" in in_step.of and "" in measured.of else [name for name in in_step.of if name in measured.of]
        sentences = (self._difference(name, in_step, measured.of[name][0]) for name in names)
        return next(filter(None, sentences), None) or self._left_out(in_step, measured, outputs)

    def _heard(self, listener: Listener) -> Calls:
        if listener.calls.error is not None:
            raise listener.calls.error
        return listener.calls

    def _left_out(self, in_step: Calls, measured: Calls, outputs: Tensor) -> LeftOut | None:
        """The step ends with a child that has weights, and that what is measured leaves out."""
        last = next(reversed([name for name in in_step.of if name]), None)
        if last is None or last in measured.of:
            return None
        call = in_step.of[last][0]
        returned = next(iter(call.outputs.values()), None)
        if returned is None or len(returned.shape) != 2:
            return None
        columns = outputs.shape[1] if outputs.ndim == 2 else None
        return LeftOut(last, returned.shape[1], columns, len(call.inputs) > 1, self._code)

    def _difference(self, name: str, in_step: Calls, measured: Call) -> str | None:
        calls, whole = [call for call in in_step.of[name] if _has_rows(call)], not name
        wanted = self._identifying(measured.inputs)
        if not wanted or not calls:
            return None
        found = torch.zeros(len(measured.inputs[wanted[0]].values), dtype=torch.bool)
        agree, matched = found.clone(), []
        for call in calls:
            same = _same_inputs(wanted, measured, call)
            if same is not None:
                matched += [call] if same.any() else []
                found |= same.any(dim=1)
                agree |= (same & _same_outputs(measured, call, same.shape, whole=whole)).any(dim=1)
        if found.any():  # samples that are nearly equal may be taken for each other, so a few say nothing
            return self._of_outputs(name, measured, matched) if 2 * int(agree.sum()) < int(found.sum()) else None
        seen = [rows for call in calls for rows in partners(wanted[0], measured.inputs, call.inputs)]
        other_shape = not seen and whole and not _reshaped(wanted[0], measured, calls)
        if name in in_step.cut or not (seen or other_shape) or any(map(self._is_in_batch, seen)):
            return None
        passed = seen or list(calls[0].inputs.values())
        return self._of_inputs(name, measured.inputs[wanted[0]], passed[0])

    def _is_in_batch(self, passed: Rows) -> bool:
        """Whether these rows belong to the batch, but not to the compared samples: the step filters its batch."""
        few = Rows(passed.shape, passed.values[:_FEW])
        found = [few.equal(rows, tolerance=_INPUT_TOLERANCE) for rows in self._batch if few.comparable(rows)]
        return any(bool(each.any(dim=1).all()) for each in found)

    def _identifying(self, inputs: dict[str, Rows]) -> list[str]:
        """Names of the tensors by which samples are found: the measured inputs; else all that are not masks."""
        rows = Rows.of(self._samples.inputs)
        are_inputs = [n for n, found in inputs.items() if found.shape == rows.shape and _identical(found, rows)]
        if are_inputs:
            return are_inputs[:1]
        many = [n for n, found in inputs.items() if len(torch.unique(found.values)) > 2] or list(inputs)
        return [n for n in many if len(inputs[n].values) == len(inputs[many[0]].values)]

    def _of_inputs(self, name: str, measured: Rows, passed: Rows) -> str:
        called = f"`{name}`" if name else "the module"
        model = f"module.{name}" if name else "module"
        sentence = (
            f"{OF_THE_STEP} does not call {called} on the inputs that RobustnessMonitor measures: it passes"
            f" {_shown(passed)}, and the monitor {_shown(measured)}. So every number is about other inputs than the"
            " accuracy beside it."
        )
        if not measured.values.is_floating_point():
            return f"{sentence} If the step changes them, move that into `forward` or into the data."
        line = self._code.line(network=model, inputs="normalise({})", more="input_mean=…, input_std=…")
        return (
            f"{sentence} If the step normalises them, move that into `forward` or into the data. Or say what is to be"
            f" measured: {line}."
        )

    def _of_outputs(self, name: str, measured: Call, matched: Sequence[Call]) -> str:
        called = f"`{name}`" if name else "the module"
        model = f"module.{name}" if name else "module"
        sentence = (
            f"{OF_THE_STEP} gets other outputs from {called} than RobustnessMonitor does on the same inputs, so the"
            " numbers are not about what is validated."
        )
        passed = frozenset[str]().union(*(call.arguments for call in matched))
        needless, missing = measured.arguments - passed, sorted(passed - measured.arguments)
        if needless & self._samples.extras.keys():
            names = " and ".join(f"`{extra}`" for extra in sorted(needless))
            line = self._code.line(network=model, without=needless)
            return (
                f"{sentence} The monitor passes {names} from the batch, because `forward` takes that, but the step"
                f" does not. If the step is right, leave it out: {line}."
            )
        if missing:
            given = ", ".join(f"{argument}=…" for argument in missing)
            constant = self._code.line(network=f"lambda x: {model}(x, {given})", more="module=module")
            line = self._code.line(network=model, more=f"extras={{{missing[0]!r}: …}}")
            return (
                f"{sentence} The step also passes {' and '.join(f'`{argument}`' for argument in missing)}. So should"
                f" the monitor: {constant}, or, for tensors with a row per sample, {line}."
            )
        line = self._code.line(network=model, more="extras={'name': …}")
        return (
            f"{sentence} Does the step pass other values of further arguments, or put layers into train mode? Say what"
            f" is to be measured: {line}."
        )


def _children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Direct children with weights, by the expression behind ``module.``; of containers, those inside."""
    for name, child in module.named_children():
        index = name if isinstance(module, nn.ModuleList) else repr(name)
        path = f"{prefix}[{index}]" if prefix and isinstance(module, nn.ModuleList | nn.ModuleDict) else name
        path = f"{prefix}.{name}" if prefix and path == name else path
        if not takes_hooks(child) or not any(True for _ in child.parameters()):
            continue
        if type(child).forward is nn.Module.forward and "forward" not in vars(child):
            yield from _children(child, path)
        else:
            yield path, child


def _has_rows(call: Call) -> bool:
    return any(len(rows.values) for rows in call.inputs.values())


def _identical(rows: Rows, others: Rows) -> bool:
    return torch.equal(rows.values.cpu().double(), others.values.cpu().double())


def _same_inputs(wanted: Sequence[str], measured: Call, call: Call) -> Tensor | None:
    """Which rows of the measured call are which of another (n, m); None where their shapes do not allow it."""
    same = None
    for name in wanted:
        rows = measured.inputs[name]
        each = [rows.equal(found, tolerance=_INPUT_TOLERANCE) for found in partners(name, measured.inputs, call.inputs)]
        each = [found for found in each if same is None or found.shape == same.shape]
        if not each:
            return None
        either = torch.stack(each).any(dim=0) if len({found.shape for found in each}) == 1 else each[0]
        same = either if same is None else same & either
    return same


def _same_outputs(measured: Call, call: Call, shape: torch.Size, *, whole: bool) -> Tensor:
    """Which rows of the measured outputs agree with which of another call, of a shape (n, m), or (1, 1) for all.

    Inside a network the first dimension need not be that of samples: other shapes tell only about the ``whole``.
    """
    alike = []
    for name, rows in measured.outputs.items():
        found = partners(name, measured.outputs, call.outputs)
        each = [rows.equal(others, tolerance=_OUTPUT_TOLERANCE) for others in found]
        matches = [match for match in each if match.shape == shape]
        alike += [torch.stack(matches).any(dim=0)] if matches else []
    return torch.stack(alike).all(dim=0) if alike else torch.tensor([[not (whole and call.outputs)]])


def _reshaped(wanted: str, measured: Call, calls: Sequence[Call]) -> bool:
    """Whether the step gets the same outputs from inputs of another shape, no larger: flattened, without padding."""
    size = measured.inputs[wanted].shape[1:].numel()
    smaller = [c for c in calls if any(rows.shape[1:].numel() <= size for rows in c.inputs.values())]
    for name, rows in measured.outputs.items():
        found = [each for call in smaller for each in partners(name, measured.outputs, call.outputs)]
        same = [rows.equal(each, tolerance=_SAME).any(dim=1) for each in found]
        if same and bool(torch.stack(same).any(dim=0).all()):
            return True
    return False


def _shown(rows: Rows) -> str:
    shape = "×".join(map(str, rows.shape[1:]))
    low, high = (float(end(rows.values.double().cpu())) for end in (torch.min, torch.max))
    return f"{shape or 'single'} values from {low:.3g} to {high:.3g}"
