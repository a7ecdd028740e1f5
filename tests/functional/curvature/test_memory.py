"""Memory of a curvature measurement, in bytes of tensors."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust import HessianTrace, Probe, WeightCurvatureIndex
from recipes.common.networks import CifarResNet, digits_cnn, initialised
from tests.helpers.networks import Attention, build, random
from tests.helpers.recording import PeakMemory


def wide_gelu() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 32, 3, stride=2), nn.GELU(), nn.Flatten(),
        nn.Linear(32 * 15 * 15, 64), nn.GELU(), nn.Linear(64, 10),
    )  # fmt: skip


class Mixer(nn.Module):
    """Mixes tokens and channels in turn: weights at many positions, whose gradients of samples would be large."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 96, 4, stride=4)
        self.tokens = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(3))
        self.channels = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 384), nn.GELU(), nn.Linear(384, 96)) for _ in range(3)
        )
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2)
        for tokens, channels in zip(self.tokens, self.channels, strict=True):
            x = x + tokens(x)
            x = x + channels(x.mT).mT
        return self.head(x.mean(dim=2))


def separable() -> nn.Module:
    layers = [
        layer for _ in range(3)
        for layer in (nn.Conv2d(48, 48, 5, padding=2, groups=48), nn.BatchNorm2d(48), nn.Conv2d(48, 48, 1), nn.SiLU())
    ]  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(3, 48, 2, stride=2), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (lambda: initialised(CifarResNet(20), seed=0), (64, 3, 32, 32)),
    "digits_cnn": (digits_cnn, (64, 1, 8, 8)),
    "wide_gelu": (wide_gelu, (64, 3, 32, 32)),
    "mixer": (Mixer, (16, 3, 32, 32)),
    "separable": (separable, (16, 3, 32, 32)),
    "attention": (lambda: Attention(32, 10), (64, 40, 32)),
}


def bytes_of_training(network: nn.Module, inputs: Tensor, targets: Tensor) -> int:
    with PeakMemory() as memory:
        F.cross_entropy(network(inputs), targets).backward()
    network.zero_grad()
    return memory.peak


METRICS = (HessianTrace(), WeightCurvatureIndex())


def measure(network: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    probe = Probe(network, inputs, targets)
    for metric in METRICS:
        metric.update(probe)
        metric.compute()
        metric.reset()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_measurement_takes_at_most_twice_the_memory_of_a_training_step(name: str) -> None:
    factory, shape = NETWORKS[name]
    network, inputs, targets = factory(), random(0, *shape, dtype=torch.float32), torch.arange(shape[0]) % 10
    training = bytes_of_training(network, inputs, targets)
    with PeakMemory() as memory:
        measure(network, inputs, targets)
    assert training > 10**6
    assert memory.peak < 2 * training


@pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(name, marks=pytest.mark.long) for name in ("cnn_batchnorm", "recurrent"))]
)
def test_measurements_leak_nothing(name: str) -> None:
    network, inputs, targets = build(name, num_samples=2)
    measure(network, inputs, targets)
    gc.disable()  # memory that waits for the garbage collector is a leak, too
    try:
        with PeakMemory() as memory:
            for _ in range(10):
                measure(network, inputs, targets)
            assert memory.peak > 0
            assert memory.live == sum(metric.configuration.nbytes for metric in METRICS)  # which a reset creates anew
    finally:
        gc.enable()
