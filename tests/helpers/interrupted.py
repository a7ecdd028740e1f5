"""A training run that stops on a robustness key and can be killed on the way."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import ConcatDataset

from lightning_robust import RobustnessMonitor
from tests.helpers.training import CLOCKS, Classifier, classifier, loader, samples, trainer

KEY = "robust/linearized_margin_linf"
CASES: dict[str, dict[str, Any]] = {  # settings of the Trainer
    "once per epoch": {},
    "twice per epoch": {"val_check_interval": 0.5},
    "every second epoch": {"check_val_every_n_epoch": 2},
}
KILLED_IN = {"once per epoch": 8, "twice per epoch": 4, "every second epoch": 8}  # epochs
CADENCE = 3  # epochs between measurements, so that most validations see an old value
PATIENCE = 5
MAX_EPOCHS = 60


class Repeatable(Classifier):
    """Seeds dropout by the step, so that a resumed process draws what the first one would have drawn."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.default_generator.manual_seed(self.global_step)  # torch.manual_seed also formats the stack, slowly

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Diary(Callback):
    """Appends the callback metrics and the stopper's state to a file after each validation and at the end."""

    def __init__(self, path: Path, stopper: EarlyStopping) -> None:
        self.path, self.stopper = path, stopper

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key not in CLOCKS}
        line = metrics | {"step": trainer.global_step, "waited": self.stopper.wait_count}
        with self.path.open("a") as file:
            file.write(json.dumps(line | {"best": float(self.stopper.best_score), "stops": trainer.should_stop}) + "\n")


class Killer(Callback):
    """Kills the process by SIGKILL in the middle of an epoch, so that nothing is cleaned up."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.current_epoch == self.epoch and trainer.global_step % 4 == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def run(root: Path, case: str, name: str, killed_in: int | None = None, resumed: bool = False) -> None:
    """Train, with the diary in ``<name>.jsonl`` and the checkpoint in ``<name>/last.ckpt``."""
    stopper = EarlyStopping(KEY, mode="max", patience=PATIENCE, min_delta=0.002)
    checkpoint = ModelCheckpoint(root / name, save_last=True, save_top_k=1, monitor=KEY, mode="max")
    monitor = RobustnessMonitor(["linearized_accuracy"], every_n_epochs=CADENCE, max_samples=40)
    diary = Diary(root / f"{name}.jsonl", stopper)
    killer = [] if killed_in is None else [Killer(killed_in)]
    trainer(
        monitor,
        stopper,
        diary,
        checkpoint,
        *killer,
        root=root,
        max_epochs=MAX_EPOCHS,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        **CASES[case],
    ).fit(
        Repeatable(classifier().network),
        loader(ConcatDataset([samples(30)] * 4), batch_size=30),  # a resumed epoch starts from the first batch
        loader(samples(60, seed=1)),
        ckpt_path=str(root / name / "last.ckpt") if resumed else None,
        weights_only=True,
    )
