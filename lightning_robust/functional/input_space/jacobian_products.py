"""Products of a network's Jacobian with vectors, without the Jacobian: ``Jᵀu`` and ``Jv`` of a few samples at a time.

``Jᵀu`` is a backward pass. It is linear in u, so that its own backward pass is ``Jv``: one more graph, kept for any
number of products. torch's forward mode takes three convolutions where this takes one, and has no attention kernel.

Where a layer cannot be differentiated twice, ``Jv`` is a central difference of the outputs. So it is where the second
derivative turns out to be wrong: ``u · Jv`` must equal ``Jᵀu · v``, which costs nothing to see.

Source: the backward pass of the backward pass, J. Townsend 2017 ("A new trick for calculating Jacobian vector
products"); the check is ours.
Cost: a forward and two backward passes to begin with, then about one backward pass per product; two forward passes per
central difference.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust.functional._isolation.side_effects import watched_once
from lightning_robust.functional._validation.tensors import check_logits, outputs_of

# In torch's errors about layers that cannot be differentiated twice; the latter two are about backward passes in NumPy,
# and about those that write to the gradients they are given.
_MISSING = re.compile("derivative|differentiate|not implemented|requires? grad|modified by an inplace operation")
_SAME = 1e-3  # relative difference of two numbers that are equal but for rounding
# A central difference is large against the rounding of outputs (in units of it) and of inputs, and else as small as
# that permits: steps across the kinks of a network with ReLU are wrong in proportion to their length.
_OUTPUT_STEP, _INPUT_STEP = 3e3, 1e3
_LONGEST_STEP = 0.01  # relative to the length of the input


class JacobianProducts:
    """Products with ``J`` (C, D) and ``Jᵀ`` of each of n samples. To be used inside :func:`differentiable`.

    Args:
        network: Maps inputs ``(n, ...)`` to logits ``(n, C)``, or ``(n, ...)``, sample by sample. In what follows, C
            stands for any shape.
        x: ``(n, ...)``, normalised inputs.
        std: What an un-normalised change is divided by, in a shape that broadcasts against ``x``; None for 1. ``J`` is
            in logits per unit of un-normalised input.
        first: Maps logits to the vectors ``(n, C)`` of the first product.
        check: Raises unless the outputs can be logits.

    Attributes:
        outputs: ``(n, C)``, the logits.
        gradient: ``(n, D)``, the first product ``Jᵀu``.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        x: Tensor,
        std: Tensor | None,
        *,
        first: Callable[[Tensor], Tensor],
        check: Callable[..., None] = check_logits,
    ) -> None:
        self._network, self._x, self._std = network, x, std
        self._leaf = x.clone().requires_grad_()
        self._logits = outputs_of(network, self._leaf, check=check)
        self.outputs = self._logits.detach()
        self._first = first(self.outputs).to(self.outputs)
        self._cotangent = self._first.clone().requires_grad_()
        self._is_exact: bool | None = None  # unknown before the first product
        self._gradient = self._first_gradient() if self._logits.requires_grad else torch.zeros_like(self._leaf)
        self.gradient = self._per_unit(self._gradient.detach())

    @property
    def is_exact(self) -> bool:
        """Whether products with ``J`` are derivatives rather than differences."""
        return self._is_exact is not False

    def transposed(self, vectors: Tensor) -> Tensor:
        """``Jᵀu`` for ``u`` (n, C): ``(n, D)``."""
        if not self._logits.requires_grad:
            return torch.zeros_like(self.gradient)
        (gradient,) = torch.autograd.grad(
            self._logits, self._leaf, vectors.to(self._logits), retain_graph=True, materialize_grads=True
        )
        return self._per_unit(gradient)

    def times(self, directions: Tensor) -> Tensor:
        """``Jv`` for ``v`` (n, D): ``(n, C)``."""
        if not self._logits.requires_grad:
            return torch.zeros_like(self.outputs)
        change = directions.reshape(self._x.shape)
        change = change if self._std is None else change / self._std
        if self._is_exact is False:
            return self._difference(change)
        product = self._second_derivative(change)
        if self._is_exact is None:
            self._is_exact = product is not None and self._fits(product, directions)
        return product if self._is_exact and product is not None else self._difference(change)

    def _per_unit(self, gradient: Tensor) -> Tensor:
        return (gradient if self._std is None else gradient / self._std).reshape(len(self._x), -1)

    def _first_gradient(self) -> Tensor:
        """The first product, with a graph if the layers allow one."""
        with watched_once():
            gradient = _if_differentiable(self._logits, self._leaf, self._cotangent, create_graph=True)
            if gradient is None:
                self._is_exact = False
                (gradient,) = torch.autograd.grad(
                    self._logits, self._leaf, self._first, retain_graph=True, materialize_grads=True
                )
        return gradient

    def _second_derivative(self, change: Tensor) -> Tensor | None:
        return _if_differentiable(self._gradient, self._cotangent, change, retain_graph=True)

    def _fits(self, product: Tensor, directions: Tensor) -> bool:
        """Whether ``u · Jv`` equals ``Jᵀu · v``, but for rounding."""
        one, other = (self._first * product).flatten(1).sum(dim=1), (self.gradient * directions).sum(dim=1)
        size = torch.linalg.vector_norm(self.gradient, dim=1) * torch.linalg.vector_norm(directions, dim=1)
        return bool(((one - other).abs() <= _SAME * size).all())

    def _difference(self, change: Tensor) -> Tensor:
        """``(f(x + h v) − f(x − h v)) / 2h``, (n, C)."""
        like, eps = (-1, *(1,) * (self._x.ndim - 1)), torch.finfo(self._x.dtype).eps
        steepest, size, length = (
            torch.linalg.vector_norm(values.reshape(len(self._x), -1), dim=1)
            for values in (self._gradient.detach(), self._x, change)
        )
        size = torch.where(size > 0, size, 1.0)
        outputs = self.outputs.masked_fill(self.outputs.isneginf(), 0.0).abs().amax(dim=1).clamp_min(1.0)
        step = torch.where(steepest > 0, _OUTPUT_STEP * eps * outputs / steepest, torch.inf)
        step = step.maximum(_INPUT_STEP * eps * size / self._x[0].numel() ** 0.5).minimum(_LONGEST_STEP * size)
        step = torch.where(length > 0, step / length, 0.0)  # of the change as it came
        moves = step.reshape(like) * change
        with torch.no_grad():
            up, down = (outputs_of(self._network, self._x + sign * moves, check=None) for sign in (1, -1))
        difference = (up - down).masked_fill(self.outputs.isneginf(), 0.0)
        return torch.where(step > 0, 0.5 / step, 0.0).view(-1, *(1,) * (difference.ndim - 1)) * difference


def _if_differentiable(outputs: Tensor, inputs: Tensor, vectors: Tensor, **options: bool) -> Tensor | None:
    """A product with a derivative that layers may not have; None if they have not."""
    try:
        (product,) = torch.autograd.grad(outputs, inputs, vectors, materialize_grads=True, **options)
    except RuntimeError as error:  # NotImplementedError is one, too
        if not _MISSING.search(str(error)):
            raise
        return None
    return product
