"""The Weight-Curvature Index rises while a network overfits, where robust accuracy does not change."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_robust import AdversarialAccuracy, RobustnessMonitor, WeightCurvatureIndex
from recipes.common.classifier import DigitsClassifier
from recipes.common.digits import DigitsDataModule
from tests.helpers.training import History, robustness_warnings, trainer

SEED = 0


@pytest.mark.long
def test_weight_curvature_rises_while_robust_accuracy_stands_still(tmp_path: Path) -> None:
    """Trains as configs/digits_adversarial.yaml does, on 100 images instead of 1,297."""
    history = History()
    metrics = [
        WeightCurvatureIndex(),
        WeightCurvatureIndex(attack="pgd", epsilon=0.1),
        AdversarialAccuracy([0.1]),
    ]
    monitor = RobustnessMonitor(metrics, valid_range=(0, 1), max_samples=500, on_error="raise")
    logger = CSVLogger(tmp_path, name="", version="")
    with robustness_warnings() as messages, torch.random.fork_rng():
        torch.manual_seed(SEED)
        run = trainer(monitor, history, root=tmp_path, max_epochs=120, check_val_every_n_epoch=20, logger=logger)
        run.fit(DigitsClassifier(attack_epsilon=0.1), DigitsDataModule(num_train=100))
    assert messages == []
    early, late = history.rows[0], history.rows[-1]
    assert len(history.rows) == 6
    for key in ("robust/wci", "robust/adversarial_wci"):
        error = math.hypot(late[f"{key}_stderr"], early[f"{key}_stderr"])
        assert late[key] - early[key] > 2 * error
        assert 0 < late[f"{key}_stderr"] < 0.1 * late[key]
    robust = "robust/adversarial_accuracy_linf_0.1"
    assert abs(late[robust] - early[robust]) < 2 * math.hypot(late[f"{robust}_stderr"], early[f"{robust}_stderr"])
    assert "robust/wci_stderr" in (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
