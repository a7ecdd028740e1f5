"""Networks whose weights are spread over processes.

``torch.distributed.fsdp.fully_shard`` gathers the weights of a layer for each pass through it: every process must make
the same passes, or all of them hang. A measurement cannot promise that, because processes hold different numbers of
samples, and one of them may fail. All processes therefore gather the weights once, and each then measures its own
samples on an ordinary network.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_robust.functional._validation.arguments import check_kind

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_FULLY_SHARD, _TENSOR_PARALLEL = "torch.distributed.fsdp", "torch.distributed.tensor"


@contextmanager
def gathered_weights(module: nn.Module) -> Iterator[None]:
    """Let each process compute with all weights of a network that ``fully_shard`` has spread over processes.

    Inside, the network is one like any other on each process: passes through it are not communicated, and every
    function and metric of this package takes it. Nothing happens to a network that is not sharded. Weights are gathered
    as they are stored, not in the lower precision of a mixed-precision policy.

    Every process must enter at the same time, and needs memory for all weights. Weights that an earlier pass has left
    gathered are sharded afterwards, as they are after saving.

    Args:
        module: The network, sharded over data-parallel processes.

    Raises:
        TypeError: If ``module`` is not a module.
        ValueError: If the weights are spread in another way: tensor parallelism, FullyShardedDataParallel, ZeRO-3.
        torch.OutOfMemoryError: On all processes, if one of them has no room for all weights.

    Source: ours.
    """
    check_kind("module", module, nn.Module)
    modules = list(module.modules())
    sharded = [owner for owner in modules if _hooks_of(owner, _FULLY_SHARD)]
    _refuse_others(modules)
    if not sharded:
        _refuse_pieces(modules)
        yield
        return
    hooks = [registry for owner in sharded for registry in (owner._forward_pre_hooks, owner._forward_hooks)]
    places: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    before = [dict(registry) for registry in hooks]
    try:
        for owner in sharded:
            owner.reshard()  # type: ignore[operator]
        places = [
            (owner._parameters, name, parameter)
            for owner in modules
            for name, parameter in owner._parameters.items()
            if parameter is not None and _is_piece(parameter)
        ]
        whole: dict[int, nn.Parameter] = {}  # by identity, so that tied weights stay tied
        if places:
            _agree_on_room(list({id(parameter): parameter for _, _, parameter in places}.values()))
        with torch.no_grad():
            for parameters, name, parameter in places:
                if id(parameter) not in whole:
                    gathered: Tensor = parameter.full_tensor()  # type: ignore[attr-defined]
                    whole[id(parameter)] = nn.Parameter(gathered, requires_grad=parameter.requires_grad)
                parameters[name] = whole[id(parameter)]
        for registry in hooks:
            for key in [key for key, hook in registry.items() if _is_of(hook, _FULLY_SHARD)]:
                del registry[key]
        yield
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter
        for registry, original in zip(hooks, before, strict=True):
            registry.clear()
            registry.update(original)


def _agree_on_room(parameters: list[Tensor]) -> None:
    """Raise on all processes if one of them has no room for all weights: the others would hang while gathering."""
    failure: Exception | None = None
    try:
        room = [
            torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device) for parameter in parameters
        ]
        del room
    except Exception as error:
        failure = error
    mesh: DeviceMesh = parameters[0].device_mesh  # type: ignore[attr-defined]
    failed = torch.tensor(float(failure is not None), device=parameters[0].device)
    for dimension in range(mesh.ndim):
        distributed.all_reduce(failed, op=distributed.ReduceOp.MAX, group=mesh.get_group(dimension))
    if failed:
        raise failure or torch.OutOfMemoryError("Another process has no room for the weights of the whole network.")


def refuse_distributed(modules: list[nn.Module]) -> None:
    """Raise if a pass through one of these modules involves all processes."""
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                "Expected a network that each process can call on its own, but got a DistributedDataParallel. Pass its"
                " `.module`."
            )
    _refuse_others(modules)
    if any(_hooks_of(module, _FULLY_SHARD) for module in modules):
        raise ValueError(
            "Expected a network that each process can call on its own, but its weights are spread over processes by"
            " `fully_shard`. Measure inside `with lightning_robust.functional.gathered_weights(network):`, which every"
            " process must enter."
        )
    _refuse_pieces(modules)


def is_distributed(module: nn.Module) -> bool:
    """Whether a pass through a module or a part of it involves all processes."""
    try:
        refuse_distributed(list(module.modules()))
    except ValueError:
        return True
    return False


def _refuse_others(modules: list[nn.Module]) -> None:
    for module in modules:
        if _hooks_of(module, _TENSOR_PARALLEL):
            raise ValueError(_UNKNOWN.format("tensor parallelism"))
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(_UNKNOWN.format("FullyShardedDataParallel"))
        if any(hasattr(parameter, "ds_id") for parameter in module._parameters.values()):
            raise ValueError(_UNKNOWN.format("DeepSpeed ZeRO-3"))


def _refuse_pieces(modules: list[nn.Module]) -> None:
    for module in modules:
        if any(parameter is not None and _is_piece(parameter) for parameter in module._parameters.values()):
            raise ValueError(_UNKNOWN.format("distributed tensors"))


_UNKNOWN = (
    "Expected weights that are whole or sharded by `torch.distributed.fsdp.fully_shard` over data-parallel processes,"
    " but they are spread over processes by {}."
)


def _hooks_of(module: nn.Module, package: str) -> bool:
    return any(_is_of(hook, package) for hook in module._forward_pre_hooks.values())


def _is_of(hook: Callable[..., object], package: str) -> bool:
    return getattr(hook, "__module__", "").startswith(package)


def _is_piece(parameter: Tensor) -> bool:
    tensors = sys.modules.get("torch.distributed.tensor")  # without that import, no such tensor exists
    return tensors is not None and isinstance(parameter, tensors.DTensor)
