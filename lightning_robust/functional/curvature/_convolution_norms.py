"""Squared norms of the gradient of the weight of a convolution for each sample.

At each tap of the kernel a convolution is a linear layer whose inputs are shifted. With a few large maps the taps are
taken one by one, which spares the patches, many times the size of the inputs. With many small maps, sums over pairs of
positions are cheaper: the product of two patches is a sum over taps of products of two positions, which one product
of matrices yields for all pairs. On 32 samples of 512 channels and 4 x 4 positions this takes a hundredth of the time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.functional._isolation.convolutions import Geometry, is_depthwise, sample_gradients
from lightning_robust.functional.curvature._product_norms import ELEMENTS, product_norms, squared_norms

_ALL = slice(None)
_COST_OF_SUM = 8  # of the sum of two large tensors per element, in multiplications of a product of matrices


def convolution_norms(
    slopes: Tensor, inputs: Tensor, shape: torch.Size, geometry: Geometry, num_samples: int
) -> Tensor:
    """``‖∂/∂W‖²`` of each sample, ``(N,)``, for a weight of a shape.

    ``slopes`` are gradients of the outputs, ``(N R, O, ...)`` with R maps of each sample, ``inputs`` ``(N R, I, ...)``.
    """
    maps = len(slopes) // num_samples
    positions, of_inputs = slopes[0, 0].numel(), inputs[0, 0].numel()
    taps = math.prod(shape[2:])
    of_taps = taps * positions * math.prod(shape[:2])
    channels = of_inputs**2 * inputs.shape[1] + positions**2 * slopes.shape[1]
    of_pairs = channels + _COST_OF_SUM * taps * geometry.groups * positions**2
    if is_depthwise(shape, geometry):
        way, size = _depthwise, shape.numel()
    elif maps == 1 and of_pairs < of_taps:
        way, size = _by_pairs, 2 * geometry.groups * of_inputs**2
    else:
        way, size = _by_taps, maps * inputs[0].numel()
    step = maps * max(1, ELEMENTS // size)
    parts = zip(torch.split(slopes, step), torch.split(inputs, step), strict=True)
    return torch.cat([way(g, x, shape, geometry, maps) for g, x in parts])


def _depthwise(slopes: Tensor, inputs: Tensor, shape: torch.Size, geometry: Geometry, maps: int) -> Tensor:
    gradients = sample_gradients(slopes, inputs, shape, geometry)
    return squared_norms(gradients.reshape(-1, maps, shape.numel()).sum(dim=1))


def _by_taps(slopes: Tensor, inputs: Tensor, shape: torch.Size, geometry: Geometry, maps: int) -> Tensor:
    padded = _padded(inputs, geometry)
    if maps == 1 and set(geometry.stride) == {1}:
        # With zeros between the rows of the slopes, each tap is a shift of the whole map in memory, without a copy.
        sizes = padded.shape[2:]
        slopes = _filled(slopes, (slopes.shape[2], *sizes[1:]))
        padded = _filled(padded, (sizes[0] + 1, *sizes[1:])).flatten(2)
        steps = [math.prod(sizes[d:]) for d in range(1, len(sizes) + 1)]
        starts = (sum(math.prod(pair) for pair in zip(tap, steps, strict=True)) for tap in _starts(shape, geometry))
        taps: Iterator[tuple[slice, ...]] = ((slice(start, start + slopes[0, 0].numel()),) for start in starts)
    else:
        taps = _taps(shape, geometry, slopes.shape)
    g = _grouped(slopes, geometry.groups, maps)
    norms = g.new_zeros(len(g), dtype=torch.float64)
    for tap in taps:
        norms += product_norms(g, _grouped(padded[(_ALL, _ALL, *tap)], geometry.groups, maps))
    return norms.view(-1, geometry.groups).sum(dim=1)


def _padded(inputs: Tensor, geometry: Geometry) -> Tensor:
    return F.pad(inputs, [p for padding in reversed(geometry.padding) for p in (padding, padding)])


def _filled(maps: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Maps of these sizes, with zeros at the ends."""
    missing = [size - there for size, there in zip(sizes, maps.shape[2:], strict=True)]
    return F.pad(maps, [p for more in reversed(missing) for p in (0, more)])


def _by_pairs(slopes: Tensor, inputs: Tensor, shape: torch.Size, geometry: Geometry, maps: int) -> Tensor:
    a = _grouped(inputs, geometry.groups, maps)
    sizes = inputs.shape[2:]
    products = torch.bmm(a.mT, a).view(len(a), *sizes, *sizes)
    products = F.pad(products, 2 * [p for padding in reversed(geometry.padding) for p in (padding, padding)])
    g = _grouped(slopes, geometry.groups, maps)
    pairs = torch.bmm(g.mT, g)
    of_patches = torch.zeros_like(pairs).view(len(g), *slopes.shape[2:], *slopes.shape[2:])
    for tap in _taps(shape, geometry, slopes.shape):
        of_patches += products[(_ALL, *tap, *tap)]
    norms = (pairs * of_patches.view_as(pairs)).sum(dim=(1, 2), dtype=torch.float64).clamp_min(0)
    return norms.view(-1, geometry.groups).sum(dim=1)


def _starts(shape: torch.Size, geometry: Geometry) -> Iterator[tuple[int, ...]]:
    """For each tap of the kernel, the first position of the padded inputs that it multiplies."""
    for tap in itertools.product(*map(range, shape[2:])):
        yield tuple(place * dilation for place, dilation in zip(tap, geometry.dilation, strict=True))


def _taps(shape: torch.Size, geometry: Geometry, slopes: torch.Size) -> Iterator[tuple[slice, ...]]:
    """For each tap of the kernel, the positions of the padded inputs that it multiplies."""
    for starts in _starts(shape, geometry):
        yield tuple(
            slice(start, start + stride * (size - 1) + 1, stride)
            for start, stride, size in zip(starts, geometry.stride, slopes[2:], strict=True)
        )


def _grouped(values: Tensor, groups: int, maps: int) -> Tensor:
    """Maps ``(N R, G F, ...)`` as ``(N G, F, R T)``: the positions of all maps of a sample, group by group."""
    if maps == 1:
        return values.reshape(len(values) * groups, values.shape[1] // groups, -1)
    by_map = values.reshape(-1, maps, groups, values.shape[1] // groups, values[0, 0].numel())
    return by_map.permute(0, 2, 3, 1, 4).reshape(-1, by_map.shape[3], maps * by_map.shape[4])
