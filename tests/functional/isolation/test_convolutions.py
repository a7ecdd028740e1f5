"""Second derivatives of grouped convolutions agree with torch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_robust.functional import hessian_trace
from lightning_robust.functional._isolation import convolutions
from lightning_robust.functional._isolation.convolutions import TwiceDifferentiable
from lightning_robust.functional.curvature import problem
from tests.helpers.curvature import assert_same, assert_within, seed, seeded
from tests.helpers.networks import random
from tests.helpers.oracles import dense_hessian_traces

CALLS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "depthwise": (F.conv2d, (2, 3, 6, 5), (3, 1, 3, 2), {"groups": 3, "padding": (1, 0)}),
    "two per channel": (F.conv2d, (2, 3, 6, 5), (6, 1, 3, 3), {"groups": 3, "padding": 2}),
    "a stride that leaves an end": (F.conv2d, (2, 3, 8, 7), (3, 1, 3, 3), {"groups": 3, "stride": 3, "padding": 1}),
    "dilated": (F.conv2d, (2, 2, 8, 7), (2, 1, 3, 2), {"groups": 2, "dilation": (2, 3), "stride": (1, 2)}),
    "two groups": (F.conv2d, (2, 4, 5, 5), (6, 2, 3, 3), {"groups": 2, "stride": 2, "padding": 1}),
    "one dimension": (F.conv1d, (2, 3, 9), (3, 1, 4), {"groups": 3, "padding": [2]}),
    "three dimensions": (F.conv3d, (2, 2, 4, 3, 4), (2, 1, 2, 2, 2), {"groups": 2, "padding": 1}),
    "same": (F.conv2d, (2, 3, 6, 5), (3, 1, 3, 3), {"groups": 3, "padding": "same"}),
    "one sample without a batch": (F.conv2d, (3, 6, 5), (3, 1, 3, 3), {"groups": 3}),
    "one group": (F.conv2d, (2, 3, 6, 5), (4, 3, 3, 3), {}),
}


@pytest.mark.parametrize("device", ["cpu", "elsewhere"])
@pytest.mark.parametrize("name", CALLS)
def test_derivatives_up_to_the_second_are_torchs(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "elsewhere":  # where torch's kernel computes gradients of depthwise weights
        monkeypatch.setattr(convolutions, "is_depthwise", lambda *arguments: False)
    function, size, kernel, options = CALLS[name]
    tensors = [t.requires_grad_() for t in (random(0, *size), random(1, *kernel), random(2, kernel[0]))]
    directions = [random(3 + k, *t.shape) for k, t in enumerate(tensors)]

    def derivatives() -> list[Tensor]:
        outputs = function(*tensors, **options)
        slopes = torch.autograd.grad(outputs.sin().sum(), tensors, create_graph=True)
        product = sum((s * d).sum() for s, d in zip(slopes, directions, strict=True))
        return [outputs, *slopes, *torch.autograd.grad(product, tensors)]

    expected = derivatives()
    with TwiceDifferentiable():
        actual = derivatives()
    for pair in zip(actual, expected, strict=True):
        torch.testing.assert_close(*pair)


def separable() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.SiLU(),
        nn.Conv2d(4, 6, 2, stride=2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


def test_traces_of_a_network_with_convolutions_are_those_of_its_hessian() -> None:
    case = seeded(separable, 1, 4, 4, dtype=torch.float64)
    expected = dense_hessian_traces(*case, F.cross_entropy)
    estimate = hessian_trace(*case, num_probes=16, rtol=None, generator=seed(0))
    assert sum(kind == "hutchinson" for kind in estimate.estimator.values()) == 8
    assert_within(estimate, expected)


class Checkpointed(nn.Module):
    """Computes everything but the head again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        *layers, self.head = separable()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.layers, x, use_reentrant=False))


@pytest.mark.parametrize("factory", [separable, Checkpointed])
def test_numbers_are_those_of_torchs_kernels(factory: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    case = seeded(factory, 1, 4, 4, dtype=torch.float64)
    actual = hessian_trace(*case, num_probes=2, rtol=None)
    calls = []

    class Unchanged(TwiceDifferentiable):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(problem, "TwiceDifferentiable", Unchanged)
    assert_same(actual, hessian_trace(*case, num_probes=2, rtol=None), rtol=1e-10)
    assert torch.conv2d in calls
