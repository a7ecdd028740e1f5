"""Squared norms of the gradients of single samples, one for each parameter tensor.

A batch gives the gradient of a sum. Its squared norm has the same mean as the sum of squared norms if each sample has
signs of its own, but also the products of different samples, which are noise: on a CIFAR ResNet-20 and 128 samples an
error of 15 % per probe, where single samples leave 2 to 5 %. That is worth nine probes or more, for twice the time of
one: samples are always taken singly. ``torch.func.vmap`` does it for many at once; a network that it does not support
(recurrent layers, checkpointing, custom functions), or of which it gives another result for the first sample, sees one
sample at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_robust.functional._isolation.side_effects import side_effects_reverted
from lightning_robust.functional._isolation.weights import Weights

# Elements of sample gradients held at once when the user sets no bound: 16 MiB in float32 where more would only leave
# the caches, 256 MiB elsewhere.
_DEFAULT_CPU_ELEMENTS = 2**22
_DEFAULT_ELEMENTS = 2**26
_DEFAULT_CPU_SAMPLES = 32


class SampleGradients:
    """Gradients of a network's outputs with respect to its weights, sample by sample.

    Args:
        model: Maps inputs ``(N, ...)`` to outputs ``(N, ...)``.
        weights: Of the network.
        names: Of the parameter tensors that are wanted, L of them.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], weights: Weights, names: tuple[str, ...]) -> None:
        self._model = model
        self._weights = weights
        self._tensors = {name: weights.tensors[name] for name in names}
        # torch has no vectorised rule for its recurrent kernels, would run them one by one itself, and say so
        self._vectorised = not any(isinstance(module, nn.RNNBase) for module in weights.modules)
        self._trusted = False

    def samples_at_once(self, inputs: Tensor) -> int:
        """How many samples should pass together."""
        size = max(1, sum(tensor.numel() for tensor in self._tensors.values()))
        samples = -(-len(inputs) // 2)  # one takes about twice the memory that it takes in training
        if inputs.device.type == "cpu":
            samples = min(samples, _DEFAULT_CPU_ELEMENTS // size, _DEFAULT_CPU_SAMPLES)
        return max(1, min(samples, _DEFAULT_ELEMENTS // size))

    def squared_norms(self, inputs: Tensor, cotangents: Tensor) -> Tensor:
        """``‖∂(wᵀz)/∂W_k‖²`` of each sample.

        Args:
            inputs: ``(N, ...)``.
            cotangents: ``w``, ``(M, N, K)`` for outputs of K elements each.

        Returns:
            ``(M, N, L)``, float64.
        """
        if self._vectorised:
            try:
                norms = self._all_at_once(inputs, cotangents)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # whatever it is, if it is not vmap's limits it comes again
                self._vectorised = False
            else:
                self._trusted = self._trusted or _near(norms[:, :1], self._one_by_one(inputs[:1], cotangents[:, :1]))
                if self._trusted:
                    return norms
                self._vectorised = False
        return self._one_by_one(inputs, cotangents)

    def _all_at_once(self, inputs: Tensor, cotangents: Tensor) -> Tensor:
        def of_one(tensors: dict[str, Tensor], sample: Tensor, cotangents: Tensor) -> Tensor:
            def outputs(tensors: dict[str, Tensor]) -> Tensor:
                with self._weights.replaced(tensors):
                    return self._model(sample[None].clone()).flatten()

            def norms(cotangent: Tensor) -> Tensor:
                return torch.stack([torch.linalg.vector_norm(g).square() for g in pull_back(cotangent)[0].values()])

            _, pull_back = torch.func.vjp(outputs, tensors)  # type: ignore[misc]
            with torch.no_grad():  # otherwise the backward pass is recorded for a second one
                return torch.stack([norms(cotangent) for cotangent in cotangents.unbind()])

        with side_effects_reverted(self._weights.modules):
            norms: Tensor = torch.func.vmap(of_one, in_dims=(None, 0, 1), out_dims=1)(self._tensors, inputs, cotangents)
        return norms.detach().double()

    def _one_by_one(self, inputs: Tensor, cotangents: Tensor) -> Tensor:
        norms = inputs.new_zeros(*cotangents.shape[:2], len(self._tensors), dtype=torch.float64)
        for n in range(len(inputs)):
            outputs = self._model(inputs[n : n + 1].clone()).flatten()
            if not outputs.requires_grad:
                continue
            for m, cotangent in enumerate(cotangents[:, n]):
                gradients = torch.autograd.grad(
                    outputs, list(self._tensors.values()), cotangent, retain_graph=True, allow_unused=True
                )
                norms[m, n] = torch.stack(
                    [norms.new_zeros(()) if g is None else g.square().sum().double() for g in gradients]
                )
        return norms


def _near(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-2 * torch.maximum(a, b) + 1e-4 * b.max()).all())
