"""Layers whose torch kernels are slow, wrong or incomplete for the derivatives that are taken here.

- **Batch normalisation** in eval mode is an affine map of each channel. torch's kernel keeps its input for the backward
  pass and, on a CPU, reduces over it for gradients of weights that nobody asks for. One multiplication and one addition
  give the same numbers: exact λ of a ResNet-20 takes 10 % less CPU time. Where gradients of the weights are wanted,
  torch's kernel runs.
- **Strides of batch normalisation**: torch's CPU kernel, which instance normalisation and every ``F.batch_norm`` share,
  returns wrong gradients of inputs and weights if input and incoming gradient lie in memory in different orders and the
  batch or a spatial dimension has size 1 (torch 2.13): strides then do not tell the order. The gradient after
  ``flatten(2).transpose(1, 2)``, with strides (C, 1, HC, C), is such a one. Both are made contiguous, which costs
  nothing where they are. No other of some sixty kernels tried has this fault.
- **Weight normalisation**: the second derivative of ``torch._weight_norm`` is wrong (``torch.autograd.gradgradcheck``
  fails on torch 2.13, CPU, rows and columns). Traces would have the wrong size and even the wrong sign.
- **Hard sigmoid**: torch's kernel has no second derivative.
- **Sparse embeddings**: ``sparse=True`` asks for gradients of the table as sparse tensors, which have neither second
  derivatives nor most operations. Dense ones have the same numbers.
"""

from __future__ import annotations

import functools
import math
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
_SPARSE = {"embedding": 4, "embedding_bag": 5}  # functions of torch, and the place of their argument `sparse`
Patch = tuple[object, str, Callable[..., Tensor]]


@contextmanager
def replaced_kernels(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let the layers among ``modules`` that need it compute by their definitions, and torch's functions rightly."""
    patches = [patch for module in modules for patch in _patches_of(module) if patch[1] not in vars(patch[0])]
    functions = [(name, getattr(torch, name)) for name in ("batch_norm", "instance_norm", *_SPARSE)]
    for owner, name, function in patches:
        vars(owner)[name] = function
    for name, function in functions:
        replacement = _with_dense_gradients if name in _SPARSE else _in_one_order
        setattr(torch, name, functools.partial(replacement, name, function))
    try:
        yield
    finally:
        for name, function in functions:
            setattr(torch, name, function)
        for owner, name, _ in patches:
            del vars(owner)[name]


def _in_one_order(name: str, normalise: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """Call a normalisation of torch so that its kernel for the backward pass meets a single order of memory."""
    x: Any = args[0] if args else None
    if not isinstance(x, Tensor) or x.device.type != "cpu" or x.ndim < 4:
        return normalise(*args, **options)
    of_instances = name == "instance_norm"  # calls the kernel on a batch of one, whatever the layout
    if not (of_instances or 1 in x.shape[2:] or (len(x) == 1 and not _is_channels_last(x))):
        return normalise(*args, **options)
    out = normalise(x.contiguous(), *args[1:], **options)
    # the backward pass copies any other order; not a view of `out`, because the network may go on in place
    contiguous: Tensor = torch.ops.aten._unsafe_view(out.reshape(-1), out.shape)
    return contiguous


def _with_dense_gradients(name: str, look_up: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call an embedding of torch that is not sparse."""
    place = _SPARSE[name]
    if "sparse" in options:
        options["sparse"] = False
    return look_up(*args[:place], *(False for _ in args[place : place + 1]), *args[place + 1 :], **options)


def _is_channels_last(x: Tensor) -> bool:
    """Whether the strides are those of memory in the order of samples, positions and channels, and tell this order."""
    sizes = [x.shape[1], *reversed(x.shape[2:])]
    strides = [math.prod(sizes[:place]) for place in range(len(sizes) + 1)]
    return x.stride() == (strides[-1], strides[0], *reversed(strides[1:-1]))


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
