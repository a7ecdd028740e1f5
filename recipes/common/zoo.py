"""Classifiers that differ in how robust they are, to see what tells them apart: trained here, or from files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from lightning_robust import Probe
from recipes.common.classifier import Classifier, DigitsClassifier, OverfittingClassifier
from recipes.common.digits import DigitsDataModule, NoisyDigitsDataModule
from recipes.common.images import normalised, read_images
from recipes.common.networks import CifarResNet, digits_cnn, digits_mlp, initialised, strided_cnn


@dataclass(frozen=True)
class Training:
    """How a classifier of digits comes about.

    Attributes:
        network: ``"cnn"`` or ``"mlp"``.
        width: See :mod:`recipes.common.networks`.
        epsilon: Of the attacks in training; 0 for none.
        label_noise: Share of wrong labels.
        weight_decay: Of the optimiser.
        logit_factor: By which the logits of the trained network are multiplied.
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
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)


CIFAR_CLASSIFIERS: dict[str, tuple[Callable[[], nn.Module], tuple[float, ...], tuple[float, ...]]] = {
    "smallcnn_standard": (strided_cnn, *CIFAR),
    "smallcnn_mix2": (strided_cnn, *CIFAR),
    "smallcnn_pgd2": (strided_cnn, *CIFAR),
    "smallcnn_certified": (strided_cnn, IMAGENET[0], (0.225, 0.225, 0.225)),
    "resnet20": (lambda: CifarResNet(20), *IMAGENET),
    "resnet56": (lambda: CifarResNet(56), *IMAGENET),
}


class _Scaled(nn.Module):
    """A network, and a factor of its logits."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.network(x)
        return logits * self.factor


class _Decayed(Classifier):
    """With weight decay."""

    def __init__(self, network: nn.Module, *, attack_epsilon: float, weight_decay: float) -> None:
        super().__init__(network, attack_epsilon=attack_epsilon)
        self.weight_decay = weight_decay

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)


def train_quietly(model: LightningModule, data: LightningDataModule, *callbacks: Callback, epochs: int) -> None:
    """Train without a word."""
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=data)


def digits_zoo(*, epochs: int = 10, num_samples: int = 300) -> Iterator[tuple[str, Probe]]:
    """Train each of ``DIGITS``, and yield its name and a probe of it on validation images."""
    validation = DigitsDataModule()
    validation.setup("validate")
    images, labels = (part[:num_samples] for part in validation.val_set.tensors)
    for seed, (name, training) in enumerate(DIGITS.items()):
        network = initialised({"cnn": digits_cnn, "mlp": digits_mlp}[training.network](training.width, 0.0), seed=seed)
        model = _Decayed(network, attack_epsilon=training.epsilon, weight_decay=training.weight_decay)
        data = NoisyDigitsDataModule(num_train=1297, label_noise=training.label_noise, num_val=1, seed=seed)
        train_quietly(model, data, epochs=epochs)
        yield name, Probe(_Scaled(network, training.logit_factor), images, labels, valid_range=(0.0, 1.0))


def epochs_of_one_run(*, epochs: int = 40, every: int = 3, num_samples: int = 300) -> Iterator[tuple[str, Probe]]:
    """Train on wrong labels until it overfits robustly, and yield every third epoch of it."""
    data, model = NoisyDigitsDataModule(), OverfittingClassifier()
    snapshots = _Snapshots()
    train_quietly(model, data, snapshots, epochs=epochs)
    images, labels = (part[:num_samples] for part in data.held_out_set.tensors)
    for epoch, state in list(enumerate(snapshots.states))[::every]:
        network = OverfittingClassifier().network
        network.load_state_dict(state)
        yield f"epoch {epoch}", Probe(network, images, labels, valid_range=(0.0, 1.0))


class _Snapshots(Callback):
    """Keeps the network of every epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep one."""
        network = pl_module.network
        assert isinstance(network, nn.Module)
        self.states.append({key: value.clone() for key, value in network.state_dict().items()})


def digits_checkpoints(folder: str, *, num_samples: int = 300) -> Iterator[tuple[str, Probe]]:
    """Yield every Lightning checkpoint below a folder that the digits recipes have written."""
    validation = DigitsDataModule()
    validation.setup("validate")
    images, labels = (part[:num_samples] for part in validation.val_set.tensors)
    for path in sorted(Path(folder).rglob("*.ckpt")):
        options = torch.load(path, map_location="cpu", weights_only=True)["hyper_parameters"]
        kind = OverfittingClassifier if "image_size" in options else DigitsClassifier
        model = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)
        yield path.stem, Probe(model.network, images, labels, valid_range=(0.0, 1.0))


def cifar_classifiers(folder: str, *, num_samples: int = 250) -> Iterator[tuple[str, Probe]]:
    """Yield those of ``CIFAR_CLASSIFIERS`` whose weights are in a folder, on test images that lie beside it."""
    images, targets = read_images(Path(folder).parent / "cifar10_test_1000_dev.npz")
    every = max(1, len(targets) // num_samples)
    for name, (build, mean, std) in CIFAR_CLASSIFIERS.items():
        path = Path(folder) / f"cifar10_{name}.pth"
        if path.exists():
            network = with_weights(build(), path)
            inputs = normalised(images[::every], mean, std)
            yield name, Probe(network, inputs, targets[::every], input_std=std, input_mean=mean, valid_range=(0.0, 1.0))


def with_weights(network: nn.Module, path: Path) -> nn.Module:
    """Put weights into a network by their order, whatever the names of its layers are."""
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
