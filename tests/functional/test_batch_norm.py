from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.functional import linearize
from lightning_robust.functional._batch_norm import AffineBatchNorm
from tests.helpers.recording import PeakMemory


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 7), (5, 4, 3, 3), (5, 4, 2, 3, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_values_and_derivatives_of_every_order_are_those_of_torch(shape: tuple[int, ...], affine: bool) -> None:
    x, mean, var = random(*shape), random(4, seed=1) * 3, random(4, seed=2).exp()
    weight, bias = (random(4, seed=3), random(4, seed=4)) if affine else (None, None)

    def derivatives() -> list[torch.Tensor]:
        variables = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
        arguments: list[Any] = [*variables, *([None] * (3 - len(variables)))]
        out = F.batch_norm(arguments[0], mean, var, arguments[1], arguments[2], eps=1e-3)
        first = torch.autograd.grad(out.pow(3).sum(), variables, create_graph=True)
        second = torch.autograd.grad(first[0].pow(2).sum(), variables)
        return [out, *first, *second]

    expected = derivatives()
    with AffineBatchNorm():
        actual = derivatives()
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_statistics_of_the_batch_are_left_to_torch() -> None:
    x = random(6, 3)
    norm = nn.BatchNorm1d(3, dtype=torch.float64)
    with AffineBatchNorm():
        trained = norm(x)
        without_statistics = F.batch_norm(x, None, None, training=True)
    expected = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(trained, expected)
    torch.testing.assert_close(without_statistics, expected)
    assert norm.num_batches_tracked == 1


def test_less_memory_is_held_for_the_backward_pass() -> None:
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh())]
    model = nn.Sequential(nn.Conv2d(1, 8, 1), *layers, nn.Flatten(), nn.Linear(8 * 256, 3)).eval()
    with PeakMemory() as affine:
        linearize(model, random(40, 1, 16, 16).float())
    inputs = random(40, 1, 16, 16).float().requires_grad_()
    with PeakMemory() as plain:
        logits = model(inputs)
        for c in range(3):
            torch.autograd.grad(logits[:, c].sum(), inputs, retain_graph=True)
    assert affine.peak < 0.75 * plain.peak
