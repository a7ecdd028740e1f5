"""The one place that makes derivatives possible, and harmless, inside somebody else's training loop.

A callback runs under ``no_grad`` in ``fit`` and under ``inference_mode`` in ``validate``/``test``; the network it is
handed may be compiled, in half precision, in train mode, or hold tensors that were created under inference mode. Inside
:func:`differentiable` all of that is neutralised, and afterwards everything is as it was:

- grad mode is on, inference mode and autocast are off;
- every module is in eval mode, each by its own flag (``.eval()`` would call user overrides of ``train``, and would
  un-freeze a frozen BatchNorm on the way back);
- every parameter is replaced by a detached view of itself, so that no derivative can reach a weight or its ``.grad``;
  every buffer by a copy, so that a forward pass that counts or averages leaves no trace. Half-precision tensors become
  float32 copies, tensors born under inference mode ordinary ones. The user's own tensors are put back, untouched;
- compiled networks run eagerly: a second grad mode and batch size would trigger recompilation, and AOT autograd has no
  double backward (pytorch#91469);
- networks with recurrent layers run without cuDNN, whose RNNs refuse a backward pass in eval mode (pytorch#5878).

Cost: a few microseconds per parameter tensor, plus one copy of the buffers.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_robust.functional._batch_norm import affine_batch_norm

_HALF = (torch.float16, torch.bfloat16)


def full_precision(tensor: Tensor) -> Tensor:
    """Return ``tensor`` detached, in float32 if it was in half precision, and usable by autograd."""
    tensor = tensor.detach()
    if tensor.dtype in _HALF:
        return tensor.float()
    return tensor.clone() if tensor.is_inference() else tensor


@contextmanager
def differentiable(*callables: Callable[..., object]) -> Iterator[None]:
    """Switch derivatives on and shield every module among ``callables`` from them (see the module's docstring).

    Args:
        callables: Modules, bound methods of modules, partial applications of either, or plain functions. Functions are
            not looked into: networks that they close over must be named beside them, or keep their modes.
    """
    modules = _modules(callables)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in {"cpu", *(tensor.device.type for module in modules for tensor in _own_tensors(module))}:
            if torch.amp.is_autocast_available(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        if "torch._dynamo" in sys.modules:  # importing it takes seconds, and without it nothing can be compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(module, nn.RNNBase) for module in modules):
            stack.enter_context(_without_cudnn())
        stack.enter_context(_in_eval_mode(modules))
        stack.enter_context(_shielded_tensors(modules))
        stack.enter_context(affine_batch_norm(modules))
        yield


def _modules(callables: tuple[Callable[..., object], ...]) -> list[nn.Module]:
    owners = [owner for owner in map(_owner, callables) if isinstance(owner, nn.Module)]
    return list({id(module): module for owner in owners for module in owner.modules()}.values())


def _owner(function: object) -> object:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__self__", function)


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensors in (module._parameters, module._buffers):
        yield from (tensor for tensor in tensors.values() if tensor is not None)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@contextmanager
def _in_eval_mode(modules: list[nn.Module]) -> Iterator[None]:
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _shielded_tensors(modules: list[nn.Module]) -> Iterator[None]:
    stand_ins: dict[int, Tensor] = {}  # by identity, so that tied weights stay tied

    def shielded(tensors: dict[str, Any], shield: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
        for tensor in tensors.values():
            if tensor is not None and id(tensor) not in stand_ins:
                stand_ins[id(tensor)] = shield(tensor)
        return {name: None if tensor is None else stand_ins[id(tensor)] for name, tensor in tensors.items()}

    originals: list[tuple[dict[str, Any], dict[str, Any]]] = []
    recurrent = [(module, vars(module)["_flat_weights"]) for module in modules if isinstance(module, nn.RNNBase)]
    try:
        for module in modules:
            shields: tuple[tuple[dict[str, Any], Callable[[Tensor], Tensor]], ...] = (
                (module._parameters, full_precision),
                (module._buffers, _copy),
            )
            for tensors, shield in shields:
                originals.append((tensors, dict(tensors)))
                for name, tensor in shielded(tensors, shield).items():
                    tensors[name] = tensor
        yield
    finally:
        for tensors, before in originals:
            for name in set(tensors.keys()) - before.keys():  # registered by a forward pass
                del tensors[name]
            for name, tensor in before.items():
                tensors[name] = tensor
        for module, flat_weights in recurrent:  # recurrent layers keep a second list of their weights
            module._flat_weights = flat_weights


def _copy(tensor: Tensor) -> Tensor:
    return full_precision(tensor).clone()
