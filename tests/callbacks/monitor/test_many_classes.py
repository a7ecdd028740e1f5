"""The monitor at a hundred classes, in one process and in several: one temperature, the same numbers, no deadlock."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_robust import Probe, RobustnessMonitor, RobustnessWarning
from lightning_robust.callbacks.monitor.calibration import CalibrationSamples
from lightning_robust.functional import fim_spectral_norm, linearize
from lightning_robust.functional.input_space import input_information
from lightning_robust.metrics import FisherSpectralNorm
from tests.helpers import processes
from tests.helpers.training import CLOCKS, Classifier, robustness_warnings, trainer

NUM_CLASSES = 100
METRICS = ["fisher_spectral_norm", "linearized_accuracy"]
MAX_SAMPLES = 17


def module(kind: type[Classifier] = Classifier) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 6, 3), nn.GELU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, NUM_CLASSES)]
        network = nn.Sequential(*layers)
    with torch.no_grad():
        network[4].weight.mul_(60)
    return kind(network)


def images(num_samples: int, *, side: int = 6, seed: int = 0) -> TensorDataset:
    """Half of the labels are predictions, so that a temperature fits."""
    x = torch.rand(num_samples, 1, side, side, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = module()(x).argmax(dim=1)
    y[::2] = (y[::2] + 7) % NUM_CLASSES
    return TensorDataset(x, y)


def validated(
    root: Path, model: Classifier, loader: Any, num_processes: int = 1, **options: Any
) -> tuple[dict[str, float], list[str]]:
    """Values without times, and warnings."""
    distribution = {"strategy": "ddp", "devices": num_processes} if num_processes > 1 else {}
    monitor = RobustnessMonitor(METRICS, **{"max_samples": MAX_SAMPLES, "on_error": "raise"} | options)
    run = trainer(monitor, root=root, **distribution)
    with robustness_warnings() as messages:
        warnings.filterwarnings("ignore", message="Using `DistributedSampler` with the dataloaders")
        warnings.filterwarnings("ignore", message="Trying to infer the `batch_size`")
        run.validate(model, loader, verbose=False)
    metrics = run.callback_metrics
    return {key: float(metrics[key]) for key in metrics if key.startswith("robust/") and key not in CLOCKS}, messages


# --- in one process ---------------------------------------------------------------------------------------------------


def test_all_samples_are_measured_at_the_temperature_that_fits_them_all(tmp_path: Path) -> None:
    data = images(MAX_SAMPLES)
    krylov, said = validated(tmp_path, module(), DataLoader(data, 4))
    exact, _ = validated(tmp_path, module(), DataLoader(data, 4), linearization="exact")
    assert said == []
    assert krylov.keys() - exact.keys() == {"robust/fim_spectral_norm_unconverged"}
    for key, value in exact.items():
        if "trace" not in key:
            assert krylov[key] == pytest.approx(value, rel=1e-2), key
    linearization = linearize(module(), data.tensors[0])
    expected = fim_spectral_norm(linearization.logits, linearization.gram).mean()
    assert exact["robust/fim_spectral_norm"] == pytest.approx(float(expected), rel=1e-5)
    one_batch, _ = validated(tmp_path, module(), DataLoader(data, MAX_SAMPLES))
    assert krylov == pytest.approx(one_batch, rel=1e-5)


def test_groups_of_samples_of_different_shapes_share_a_temperature(tmp_path: Path) -> None:
    small, large = images(8), images(9, side=9, seed=1)
    batches = [(torch.stack(x), torch.stack(y)) for x, y in (zip(*part, strict=True) for part in (small, large))]

    def value(**options: Any) -> dict[str, float]:
        return validated(tmp_path, module(), DataLoader(batches, batch_size=None), **options)[0]

    krylov, exact = value(), value(linearization="exact")
    assert krylov["robust/num_samples"] == 17
    for key, expected in exact.items():
        if "trace" not in key:
            assert krylov[key] == pytest.approx(expected, rel=1e-2), key


def test_what_has_not_converged_is_said_once_per_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = input_information.input_information.__kwdefaults__
    monkeypatch.setitem(options, "accuracy", input_information.Accuracy(1e-9, 1e-9, 2))
    run = trainer(RobustnessMonitor(METRICS, on_error="raise"), root=tmp_path, max_epochs=3)
    with robustness_warnings() as messages:
        run.fit(module(), DataLoader(images(20), 10), DataLoader(images(20), 10))
    assert run.callback_metrics["robust/fim_spectral_norm_unconverged"] == 1
    said = [message for message in messages if "unconverged" in message]
    assert len(said) == 1
    assert '`RobustnessMonitor(linearization="exact")`' in said[0]


# --- in several -------------------------------------------------------------------------------------------------------

SIZES = {"an even share": 18, "a sample more": 23, "a process without samples": 1}


def measure_all(rank: int, root: Path, num_processes: int) -> dict[str, dict[str, float]]:
    return {
        name: validated(root, module(), DataLoader(images(size), 4), num_processes)[0] for name, size in SIZES.items()
    }


class FailsOnRankOne(Classifier):
    def robustness_probe(self, batch: Any) -> Probe:
        if self.global_rank == 1:
            raise OSError("no such image")
        return Probe(self, *batch)


def measure_with_failures(rank: int, root: Path) -> dict[str, dict[str, float]]:
    """Failures of one process: of its samples, and of the pass for the temperature."""
    found = {}
    loader = DataLoader(images(20), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustnessWarning)
        found["samples"] = validated(root, module(FailsOnRankOne), loader, 2, on_error="warn")[0]
        of = CalibrationSamples.of

        def failing(probe: Probe) -> CalibrationSamples:
            if rank == 1:
                raise ValueError("no temperature here")
            return of(probe)

        CalibrationSamples.of = failing  # type: ignore[assignment, method-assign]
        found["temperature"] = validated(root, module(), loader, 2, on_error="warn")[0]
        CalibrationSamples.of = of  # type: ignore[method-assign]
        found["neither"] = validated(root, module(), loader, 2)[0]
    return found


@pytest.mark.ddp
def test_processes_log_the_values_of_one(tmp_path: Path) -> None:
    alone, together = measure_all(0, tmp_path, 1), processes.run(measure_all, 2, tmp_path, 2)
    assert together[0] == together[1]  # bit by bit
    for name, values in alone.items():
        assert values["robust/num_samples"] == min(MAX_SAMPLES, SIZES[name])
        assert together[0][name] == pytest.approx(values, rel=1e-5, abs=1e-7), name


@pytest.mark.ddp
def test_a_failure_of_one_process_stops_no_other_and_no_later_measurement(tmp_path: Path) -> None:
    results = processes.run(measure_with_failures, 2, tmp_path)
    for found in results:
        assert not any("fim" in key or "accuracy" in key for key in found["samples"])
        assert not any("fim" in key for key in found["temperature"])
        assert any("linearized_accuracy" in key for key in found["temperature"])  # needs no temperature
        assert any("fim_spectral_norm_calibrated" in key for key in found["neither"])


def merge(rank: int) -> dict[str, float]:
    processes.join_group()
    data = images(12)
    metric = FisherSpectralNorm().to("cpu")
    rows = slice(0, 5) if rank == 0 else slice(5, 12)
    parts: tuple[Tensor, ...] = data.tensors
    metric.update(Probe(module(), *(part[rows] for part in parts), temperature=0.7))
    return {key: float(value) for key, value in metric.compute().items()}


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_states_of_krylov_subspaces_merge_over_processes() -> None:
    metric = FisherSpectralNorm()
    metric.update(Probe(module(), *images(12).tensors, temperature=0.7))
    expected = {key: float(value) for key, value in metric.compute().items()}
    for found in processes.run(merge, 2):
        assert found == pytest.approx(expected, rel=1e-5)
