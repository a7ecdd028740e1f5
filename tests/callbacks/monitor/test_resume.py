"""A run that was killed and resumed logs and stops like an uninterrupted one."""

import json
import signal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_robust import RobustnessMonitor
from tests.helpers import interrupted, processes
from tests.helpers.interrupted import CASES, KEY, KILLED_IN, MAX_EPOCHS
from tests.helpers.training import classifier, loader, trainer

STATES = Path(__file__).parent / "states"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each case the diaries of an uninterrupted run, a killed run, and the killed run resumed."""
    root = tmp_path_factory.mktemp("interrupted")
    for case in CASES:
        folder = root / case
        folder.mkdir()
        assert processes.exit_code(interrupted.run, folder, case, "whole") == 0
        assert processes.exit_code(interrupted.run, folder, case, "broken", KILLED_IN[case]) == -signal.SIGKILL
        (folder / "killed.jsonl").write_text((folder / "broken.jsonl").read_text())
        assert processes.exit_code(interrupted.run, folder, case, "broken", None, True) == 0
    return root


def diary(path: Path) -> dict[int, dict[str, Any]]:
    """The last line of each step, because Lightning repeats the validation after which it saved."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line for line in lines}


@pytest.mark.ddp
@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_is_continued_with_the_same_curves_and_the_same_stop(runs: Path, case: str) -> None:
    whole, killed, resumed = (diary(runs / case / f"{name}.jsonl") for name in ("whole", "killed", "broken"))
    assert max(killed) < max(whole)
    assert resumed == whole
    assert 3 <= len({line[KEY] for line in whole.values()}) < len(whole)  # most validations see an old value
    assert whole[max(whole)]["stops"]
    assert max(whole) < 4 * MAX_EPOCHS


def test_a_checkpoint_of_this_version_is_loaded_with_weights_only_and_continued(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(RobustnessMonitor(), checkpoint, root=tmp_path, enable_checkpointing=True)
    run.fit(classifier(), loader(), loader())
    callbacks = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    (state,) = (state for key, state in callbacks.items() if key.startswith("RobustnessMonitor"))
    assert state["last_epoch"] == 1
    logged = {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("robust/")}
    assert state["values"] == pytest.approx(logged, rel=1e-6)
    monitor = RobustnessMonitor()
    monitor.load_state_dict(state)
    assert monitor.state_dict() == state


@pytest.mark.parametrize("path", sorted(STATES.glob("*.pt")), ids=lambda path: path.stem)
def test_runs_continue_from_states_of_every_version(tmp_path: Path, path: Path) -> None:
    """A run that had measured epoch 3 last, every second epoch, is resumed in epoch 4."""
    stored = torch.load(path, weights_only=True)

    monitor = RobustnessMonitor(["linearized_accuracy"], every_n_epochs=2)
    assert monitor.state_key == stored["state_key"]
    seen: list[dict[str, float]] = []

    class Resumes(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            monitor.load_state_dict(stored["state"])

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append({key: float(value) for key, value in trainer.callback_metrics.items() if "robust" in key})

    run = trainer(Resumes(), monitor, root=tmp_path, max_epochs=6, num_sanity_val_steps=0)
    run.fit_loop.epoch_progress.current.processed = run.fit_loop.epoch_progress.current.completed = 4
    run.fit(classifier(), loader(), loader())
    assert seen[0] == pytest.approx(stored["values"], rel=1e-6)  # in epoch 4, old values
    assert seen[1]["robust/num_samples"] == 120  # in epoch 5, new ones


def test_a_state_of_the_current_version_is_stored() -> None:
    assert (STATES / f"{version('lightning-robust')}.pt").exists()
