"""Warnings of the monitor: anything that makes numbers mean something else than they seem to, with the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from lightning_robust.callbacks.monitor.overhead import Overhead
from lightning_robust.callbacks.monitor.sample_selection import LoaderShare
from lightning_robust.callbacks.monitor.status import WHOLE, Failure
from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.side_effects import watched_once
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.tensors import check_inputs, outputs_of
from lightning_robust.metrics import ProbeMetric
from lightning_robust.probe import Probe

_MANY_CLASSES = 200
_FEW_POINTS = 5  # measurements; fewer hardly make a curve
_EXAMINED = 8  # samples
SHUFFLES = (
    "The validation loader shuffles, so RobustnessMonitor measures different samples each time, and its curves carry"
    " that noise. Pass `shuffle=False` to the validation DataLoader."
)
UNSHARED = (
    "Each process sees different validation samples, but not through a `DistributedSampler`, so RobustnessMonitor"
    " cannot tell whether processes share samples. Each of n processes measures one in n of the samples that it would"
    " measure alone: fewer than `max_samples` in all, and some perhaps twice. To avoid this, let Lightning distribute"
    " the samples with `Trainer(use_distributed_sampler=True)`."
)
OTHER_SAMPLES = (
    "The validation loader yields other samples than at the last measurement, so the curves of RobustnessMonitor carry"
    " that noise. Use a loader that yields the same samples in the same order every time."
)


def obstacle(trainer: Trainer) -> str | None:
    """The reason why a run cannot be measured, if there is one."""
    if trainer.barebones:
        return "`Trainer(barebones=True)` logs nothing, so RobustnessMonitor measures nothing. Drop `barebones=True`."
    strategy, spread = trainer.strategy, None
    if isinstance(strategy, DeepSpeedStrategy | FSDPStrategy):
        spread = type(strategy).__name__
    elif isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
        spread = "tensor parallelism"
    if spread is None:
        return None
    return (
        f"RobustnessMonitor measures nothing under {spread}, which spreads the weights over processes in a way that it"
        " cannot undo. Use `DDPStrategy`, or `ModelParallelStrategy(tensor_parallel_size=1)` with"
        " `torch.distributed.fsdp.fully_shard` in `configure_model`."
    )


def no_such_loader(dataloader_idx: int, *, num_loaders: int) -> str:
    """The loader to measure on does not exist."""
    return (
        f"RobustnessMonitor was told to measure on `dataloader_idx={dataloader_idx}`, but there are {num_loaders}"
        f" loaders, so nothing is measured. Pass an index below {num_loaders}."
    )


def out_of_memory(samples_at_once: int) -> str:
    """Memory ran out, and fewer samples pass at once from now on."""
    return (
        f"RobustnessMonitor ran out of memory, and from now on measures at most {samples_at_once} samples at once. The"
        f" numbers stay the same, but take longer. Pass `chunk_size={samples_at_once}` to avoid the failed attempt."
    )


def before_fit(trainer: Trainer, *, prefix: str, every_n_epochs: int, budget: float | None) -> list[str]:
    """Nothing will ever be measured, or EarlyStopping will count validations without a measurement."""
    if sentence := obstacle(trainer):
        return [sentence]
    if not trainer.enable_validation:
        return [
            "RobustnessMonitor measures inside the validation loop, but this run has none, so nothing will be"
            " measured. Define `validation_step` and a validation dataloader, with `limit_val_batches` above 0."
        ]
    if every_n_epochs == 1 and budget is None:
        return []
    when = f"every {every_n_epochs} epochs" if budget is None else "as often as the budget allows"
    return [
        f"EarlyStopping follows `{callback.monitor}`, which is measured {when}. Its `patience` counts validations, and"
        " a validation without a measurement counts as no improvement. `RobustnessDriftStopping` counts measurements."
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if type(callback) is EarlyStopping and callback.monitor.startswith(prefix)
    ]


def hardly_a_curve(overhead: Overhead, *, budget: float) -> list[str]:
    """A budget of time has left few measurements."""
    made, due = overhead.made, overhead.made + overhead.left_out
    if made >= _FEW_POINTS:
        return []
    return [
        f"RobustnessMonitor made {made} of {due} measurements within `overhead_budget={budget:g}`; the last one took"
        f" {overhead.times.cost:.2g} s. So few points hardly make a curve: lower `max_samples`, measure fewer `metrics`"
        " or raise the budget."
    ]


def on_loader(share: LoaderShare, *, max_samples: int) -> list[str]:
    """The subset cannot be fixed beforehand, or changes."""
    sentences = [] if share.size is not None else [reservoir(max_samples)]
    return [*sentences, SHUFFLES] if share.shuffled else sentences


def reservoir(max_samples: int) -> str:
    """The loader does not tell how many samples it yields."""
    return (
        "RobustnessMonitor cannot tell beforehand how many samples the validation loader yields, so it measures a"
        f" uniformly random subset of {max_samples} (reservoir sampling). The subset stays the same only while the"
        " loader yields the same samples in the same order. To be safe, use a loader with a length whose batches hold"
        " `batch_size` samples each."
    )


def not_finite(values: Mapping[str, float], *, prefix: str) -> list[str]:
    """Values that are not logged."""
    return [
        f"`{prefix}{key}` is not finite, so it is not logged. Its curve has gaps wherever this happens."
        for key, value in values.items()
        if not math.isfinite(value)
    ]


def on_values(metrics: Iterable[ProbeMetric], values: Mapping[str, float], *, prefix: str) -> list[str]:
    """The caveats of metrics about their values, which are keyed without the prefix."""
    caveats = {key: caveat for metric in metrics for key, caveat in metric.caveats(values).items()}
    return [f"`{prefix}{key}` {caveat}" for key, caveat in caveats.items()]


def skipped(failures: Mapping[int, Failure], names: Mapping[int, str], *, epoch: int) -> str:
    """What was not measured and why, by the index of the metric or ``WHOLE``; ``names`` are those of all metrics."""
    if WHOLE in failures or failures.keys() >= names.keys():
        what = f"the measurement in epoch {epoch}: {_ended(failures[min(failures)].message)}"
    else:
        by_message: dict[str, list[str]] = {}
        for number, failure in sorted(failures.items()):
            by_message.setdefault(_ended(failure.message), []).append(names[number])
        parts = [f"{' and '.join(metrics)}: {message}" for message, metrics in by_message.items()]
        what = f"in epoch {epoch} {' '.join(parts)}"
    raised = any(failure.kind == "raised" for failure in failures.values())
    hint = " If the module is not called as `pl_module(inputs)`, pass `probe_fn`." if raised else ""
    return f"RobustnessMonitor skipped {what} The run goes on.{hint} `on_error='raise'` stops with a traceback instead."


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith(("?", "!")) else f"{sentence.rstrip('.')}."


def on_probe(probe: Probe) -> list[str]:
    """Check, on the first samples of a run, what must be true for the numbers to mean anything.

    Costs three forward passes and a backward pass of up to eight samples.

    Returns:
        One sentence for each flaw: outputs that are probabilities, or random; samples that influence each other's
        outputs; very many classes; inputs in other units than the options say.

    Raises:
        ValueError: If no gradient leads from the outputs to the inputs on which they depend.
    """
    check_inputs(probe.inputs)
    x = full_precision(probe.inputs[:_EXAMINED])
    with differentiable(probe.model):
        leaf = x.clone().requires_grad_()
        outputs = outputs_of(probe.model, leaf)
        has_gradient = outputs.requires_grad and _has_gradient(outputs, leaf)
        with torch.no_grad():  # in the same context: a network that remembers its last pass shows it
            again = outputs_of(probe.model, x)
    sentences = _about_model(probe, x, outputs.detach(), again, has_gradient=has_gradient)
    return [*sentences, *_about_classes(outputs), *_about_units(probe)]


def _has_gradient(outputs: Tensor, leaf: Tensor) -> bool:
    """Whether any gradient of the outputs differs from zero."""
    # random weights: outputs that always add up to the same have a gradient, too
    weights = torch.rand(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
    with watched_once():
        (gradient,) = torch.autograd.grad((weights * outputs).sum(), leaf, materialize_grads=True)
    return bool(gradient.any())


def _about_model(probe: Probe, x: Tensor, outputs: Tensor, again: Tensor, *, has_gradient: bool) -> list[str]:
    are_logits = outputs.ndim == 2 and outputs.shape[1] > 1
    flaws = []
    if are_logits and outputs.min() >= 0 and torch.allclose(outputs.sum(dim=1), outputs.new_ones(()), atol=1e-3):
        flaws.append(
            "The model returns probabilities (non-negative rows that sum to 1), but logits are expected: softmax would"
            " be applied twice and every number is wrong. Return the values before softmax."
        )
    tolerance = 1e-4 * outputs.abs().max()
    if (again - outputs).abs().max() > tolerance:
        flaws.append(
            "The model returns other outputs when it is called twice on the same inputs, even in eval mode, so the"
            " numbers are partly noise. Look for random layers that ignore eval mode, such as `F.dropout(x)` without"
            " `training=self.training`."
        )
        return flaws
    disturbed = x.clone()
    disturbed[0] = x[-1]  # another sample rather than noise: some networks refuse inputs that are out of range
    moves = (probe.outputs(disturbed) - outputs).abs().reshape(len(x), -1).amax(dim=1) > tolerance
    if moves[1:].any():
        flaws.append(
            "The model mixes the samples of a batch (changing one sample changed the outputs of others), so no sample"
            " has a robustness of its own, and the numbers depend on the batch. Look for a normalisation over the batch"
            " in eval mode, such as `BatchNorm` with `track_running_stats=False`."
        )
    elif are_logits and moves[0] and not has_gradient:
        raise ValueError(
            "Expected a model whose outputs have gradients with respect to its inputs, but they change without any, and"
            " every number would claim perfect robustness. Does its forward pass use `torch.no_grad()`, `detach()` or"
            " rounding, or `torch.autograd.grad` without `create_graph=True` or of a piecewise linear function?"
        )
    return flaws


def _about_classes(outputs: Tensor) -> list[str]:
    num_classes = outputs.shape[1] if outputs.ndim == 2 else 0
    if num_classes <= _MANY_CLASSES:
        return []
    return [
        f"The model has {num_classes} classes. An exact measurement costs one backward pass per class and sample, and"
        f" memory for {num_classes}² numbers per sample. If it takes too long, lower `max_samples` or raise"
        " `every_n_epochs`."
    ]


def _about_units(probe: Probe) -> list[str]:
    sentences = []
    low, high = float(probe.inputs.min()), float(probe.inputs.max())
    if probe.input_std is None and (low < 0 or high > 1):
        remedy = (
            "For bytes from 0 to 255 pass `input_std=1/255`"
            if low >= 0
            else "If they are normalised images, pass the standard deviation of each channel as `input_std`"
        )
        sentences.append(
            f"Validation inputs range from {low:.3g} to {high:.3g} and no `input_std` was given, so ε, margins and"
            f" Fisher information are in units of the inputs as the network receives them. {remedy}, so that ε is in"
            " units of pixels between 0 and 1."
        )
    if probe.valid_range is not None:
        raw = probe.unnormalised_inputs
        low, high = float(raw.min()), float(raw.max())
        slack = 0.01 * (probe.valid_range[1] - probe.valid_range[0])
        if low < probe.valid_range[0] - slack or high > probe.valid_range[1] + slack:
            sentences.append(
                f"Validation inputs range from {low:.3g} to {high:.3g} before normalisation, beyond the `valid_range`"
                f" {tuple(probe.valid_range)}, so L∞ margins and attacks are wrong. If the inputs are normalised,"
                " pass the `input_mean` and `input_std` that were used."
            )
    return sentences
