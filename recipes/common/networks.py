"""Networks for digits and CIFAR-10, their initialisation, and loading of their weights."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def digits_cnn(width: int = 16, dropout: float = 0.1) -> nn.Sequential:
    """Two convolutions with BatchNorm and one linear layer, (N, 1, 8, 8) → (N, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(2 * width * 16, 10),
    )


def digits_mlp(width: int = 128, dropout: float = 0.1) -> nn.Sequential:
    """Two hidden layers, (N, 1, 8, 8) → (N, 10)."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(width, width),
        nn.ReLU(inplace=True),
        nn.Linear(width, 10),
    )


def overfitting_cnn(
    in_channels: int = 1, image_size: int = 8, channels: tuple[int, ...] = (16, 32, 64), num_pools: int = 1
) -> nn.Sequential:
    """Convolutions with BatchNorm and two linear layers, wide enough to memorise noise, (N, …, S, S) → (N, 10).

    Args:
        in_channels: Channels of the images.
        image_size: Height and width of the images, S.
        channels: Output channels of each convolution.
        num_pools: Number of convolutions, from the first on, that are followed by 2 × 2 max pooling.
    """
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise((in_channels, *channels))):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        if number < num_pools:
            layers.append(nn.MaxPool2d(2))
    features = channels[-1] * (image_size // 2**num_pools) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 256), nn.ReLU(inplace=True), nn.Linear(256, 10))


def strided_cnn() -> nn.Sequential:
    """Two strided convolutions and two linear layers, (N, 3, 32, 32) → (N, 10)."""
    convolutions = [nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(2048, 100), nn.ReLU(), nn.Linear(100, 10))


class _Block(nn.Module):
    """Two 3 × 3 convolutions; the shortcut subsamples and pads with zero channels (option A of the source)."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.padding = stride, (planes - in_planes) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_planes, S, S) → (N, planes, S / stride, S / stride)."""
        shortcut = x
        if self.stride > 1 or self.padding > 0:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + shortcut)


class CifarResNet(nn.Module):
    """ResNet for 32 × 32 images, (N, 3, 32, 32) → (N, 10); depth 20 by default.

    Source: He et al. 2016, arXiv 1512.03385, section 4.2.
    """

    def __init__(self, depth: int = 20) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"Expected argument `depth` to be 6n + 2 with n ≥ 1, but got {depth}.")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        first = _Block(in_planes, planes, stride)
        return nn.Sequential(first, *(_Block(planes, planes, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


def initialised(network: nn.Module, *, seed: int) -> nn.Module:
    """Initialise convolutions and linear layers from a generator of their own (He et al. 2015); biases are zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def with_weights(network: nn.Module, path: Path) -> nn.Module:
    """Load weights from a state dict or a checkpoint by their order, whatever the names of the layers are.

    Raises:
        ValueError: If the shapes in the file are not those of the network, in its order.
    """
    state = torch.load(path, weights_only=True, map_location="cpu")
    state = state.get("state_dict", state)  # of a checkpoint
    names, given = (
        [key for key in keys if not key.endswith("num_batches_tracked")] for keys in (network.state_dict(), state)
    )
    if [network.state_dict()[name].shape for name in names] != [state[key].shape for key in given]:
        raise ValueError(
            f"Expected weights of the {len(names)} shapes that {type(network).__name__} has, in its order, but {path}"
            f" holds {len(given)} tensors of other shapes."
        )
    network.load_state_dict({name: state[key] for name, key in zip(names, given, strict=True)}, strict=False)
    return network
