"""Measures networks of token ids from their embeddings on: ids have no derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.functional._isolation.context import differentiable

MASK = "attention_mask"  # 0 at padding


@dataclass(frozen=True)
class FromEmbeddings:
    """A network of token ids as a function of their embeddings ``(N, T, D)``; the ids and the mask are its extras.

    The network runs as always, from the ids on, so positions and token types are as they should be; only what its
    embedding returns is exchanged. Embeddings of padding stay as they are. The weights of the embedding keep their
    derivatives, for curvature.

    Attributes:
        call: The network, as a function of ids and of its other arguments by keyword.
        embeddings: The layer that embeds them.
        key: Under which the ids lie among the extras.
        passes_mask: Whether the network takes the mask.
    """

    call: Callable[..., Any]
    embeddings: nn.Module
    key: str
    passes_mask: bool

    @property
    def __self__(self) -> object:
        """The network, as of a bound method."""
        return self.call

    def __call__(self, x: Tensor, **extras: Tensor) -> Any:
        """Outputs of the network; raises a ``ValueError`` unless it embeds the ids once, and nothing else."""
        ids, mask = extras.pop(self.key), extras.get(MASK)
        if not self.passes_mask:
            extras.pop(MASK, None)
        calls = 0

        def exchange(layer: nn.Module, arguments: object, output: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if output.shape != x.shape:
                return output
            there = x if mask is None else torch.where(mask.bool()[..., None], x, output.detach())
            return there + (output - output.detach())  # zero, with the derivatives of the embedding's weights

        handle = self.embeddings.register_forward_hook(exchange)
        try:
            outputs = self.call(ids, **extras)
        finally:
            handle.remove()
        if calls != 1:
            raise ValueError(
                f"Expected a network that embeds its {self.key} once, but it called {type(self.embeddings).__name__}"
                f" {calls} times. Pass a `probe_fn` that starts where its perturbations should."
            )
        return outputs

    def embedded(self, ids: Tensor) -> Tensor:
        """Embeddings ``(N, T, D)`` of ids."""
        with differentiable(self.embeddings), torch.no_grad():
            embedded: Tensor = self.embeddings(ids)
        return embedded

    def unit(self) -> float | None:
        """The ``input_std`` that makes the root mean square of the embedding's weights the unit of perturbations."""
        weight = getattr(self.embeddings, "weight", None)
        if not isinstance(weight, Tensor):
            return None
        mean_square = float(weight.detach().float().square().mean())
        return mean_square**-0.5 if mean_square > 0 else None


def embeddings_of(network: nn.Module) -> nn.Module | None:
    """The layer that embeds token ids, as the first of the modules inside tells that has ``get_input_embeddings``."""
    for module in network.modules():
        method = getattr(module, "get_input_embeddings", None)
        if callable(method):
            embeddings = method()
            return embeddings if isinstance(embeddings, nn.Module) else None
    return None
