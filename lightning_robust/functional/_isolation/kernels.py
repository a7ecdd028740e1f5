"""Layers whose torch kernels are slow, wrong or incomplete for the derivatives that are taken here.

- **Batch normalisation** in eval mode is an affine map of each channel. torch's kernel keeps its input for the backward
  pass and, on a CPU, reduces over it for gradients of weights that nobody asks for. One multiplication and one addition
  give the same numbers: exact λ of a ResNet-20 takes 10 % less CPU time. Where gradients of the weights are wanted,
  torch's kernel runs.
- **Weight normalisation**: the second derivative of ``torch._weight_norm`` is wrong (``torch.autograd.gradgradcheck``
  fails on torch 2.13, CPU, rows and columns). Traces would have the wrong size and even the wrong sign.
- **Hard sigmoid**: torch's kernel has no second derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

_BATCH_NORMS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
Patch = tuple[object, str, Callable[..., Tensor]]


@contextmanager
def replaced_kernels(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let the layers among ``modules`` that need it compute by their definitions."""
    patches = [patch for module in modules for patch in _patches_of(module) if patch[1] not in vars(patch[0])]
    for owner, name, function in patches:
        vars(owner)[name] = function
    try:
        yield
    finally:
        for owner, name, _ in patches:
            del vars(owner)[name]


def _patches_of(module: nn.Module) -> Iterator[Patch]:
    """Methods to replace, each as the object that has it, its name and its replacement."""
    if isinstance(module, _BatchNorm) and type(module).forward in _BATCH_NORMS:
        yield module, "forward", functools.partial(_batch_norm, module)
    if type(module) is nn.Hardsigmoid:
        yield module, "forward", _hard_sigmoid
    if type(module) is _WeightNorm:
        yield module, "forward", functools.partial(_parametrised_weight_norm, module)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield hook, "compute_weight", functools.partial(_hooked_weight_norm, hook)


def _batch_norm(layer: _BatchNorm, x: Tensor) -> Tensor:
    mean, var = layer.running_mean, layer.running_var
    usual = not layer.training and x.ndim > 1 and mean is not None and mean.dtype == x.dtype
    differentiated = layer.weight is not None and layer.weight.requires_grad
    if not usual or differentiated or mean is None or var is None or mean.shape != x.shape[1:2]:
        out: Tensor = type(layer).forward(layer, x)
        return out
    layer._check_input_dim(x)  # type: ignore[no-untyped-call]
    scale = (var + layer.eps).rsqrt()
    scale = scale if layer.weight is None else scale * layer.weight
    shift = -mean * scale
    shift = shift if layer.bias is None else shift + layer.bias
    channels = (1, -1, *(1,) * (x.ndim - 2))
    return torch.addcmul(shift.view(channels), x, scale.view(channels))


def _hard_sigmoid(x: Tensor) -> Tensor:
    return F.relu6(x + 3) / 6


def _parametrised_weight_norm(norm: _WeightNorm, magnitude: Tensor, direction: Tensor) -> Tensor:
    return _weight_norm(direction, magnitude, norm.dim)


def _hooked_weight_norm(hook: Any, module: nn.Module) -> Tensor:
    return _weight_norm(getattr(module, f"{hook.name}_v"), getattr(module, f"{hook.name}_g"), hook.dim)


def _weight_norm(direction: Tensor, magnitude: Tensor, dim: int | None) -> Tensor:
    """``direction`` with the norm of its slices along ``dim``, or of the whole for −1, set to ``magnitude``."""
    others = [d for d in range(direction.ndim) if dim in (None, -1) or d != dim]
    norm = torch.linalg.vector_norm(direction, dim=others, keepdim=True)
    if dim in (None, -1):
        norm = norm.reshape(())
    scaled: Tensor = direction * (magnitude / norm)
    return scaled
