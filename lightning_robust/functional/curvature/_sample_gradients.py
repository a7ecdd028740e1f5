"""Squared norms of per-sample gradients, one for each parameter tensor.

The gradient of a whole batch would be cheaper. If each sample has random signs of its own, its squared norm has the
same mean as the sum of per-sample squared norms, but products of different samples add noise: on a CIFAR ResNet-20 and
128 samples the error per probe is 15 %, against 2 to 5 % for per-sample gradients. One per-sample probe is thus worth
nine probes or more, at twice the time of one.

``torch.func.vmap`` computes many per-sample gradients at once. If it does not support a network (recurrent layers,
checkpointing, custom functions), or differs from a plain backward pass on the first sample, samples pass one at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_robust.functional._isolation.side_effects import side_effects_reverted, start_anew, watched
from lightning_robust.functional._isolation.weights import Weights
from lightning_robust.functional._validation.extras import SampleModel

# Elements of per-sample gradients held at once when the user sets no bound: 16 MiB in float32 on a CPU, where more
# would only leave the caches, and 256 MiB elsewhere.
_DEFAULT_CPU_ELEMENTS = 2**22
_DEFAULT_ELEMENTS = 2**26
_DEFAULT_CPU_SAMPLES = 32


class SampleGradients:
    """Gradients of a network's outputs with respect to the L weight tensors of given names, sample by sample."""

    def __init__(self, model: SampleModel, weights: Weights, names: tuple[str, ...]) -> None:
        self._model = model
        self._weights = weights
        self._tensors = {name: weights.tensors[name] for name in names}
        # torch has no vectorised rule for its recurrent kernels: it would loop over samples itself, with a warning
        self._vectorised = not any(isinstance(module, nn.RNNBase) for module in weights.modules)
        self._trusted = False

    def samples_at_once(self, inputs: Tensor) -> int:
        """How many samples should pass together by default."""
        size = max(1, sum(tensor.numel() for tensor in self._tensors.values()))
        samples = -(-len(inputs) // 2)  # each takes about twice its memory in training
        if inputs.device.type == "cpu":
            samples = min(samples, _DEFAULT_CPU_ELEMENTS // size, _DEFAULT_CPU_SAMPLES)
        return max(1, min(samples, _DEFAULT_ELEMENTS // size))

    def squared_norms(self, inputs: Tensor, rows: Tensor, cotangents: Tensor) -> Tensor:
        """Compute ``‖∂(wᵀz)/∂W_k‖²`` of each sample, ``(M, N, L)``, float64, for cotangents ``w``, ``(M, N, K)``.

        The samples are those of the numbers ``rows`` (N,).
        """
        if self._vectorised:
            try:
                norms = self._all_at_once(inputs, rows, cotangents)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # unless vmap's limits caused it, the plain pass raises it again
                self._vectorised = False
            else:
                self._trusted = self._trusted or _near(
                    norms[:, :1], self._one_by_one(inputs[:1], rows[:1], cotangents[:, :1])
                )
                if self._trusted:
                    return norms
                self._vectorised = False
        return self._one_by_one(inputs, rows, cotangents)

    def _all_at_once(self, inputs: Tensor, rows: Tensor, cotangents: Tensor) -> Tensor:
        def of_one(tensors: dict[str, Tensor], sample: Tensor, extras: dict[str, Tensor], cotangents: Tensor) -> Tensor:
            extras = {name: extra[None] for name, extra in extras.items()}

            def outputs(tensors: dict[str, Tensor]) -> Tensor:
                with self._weights.replaced(tensors):
                    return self._model(sample[None].clone(), **extras).flatten()

            def norms(cotangent: Tensor) -> Tensor:
                return torch.stack([torch.linalg.vector_norm(g).square() for g in pull_back(cotangent)[0].values()])

            _, pull_back = torch.func.vjp(outputs, tensors)  # type: ignore[misc]
            with torch.no_grad():  # or autograd records the backward pass for a second derivative
                return torch.stack([norms(cotangent) for cotangent in cotangents.unbind()])

        extras = {name: extra[rows] for name, extra in self._model.extras.items()}
        with side_effects_reverted(self._weights.modules):
            norms: Tensor = torch.func.vmap(of_one, in_dims=(None, 0, 0, 1), out_dims=1)(
                self._tensors, inputs, extras, cotangents
            )
        return norms.detach().double()

    def _one_by_one(self, inputs: Tensor, rows: Tensor, cotangents: Tensor) -> Tensor:
        start_anew()  # what earlier passes have kept may have no graph
        norms = inputs.new_zeros(*cotangents.shape[:2], len(self._tensors), dtype=torch.float64)
        for n in range(len(inputs)):
            with watched():
                outputs = self._model.on(rows[n : n + 1])(inputs[n : n + 1].clone()).flatten()
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
