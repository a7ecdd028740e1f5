"""A table in the terminal, one row per validation, and the command that opens TensorBoard."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor


class EpochTable(Callback):
    """Prints logged metrics after every validation.

    A key that has a standard error is shown as ``value ± stderr``. A cell is blank if this epoch logged no new value,
    and shows ``–`` if none was ever logged.

    Args:
        columns: Logged key by heading of the column.
        note: Text under the table.
    """

    def __init__(self, columns: dict[str, str], note: str = "") -> None:
        self.columns = columns
        self.note = note
        self._old: dict[str, Tensor] = {}  # Lightning keeps old values; new ones are other tensors

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the headings."""
        if trainer.is_global_zero:
            print("\n" + self._row("epoch", list(self.columns)), flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the values that a resumed run starts with; they are old."""
        self._old = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a row."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        logged = trainer.callback_metrics
        cells = []
        for key in self.columns.values():
            stderr = f"{key}_stderr"
            value = f"{float(logged[key]):.3f}" if self._is_new(logged, key) else "" if key in logged else "–"
            cells.append(f"{value} ± {float(logged[stderr]):.3f}" if value and self._is_new(logged, stderr) else value)
        print(self._row(str(trainer.current_epoch), cells).rstrip(), flush=True)
        self._old = dict(logged)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the note and the command that opens TensorBoard."""
        if trainer.is_global_zero and self.note:
            print(f"\n{self.note}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                program = Path(os.path.relpath(Path(sys.executable).parent / "tensorboard"))
                print(
                    "\nTo see the curves, run this command, open the address that it prints, and choose the tab"
                    f" CUSTOM SCALARS:\n\n    {program} --logdir {logger.log_dir}\n"
                )

    def _is_new(self, logged: dict[str, Tensor], key: str) -> bool:
        return key in logged and logged[key] is not self._old.get(key)

    def _row(self, epoch: str, cells: list[str]) -> str:
        return f"{epoch:>5}  " + "  ".join(
            f"{cell:>{max(len(heading), 15)}}" for heading, cell in zip(self.columns, cells, strict=True)
        )
