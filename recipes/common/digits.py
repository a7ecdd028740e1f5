"""The 1,797 handwritten digits that ship inside scikit-learn: real images without a download."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


def digits() -> tuple[Tensor, Tensor]:
    """All images, 8 × 8 in grey from 0 to 1, shape (1797, 1, 8, 8), in a fixed random order, and their classes."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order], torch.tensor(labels)[order]


class DigitsDataModule(LightningDataModule):
    """8 × 8 grey images in [0, 1], shape ``(N, 1, 8, 8)``, in a fixed random order, split into training and validation.

    Args:
        batch_size: Of both loaders.
        num_train: Training images; at most 1,297, the rest of the 1,797 being for validation.
        seed: Order of the training batches.
    """

    def __init__(self, batch_size: int = 64, num_train: int = 1297, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= num_train <= 1297:
            raise ValueError(f"Expected argument `num_train` to lie between 1 and 1297, but got {num_train}.")
        self.batch_size = batch_size
        self.num_train = num_train
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Load the images; the split does not depend on any argument, so that runs can be compared."""
        images, targets = digits()
        self.train_set = TensorDataset(images[: self.num_train], targets[: self.num_train])
        self.val_set = TensorDataset(images[1297:], targets[1297:])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled training batches."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Validation batches in a fixed order."""
        return DataLoader(self.val_set, self.batch_size)


class NoisyDigitsDataModule(LightningDataModule):
    """The digits with wrong labels among those to train on, which a network can only learn by heart.

    It validates on two sets with true labels: one to choose a checkpoint by, and one that shows what the choice is
    worth.

    Args:
        batch_size: Of the training batches.
        num_train: Training images.
        label_noise: Share of them whose label is replaced by another, drawn at random.
        num_val: Images of the first validation set; the second one has all that are left.
        seed: Which labels are wrong, and order of the training batches.
    """

    def __init__(
        self,
        batch_size: int = 64,
        num_train: int = 1000,
        label_noise: float = 0.3,
        num_val: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_train = num_train
        self.label_noise = label_noise
        self.num_val = num_val
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Load the images."""
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

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled training batches."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> list[DataLoader[tuple[Tensor, ...]]]:
        """Validation batches in a fixed order, and those held out."""
        return [DataLoader(part, 256) for part in (self.val_set, self.held_out_set)]
