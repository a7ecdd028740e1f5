"""Spectral norm and trace of the input Fisher information of samples, chunk by chunk, from products with Jacobians.

The subspace of a sample begins with the gradient of the gap between the two most probable classes (summed over
positions, if it has several), which is nearly the eigenvector of a trained network; and with ``Jᵀ R u`` for random
signs u, in which every eigenvector takes part in proportion to its eigenvalue. Other signs estimate the trace: of the
part within the subspace it is known, so that only the part outside is random (Hutch++, Meyer et al. 2021).

Source: ours, but for the trace.
Cost: as in :mod:`~lightning_robust.functional.input_space.matrix_free`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.convolutions import TwiceDifferentiable
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional._validation.independence import check_place
from lightning_robust.functional._validation.tensors import check_finite
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
from lightning_robust.functional.input_space.likelihoods import Likelihood
from lightning_robust.functional.input_space.missing_gradients import refuse_missing_gradients
from lightning_robust.functional.input_space.units import Units

Method = Literal["krylov", "power"]
ACCURACY = Accuracy(residual=0.03, error=0.0075, products=30)
# Words of one position hardly depend on what moves those of another. A residual is then small within a few positions,
# whatever there is in others, long before a Ritz value is the largest eigenvalue.
ACCURACY_OF_POSITIONS = Accuracy(residual=0.003, error=0.005, products=40)
_HELD_VECTORS = 32  # of the size of an input, for each sample of a chunk: its basis and a graph
_HELD_IMAGES = 2**26  # elements, where samples have outputs at several positions: 256 MiB
_PER_SAMPLE = ("logits", "trace", "num_products")  # the other results come per temperature first


class InputInformation(NamedTuple):
    """What is known of the input Fisher information of N samples, without their Jacobians, at S temperatures.

    Attributes:
        temperatures: S numbers.
        logits: ``(N, C)``, the outputs; None if samples have outputs at several positions, which are too many to keep.
        value: ``(S, N)``, spectral norms, float64.
        residual: ``(S, N)``, see :class:`SpectralNormEstimate`.
        converged: ``(S, N)``, bool.
        slope: ``(S, N)``, derivative of the logarithm of the value in that of the temperature.
        trace: ``(N,)``, unbiased estimate of the trace at temperature 1.
        num_products: ``(N,)``, products with ``J``.
    """

    temperatures: tuple[float, ...]
    logits: Tensor | None
    value: Tensor
    residual: Tensor
    converged: Tensor
    slope: Tensor
    trace: Tensor
    num_products: Tensor


def input_information(
    model: Callable[..., Tensor],
    inputs: Tensor,
    *,
    temperatures: Sequence[float],
    method: Method = "krylov",
    accuracy: Accuracy | None = None,
    extras: Mapping[str, Tensor] | None = None,
    input_std: float | Sequence[float] | Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    likelihood: Likelihood,
) -> InputInformation:
    """See :func:`fim_spectral_norm_matrix_free`, which checks the arguments."""
    usual = ACCURACY_OF_POSITIONS if likelihood.has_positions else ACCURACY
    network = SampleModel(model, extras, num_samples=len(inputs))
    units = Units.of(inputs, std=input_std, mean=None)
    seeds = ProbeSeeds.from_contents(inputs) if generator is None else ProbeSeeds.random(len(inputs), generator)
    with differentiable(model, twice=True), TwiceDifferentiable():
        x = full_precision(inputs)
        size = min(len(x), largest_chunk(x, chunk_size, num_rows=_HELD_VECTORS))
        start, at_once = 0, 1 if likelihood.has_positions else size  # until the number of outputs is known
        if at_once < len(x):
            check_place(network, x)
        parts: list[InputInformation] = []
        while start < len(x):
            rows = torch.arange(start, min(start + at_once, len(x)))
            chunk = _Chunk(network, x, rows, units.std, [seeds.keys[row] for row in rows], likelihood)
            parts.append(chunk.information(temperatures, accuracy or usual, method))
            start += len(rows)
            num_outputs = chunk.num_outputs
            del chunk  # its graph, before the next is built
            if likelihood.has_positions:
                at_once = min(size, chunk_size or max(1, _HELD_IMAGES // (num_outputs * _HELD_VECTORS)))
    joined = {
        name: torch.cat([getattr(part, name) for part in parts], dim=0 if name in _PER_SAMPLE else 1)
        for name in InputInformation._fields[1:]
        if getattr(parts[0], name) is not None
    }
    return InputInformation(tuple(temperatures), logits=joined.pop("logits", None), **joined)


class _Chunk:
    """Products with the Jacobians of n samples. Those that are no longer needed drop out when they are half of all."""

    def __init__(
        self,
        network: SampleModel,
        x: Tensor,
        rows: Tensor,
        std: Tensor | None,
        keys: Sequence[int],
        likelihood: Likelihood,
    ) -> None:
        self._network, self._x, self._rows, self._std = network, x, rows, std
        self._keys, self._likelihood = keys, likelihood
        self._here = torch.arange(len(rows))  # places among these samples
        self._products = self._linearised()

    @property
    def num_outputs(self) -> int:
        """Of each sample."""
        return self._products.outputs[0].numel()

    def _linearised(self) -> JacobianProducts:
        rows = self._rows[self._here]
        kind = self._likelihood
        return JacobianProducts(
            self._network.on(rows),
            self._x[rows],
            self._std,
            first=lambda outputs: kind.steepest(kind.prepared(outputs)),
            check=kind.check_outputs,
        )

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
        outputs, first, kind = self._products.outputs, self._products.gradient, self._likelihood
        z, size = kind.prepared(outputs), outputs[0].numel()
        signs = sample_signs(self._keys, range(2), [size] * len(z), width=size).to(z.device).view(2, *z.shape)
        start = self.transposed(kind.root_times(z / temperatures[0], signs[0]))
        # by other signs than those with which the subspace begins: the part outside would be biased
        score = self.transposed(kind.root_times(z, signs[1]))
        for gradients in (first, start, score):
            check_finite(gradients, "gradients of the logits with respect to the inputs")
        if len(flat := (~(first.any(dim=1) | start.any(dim=1) | score.any(dim=1))).nonzero()[:, 0].cpu()):
            refuse_missing_gradients(self._network.on(self._rows[flat]), self._x[self._rows[flat]])

        informations = [kind.information_at(z, temperature) for temperature in temperatures]
        subspace = Subspace(self)
        subspace.add(first)
        if method == "power":
            found, products = power_iteration(start, self, informations, accuracy)
        else:
            subspace.add(start)
            found = largest_eigenvalues(subspace, self, informations, accuracy)
            products = subspace.size
        inside = Projection(subspace, kind.information_at(z, 1.0)).trace()
        return InputInformation(
            tuple(temperatures),
            None if kind.has_positions else outputs,
            found.value,
            found.residual,
            found.converged,
            torch.stack([kind.slope(z, t, image) for t, image in zip(temperatures, found.image, strict=True)]),
            inside + squared_norms(subspace.outside(score)),
            products,
        )
