"""What the monitor says once in a run when numbers may mean something else than they seem to, with the remedy."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_robust.callbacks.monitor.overhead import Overhead
from lightning_robust.callbacks.monitor.sample_selection import LoaderShare
from lightning_robust.callbacks.monitor.status import WHOLE
from lightning_robust.probe import Probe, find_flaws

_MANY_CLASSES = 200
_FEW_POINTS = 5  # fewer make no curve
_FEW = 10  # fewer samples tell little by any estimator
SHUFFLES = (
    "The validation loader shuffles, so RobustnessMonitor measures other samples at every measurement, and its curves"
    " carry the noise of that. Pass `shuffle=False` to the validation DataLoader."
)
UNSHARED = (
    "Each process sees other validation samples, without a `DistributedSampler`, so RobustnessMonitor cannot tell which"
    " of them others see, too. In each of n processes it measures one in n of those that it would measure there alone,"
    " so fewer than `max_samples`, maybe some of them twice. Lightning's own distributed sampler avoids it."
)
OTHER_SAMPLES = (
    "RobustnessMonitor found other samples in the validation loader than at the last measurement, so its curves carry"
    " the noise of that. A loader that yields the same samples in the same order avoids it."
)


def obstacle(trainer: Trainer) -> str | None:
    """What keeps every measurement of a run from being made, if anything does."""
    if trainer.barebones:
        return "`Trainer(barebones=True)` logs nothing, so RobustnessMonitor measures nothing."
    strategy, spread = trainer.strategy, None
    if isinstance(strategy, DeepSpeedStrategy | FSDPStrategy):
        spread = type(strategy).__name__
    elif isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
        spread = "tensor parallelism"
    if spread is None:
        return None
    return (
        f"RobustnessMonitor measures nothing under {spread}, which spreads the weights over processes in a way that it"
        " cannot undo. It measures under `DDPStrategy`, and under `ModelParallelStrategy(tensor_parallel_size=1)` with"
        " `torch.distributed.fsdp.fully_shard` in `configure_model`."
    )


def no_such_loader(dataloader_idx: int, *, num_loaders: int) -> str:
    """The loader to measure on does not exist."""
    return (
        f"RobustnessMonitor was told to measure on `dataloader_idx={dataloader_idx}`, but there are {num_loaders}"
        " loaders, so nothing is measured."
    )


def out_of_memory(samples_at_once: int) -> str:
    """How it goes on after memory has run out."""
    return (
        f"RobustnessMonitor ran out of memory, and from now on measures at most {samples_at_once} samples at once. The"
        " numbers stay the same, and take longer. A `chunk_size` chosen beforehand saves the failed attempt."
    )


def before_fit(trainer: Trainer, *, prefix: str, every_n_epochs: int, budget: float | None) -> list[str]:
    """Say it if nothing will ever be measured, or if a stopper will count what is not measured."""
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
        f"EarlyStopping follows `{callback.monitor}`, which is measured {when}, and takes the old value for no"
        " improvement in between, because its `patience` counts validations. `RobustnessDriftStopping` counts"
        " measurements."
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if type(callback) is EarlyStopping and callback.monitor.startswith(prefix)
    ]


def hardly_a_curve(overhead: Overhead, *, budget: float) -> list[str]:
    """Say it if a budget of time has left few measurements."""
    made, due = overhead.made, overhead.made + overhead.left_out
    if made >= _FEW_POINTS:
        return []
    return [
        f"RobustnessMonitor made {made} of {due} measurements within `overhead_budget={budget:g}`; the last one took"
        f" {overhead.times.cost:.2g} s. Fewer `max_samples` or `metrics`, or a larger budget, make more of a curve."
    ]


def on_loader(share: LoaderShare, *, max_samples: int) -> list[str]:
    """Say it if the subset cannot be fixed beforehand, or changes."""
    sentences = [] if share.size is not None else [reservoir(max_samples)]
    return [*sentences, SHUFFLES] if share.shuffled else sentences


def reservoir(max_samples: int) -> str:
    """The rule for loaders that do not tell how many samples they yield."""
    return (
        "RobustnessMonitor cannot tell beforehand how many samples the validation loader yields, so it measures a"
        f" uniformly random subset of {max_samples} (reservoir sampling): the same one at every measurement only as"
        " long as the loader yields the same samples in the same order. A loader with a length, whose batches hold"
        " `batch_size` samples each, is safer."
    )


def on_values(values: Mapping[str, float], *, prefix: str) -> list[str]:
    """Say it if curvature is worth little, being noise of probes, or the sum of layers of which most count as 0."""
    sentences = []
    trace, noise = values.get("hessian_trace", 0.0), values.get("hessian_trace_stderr_probes", 0.0)
    if noise > abs(trace) and values.get("num_samples", 0) >= _FEW:
        sentences.append(
            f"`{prefix}hessian_trace` is mostly noise of random probes (`…_stderr_probes`), the same at every"
            " measurement. `HessianTrace(num_probes=32)` has a quarter of it. Losses of torch (modules, functions and"
            " `functools.partial` of them, but not lambdas) need fewer probes than one's own."
        )
    for key, remedy in (("wci", ""), ("adversarial_wci", " or a smaller `epsilon`")):
        negative, stderr = values.get(f"{key}_negative_layers", 0.0), values.get(f"{key}_stderr", 0.0)
        if negative > 0 and stderr > 0.5 * values[key]:
            sentences.append(
                f"`{prefix}{key}` is not to be trusted: the curvature of some layers of this network"
                " (`…_negative_layers`) is negative, in truth or by the noise of probes, and counts as 0."
                f" `WeightCurvatureIndex(estimator='gauss_newton')` is never negative; more `num_probes`{remedy} may"
                " help, too."
            )
    return sentences


def skipped(causes: Mapping[int, str], names: Mapping[int, str], *, epoch: int) -> str:
    """Say what was not measured and why, in one warning.

    Args:
        causes: By the number of the metric, or ``WHOLE``.
        names: Of all metrics, by their numbers.
        epoch: Of the measurement.
    """
    if WHOLE in causes or causes.keys() >= names.keys():
        what = f"the measurement in epoch {epoch}: {_ended(causes[min(causes)])}"
    else:
        by_cause: dict[str, list[str]] = {}
        for number, cause in sorted(causes.items()):
            by_cause.setdefault(_ended(cause), []).append(names[number])
        parts = [f"{' and '.join(metrics)}: {cause}" for cause, metrics in by_cause.items()]
        what = f"in epoch {epoch} {' '.join(parts)}"
    ours = all(cause.partition(": ")[2].startswith("Expected ") for cause in causes.values())
    hint = "" if ours else " If the module is not called as `pl_module(inputs)`, pass `probe_fn`."
    return f"RobustnessMonitor skipped {what} The run goes on.{hint} `on_error='raise'` stops with a traceback instead."


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith(("?", "!")) else f"{sentence.rstrip('.')}."


def on_probe(probe: Probe) -> list[str]:
    """Examine the first samples of a run.

    Raises:
        ValueError: If every number would be wrong, see :func:`~lightning_robust.probe.find_flaws`.
    """
    sentences = find_flaws(probe)
    outputs = probe.outputs(probe.inputs[:1])
    num_classes = outputs.shape[1] if outputs.ndim == 2 else 0
    if num_classes > _MANY_CLASSES:
        sentences.append(
            f"The model has {num_classes} classes. An exact measurement costs one backward pass per class and sample,"
            f" and {num_classes}² numbers of memory per sample; lower `max_samples` or raise `every_n_epochs` if it"
            " takes too long."
        )
    low, high = float(probe.inputs.min()), float(probe.inputs.max())
    if probe.input_std is None and (low < 0 or high > 1):
        remedy = (
            "For bytes from 0 to 255 pass `input_std=1/255`"
            if low >= 0
            else "If they are normalised images, pass the standard deviation of each channel as `input_std`"
        )
        sentences.append(
            f"Validation inputs range from {low:.3g} to {high:.3g} and no `input_std` was given, so ε, margins and"
            f" Fisher information are in units of the inputs as the network receives them. {remedy}: then ε is in"
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
                " pass the `input_mean` and `input_std` with which it was done."
            )
    return sentences
