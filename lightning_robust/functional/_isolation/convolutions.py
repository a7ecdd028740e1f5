"""Convolutions that are fast to differentiate twice, depthwise ones above all.

torch differentiates a grouped convolution a second time group by group, with a convolution for each; in any other it
takes a gradient of the weight by a convolution whose kernel is as large as the map; and its CPU kernel for the gradient
of a depthwise weight takes some twenty times as long as the convolution itself. A convolution, its gradient in the
input and its gradient in the weight are each linear in two tensors, and the gradients of each are two of the three
again: three functions that refer to one another have derivatives of any order by torch's fast kernels.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS: dict[object, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class Geometry(NamedTuple):
    """How a convolution over d dimensions moves over its input, one number per dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def options(self) -> tuple[Any, ...]:
        """Arguments of torch's operators."""
        return (*self[:3], False, (0,) * len(self.stride), self.groups)


class TwiceDifferentiable(TorchFunctionMode):
    """Inside, convolutions are the functions of this module.

    Second derivatives are taken inside, too: checkpointed layers compute their outputs again.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        dimensions = _CONVOLUTIONS.get(func)
        if dimensions is not None and len(args) <= len(_NAMES):
            given = dict(zip(_NAMES, args, strict=False)) | kwargs
            x, weight, geometry = given.get("input"), given.get("weight"), _geometry(given, dimensions)
            if geometry is not None and isinstance(x, Tensor) and x.ndim == dimensions + 2:
                return _Convolution.apply(x, weight, given.get("bias"), geometry)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _geometry(given: dict[str, Any], dimensions: int) -> Geometry | None:
    """The geometry of a convolution with these arguments; None if its padding is given by name."""
    defaults = {"stride": 1, "padding": 0, "dilation": 1}
    numbers = [given.get(name, default) for name, default in defaults.items()]
    groups = given.get("groups", 1)
    if any(isinstance(number, str) for number in numbers):
        return None
    stride, padding, dilation = ((n,) * dimensions if isinstance(n, int) else tuple(n) for n in numbers)
    stride, padding, dilation = (n * dimensions if len(n) == 1 else n for n in (stride, padding, dilation))
    return Geometry(stride, padding, dilation, groups)


def sample_gradients(slopes: Tensor, inputs: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """Gradient of a depthwise weight for each sample, ``(N, C, 1, *kernel)``, as one convolution over N · C channels.

    ``slopes`` are gradients with respect to the outputs, ``(N, C, ...)``; ``shape`` is that of the weight.
    """
    (n, c), kernel = slopes.shape[:2], shape[2:]
    fold = c // inputs.shape[1]  # a channel of the input has several of the output
    channels = inputs.repeat_interleave(fold, dim=1) if fold > 1 else inputs
    options = (geometry.dilation, geometry.padding, geometry.stride, False, (0,) * len(kernel), n * c)
    gradients: Tensor = torch.ops.aten.convolution(
        channels.reshape(1, n * c, *inputs.shape[2:]), slopes.reshape(n * c, 1, *slopes.shape[2:]), None, *options
    )
    for dimension, size in enumerate(kernel, start=2):  # a stride may leave the end of the input unused
        gradients = gradients.narrow(dimension, 0, size)
    return gradients.reshape(n, *shape)


def _to_input(slopes: Tensor, inputs: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    mask = [True, False, False]
    gradient: Tensor = torch.ops.aten.convolution_backward(slopes, inputs, weight, None, *geometry.options, mask)[0]
    return gradient


def _to_weight(slopes: Tensor, inputs: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    if is_depthwise(weight.shape, geometry) and slopes.device.type == "cpu":
        return sample_gradients(slopes, inputs, weight.shape, geometry).sum(dim=0)
    mask = [False, True, False]
    gradient: Tensor = torch.ops.aten.convolution_backward(slopes, inputs, weight, None, *geometry.options, mask)[1]
    return gradient


def is_depthwise(shape: torch.Size, geometry: Geometry) -> bool:
    """Whether every channel of the input is a group of its own, for a weight of a shape."""
    return geometry.groups > 1 and shape[1] == 1


class _Convolution(torch.autograd.Function):
    """Outputs, from inputs, weight and bias."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.geometry = geometry
        outputs: Tensor = torch.ops.aten.convolution(inputs, weight, bias, *geometry.options)
        return outputs

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        to_input = _ToInput.apply(slopes, weight, inputs.detach(), ctx.geometry) if wanted[0] else None  # type: ignore[no-untyped-call]
        to_weight = _ToWeight.apply(slopes, inputs, weight.detach(), ctx.geometry) if wanted[1] else None  # type: ignore[no-untyped-call]
        to_bias = slopes.sum(dim=[0, *range(2, slopes.ndim)]) if wanted[2] else None
        return to_input, to_weight, to_bias, None


class _ToInput(torch.autograd.Function):
    """Gradient with respect to the inputs, from slopes and weight; inputs give nothing but their shape."""

    @staticmethod
    def forward(ctx: Any, slopes: Tensor, weight: Tensor, inputs: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(slopes, weight)
        ctx.geometry = geometry
        return _to_input(slopes, inputs, weight, geometry)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        slopes, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        to_slopes = _Convolution.apply(upstream, weight, None, ctx.geometry) if wanted[0] else None  # type: ignore[no-untyped-call]
        to_weight = _ToWeight.apply(slopes, upstream, weight.detach(), ctx.geometry) if wanted[1] else None  # type: ignore[no-untyped-call]
        return to_slopes, to_weight, None, None


class _ToWeight(torch.autograd.Function):
    """Gradient with respect to the weight, from slopes and inputs; the weight gives nothing but its shape."""

    @staticmethod
    def forward(ctx: Any, slopes: Tensor, inputs: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(slopes, inputs)
        ctx.geometry = geometry
        return _to_weight(slopes, inputs, weight, geometry)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        slopes, inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        to_slopes = _Convolution.apply(inputs, upstream, None, ctx.geometry) if wanted[0] else None  # type: ignore[no-untyped-call]
        to_inputs = _ToInput.apply(slopes, upstream, inputs.detach(), ctx.geometry) if wanted[1] else None  # type: ignore[no-untyped-call]
        return to_slopes, to_inputs, None, None
