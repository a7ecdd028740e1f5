"""What a metric sees of a batch: a network, inputs, targets, and one linearisation that all metrics share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_robust.functional._isolation.context import differentiable, full_precision
from lightning_robust.functional._validation.arguments import (
    as_number,
    as_numbers,
    check_function,
    check_kind,
    check_positive_integer,
)
from lightning_robust.functional._validation.tensors import (
    check_input_type,
    check_inputs,
    check_logits,
    check_targets,
    outputs_of,
)
from lightning_robust.functional.curvature.losses import LossFn, check_loss_fn
from lightning_robust.functional.curvature.plan import Estimator
from lightning_robust.functional.curvature.problem import CurvatureProblem
from lightning_robust.functional.curvature.signs import ProbeSeeds
from lightning_robust.functional.curvature.sums import CurvatureSums
from lightning_robust.functional.fisher_rao.path_options import PathOptions
from lightning_robust.functional.fisher_rao.paths import FisherRaoPaths, trace_fisher_rao_paths
from lightning_robust.functional.input_space.attacks import Norm, pgd
from lightning_robust.functional.input_space.linearization import Linearization, linearize, relinearize
from lightning_robust.functional.input_space.units import Units, check_units

T = TypeVar("T")


@dataclass(frozen=True)
class Attack:
    """Projected gradient descent from the sample itself (see :func:`~lightning_robust.functional.pgd`).

    Attributes:
        epsilon: Radius of the ball, in units of the un-normalised input.
        norm: ``"linf"`` or ``"l2"``.
        steps: Number of gradient steps.
    """

    epsilon: float
    norm: Norm
    steps: int


@dataclass(frozen=True, eq=False)
class Probe:
    """A network and the labelled samples on which it is measured.

    Everything expensive is computed on first use and shared by all metrics that read the probe.

    Args:
        model: Maps inputs ``(N, ...)`` to logits ``(N, C)``, sample by sample.
        inputs: ``(N, ...)``, floating point.
        targets: ``(N,)``, class indices; with a ``loss_fn`` whatever it takes, ``(N, ...)``. Metrics that need classes
            say so.
        input_std: Standard deviation by which the inputs were divided, one number or one per channel (dimension 1).
            With it every input-space number is in units of the un-normalised input.
        input_mean: What was subtracted from the inputs before that, likewise; ``valid_range`` needs it.
        valid_range: Smallest and largest value of an un-normalised input, e.g. ``(0, 1)``, which perturbations cannot
            leave. L∞ margins and attacks respect it; L2 margins do not know it.
        chunk_size: Bound on memory, see :func:`~lightning_robust.functional.linearize`.
        loss_fn: Maps logits and targets to the loss whose curvature is measured; cross-entropy by default. See
            :func:`~lightning_robust.functional.hessian_trace`.
        module: The network with whose weights curvature has to do, if ``model`` is a plain function that calls it.

    Raises:
        TypeError: If ``inputs`` or ``targets`` are not tensors, the inputs not floating point, ``model`` or ``loss_fn``
            cannot be called, or ``module`` is none.
        ValueError: If an option has a wrong value, there is not one class index (one target, with a ``loss_fn``) per
            input, or a valid range of normalised inputs comes without their mean.
    """

    model: Callable[[Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    _: KW_ONLY
    input_std: float | Sequence[float] | Tensor | None = None
    input_mean: float | Sequence[float] | Tensor | None = None
    valid_range: tuple[float, float] | None = None
    chunk_size: int | None = None
    loss_fn: LossFn | None = None
    module: nn.Module | None = None
    _done: dict[tuple[object, ...], object] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_function("model", self.model)
        check_loss_fn(self.loss_fn)
        check_kind("module", self.module, nn.Module)
        if self.chunk_size is not None:
            check_positive_integer("chunk_size", self.chunk_size)
        check_input_type(self.inputs)
        if self.inputs.ndim == 0:
            raise ValueError("Expected argument `inputs` to be a tensor (N, ...), but got a single number.")
        if self.loss_fn is None:
            check_targets(self.targets, num_samples=len(self.inputs))
        elif not isinstance(self.targets, Tensor) or self.targets.shape[:1] != self.inputs.shape[:1]:
            came = tuple(self.targets.shape) if isinstance(self.targets, Tensor) else type(self.targets).__name__
            raise ValueError(
                f"Expected argument `targets` to hold one target per sample, a tensor of shape ({len(self.inputs)},"
                f" ...), but got {came}."
            )
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

    def relinearization(self, norm: Norm) -> Linearization:
        """The same near the boundary (see :func:`~lightning_robust.functional.relinearize`)."""
        return self._once(
            ("relinearization", norm),
            lambda: relinearize(
                self.model,
                self.inputs,
                self.linearization,
                norm=norm,
                input_std=self.input_std,
                input_mean=self.input_mean,
                valid_range=self.valid_range,
                chunk_size=self.chunk_size,
            ),
        )

    @property
    def unnormalised_inputs(self) -> Tensor:
        """``inputs · input_std + input_mean``."""
        x = full_precision(self.inputs)
        return Units.of(x, std=self.input_std, mean=self.input_mean).raw(x)

    def attacked(self, attack: Attack) -> Tensor:
        """The inputs under an attack, ``(N, ...)``."""
        return self._once(
            ("attacked", attack),
            lambda: pgd(
                self.model,
                self.inputs,
                self.targets,
                epsilon=attack.epsilon,
                steps=attack.steps,
                norm=attack.norm,
                valid_range=self.valid_range,
                input_mean=self.input_mean,
                input_std=self.input_std,
            ),
        )

    def curvature(
        self, *, estimator: Estimator = "auto", num_probes: int = 2, attack: Attack | None = None
    ) -> CurvatureSums:
        """Traces of the Hessian as sums over samples (see :func:`~lightning_robust.functional.hessian_trace`).

        Args:
            estimator: ``"auto"``, ``"gauss_newton"`` or ``"hutchinson"``.
            num_probes: Number of probes. Their signs are a function of the clean samples, also under an attack.
            attack: Measures the loss on attacked inputs.
        """
        key = ("curvature", estimator, num_probes, attack)
        return self._once(key, lambda: self._curvature(estimator, num_probes, attack))

    def _curvature(self, estimator: Estimator, num_probes: int, attack: Attack | None) -> CurvatureSums:
        problem = CurvatureProblem(
            self.model,
            self.inputs if attack is None else self.attacked(attack),
            self.targets,
            estimator=estimator,
            loss_fn=self.loss_fn,
            module=self.module,
            chunk_size=self.chunk_size,
        )
        with problem.examined() as examined:
            return examined.sums(ProbeSeeds.from_contents(self.inputs), examined.plan.probes(0, num_probes))

    def fisher_rao_paths(self, *, num_targets: int | None, options: PathOptions) -> FisherRaoPaths:
        """Paths to other classes (see :func:`~lightning_robust.functional.trace_fisher_rao_paths`).

        Args:
            num_targets: How many of the most probable other classes of each sample to aim at; None for all.
            options: How to trace them.
        """
        return self._once(
            ("fisher_rao_paths", num_targets, options),
            lambda: trace_fisher_rao_paths(
                self.model,
                self.inputs,
                targets=None if num_targets is None else self._most_probable_others(num_targets),
                labels=self.targets,
                **options._asdict(),
                input_std=self.input_std,
                input_mean=self.input_mean,
                valid_range=self.valid_range,
                chunk_size=self.chunk_size,
            ),
        )

    def _most_probable_others(self, count: int) -> Tensor:
        """Classes (N, count), or all others if there are fewer, in the order of the predictions."""
        logits = self.logits(self.inputs)
        labels = check_targets(self.targets, num_samples=len(logits), num_classes=logits.shape[1])
        others = logits.scatter(1, labels.to(logits.device)[:, None], -torch.inf)
        return others.topk(min(count, logits.shape[1] - 1), dim=1).indices

    def logits(self, inputs: Tensor) -> Tensor:
        """Outputs of the network at other inputs, which must be logits ``(N, C)``, in eval mode and without a graph."""
        logits = self.outputs(inputs)
        check_logits(logits, num_samples=len(inputs))
        return logits

    def outputs(self, inputs: Tensor) -> Tensor:
        """The same for outputs of any shape ``(N, ...)``."""
        with differentiable(self.model), torch.no_grad():
            return outputs_of(self.model, full_precision(inputs))

    def _once(self, key: tuple[object, ...], compute: Callable[[], T]) -> T:
        """What was computed under a key, or is now."""
        if key not in self._done:
            self._done[key] = compute()
        return cast(T, self._done[key])

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
    outputs = probe.outputs(x)
    are_logits = outputs.ndim == 2 and outputs.shape[1] > 1
    flaws = []
    if are_logits and outputs.min() >= 0 and torch.allclose(outputs.sum(dim=1), outputs.new_ones(()), atol=1e-3):
        flaws.append(
            "The model returns probabilities (non-negative rows that sum to 1), but logits are expected: softmax would"
            " be applied twice and every number is wrong. Return the values before softmax."
        )
    tolerance = 1e-4 * outputs.abs().max()
    if (probe.outputs(x) - outputs).abs().max() > tolerance:
        flaws.append(
            "The model returns other outputs when it is called twice on the same inputs, even in eval mode, so its"
            " numbers are noise in part. Is a dropout applied with `training=True`?"
        )
        return flaws
    disturbed = x.clone()
    disturbed[0] = x[-1]  # another sample rather than noise: some networks refuse inputs that are out of range
    moves = (probe.outputs(disturbed) - outputs).abs().reshape(len(x), -1).amax(dim=1) > tolerance
    if moves[1:].any():
        flaws.append(
            "The model mixes the samples of a batch (changing one sample changed the outputs of others), so there"
            " is no robustness of a single sample, and the numbers depend on the batch. Is a normalisation"
            " computed over the batch?"
        )
    elif are_logits and moves[0] and not linearize(probe.model, x).gram.any():
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
        and first.loss_fn == second.loss_fn
        and first.module is second.module
    )


def _equal(a: object, b: object) -> bool:
    return a is b or (a is not None and b is not None and _entries(a) == _entries(b))


def _entries(constant: object) -> list[float]:
    numbers = as_numbers(constant)
    return [as_number(constant)] if numbers is None else numbers


def _joined(probes: list[Probe]) -> Probe:
    inputs, targets = (torch.cat([getattr(probe, name) for probe in probes]) for name in ("inputs", "targets"))
    return replace(probes[0], inputs=inputs, targets=targets)
