"""Training without output, for scripts that print tables of their own."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer


def train_quietly(
    model: LightningModule, data: LightningDataModule, *callbacks: Callback, epochs: int, **options: Any
) -> None:
    """Train on the CPU without validation, loggers, checkpoints, progress bar or log messages; warnings still appear.

    Args:
        model: Trained in place.
        data: Its training batches.
        callbacks: Of the Trainer.
        epochs: Number of epochs.
        options: Other arguments of the Trainer, which replace those above.
    """
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        Trainer(max_epochs=epochs, callbacks=list(callbacks), **defaults | options).fit(model, datamodule=data)
    finally:
        log.setLevel(level)
