"""The one place that makes derivatives possible, and harmless, inside a user's training loop.

A callback runs under ``no_grad`` in ``fit`` and under ``inference_mode`` in ``validate`` and ``test``. The network it
is handed may be compiled, in half precision or in train mode, or hold tensors created under inference mode.
Inside :func:`differentiable` all of that is neutralised, and afterwards everything is as it was:

- grad mode is on; inference mode and autocast are off;
- backward hooks are not called: these passes do not belong to the training;
- every module is in eval mode, each by its own flag (``.eval()`` would call user overrides of ``train``, and would
  un-freeze a frozen BatchNorm on the way back);
- stand-ins take the places of parameters and buffers (:mod:`~lightning_robust.functional._isolation.stand_ins`), and
  networks in half precision compute in float32 (:mod:`~lightning_robust.functional._isolation.precision`);
- side effects of forward passes are reverted (:mod:`~lightning_robust.functional._isolation.side_effects`): they would
  keep a graph alive, and lead the training to the stand-ins;
- compiled networks run eagerly: a second grad mode and batch size would trigger recompilation, and AOT autograd has no
  double backward (pytorch#91469);
- networks with recurrent layers run without cuDNN, whose RNNs refuse a backward pass in eval mode (pytorch#5878).

A measurement enters the context once. Measurement functions enter it again, which only switches grad mode on and
reverts their side effects when they end.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_robust.functional._isolation.kernels import replaced_kernels
from lightning_robust.functional._isolation.precision import single_precision
from lightning_robust.functional._isolation.sharding import refuse_distributed
from lightning_robust.functional._isolation.side_effects import side_effects_reverted
from lightning_robust.functional._isolation.stand_ins import stand_in_tensors

_NO_GRADIENT = "does not require grad"  # in torch's errors about `torch.autograd.grad`
_MANY = 1000  # a container of more items holds no networks
_isolated: set[int] = set()  # modules inside the context, by identity


@contextmanager
def differentiable(*callables: object, twice: bool = False) -> Iterator[None]:
    """Switch derivatives on and shield every module among ``callables`` from them (see the module's docstring).

    Args:
        callables: Modules, bound methods of modules, partial applications of either, or plain functions. What functions
            close over is not found: name such networks beside them, or they keep their modes.
        twice: Whether second derivatives are wanted. Attention then runs by its mathematical definition, because the
            fast kernels have none (pytorch#116350).

    Raises:
        ValueError: If a forward pass through one of them involves several processes.
    """
    modules = _modules(callables)
    new = [module for module in modules if id(module) not in _isolated]
    refuse_distributed(new)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if twice:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if new or not _isolated:
            stack.enter_context(_isolation([module for module in _with_hidden(new) if id(module) not in _isolated]))
        else:
            stack.enter_context(side_effects_reverted(modules))
        yield


@contextmanager
def _isolation(modules: list[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for device_type in {"cpu", *(tensor.device.type for module in modules for tensor in _own_tensors(module))}:
            if torch.amp.is_autocast_available(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        if "torch._dynamo" in sys.modules:  # importing it takes seconds, and without it nothing can be compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(module, nn.RNNBase) for module in modules):
            stack.enter_context(_without_cudnn())
        stack.enter_context(_in_eval_mode(modules))
        stack.enter_context(_without_backward_hooks(modules))
        stack.enter_context(single_precision(modules))
        stack.enter_context(stand_in_tensors(modules))
        stack.enter_context(replaced_kernels(modules))
        stack.enter_context(side_effects_reverted(modules))
        _isolated.update(map(id, modules))
        stack.callback(_isolated.difference_update, set(map(id, modules)))
        yield


def passed(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a network on a copy of samples, in grad mode only if that is on or the network needs it for itself.

    The forward pass of an energy-based model, or of one that returns forces, takes a gradient.
    """
    recording = torch.is_grad_enabled()
    try:
        outputs = model(x.clone())
    except RuntimeError as error:
        if recording or _NO_GRADIENT not in str(error):
            raise
        with torch.enable_grad():
            outputs = model(x.clone())
    return outputs if recording or not isinstance(outputs, Tensor) else outputs.detach()


def owner_of(function: Callable[..., object]) -> nn.Module | None:
    """The module that a callable is or belongs to, if any."""
    owner = _owner(function)
    return owner if isinstance(owner, nn.Module) else None


def _modules(callables: tuple[object, ...]) -> list[nn.Module]:
    owners = [owner for owner in map(_owner, callables) if isinstance(owner, nn.Module)]
    return list({id(module): module for owner in owners for module in owner.modules()}.values())


def _with_hidden(modules: list[nn.Module]) -> list[nn.Module]:
    """The modules, and those that they keep in lists and the like, where their own ``modules()`` does not find them."""
    found = {id(module): module for module in modules}
    for module in modules:
        for key, value in vars(module).items():
            if key != "_modules" and isinstance(value, dict | list | tuple | set) and len(value) <= _MANY:
                items = value.values() if isinstance(value, dict) else value
                hidden = [inner for item in items if isinstance(item, nn.Module) for inner in item.modules()]
                found |= {id(inner): inner for inner in hidden}
    return list(found.values())


def _owner(function: object) -> object:
    inner: object = None
    while inner is not function:
        inner = function
        function = function.func if isinstance(function, functools.partial) else getattr(function, "__self__", function)
    return function


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
def _without_backward_hooks(modules: list[nn.Module]) -> Iterator[None]:
    hooked = [
        (module, name, vars(module)[name])
        for module in modules
        for name in ("_backward_hooks", "_backward_pre_hooks")
        if vars(module).get(name)
    ]
    for module, name, _ in hooked:
        vars(module)[name] = OrderedDict()
    try:
        yield
    finally:
        for module, name, hooks in hooked:
            vars(module)[name] = hooks
