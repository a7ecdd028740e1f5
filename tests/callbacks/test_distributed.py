"""The monitor in several processes: the numbers of one, and the same end for all when one fails."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_robust import Probe, RobustnessMonitor, RobustnessWarning
from tests.helpers import processes
from tests.helpers.training import Classifier, History, classifier, loader, samples, trainer

pytestmark = pytest.mark.ddp
METRICS = [
    "fisher_spectral_norm",
    "linearized_accuracy",
    "adversarial_accuracy",
    "hessian_trace",
    "weight_curvature_index",
]


def validate(rank: int, root: Path, num_processes: int, size: int) -> dict[str, float]:
    options = {"strategy": "ddp", "devices": num_processes} if num_processes > 1 else {}
    run = trainer(RobustnessMonitor(METRICS, max_samples=17, on_error="raise"), root=root, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using `DistributedSampler` with the dataloaders")
        run.validate(classifier(), loader(samples(size), batch_size=4), verbose=False)
    return {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("robust/")}


@pytest.mark.parametrize("size", [23, 18, 1])  # 23 is padded to 24; 18 leaves 17 of 18; 1 leaves one process without
def test_two_processes_give_the_values_of_one(tmp_path: Path, size: int) -> None:
    alone = validate(0, tmp_path, 1, size)
    together = processes.run(validate, 2, tmp_path, 2, size)
    assert together[0] == together[1]
    assert alone["robust/num_samples"] == min(size, 17)
    del alone["robust/seconds"], together[0]["robust/seconds"]
    assert together[0] == pytest.approx(alone, rel=1e-6, abs=1e-7)


class FailsOnRankOne(Classifier):
    def robustness_probe(self, batch: Any) -> Probe:
        if self.current_epoch == 1 and self.global_rank == 1:
            raise OSError("no such image")
        return Probe(self, *batch)


def fit(rank: int, root: Path, cls: type[Classifier], monitored: bool) -> tuple[list[Any], list[str], list[Tensor]]:
    history = History()
    callbacks = [RobustnessMonitor(max_samples=20)] if monitored else []
    torch.manual_seed(0)
    model = cls(classifier().network)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(*callbacks, history, root=root, strategy="ddp", devices=2, max_epochs=3).fit(
            model, loader(shuffle=True), loader()
        )
    said = [str(warning.message) for warning in caught if issubclass(warning.category, RobustnessWarning)]
    return history.rows, said, [tensor.clone() for tensor in model.state_dict().values()]


def test_when_one_process_fails_all_skip_the_measurement_and_go_on(tmp_path: Path) -> None:
    results = processes.run(fit, 2, tmp_path, FailsOnRankOne, True)
    for rows, _, _ in results:
        assert rows[1] == rows[0]  # nothing new was logged
        assert rows[2]["robust/num_samples"] == 20
        assert rows[2] != rows[0]
    (_, said, _), (_, said_elsewhere, _) = results
    assert len(said) == 1
    assert "skipped the measurement in epoch 1: OSError: no such image" in said[0]
    assert said_elsewhere == []


def test_training_is_bit_identical_with_and_without_the_monitor(tmp_path: Path) -> None:
    without = processes.run(fit, 2, tmp_path, Classifier, False)
    beside = processes.run(fit, 2, tmp_path, Classifier, True)
    for rank in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(without[rank][2], beside[rank][2], strict=True))
