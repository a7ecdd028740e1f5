"""An upper bound of the margin of a model that returns labels alone.

Along a few directions from each sample, bisection finds a point near the boundary that the model labels otherwise. Its
distance is that of a perturbation which succeeds, so no margin is larger, and the share of samples with larger
distances is an upper bound of the accuracy under attacks. Half of the directions are random. They are far from the
shortest way in many dimensions; towards samples with other labels, the boundary is usually nearer.

Source: the bisection of Brendel et al. 2018, arXiv 1712.04248; the bound is ours.
Cost: up to 8 + 30 labels per sample and direction; directions that cannot improve on the best are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.arguments import (
    check_function,
    check_kind,
    check_number,
    check_positive_integer,
    class_of,
    optional,
)
from lightning_robust.functional._validation.tensors import check_inputs, check_targets, outputs_of
from lightning_robust.functional.input_space.attacks import Norm, check_norm
from lightning_robust.functional.input_space.jacobian import largest_chunk
from lightning_robust.functional.input_space.query_answers import answering, as_tensor, given_tensors, is_array
from lightning_robust.functional.input_space.query_directions import direction_keys, normal_directions
from lightning_robust.functional.input_space.units import Units, changes_within

_SHARES = tuple(2.0**-k for k in range(7, -1, -1))  # of the largest distance, that are tried first
_BISECTIONS = 30  # down to the rounding of float32 inputs
_FAR = 10.0  # largest distance by default, in units of the size of a sample


def decision_margin(
    predict_labels: Callable[..., Any],
    inputs: Tensor,
    targets: Tensor,
    *,
    num_directions: int = 20,
    directions: Tensor | None = None,
    norm: Norm = "l2",
    max_distance: float | None = None,
    input_std: float | Sequence[float] | Tensor | None = None,
    input_mean: float | Sequence[float] | Tensor | None = None,
    valid_range: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Distance of each sample to a point with another label, an upper bound of its margin.

    Args:
        predict_labels: Maps inputs ``(n, ...)`` to class indices ``(n,)``, sample by sample and for any n, such as
            scikit-learn's ``model.predict``. It gets NumPy arrays if ``inputs`` are an array, else tensors.
        inputs: ``(N, ...)``, floating point; a tensor or a NumPy array.
        targets: ``(N,)``, class indices; a tensor or a NumPy array.
        num_directions: How many directions to search from each sample: half of them random, half towards the nearest
            samples in ``inputs`` that have other labels. If there are too few of those, more are random.
        directions: ``(N, K, ...)``, further directions in units of the un-normalised input, of any length: for example
            gradients of a similar network.
        norm: ``"l2"`` or ``"linf"``, in which distances are measured. Random directions in L∞ are signs.
        max_distance: How far to search; by default ten times the norm of the input, or to the end of ``valid_range``.
        input_std: Standard deviation by which the inputs were divided, one number or one per channel (dimension 1).
            If given, distances are in units of the un-normalised input.
        input_mean: Mean that was subtracted before, one number or one per channel; only ``valid_range`` needs it.
        valid_range: Smallest and largest value of an un-normalised input, which no query leaves.
        generator: Chooses random directions, as in :func:`~lightning_robust.functional.linearize_by_queries`.
        chunk_size: Largest number of rows in a call.

    Returns:
        ``(N,)``, in input units; 0 if misclassified, infinity if no point with another label was found. Each is the
        distance of a point that the model has labelled otherwise, as it was queried.

    Raises:
        TypeError: If inputs are not floating point, or what is returned are no labels.
        ValueError: If an argument has a wrong value, labels are not ``(n,)``, or the same query gets another label
            when it is made again.

    Source: ours; see the module's docstring.
    """
    check_function("predict_labels", predict_labels)
    optional(check_positive_integer, "chunk_size", chunk_size)
    optional(check_kind, "generator", generator, torch.Generator)
    count = check_positive_integer("num_directions", num_directions)
    max_distance = optional(check_number, "max_distance", max_distance, "a positive number", above=0)
    model, inputs, _ = given_tensors(predict_labels, inputs, None)
    check_inputs(inputs)
    labels = check_targets(as_tensor(targets) if is_array(targets) else targets, num_samples=len(inputs)).cpu()
    x = full_precision(inputs)
    optional(_check_directions, "directions", directions, x)
    units = Units.of(inputs, std=input_std, mean=input_mean, valid_range=valid_range)
    at_once = largest_chunk(x, chunk_size, num_rows=1)
    search = _Search(answering(model), units, check_norm(norm), at_once, max_distance)
    with differentiable(predict_labels), torch.no_grad():
        predicted = search.labels(x)
        right = (predicted == labels).nonzero()[:, 0]
        ways = _Ways(search, x, predicted, count, directions, direction_keys(x, generator))
        margins, nearest = torch.zeros(len(x), dtype=torch.float64), x.clone()
        for rows in torch.split(right, max(1, at_once // count)) if len(right) else ():
            margins[rows], nearest[rows] = search.shortest(x[rows], labels[rows], ways.of(rows, labels[rows]))
        found = right[margins[right].isfinite()]
        if len(found) and bool((search.labels(nearest[found]) == labels[found]).any()):
            raise ValueError(
                "The predict function gives the same query another label when it is made again, so no point is known to"
                " lie beyond a boundary. Is it random, or does it remember calls?"
            )
    return margins.to(x)


def _check_directions(name: str, directions: Tensor, x: Tensor) -> None:
    if not isinstance(directions, Tensor) or directions.ndim < 2 or directions[:, 0].shape != x.shape:
        got = tuple(directions.shape) if isinstance(directions, Tensor) else class_of(directions)
        raise ValueError(f"Expected argument `{name}` of shape (N, K, ...) for inputs {tuple(x.shape)}, but got {got}.")


class _Search(NamedTuple):
    """Looks for the nearest point with another label."""

    model: Callable[[Tensor], Any]  # answers in tensors
    units: Units
    norm: Norm
    at_once: int
    max_distance: float | None

    def labels(self, points: Tensor) -> Tensor:
        """Labels (n,) of points (n, ...), on the CPU."""
        return torch.cat([self._labels(part) for part in torch.split(points, self.at_once)])

    def _labels(self, points: Tensor) -> Tensor:
        labels = outputs_of(self.model, points, check=None)
        expected = "Expected the predict function to return labels of shape (N,), class indices, but for"
        if not isinstance(labels, Tensor) or labels.is_complex():
            raise TypeError(f"{expected} {len(points)} inputs it returned {class_of(labels)}.")
        if labels.shape != (len(points),):
            raise ValueError(
                f"{expected} {len(points)} inputs it returned shape {tuple(labels.shape)}. Of scores take `.argmax(1)`."
            )
        if labels.is_floating_point() and not bool((labels == labels.round()).all()):
            raise TypeError(f"{expected} {len(points)} inputs it returned numbers that are no integers.")
        return labels.detach().cpu().long()

    def lengths(self, changes: Tensor) -> Tensor:
        """Norms (...) of changes (..., D) of the un-normalised inputs, in float64."""
        order = 2 if self.norm == "l2" else torch.inf
        norms: Tensor = torch.linalg.vector_norm(changes.double().cpu(), ord=order, dim=-1)
        return norms

    def farthest(self, x: Tensor) -> Tensor:
        """How far to search around samples (n, ...), (n,)."""
        if self.max_distance is not None:
            return torch.full((len(x),), self.max_distance, dtype=torch.float64)
        if self.units.valid_range is not None:
            down, up = changes_within(self.units.raw(x).flatten(1), self.units.valid_range)
            return self.lengths(torch.maximum(-down, up))
        sizes, ones = (self.lengths(self.units.raw_change(part).flatten(1)) for part in (x, torch.ones_like(x)))
        return _FAR * torch.where(sizes > 0, sizes, ones)

    def shortest(self, x: Tensor, labels: Tensor, ways: Tensor) -> tuple[Tensor, Tensor]:
        """Distances (n,) of the nearest points found, ∞ if none was, and these points (n, ...).

        Args:
            x: Samples (n, ...).
            labels: Their labels (n,), as the model gives them.
            ways: Changes (n, K, D) of the un-normalised inputs, along which to search.
        """
        n, k = ways.shape[:2]
        low, high = torch.zeros(n, k, dtype=torch.float64), torch.full((n, k), torch.inf, dtype=torch.float64)
        best, nearest = torch.full((n,), torch.inf, dtype=torch.float64), x.clone()
        reached = torch.zeros(n, k, dtype=torch.float64)  # distance up to which a way is known to keep the label
        for turn in range(len(_SHARES) + _BISECTIONS):
            first = turn < len(_SHARES)
            active = (high.isinf() if first else high.isfinite()) & (reached < best[:, None])
            sample, way = active.nonzero(as_tuple=True)
            if not len(sample):
                continue
            shares = torch.full((len(sample),), _SHARES[turn]).double() if first else (low + high)[sample, way] / 2
            points = self._along(x[sample], ways[sample, way], shares)
            distance = self.lengths(self.units.raw_change((points - x[sample]).double()).flatten(1))
            other = self.labels(points) != labels[sample]
            high[sample[other], way[other]] = shares[other]
            low[sample[~other], way[~other]] = shares[~other]
            reached[sample[~other], way[~other]] = distance[~other]
            for place in other.nonzero()[:, 0].tolist():
                if distance[place] < best[sample[place]]:
                    best[sample[place]], nearest[sample[place]] = distance[place], points[place]
        return best, nearest

    def _along(self, x: Tensor, ways: Tensor, shares: Tensor) -> Tensor:
        """Points a share (n,) of the way (n, D) from samples (n, ...), within the valid range."""
        change = ways * shares.to(ways)[:, None]
        if self.units.valid_range is not None:
            down, up = changes_within(self.units.raw(x).flatten(1), self.units.valid_range)
            change = torch.minimum(torch.maximum(change, down), up)
        return x + self.units.change(change.reshape(x.shape))


class _Ways(NamedTuple):
    """Directions in which to search, with the length up to which to search along each."""

    search: _Search
    x: Tensor  # (N, ...), all samples
    predicted: Tensor  # (N,), their labels
    num_directions: int
    given: Tensor | None  # (N, K, ...)
    keys: list[int]  # for random directions

    def of(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Ways (n, K, D) from some of the samples, as changes of the un-normalised inputs."""
        return torch.stack([self._of_one(int(row), int(label)) for row, label in zip(rows, labels, strict=True)])

    def _of_one(self, row: int, label: int) -> Tensor:
        x, search = self.x[row : row + 1], self.search
        far = search.farthest(x)
        others = (self.predicted != label).nonzero()[:, 0]
        towards = search.units.raw_change(self.x[others] - x).flatten(1)
        lengths = search.lengths(towards)
        near = lengths.argsort()[: self.num_directions // 2]
        near = near[lengths[near] > 0]
        shortened = (far / lengths[near]).clamp_max(1).to(towards)[:, None]
        drawn = normal_directions([self.keys[row]], self.num_directions - len(near), x)[0]
        drawn = drawn.sign() if search.norm == "linf" else drawn
        if self.given is not None:
            drawn = torch.cat([self.given[row].flatten(1).to(drawn), drawn])
        scale = far / search.lengths(drawn).clamp_min(torch.finfo(torch.float64).tiny)
        return torch.cat([drawn * scale.to(drawn)[:, None], towards[near] * shortened])
