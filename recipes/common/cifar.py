"""A few images of CIFAR-10, from a folder of arrays."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from recipes.common.images import normalised, read_images


class CifarDataModule(LightningDataModule):
    """32 × 32 images in [0, 1], shape ``(N, 3, 32, 32)``, from two files with arrays ``x`` (bytes) and ``y``.

    It validates on two sets: one to choose a checkpoint by, and one that shows what the choice is worth.

    Args:
        folder: With ``cifar10_train_10k_dev.npz`` and ``cifar10_test_1000_dev.npz``.
        batch_size: Of the training batches.
        num_train: Training images, drawn at random.
        num_val: Test images of the first validation set.
        num_held_out: Images of the second one, of those to train on that are not trained on.
        seed: Of the training images and the order of their batches.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int = 32,
        num_train: int = 4000,
        num_val: int = 1000,
        num_held_out: int = 1500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.batch_size = batch_size
        self.num_train = num_train
        self.num_val = num_val
        self.num_held_out = num_held_out
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Load the images."""
        train, test = (_in_unit_range(self.folder / f"cifar10_{part}_dev.npz") for part in ("train_10k", "test_1000"))
        order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(self.seed))
        self.train_set = TensorDataset(*_rows(train, order[: self.num_train]))
        fixed = torch.randperm(len(test[1]), generator=torch.Generator().manual_seed(0))
        self.val_set = TensorDataset(*_rows(test, fixed[: self.num_val]))
        self.held_out_set = TensorDataset(*_rows(train, order[self.num_train :][: self.num_held_out]))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled training batches."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> list[DataLoader[tuple[Tensor, ...]]]:
        """Validation batches in a fixed order, and those held out."""
        return [DataLoader(part, 100) for part in (self.val_set, self.held_out_set)]


def _in_unit_range(path: Path) -> tuple[Tensor, Tensor]:
    images, labels = read_images(path)
    return normalised(images, None, None), labels


def _rows(tensors: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    return tensors[0][rows], tensors[1][rows]
