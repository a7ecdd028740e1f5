"""Every operation that counts as piecewise linear is, and every other one counts as curved."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.functional._isolation.weights import differentiable_weights
from lightning_robust.functional.curvature._autograd_graph import in_order_of_computation, kind_of
from lightning_robust.functional.curvature._piecewise_linear import _FACTORS, _PIECEWISE_LINEAR, CurvedLayers
from tests.helpers.curvature import relu_mlp, tanh_mlp
from tests.helpers.networks import random

Operation = Callable[[Tensor], Tensor]
FIRST = torch.tensor([0, 2])
COLUMN = torch.zeros(2, 12, dtype=torch.long)


def row(h: Tensor) -> Tensor:
    return h.reshape(2, 1, 12)


def image(h: Tensor) -> Tensor:
    return h.reshape(2, 3, 2, 2)


def volume(h: Tensor) -> Tensor:
    return h.reshape(2, 1, 3, 2, 2)


def zeros(h: Tensor) -> Tensor:
    return torch.zeros(2, 12)


# Operations on h (2, 12), which is linear in the weights; two where two operations share a node.
OPERATIONS: dict[str, Operation] = {
    "Add": lambda h: h + 1,
    "Sub": lambda h: 1.5 - h - h,
    "Neg": lambda h: -h,
    "Sum": lambda h: h.sum(dim=1) + h.sum(),
    "Mean": lambda h: h.mean(dim=1) + h.mean(),
    "Cumsum": lambda h: h.cumsum(dim=1),
    "Clone": lambda h: h.t().contiguous().clone(),
    "ToCopy": lambda h: h.double().float(),
    "Alias": torch.ops.aten.alias,
    "Expand": lambda h: h.expand(3, 2, 12),
    "Repeat": lambda h: h.repeat(2, 1),
    "View": lambda h: h.view(3, 8),
    "UnsafeView": lambda h: torch.ops.aten._unsafe_view(h, [3, 8]),
    "AsStrided": lambda h: h.as_strided((2, 3), (1, 2)),
    "Permute": lambda h: image(h).permute(0, 3, 1, 2),
    "Transpose": lambda h: h.transpose(0, 1),
    "T": lambda h: h.t(),
    "Squeeze": lambda h: row(h).squeeze(1) + row(h).squeeze(),
    "Unsqueeze": lambda h: h.unsqueeze(1),
    "Flip": lambda h: h.flip(1),
    "Roll": lambda h: h.roll(1),
    "Diagonal": lambda h: h.diagonal(),
    "Tril": lambda h: h.tril(),
    "Triu": lambda h: h.triu(),
    "Trace": lambda h: h.trace(),
    "Slice": lambda h: h[:, 1:],
    "Select": lambda h: h[0],
    "Split": lambda h: h.split(5, dim=1)[1],
    "SplitWithSizes": lambda h: h.split([5, 7], dim=1)[1],
    "Unbind": lambda h: h.unbind()[1],
    "Unfold": lambda h: h.unfold(1, 3, 2),
    "Index": lambda h: h[:, FIRST] + h[h > 0].sum(),
    "IndexSelect": lambda h: h.index_select(1, FIRST),
    "Gather": lambda h: h.gather(1, COLUMN),
    "Take": lambda h: h.take(FIRST),
    "Embedding": lambda h: F.embedding(torch.tensor([0, 1, 1]), h),
    "Cat": lambda h: torch.cat([h, 2 * h]),
    "Stack": lambda h: torch.stack([h, h]),
    "IndexPut": lambda h: zeros(h).index_put((torch.tensor([0]),), h[1]),
    "IndexAdd": lambda h: zeros(h).index_add(1, FIRST, h[:, :2]),
    "IndexCopy": lambda h: zeros(h).index_copy(1, FIRST, h[:, :2]),
    "IndexFill": lambda h: h.index_fill(1, FIRST, 0.0),
    "Scatter": lambda h: zeros(h).scatter(1, COLUMN[:, :1], h[:, :1]),
    "ScatterAdd": lambda h: zeros(h).scatter_add(1, COLUMN, h),
    "SliceScatter": lambda h: zeros(h).slice_scatter(h[:, :3], 1, 0, 3),
    "SelectScatter": lambda h: zeros(h).select_scatter(h[0], 0, 1),
    "MaskedFill": lambda h: h.masked_fill(h > 0, 0.0),
    "MaskedSelect": lambda h: h.masked_select(h > 0),
    "MaskedScatter": lambda h: zeros(h).masked_scatter(h > 0, h),
    "Where": lambda h: torch.where(h > 0.1, 3 * h, h),
    "NanToNum": lambda h: h.nan_to_num(),
    "ConstantPadNd": lambda h: F.pad(h, (1, 2)),
    "ReflectionPad1D": lambda h: F.pad(row(h), (1, 1), mode="reflect"),
    "ReflectionPad2D": lambda h: F.pad(image(h), (1, 1, 1, 1), mode="reflect"),
    "ReflectionPad3D": lambda h: F.pad(volume(h), (1, 1, 1, 1, 1, 1), mode="reflect"),
    "ReplicationPad1D": lambda h: F.pad(row(h), (1, 1), mode="replicate"),
    "ReplicationPad2D": lambda h: F.pad(image(h), (1, 1, 1, 1), mode="replicate"),
    "ReplicationPad3D": lambda h: F.pad(volume(h), (1, 1, 1, 1, 1, 1), mode="replicate"),
    "Im2Col": lambda h: F.unfold(image(h), 2),
    "Col2Im": lambda h: F.fold(h.reshape(2, 12, 1), (2, 2), (2, 2)),
    "PixelShuffle": lambda h: F.pixel_shuffle(h.reshape(2, 12, 1, 1), 2),
    "PixelUnshuffle": lambda h: F.pixel_unshuffle(image(h), 2),
    "ChannelShuffle": lambda h: F.channel_shuffle(h.reshape(2, 12, 1, 1), 3),
    "UpsampleNearest1D": lambda h: F.interpolate(row(h), scale_factor=2),
    "UpsampleNearest2D": lambda h: F.interpolate(image(h), scale_factor=2),
    "UpsampleNearest3D": lambda h: F.interpolate(volume(h), scale_factor=2),
    "UpsampleNearestExact1D": lambda h: F.interpolate(row(h), scale_factor=2, mode="nearest-exact"),
    "UpsampleNearestExact2D": lambda h: F.interpolate(image(h), scale_factor=2, mode="nearest-exact"),
    "UpsampleNearestExact3D": lambda h: F.interpolate(volume(h), scale_factor=2, mode="nearest-exact"),
    "UpsampleLinear1D": lambda h: F.interpolate(row(h), scale_factor=2, mode="linear"),
    "UpsampleBilinear2D": lambda h: F.interpolate(image(h), scale_factor=2, mode="bilinear"),
    "UpsampleBilinear2DAa": lambda h: F.interpolate(image(h), scale_factor=2, mode="bilinear", antialias=True),
    "UpsampleBicubic2D": lambda h: F.interpolate(image(h), scale_factor=2, mode="bicubic"),
    "UpsampleBicubic2DAa": lambda h: F.interpolate(image(h), scale_factor=2, mode="bicubic", antialias=True),
    "UpsampleTrilinear3D": lambda h: F.interpolate(volume(h), scale_factor=2, mode="trilinear"),
    "AvgPool2D": lambda h: F.avg_pool2d(image(h), 2),
    "AvgPool3D": lambda h: F.avg_pool3d(volume(h), 2),
    "AdaptiveAvgPool2D": lambda h: F.adaptive_avg_pool2d(h.reshape(2, 1, 3, 4), 2),
    "AdaptiveAvgPool3D": lambda h: F.adaptive_avg_pool3d(volume(h), 2),
    "MaxPool2DWithIndices": lambda h: F.max_pool2d(image(h), 2),
    "MaxPool3DWithIndices": lambda h: F.max_pool3d(volume(h), 2),
    "AdaptiveMaxPool2D": lambda h: F.adaptive_max_pool2d(h.reshape(2, 1, 3, 4), 2),
    "AdaptiveMaxPool3D": lambda h: F.adaptive_max_pool3d(volume(h), 2),
    "Max": lambda h: h.max(dim=1).values + h.max(),
    "Min": lambda h: h.min(dim=1).values + h.min(),
    "Amax": lambda h: h.amax(dim=1),
    "Amin": lambda h: h.amin(dim=1),
    "Aminmax": lambda h: torch.aminmax(h, dim=1).max,
    "Maximum": lambda h: torch.maximum(h, 2 * h - 1),
    "Minimum": lambda h: torch.minimum(h, 2 * h - 1),
    "Fmax": lambda h: torch.fmax(h, 2 * h - 1),
    "Fmin": lambda h: torch.fmin(h, 2 * h - 1),
    "Topk": lambda h: h.topk(3).values,
    "Sort": lambda h: h.sort().values,
    "Median": lambda h: h.median(dim=1).values + h.median(),
    "Kthvalue": lambda h: h.kthvalue(3).values,
    "Relu": F.relu,
    "LeakyRelu": F.leaky_relu,
    "Threshold": lambda h: F.threshold(h, 0.1, 0.2),
    "Hardtanh": F.relu6,
    "RreluWithNoise": F.rrelu,
    "Hardshrink": F.hardshrink,
    "Softshrink": F.softshrink,
    "Clamp": lambda h: h.clamp(-0.5, 0.5) + h.clamp(torch.tensor(-0.1)),
    "ClampMin": lambda h: torch.clamp_min(h, 0.1),
    "ClampMax": lambda h: torch.clamp_max(h, 0.1),
    "Floor": lambda h: h.floor(),
    "Ceil": lambda h: h.ceil(),
    "Round": lambda h: h.round(),
    "Trunc": lambda h: h.trunc(),
    "Mul": lambda h: h * random(0, 2, 12, dtype=torch.float32),
    "Div": lambda h: h / random(0, 2, 12, dtype=torch.float32),
    "Mm": lambda h: h @ random(0, 12, 3, dtype=torch.float32),
    "Bmm": lambda h: row(h) @ random(0, 2, 12, 3, dtype=torch.float32),
    "Mv": lambda h: h @ random(0, 12, dtype=torch.float32),
    "Dot": lambda h: h[0] @ random(0, 12, dtype=torch.float32),
    "Addmm": lambda h: torch.addmm(h, h, torch.ones(12, 12)),
    "Baddbmm": lambda h: torch.baddbmm(row(h), row(h), torch.ones(2, 12, 12)),
    "Addbmm": lambda h: torch.addbmm(h, h.reshape(1, 2, 12), torch.ones(1, 12, 12)),
    "Addmv": lambda h: torch.addmv(h[0, :2], h, torch.ones(12)),
    "Addr": lambda h: torch.addr(h, h[0, :2], torch.ones(12)),
    "Addcmul": lambda h: torch.addcmul(h, h, torch.ones(12)),
    "PreluKernel": lambda h: F.prelu(h, torch.tensor([0.3])),
    "Convolution": lambda h: F.conv1d(row(h), torch.ones(2, 1, 3)),
    "Trilinear": lambda h: F.bilinear(h, torch.ones(2, 3), random(0, 4, 12, 3, dtype=torch.float32)),
    "NativeBatchNorm": lambda h: F.batch_norm(h, torch.zeros(12), torch.ones(12), torch.ones(12, requires_grad=True)),
    "Rsub": lambda h: torch.rsub(h, 2.0),
}
# Nodes that torch does not create on this machine, or whose second derivative is tested elsewhere.
ELSEWHERE = {
    *("MkldnnAdaptiveAvgPool2D", "MkldnnMaxPool2D", "MkldnnLinear", "Linear", "CudnnBatchNorm", "MiopenBatchNorm"),
    *("ReshapeAlias", "Narrow", "Hardsigmoid", "NativeLayerNorm", "NativeGroupNorm"),
}


class Between(nn.Module):
    """A linear layer, an operation, and a random sum of its results, for two samples."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.linear, self.operation = nn.Linear(4, 12), operation

    def forward(self, x: Tensor) -> Tensor:
        out = self.operation(self.linear(x))
        return (out * random(1, *out.shape, dtype=torch.float32)).sum().expand(2, 3)


def curved_layers(model: nn.Module, *chunks: Tensor, up_to_a_constant: bool = True) -> set[str]:
    """Layers in which the outputs on some chunks of samples are curved."""
    with differentiable_weights(model) as weights:
        layers = CurvedLayers(weights, up_to_a_constant=up_to_a_constant)
        for x in chunks:
            layers.read(model(x))
        return set(layers.names())


def curved(operation: Operation) -> set[str]:
    return curved_layers(Between(operation), random(2, 2, 4, dtype=torch.float32))


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_counts_as_piecewise_linear_has_no_second_derivative(name: str) -> None:
    model, x = Between(OPERATIONS[name]), random(2, 2, 4, dtype=torch.float32)
    with differentiable_weights(model) as weights:
        out = model(x)
        kinds = {kind_of(node) for node in in_order_of_computation(out.grad_fn)}
        if any("NotImplemented" in kind for kind in kinds):
            pytest.skip(f"torch {torch.__version__} has no derivative of it")
        assert name in kinds
        tensors = list(weights.tensors.values())
        slopes = torch.autograd.grad(out[0, 0], tensors, create_graph=True)
        for slope in slopes:
            for entry in slope.flatten() if slope.requires_grad else ():
                for product in torch.autograd.grad(entry, tensors, retain_graph=True, materialize_grads=True):
                    assert not product.any()
    assert curved(OPERATIONS[name]) == set()


def test_every_operation_of_the_table_is_tested() -> None:
    assert _PIECEWISE_LINEAR | set(_FACTORS) == set(OPERATIONS) | ELSEWHERE
    assert not ELSEWHERE & set(OPERATIONS)


class OfMyOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


class WithVariable(OfMyOwn):
    """A function that keeps a tensor under the name that leaves of the graph use for theirs."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.variable = h
        return h.clone()


class Relu(OfMyOwn):
    """A custom function with the name of a known operation."""


CURVED: dict[str, Operation] = {
    **{f.__name__: f for f in (F.gelu, F.silu, F.elu, F.softplus, F.mish, F.hardswish, F.selu, F.celu, F.logsigmoid)},
    **{f.__name__: f for f in (torch.tanh, torch.sigmoid, torch.exp, torch.sin, torch.square, torch.erf, torch.cosh)},
    "softmax": lambda h: h.softmax(dim=1),
    "log_softmax": lambda h: h.log_softmax(dim=1),
    "layer_norm": lambda h: F.layer_norm(h, (12,)),
    "group_norm": lambda h: F.group_norm(h, 3),
    "norm by the batch": lambda h: F.batch_norm(h, None, None, training=True),
    "norm": lambda h: h.norm(dim=1),
    "std": lambda h: h.std(dim=1),
    "glu": F.glu,
    "divided by": lambda h: 1 / h,
    "times itself": lambda h: h * h.relu(),
    "times itself in a matrix": lambda h: h @ h.t(),
    "swish": lambda h: h * h.sigmoid(),
    "lerp by itself": lambda h: torch.lerp(torch.ones_like(h), h, h),
    "cdist": lambda h: torch.cdist(h, torch.ones(3, 12)),
    "attention": lambda h: F.scaled_dot_product_attention(row(h), row(h), row(h)),
    "magnitude of complex numbers": lambda h: (h.to(torch.complex64) * (1 + 1j)).abs(),
    "my own": OfMyOwn.apply,
    "my own with a variable": WithVariable.apply,
    "my own relu": Relu.apply,
    "saturated": lambda h: F.gelu(1e6 * h),
    "hidden": lambda h: 0 * h.tanh() + h,
}


@pytest.mark.parametrize("name", CURVED)
def test_every_other_operation_counts_as_curved(name: str) -> None:
    assert curved(CURVED[name]) == {"linear.weight", "linear.bias"}


class Twice(nn.Module):
    """Two layers joined by an operation."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.left, self.right, self.join = nn.Linear(4, 3), nn.Linear(4, 3), join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.left(x), self.right(x))


BOTH, NONE = {"left", "right"}, set[str]()


@pytest.mark.parametrize(
    ("join", "expected"),
    [
        (lambda a, b: a * b, NONE),
        (lambda a, b: a * b.relu(), NONE),
        (lambda a, b: a / b, {"right"}),
        (lambda a, b: a * b.tanh(), {"right"}),
        (lambda a, b: a * b + a, NONE),
        (lambda a, b: a * (a + b), {"left"}),
        (lambda a, b: (a + b) * (a - b), BOTH),
        (lambda a, b: torch.addcmul(a, a, b), NONE),
        (lambda a, b: torch.addcmul(b, a, a), {"left"}),
        (lambda a, b: F.layer_norm(a, (3,)) + b, {"left"}),
        (torch.maximum, NONE),
        (lambda a, b: torch.where(a > 0, b, 0), NONE),
        (lambda a, b: F.linear(a, b[:2]), NONE),
        (lambda a, b: a.exp() + b.detach(), {"left"}),
    ],
    ids=lambda value: "",
)
def test_a_product_is_linear_in_each_factor(join: Callable[[Tensor, Tensor], Tensor], expected: set[str]) -> None:
    """Layers that the outputs do not depend on are not among them."""
    found = curved_layers(Twice(join), random(0, 2, 4, dtype=torch.float32))
    assert {name.split(".")[0] for name in found} == expected


def test_hard_sigmoid_counts_as_piecewise_linear() -> None:
    assert curved(F.hardsigmoid) == set()


def test_scale_and_shift_of_normalisations_are_linear() -> None:
    x = random(0, 5, 6, dtype=torch.float32)
    for norm in (nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.BatchNorm1d(6, track_running_stats=False)):
        model = nn.Sequential(nn.Linear(6, 6), norm)
        assert curved_layers(model, x) == {"0.weight", "0.bias"}
    assert curved_layers(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), x) == set()


def test_log_probabilities_count_as_logits_only_where_a_constant_does_not_matter() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(dim=1)), random(0, 5, 4, dtype=torch.float32)
    assert curved_layers(model, x) == set()
    assert curved_layers(model, x, up_to_a_constant=False) == {"0.weight", "0.bias"}


def test_a_single_sample_suffices() -> None:
    x = random(0, 12, 5, dtype=torch.float32)
    expected = {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert curved_layers(tanh_mlp(), x) == curved_layers(tanh_mlp(), x[:1]) == expected
    assert curved_layers(relu_mlp(), x) == curved_layers(relu_mlp(), x[:1]) == set()


class Sided(nn.Module):
    """Linear in one layer if the first number of the chunk is positive, else curved in it and linear in another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x[0, 0] > 0 else self.layer(x).tanh() + self.other(x)


def test_a_layer_that_is_curved_in_one_chunk_is_curved() -> None:
    right = torch.ones(2, 4)
    assert curved_layers(Sided(), right) == set()
    assert curved_layers(Sided(), -right) == {"layer.weight", "layer.bias"}
    for chunks in ((right, -right), (-right, right)):
        assert curved_layers(Sided(), *chunks) == {"layer.weight", "layer.bias"}
