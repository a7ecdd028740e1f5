"""Small networks with different pitfalls, each with the shape of its input."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Attention(nn.Module):
    """A transformer encoder over (N, T, E)."""

    def __init__(self, features: int = 8, num_classes: int = 5) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(features, nhead=2, dim_feedforward=16, dropout=0.3, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(dim=1))


class Recurrent(nn.Module):
    """An LSTM over (N, T, E)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Linear(nn.Module):
    """``z = W x + b`` over flattened inputs: its linearisation, margins and attacks have closed forms."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(weight.new_zeros(len(weight)) if bias is None else bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.reshape(len(x), -1), self.weight, self.bias)


class Normalised(nn.Module):
    """A network that normalises its inputs itself, per channel."""

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, x: Tensor) -> Tensor:
        return self.model(normalise(x, self.mean, self.std))


def normalise(x: Tensor, mean: list[float], std: list[float]) -> Tensor:
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return (x - x.new_tensor(mean).view(shape)) / x.new_tensor(std).view(shape)


def random_linear(seed: int, *, num_classes: int, num_features: int, dtype: torch.dtype = torch.float64) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(num_classes, d, generator=generator, dtype=dtype) for d in (num_features, 1))
    return Linear(weight, bias[:, 0])


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, from their own generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 6))


def cnn_batchnorm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 10),
    )


def resnet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), Residual(6), Residual(6), nn.Flatten(), nn.Linear(216, 7))


def inplace_first() -> nn.Module:
    return nn.Sequential(
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 20), nn.ReLU(inplace=True), nn.Linear(20, 3)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (12,)),
    "cnn_batchnorm": (cnn_batchnorm, (3, 7, 7)),
    "resnet": (resnet, (2, 6, 6)),
    "attention": (Attention, (4, 8)),
    "recurrent": (Recurrent, (5, 6)),
    "inplace_first": (inplace_first, (3, 4, 4)),
}


def build(name: str, *, num_samples: int = 9, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in train mode with moved running statistics, inputs, and targets; about half are its predictions."""
    factory, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = factory()
        inputs = torch.randn(num_samples, *shape)
        for _ in range(3):  # moves the running statistics away from their start
            model(torch.randn(64, *shape) * 1.5 + 0.3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
            predictions = model.eval()(inputs.clone()).argmax(dim=1)
        targets = predictions.clone()
        targets[::2] = (targets[::2] + torch.randint(0, 2, targets[::2].shape)) % int(predictions.max() + 1)
    return model.train(), inputs, targets
