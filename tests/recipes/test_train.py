"""Every configuration file runs, by the command in its header."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_robust import AdversarialAccuracy, LinearizedAccuracy, RobustnessMonitor
from recipes.common.epoch_table import EpochTable
from recipes.train import main
from tests.helpers.training import CLOCKS, Classifier, classifier, loader, trainer

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs" / "digits.yaml"
LAUNCHES = {
    "digits.yaml": [DIGITS],
    "digits_adversarial.yaml": [DIGITS, ROOT / "configs" / "digits_adversarial.yaml"],
    "robust_overfitting.yaml": [ROOT / "configs" / "robust_overfitting.yaml"],
}


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the arguments of pytest from LightningCLI."""
    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI 2.6 calls deprecated functions


def launch(tmp_path: Path, *args: str, configs: list[Path]) -> Any:
    options = ["--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.max_epochs", "1", *args]
    return main(["fit", *(part for config in configs for part in ("--config", str(config))), *options])


def monitor_of(cli: Any) -> RobustnessMonitor:
    (monitor,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, RobustnessMonitor))
    return monitor


def columns_of(cli: Any) -> list[str]:
    (table,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, EpochTable))
    return list(table.columns.values())


def test_every_configuration_file_is_launched_here() -> None:
    elsewhere = {"class_shielding.yaml", "class_shielding_cifar10.yaml"}  # tests/recipes/test_class_shielding.py
    assert {path.name for path in (ROOT / "configs").iterdir()} == LAUNCHES.keys() | elsewhere


@pytest.mark.filterwarnings("ignore:RobustnessDriftStopping could not have stopped")  # after one epoch
@pytest.mark.parametrize("name", LAUNCHES)
def test_configuration_files_run_and_name_their_launch_command(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = launch(tmp_path, configs=LAUNCHES[name])
    assert cli.trainer.callback_metrics["robust/num_samples"] == 256
    (command,) = (line for line in (ROOT / "configs" / name).read_text().splitlines() if line.startswith("# Launch:"))
    configs = " ".join(f"--config configs/{config.name}" for config in LAUNCHES[name])
    assert command.removeprefix("# Launch:").strip() == f"python -m recipes.train fit {configs}"
    heading, row = (line for line in capsys.readouterr().out.splitlines() if line.startswith(("epoch", "    0")))
    assert "clean accuracy" in heading
    assert row.count("±") == sum(f"{key}_stderr" in cli.trainer.callback_metrics for key in columns_of(cli)) >= 3
    assert "–" not in row


def test_the_table_leaves_cells_without_a_new_value_blank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"accuracy": "val_acc", "λ": "robust/fim_spectral_norm", "missing": "nowhere"}
    monitor = RobustnessMonitor(["fisher_spectral_norm"], every_n_epochs=2)
    run = trainer(monitor, EpochTable(columns), root=tmp_path, max_epochs=4, num_sanity_val_steps=1)
    run.fit(classifier(), loader(), loader())
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:5].strip().isdigit()]
    assert [len(row) for row in rows] == [6, 3, 6, 3]  # epoch, accuracy, λ ± its error, –
    assert [row[-1] for row in rows] == ["–"] * 4
    assert [row[3] for row in rows if len(row) == 6] == ["±", "±"]


def test_the_table_shows_training_metrics_and_no_standard_error_of_another_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Logging(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("step", float(self.global_step), on_step=True)
            self.log("epoch", float(self.current_epoch), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("value", 2.0)
            if self.current_epoch == 0:
                self.log("value_stderr", 0.5)

    table = EpochTable({"step": "step", "epoch": "epoch", "value": "value"})
    trainer(table, root=tmp_path, max_epochs=3, limit_train_batches=4).fit(Logging(), loader(batch_size=30), loader())
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:5].strip().isdigit()]
    assert rows == [
        ["0", "3.000", "–", "2.000", "±", "0.500"],  # Lightning reduces an epoch's values after its validation
        ["1", "7.000", "0.000", "2.000"],
        ["2", "11.000", "1.000", "2.000"],
    ]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_saved_configuration_validates_the_checkpoint_to_the_logged_values(tmp_path: Path) -> None:
    cli = launch(tmp_path, configs=[DIGITS])
    folder = Path(cli.trainer.log_dir)
    logged = {key: float(value) for key, value in cli.trainer.callback_metrics.items() if key != "train_loss"}
    again = main(
        ["validate", "--config", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    )
    values = {key: float(value) for key, value in again.trainer.callback_metrics.items()}
    assert values.keys() | CLOCKS == logged.keys()
    for key in CLOCKS:
        values.pop(key, None)
        del logged[key]
    assert values == pytest.approx(logged, rel=1e-6)


def overlay(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "overlay.yaml"
    head = ["trainer:", "  callbacks:", "  - class_path: lightning_robust.RobustnessMonitor", "    init_args:"]
    path.write_text("\n".join([*head, *(f"      {line}" for line in lines)]))
    return path


def test_metrics_by_name_and_by_class(tmp_path: Path) -> None:
    lines = [
        "metrics:",
        "- linearized_accuracy",
        "- class_path: lightning_robust.AdversarialAccuracy",
        "  init_args: {epsilons: [0.1], steps: 2}",
        "valid_range: [0, 1]",
        "input_std: [1.0]",
        "input_mean: 0.0",
        "max_samples: 20",
    ]
    cli = launch(tmp_path, configs=[DIGITS, overlay(tmp_path, *lines)])
    linearized, adversarial = monitor_of(cli).metrics
    assert isinstance(linearized, LinearizedAccuracy)
    assert isinstance(adversarial, AdversarialAccuracy)
    assert (adversarial.epsilons, adversarial.steps) == ((0.1,), 2)
    assert monitor_of(cli).valid_range == (0, 1)
    assert cli.trainer.callback_metrics["robust/num_samples"] == 20


def test_an_unknown_metric_name_raises_an_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"names among \['adversarial_accuracy'.*'linearized_accuracy'.*\], but got 'wci'"
    ):
        launch(tmp_path, configs=[DIGITS, overlay(tmp_path, "metrics: [wci]")])


def test_the_same_configuration_gives_the_same_run(tmp_path: Path) -> None:
    first, second = (launch(tmp_path, configs=LAUNCHES["digits_adversarial.yaml"]) for _ in range(2))
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
