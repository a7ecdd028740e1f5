"""The drift stopper keeps the robustness that overfitting costs, and does not stop runs that do not overfit."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_robust import LinearizedAccuracy, RobustnessDriftStopping, RobustnessMonitor
from recipes import robust_overfitting as recipe
from recipes.common.classifier import DigitsClassifier, OverfittingClassifier
from recipes.common.digits import DigitsDataModule, NoisyDigitsDataModule
from tests.helpers.training import trainer

EPOCHS = 80
CONFIGURED = ["linearized_accuracy", "fisher_spectral_norm"]  # as in the configuration file
ALL = [*CONFIGURED, "weight_curvature_index"]  # as in the recipe
quiet = pytest.mark.filterwarnings(
    "ignore:RobustnessDriftStopping (warns|could not)", "ignore:`robust/linearized_margin_linf` is not finite"
)


@quiet
def test_the_recipe_records_every_epoch_and_draws(tmp_path: Path) -> None:
    notes = recipe.train(0, epochs=3)
    assert [len(curve) for curve in notes.curves.values()] == [3] * len(recipe.COLUMNS)
    lines = recipe.table(notes).splitlines()
    assert len([line for line in lines if line[:5].strip().isdigit()]) == 3
    assert f"Best accuracy under PGD-20: {max(notes.curves['PGD-20']):.3f}" in lines[-4]
    assert all("does not stop" in line for line in lines[-3:-1])
    recipe.draw(notes, str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@quiet
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_choice_without_an_attack_keeps_95_percent_and_stops_30_percent_early() -> None:
    kept, plain = [], []
    for seed in range(5):
        notes = recipe.train(seed, epochs=EPOCHS, curvature=False)
        lost = {column: 1 - mean(curve[-3:]) / max(curve) for column, curve in notes.curves.items()}
        assert lost["PGD-20"] > 0.1  # it overfits, and clean accuracy hardly shows it
        assert lost["clean"] < 0.5 * lost["PGD-20"]
        stop, chosen = notes.choice("drift stopper")
        assert stop + 1 <= 0.7 * EPOCHS
        kept.append(notes.kept(chosen))
        plain.append(notes.kept(notes.choice("EarlyStopping")[1]))
    assert min(kept) >= 0.95
    assert mean(plain) < mean(kept)
    assert min(plain) < 0.95


@pytest.mark.filterwarnings("ignore:`robust/linearized_margin_linf` is not finite")
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_of_twenty_ordinary_runs_at_most_one_is_stopped(tmp_path: Path) -> None:
    """Networks, batch sizes and learning rates vary (large rates are noisy); every fourth run is adversarial."""
    stopped = []
    for seed in range(20):
        epsilon = 0.1 if seed % 4 == 3 else 0.0
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = DigitsClassifier(
                width=(8, 16, 32)[seed % 3], learning_rate=(1e-3, 2e-3, 5e-3, 1e-2)[seed // 5], attack_epsilon=epsilon
            )
            stopper = RobustnessDriftStopping()
            metric = LinearizedAccuracy([epsilon]) if epsilon else LinearizedAccuracy()
            monitor = RobustnessMonitor([metric], valid_range=(0, 1), on_error="raise")
            run = trainer(monitor, stopper, root=tmp_path, max_epochs=40)
            run.fit(model, datamodule=DigitsDataModule(batch_size=(64, 128)[seed % 2], seed=seed))
        if stopper.stopped_epoch:
            stopped.append((seed, stopper.stopping_reason_message))
    assert len(stopped) <= 1, stopped


class Points(Callback):
    """Collects the duration of each measurement; no two are equal, so their number is that of the measurements."""

    def __init__(self) -> None:
        self.seconds: set[float] = set()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "robust/seconds" in trainer.callback_metrics:  # sanity checking measures nothing
            self.seconds.add(float(trainer.callback_metrics["robust/seconds"]))


@pytest.mark.filterwarnings("ignore:`robust/linearized_margin_linf` is not finite")  # in the first epochs
@pytest.mark.filterwarnings("ignore:`robust/hessian_trace` is mostly noise")  # late in training
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("model", "data", "metrics", "epochs"),
    [
        pytest.param(OverfittingClassifier, NoisyDigitsDataModule, CONFIGURED, 40, id="half-second-epochs"),
        pytest.param(OverfittingClassifier, NoisyDigitsDataModule, ALL, 120, id="with-WCI"),
        pytest.param(DigitsClassifier, DigitsDataModule, None, 400, id="tenth-second-epochs"),
    ],
)
def test_a_budget_of_five_percent_is_kept_on_the_recipes_and_leaves_a_curve(
    tmp_path: Path,
    model: Callable[[], LightningModule],
    data: Callable[[], LightningDataModule],
    metrics: list[str] | None,
    epochs: int,
) -> None:
    """In the three cases a measurement takes 0.1, 0.4 and 0.2 seconds."""
    points = Points()
    monitor = RobustnessMonitor(metrics, valid_range=(0, 1), overhead_budget=0.05, on_error="raise")
    begun = time.perf_counter()
    trainer(monitor, points, root=tmp_path, max_epochs=epochs).fit(model(), datamodule=data())
    elapsed = time.perf_counter() - begun
    times = monitor.state_dict()["times"]
    assert times["elapsed"] == pytest.approx(elapsed, rel=0.1)
    assert times["spent"] / times["elapsed"] <= 0.055
    assert len(points.seconds) >= 5, times
