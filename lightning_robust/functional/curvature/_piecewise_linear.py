"""In which layers are the outputs of a network piecewise linear, and has it second derivatives at all?

Where they are, the Hessian of the loss and its Gauss–Newton matrix have the same diagonal block. It is read off the
graph that autograd records of a forward pass. Outputs are piecewise linear in a parameter tensor if every operation
between them is linear or piecewise linear (sums, views, ReLU, pooling), or linear in each factor while the tensor
stands behind one of them only (products, convolutions, normalisation by running statistics). Whatever is not known to
be so counts as curved, which costs time but is never wrong: the second derivatives, once taken, are zero.

So the answer does not depend on how large weights and inputs are, nor on which samples a gate lets through. Comparing
Hessian-vector products with zero does: functions saturate, and a branch that is masked out for the samples that were
tried looks linear.

Source: ours.
Cost: a forward pass.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._isolation.weights import Weights, differentiable_weights
from lightning_robust.functional._validation.tensors import outputs_of
from lightning_robust.functional.curvature._autograd_graph import (
    Node,
    in_order_of_computation,
    is_differentiable_once,
    kind_of,
    leaf_of,
)

# Names of autograd's nodes, without "Backward" and a number.
_SUMS_AND_PIECES = """
    Add Sub Rsub Neg Sum Mean Cumsum Clone ToCopy Alias Expand Repeat
    View UnsafeView ReshapeAlias AsStrided Permute Transpose T Squeeze Unsqueeze Flip Roll Diagonal Tril Triu Trace
    Slice Select Split SplitWithSizes Unbind Unfold Narrow Index IndexSelect Gather Take Embedding
    Cat Stack IndexPut IndexAdd IndexCopy IndexFill Scatter ScatterAdd SliceScatter SelectScatter
    MaskedFill MaskedSelect MaskedScatter Where NanToNum
    ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D
    Im2Col Col2Im PixelShuffle PixelUnshuffle ChannelShuffle
    UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleLinear1D UpsampleBilinear2D UpsampleBilinear2DAa
    UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D
    UpsampleBicubic2D UpsampleBicubic2DAa UpsampleTrilinear3D
    AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D MkldnnAdaptiveAvgPool2D
    MaxPool2DWithIndices MaxPool3DWithIndices MkldnnMaxPool2D AdaptiveMaxPool2D AdaptiveMaxPool3D
    Max Min Amax Amin Aminmax Maximum Minimum Fmax Fmin Topk Sort Median Kthvalue
    Relu LeakyRelu Threshold Hardtanh RreluWithNoise Hardsigmoid Hardshrink Softshrink Clamp ClampMin ClampMax
    Floor Ceil Round Trunc
"""
_PIECEWISE_LINEAR = frozenset(_SUMS_AND_PIECES.split())
_PRODUCTS = "Mul Div Mm Bmm Mv Dot Linear MkldnnLinear PreluKernel Convolution"
_SUMS_WITH_PRODUCTS = "Addmm Baddbmm Addbmm Addmv Addr Addcmul"
_NORMALISATIONS = "NativeBatchNorm CudnnBatchNorm MiopenBatchNorm NativeLayerNorm NativeGroupNorm"
# Operands of which each enters linearly while the others are held; what comes besides them is added.
_FACTORS = {
    **dict.fromkeys(_PRODUCTS.split(), slice(0, 2)),
    **dict.fromkeys(_NORMALISATIONS.split(), slice(0, 2)),
    **dict.fromkeys(_SUMS_WITH_PRODUCTS.split(), slice(1, 3)),
    "Trilinear": slice(0, 3),
}
_CURVED_IN = {"Div": 1, "NativeLayerNorm": 0, "NativeGroupNorm": 0}  # but for this operand
_SAMPLES = 32  # that pass together by default


def curved_layers(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    module: nn.Module | None = None,
    up_to_a_constant: bool = True,
    chunk_size: int | None = None,
) -> frozenset[str]:
    """Find the parameter tensors in which the outputs are not piecewise linear, or not known to be.

    Args:
        model: See :func:`hessian_trace`.
        inputs: ``(N, ...)``.
        module: See :func:`hessian_trace`.
        up_to_a_constant: Whether a number added to all outputs of a sample makes no difference, as for cross-entropy:
            then log-probabilities are as good as logits.
        chunk_size: How many samples pass together.

    Returns:
        The names of the tensors; those that the outputs do not depend on are among them.

    Raises:
        ValueError: If the network computes with a trained parameter itself, behind the back of its module.
    """
    linear: set[str] = set()
    curved: set[str] = set()
    with differentiable_weights(model, module=module) as weights:
        for x in torch.split(full_precision(inputs), chunk_size or _SAMPLES):
            found = _classified(outputs_of(model, x), weights, up_to_a_constant=up_to_a_constant)
            linear |= found[0]
            curved |= found[1]
        return frozenset(name for name in weights.tensors if name in curved or name not in linear)


def _classified(outputs: Tensor, weights: Weights, *, up_to_a_constant: bool) -> tuple[set[str], set[str]]:
    """Names of the tensors in which the outputs are piecewise linear, and of those in which they are curved."""
    names = list(weights.tensors)
    bits = {id(tensor): 1 << k for k, tensor in enumerate(weights.tensors.values())}
    start = outputs.grad_fn
    if up_to_a_constant and kind_of(start) == "LogSoftmax" and outputs.ndim == 2:
        start = start.next_functions[0][0]  # type: ignore[union-attr]
    curved = 0
    behind: dict[Node | None, int] = {None: 0}  # which tensors stand behind a node, as bits
    for node in in_order_of_computation(start):
        leaf = leaf_of(node)
        if leaf is not None:
            _refuse_original(leaf, weights)
            behind[node] = bits.get(id(leaf), 0)
            continue
        operands = [behind[below] for below, _ in node.next_functions]
        behind[node] = _union(operands)
        kind = kind_of(node)
        if kind in _FACTORS:
            factors = operands[_FACTORS[kind]]
            curved |= _union(a & b for a, b in itertools.combinations(factors, 2))
            if kind in _CURVED_IN:
                curved |= operands[_CURVED_IN[kind]]
            elif getattr(node, "_saved_training", False):  # normalised by the batch itself
                curved |= operands[0]
        elif kind not in _PIECEWISE_LINEAR:
            curved |= behind[node]

    def named(which: int) -> set[str]:
        return {name for k, name in enumerate(names) if which >> k & 1}

    return named(behind[start] & ~curved), named(curved)


def _refuse_original(leaf: Tensor, weights: Weights) -> None:
    if weights.is_original(leaf):
        raise ValueError(
            "Expected a network that takes its weights from attributes of its modules in every forward pass, but it"
            f" keeps one of shape {tuple(leaf.shape)} elsewhere, such as in a list, where no second derivative reaches"
            " it: its trace would be wrong."
        )


def _union(masks: Iterable[int]) -> int:
    return functools.reduce(operator.or_, masks, 0)


def refuse_missing_derivatives(outputs: Tensor, weights: Weights) -> None:
    """Raise if a function that can be differentiated only once stands between weights and outputs.

    ``once_differentiable`` promises an error when such a function is differentiated twice, but keeps it only where
    something else asks for a derivative of its incoming gradient: otherwise the second derivative is silently zero.

    Raises:
        ValueError: If there is one.
    """
    names = {id(tensor): name for name, tensor in weights.tensors.items()}
    for node in in_order_of_computation(outputs.grad_fn):
        if is_differentiable_once(node):
            for below in in_order_of_computation(node):
                name = names.get(id(leaf_of(below)))
                if name is not None:
                    raise no_second_derivative(f"in layer {name!r}: {node.name()} is marked with @once_differentiable")


def no_second_derivative(cause: object) -> ValueError:
    """The error to raise where a second derivative is needed and fails."""
    return ValueError(
        "Expected a model that can be differentiated twice with respect to its weights, but that failed"
        f" {str(cause).rstrip('.')}. Use estimator='gauss_newton', which needs first derivatives only."
    )
