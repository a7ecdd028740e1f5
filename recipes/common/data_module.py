"""A data module for tensors in memory, which those of the recipes extend."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class TensorDataModule(LightningDataModule):
    """Loads batches of tensors in memory. Subclasses assign the sets in ``setup``.

    With a ``held_out_set``, validation runs on two sets: one to choose a checkpoint by, and one that shows what the
    choice is worth.

    Args:
        batch_size: Size of training batches.
        val_batch_size: Size of validation batches.
        seed: Seed of the order of training batches.
    """

    train_set: TensorDataset
    val_set: TensorDataset
    held_out_set: TensorDataset | None = None

    def __init__(self, batch_size: int, val_batch_size: int, seed: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.seed = seed

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return shuffled training batches."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> list[DataLoader[tuple[Tensor, ...]]]:
        """Return validation batches, and held-out ones if there are any, in a fixed order."""
        parts = (self.val_set, self.held_out_set)
        return [DataLoader(part, self.val_batch_size) for part in parts if part is not None]
