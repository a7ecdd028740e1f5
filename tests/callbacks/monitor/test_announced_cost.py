"""What a measurement will cost is told before it takes long, and nothing is told or timed where it is short."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust import FisherSpectralNorm, HessianTrace, LinearizedAccuracy, Probe, RobustnessMonitor
from lightning_robust.callbacks.monitor import announced_cost
from lightning_robust.callbacks.monitor.announced_cost import on_cost
from lightning_robust.functional import linearize
from lightning_robust.metrics import ProbeMetric
from tests.helpers.networks import random, random_linear
from tests.helpers.training import Classifier, classifier, loader, robustness_warnings, trainer


def told(
    *metrics: ProbeMetric,
    num_classes: int = 10,
    num_samples: int = 256,
    seconds: float = 0.0,
    linearization: Any = "exact",
) -> list[str]:
    model = random_linear(0, num_classes=num_classes, num_features=6)
    probe = Probe(model, random(1, 32, 6), torch.arange(32) % num_classes, linearization=linearization)
    return on_cost(metrics, probe, probe.outputs(probe.inputs[:8]), num_samples=num_samples, seconds=seconds)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announced_cost, "_seconds_of_classes", lambda probe, num_classes: num_classes / 100)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        (
            [FisherSpectralNorm(), LinearizedAccuracy(), HessianTrace()],
            "The first measurement takes about 260 s: 256 samples × 100 classes, with a backward pass for each class."
            " `RobustnessMonitor(max_samples=16)` takes about 16 s, `every_n_epochs=5` measures less often, and"
            ' `RobustnessMonitor(["hessian_trace", "weight_curvature_index"])` leaves the classes out.',
        ),
        ([LinearizedAccuracy(order=2)], "The first measurement takes about 510 s: 256 samples × 100 classes"),
        ([LinearizedAccuracy(order=2), LinearizedAccuracy(order=2, norm="l2")], "takes about 770 s: 256 samples"),
    ],
    ids=["default", "second order", "both norms"],
)
def test_a_long_measurement_is_told_with_the_line_that_shortens_it(metrics: list[ProbeMetric], sentence: str) -> None:
    (found,) = told(*metrics, num_classes=100, seconds=10.0)
    assert sentence in found


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(
    ("metric", "options"),
    [
        (HessianTrace(), {"num_classes": 1000, "seconds": 10.0}),
        (FisherSpectralNorm(), {"num_classes": 100, "seconds": 0.001}),
        (FisherSpectralNorm(), {"num_classes": 10, "seconds": 100.0, "num_samples": 50}),
    ],
    ids=["no linearisation", "fast passes", "slow at first alone"],
)
def test_a_short_measurement_is_not_told(metric: ProbeMetric, options: dict[str, Any]) -> None:
    assert told(metric, **options) == []


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        (
            [FisherSpectralNorm(), LinearizedAccuracy(), HessianTrace()],
            "The first measurement takes about 120 s: 256 samples, with about 48 forward passes for each."
            " `RobustnessMonitor(max_samples=16)` takes about 7.7 s, `every_n_epochs=5` measures less often, and"
            ' `RobustnessMonitor(["hessian_trace", "weight_curvature_index"])` measures no gradients of the inputs.',
        ),
        ([FisherSpectralNorm()], "about 82 s: 256 samples, with about 32 forward passes"),
        ([LinearizedAccuracy(order=2)], "about 82 s: 256 samples, with about 32 forward passes"),
    ],
    ids=["default", "spectral norms", "second order"],
)
def test_with_many_classes_passes_are_told(metrics: list[ProbeMetric], sentence: str) -> None:
    (found,) = told(*metrics, num_classes=100, seconds=10.0, linearization=None)
    assert sentence in found
    assert told(*metrics, num_classes=100, seconds=0.005, linearization=None) == []
    assert told(*metrics, num_classes=100, seconds=10.0, num_samples=8, linearization=None) == []


def test_many_queries_are_told() -> None:
    model = random_linear(0, num_classes=3, num_features=600)
    probe = Probe(model, random(1, 32, 600), torch.arange(32) % 3, queries=200)
    metrics, outputs = [FisherSpectralNorm(), LinearizedAccuracy(norm="l2")], probe.outputs(probe.inputs[:8])
    (found,) = on_cost(metrics, probe, outputs, num_samples=256, seconds=0.024)  # three passes of 8: 1 ms per query
    assert found == (
        "The first measurement takes about 110 s: 256 samples × 420 queries. `RobustnessMonitor(max_samples=16)` takes"
        " about 6.7 s, `every_n_epochs=5` measures less often, and a probe with fewer `queries` is less certain."
    )
    assert on_cost(metrics, probe, outputs, num_samples=256, seconds=0.0002) == []
    assert on_cost([HessianTrace()], probe, outputs, num_samples=256, seconds=10.0) == []


def test_much_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FisherSpectralNorm, "seconds_per_sample", lambda self, outputs: 0.0)
    (found,) = told(FisherSpectralNorm(), num_classes=1000, seconds=1e-6)
    assert found.startswith("The first measurement takes about 3.1 GB of memory: 256 samples × 1000 classes")
    assert "`RobustnessMonitor(max_samples=64)` takes about 0.77 GB" in found
    assert told(LinearizedAccuracy(), num_classes=1000, seconds=1e-6) == []


def test_the_algebra_of_many_classes_counts_and_that_of_few_is_not_even_timed() -> None:
    outputs = random(0, 8, 300)
    assert 0 < FisherSpectralNorm().seconds_per_sample(outputs) < 10
    assert FisherSpectralNorm().seconds_per_sample(outputs[:, :100]) == 0


class Sleeping(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        time.sleep(5e-4 * len(gradient))
        return gradient


class Slow(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(16, 20)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Sleeping.apply(x))


def test_the_time_that_is_told_is_the_time_that_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announced_cost, "_LONG", 0.1)
    with robustness_warnings() as messages:
        run = trainer(RobustnessMonitor("linearized_accuracy"), root=tmp_path)
        run.validate(Slow(), loader(), verbose=False)
    assert len(messages) == 1
    expected = re.search(r"takes about (.*?) s: 120 samples × 20 classes", messages[0])
    assert expected is not None
    assert 0.5 < float(expected[1]) / float(run.callback_metrics["robust/seconds"]) < 2


@pytest.mark.parametrize(("num_classes", "num_features"), [(120, 768), (400, 48)])
def test_many_classes_of_a_small_network_are_told_within_a_factor(num_classes: int, num_features: int) -> None:
    x, y = random(0, 16, num_features, dtype=torch.float32), torch.arange(16) % num_classes
    model = nn.Sequential(nn.Linear(num_features, 32), nn.GELU(), nn.Linear(32, num_classes))
    probe = Probe(model, x, y, linearization="exact")
    assert on_cost([LinearizedAccuracy()], probe, probe.outputs(x), num_samples=16, seconds=1000.0) == []
    expected = min(announced_cost._seconds_of_classes(probe, num_classes) for _ in range(2)) * len(x)

    def seconds() -> float:
        start = time.perf_counter()
        linearize(model, x)
        return time.perf_counter() - start

    assert 0.25 < expected / min(seconds() for _ in range(2)) < 4


def test_a_cold_first_call_is_not_scaled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, warm = 0, announced_cost.gram_matrix

    def cold(rows: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        time.sleep(0.2 if calls == 1 else 0)
        return warm(rows)

    monkeypatch.setattr(announced_cost, "gram_matrix", cold)
    probe = Probe(random_linear(0, num_classes=500, num_features=6), random(1, 8, 6), torch.arange(8))
    assert announced_cost._seconds_of_classes(probe, 500) < 1
    assert calls > 1


def test_it_is_told_once_per_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announced_cost, "_LONG", 1e-6)
    with robustness_warnings() as messages:
        trainer(RobustnessMonitor("linearized_accuracy"), root=tmp_path).fit(classifier(), loader(), loader())
    assert len(messages) == 1
    assert messages[0].startswith("The first measurement takes about")


class WithExtras(nn.Module):
    """Takes an argument beside its inputs, and returns more than logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 10)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(x * scale), "features": x}


def test_networks_with_extras_and_outputs_beside_the_logits_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announced_cost, "_LONG", 1e-9)
    x, targets = random(1, 32, 6, dtype=torch.float32), torch.arange(32) % 10
    probe = Probe(WithExtras(), x, targets, extras={"scale": random(2, 32, 1, dtype=torch.float32)})
    (found,) = on_cost([LinearizedAccuracy()], probe, probe.outputs(x), num_samples=256, seconds=1.0)
    assert "256 samples × 10 classes" in found


def test_token_ids_have_no_gradients_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announced_cost, "_LONG", 1e-9)
    ids = torch.arange(32).reshape(16, 2) % 5
    probe = Probe(nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 4)), ids, torch.arange(16) % 4)
    assert on_cost([LinearizedAccuracy()], probe, probe.outputs(ids), num_samples=256, seconds=1.0) == []


def test_a_thousand_classes_are_told_within_a_factor_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announced_cost, "_LONG", 0.1)
    monkeypatch.setattr(time, "perf_counter", time.process_time)  # whatever else the machine does
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 32, 3, padding=1), nn.GELU(), nn.Flatten()]
    module = Classifier(nn.Sequential(nn.Upsample(scale_factor=4), *layers, nn.Linear(32 * 256, 1000)))
    with robustness_warnings() as messages:
        run = trainer(RobustnessMonitor(["fisher_spectral_norm", "linearized_accuracy"]), root=tmp_path)
        run.validate(module, loader(), verbose=False)
    (message,) = (message for message in messages if "first measurement" in message)
    expected = re.search(r"takes about (.*?) s: 120 samples, with about \d+ forward passes", message)
    assert expected is not None
    assert 0.5 < float(expected[1]) / float(run.callback_metrics["robust/seconds"]) < 2
