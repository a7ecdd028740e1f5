"""Fisher–Rao paths one by one, in float64, with the whole D × D matrix. Nothing here uses the package."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tests.helpers.oracles import score_jacobian


class DensePath(NamedTuple):
    margin: float
    hit: int
    end: Tensor
    steps: int
    way: list[Tensor]  # probabilities at the start and after each step


def dense_natural_gradient(
    model: nn.Module, x: Tensor, *, source: int, target: int, damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(G + λI)⁻¹ g`` (D,), G (D, D) and g (D,) of one sample."""
    probs, scores = score_jacobian(model, x)
    fisher = torch.einsum("c,cd,ce->de", probs, scores, scores)
    gradient = scores[source] - scores[target]
    return torch.linalg.solve(fisher + damping * torch.eye(len(fisher), dtype=fisher.dtype), gradient), fisher, gradient


def dense_path(
    model: nn.Module,
    x: Tensor,
    *,
    source: int,
    target: int,
    damping: float,
    step_length: float,
    max_euclidean_step: float,
    max_steps: int = 200,
    halvings: int = 40,
) -> DensePath:
    """Take midpoint steps downwards until the class changes, and bisect for the crossing.

    ``model`` is in float64 and eval mode. The midpoint is extrapolated from the previous step.
    """

    def probs(point: Tensor) -> Tensor:
        with torch.no_grad():
            return model(point[None].clone())[0].softmax(0)

    def step(point: Tensor) -> Tensor:
        v, fisher, _ = dense_natural_gradient(model, point, source=source, target=target, damping=damping)
        scale = min(step_length / math.sqrt(max(float(v @ fisher @ v), 1e-300)), max_euclidean_step / float(v.norm()))
        return (scale * v).view(point.shape)

    def distance(p: Tensor, q: Tensor) -> float:
        return 2 * math.acos(min(1.0, float((p * q).sqrt().sum())))

    here, length, way, move = x, 0.0, [probs(x)], -step(x)
    for number in range(1, max_steps + 1):
        ahead = here - step(here + move / 2)
        if int(probs(ahead).argmax()) != source:
            low, high = 0.0, 1.0
            for _ in range(halvings):
                share = (low + high) / 2
                outside = int(probs(here + share * (ahead - here)).argmax()) != source
                low, high = (low, share) if outside else (share, high)
            ahead = here + high * (ahead - here)
        length += distance(way[-1], probs(ahead))
        here, move = ahead, ahead - here
        way.append(probs(here))
        if int(way[-1].argmax()) != source:
            return DensePath(length, int(way[-1].argmax()), here, number, way)
    return DensePath(length, -1, here, max_steps, way)
