"""The temperature that fits the words of many sequences, from a few numbers of each sequence.

Logits of 50,000 words at every position of every sequence cannot be kept, or sent to other processes. The temperature
depends on them only through their negative log-likelihood ``ℓ(β)``, ``β = 1/T``: the sum over positions of

    ℓ = log Σ_k exp(β z_k) − β z_y,    ℓ' = E_p z − z_y,    ℓ'' = Var_p z,    p = softmax(βz).

Each sequence keeps them at temperatures that are powers of 2, from 2⁻⁸ to 2⁸. Sums over sequences are exact, whatever
process has measured them. Between two powers the sum is a polynomial in log β of degree 5, which has its values, slopes
and curvatures at both ends; the root of its derivative is log β to within 0.001.

Smoothing is that of :mod:`~lightning_robust.functional.input_space.temperature`, for positions in place of samples,
with the mean of the margins in place of their median, which is no sum.

Source: ours.
Cost: 17 softmaxes of the logits; no forward or backward pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_robust.functional._validation.scales import ordinary
from lightning_robust.functional.input_space.float64 import float64_dtype, to_float64
from lightning_robust.functional.input_space.temperature import PSEUDO_SAMPLES, TemperatureFit

_OCTAVES = range(-8, 9)  # of β, ascending
_STEP = math.log(2)
SIZE = 3 * len(_OCTAVES) + 3
_AT_ONCE = 2**18  # logits that stay in the caches
_SQUARINGS = 4  # exponentials are squared rather than computed, until their rounding has grown eightfold
_BISECTIONS = 60


def loss_curves(logits: Tensor, targets: Tensor) -> Tensor:
    """What the temperature depends on, of each sequence.

    Args:
        logits: ``(N, T, V)``, −∞ for words that cannot be.
        targets: ``(N, T)``, int64, negative at positions that do not count. Neither do those count whose word has a
            logit of −∞.

    Returns:
        ``(N, 54)``, float64: ``ℓ``, ``ℓ'`` and ``ℓ''`` at 17 inverse temperatures; the number of positions; and sums
        over them of ``|m|`` and ``(−m)₊``, where the margin ``m`` is ``z_y − max_{k≠y} z_k``.
    """
    rows = []
    for one, words in zip(logits.detach(), targets.to(logits.device), strict=True):
        total = one.new_zeros(SIZE, dtype=float64_dtype(one))
        for part in torch.split((words >= 0).nonzero()[:, 0], max(1, _AT_ONCE // one.shape[1])):
            total += _of_positions(one[part], words[part])
        rows.append(total)
    return to_float64(torch.stack(rows))


def _of_positions(z: Tensor, y: Tensor) -> Tensor:
    """The sums over positions, from logits (P, V) and words (P,)."""
    wide = float64_dtype(z)
    below = z - z.amax(dim=1, keepdim=True)  # no exponential overflows, and a certain word has no rounding
    own = below.gather(1, y[:, None])
    possible = ~own.isneginf()
    margins = (own - below.scatter(1, y[:, None], -torch.inf).amax(dim=1, keepdim=True)).to(wide)
    margins = margins.masked_fill(margins.isinf(), 0)  # of a position with a single word
    own, finite = own.to(wide), below.masked_fill(below.isneginf(), 0)
    columns = []
    weights, product = torch.empty_like(below), torch.empty_like(below)
    for number, octave in enumerate(_OCTAVES):
        beta = 2.0**octave
        if number % _SQUARINGS:
            weights.square_()
        else:
            torch.mul(below, beta, out=weights).exp_()
        total = weights.sum(dim=1, keepdim=True).to(wide)
        first = torch.mul(weights, finite, out=product).sum(dim=1, keepdim=True).to(wide) / total
        second = product.mul_(finite).sum(dim=1, keepdim=True).to(wide) / total
        columns += [total.log() - beta * own, first - own, (second - first.square()).clamp_min(0)]
    columns += [torch.ones_like(margins), margins.abs(), (-margins).clamp_min(0)]
    return torch.where(possible, torch.cat(columns, dim=1), 0.0).sum(dim=0)


def num_positions(curves: Tensor) -> Tensor:
    """How many positions of each sequence count, (N,)."""
    return curves[:, -3]


def fit_curves(curves: Tensor) -> TemperatureFit:
    """Temperature between 2⁻⁸ and 2⁸ that fits N sequences, from what :func:`loss_curves` returns of each.

    It is 1 without any position or margin.
    """
    count, sizes, missed = curves[:, -3:].unbind(dim=1)
    influences = torch.zeros_like(count)
    counted = count > 0
    counted = counted & ordinary(torch.where(counted, sizes / count, 0.0))
    gap = sizes[counted].sum() / count[counted].sum()
    if not gap > 0:
        return TemperatureFit(curves.new_ones(()), influences)
    knots = curves[counted, : 3 * len(_OCTAVES)].reshape(-1, len(_OCTAVES), 3)
    weight = (PSEUDO_SAMPLES - missed[counted].sum() / gap).clamp_min(0)
    knots = torch.cat([knots, weight * _of_pseudo_position(gap)[None]])
    slopes = knots[:, :, 1].sum(dim=0)  # they rise, as the sum is convex
    below = int((slopes <= 0).sum())
    if below in (0, len(slopes)):  # an end of the range, which does not move
        octave = _OCTAVES[0 if below == 0 else -1]
        return TemperatureFit(curves.new_tensor(2.0**-octave), influences)
    polynomials = _Polynomials(knots[:, below - 1 : below + 1], octave=_OCTAVES[below - 1])
    place = polynomials.place_of_minimum()
    beta = polynomials.beta(place)
    first, second = polynomials.derivatives(place)
    curvature = (second - first).sum() / beta**2  # of ℓ in β
    if curvature > 0:
        own = (first[:-1] + first[-1] / (len(first) - 1)) / beta  # the pseudo-position is spread evenly
        influences[counted] = -own * len(count) / curvature
    return TemperatureFit(1 / beta, influences)


def _of_pseudo_position(gap: Tensor) -> Tensor:
    """``log(1 + e^{βG})`` and its derivatives in β, (17, 3)."""
    beta = 2.0 ** torch.tensor(list(_OCTAVES)).to(gap)
    wrong = (beta * gap).sigmoid()
    value = torch.nn.functional.softplus(beta * gap)
    return torch.stack([value, gap * wrong, gap.square() * wrong * (1 - wrong)], dim=1)


class _Polynomials:
    """Curves ``ℓ`` between one octave of β and the next, as polynomials in the place ``s``: ``β = 2^(octave + s)``.

    Args:
        ends: ``(n, 2, 3)``, ``ℓ`` and its first and second derivative in β, at both ends.
        octave: Of the lower end.
    """

    def __init__(self, ends: Tensor, *, octave: int) -> None:
        self._octave = octave
        beta = 2.0**octave * ends.new_tensor([1.0, 2.0])
        value = ends[:, :, 0]
        slope = _STEP * beta * ends[:, :, 1]  # in s
        curvature = _STEP * slope + (_STEP * beta).square() * ends[:, :, 2]
        left = (value[:, 0], slope[:, 0], curvature[:, 0] / 2)
        rest = (
            value[:, 1] - sum(left),
            slope[:, 1] - left[1] - 2 * left[2],
            curvature[:, 1] - 2 * left[2],
        )
        self._coefficients = (
            *left,
            10 * rest[0] - 4 * rest[1] + rest[2] / 2,
            -15 * rest[0] + 7 * rest[1] - rest[2],
            6 * rest[0] - 3 * rest[1] + rest[2] / 2,
        )

    def beta(self, place: Tensor) -> Tensor:
        """β at a place, 0-d."""
        return ((place + self._octave) * _STEP).exp()

    def derivatives(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """``dℓ/d log β`` and ``d²ℓ/d(log β)²`` of each curve, (n,)."""
        first = sum(i * place ** (i - 1) * c for i, c in enumerate(self._coefficients) if i)
        second = sum(i * (i - 1) * place ** (i - 2) * c for i, c in enumerate(self._coefficients) if i > 1)
        return torch.as_tensor(first) / _STEP, torch.as_tensor(second) / _STEP**2

    def place_of_minimum(self) -> Tensor:
        """Where the derivative of the sum changes its sign, by bisection."""
        low: Tensor = self._coefficients[0].new_zeros(())
        high = torch.ones_like(low)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            rising = self.derivatives(middle)[0].sum() > 0
            low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
        return (low + high) / 2
