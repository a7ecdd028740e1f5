"""Finds the parameter tensors in which a network's outputs are piecewise linear, from the graph of a forward pass.

In those tensors the Hessian of the loss and its Gauss–Newton matrix have the same diagonal block. The outputs are
piecewise linear in a tensor if every operation between the two is

- linear or piecewise linear (sums, views, ReLU, pooling), or
- linear in each factor, with the tensor behind one factor only (products, convolutions, normalisation by running
  statistics).

Every other operation, known or unknown, counts as curved. That costs time but is never wrong: the second derivatives,
once taken, are zero.

The answer depends neither on the size of weights and inputs nor on which samples a gate lets through. A comparison of
Hessian-vector products with zero does: functions saturate, and a branch that is masked out for the samples at hand
looks linear. To teach it another operation, add the name of its autograd node to a table below and a line to
``tests/functional/curvature/test_piecewise_linear.py``, which checks that the second derivative vanishes.

Source: ours.
Cost: one walk through the graph of a forward pass.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable

from torch import Tensor

from lightning_robust.functional._isolation.weights import Weights
from lightning_robust.functional.curvature._autograd_graph import Node, in_order_of_computation, kind_of, leaf_of

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
# Operands that each enter linearly while the others are held fixed; any further operand is added.
_FACTORS = {
    **dict.fromkeys(_PRODUCTS.split(), slice(0, 2)),
    **dict.fromkeys(_NORMALISATIONS.split(), slice(0, 2)),
    **dict.fromkeys(_SUMS_WITH_PRODUCTS.split(), slice(1, 3)),
    "Trilinear": slice(0, 3),
}
_CURVED_IN = {"Div": 1, "NativeLayerNorm": 0, "NativeGroupNorm": 0}  # except in this operand


class CurvedLayers:
    """The parameter tensors in which outputs are not known to be piecewise linear, found chunk by chunk of samples.

    With ``up_to_a_constant``, adding a number to all outputs of a sample makes no difference to the loss, as for
    cross-entropy. Log-probabilities then count as logits.
    """

    def __init__(self, weights: Weights, *, up_to_a_constant: bool) -> None:
        self._weights = weights
        self._up_to_a_constant = up_to_a_constant
        self._bits = {id(tensor): 1 << k for k, tensor in enumerate(weights.tensors.values())}
        self._reached = self._curved = 0  # sets of tensors, as bits

    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return self._named(self._reached & self._curved)

    def reached(self) -> frozenset[str]:
        """Names of the tensors to which the graph leads from the outputs of any sample so far, curved or not."""
        return frozenset(self._named(self._reached))

    def _named(self, bits: int) -> tuple[str, ...]:
        return tuple(name for k, name in enumerate(self._weights.tensors) if bits >> k & 1)

    def read(self, outputs: Tensor) -> None:
        """Classify the operations between weights and outputs ``(N, ...)`` of a forward pass.

        Raises a ``ValueError`` if the network uses the original of a trained parameter, past the module that owns it.
        """
        start = outputs.grad_fn
        if self._up_to_a_constant and kind_of(start) == "LogSoftmax" and outputs.ndim == 2:
            start = start.next_functions[0][0]  # type: ignore[union-attr]
        behind: dict[Node | None, int] = {None: 0}  # the tensors that each node depends on
        for node in in_order_of_computation(start):
            leaf = leaf_of(node)
            if leaf is not None:
                self._refuse_original(leaf)
                behind[node] = self._bits.get(id(leaf), 0)
                continue
            operands = [behind[below] for below, _ in node.next_functions]
            behind[node] = _union(operands)
            kind = kind_of(node)
            if kind in _FACTORS:
                self._curved |= _union(a & b for a, b in itertools.combinations(operands[_FACTORS[kind]], 2))
                if kind in _CURVED_IN:
                    self._curved |= operands[_CURVED_IN[kind]]
                elif getattr(node, "_saved_training", False):  # normalised by the batch itself
                    self._curved |= operands[0]
            elif kind not in _PIECEWISE_LINEAR:
                self._curved |= behind[node]
        self._reached |= behind[start]

    def _refuse_original(self, leaf: Tensor) -> None:
        if self._weights.is_original(leaf):
            raise ValueError(
                "Expected a network that takes its weights from attributes of its modules in every forward pass, but it"
                f" keeps one of shape {tuple(leaf.shape)} elsewhere, such as in a list, where no second derivative"
                " reaches it: its trace would be wrong."
            )


def _union(masks: Iterable[int]) -> int:
    return functools.reduce(operator.or_, masks, 0)
