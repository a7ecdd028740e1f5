"""Networks are trained, chosen and judged on different images of CIFAR-10."""

from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import TensorDataset

from recipes.common.cifar import CifarDataModule
from recipes.common.classifier import OverfittingClassifier
from tests.helpers.training import trainer


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A folder of images whose first pixel is their number."""
    first = 0
    for part, count in {"train_10k": 100, "test_1000": 40}.items():
        x = np.zeros((count, 32, 32, 3), dtype=np.uint8)
        x[:, 0, 0, 0] = np.arange(first, first + count)
        np.savez(tmp_path / f"cifar10_{part}_dev.npz", x=x, y=np.arange(count) % 10)
        first += count
    return str(tmp_path)


def numbers(part: TensorDataset) -> set[int]:
    return set((255 * part.tensors[0][:, 0, 0, 0]).round().int().tolist())


def data(folder: str, seed: int = 0) -> CifarDataModule:
    module = CifarDataModule(folder, batch_size=32, num_train=60, num_val=15, num_held_out=30, seed=seed)
    module.setup("fit")
    return module


def test_no_image_is_in_two_sets(folder: str) -> None:
    module = data(folder)
    parts = [numbers(part) for part in (module.train_set, module.val_set, module.held_out_set)]
    assert [len(part) for part in parts] == [60, 15, 30]
    assert len(set.union(*parts)) == 105
    assert parts[0] | parts[2] <= set(range(100))
    assert parts[1] <= set(range(100, 140))
    images = module.train_set.tensors[0]
    assert images.shape == (60, 3, 32, 32)
    assert (images >= 0).all()
    assert (images <= 1).all()


def test_the_seed_changes_the_training_images_but_not_the_validation_images(folder: str) -> None:
    first, second = data(folder, seed=0), data(folder, seed=1)
    assert numbers(first.train_set) != numbers(second.train_set)
    assert numbers(first.val_set) == numbers(second.val_set)


class Rates(Callback):
    """Records the learning rate of each epoch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize(("decay", "rates"), [(True, [0.02, 0.02, 0.002, 0.002]), (False, [0.02] * 4)])
def test_the_learning_rate_drops_halfway_or_stays(folder: str, tmp_path: Path, decay: bool, rates: list[float]) -> None:
    seen, model = Rates(), OverfittingClassifier(0.02, 0.0, image_size=32, decay=decay)
    run = trainer(seen, root=tmp_path, max_epochs=4)
    run.fit(model, datamodule=data(folder))
    assert seen.seen == pytest.approx(rates)
