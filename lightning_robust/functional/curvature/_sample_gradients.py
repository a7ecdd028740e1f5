"""Squared norms of per-sample gradients, one for each parameter tensor.

The gradient of a whole batch would be cheaper. If each sample has random signs of its own, its squared norm has the
same mean as the sum of per-sample squared norms, but products of different samples add noise: on a CIFAR ResNet-20 and
128 samples the error per probe is 15 %, against 2 to 5 % for per-sample gradients. One per-sample probe is thus worth
nine probes or more.

One backward pass of a whole batch yields the gradient of the outputs of every operation, and for most weights the
norms follow from those (see ``_direct_norms.py``). The others, such as tied weights, go by ``torch.func.vmap``, which
computes many per-sample gradients at once. What supports neither (recurrent layers, checkpointing, custom functions) is
computed for one sample at a time, as is whatever differs from a plain backward pass on one sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_robust.functional._isolation.side_effects import side_effects_reverted, start_anew, watched
from lightning_robust.functional._isolation.weights import Weights
from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional.curvature._direct_norms import DirectNorms

# Elements of per-sample gradients that ``vmap`` holds at once: 16 MiB in float32 on a CPU, where more would only leave
# the caches, and 256 MiB elsewhere.
_CPU_ELEMENTS = 2**22
_ELEMENTS = 2**26
_DEFAULT_CPU_SAMPLES = 32


class SampleGradients:
    """Gradients of a network's outputs with respect to the L weight tensors of given names, sample by sample."""

    def __init__(self, model: SampleModel, weights: Weights, names: tuple[str, ...]) -> None:
        self._model = model
        self._weights = weights
        self._tensors = {name: weights.tensors[name] for name in names}
        self._direct = DirectNorms(model, self._tensors)
        # torch has no vectorised rule for these kernels: it would loop over samples itself, with a warning
        self._vectorises = not any(isinstance(module, nn.RNNBase | nn.EmbeddingBag) for module in weights.modules)
        self._trusted = False

    def samples_at_once(self, inputs: Tensor) -> int:
        """How many samples should pass together by default."""
        samples = -(-len(inputs) // 2)  # each takes about twice its memory in training
        return min(samples, _DEFAULT_CPU_SAMPLES) if inputs.device.type == "cpu" else samples

    def squared_norms(self, inputs: Tensor, rows: Tensor, cotangents: Tensor) -> Tensor:
        """Compute ``‖∂(wᵀz)/∂W_k‖²`` of each sample, ``(M, N, L)``, float64, for cotangents ``w``, ``(M, N, K)``.

        The samples are those of the numbers ``rows`` (N,).
        """
        samples = _Samples(inputs, rows, cotangents)
        plain = None
        if not self._trusted:
            n = int(cotangents.square().sum(dim=(0, 2)).argmax())  # the sample that tells most
            plain = _Plain(n, self._one_by_one(self._tensors, samples.at(slice(n, n + 1)), None))
            self._trusted = any(bool(norms.any()) for norms in plain.norms.values())
        norms: dict[str, Tensor] = {}
        for way in (self._directly, self._vectorised, self._one_by_one):
            rest = {name: tensor for name, tensor in self._tensors.items() if name not in norms}
            if rest:
                norms |= way(rest, samples, plain)
        return torch.stack([norms[name] for name in self._tensors], dim=2)

    def _directly(self, _: Mapping[str, Tensor], samples: _Samples, plain: _Plain | None) -> dict[str, Tensor]:
        if not self._direct.tensors:
            return {}
        try:
            norms = self._direct.norms(*samples)
            if plain is not None and (wrong := self._direct.tensors.keys() - plain.alike(norms)):
                if wrong & self._direct.could_be_last:
                    self._direct.samples_last |= wrong
                    norms = self._direct.norms(*samples)
                self._direct.leave_out(self._direct.tensors.keys() - plain.alike(norms))
                norms = {name: values for name, values in norms.items() if name in self._direct.tensors}
        except torch.OutOfMemoryError:
            raise
        except Exception:  # unless the graph caused it, the plain pass raises it again
            self._direct.leave_out(set(self._direct.tensors))
            return {}
        return norms

    def _vectorised(self, tensors: Mapping[str, Tensor], samples: _Samples, plain: _Plain | None) -> dict[str, Tensor]:
        if not self._vectorises:
            return {}
        most = _CPU_ELEMENTS if samples.inputs.device.type == "cpu" else _ELEMENTS
        step = max(1, most // sum(tensor.numel() for tensor in tensors.values()))
        parts = [slice(start, start + step) for start in range(0, len(samples.inputs), step)]
        try:
            norms = torch.cat([self._all_at_once(tensors, samples.at(part)) for part in parts], dim=1)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # unless vmap's limits caused it, the plain pass raises it again
            self._vectorises = False
            return {}
        named = dict(zip(tensors, norms.unbind(dim=2), strict=True))
        self._vectorises = plain is None or plain.alike(named) == named.keys()
        return named if self._vectorises else {}

    def _all_at_once(self, tensors: Mapping[str, Tensor], samples: _Samples) -> Tensor:
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

        extras = {name: extra[samples.rows] for name, extra in self._model.extras.items()}
        with side_effects_reverted(self._weights.modules):
            norms: Tensor = torch.func.vmap(of_one, in_dims=(None, 0, 0, 1), out_dims=1)(
                dict(tensors), samples.inputs, extras, samples.cotangents
            )
        return norms.detach().double()

    def _one_by_one(self, tensors: Mapping[str, Tensor], samples: _Samples, _: _Plain | None) -> dict[str, Tensor]:
        start_anew()  # what earlier passes have kept may have no graph
        inputs, rows, cotangents = samples
        norms = inputs.new_zeros(*cotangents.shape[:2], len(tensors), dtype=torch.float64)
        for n in range(len(inputs)):
            with watched():
                outputs = self._model.on(rows[n : n + 1])(inputs[n : n + 1].clone()).flatten()
            if not outputs.requires_grad:
                continue
            for m, cotangent in enumerate(cotangents[:, n]):
                # no name holds the gradients: those of the next probe would stand beside them
                norms[m, n] = _squares(
                    torch.autograd.grad(
                        outputs, list(tensors.values()), cotangent, retain_graph=True, allow_unused=True
                    ),
                    zero=norms.new_zeros(()),
                )
        return dict(zip(tensors, norms.unbind(dim=2), strict=True))


class _Samples(NamedTuple):
    inputs: Tensor  # (N, ...)
    rows: Tensor  # (N,)
    cotangents: Tensor  # (M, N, K)

    def at(self, part: slice) -> _Samples:
        return _Samples(self.inputs[part], self.rows[part], self.cotangents[:, part])


class _Plain(NamedTuple):
    """Norms of one sample by a plain backward pass, ``(M, 1)`` each."""

    sample: int
    norms: dict[str, Tensor]

    def alike(self, norms: Mapping[str, Tensor]) -> set[str]:
        """Names of weights whose norms, ``(M, N)``, are the same for this sample."""
        largest = torch.stack(list(self.norms.values())).amax(dim=(0, 2))  # (M,)
        there = {name: values[:, self.sample] for name, values in norms.items()}
        return {name for name, values in there.items() if _near(values, self.norms[name][:, 0], largest)}


def _squares(gradients: Sequence[Tensor | None], *, zero: Tensor) -> Tensor:
    """Sum of squares of each gradient, ``(L,)``, without a copy of any."""
    flat = [None if gradient is None else gradient.flatten() for gradient in gradients]
    return torch.stack([zero if g is None else g.dot(g).to(zero) for g in flat])


def _near(a: Tensor, b: Tensor, largest: Tensor) -> bool:
    return bool(((a - b).abs() <= 1e-2 * torch.maximum(a, b) + 1e-4 * largest).all())
