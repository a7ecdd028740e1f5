"""A training run of seconds on scikit-learn's embedded digits, logged to TensorBoard."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

Batch = tuple[Tensor, Tensor] | list[Tensor]


class DigitsModule(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        self.log("val_acc", (self(x).argmax(dim=1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


@dataclass(frozen=True)
class Run:
    """The results of a training run."""

    logdir: Path
    name: str
    epochs: int
    metrics: dict[str, float]  # as they were last logged

    @property
    def robust_keys(self) -> list[str]:
        return [key for key in self.metrics if key.startswith("robust/")]


def train(logdir: Path, *, callbacks: Sequence[Callback] = (), max_epochs: int = 12, name: str = "digits") -> Run:
    with _reproducible(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(does not have many workers|GPU available but not used)")
        digits = load_digits()
        inputs = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        dataset = TensorDataset(inputs, torch.tensor(digits.target))
        training, validation = random_split(dataset, [1297, 500])
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=max_epochs,
            callbacks=list(callbacks),
            logger=TensorBoardLogger(logdir, name="", version=name),
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(DigitsModule(), DataLoader(training, 64, shuffle=True), DataLoader(validation, 128))
    metrics = {key: float(value) for key, value in trainer.logged_metrics.items()}
    return Run(logdir, name, max_epochs, metrics)


@contextmanager
def _reproducible() -> Iterator[None]:
    """Fix the random state, and use one thread: for a network this small, more of them mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)
