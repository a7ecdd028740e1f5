"""The one place that makes derivatives possible, and harmless, inside somebody else's training loop.

A callback runs under ``no_grad`` in ``fit`` and under ``inference_mode`` in ``validate``/``test``; the network it is
handed may be compiled, in half precision, in train mode, or hold tensors that were created under inference mode. Inside
:func:`differentiable` all of that is neutralised, and afterwards everything is as it was:

- grad mode is on, inference mode and autocast are off;
- hooks on backward passes are not called: these passes are none of the training's;
- every module is in eval mode, each by its own flag (``.eval()`` would call user overrides of ``train``, and would
  un-freeze a frozen BatchNorm on the way back);
- every parameter is replaced by a detached view of itself, so that no derivative can reach a weight or its ``.grad``;
  every buffer, and every untrained parameter of less than two dimensions, by a copy, so that a forward pass that
  counts or averages leaves no trace. Half-precision tensors become float32 copies, tensors born under inference mode
  ordinary ones. The user's own tensors are put back, untouched;
- what a forward pass leaves behind in attributes of modules (features, attention maps, counts, also in lists and
  dictionaries) is taken away again: it would keep a graph alive, and hand the training one that leads to the stand-ins;
  the network's own random generators are set back;
- compiled networks run eagerly: a second grad mode and batch size would trigger recompilation, and AOT autograd has no
  double backward (pytorch#91469);
- networks with recurrent layers run without cuDNN, whose RNNs refuse a backward pass in eval mode (pytorch#5878).

:func:`differentiable_weights` makes the stand-ins of the trained parameters leaves of the graph, for curvature.

Cost: a few microseconds per parameter tensor, plus one copy of the buffers.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_robust.functional._isolation._batch_norm import affine_batch_norm
from lightning_robust.functional._isolation._hard_sigmoid import plain_hard_sigmoid
from lightning_robust.functional._isolation._weight_norm import plain_weight_norm
from lightning_robust.functional._isolation.sharding import refuse_distributed
from lightning_robust.functional._isolation.side_effects import side_effects_reverted, without_backward_hooks

_HALF = (torch.float16, torch.bfloat16)
_MANY = 1000  # a container of more items is none of networks


def full_precision(tensor: Tensor) -> Tensor:
    """Return ``tensor`` detached, in float32 if it was in half precision, and usable by autograd."""
    tensor = tensor.detach()
    if tensor.dtype in _HALF:
        return tensor.float()
    return tensor.clone() if tensor.is_inference() else tensor


@contextmanager
def differentiable(*callables: object, twice: bool = False) -> Iterator[None]:
    """Switch derivatives on and shield every module among ``callables`` from them (see the module's docstring).

    Args:
        callables: Modules, bound methods of modules, partial applications of either, or plain functions. Functions are
            not looked into: networks that they close over must be named beside them, or keep their modes.
        twice: Whether second derivatives are wanted. Attention then runs by its mathematical definition, because the
            fast kernels have none (pytorch#116350).

    Raises:
        ValueError: If a pass through one of them is a matter of several processes.
    """
    modules = _modules(callables)
    refuse_distributed(modules)
    modules = _with_hidden(modules)
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
        if twice:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_in_eval_mode(modules))
        stack.enter_context(side_effects_reverted(modules))
        stack.enter_context(without_backward_hooks(modules))
        stack.enter_context(_shielded_tensors(modules))
        stack.enter_context(affine_batch_norm(modules))
        stack.enter_context(plain_weight_norm(modules))
        stack.enter_context(plain_hard_sigmoid(modules))
        yield


class Weights:
    """The trained parameters of a network inside :func:`differentiable_weights`.

    Attributes:
        tensors: Their stand-ins, by name; tied ones once, under their first name. They require grad.
        modules: The network and all modules inside.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(module.modules())
        self._places: dict[str, list[tuple[dict[str, Any], str]]] = {}
        self.tensors: dict[str, Tensor] = {}
        self._originals: set[int] = set()
        names: dict[int, str] = {}
        for prefix, owner in module.named_modules():
            for key, tensor in owner._parameters.items():
                if tensor is None or not _original(tensor).requires_grad:
                    continue
                self._originals.add(id(_original(tensor)))
                name = names.setdefault(id(tensor), _without_wrappers(f"{prefix}.{key}"))
                self._places.setdefault(name, []).append((owner._parameters, key))
                self.tensors[name] = tensor.requires_grad_()

    def is_original(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of those that these stand in for, which nobody should compute with."""
        return id(tensor) in self._originals

    @contextmanager
    def replaced(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the network compute with these tensors instead."""
        try:
            self._put(tensors)
            yield
        finally:
            self._put({name: self.tensors[name] for name in tensors})

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            for parameters, key in self._places[name]:
                parameters[key] = tensor


@contextmanager
def differentiable_weights(
    model: Callable[..., object],
    *others: object,
    module: nn.Module | None = None,
) -> Iterator[Weights]:
    """Make the outputs of ``model`` twice differentiable with respect to its weights, and shield them all the same.

    Args:
        model: Module, bound method of a module, partial application of either, or a plain function.
        others: What else takes part, such as a loss with class weights.
        module: The module whose weights are meant, by default the one that ``model`` is or belongs to.

    Raises:
        ValueError: If no module is known, or it has no parameter that is trained.
    """
    module = owner_of(model) if module is None else module
    if module is None:
        raise ValueError(
            "Expected a model whose weights are known, a torch.nn.Module or a method of one, but got a plain function"
            f" {getattr(model, '__name__', model)!r}. Pass the network that it calls as `module`."
        )
    with differentiable(model, module, *others, twice=True):
        weights = Weights(module)
        if any(tensor.is_complex() for tensor in weights.tensors.values()):
            raise ValueError(f"Expected a model with real weights, but {type(module).__name__} has complex ones.")
        if not weights.tensors:
            raise ValueError(
                f"Expected a model with weights that are trained, but {type(module).__name__} has none with"
                " `requires_grad=True`."
            )
        yield weights


def _without_wrappers(name: str) -> str:
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):  # of compiled and checkpointed modules
        name = name.replace(wrapper, "")
    return name.lstrip(".")


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
                (module._parameters, functools.partial(_shield, copied=_renormalises(module))),
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


_ORIGINAL = "_stands_in_for"


def _shield(parameter: Tensor, *, copied: bool) -> Tensor:
    statistic = parameter.ndim < 2 and not parameter.requires_grad
    stand_in = _copy(parameter) if copied or statistic else full_precision(parameter)
    vars(stand_in).update(vars(parameter))
    setattr(stand_in, _ORIGINAL, _original(parameter))
    return stand_in


def _renormalises(module: nn.Module) -> bool:
    """Whether a forward pass writes into the weights."""
    return getattr(module, "max_norm", None) is not None


def _original(parameter: Tensor) -> Tensor:
    """The user's own tensor, also where contexts are nested."""
    original: Tensor = getattr(parameter, _ORIGINAL, parameter)
    return original


def _copy(tensor: Tensor) -> Tensor:
    return full_precision(tensor).clone()
