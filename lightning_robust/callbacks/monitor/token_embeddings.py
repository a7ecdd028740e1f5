"""Measures networks of token ids from their embeddings on: ids have no derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.callbacks.monitor.token_places import argument_of, is_same, places_in
from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._validation.arguments import class_of

MASK = "attention_mask"  # 0 at padding


@dataclass(frozen=True)
class FromEmbeddings:
    """A network of token ids as a function of their embeddings ``(N, T, D)``; the ids and the mask are its extras.

    The network runs as always, from the ids on, so positions and token types are as they should be; only what its
    embedding returns for the ids is exchanged. Embeddings of padding stay as they are. The weights of the embedding
    keep their derivatives, for curvature.

    Embeddings that are as they were and have no derivative need no exchange, whatever the network does with its ids:
    curvature is measured of any network.

    Attributes:
        call: The network, as a function of ids and of its other arguments by keyword.
        embeddings: The layer that embeds them.
        key: Under which the ids lie among the extras.
        passes_mask: Whether the network takes the mask.
        module: The module of the user, in which an error names other layers that embed the ids.
    """

    call: Callable[..., Any]
    embeddings: nn.Module
    key: str
    passes_mask: bool
    module: nn.Module

    @property
    def __self__(self) -> object:
        """The network, as of a bound method."""
        return self.call

    def __call__(self, x: Tensor, **extras: Tensor) -> Any:
        """Outputs of the network.

        Raises:
            ValueError: If an exchange is needed, and the layer is not called with the ids in an arrangement that is
                known, or is called with something that is neither the ids nor another argument of the network.
        """
        ids, mask = extras.pop(self.key), extras.get(MASK)
        if not self.passes_mask:
            extras.pop(MASK, None)
        if not x.requires_grad and self._are_embeddings(x, ids):
            return self.call(ids, **extras)
        wrong: list[str | None] = []  # in each call of the layer

        def exchange(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
            argument = argument_of(args, kwargs)
            if argument is None or _is_another(argument, ids, extras.values()):
                return output
            try:
                exchanged = _exchanged(output, x, ids, mask, argument)
            except ValueError as error:
                wrong.append(str(error))
                return output
            wrong.append(None)
            return exchanged

        handle = self.embeddings.register_forward_hook(exchange, with_kwargs=True)
        try:
            outputs = self.call(ids, **extras)
        finally:
            handle.remove()
        if wrong and not any(wrong):
            return outputs
        reason = next(filter(None, wrong), "it was not called")
        raise ValueError(
            f"Expected {type(self.embeddings).__name__}, which `get_input_embeddings` returns, to be called with the"
            f" {self.key} {tuple(ids.shape)} (which may be transposed, flattened, cut or extended), but {reason}."
            f" {self._remedy(ids, extras)}"
        )

    def _are_embeddings(self, x: Tensor, ids: Tensor) -> bool:
        """Whether ``x`` are the embeddings of the ids; the weights tell, without a call that hooks would notice."""
        try:
            with torch.no_grad():
                return torch.equal(self.embeddings.forward(ids), x)
        except RuntimeError:  # values cannot be compared inside `torch.func.vmap`
            return False

    def _remedy(self, ids: Tensor, extras: Mapping[str, Tensor]) -> str:
        """The line to paste: another layer that embeds the ids, or a network that starts at its embeddings."""
        layers: dict[nn.Module, str] = {
            layer: name for name, layer in self.module.named_modules() if isinstance(layer, nn.Embedding)
        }
        found: list[str] = []

        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], _: object) -> None:
            argument = argument_of(args, kwargs)
            if argument is not None and argument.shape == ids.shape and torch.equal(argument, ids):
                found.append(layers[layer])

        handles = [
            layer.register_forward_hook(note, with_kwargs=True) for layer in layers if layer is not self.embeddings
        ]
        try:
            with torch.no_grad():
                self.call(ids, **extras)
        finally:
            for handle in handles:
                handle.remove()
        if found:
            return (
                f"`{found[0]}` is. To perturb what that layer returns, define on the LightningModule `def"
                f" get_input_embeddings(self): return self.{found[0]}`."
            )
        return (
            "Call the network on embeddings instead: `probe_fn=lambda module, batch: Probe(module.from_embeddings,"
            f" module.embed(batch[{self.key!r}]), batch['labels'])`, where `embed` and `from_embeddings` are the two"
            " parts of your forward pass. Curvature needs none of this:"
            ' `RobustnessMonitor(["hessian_trace", "weight_curvature_index"])`.'
        )

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


def _is_another(argument: Tensor, ids: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether a layer is called with another argument of the network, such as token types."""
    if is_same(argument, ids):
        return False
    return any(argument.shape == other.shape and bool((argument == other).all()) for other in others)


def _exchanged(output: Any, x: Tensor, ids: Tensor, mask: Tensor | None, argument: Tensor) -> Tensor:
    """What the layer returns for ``argument``, with the embeddings ``x`` in the places of the ids.

    Raises:
        ValueError: If the argument is something else, or the output not a row for each of its entries.
    """
    moved, kept = x, None if mask is None else mask == 0
    if not is_same(argument, ids) or argument.shape != ids.shape:
        places = places_in(argument, ids, mask)
        if places is None:
            raise ValueError(f"it was called with a tensor of shape {tuple(argument.shape)} that is something else")
        moved, kept = x.flatten(0, ids.ndim - 1)[places.clamp(min=0)], places < 0
    if not isinstance(output, Tensor) or output.shape != moved.shape:
        got = tuple(output.shape) if isinstance(output, Tensor) else class_of(output)
        raise ValueError(f"it returned {got} instead of embeddings {tuple(moved.shape)}")
    there = moved if kept is None else torch.where(kept[..., None], output.detach(), moved)
    return there + (output - output.detach())  # zero, with the derivatives of the embedding's weights
