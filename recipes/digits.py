"""The 1,797 handwritten digits that ship inside scikit-learn: real images without a download."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


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
        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order]
        targets = torch.tensor(labels)[order]
        self.train_set = TensorDataset(images[: self.num_train], targets[: self.num_train])
        self.val_set = TensorDataset(images[1297:], targets[1297:])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled training batches."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Validation batches in a fixed order."""
        return DataLoader(self.val_set, self.batch_size)
