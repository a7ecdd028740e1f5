"""Warnings of the monitor about a measurement whose numbers mean something else than they seem to, with the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_robust.callbacks.monitor.probe_code import ProbeCode
from lightning_robust.callbacks.monitor.sample_selection import LoaderShare
from lightning_robust.callbacks.monitor.status import WHOLE, Failure
from lightning_robust.callbacks.monitor.token_embeddings import FromEmbeddings
from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.independence import dependence
from lightning_robust.functional._validation.scales import tolerances
from lightning_robust.functional._validation.tensors import check_inputs, outputs_of
from lightning_robust.functional.input_space.units import are_images_of_unknown_scale
from lightning_robust.metrics import ProbeMetric
from lightning_robust.metrics.keys import has_renamed_characters, leaves_and_folders
from lightning_robust.probe import Probe

_EXAMINED = 8  # samples
_INFERENCE = "Inference tensors cannot be saved for backward"
_RESHAPES = (
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Alias",
    "Squeeze",
    "Unsqueeze",
    "Clone",
    "ToCopy",
    "Slice",
    "Select",
)
_MISSING = re.compile(r"missing \d+ required positional arguments?: ('\w+'(?:(?:,| and|, and) '\w+')*)")
OF_THE_MODEL = "The model"  # begins the sentences after which every number is in doubt
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


def out_of_memory(samples_at_once: int) -> str:
    """Memory ran out, and fewer samples pass at once from now on."""
    return (
        f"RobustnessMonitor ran out of memory, and from now on measures at most {samples_at_once} samples at once. The"
        f" numbers stay the same, but take longer. Pass `chunk_size={samples_at_once}` to avoid the failed attempt."
    )


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


def on_keys(keys: Iterable[str], others: Iterable[str], *, prefix: str) -> list[str]:
    """Logged keys with which some loggers cannot deal.

    Args:
        keys: Those of the monitor, with the prefix.
        others: Everything that is logged.
        prefix: What the monitor puts before its keys.
    """
    ours, sentences = set(keys), []
    if pair := next((pair for pair in leaves_and_folders({*ours, *others}) if not ours.isdisjoint(pair)), None):
        sentences.append(
            f"Both `{pair[0]}` and `{pair[1]}` are logged. Loggers that make folders of '/' (MLflow's file store,"
            " DVCLive) cannot keep both and end the training. Give one of them another name, e.g. with"
            " `RobustnessMonitor(log_key_prefix='robustness_monitor/')`."
        )
    if odd := sorted(key for key in ours if has_renamed_characters(key.removeprefix(prefix))):
        sentences.append(
            f"`{odd[0]}` holds characters that some loggers rename or refuse. Let `compute` of"
            " the metric return keys of letters, digits, '_', '-', '.' and '/'."
        )
    return sentences


def not_finite(keys: Sequence[str], *, prefix: str) -> list[str]:
    """Keys whose values are not finite and therefore not logged."""
    if len(keys) <= 1:
        return [
            f"`{prefix}{key}` is not finite, so it is not logged. Its curve has gaps wherever this happens."
            for key in keys
        ]
    names = [f"`{prefix}{key}`" for key in keys]
    listed = f"{', '.join(names[:3])} and {len(names) - 3} more" if len(names) > 3 else " and ".join(names)
    return [f"{listed} are not finite, so they are not logged. Their curves have gaps wherever this happens."]


def on_values(metrics: Iterable[ProbeMetric], values: Mapping[str, float], *, prefix: str) -> dict[str, str]:
    """The caveats of metrics about their values, by key without the prefix."""
    caveats = {key: caveat for metric in metrics for key, caveat in metric.caveats(values).items()}
    return {key: f"`{prefix}{key}` {caveat}" for key, caveat in caveats.items()}


def skipped(
    failures: Mapping[int, Failure], names: Mapping[int, str], *, epoch: int, code: ProbeCode | None = None
) -> str:
    """What was not measured and why, by the index of the metric or ``WHOLE``.

    Args:
        failures: What went wrong.
        names: Those of all metrics.
        epoch: In which it went wrong.
        code: How the batch was read, where that is known.
    """
    if WHOLE in failures or failures.keys() >= names.keys():
        what = f"the measurement in epoch {epoch}: {_ended(failures[min(failures)].message)}"
    else:
        by_message: dict[str, list[str]] = {}
        for number, failure in sorted(failures.items()):
            by_message.setdefault(_ended(failure.message), []).append(names[number])
        parts = [f"{' and '.join(metrics)}: {message}" for message, metrics in by_message.items()]
        what = f"in epoch {epoch} {' '.join(parts)}"
    raised = any(failure.kind == "raised" for failure in failures.values())
    hint = _hint(what, code or ProbeCode(), raised=raised)
    return f"RobustnessMonitor skipped {what} The run goes on.{hint} `on_error='raise'` stops with a traceback instead."


def _hint(what: str, code: ProbeCode, *, raised: bool) -> str:
    """Suggest a line to paste, where the cause of the failure shows which."""
    if _INFERENCE in what:
        return (
            " Does the model close over a tensor of the batch, made under inference mode? Pass what has a row per"
            " sample as `Probe(model, inputs, targets, extras={'mask': mask})`, and `.clone()` in the function what all"
            " samples share."
        )
    if code.embedding and "for token ids" in what:
        return (
            f" If these are token ids, define on the LightningModule `def get_input_embeddings(self): return"
            f" self.{code.embedding}`, and they are measured from their embeddings on."
        )
    if missing := _MISSING.search(what):
        names = missing[1].replace(",", " ").replace(" and ", " ").replace("'", "").split()
        return f" To pass on what the module takes, use {code.with_names(names).line()}."
    if raised:
        return (
            " If the module is not called as `module(inputs)`, pass"
            f" {code.line(network=f'module.{code.network}')}, with the network and the tensors that it takes."
        )
    if "Expected the model to return" in what and "probe_fn=" not in what:
        line = code.line(around="logits_of({})")
        return f" To wrap it, pass {line}, where your `logits_of` picks or reshapes the output."
    return ""


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith(("?", "!")) else f"{sentence.rstrip('.')}."


def on_probe(
    probe: Probe, *, units_matter: bool = True, more: Callable[[Tensor], Iterable[str]] = lambda outputs: ()
) -> list[str]:
    """Check, on the first samples of a run, what must be true for the numbers to mean anything.

    Costs three forward passes of up to eight samples.

    Args:
        probe: The samples.
        units_matter: Whether anything is measured that depends on the units of the inputs.
        more: Finds more to tell, from the outputs.

    Returns:
        One sentence for each flaw: outputs that are probabilities, or random; samples whose outputs depend on
        other samples, or on their place in the batch; inputs in other units than the options say.

    Raises:
        TypeError: If the inputs are integers, and the network takes none.
        ValueError: If the network cannot be called on some of the samples, or its outputs are not finite. Outputs
            without gradients are refused where gradients are taken.
    """
    check_inputs(probe.inputs, with_derivative=False)
    probe = probe.rows(slice(_EXAMINED))
    x = full_precision(probe.inputs)
    with differentiable(probe.model):
        # metrics of the weights alone measure networks whose embeddings cannot be exchanged
        as_given = isinstance(probe.model, FromEmbeddings) or not x.is_floating_point()
        leaf = x if as_given else x.clone().requires_grad_()
        outputs = outputs_of(probe.network.on_all(), leaf)
        squashed, outputs = _ends_in_probabilities(outputs), outputs.detach()
        with torch.no_grad():  # in the same context: a network that remembers its last pass shows it
            again = outputs_of(probe.network.on_all(), x)
    sentences = [*_about_model(probe, x, outputs, again, squashed=squashed), *more(outputs)]
    return [*sentences, *_about_units(probe)] if units_matter and x.is_floating_point() else sentences


def note_on(probe: Probe) -> str | None:
    """Tell the units in which embeddings of tokens are perturbed, unless the user has chosen them."""
    unit = probe.model.unit() if isinstance(probe.model, FromEmbeddings) else None
    if unit is None or probe.input_std != unit:
        return None
    return (
        "RobustnessMonitor perturbs the embeddings of the validation inputs, which are token ids: ε, margins and Fisher"
        f" information are in units of the root mean square of the embedding's weights, {1 / unit:.3g}."
    )


def _about_model(probe: Probe, x: Tensor, outputs: Tensor, again: Tensor, *, squashed: bool) -> list[str]:
    are_logits = outputs.ndim == 2 and outputs.shape[1] > 1 and probe.likelihood == "categorical"
    flaws = []
    if squashed and probe.likelihood == "bernoulli":
        flaws.append(
            "The model returns probabilities (its last operation is a sigmoid or softmax), but logits are expected with"
            " likelihood 'bernoulli': a sigmoid would be applied twice and every number is wrong. Return the values"
            " before it."
        )
    if probe.likelihood == "token" and outputs.ndim == 3 and _are_probabilities(outputs):
        flaws.append(
            "The model returns probabilities (non-negative numbers that sum to 1 at each position), but logits are"
            " expected with likelihood 'token': softmax would be applied twice and every number is wrong. Return the"
            " values before softmax."
        )
    if are_logits and outputs.min() >= 0 and torch.allclose(outputs.sum(dim=1), outputs.new_ones(()), atol=1e-3):
        flaws.append(
            "The model returns probabilities (non-negative rows that sum to 1), but logits are expected: softmax would"
            " be applied twice and every number is wrong. Return the values before softmax."
        )
    tolerance = tolerances(outputs)
    if ((again - outputs).abs() > tolerance).any():
        flaws.append(
            "The model returns other outputs when it is called twice on the same inputs, even in eval mode, so the"
            " numbers are partly noise. Look for random layers that ignore eval mode, such as `F.dropout(x)` without"
            " `training=self.training`."
        )
        return flaws
    with differentiable(probe.model):
        dependent = dependence(probe.network, x, outputs)
    return flaws if dependent is None else [*flaws, dependent]


def _are_probabilities(logits: Tensor) -> bool:
    """Whether logits (n, T, V) are probabilities at all positions that count; the others have logits of −∞."""
    counted = logits[logits.isfinite().all(dim=2)]
    if not len(counted) or bool(counted.min() < 0):
        return False
    return torch.allclose(counted.sum(dim=1), counted.new_ones(()), atol=1e-3)


def _ends_in_probabilities(outputs: Tensor) -> bool:
    """Whether the last operation of a network, but for changes of shape, is a sigmoid or softmax."""
    node = outputs.grad_fn
    while node is not None and node.name().startswith(_RESHAPES):
        node = next(iter(node.next_functions), (None,))[0]
    return node is not None and node.name().startswith(("SigmoidBackward", "SoftmaxBackward"))


def _about_units(probe: Probe) -> list[str]:
    sentences = []
    low, high = float(probe.inputs.min()), float(probe.inputs.max())
    if are_images_of_unknown_scale(probe.inputs, probe.input_std):
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
