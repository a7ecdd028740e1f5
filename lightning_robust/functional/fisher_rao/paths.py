"""Fisher–Rao paths: how far a prediction travels on the simplex until its class changes.

An input moves through input space along the path that closes the gap ``log p_y − log p_k`` to a class k fastest for the
distance that its prediction covers: ``ẋ ∝ −(G + λI)⁻¹ ∇(log p_y − log p_k)``, where G is the Fisher information with
respect to the input. The **Fisher–Rao margin** towards k is the length ``∫ √(ẋᵀ G ẋ)`` of that path until the class
changes, to k or to another class in between.

No path into class k is shorter than the bound (:mod:`~lightning_robust.functional.fisher_rao.geometry`). The bound
depends on the prediction alone and is close to π/2 for every confident one. A margin divided by its bound measures the
detour that the network forces on the path.

The poster takes steps of length 1 until the class changes and counts them (``mode="unit_steps"``). By default, steps
here are short and of second order: the midpoint rule, with a midpoint extrapolated from the previous step, so that each
step takes one linearisation. They are also bounded in Euclidean length, because at confident predictions ``G ≈ 0``, and
a step of length 1 would leave the data. The length is summed on the simplex, and the crossing is located within the
last step. A step that would not close the gap to the target is shortened until it does, so that no path goes round in
circles. The poster's formula has a step along ``+v``, which would widen the gap; paths here descend in both modes.

Source: De & Säfken, "The Myth of Robust Classes" (margins, shielding); bound, path length, step control and the exact
solution of each step are ours.
Cost: one forward pass of all samples; for plain functions two more, which show whether they close over tensors of the
batch. Per step of a path, two forward passes and C − 1 backward passes with respect to
the input, on as many paths at once as memory allows. As much again per sample where its paths begin, and a few forward
passes where they end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.arguments import check_kind
from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional._validation.independence import check_place
from lightning_robust.functional._validation.scales import masked_classes
from lightning_robust.functional._validation.tensors import check_logits, check_pass, check_targets, outputs_of
from lightning_robust.functional.fisher_rao._state import Paths, flat
from lightning_robust.functional.fisher_rao._tracing import Tracer
from lightning_robust.functional.fisher_rao.geometry import class_indices, margin_bound, other_classes
from lightning_robust.functional.fisher_rao.path_options import Mode, Solver, check_path_options
from lightning_robust.functional.input_space.float64 import float64_dtype, widened
from lightning_robust.functional.input_space.jacobian import largest_chunk
from lightning_robust.functional.input_space.units import Units, changes_within

# Vectors of the size of an input that conjugate gradients hold per path, including those in the graph of J p.
_VECTORS_OF_CG = 8


@dataclass(frozen=True)
class FisherRaoPaths:
    """Paths from N samples towards K classes each.

    Attributes:
        source: ``(N,)``, class that each sample's paths leave.
        targets: ``(N, K)``, classes that the paths aim at; −1 where a class is masked, so that there is no path.
        margins: ``(N, K)``, length of each path in nats until the class changes; 0 if the sample is misclassified. In
            mode ``"unit_steps"`` it is the number of steps.
        l2: ``(N, K)``, Euclidean distance from the sample to the end of each path, in units of the un-normalised input.
        linf: ``(N, K)``, largest change of a feature, in the same units.
        first_hit: ``(N, K)``, class that the path entered first, −1 if it entered none.
        success: ``(N, K)``, bool, whether the class has changed. If not, lengths and distances are those of the path so
            far, 0 if there is none.
        steps: ``(N, K)``, number of steps; 0 if the sample is misclassified.
        bound: ``(N, K)``, lower bound of the length of any path from the sample into the class that was hit, or into
            the class aimed at if none was hit.
        start_logits: ``(N, C)``, logits of the samples.
        logits: ``(N, K, C)``, logits at the ends of the paths.
    """

    source: Tensor
    targets: Tensor
    margins: Tensor
    l2: Tensor
    linf: Tensor
    first_hit: Tensor
    success: Tensor
    steps: Tensor
    bound: Tensor
    start_logits: Tensor
    logits: Tensor

    @property
    def exist(self) -> Tensor:
        """``(N, K)``, bool: paths that aim at a class; the others would have aimed at a masked one."""
        return self.targets >= 0

    @property
    def traced(self) -> Tensor:
        """``(N, K)``, bool: paths of correctly classified samples."""
        return ((self.steps > 0) | ~self.success) & self.exist

    @property
    def has_left(self) -> Tensor:
        """``(N, K)``, bool: traced paths that left their class."""
        return self.traced & self.success

    @property
    def shielded(self) -> Tensor:
        """``(N, K)``, bool: traced paths that entered a class other than the one aimed at."""
        return self.has_left & (self.first_hit != self.targets)

    def rows(self, chosen: slice | Tensor) -> FisherRaoPaths:
        """Select the paths of some samples."""
        return FisherRaoPaths(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    @staticmethod
    def joined(parts: Sequence[FisherRaoPaths]) -> FisherRaoPaths:
        """Join the paths of several groups of samples, in order."""
        names = [field.name for field in fields(FisherRaoPaths)]
        return FisherRaoPaths(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def trace_fisher_rao_paths(
    model: Callable[..., Tensor],
    inputs: Tensor,
    *,
    targets: Tensor | None = None,
    labels: Tensor | None = None,
    damping: float | None = None,
    step_length: float | None = None,
    max_euclidean_step: float | None = None,
    max_steps: int = 100,
    solver: Solver = "gram",
    mode: Mode = "path",
    extras: Mapping[str, Tensor] | None = None,
    input_std: float | Sequence[float] | Tensor | None = None,
    input_mean: float | Sequence[float] | Tensor | None = None,
    valid_range: tuple[float, float] | None = None,
    chunk_size: int | None = None,
) -> FisherRaoPaths:
    """Follow damped natural-gradient steps from each sample towards each target until the class changes.

    The model runs as in :func:`~lightning_robust.functional.linearize`.

    Args:
        model: Maps inputs ``(N, ...)`` to logits ``(N, C)``, sample by sample.
        inputs: ``(N, ...)``, floating point.
        targets: ``(N, K)``, or ``(K,)`` for all samples: class indices to aim at. By default all classes except the one
            to leave, in order, so that K = C − 1. There is no path to a class that a sample's logits mask.
        labels: ``(N,)``, true classes, which the paths leave. A sample that is predicted as another class has margin 0.
            By default the predicted classes.
        damping: ``λ``, in squared nats per squared unit of the un-normalised input, like the Fisher information. By
            default a hundredth of the largest eigenvalue that the gradient at the start would have at even odds,
            ``‖∇(log p_y − log p_k)‖²/400``, which scales with the units of the input.
        step_length: Fisher–Rao length of a step, to first order, unless the Euclidean bound is smaller; 0.4 by default.
            With both defaults, margins of trained networks are within 1 % of those of much shorter steps in the median,
            and within 1 to 5 % in the mean, because single paths bend differently.
        max_euclidean_step: Euclidean bound of a step, in units of the un-normalised input. By default a quarter of the
            way to the boundary of the network linearised at the sample, if that boundary were one nat further away. It
            scales with the units of the input.
        max_steps: Number of steps after which a path is given up. A path also ends where it cannot go on: where the
            gradient vanishes, the valid range blocks it, or logits are not finite.
        solver: ``"gram"`` takes the whole Jacobian of C rows and solves each step exactly. ``"cg"`` takes conjugate
            gradients, which need second derivatives of the network with respect to its input, and less memory than the
            Jacobian if there are very many classes. In single precision they are inaccurate if the damping is a
            millionth of the Fisher information or less.
        mode: ``"path"``, or ``"unit_steps"`` for the poster's steps ``v / √(gᵀv)``, of length 1 in the damped metric,
            unbounded unless ``max_euclidean_step`` is given; margins are then numbers of steps.
        extras: As in :func:`~lightning_robust.functional.linearize`.
        input_std: As in :func:`~lightning_robust.functional.linearize`.
        input_mean: As in :func:`~lightning_robust.functional.linearize`.
        valid_range: As in :func:`~lightning_robust.functional.linearize`; each step is clamped to it.
        chunk_size: Largest number of paths that advance through the network together. Each holds its Jacobian, C
            gradients of the size of an input, or 8 such vectors with ``"cg"``. By default as in
            :func:`~lightning_robust.functional.linearize`.

    Returns:
        :class:`FisherRaoPaths` of N samples and K targets each.

    Raises:
        TypeError: If ``inputs`` are not floating point or the model does not return a tensor.
        ValueError: If an argument has a wrong shape or value, a path aims at the class that it is to leave, inputs or
            their logits are not finite, or the outputs change without gradients.

    Source: De & Säfken, "The Myth of Robust Classes"; see the module's docstring for the differences.
    """
    options = check_path_options(damping, step_length, max_euclidean_step, max_steps, solver, mode)
    check_pass(model, inputs, chunk_size=chunk_size)
    network = SampleModel(model, extras, num_samples=len(inputs))
    units = Units.of(inputs, std=input_std, mean=input_mean, valid_range=valid_range)
    with differentiable(model, twice=solver == "cg"):
        x = full_precision(inputs)
        check_place(network, x)
        parts = torch.split(torch.arange(len(x)), largest_chunk(x, chunk_size))
        with torch.no_grad():
            start_logits = torch.cat([outputs_of(network.on(part), x[part], check=check_logits) for part in parts])
        num_classes = start_logits.shape[1]
        predicted = start_logits.argmax(dim=1)
        source = predicted if labels is None else class_indices("labels", labels, start_logits)
        aims = _aims(targets, source, num_classes)
        aims = torch.where(masked_classes(start_logits).gather(1, aims), -1, aims)
        num_rows = num_classes if solver == "gram" else _VECTORS_OF_CG
        at_once = largest_chunk(x, chunk_size, num_rows=num_rows)
        samples, columns = ((predicted == source)[:, None] & (aims >= 0)).nonzero(as_tuple=True)

        def begin(numbers: Tensor) -> Paths:
            rows, zeros = samples[numbers], torch.zeros(len(numbers), dtype=float64_dtype(x), device=x.device)
            lower, upper = _box(x[rows], units)
            return Paths(
                number=numbers.to(x.device),
                sample=rows,
                source=source[rows],
                target=aims[rows, columns[numbers]],
                start=x[rows],
                x=x[rows],
                move=torch.zeros_like(x[rows]),
                lower=lower,
                upper=upper,
                logits=start_logits[rows],
                length=zeros,
                steps=torch.zeros_like(rows),
                damping=zeros,
                longest=zeros,
            )

        # the values of misclassified samples
        success = aims >= 0
        steps = torch.zeros_like(aims)
        margins, l2, linf = (x.new_zeros(aims.shape) for _ in range(3))
        logits = start_logits[:, None].repeat(1, aims.shape[1], 1)
        for paths, has_left in Tracer(network, units, options).trace(begin, len(samples), at_once=at_once):
            place = samples[paths.number], columns[paths.number]
            way = units.raw_change(paths.x - paths.start)
            l2[place] = torch.linalg.vector_norm(flat(way), dim=1)
            linf[place] = flat(way).abs().amax(dim=1)
            margins[place], steps[place] = paths.length.to(x), paths.steps
            success[place], logits[place] = has_left, paths.logits
    first_hit = torch.where(success, logits.argmax(dim=2), -1)
    entered = torch.where(success, first_hit, aims)
    probs = widened(start_logits).softmax(dim=1)
    bound = margin_bound(probs.gather(1, source[:, None]), probs.gather(1, entered.clamp_min(0)))
    return FisherRaoPaths(
        source=source,
        targets=aims,
        margins=margins,
        l2=l2,
        linf=linf,
        first_hit=first_hit,
        success=success,
        steps=steps,
        bound=torch.where(aims >= 0, bound, 0).to(x),
        start_logits=start_logits,
        logits=logits,
    )


def _aims(targets: Tensor | None, source: Tensor, num_classes: int) -> Tensor:
    """Classes (N, K) to aim at."""
    if targets is None:
        return other_classes(source, num_classes)
    check_kind("targets", targets, Tensor, "a tensor (N, K) or (K,)")
    if targets.ndim not in (1, 2) or not targets.numel() or (targets.ndim == 2 and len(targets) != len(source)):
        raise ValueError(
            f"Expected argument `targets` to hold K ≥ 1 classes, of shape ({len(source)}, K) or (K,), but got shape"
            f" {tuple(targets.shape)}."
        )
    classes = check_targets(targets.flatten(), num_samples=targets.numel(), num_classes=num_classes)
    aims = classes.to(source.device).view(targets.shape).expand(len(source), -1)
    at_own = (aims == source[:, None]).any(dim=1)
    if at_own.any():
        first = int(at_own.nonzero()[0, 0])
        raise ValueError(
            f"Expected argument `targets` to hold other classes than the one to leave, but got shape"
            f" {tuple(targets.shape)} with class {int(source[first])} for sample {first}, which is to leave it."
        )
    return aims


def _box(start: Tensor, units: Units) -> tuple[Tensor, Tensor]:
    """Smallest and largest values that normalised inputs may take; an input outside the range may stay."""
    if units.valid_range is None:
        edge = start.new_full((len(start), *(1,) * (start.ndim - 1)), torch.inf)
        return -edge, edge
    down, up = changes_within(units.raw(start), units.valid_range)
    return start + units.change(down), start + units.change(up)
