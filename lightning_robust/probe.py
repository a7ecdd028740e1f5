"""What a metric sees of a batch: a network, inputs, targets, and one linearisation that all metrics share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_robust.functional._checks import (
    channelwise,
    check_inputs,
    check_logits,
    check_targets,
    check_units,
    unnormalised,
)
from lightning_robust.functional._grad_mode import differentiable, full_precision
from lightning_robust.functional.linearization import Linearization, linearize


@dataclass(frozen=True, eq=False)
class Probe:
    """A network and the labelled samples on which it is measured.

    Everything expensive is computed on first use and shared by all metrics that read the probe.

    Args:
        model: Maps inputs ``(N, ...)`` to logits ``(N, C)``, sample by sample.
        inputs: ``(N, ...)``, floating point.
        targets: ``(N,)``, class indices.
        input_std: Standard deviation by which the inputs were divided, one number or one per channel (dimension 1).
            With it every input-space number is in units of the un-normalised input.
        input_mean: What was subtracted from the inputs before that, likewise; ``valid_range`` needs it.
        valid_range: Smallest and largest value of an un-normalised input, e.g. ``(0, 1)``, which perturbations cannot
            leave. L∞ margins and attacks respect it; L2 margins do not know it.
        chunk_size: Bound on memory, see :func:`~lightning_robust.functional.linearize`.

    Raises:
        TypeError: If ``inputs`` or ``targets`` are not tensors.
        ValueError: If there is not one class index per input, or a valid range of normalised inputs comes without
            their mean.
    """

    model: Callable[[Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    _: KW_ONLY
    input_std: float | Sequence[float] | Tensor | None = None
    input_mean: float | Sequence[float] | Tensor | None = None
    valid_range: tuple[float, float] | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Tensor):
            raise TypeError(
                f"Expected argument `inputs` to be a tensor (N, ...), but got {type(self.inputs).__name__}."
            )
        if self.inputs.ndim == 0:
            raise ValueError("Expected argument `inputs` to be a tensor (N, ...), but got a single number.")
        check_targets(self.targets, num_samples=len(self.inputs))
        check_units(input_std=self.input_std, input_mean=self.input_mean, valid_range=self.valid_range)

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def linearization(self) -> Linearization:
        """Logits, Gram matrices and L1 gaps of all samples (see :func:`~lightning_robust.functional.linearize`)."""
        return linearize(
            self.model,
            self.inputs,
            input_std=self.input_std,
            input_mean=self.input_mean,
            valid_range=self.valid_range,
            chunk_size=self.chunk_size,
        )

    @property
    def unnormalised_inputs(self) -> Tensor:
        """``inputs · input_std + input_mean``."""
        x = full_precision(self.inputs)
        std = channelwise(self.input_std, x, name="input_std")
        return unnormalised(x, std, channelwise(self.input_mean, x, name="input_mean", positive=False))

    def logits(self, inputs: Tensor) -> Tensor:
        """Outputs of the network at other inputs, ``(N, C)``, in eval mode and without a graph."""
        with differentiable(self.model), torch.no_grad():
            logits = self.model(full_precision(inputs).clone())
        check_logits(logits, num_samples=len(inputs))
        return logits

    def select(self, rows: slice) -> Probe:
        """Return a probe of some of the samples, on copies that later changes to the batch do not reach."""
        return replace(self, inputs=self.inputs[rows].detach().clone(), targets=self.targets[rows].detach().clone())


def merge(probes: Iterable[Probe], *, max_samples: int) -> Iterator[Probe]:
    """Join probes of the same network and shape into probes of up to ``max_samples`` samples, in order."""
    group: list[Probe] = []
    for probe in probes:
        if group and (not _alike(group[0], probe) or sum(map(len, group)) + len(probe) > max_samples):
            yield _joined(group)
            group = []
        group.append(probe)
    if group:
        yield _joined(group)


def find_flaws(probe: Probe) -> list[str]:
    """Check, on a few samples, what a model must keep to for its numbers to mean anything.

    Costs three forward passes and a linearisation of up to eight samples.

    Returns:
        One sentence for each flaw: outputs that are probabilities, outputs that are random, samples that influence each
        other's outputs.

    Raises:
        ValueError: If no gradient leads from the outputs to the inputs on which they depend.
    """
    check_inputs(probe.inputs)
    x = full_precision(probe.inputs[:8])
    logits = probe.logits(x)
    flaws = []
    if logits.min() >= 0 and torch.allclose(logits.sum(dim=1), logits.new_ones(()), atol=1e-3):
        flaws.append(
            "The model returns probabilities (non-negative rows that sum to 1), but logits are expected: softmax would"
            " be applied twice and every number is wrong. Return the values before softmax."
        )
    tolerance = 1e-4 * logits.abs().max()
    if (probe.logits(x) - logits).abs().max() > tolerance:
        flaws.append(
            "The model returns other outputs when it is called twice on the same inputs, even in eval mode, so its"
            " numbers are noise in part. Is a dropout applied with `training=True`?"
        )
        return flaws
    disturbed = x.clone()
    disturbed[0] = x[-1]  # another sample rather than noise: some networks refuse inputs that are out of range
    moves = (probe.logits(disturbed) - logits).abs().amax(dim=1) > tolerance
    if moves[1:].any():
        flaws.append(
            "The model mixes the samples of a batch (changing one sample changed the outputs of others), so there"
            " is no robustness of a single sample, and the numbers depend on the batch. Is a normalisation"
            " computed over the batch?"
        )
    elif moves[0] and not linearize(probe.model, x).gram.any():
        raise ValueError(
            "Expected a model whose outputs have gradients with respect to its inputs, but they change without any, and"
            " every number would claim perfect robustness. Does its forward pass use `torch.no_grad()`, `detach()` or"
            " rounding?"
        )
    return flaws


def _alike(first: Probe, second: Probe) -> bool:
    return (
        first.model == second.model
        and first.inputs.shape[1:] == second.inputs.shape[1:]
        and first.inputs.dtype == second.inputs.dtype
        and _equal(first.input_std, second.input_std)
        and _equal(first.input_mean, second.input_mean)
        and first.valid_range == second.valid_range
        and first.chunk_size == second.chunk_size
    )


def _equal(a: object, b: object) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(torch.as_tensor(a), torch.as_tensor(b)))


def _joined(probes: list[Probe]) -> Probe:
    inputs, targets = (torch.cat([getattr(probe, name) for probe in probes]) for name in ("inputs", "targets"))
    return replace(probes[0], inputs=inputs, targets=targets)
