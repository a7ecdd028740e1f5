"""Weight normalisation by its definition, because the second derivative of torch's kernel is wrong.

``torch.autograd.gradgradcheck`` of ``torch._weight_norm`` fails (torch 2.13, CPU, rows and columns): the traces of its
directions would come with the wrong size and even sign.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm


@contextmanager
def plain_weight_norm(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let ``modules`` whose weights are normalised, in the older way or the newer, do so by the definition."""
    modules = list(modules)
    hooks = [hook for module in modules for hook in module._forward_pre_hooks.values()]
    patches: list[tuple[Any, str, Any]] = [
        *((norm, "forward", functools.partial(_newer, norm)) for norm in modules if type(norm) is _WeightNorm),
        *((hook, "compute_weight", functools.partial(_older, hook)) for hook in hooks if isinstance(hook, WeightNorm)),
    ]
    patches = [patch for patch in patches if patch[1] not in vars(patch[0])]
    for owner, name, function in patches:
        vars(owner)[name] = function
    try:
        yield
    finally:
        for owner, name, _ in patches:
            del vars(owner)[name]


def _newer(norm: _WeightNorm, magnitude: Tensor, direction: Tensor) -> Tensor:
    return _scaled(direction, magnitude, norm.dim)


def _older(hook: WeightNorm, module: nn.Module) -> Tensor:
    return _scaled(getattr(module, f"{hook.name}_v"), getattr(module, f"{hook.name}_g"), hook.dim)


def _scaled(direction: Tensor, magnitude: Tensor, dim: int | None) -> Tensor:
    """``direction`` with the norm of its slices along ``dim``, or of the whole for −1, set to ``magnitude``."""
    others = [d for d in range(direction.ndim) if dim in (None, -1) or d != dim]
    norm = torch.linalg.vector_norm(direction, dim=others, keepdim=True)
    if dim in (None, -1):
        norm = norm.reshape(())
    scaled: Tensor = direction * (magnitude / norm)
    return scaled
