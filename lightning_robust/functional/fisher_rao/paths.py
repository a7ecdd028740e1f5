"""Fisher–Rao geometry of predictions: distances on the simplex, and how far it is along a path to another class.

Predictions ``p`` are points of the probability simplex. With the Fisher information as its metric, ``√p`` turns it into
a part of a sphere of radius 2, and distances are

    d(p, q) = 2 arccos Σ_c √(p_c q_c),    at most π.

An input moves through the network's input space on the path that descends the gap ``log p_y − log p_k`` to a class k
fastest for the way that its prediction makes, ``ẋ ∝ −(G + λI)⁻¹ ∇(log p_y − log p_k)``, G the Fisher information with
respect to the input. The **Fisher–Rao margin** towards k is the length of that way, ``∫ √(ẋᵀ G ẋ)``, until the class
changes, to k or to another class that stands in the way.

On the sphere the points with ``q_y = q_k`` lie on a hyperplane at the distance ``(√p_y − √p_k)/√2`` from ``√p``, so
that no path into class k is shorter than

    2 arccos √(1 − (√p_y − √p_k)²/2),

the bound. It depends on the prediction alone, and is close to π/2 for every confident one: margins divided by it tell
what detour the network makes the path take.

Where the poster takes steps of length 1 until the class changes and counts them, here steps are short and of second
order (the midpoint rule; the step before says where about the middle is, so that each takes one linearisation). They
are bounded in Euclidean length, too: at confident predictions ``G ≈ 0``, and a step of length 1 leaves the data. The
length is summed up on the simplex, and the crossing is located within the last step. A step that would not close the
gap to the target is shortened until it does, lest a path go round in circles. The poster has the step along ``+v``,
which would to_float64 the gap; paths here descend it in both modes.

Source: Rao 1945 and Amari 2016 (distance); De & Säfken, "The Myth of Robust Classes" (margins, shielding); bound, path
length, step control and the exact solution of each step are ours.
Cost: per step of a path, two forward passes and C − 1 backward passes with respect to the input, on as many paths at
once as memory is meant for; as much again for each sample where its paths begin, and a few forward passes where they
end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.arguments import (
    check_floating,
    check_function,
    check_positive_integer,
    class_of,
)
from lightning_robust.functional._validation.tensors import (
    check_inputs,
    check_logits,
    check_targets,
)
from lightning_robust.functional.fisher_rao._tracing import Paths, Tracer, distance_of_roots, flat, other_classes
from lightning_robust.functional.fisher_rao.path_options import Mode, Solver, check_path_options
from lightning_robust.functional.input_space.jacobian import count_classes, float64_dtype, largest_chunk
from lightning_robust.functional.input_space.units import Units, changes_within

# Vectors of the size of an input that conjugate gradients hold for a path, those in the graph of J p among them.
_VECTORS_OF_CG = 8


@dataclass(frozen=True)
class FisherRaoPaths:
    """Paths from N samples towards K classes each.

    Attributes:
        source: ``(N,)``, class that each sample's paths leave.
        targets: ``(N, K)``, classes aimed at.
        margins: ``(N, K)``, length of each path in nats, from 0 to where the class changes; 0 where the sample is
            misclassified. In mode ``"poster"`` the number of steps.
        l2: ``(N, K)``, Euclidean distance of the end of each path from the sample, in units of the un-normalised input.
        linf: ``(N, K)``, largest change of a feature, likewise.
        first_hit: ``(N, K)``, class that the path entered first, −1 where it entered none.
        success: ``(N, K)``, bool, whether the class has changed. Where it has not, length and distances are those of
            the path so far.
        steps: ``(N, K)``, number of steps; 0 where the sample is misclassified.
        bound: ``(N, K)``, what no path from the sample into the class that was hit can fall short of; where none was
            hit, into the class aimed at.
        start_logits: ``(N, C)``, of the samples.
        logits: ``(N, K, C)``, at the ends of the paths.
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
    def traced(self) -> Tensor:
        """``(N, K)``, bool: all but those of misclassified samples."""
        return (self.steps > 0) | ~self.success

    @property
    def has_left(self) -> Tensor:
        """``(N, K)``, bool: those of them that have left their class."""
        return self.traced & self.success

    @property
    def shielded(self) -> Tensor:
        """``(N, K)``, bool: those of them that entered a class that they did not aim at."""
        return self.has_left & (self.first_hit != self.targets)

    def rows(self, chosen: slice | Tensor) -> FisherRaoPaths:
        """Paths of some of the samples."""
        return FisherRaoPaths(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    @staticmethod
    def joined(parts: Sequence[FisherRaoPaths]) -> FisherRaoPaths:
        """Paths of several groups of samples, in order."""
        names = [field.name for field in fields(FisherRaoPaths)]
        return FisherRaoPaths(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def fisher_rao_distance(p: Tensor, q: Tensor) -> Tensor:
    """Distance of predictions on the simplex.

    Args:
        p: ``(..., C)``, probabilities: not negative, with sum 1.
        q: ``(..., C)``, likewise, of a shape that broadcasts.

    Returns:
        ``(...)``, in nats, between 0 and π, which is reached by predictions without a common class.

    Raises:
        TypeError: If one of them is not a floating-point tensor.
        ValueError: If one of them is not made of probabilities, or their shapes do not go together.

    Source: Rao 1945; Amari 2016. Computed from the chord of the sphere, because ``arccos`` of almost 1 says nothing.
    """
    for name, probs in (("p", p), ("q", q)):
        _check_probabilities(name, probs)
    if p.shape[-1] != q.shape[-1]:
        raise ValueError(f"Expected as many classes in `p` as in `q`, but got {p.shape[-1]} and {q.shape[-1]}.")
    pairs = zip(reversed(p.shape), reversed(q.shape), strict=False)
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        raise ValueError(f"Expected shapes of `p` and `q` that broadcast, got {tuple(p.shape)} and {tuple(q.shape)}.")
    distance = distance_of_roots(*(probs.to(float64_dtype(probs)).sqrt() for probs in (p, q)))
    return distance.clamp_max(math.pi).to(torch.promote_types(p.dtype, q.dtype))


def fisher_rao_margin_bound(probs: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Distance on the simplex from each prediction to the nearest one with ``q_source = q_target``.

    Args:
        probs: ``(N, C)``, probabilities: not negative, with sum 1.
        source: ``(N,)``, class indices, of the class that is left.
        target: ``(N,)``, class indices, of the one that is entered.

    Returns:
        ``(N,)``, in nats, between 0 and π/2; 0 where the target is at least as probable as the source already.

    Raises:
        TypeError: If ``probs`` is not a floating-point tensor.
        ValueError: If shapes do not match, ``probs`` are no probabilities, or a class index is none.

    Source: ours.
    """
    _check_probabilities("probs", probs)
    if probs.ndim != 2:
        raise ValueError(f"Expected argument `probs` to be of shape (N, C), but got shape {tuple(probs.shape)}.")
    before, after = (
        probs.gather(1, _class_indices(name, classes, probs)[:, None])[:, 0]
        for name, classes in (("source", source), ("target", target))
    )
    return _bound(before, after)


def trace_fisher_rao_paths(
    model: Callable[[Tensor], Tensor],
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
        targets: ``(N, K)``, or ``(K,)`` for all samples alike: class indices that are aimed at; by default all classes
            but the one that is left, in order, K = C − 1.
        labels: ``(N,)``, true classes, which are left; a sample of which another class is predicted has margin 0. By
            default the predicted ones.
        damping: ``λ``, in squared nats per squared unit of the un-normalised input, as the Fisher information is. By
            default a hundredth of the largest eigenvalue that the gradient at the start would have at even odds,
            ``‖∇(log p_y − log p_k)‖²/400``, which follows the units of the input.
        step_length: Fisher–Rao length of a step, to first order, where the Euclidean bound is not smaller; 0.4 by
            default. With both defaults margins of trained networks are within 1 % of those of much shorter steps in
            the median, and 1 to 5 % in the mean, because single paths bend elsewhere.
        max_euclidean_step: Bound of a step in units of the un-normalised input. By default a quarter of the way to the
            boundary of the network linearised at the sample, were that one nat further: it follows the units of the
            input.
        max_steps: After so many steps a path is given up. So it is where it can go no further: where no gradient
            leads on, a valid range is in the way, or logits are not finite.
        solver: ``"gram"`` takes the whole Jacobian, of C rows, and solves each step exactly; ``"cg"`` conjugate
            gradients, which need second derivatives of the network with respect to its input, and less memory than the
            Jacobian if there are very many classes; in single precision they fall short where the damping is a
            millionth of the Fisher information and less.
        mode: ``"poster"`` takes steps ``v / √(gᵀv)``, of length 1 in the damped metric, without bounds unless
            ``max_euclidean_step`` is given; margins are numbers of steps.
        input_std: Standard deviation by which the inputs were divided, one number or one per channel (dimension 1).
            With it all results are in units of the un-normalised input.
        input_mean: What was subtracted from them before that, likewise; 0 by default. Only ``valid_range`` needs it.
        valid_range: Smallest and largest value of an un-normalised input, e.g. ``(0, 1)``, to which each step is
            clamped. By default there is none.
        chunk_size: Largest number of Jacobian rows held in memory at once, C for each path (8 vectors of the size of an
            input with ``"cg"``): that many paths advance together. By default as in
            :func:`~lightning_robust.functional.linearize`.

    Returns:
        :class:`FisherRaoPaths` of N samples and K targets.

    Raises:
        TypeError: If ``inputs`` are not floating point or the model does not return a tensor.
        ValueError: If an argument has a wrong shape or value, a path aims at the class that it is to leave, or inputs
            or their logits are not finite.

    Source: De & Säfken, "The Myth of Robust Classes"; what differs is in the module's docstring.
    """
    settings = check_path_options(
        damping=damping,
        step_length=step_length,
        max_euclidean_step=max_euclidean_step,
        max_steps=max_steps,
        solver=solver,
        mode=mode,
    )
    if chunk_size is not None:
        check_positive_integer("chunk_size", chunk_size)
    check_function("model", model)
    check_inputs(inputs)
    units = Units.of(inputs, std=input_std, mean=input_mean, valid_range=valid_range)
    with differentiable(model, twice=solver == "cg"):
        x = full_precision(inputs)
        num_classes = count_classes(model, x)
        at_once = largest_chunk(x, num_classes if solver == "gram" else _VECTORS_OF_CG, chunk_size)
        tracer = Tracer(model, units, settings)
        start_logits = torch.cat([tracer.logits(part) for part in torch.split(x, at_once)])
        check_logits(start_logits, num_samples=len(x))
        predicted = start_logits.argmax(dim=1)
        source = predicted if labels is None else _class_indices("labels", labels, start_logits)
        aims = _aims(targets, source, num_classes)
        samples, columns = (predicted == source)[:, None].expand_as(aims).nonzero(as_tuple=True)

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

        # as they are for misclassified samples
        success = torch.ones_like(aims, dtype=torch.bool)
        steps = torch.zeros_like(aims)
        margins, l2, linf = (x.new_zeros(aims.shape) for _ in range(3))
        logits = start_logits[:, None].repeat(1, aims.shape[1], 1)
        for paths, has_left in tracer.trace(begin, len(samples), at_once=at_once):
            place = samples[paths.number], columns[paths.number]
            way = units.raw_change(paths.x - paths.start)
            l2[place] = torch.linalg.vector_norm(flat(way), dim=1)
            linf[place] = flat(way).abs().amax(dim=1)
            margins[place], steps[place] = paths.length.to(x), paths.steps
            success[place], logits[place] = has_left, paths.logits
    first_hit = torch.where(success, logits.argmax(dim=2), -1)
    entered = torch.where(success, first_hit, aims)
    probs = start_logits.to(float64_dtype(x)).softmax(dim=1)
    bound = _bound(probs.gather(1, source[:, None]), probs.gather(1, entered))
    return FisherRaoPaths(
        source=source,
        targets=aims,
        margins=margins,
        l2=l2,
        linf=linf,
        first_hit=first_hit,
        success=success,
        steps=steps,
        bound=bound.to(x),
        start_logits=start_logits,
        logits=logits,
    )


def _bound(before: Tensor, after: Tensor) -> Tensor:
    """The bound, for probabilities of the class that is left and of the one that is entered."""
    half_chord = (before.sqrt() - after.sqrt()).clamp_min(0) / math.sqrt(2)
    return 2 * half_chord.clamp_max(1 / math.sqrt(2)).asin()  # arccos √(1 − s²) = arcsin s, exact for small s


def _aims(targets: Tensor | None, source: Tensor, num_classes: int) -> Tensor:
    """Classes aimed at, (N, K)."""
    if targets is None:
        return other_classes(source, num_classes)
    if not isinstance(targets, Tensor):
        raise TypeError(f"Expected argument `targets` to be a tensor (N, K) or (K,), but got {class_of(targets)}.")
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
    """Smallest and largest values that normalised inputs may take; one that is outside already may stay there."""
    if units.valid_range is None:
        edge = start.new_full((len(start), *(1,) * (start.ndim - 1)), torch.inf)
        return -edge, edge
    down, up = changes_within(units.raw(start), units.valid_range)
    return start + units.change(down), start + units.change(up)


def _class_indices(name: str, classes: Tensor, scores: Tensor) -> Tensor:
    """Class indices (N,) beside scores (N, C), in int64 and on their device; raise with the argument's name."""
    labels = check_targets(classes, num_samples=len(scores), num_classes=scores.shape[1], name=name)
    return labels.to(scores.device)


def _check_probabilities(name: str, probs: Tensor) -> None:
    check_floating(name, probs, "(..., C)")
    if probs.ndim == 0 or probs.shape[-1] < 2 or probs.numel() == 0:
        raise ValueError(
            f"Expected argument `{name}` to be of shape (..., C) with C ≥ 2 classes, got shape {tuple(probs.shape)}."
        )
    error = float((probs.detach().sum(dim=-1, dtype=float64_dtype(probs)) - 1).abs().max())
    smallest = float(probs.detach().min())
    tolerance = probs.shape[-1] * torch.finfo(probs.dtype).eps
    if not (smallest >= 0 and error <= 10 * tolerance):
        raise ValueError(
            f"Expected argument `{name}` to hold probabilities, not negative and with sum 1 (`softmax(dim=-1)` of"
            f" logits), but got shape {tuple(probs.shape)} with values from {smallest:.4g} on, and sums that are off by"
            f" up to {error:.4g}."
        )
