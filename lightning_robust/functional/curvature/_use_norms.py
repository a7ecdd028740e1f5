"""Squared norms of the gradient of a weight for each sample, from the operation that uses it.

A bias, a scale and the weight of a normalisation have gradients that are sums over positions of products. For linear
layers see ``_product_norms.py``, for convolutions ``_convolution_norms.py``.

Cost: at most that of the gradient of the weight for a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_robust.functional._isolation.convolutions import Geometry
from lightning_robust.functional.curvature._convolution_norms import convolution_norms
from lightning_robust.functional.curvature._product_norms import product_norms, squared_norms
from lightning_robust.functional.curvature._weight_uses import Use


class Slopes:
    """Gradients of the outputs of an operation, ``(N R, ...)`` with R rows of each of N samples.

    Rows stand sample by sample or, with ``samples_last``, all samples of each row together, ``(R N, ...)`` or
    ``(R, N, ...)``.
    """

    def __init__(self, values: Tensor, num_samples: int, *, samples_last: bool = False) -> None:
        self.values = values
        self.num_samples = num_samples
        self.samples_last = samples_last

    def by_sample(self, rows: Tensor) -> Tensor:
        """Rows ``(N R, ...)`` of the operation as ``(N, R, ...)``."""
        if self.samples_last:
            return rows.reshape(-1, self.num_samples, *rows.shape[1:]).transpose(0, 1)
        return rows.reshape(self.num_samples, -1, *rows.shape[1:])

    def norms_of_sums(self, rows: Tensor) -> Tensor:
        """Squared norms of the sum of all rows of each sample, ``(N,)``."""
        return squared_norms(self.by_sample(rows).sum(dim=1))

    def norms_by_channel(self, products: Tensor) -> Tensor:
        """Squared norms ``(N,)`` of products ``(N R, C, ...)``, summed over everything but channels."""
        return self.norms_of_sums(products.flatten(2).sum(dim=2) if products.ndim > 2 else products)

    def norms_of_operand(self, products: Tensor, shape: torch.Size) -> Tensor | None:
        """Squared norms ``(N,)`` of the gradient of an operand of a shape, from products ``(N R, ...)`` with the rest.

        None if the operand has values of its own for every row.
        """
        own = (1,) * (products.ndim - len(shape)) + tuple(shape)
        if own[0] != 1 or (self.samples_last and own[1:2] != (1,)):
            return None
        others = [dim for dim in range(1, products.ndim) if own[dim] == 1]
        if self.samples_last:  # dimension 1 is among the others
            return squared_norms(products.transpose(0, 1).sum(dim=others))
        return self.norms_of_sums(products.sum(dim=others) if others else products)


Norms = Callable[[Any, Use, Slopes], Tensor | None]


def use_norms(use: Use, slopes: Slopes) -> Tensor | None:
    """``‖∂/∂W‖²`` of each sample, ``(N,)``, float64; None if there is no rule for this use."""
    rule, shape = _RULES.get((use.kind, use.operand)), slopes.values.shape
    in_rows = not slopes.samples_last or use.kind in ("Addmm", "Mm")
    if slopes.samples_last and use.kind not in _SAMPLES_LAST:
        return None
    if shape[0] % slopes.num_samples if in_rows else shape[1:2] != (slopes.num_samples,):
        return None
    return None if rule is None else rule(use.node, use, slopes)


def takes_samples_last(use: Use) -> bool:
    """Whether there is a rule for this use that also serves operations with samples last."""
    return use.kind in _SAMPLES_LAST and (use.kind, use.operand) in _RULES


def _addmm_weight(node: Any, use: Use, slopes: Slopes) -> Tensor | None:
    return _linear(node._saved_mat1, slopes) if node._saved_alpha == 1 else None


def _mm_weight(node: Any, use: Use, slopes: Slopes) -> Tensor:
    return _linear(node._saved_self, slopes)


def _linear(inputs: Tensor, slopes: Slopes) -> Tensor:
    return product_norms(*(slopes.by_sample(rows).transpose(1, 2) for rows in (slopes.values, inputs)))


def _addmm_bias(node: Any, use: Use, slopes: Slopes) -> Tensor | None:
    plain = node._saved_beta == 1 and use.shape == slopes.values.shape[1:]
    return slopes.norms_of_sums(slopes.values) if plain else None


def _convolution_weight(node: Any, use: Use, slopes: Slopes) -> Tensor:
    numbers = (tuple(node._saved_stride), tuple(node._saved_padding), tuple(node._saved_dilation))
    geometry = Geometry(*numbers, node._saved_groups)
    ends = (slopes.values, node._saved_input)
    if node._saved_transposed:  # the inputs of a transposed convolution stand for the outputs of a plain one
        ends = ends[::-1]
    return convolution_norms(*ends, use.shape, geometry, slopes.num_samples)


def _channel_bias(node: Any, use: Use, slopes: Slopes) -> Tensor:
    return slopes.norms_by_channel(slopes.values)


def _batch_norm_weight(node: Any, use: Use, slopes: Slopes) -> Tensor | None:
    if node._saved_training:
        return None
    channels = (1, -1, *(1,) * (slopes.values.ndim - 2))
    scale = (node._saved_running_var + node._saved_eps).rsqrt().view(channels)
    centred = node._saved_input - node._saved_running_mean.view(channels)
    return slopes.norms_by_channel(centred * scale * slopes.values)


def _layer_norm_weight(node: Any, use: Use, slopes: Slopes) -> Tensor | None:
    normalised = (node._saved_input - node._saved_result1) * node._saved_result2
    return slopes.norms_of_operand(normalised * slopes.values, use.shape)


def _group_norm_weight(node: Any, use: Use, slopes: Slopes) -> Tensor:
    mean, scale = (statistic[..., None] for statistic in (node._saved_result1, node._saved_result2))
    normalised = (node._saved_input.reshape(*mean.shape[:2], -1) - mean) * scale
    return slopes.norms_by_channel(normalised.view_as(slopes.values) * slopes.values)


def _factor(node: Any, use: Use, slopes: Slopes) -> Tensor | None:
    other = (node._saved_other, node._saved_self)[use.operand]
    return slopes.norms_of_operand(other * slopes.values, use.shape)


def _summand(node: Any, use: Use, slopes: Slopes) -> Tensor | None:
    plain = use.operand == 0 or node._saved_alpha == 1
    return _broadcast(node, use, slopes) if plain else None


def _broadcast(node: Any, use: Use, slopes: Slopes) -> Tensor | None:
    return slopes.norms_of_operand(slopes.values, use.shape)


def _embedding(node: Any, use: Use, slopes: Slopes) -> Tensor | None:
    """Rows of the table that several positions look up have the sum of their gradients."""
    if node._saved_scale_grad_by_freq:
        return None
    looked_up = node._saved_indices.reshape(slopes.num_samples, -1)
    at = slopes.values.reshape(*looked_up.shape, -1) * (looked_up != node._saved_padding_idx)[..., None]
    same = looked_up[:, :, None] == looked_up[:, None]
    norms: Tensor = (torch.bmm(at, at.mT) * same).sum(dim=(1, 2), dtype=torch.float64)
    return norms.clamp_min(0)


_SAMPLES_LAST = {"Addmm", "Mm", "Add", "Sub", "Mul", "NativeLayerNorm"}  # operations that networks use in this order
_RULES: dict[tuple[str, int], Norms] = {  # by the kind of operation, and the place of the weight among its operands
    ("Addmm", 0): _addmm_bias,
    ("Addmm", 2): _addmm_weight,
    ("Mm", 1): _mm_weight,
    ("Convolution", 1): _convolution_weight,
    ("Convolution", 2): _channel_bias,
    ("NativeBatchNorm", 1): _batch_norm_weight,
    ("NativeBatchNorm", 2): _channel_bias,
    ("CudnnBatchNorm", 1): _batch_norm_weight,
    ("CudnnBatchNorm", 2): _channel_bias,
    ("NativeLayerNorm", 1): _layer_norm_weight,
    ("NativeLayerNorm", 2): _broadcast,
    ("NativeGroupNorm", 1): _group_norm_weight,
    ("NativeGroupNorm", 2): _channel_bias,
    **dict.fromkeys([("Mul", 0), ("Mul", 1)], _factor),
    **dict.fromkeys([("Add", 0), ("Add", 1), ("Sub", 0), ("Sub", 1)], _summand),
    ("Expand", 0): _broadcast,
    ("Embedding", 0): _embedding,
}
