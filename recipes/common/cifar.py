"""Small subsets of CIFAR-10, read from a folder of NumPy archives."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from recipes.common.data_module import TensorDataModule
from recipes.common.images import normalised, read_images

TRAIN, TEST = "cifar10_train_10k_dev.npz", "cifar10_test_1000_dev.npz"
# the folder of images, and of weights in `models/`, that tests and benchmarks use if it exists
DATA = Path(os.environ.get("LIGHTNING_ROBUST_DATA", Path(__file__).parents[3] / "shared" / "data"))


class CifarDataModule(TensorDataModule):
    """CIFAR-10 images in [0, 1], (N, 3, 32, 32), from two files with arrays ``x`` (bytes) and ``y`` (classes).

    Validation runs on two sets: one to choose a checkpoint by, and a held-out one that shows what the choice is worth.

    Args:
        folder: Folder with ``cifar10_train_10k_dev.npz`` and ``cifar10_test_1000_dev.npz``.
        batch_size: Size of training batches.
        num_train: Number of training images, drawn at random from the first file.
        num_val: Number of images in the first validation set, from the second file.
        num_held_out: Number of held-out images, from those of the first file that are not trained on.
        seed: Seed of the choice of training images and of the order of their batches.
    """

    held_out_set: TensorDataset

    def __init__(
        self,
        folder: str,
        batch_size: int = 32,
        num_train: int = 4000,
        num_val: int = 1000,
        num_held_out: int = 1500,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, 100, seed)
        self.folder = Path(folder)
        self.num_train = num_train
        self.num_val = num_val
        self.num_held_out = num_held_out

    def setup(self, stage: str) -> None:
        """Load the images; the first validation set does not depend on the seed."""
        train, test = (_in_unit_range(self.folder / file) for file in (TRAIN, TEST))
        order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(self.seed))
        self.train_set = TensorDataset(*_rows(train, order[: self.num_train]))
        fixed = torch.randperm(len(test[1]), generator=torch.Generator().manual_seed(0))
        self.val_set = TensorDataset(*_rows(test, fixed[: self.num_val]))
        self.held_out_set = TensorDataset(*_rows(train, order[self.num_train :][: self.num_held_out]))


def _in_unit_range(path: Path) -> tuple[Tensor, Tensor]:
    images, labels = read_images(path)
    return normalised(images, None, None), labels


def _rows(tensors: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    return tensors[0][rows], tensors[1][rows]
