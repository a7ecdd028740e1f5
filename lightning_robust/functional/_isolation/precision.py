"""Single precision for networks in half precision, also where a forward pass names a type.

Stand-ins in float32 take the places of weights and buffers. They would meet tensors that the network makes in half
precision: ``torch.zeros(..., dtype=self.dtype)``, ``x.to(torch.bfloat16)``, ``x.half()``, constants in attributes.
Where a module has weights in half precision, functions of torch therefore return float32 when they are asked for half
precision, and take tensors in half precision as float32. Types in attributes, such as that behind the ``dtype`` of a
LightningModule, are float32, too.

Cost: some microseconds per function of torch, for networks in half precision alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_robust.functional._isolation.stand_ins import HALF

_CASTS = (Tensor.half, Tensor.bfloat16)
_OF_THE_TENSOR_ITSELF = (Tensor.untyped_storage, Tensor.data_ptr, Tensor.is_inference, Tensor.view)


@contextmanager
def single_precision(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let ``modules`` compute in float32 if any of them is in half precision."""
    tensors = (
        tensor for module in modules for held in (module._parameters, module._buffers) for tensor in held.values()
    )
    if not any(tensor is not None and tensor.dtype in HALF for tensor in tensors):
        yield
        return
    types = [
        (vars(module), name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, torch.dtype) and value in HALF
    ]
    for attributes, name, _ in types:
        attributes[name] = torch.float32
    try:
        with _Single():
            yield
    finally:
        for attributes, name, value in types:
            attributes[name] = value


class _Single(TorchFunctionMode):
    """Reads half precision as float32 in every call of a function of torch."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.dtype.__get__:  # type: ignore[attr-defined]
            return _single(func(*args))
        if func in _OF_THE_TENSOR_ITSELF or getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs)
        if func in _CASTS or (func is Tensor.type and len(args) > 1 and "half" in _lower(args[1])):
            return args[0].to(torch.float32)
        place = 1 if _writes(func) else 0  # what is written to must stay itself
        rest = {name: value if name == "out" else _single(value) for name, value in kwargs.items()}
        return func(*args[:place], *map(_single, args[place:]), **rest)


def _lower(kind: object) -> str:
    """The name of a type of tensors as ``Tensor.type`` takes it; "half" for each in half precision."""
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    return name.lower().replace("bfloat16", "half")


def _writes(func: Any) -> bool:
    """Whether a function writes to its first argument."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name.startswith("__i")


def _single(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF else value
    if isinstance(value, torch.dtype):
        return torch.float32 if value in HALF else value
    if type(value) in (list, tuple):
        return type(value)(map(_single, value))
    return value
