"""Classifiers that differ in how robust they are, as probes: trained on digits, or loaded from files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_robust import Probe
from recipes.common.cifar import TEST
from recipes.common.classifier import Classifier, DigitsClassifier, OverfittingClassifier
from recipes.common.digits import NoisyDigitsDataModule, validation_digits
from recipes.common.images import CIFAR, IMAGENET, normalised, read_images
from recipes.common.networks import CifarResNet, digits_cnn, digits_mlp, initialised, strided_cnn, with_weights
from recipes.common.training import train_quietly


@dataclass(frozen=True)
class Training:
    """How a classifier of digits is trained.

    Attributes:
        network: ``"cnn"`` or ``"mlp"``.
        width: Width of the network, see :mod:`recipes.common.networks`.
        epsilon: L∞ radius of the attacks in training; 0 for training on clean images.
        label_noise: Share of wrong labels.
        weight_decay: Weight decay of AdamW.
        logit_factor: Factor on the logits of the trained network.
    """

    network: Literal["cnn", "mlp"] = "cnn"
    width: int = 16
    epsilon: float = 0.0
    label_noise: float = 0.0
    weight_decay: float = 0.0
    logit_factor: float = 1.0


DIGITS = {
    "cnn, 4 channels": Training(width=4),
    "cnn": Training(),
    "cnn, 32 channels": Training(width=32),
    "cnn, logits × 10": Training(logit_factor=10.0),
    "cnn, logits / 10": Training(logit_factor=0.1),
    "cnn, weight decay": Training(weight_decay=1e-2),
    "cnn, wrong labels": Training(label_noise=0.3),
    "cnn, ε 0.02": Training(epsilon=0.02),
    "cnn, ε 0.05": Training(epsilon=0.05),
    "cnn, ε 0.1": Training(epsilon=0.1),
    "cnn, ε 0.1, logits × 10": Training(epsilon=0.1, logit_factor=10.0),
    "cnn, ε 0.1, wrong labels": Training(epsilon=0.1, label_noise=0.3),
    "cnn, 32 channels, ε 0.15": Training(width=32, epsilon=0.15),
    "mlp": Training(network="mlp", width=128),
    "mlp, ε 0.05": Training(network="mlp", width=128, epsilon=0.05),
}
# network, and mean and standard deviation of its inputs
CIFAR_CLASSIFIERS: dict[str, tuple[Callable[[], nn.Module], tuple[float, ...], tuple[float, ...]]] = {
    "smallcnn_standard": (strided_cnn, *CIFAR),
    "smallcnn_mix2": (strided_cnn, *CIFAR),
    "smallcnn_pgd2": (strided_cnn, *CIFAR),
    "smallcnn_certified": (strided_cnn, IMAGENET[0], (0.225, 0.225, 0.225)),
    "resnet20": (lambda: CifarResNet(20), *IMAGENET),
    "resnet56": (lambda: CifarResNet(56), *IMAGENET),
}


class _Scaled(nn.Module):
    """A network whose logits are multiplied by a factor."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.network(x)
        return logits * self.factor


class _Decayed(Classifier):
    """A classifier that is trained with weight decay."""

    def __init__(self, network: nn.Module, *, attack_epsilon: float, weight_decay: float) -> None:
        super().__init__(network, attack_epsilon=attack_epsilon)
        self.weight_decay = weight_decay

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)


def digits_zoo(*, epochs: int = 10, num_samples: int = 300) -> Iterator[tuple[str, Probe]]:
    """Train each of ``DIGITS``, and yield its name and a probe of it on validation images."""
    images, labels = validation_digits(num_samples)
    for seed, (name, training) in enumerate(DIGITS.items()):
        network = initialised({"cnn": digits_cnn, "mlp": digits_mlp}[training.network](training.width, 0.0), seed=seed)
        model = _Decayed(network, attack_epsilon=training.epsilon, weight_decay=training.weight_decay)
        data = NoisyDigitsDataModule(num_train=1297, label_noise=training.label_noise, num_val=1, seed=seed)
        train_quietly(model, data, epochs=epochs)
        yield name, Probe(_Scaled(network, training.logit_factor), images, labels, valid_range=(0.0, 1.0))


def epochs_of_one_run(*, epochs: int = 40, every: int = 3, num_samples: int = 300) -> Iterator[tuple[str, Probe]]:
    """Train on wrong labels until robust accuracy falls, and yield every third epoch on held-out images."""
    data, model = NoisyDigitsDataModule(), OverfittingClassifier()
    snapshots = _Snapshots()
    train_quietly(model, data, snapshots, epochs=epochs)
    images, labels = (part[:num_samples] for part in data.held_out_set.tensors)
    for epoch, state in list(enumerate(snapshots.states))[::every]:
        network = OverfittingClassifier().network
        network.load_state_dict(state)
        yield f"epoch {epoch}", Probe(network, images, labels, valid_range=(0.0, 1.0))


class _Snapshots(Callback):
    """Copies the network's weights after every epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the weights."""
        network = pl_module.network
        assert isinstance(network, nn.Module)
        self.states.append({key: value.clone() for key, value in network.state_dict().items()})


def digits_checkpoints(folder: str, *, num_samples: int = 300) -> Iterator[tuple[str, Probe]]:
    """Yield every Lightning checkpoint of the digits recipes below a folder, on validation images."""
    images, labels = validation_digits(num_samples)
    for path in sorted(Path(folder).rglob("*.ckpt")):
        options = torch.load(path, map_location="cpu", weights_only=True)["hyper_parameters"]
        kind = OverfittingClassifier if "image_size" in options else DigitsClassifier
        model = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)
        yield path.stem, Probe(model.network, images, labels, valid_range=(0.0, 1.0))


def cifar_classifiers(folder: str | Path, *, num_samples: int = 250) -> Iterator[tuple[str, Probe]]:
    """Yield those of ``CIFAR_CLASSIFIERS`` whose weights are in a folder, on test images from the folder above it."""
    for name, (_, mean, std) in CIFAR_CLASSIFIERS.items():
        if _weights(folder, name).exists():
            parts = cifar_classifier(name, folder, num_samples=num_samples)
            yield name, Probe(*parts, input_std=std, input_mean=mean, valid_range=(0.0, 1.0))


def cifar_classifier(name: str, folder: str | Path, *, num_samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return one of ``CIFAR_CLASSIFIERS``, about so many normalised test images, evenly spaced, and their classes."""
    build, mean, std = CIFAR_CLASSIFIERS[name]
    images, targets = read_images(Path(folder).parent / TEST)
    every = max(1, len(targets) // num_samples)
    network = with_weights(build(), _weights(folder, name))
    return network, normalised(images[::every], mean, std), targets[::every]


def _weights(folder: str | Path, name: str) -> Path:
    return Path(folder) / f"cifar10_{name}.pth"
