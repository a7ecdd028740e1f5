"""Fisher–Rao geometry of the probability simplex: distances, speed, and a bound on margins.

Predictions ``p`` are points of the simplex. With the Fisher information as its metric, ``√p`` maps the simplex to part
of a sphere of radius 2, and distances are

    d(p, q) = 2 arccos Σ_c √(p_c q_c),    at most π.

On the sphere the points with ``q_y = q_k`` lie on a hyperplane at distance ``(√p_y − √p_k)/√2`` from ``√p``. A path
from ``p`` into class k is therefore at least as long as the bound

    2 arccos √(1 − (√p_y − √p_k)²/2).

Source: Rao 1945 and Amari 2016 (distance); the bound is ours.
Cost: algebra on probabilities; no forward or backward pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_robust.functional._validation.arguments import check_floating
from lightning_robust.functional._validation.tensors import check_targets
from lightning_robust.functional.input_space.float64 import float64_dtype, widened


def fisher_rao_distance(p: Tensor, q: Tensor) -> Tensor:
    """Distance between predictions on the simplex.

    Args:
        p: ``(..., C)``, probabilities: not negative, with sum 1.
        q: ``(..., C)``, probabilities, of a shape that broadcasts against ``p``.

    Returns:
        ``(...)``, in nats, between 0 and π.

    Raises:
        TypeError: If ``p`` or ``q`` is not a floating-point tensor.
        ValueError: If their shapes do not match or they are not probabilities.

    Source: Rao 1945; Amari 2016. Computed from the chord of the sphere, because ``arccos`` loses all digits near 1.
    """
    for name, probs in (("p", p), ("q", q)):
        _check_probabilities(name, probs)
    if p.shape[-1] != q.shape[-1]:
        raise ValueError(f"Expected as many classes in `p` as in `q`, but got {p.shape[-1]} and {q.shape[-1]}.")
    pairs = zip(reversed(p.shape), reversed(q.shape), strict=False)
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        raise ValueError(f"Expected shapes of `p` and `q` that broadcast, got {tuple(p.shape)} and {tuple(q.shape)}.")
    distance = _distance_of_roots(*(widened(probs).sqrt() for probs in (p, q)))
    return distance.clamp_max(math.pi).to(torch.promote_types(p.dtype, q.dtype))


def fisher_rao_margin_bound(probs: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Distance on the simplex from each prediction to the nearest one with ``q_source = q_target``.

    Args:
        probs: ``(N, C)``, probabilities: not negative, with sum 1.
        source: ``(N,)``, indices of the classes to leave.
        target: ``(N,)``, indices of the classes to enter.

    Returns:
        ``(N,)``, in nats, between 0 and π/2; 0 if the target is at least as probable as the source already.

    Raises:
        TypeError: If ``probs`` is not a floating-point tensor.
        ValueError: If shapes do not match, ``probs`` are not probabilities, or a class index is out of range.

    Source: ours.
    """
    _check_probabilities("probs", probs)
    if probs.ndim != 2:
        raise ValueError(f"Expected argument `probs` to be of shape (N, C), but got shape {tuple(probs.shape)}.")
    before, after = (
        probs.gather(1, class_indices(name, classes, probs)[:, None])[:, 0]
        for name, classes in (("source", source), ("target", target))
    )
    return margin_bound(before, after)


def margin_bound(before: Tensor, after: Tensor) -> Tensor:
    """The margin bound, from probabilities of the class to leave and of the class to enter."""
    half_chord = (before.sqrt() - after.sqrt()).clamp_min(0) / math.sqrt(2)
    return 2 * half_chord.clamp_max(1 / math.sqrt(2)).asin()  # arccos √(1 − s²) = arcsin s, exact for small s


def distance_of_logits(first: Tensor, second: Tensor) -> Tensor:
    """Fisher–Rao distance (n,), in float64, between the predictions of two sets of logits (n, C)."""
    return _distance_of_roots(*((widened(z).log_softmax(dim=1) / 2).exp() for z in (first, second)))


def speed_on_simplex(probs: Tensor, change: Tensor) -> Tensor:
    """``√(uᵀ (diag(p) − p pᵀ) u)`` (n,): how fast the prediction moves while the logits change by ``u`` (n, C)."""
    centred = change - (probs * change).sum(dim=1, keepdim=True)
    return (probs * centred.square()).sum(dim=1).sqrt()


def class_indices(name: str, classes: Tensor, scores: Tensor) -> Tensor:
    """Return class indices (N,) in int64, on the device of the scores (N, C), or raise with the argument's name."""
    labels = check_targets(classes, num_samples=len(scores), num_classes=scores.shape[1], name=name)
    return labels.to(scores.device)


def other_classes(source: Tensor, num_classes: int) -> Tensor:
    """All classes except each sample's own, in order: (n, C − 1)."""
    others = torch.arange(num_classes - 1, device=source.device).expand(len(source), -1)
    return others + (others >= source[:, None])


def _distance_of_roots(first: Tensor, second: Tensor) -> Tensor:
    """Distance from square roots of probabilities, by their chord, because cosines of small angles round to 1."""
    chord: Tensor = torch.linalg.vector_norm(first - second, dim=-1)
    return 4 * (chord / 2).clamp_max(1).asin()


def _check_probabilities(name: str, probs: Tensor) -> None:
    check_floating(name, probs, "(..., C)")
    if probs.ndim == 0 or probs.shape[-1] < 2 or probs.numel() == 0:
        raise ValueError(
            f"Expected argument `{name}` to be of shape (..., C) with C ≥ 2 classes, but got shape"
            f" {tuple(probs.shape)}."
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
