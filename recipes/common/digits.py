"""The 1,797 handwritten digits that ship inside scikit-learn: real images without a download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset

from recipes.common.data_module import TensorDataModule

_NUM_TRAIN = 1297  # the other 500 are for validation


def digits() -> tuple[Tensor, Tensor]:
    """Return all grey images in [0, 1], (1797, 1, 8, 8), in a fixed random order, and their classes, (1797,)."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order], torch.tensor(labels)[order]


def validation_digits(num_images: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the first validation images, all 500 by default, and their classes."""
    images, labels = digits()
    return images[_NUM_TRAIN:][:num_images], labels[_NUM_TRAIN:][:num_images]


class DigitsDataModule(TensorDataModule):
    """Digits with a fixed split: up to 1,297 images to train on, 500 to validate on. Inputs (N, 1, 8, 8) in [0, 1].

    Args:
        batch_size: Size of training and validation batches.
        num_train: Number of training images, at most 1,297.
        seed: Seed of the order of training batches.
    """

    def __init__(self, batch_size: int = 64, num_train: int = _NUM_TRAIN, seed: int = 0) -> None:
        super().__init__(batch_size, batch_size, seed)
        if not 1 <= num_train <= _NUM_TRAIN:
            raise ValueError(f"Expected argument `num_train` to lie between 1 and {_NUM_TRAIN}, but got {num_train}.")
        self.num_train = num_train

    def setup(self, stage: str) -> None:
        """Load the images; the split does not depend on any argument, so that runs can be compared."""
        images, targets = digits()
        self.train_set = TensorDataset(images[: self.num_train], targets[: self.num_train])
        self.val_set = TensorDataset(*validation_digits())


class NoisyDigitsDataModule(TensorDataModule):
    """Digits with wrong labels in the training set, which a network can only memorise.

    Validation runs on two sets with true labels: one to choose a checkpoint by, and a held-out one that shows what the
    choice is worth.

    Args:
        batch_size: Size of training batches.
        num_train: Number of training images.
        label_noise: Share of them whose label is replaced by another one, drawn at random.
        num_val: Number of images in the first validation set; the held-out set has all that are left.
        seed: Seed of the wrong labels and of the order of training batches.
    """

    held_out_set: TensorDataset

    def __init__(
        self,
        batch_size: int = 64,
        num_train: int = 1000,
        label_noise: float = 0.3,
        num_val: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, 256, seed)
        self.num_train = num_train
        self.label_noise = label_noise
        self.num_val = num_val

    def setup(self, stage: str) -> None:
        """Load the images and replace labels."""
        images, targets = digits()
        generator = torch.Generator().manual_seed(self.seed)
        wrong = torch.randperm(self.num_train, generator=generator)[: round(self.label_noise * self.num_train)]
        labels = targets[: self.num_train].clone()
        labels[wrong] = (labels[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
        parts = [self.num_train, self.num_val, len(images) - self.num_train - self.num_val]
        train, val, held_out = torch.split(images, parts)
        _, val_targets, held_out_targets = torch.split(targets, parts)
        self.train_set = TensorDataset(train, labels)
        self.val_set = TensorDataset(val, val_targets)
        self.held_out_set = TensorDataset(held_out, held_out_targets)
