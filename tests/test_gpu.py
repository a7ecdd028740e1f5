"""The same numbers on a CUDA device, also where its own kernels get in the way."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_robust import Probe, RobustnessMonitor
from lightning_robust.functional import (
    class_shielding,
    fim_spectral_norm,
    fim_spectral_norm_matrix_free,
    hessian_trace,
    linearize,
    linearized_margin,
    linearized_margin_linf,
    pgd,
    trace_fisher_rao_paths,
)
from lightning_robust.metrics import METRICS
from tests.helpers.networks import NETWORKS, build
from tests.helpers.training import Classifier, classifier, loader, robustness_warnings, trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(params=[False, True], ids=["float32", "tf32 allowed"])
def tf32(request: pytest.FixtureRequest) -> Any:
    """A global setting that must not reach the Gram matrices; convolutions and layers of the network may use it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param else "highest")
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", NETWORKS)  # among them a recurrent one: cuDNN has no backward pass in eval mode
def test_estimates_equal_those_of_the_cpu(name: str, tf32: bool) -> None:
    model, inputs, targets = build(name)
    double = linearize(model.double(), inputs.double())
    there = linearize(model.float().cuda(), inputs.cuda())
    assert there.gram.is_cuda
    y = targets.cuda()
    pairs = [
        (fim_spectral_norm(there.logits, there.gram), fim_spectral_norm(double.logits, double.gram)),
        (linearized_margin(there.logits, there.gram, y), linearized_margin(double.logits, double.gram, targets)),
        (
            linearized_margin_linf(there.logits, there.gap_l1, y),
            linearized_margin_linf(double.logits, double.gap_l1, targets),
        ),
    ]
    for value, expected in pairs:
        tolerance = 3e-2 if tf32 else 1e-4
        torch.testing.assert_close(
            value.cpu().double(), expected, rtol=tolerance, atol=tolerance * float(expected.max())
        )


@pytest.mark.parametrize("solver", ["gram", "cg"])
@pytest.mark.parametrize("name", NETWORKS)
def test_paths_equal_those_of_the_cpu(name: str, solver: Any) -> None:
    model, inputs, _ = build(name)
    expected = trace_fisher_rao_paths(model.double(), inputs.double())
    there = trace_fisher_rao_paths(model.float().cuda(), inputs.cuda(), solver=solver)
    assert there.margins.is_cuda
    torch.testing.assert_close(there.margins.cpu().double(), expected.margins, rtol=1e-3, atol=1e-3)
    assert torch.equal(there.first_hit.cpu(), expected.first_hit)
    table, same = class_shielding(there, there.logits.shape[2]), class_shielding(expected, there.logits.shape[2])
    torch.testing.assert_close(table.margin.value.cpu(), same.margin.value, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_curvature_equals_that_of_the_cpu(name: str) -> None:
    model, inputs, targets = build(name, num_samples=40)
    expected = hessian_trace(model.double(), inputs.double(), targets, rtol=None, num_probes=32)
    there = hessian_trace(model.float().cuda(), inputs.cuda(), targets.cuda(), rtol=None, num_probes=32)
    assert there.estimator == expected.estimator
    for key, trace in expected.layers.items():  # signs of weights are drawn on the device
        error = float(there.stderr[key].hypot(expected.stderr[key]))
        assert float(there.layers[key]) == pytest.approx(float(trace), rel=1e-3, abs=4 * error)


@pytest.mark.parametrize("name", NETWORKS)
def test_krylov_subspaces_hold_the_norms_of_the_cpu(name: str, tf32: bool) -> None:
    model, inputs, _ = build(name)
    linearization = linearize(model.double(), inputs.double())
    model, tolerance = model.float().cuda(), 3e-2 if tf32 else 1e-3
    there = fim_spectral_norm_matrix_free(model, inputs.cuda(), temperature=[2.0, 1.0], tolerance=tolerance)
    assert there.value.is_cuda
    assert there.converged.all()
    for value, temperature in zip(there.value.cpu().double(), (2.0, 1.0), strict=True):
        expected = fim_spectral_norm(linearization.logits, linearization.gram, temperature=temperature)
        torch.testing.assert_close(value, expected, rtol=2 * tolerance, atol=tolerance * float(expected.max()))


@pytest.mark.parametrize("linearization", ["exact", "krylov"])
def test_every_metric_and_the_attack_run_there(linearization: Any) -> None:
    model, inputs, targets = build("cnn_batchnorm", num_samples=20)
    probe = Probe(model.cuda(), inputs.cuda(), targets.cuda(), linearization=linearization)
    for factory in METRICS.values():
        metric = factory().cuda()
        metric.update(probe)
        assert all(value.isfinite() for value in metric.compute().values())
    attacked = pgd(model, inputs.cuda(), targets.cuda(), epsilon=0.1, steps=2, generator=torch.Generator())
    assert attacked.is_cuda


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
def test_the_monitor_runs_there_and_leaves_its_random_state_alone(tmp_path: Path, precision: Any) -> None:
    states = []
    for callbacks in ([], [RobustnessMonitor(on_error="raise")]):
        torch.manual_seed(0)
        run = trainer(*callbacks, root=tmp_path, accelerator="gpu", precision=precision)
        run.fit(classifier(), loader(), loader())
        states.append(torch.cuda.get_rng_state())
    assert run.callback_metrics["robust/num_samples"] == 120
    assert torch.equal(*states)


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_deterministic_algorithms_are_enough(tmp_path: Path) -> None:
    monitor = RobustnessMonitor(on_error="raise")
    try:
        run = trainer(monitor, root=tmp_path, accelerator="gpu", deterministic=True)
        run.fit(classifier(), loader(), loader())
    finally:
        torch.use_deterministic_algorithms(False)
    assert "robust/wci" in run.callback_metrics


def test_a_real_shortage_of_memory_is_survived(tmp_path: Path) -> None:
    wide = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(16, 2**20), *[torch.nn.GELU()] * 8, torch.nn.Linear(2**20, 4)
    )
    values = []
    total = torch.cuda.get_device_properties(0).total_memory
    for megabytes in (None, 3000):  # 480 MB for the activations of each layer, kept for a backward pass only
        torch.cuda.empty_cache()
        if megabytes:
            torch.cuda.set_per_process_memory_fraction(megabytes * 2**20 / total)
        run = trainer(RobustnessMonitor(["fisher_spectral_norm"]), root=tmp_path, accelerator="gpu")
        with robustness_warnings() as messages:
            run.validate(Classifier(wide), loader(batch_size=120), verbose=False)
        assert bool(megabytes) == any("ran out of memory" in message for message in messages)
        values.append(float(run.callback_metrics["robust/fim_spectral_norm"]))
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert values[1] == pytest.approx(values[0], rel=1e-4)
