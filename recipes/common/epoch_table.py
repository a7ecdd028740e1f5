"""A table in the terminal, one row per validation, and at the end the command that opens TensorBoard."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor


class EpochTable(Callback):
    """Prints chosen metrics.

    Args:
        columns: Heading of each column, and the logged key that it shows. A key that has a standard error beside it is
            shown as ``value ± stderr``; what was not logged anew is left blank.
        note: Printed under the table.
    """

    def __init__(self, columns: dict[str, str], note: str = "") -> None:
        self.columns = columns
        self.note = note
        self._old: dict[str, Tensor] = {}  # what Lightning keeps; values logged anew are other tensors

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the headings."""
        if trainer.is_global_zero:
            print("\n" + self._row("epoch", list(self.columns)), flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What stands there in a resumed run is of the run before."""
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
        """Print the note, and say how to look at the run."""
        if trainer.is_global_zero and self.note:
            print(f"\n{self.note}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                program = Path(os.path.relpath(Path(sys.executable).parent / "tensorboard"))
                print(
                    f"\nSee the curves, then open the tab CUSTOM SCALARS:\n\n    {program} --logdir {logger.log_dir}\n"
                )

    def _is_new(self, logged: dict[str, Tensor], key: str) -> bool:
        return key in logged and logged[key] is not self._old.get(key)

    def _row(self, epoch: str, cells: list[str]) -> str:
        return f"{epoch:>5}  " + "  ".join(
            f"{cell:>{max(len(heading), 15)}}" for heading, cell in zip(self.columns, cells, strict=True)
        )
