"""A few images of CIFAR-10, from a folder of arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class CifarDataModule(LightningDataModule):
    """32 × 32 images in [0, 1], shape ``(N, 3, 32, 32)``, from two files with arrays ``x`` (bytes) and ``y``.

    It validates on two sets: one to choose a checkpoint by, and one that shows what the choice is worth.

    Args:
        folder: With ``cifar10_train_10k_dev.npz`` and ``cifar10_test_1000_dev.npz``.
        batch_size: Of the training batches.
        num_train: Training images, drawn at random.
        num_val: Images of the first validation set; the second one has the rest of the test images.
        seed: Of the training images and the order of their batches.
    """

    def __init__(
        self, folder: str, batch_size: int = 32, num_train: int = 4000, num_val: int = 500, seed: int = 0
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.num_train = num_train
        self.num_val = num_val
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Load the images."""
        images, targets = _load(self.folder / "cifar10_train_10k_dev.npz")
        chosen = torch.randperm(len(targets), generator=torch.Generator().manual_seed(self.seed))[: self.num_train]
        self.train_set = TensorDataset(images[chosen], targets[chosen])
        images, targets = _load(self.folder / "cifar10_test_1000_dev.npz")
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
        val, held_out = order[: self.num_val], order[self.num_val :]
        self.val_set = TensorDataset(images[val], targets[val])
        self.held_out_set = TensorDataset(images[held_out], targets[held_out])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled training batches."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> list[DataLoader[tuple[Tensor, ...]]]:
        """Validation batches in a fixed order, and those held out."""
        return [DataLoader(part, 100) for part in (self.val_set, self.held_out_set)]


def _load(path: Path) -> tuple[Tensor, Tensor]:
    arrays = np.load(path)
    return torch.tensor(arrays["x"]).permute(0, 3, 1, 2).float() / 255, torch.tensor(arrays["y"])
