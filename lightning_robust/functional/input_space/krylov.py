"""Largest eigenvalues of ``G = Jᵀ A J`` from products with ``J`` and ``Jᵀ``, by Rayleigh–Ritz in a growing subspace.

Each of n samples has an orthonormal basis ``Q`` (D, m) of its own, and the images ``L = J Q`` (C, m) of its vectors.
Outputs may have any shape, such as (T, V) in place of C.
The largest eigenvalue θ of the small matrix ``Lᵀ A L``, with eigenvector y, never exceeds that of ``G``. The residual

    r = Jᵀ A L y − θ Q y

takes one product with ``Jᵀ``. Where it is small enough, ‖r‖ bounds the distance from θ to an eigenvalue. Elsewhere r,
made orthogonal to ``Q``, becomes the next vector, which takes one product with ``J``. For a single matrix ``A`` this is
the method of Lanczos. Unlike it, the subspace serves several matrices, one after the other: ``L`` does not depend on
``A``, which alone depends on the temperature.

A small residual shows an eigenvalue, but not that it is the largest. It is, most likely, if every eigenvector takes
part in the vectors from which the subspace grows in proportion to its eigenvalue, as in ``Jᵀ F u`` for random signs u
and ``F Fᵀ = A``.

Nothing here knows networks, and every test needs but a few matrices.

Source: Lanczos 1950; Davidson 1975, for the growth by residuals; Kato–Temple, for the bound; one subspace for several
matrices is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_robust.functional.input_space.float64 import float64_dtype, widened, working

# A vector whose part outside the subspace is this small, relative to the whole, is inside: the rest is rounding.
_INSIDE = 1e-5
Information = Callable[[Tensor], Tensor]
"""Maps ``w`` (n, C), float64, to ``A w`` for the matrices ``A`` of n samples; (n, ...) in their own precision."""


class Products(Protocol):
    """Products with the Jacobians of n samples."""

    def needed(self, active: Tensor) -> None:
        """Learn which samples (n,) products will be needed of; those of the others may be anything finite."""

    def transposed(self, vectors: Tensor) -> Tensor:
        """``Jᵀu`` for ``u`` (n, C): ``(n, D)``."""

    def times(self, directions: Tensor) -> Tensor:
        """``Jv`` for ``v`` (n, D): ``(n, C)``."""


class Accuracy(NamedTuple):
    """When a Ritz value is good enough.

    Attributes:
        residual: Largest ``‖r‖ / θ``.
        error: Largest bound on the relative error, which is ``‖r‖ / θ``, or ``‖r‖² / (θ (θ − θ₂))`` if that is less,
            with the second Ritz value θ₂.
        products: Most vectors in the subspace of a sample.
    """

    residual: float
    error: float
    products: int

    def reached(self, value: Tensor, second: Tensor, residual: Tensor) -> Tensor:
        """Whether Ritz values (n,) are good enough."""
        relative = torch.where(residual > 0, residual / value, 0.0)
        apart = value - second
        bound = torch.where(apart > 0, relative.square() * value / apart, torch.inf)
        return (relative <= self.residual) & (relative.minimum(bound) <= self.error)


class Eigenvalues(NamedTuple):
    """Largest Ritz values of n samples for each of S matrices.

    Attributes:
        value: ``(S, n)``, never above the eigenvalues.
        residual: ``(S, n)``, ``‖r‖``: an eigenvalue lies within this distance.
        converged: ``(S, n)``, bool.
        image: ``(S, n, C)``, ``J q`` of the unit Ritz vectors q, float64; or ``(S, n, ...)``.
    """

    value: Tensor
    residual: Tensor
    converged: Tensor
    image: Tensor


class Subspace:
    """An orthonormal basis for each of n samples, and the images of its vectors under ``J``.

    Where the basis of a sample has not grown with that of others, it has a zero in place of a vector.

    Attributes:
        vectors: ``(n, D)`` each.
        images: ``(n, C)``, or ``(n, ...)``, each.
        size: ``(n,)``, number of vectors of each sample.
    """

    def __init__(self, products: Products) -> None:
        self._products = products
        self.vectors: list[Tensor] = []
        self.images: list[Tensor] = []
        self.size = torch.zeros(0)

    def add(self, vectors: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Grow by those parts of ``vectors`` (n, D) that are outside, for all samples or the chosen (n,).

        Returns:
            Which samples have grown, (n,): those with a part outside.
        """
        rest = self.outside(vectors)
        before, after = (torch.linalg.vector_norm(part, dim=1) for part in (vectors, rest))
        new: Tensor = after > _INSIDE * before
        new = new if chosen is None else new & chosen
        unit = torch.where(new[:, None], rest / after[:, None], 0.0)
        self.images.append(self._products.times(unit))
        self.vectors.append(unit)
        self.size = new.long() if len(self.vectors) == 1 else self.size + new
        return new

    def outside(self, vectors: Tensor) -> Tensor:
        """Parts of ``vectors`` (n, D) that are orthogonal to the basis."""
        rest = vectors
        for _ in range(2):  # a single time leaves the rounding of large components
            for basis in self.vectors:
                rest = rest - (rest * basis).sum(dim=1, keepdim=True) * basis
        return rest

    def vector(self, weights: Tensor) -> Tensor:
        """``Q y`` (n, D) for weights y (n, m)."""
        return _combined(self.vectors, weights.to(self.vectors[0]))

    def image(self, weights: Tensor) -> Tensor:
        """``L y`` (n, C), float64, for weights y (n, m); (n, ...) in their own precision."""
        return _combined(self.images, weights.to(working(self.images[0])))


class Projection:
    """``Lᵀ A L`` of a growing subspace."""

    def __init__(self, subspace: Subspace, information: Information) -> None:
        self._subspace, self._information = subspace, information
        self.matrix = torch.zeros(0)

    def trace(self) -> Tensor:
        """Trace (n,) of ``A`` on the subspace."""
        images = self._subspace.images
        if images[0].ndim > 2:  # large ones, of which the diagonal is enough
            return torch.stack([dots(image, self._information(working(image))) for image in images]).sum(dim=0)
        self.ritz_values()
        return self.matrix.diagonal(dim1=1, dim2=2).sum(dim=1)

    def ritz_values(self) -> tuple[Tensor, Tensor, Tensor]:
        """The two largest Ritz values of each sample, (n,), and the eigenvector (n, m) of the first."""
        images = self._subspace.images
        done, m = self.matrix.shape[-1], len(images)
        matrix = images[0].new_zeros(len(images[0]), m, m, dtype=float64_dtype(images[0]))
        if done:
            matrix[:, :done, :done] = self.matrix
        for new in range(done, m):
            changed = self._information(working(images[new]))
            for other in range(new + 1):
                matrix[:, new, other] = matrix[:, other, new] = dots(images[other], changed)
        self.matrix = matrix
        values, vectors = torch.linalg.eigh(matrix)
        values = values.clamp_min(0)
        second = values[:, -2] if m > 1 else torch.zeros_like(values[:, -1])
        return values[:, -1], second, vectors[:, :, -1]


def largest_eigenvalues(
    subspace: Subspace,
    products: Products,
    informations: Sequence[Information],
    accuracy: Accuracy,
) -> Eigenvalues:
    """Let a subspace grow until it holds the eigenvectors of the largest eigenvalues.

    Args:
        subspace: With at least one vector for each of n samples. It grows.
        products: The products of these samples.
        informations: S matrices ``A``. A sample turns to the next when it is done with one.
        accuracy: When it is done.

    Returns:
        :class:`Eigenvalues`; the residual of a matrix is that of the moment when the sample turned to the next.
    """
    projections = [Projection(subspace, information) for information in informations]
    like = widened(subspace.images[0].flatten(1)[:, 0])
    numbers = torch.arange(len(projections), device=like.device)[:, None]
    stage = torch.zeros_like(like, dtype=torch.long)
    residuals = like.new_zeros(len(projections), len(like))
    converged = residuals > 0
    while (active := stage < len(projections)).any():
        products.needed(active)
        parts = [projection.ritz_values() for projection in projections]
        value, second, weights = (_at(stage, [part[i] for part in parts]) for i in range(3))
        image = subspace.image(weights)
        cotangent = _of_stage(stage, informations, image)
        size = torch.where(value > 0, value, 1.0)  # products of single precision would lose what is tiny
        rest = products.transposed(cotangent / size.view(-1, *(1,) * (cotangent.ndim - 1)))
        rest = rest - (value / size)[:, None].to(rest) * subspace.vector(weights)
        residual = size * widened(torch.linalg.vector_norm(rest, dim=1))
        good = accuracy.reached(value, second, residual)
        here = (numbers == stage) & active
        residuals, converged = torch.where(here, residual, residuals), torch.where(here, good, converged)
        stays = active & ~good & (subspace.size < accuracy.products)
        if stays.any():
            stays = subspace.add(rest, stays)
        stage = stage + (active & ~stays)
    parts = [projection.ritz_values() for projection in projections]
    images = [subspace.image(weights) for _, _, weights in parts]
    return Eigenvalues(torch.stack([value for value, _, _ in parts]), residuals, converged, torch.stack(images))


def power_iteration(
    start: Tensor, products: Products, informations: Sequence[Information], accuracy: Accuracy
) -> tuple[Eigenvalues, Tensor]:
    """Multiply vectors by ``Jᵀ A J`` again and again; arguments and result are as in :func:`largest_eigenvalues`.

    Returns:
        :class:`Eigenvalues`, and the number of products (n,) of each sample over all matrices.
    """
    found, counts = [], torch.zeros(len(start), dtype=torch.long, device=start.device)
    for information in informations:
        vector = _unit(start)
        active = torch.ones(len(start), dtype=torch.bool, device=start.device)
        state: tuple[Tensor, ...] | None = None
        for _ in range(accuracy.products):
            image = working(products.times(vector))
            cotangent = information(image)
            value = dots(image, cotangent)
            size = torch.where(value > 0, value, 1.0)  # as above
            product = products.transposed(cotangent / size.view(-1, *(1,) * (cotangent.ndim - 1)))
            rest = product - (value / size)[:, None].to(product) * vector
            residual = size * widened(torch.linalg.vector_norm(rest, dim=1))
            converged = residual <= accuracy.residual * value
            now = (value, residual, converged, image)
            state = now if state is None else tuple(map(partial(_where, active), now, state))
            counts = counts + active
            active = active & ~converged
            if not active.any():
                break
            vector = _unit(product)
        assert state is not None
        found.append(state)
    return Eigenvalues(*(torch.stack(parts) for parts in zip(*found, strict=True))), counts


def dots(one: Tensor, other: Tensor) -> Tensor:
    """Inner products (n,) of (n, ...) and (n, ...), float64."""
    if one.ndim > 2 and one.device.type == "cpu":  # products that are large leave the caches
        pairs = zip(one.flatten(1), other.to(one).flatten(1), strict=True)
        return widened(torch.stack([torch.dot(a, b) for a, b in pairs]))
    return widened((one * other).flatten(1).sum(dim=1))


def squared_norms(vectors: Tensor) -> Tensor:
    """``‖v‖²`` (n,) of vectors (n, D), float64."""
    return widened(torch.linalg.vector_norm(vectors, dim=1)).square()


def _unit(vectors: Tensor) -> Tensor:
    """Vectors (n, D) of length 1, but for those of length 0."""
    length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / torch.where(length > 0, length, 1.0)


def _where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Values (n, ...) of one for chosen samples (n,), of the other for the rest."""
    return torch.where(chosen.view(-1, *(1,) * (one.ndim - 1)), one, other)


def _at(stage: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """From S values (n, ...) those of the stage (n,) of each sample; those of the last, if it is through."""
    stacked = torch.stack(list(parts))
    last = stage.clamp_max(len(parts) - 1).view(1, -1, *(1,) * (stacked.ndim - 2))
    return stacked.take_along_dim(last, dim=0)[0]


def _of_stage(stage: Tensor, informations: Sequence[Information], image: Tensor) -> Tensor:
    """``A w`` of the stage (n,) of each sample; those that are through may have any."""
    present = [number for number in range(len(informations)) if (stage == number).any()]
    if len(present) == 1:  # an image can be large
        return informations[present[0]](image)
    return _at(stage, [information(image) for information in informations])


def _combined(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``Σ_i y_i part_i`` (n, ...) for weights y (n, m)."""
    columns = weights.view(*weights.shape, *(1,) * (parts[0].ndim - 1)).unbind(dim=1)
    total = columns[0] * parts[0]
    for column, part in zip(columns[1:], parts[1:], strict=True):
        total = total + column * part if part.ndim == 2 else total.addcmul_(column, part)
    return total
