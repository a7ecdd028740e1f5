"""What every likelihood offers: the meaning of a network's outputs, from which Fisher information and margins follow.

A likelihood says how probable a target is, given the outputs ``f`` (C numbers) of a network. Its Fisher information in
the outputs is a C × C matrix ``A = Fᵀ F``; the information in the input is ``Jᵀ A J`` with the Jacobian ``J = ∂f/∂x``.
At temperature T the outputs are ``f/T`` and the Jacobian is ``J/T``.

:class:`Likelihood` is what products with ``J`` and ``Jᵀ`` need, for outputs of any shape. :class:`ColumnLikelihood`
adds what takes the gradients of all outputs ``(N, C)``: matrices ``J Jᵀ``, and margins.

Methods that take ``z`` expect outputs in float64 that :meth:`Likelihood.prepared` has returned, divided by T.

Source: ours.
Cost: algebra on N × C outputs; no forward or backward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_robust.functional._validation.arguments import as_number, check_number, expected_but_got, optional
from lightning_robust.functional.input_space.float64 import to_float64
from lightning_robust.functional.input_space.temperature import TemperatureFit

# A sample counts as saturated if what it predicts is more probable than this. Its λ is then at least 250 times smaller
# than the same gradients would give at even odds.
SATURATED_ABOVE = 0.999
_SLOPE_STEP = 1e-3  # of log T


@dataclass(frozen=True)
class Likelihood(ABC):
    """The meaning of outputs ``(N, ...)``.

    Attributes:
        tolerance: How far an output may move, in its own units, before that counts as a change; None where that follows
            from the outputs, or if nobody has said.
        name: By which the likelihood is chosen.
        loss: torch's loss, whose curvature is measured by default.
        needs_tolerance: Whether margins need a tolerance.
        has_positions: Whether a sample has outputs at several positions, ``(N, T, V)``. They are too many to keep, or
            to take all their gradients.
    """

    tolerance: float | None = None
    name: ClassVar[str]
    loss: ClassVar[type[nn.Module]]
    needs_tolerance: ClassVar[bool] = False
    has_positions: ClassVar[bool] = False

    def __post_init__(self) -> None:
        tolerance = optional(check_number, "tolerance", self.tolerance, "a positive number or None", above=0)
        object.__setattr__(self, "tolerance", tolerance)

    # ---- outputs and targets -----------------------------------------------------------------------------------------

    @abstractmethod
    def check_outputs(self, outputs: object, *, num_samples: int, inputs: Tensor | None = None) -> None:
        """Raise unless a network has returned finite outputs ``(num_samples, ...)`` that can have this meaning.

        If outputs are not finite, ``inputs`` that are not are to blame.
        """

    @abstractmethod
    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the targets as the other methods take them, or raise a ``ValueError`` if they have another meaning.

        Args:
            outputs: ``(N, ...)``.
            targets: One target per sample, in a shape and type that users have.
        """

    # ---- information -------------------------------------------------------------------------------------------------

    def prepared(self, outputs: Tensor) -> Tensor:
        """Outputs ``(N, ...)`` in float64, with what is no part of the likelihood left out."""
        return to_float64(outputs)

    @abstractmethod
    def information_times(self, z: Tensor, vectors: Tensor) -> Tensor:
        """``A v`` for m vectors ``(N, ..., m)``, float64, of the same shape."""

    @abstractmethod
    def root_times(self, z: Tensor, signs: Tensor) -> Tensor:
        """``R u`` (N, ...) with ``R Rᵀ = A``, for random signs ``u`` (N, ...).

        The mean of ``‖Jᵀ R u‖²`` is ``tr Jᵀ A J``. Of all such roots it is one of small variance.
        """

    @abstractmethod
    def steepest(self, z: Tensor) -> Tensor:
        """A guess of the vectors ``u`` (N, ...) for which ``Jᵀ u`` is the direction of the most information."""

    def times_information(self, outputs: Tensor, vectors: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        """``A v / T²``, where A is the information at ``outputs / T``.

        Args:
            outputs: ``(N, ...)``.
            vectors: ``(N, ..., m)``.
            temperature: T, one number.

        Returns:
            ``(N, ..., m)``, float64.

        Raises:
            ValueError: If ``temperature`` is not positive.
        """
        scale = check_temperature(temperature)
        return self.information_times(self.prepared(outputs) / scale, to_float64(vectors)) / scale**2

    def information_at(self, z: Tensor, temperature: float) -> Callable[[Tensor], Tensor]:
        """``w ↦ A w / T²`` for ``w`` (N, ...), where A is the information at prepared outputs ``z``, over T.

        Meant for many products at one temperature.
        """
        return lambda w: self.information_times(z / temperature, w[..., None])[..., 0] / temperature**2

    def slope(self, z: Tensor, temperature: float, image: Tensor) -> Tensor:
        """Derivative (N,) of ``log wᵀ A w / T²`` in ``log T``, for ``w`` (N, ...).

        To first order an eigenvalue changes as its eigenvector's form does.
        """
        up, down = (
            (image * self.information_at(z, temperature * (1 + step))(image)).sum(dim=1)
            for step in (_SLOPE_STEP, -_SLOPE_STEP)
        )
        middle = (up + down) / 2
        return torch.where(middle > 0, (up - down) / (2 * _SLOPE_STEP * middle), 0.0)

    # ---- temperature -------------------------------------------------------------------------------------------------

    @abstractmethod
    def evidence_size(self, num_outputs: int) -> int:
        """E, for samples with so many outputs (at each position)."""

    @abstractmethod
    def evidence(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """All of each sample that the temperature depends on, ``(N, E)``, float64.

        Args:
            outputs: ``(N, ...)``.
            targets: As :meth:`check` returns them.
        """

    @abstractmethod
    def fit_evidence(self, evidence: Tensor) -> TemperatureFit:
        """Temperature at which the targets of N samples are the most probable, and how each sample moves it."""

    def fit(self, outputs: Tensor, targets: Tensor) -> TemperatureFit:
        """The same from outputs ``(N, ...)`` and targets."""
        return self.fit_evidence(self.evidence(outputs, self.check(outputs, targets)))

    # ---- margins -----------------------------------------------------------------------------------------------------

    def check_margins(self, sizes: Tensor) -> None:
        """Raise a ``ValueError`` if margins cannot be measured.

        Args:
            sizes: Numbers of the size of outputs.
        """
        if self.needs_tolerance and self.tolerance is None:
            raise ValueError(self.without_tolerance(sizes))

    def without_tolerance(self, sizes: Tensor) -> str:
        """The error for margins that need a tolerance; ``sizes`` are numbers of the size of outputs."""
        spread = float(sizes.detach().double().std(correction=0)) or 1.0
        line = f"likelihood={self.name!r}, tolerance={float(f'{spread / 10:.1g}'):g}"
        return (
            f"Expected argument `tolerance` with likelihood {self.name!r}, because a margin is the distance at which an"
            f" output moves by that much, in its own units, but got None. Pass `RobustnessMonitor({line})` or"
            f" `Probe(model, inputs, targets, {line})`, here a tenth of the standard deviation."
        )


@dataclass(frozen=True)
class ColumnLikelihood(Likelihood):
    """The meaning of outputs ``(N, C)``, of which all gradients may be taken.

    Attributes:
        fewest_outputs: The smallest C.
    """

    fewest_outputs: ClassVar[int] = 1

    # ---- information -------------------------------------------------------------------------------------------------

    @abstractmethod
    def information(self, z: Tensor, gram: Tensor) -> Tensor:
        """``F K Fᵀ`` for Gram matrices ``K = J Jᵀ``, ``(N, C, C)``: its eigenvalues but 0 are those of ``Jᵀ A J``.

        Args:
            z: ``(N, C)``, prepared outputs over T.
            gram: ``(N, C, C)``, float64.
        """

    @abstractmethod
    def transposed_root_times(self, z: Tensor, vectors: Tensor) -> Tensor:
        """``Fᵀ v`` for vectors ``(N, C, m)``, float64, of the same shape."""

    @abstractmethod
    def saturated(self, outputs: Tensor) -> Tensor | None:
        """Mark samples, (N,), so confident that the information says little; None if it never depends on confidence."""

    # ---- temperature -------------------------------------------------------------------------------------------------

    @abstractmethod
    def fit(self, outputs: Tensor, targets: Tensor) -> TemperatureFit:
        """Temperature at which targets are the most probable, for outputs ``(N, C)``, and how each sample moves it."""

    def evidence(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Targets beside outputs."""
        z = to_float64(outputs)
        return torch.cat([targets.to(z).reshape(len(z), -1), z], dim=1)

    @abstractmethod
    def apart(self, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``(N, C)`` and targets of which :meth:`evidence` was made."""

    def fit_evidence(self, evidence: Tensor) -> TemperatureFit:
        """See :meth:`fit`."""
        return self.fit(*self.apart(evidence))

    # ---- margins -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def gaps(self, outputs: Tensor) -> Tensor | None:
        """What must close before the prediction counts as changed, one per output, ``(N, C)``; None if nobody has said.

        An infinite gap is closed by nothing.
        """

    @abstractmethod
    def gap_gradients(self, outputs: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The gradients of each gap, C times: one, or one for each of two ways in which it can close.

        Args:
            outputs: ``(N, C)``.
            rows: ``(N, C, D)``, the Jacobian.

        Yields:
            Tensors ``(N, D)``; a step against one of them closes the gap.
        """

    @abstractmethod
    def slopes_l2(self, outputs: Tensor, gram: Tensor) -> Tensor:
        """L2 norms of the gradients of all gaps, ``(N, C)``, float64, from Gram matrices ``(N, C, C)``."""

    @abstractmethod
    def closing(self, outputs: Tensor, before: Tensor, which: Tensor) -> tuple[Tensor, ...]:
        """What rises while gap ``which`` of each sample closes: one (N,), or one for each of two ways.

        Args:
            outputs: ``(N, C)``, differentiable.
            before: ``(N, C)``, the outputs whose gaps these are.
            which: ``(N,)``.
        """

    def distances(self, outputs: Tensor, slopes: Tensor) -> Tensor:
        """Distance at which each gap of outputs ``(N, C)`` closes, by its slope; infinity if none leads there."""
        gaps = self.gaps(outputs)
        if gaps is None:
            raise ValueError(self.without_tolerance(outputs))
        return (gaps / slopes).nan_to_num(nan=torch.inf, posinf=torch.inf)

    @abstractmethod
    def margins(self, outputs: Tensor, slopes: Tensor, targets: Tensor) -> Tensor:
        """Distance ``(N,)`` at which the prediction changes; 0 if it is wrong, infinity if no gradient leads there.

        Args:
            outputs: ``(N, C)``.
            slopes: ``(N, C)``, dual norms of the gradients of the gaps.
            targets: As :meth:`check` returns them.
        """


def check_temperature(temperature: float | Tensor) -> float:
    """Return a temperature as a float, or raise a ``ValueError`` unless it and its square are positive and finite."""
    one = temperature.item() if isinstance(temperature, Tensor) and temperature.numel() == 1 else temperature
    scale = as_number(one)
    if not (scale > 0 and 0 < scale * scale < torch.inf):
        raise ValueError(expected_but_got("temperature", "positive and finite, as its square must be", temperature))
    return scale
