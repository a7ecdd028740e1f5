"""Arguments of a network beside its inputs, one row per sample: padding masks, categories, lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.arguments import check_kind, class_of
from lightning_robust.functional._validation.outputs import logits_in

Rows = slice | Tensor


class SampleModel:
    """A network, and those of its arguments that belong to the samples on which it is measured.

    Args:
        model: Maps inputs ``(n, ...)``, and the extras of the same samples by keyword, to outputs ``(n, ...)``, which
            may lie in a tuple, dictionary or object (see :func:`logits_in`).
        extras: Tensors ``(N, ...)``, checked by :func:`check_extras`.
        num_samples: N.

    Attributes:
        model: As given.
        extras: Detached, and in float32 if they were in half precision.
    """

    def __init__(self, model: Callable[..., Tensor], extras: Mapping[str, Tensor] | None, *, num_samples: int) -> None:
        self.model = model
        self.extras = {name: full_precision(extra) for name, extra in check_extras(extras, num_samples).items()}

    def __call__(self, x: Tensor, **extras: Tensor) -> Tensor:
        """Outputs of some samples, whose rows of the extras these are."""
        outputs: Tensor = logits_in(self.model(x, **extras), num_samples=len(x))
        return outputs

    def on(self, rows: Rows) -> Callable[[Tensor], Tensor]:
        """The network as a function of the inputs of some samples alone."""
        return functools.partial(self, **{name: extra[rows] for name, extra in self.extras.items()})

    def on_all(self) -> Callable[[Tensor], Tensor]:
        """The network as a function of the inputs of all samples."""
        return self.on(slice(None))


def check_extras(extras: Mapping[str, Tensor] | None, num_samples: int) -> Mapping[str, Tensor]:
    """Return ``extras``, empty if None; raise unless they map names to tensors ``(num_samples, ...)``."""
    if extras is None:
        return {}
    check_kind("extras", extras, Mapping, "a mapping from names of arguments of the model to tensors (N, ...)")
    for name, extra in extras.items():
        if not isinstance(name, str) or not isinstance(extra, Tensor):
            raise TypeError(
                "Expected argument `extras` to map names of arguments of the model to tensors (N, ...), but got"
                f" {class_of(extra)} for {name!r}. Give what is the same for all samples to the model itself, e.g. by"
                " `functools.partial`."
            )
        if extra.shape[:1] != torch.Size([num_samples]):
            raise ValueError(
                f"Expected argument `extras` to hold one row per sample, tensors of shape ({num_samples}, ...), but"
                f" {name!r} has shape {tuple(extra.shape)}. Give what is the same for all samples to the model itself,"
                " e.g. by `functools.partial`."
            )
    return extras
