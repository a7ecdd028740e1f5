"""Spectral norm of the input Fisher information without a gradient for every class.

An exact linearisation takes one backward pass per class. With a thousand classes, two to ten products with ``J`` and
``Jᵀ`` give the largest eigenvalue of ``G = Jᵀ (diag(p) − p pᵀ) J`` to a fraction of a percent
(:mod:`~lightning_robust.functional.input_space.krylov`), because the Fisher information of a classifier is nearly of
low rank. Truncating it to the most probable classes is no substitute: on an ImageNet network, twenty classes hold 76 to
93 % of λ.

Source: arXiv 2606.04767 for the quantity and power iteration; the method is ours.
Cost: two forward and three backward passes, and for each product about two more backward passes (two to three products
for a trained network, ten at the beginning of training).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.convolutions import TwiceDifferentiable
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.arguments import (
    as_numbers,
    check_choice,
    check_kind,
    check_number,
    check_positive_integer,
    expected_but_got,
    optional,
)
from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional._validation.independence import check_place
from lightning_robust.functional._validation.tensors import check_finite, check_pass
from lightning_robust.functional.curvature.signs import ProbeSeeds, sample_signs
from lightning_robust.functional.input_space.jacobian import largest_chunk
from lightning_robust.functional.input_space.jacobian_products import JacobianProducts
from lightning_robust.functional.input_space.krylov import (
    Accuracy,
    Projection,
    Subspace,
    largest_eigenvalues,
    power_iteration,
    squared_norms,
)
from lightning_robust.functional.input_space.missing_gradients import refuse_missing_gradients
from lightning_robust.functional.input_space.softmax_root import softmax_root
from lightning_robust.functional.input_space.temperature import with_masks
from lightning_robust.functional.input_space.units import Units

Method = Literal["krylov", "power"]
_HELD_VECTORS = 32  # of the size of an input, for each sample of a chunk: its basis and a graph
DEFAULT_ACCURACY = Accuracy(residual=0.03, error=0.005, products=30)
_SLOPE_STEP = 1e-3  # of log T
_PER_SAMPLE = ("logits", "trace", "num_products")  # the other results come per temperature first


@dataclass(frozen=True)
class SpectralNormEstimate:
    """Spectral norms from below, and how far they may be off.

    Attributes:
        value: ``(N,)``, or ``(S, N)`` for S temperatures: Rayleigh quotients, never above the spectral norm but for
            rounding, in squared nats per squared input unit.
        residual: Of the same shape, ``‖G q − value · q‖`` of the unit vector q: an eigenvalue of ``G`` lies within this
            distance. Whether it is the largest, no residual tells.
        converged: Of the same shape, bool: whether the residual is as small as was asked for.
        num_products: ``(N,)``, products with ``J`` that each sample took. Each comes with one or two with ``Jᵀ``.
    """

    value: Tensor
    residual: Tensor
    converged: Tensor
    num_products: Tensor


def fim_spectral_norm_matrix_free(
    model: Callable[..., Tensor],
    inputs: Tensor,
    *,
    temperature: float | Sequence[float] | Tensor = 1.0,
    method: Method = "krylov",
    tolerance: float = 0.03,
    max_products: int = 30,
    extras: Mapping[str, Tensor] | None = None,
    input_std: float | Sequence[float] | Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> SpectralNormEstimate:
    """Largest eigenvalue of each sample's input Fisher information matrix, without a backward pass per class.

    Use it for many classes; up to about 32, :func:`~lightning_robust.functional.linearize` is as cheap and exact. The
    model runs as there.

    Args:
        model: Maps inputs ``(N, ...)`` to logits ``(N, C)``, sample by sample.
        inputs: ``(N, ...)``, floating point.
        temperature: Divides the logits; or several, one after the other on the same subspace, which is cheaper than
            one by one. The cheapest order begins with the one that fits best.
        method: ``"krylov"``, or ``"power"``: power iteration, the paper's method and our reference. It takes two to ten
            times as many products.
        tolerance: Largest residual, relative to the value, at which a value counts as converged. ``"krylov"`` asks
            for a sixth of it as the bound on the relative error, too, which is a stronger demand where the two largest
            eigenvalues are close.
        max_products: Most products with ``J`` for each sample (and temperature, with ``"power"``).
        extras: As in :func:`~lightning_robust.functional.linearize`.
        input_std: As in :func:`~lightning_robust.functional.linearize`.
        generator: Draws the random signs with which the subspace begins. By default those of a sample are a function of
            its contents, so that the same samples give the same values in any batch.
        chunk_size: Largest number of samples that pass through the network together.

    Returns:
        A :class:`SpectralNormEstimate` of N samples.

    Raises:
        TypeError: As :func:`~lightning_robust.functional.linearize`.
        ValueError: As :func:`~lightning_robust.functional.linearize`, or if a temperature or an option has a wrong
            value.

    Source: arXiv 2606.04767 (the quantity, and power iteration); Krylov subspaces and their start are ours.
    """
    check_pass(model, inputs, chunk_size=chunk_size)
    several = as_numbers(temperature)
    temperatures = [
        check_number("temperature", one, "a positive number or a list of such numbers", above=0)
        for one in ([temperature] if several is None else several)
    ]
    if not temperatures:
        raise ValueError(expected_but_got("temperature", "a positive number or a list of such numbers", temperature))
    check_choice("method", method, get_args(Method))
    tolerance = check_number("tolerance", tolerance, "a positive number", above=0)
    check_positive_integer("max_products", max_products)
    optional(check_kind, "generator", generator, torch.Generator)
    found = information_without_jacobian(
        model,
        inputs,
        temperatures=temperatures,
        method=method,
        accuracy=Accuracy(tolerance, tolerance / 6, max_products),
        extras=extras,
        input_std=input_std,
        generator=generator,
        chunk_size=chunk_size,
    )
    parts = (found.value, found.residual, found.converged)
    value, residual, converged = (part if several is not None else part[0] for part in parts)
    return SpectralNormEstimate(value.to(found.logits), residual.to(found.logits), converged, found.num_products)


class InputInformation(NamedTuple):
    """What is known of the input Fisher information of N samples, without their Jacobians, at S temperatures.

    Attributes:
        logits: ``(N, C)``.
        value: ``(S, N)``, spectral norms, float64.
        residual: ``(S, N)``, see :class:`SpectralNormEstimate`.
        converged: ``(S, N)``, bool.
        slope: ``(S, N)``, derivative of the logarithm of the value in that of the temperature.
        trace: ``(N,)``, unbiased estimate of the trace at temperature 1.
        num_products: ``(N,)``, products with ``J``.
    """

    logits: Tensor
    value: Tensor
    residual: Tensor
    converged: Tensor
    slope: Tensor
    trace: Tensor
    num_products: Tensor


def information_without_jacobian(
    model: Callable[..., Tensor],
    inputs: Tensor,
    *,
    temperatures: Sequence[float],
    method: Method = "krylov",
    accuracy: Accuracy = DEFAULT_ACCURACY,
    extras: Mapping[str, Tensor] | None = None,
    input_std: float | Sequence[float] | Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> InputInformation:
    """See :func:`fim_spectral_norm_matrix_free`, which checks the arguments."""
    network = SampleModel(model, extras, num_samples=len(inputs))
    units = Units.of(inputs, std=input_std, mean=None)
    seeds = ProbeSeeds.from_contents(inputs) if generator is None else ProbeSeeds.random(len(inputs), generator)
    with differentiable(model, twice=True), TwiceDifferentiable():
        x = full_precision(inputs)
        size = min(len(x), largest_chunk(x, chunk_size, num_rows=_HELD_VECTORS))
        if size < len(x):
            check_place(network, x)
        parts = []
        for rows in torch.split(torch.arange(len(x)), size):
            chunk = _Chunk(network, x, rows, units.std, [seeds.keys[row] for row in rows])
            parts.append(chunk.information(temperatures, accuracy, method))
    return InputInformation(
        **{
            name: torch.cat([getattr(part, name) for part in parts], dim=0 if name in _PER_SAMPLE else 1)
            for name in InputInformation._fields
        }
    )


class _Chunk:
    """Products with the Jacobians of n samples. Those that are no longer needed drop out when they are half of all."""

    def __init__(self, network: SampleModel, x: Tensor, rows: Tensor, std: Tensor | None, keys: Sequence[int]) -> None:
        self._network, self._x, self._rows, self._std, self._keys = network, x, rows, std, keys
        self._here = torch.arange(len(rows))  # places among these samples
        self._products = self._linearised()
        self.logits = self._products.outputs

    def _linearised(self) -> JacobianProducts:
        rows = self._rows[self._here]
        return JacobianProducts(self._network.on(rows), self._x[rows], self._std, first=gap_of_two)

    def needed(self, active: Tensor) -> None:
        """See :class:`Products`."""
        here = active.nonzero()[:, 0].cpu()
        if len(here) <= len(self._here) / 2:
            self._here = here
            del self._products  # its graph, before the next is built
            self._products = self._linearised()

    def transposed(self, vectors: Tensor) -> Tensor:
        """See :class:`Products`."""
        return self._spread(self._products.transposed(vectors[self._here]))

    def times(self, directions: Tensor) -> Tensor:
        """See :class:`Products`."""
        return self._spread(self._products.times(directions[self._here]))

    def _spread(self, values: Tensor) -> Tensor:
        """Values (k, ...) of the samples that are here, as values (n, ...) of all."""
        if len(self._here) == len(self._rows):
            return values
        whole = values.new_zeros(len(self._rows), *values.shape[1:])
        whole[self._here] = values
        return whole

    def information(self, temperatures: Sequence[float], accuracy: Accuracy, method: Method) -> InputInformation:
        """Measure the samples."""
        z, first = with_masks(self.logits), self._products.gradient
        signs = sample_signs(self._keys, range(2), [z.shape[1]] * len(z), width=z.shape[1]).to(z.device)
        start = self.transposed(softmax_root(z / temperatures[0], signs[:1])[0])
        # other signs than those of the subspace, or the part outside would be biased
        score = self.transposed(softmax_root(z, signs[1:])[0])
        for gradients in (first, start, score):
            check_finite(gradients, "gradients of the logits with respect to the inputs")
        if len(flat := (~(first.any(dim=1) | start.any(dim=1) | score.any(dim=1))).nonzero()[:, 0].cpu()):
            refuse_missing_gradients(self._network.on(self._rows[flat]), self._x[self._rows[flat]])

        informations = [partial(class_information, z, temperature=temperature) for temperature in temperatures]
        subspace = Subspace(self)
        subspace.add(first)
        if method == "power":
            found, products = power_iteration(start, self, informations, accuracy)
        else:
            subspace.add(start)
            found = largest_eigenvalues(subspace, self, informations, accuracy)
            products = subspace.size
        trace = Projection(subspace, partial(class_information, z)).trace() + squared_norms(subspace.outside(score))
        return InputInformation(
            self.logits,
            found.value,
            found.residual,
            found.converged,
            _slopes(z, found.image, temperatures),
            trace,
            products,
        )


def gap_of_two(logits: Tensor) -> Tensor:
    """``e_ŷ − e_k`` (n, C) for the most probable class ŷ and the next."""
    top = logits.topk(2, dim=1).indices
    return torch.zeros_like(logits).scatter(1, top, logits.new_tensor([[1.0, -1.0]]).expand(len(logits), -1))


def class_information(z: Tensor, vectors: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``A w`` (n, C) with ``A = (diag(p) − p pᵀ) / T²`` and ``p = softmax(z / T)``, for ``w`` (n, C), float64."""
    probs = (z / temperature).softmax(dim=1)
    weighted = probs * vectors
    information: Tensor = (weighted - probs * weighted.sum(dim=1, keepdim=True)) / temperature**2
    return information


def _slopes(z: Tensor, images: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Derivatives (S, n) of log λ in log T: to first order an eigenvalue changes as its eigenvector's form does."""
    slopes = []
    for image, temperature in zip(images, temperatures, strict=True):
        up, down = (
            (image * class_information(z, image, temperature=temperature * (1 + step))).sum(dim=1)
            for step in (_SLOPE_STEP, -_SLOPE_STEP)
        )
        middle = (up + down) / 2
        slopes.append(torch.where(middle > 0, (up - down) / (2 * _SLOPE_STEP * middle), 0.0))
    return torch.stack(slopes)
