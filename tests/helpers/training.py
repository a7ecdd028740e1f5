"""A small LightningModule, data, and a quiet Trainer for the tests of callbacks."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import RobustnessWarning

NUM_CLASSES = 4
CLOCKS = {"robust/seconds", "robust/overhead"}  # keys whose values differ between any two runs


class Classifier(LightningModule):
    """A CNN with the layers that a careless callback disturbs: BatchNorm and dropout."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network or nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(96, NUM_CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_acc", (self(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=5e-3)


def samples(num_samples: int = 120, *, seed: int = 0) -> TensorDataset:
    """Images (N, 1, 4, 4) in [0, 1] of learnable classes, sorted by class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(num_samples) * NUM_CLASSES // num_samples
    centres = torch.rand(NUM_CLASSES, 1, 4, 4, generator=torch.Generator().manual_seed(99))
    x = centres[y] + 0.15 * torch.randn(num_samples, 1, 4, 4, generator=generator)
    return TensorDataset(x.clamp(0, 1), y)


def loader(dataset: Any = None, batch_size: int = 64, **options: Any) -> DataLoader:
    return DataLoader(samples() if dataset is None else dataset, batch_size, **options)


def classifier(seed: int = 0) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier()


def trainer(*callbacks: Callback, root: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": root,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "enable_checkpointing": False,
        "max_epochs": 2,
        "callbacks": list(callbacks),
    }
    return Trainer(**defaults | options)


class History(Callback):
    """Records the `callback_metrics` under a prefix after each validation run."""

    def __init__(self, prefix: str = "robust/") -> None:
        self.prefix = prefix
        self.rows: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            self.rows.append({key: float(metrics[key]) for key in metrics if key.startswith(self.prefix)})


@contextmanager
def robustness_warnings() -> Iterator[list[str]]:
    """Collect the messages of this package's warnings; other warnings are raised as usual."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RobustnessWarning)
        yield messages
    for warning in caught:
        if issubclass(warning.category, RobustnessWarning):
            messages.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
