from typing import Any

import pytest
import torch

from lightning_robust import FisherSpectralNorm, Probe
from lightning_robust.functional import calibrated_fim_spectral_norm, fim_spectral_norm, fim_trace
from lightning_robust.functional._validation import tensors
from lightning_robust.functional.input_space import fisher_information, input_information
from tests.helpers.networks import build, random, random_linear
from tests.helpers.oracles import Scaled, dense_spectral_norms, dense_traces
from tests.helpers.recording import PeakMemory


def values_of(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    metric = FisherSpectralNorm()
    metric.update(Probe(model, inputs, targets))
    return {key: float(value) for key, value in metric.compute().items()}


def test_statistics_of_the_dense_oracle() -> None:
    model, inputs, targets = build("mlp", num_samples=21)
    values = values_of(model.double(), inputs.double(), targets)
    norms = dense_spectral_norms(model, inputs)
    expected = {
        "fim_spectral_norm": norms.mean(),
        "fim_spectral_norm_stderr": norms.std() / 21**0.5,
        "fim_spectral_norm_median": norms.median(),
        "fim_spectral_norm_p95": norms.quantile(0.95),
        "fim_spectral_norm_max": norms.max(),
        "fim_trace": dense_traces(model, inputs).mean(),
        "fim_spectral_norm_calibrated": dense_spectral_norms(model, inputs, scale=1 / values["temperature"]).mean(),
    }
    for key, value in expected.items():
        assert values[key] == pytest.approx(float(value), rel=1e-9), key


def test_states_carry_everything_that_the_functions_need() -> None:
    model, inputs, targets = build("attention", num_samples=12)
    probe = Probe(model, inputs, targets)
    values = values_of(model, inputs, targets)
    logits, gram = probe.linearized.logits, probe.linearized.gram
    calibrated = calibrated_fim_spectral_norm(logits, gram, targets)
    expected = {
        "fim_spectral_norm": fim_spectral_norm(logits, gram).mean(),
        "fim_trace": fim_trace(logits, gram).mean(),
        "fim_spectral_norm_calibrated": calibrated.mean,
        "fim_spectral_norm_calibrated_stderr": calibrated.stderr,
        "temperature": calibrated.temperature,
    }
    for key, value in expected.items():
        assert values[key] == pytest.approx(float(value), rel=1e-5), key


def test_scaling_the_logits_moves_the_raw_norm_and_not_the_calibrated_one() -> None:
    model, inputs, targets = build("cnn_batchnorm", num_samples=40)
    plain, confident = values_of(model, inputs, targets), values_of(Scaled(model, 30), inputs, targets)
    assert confident["fim_spectral_norm_calibrated"] == pytest.approx(plain["fim_spectral_norm_calibrated"], rel=1e-3)
    assert confident["temperature"] == pytest.approx(30 * plain["temperature"], rel=1e-3)
    assert abs(confident["fim_spectral_norm"] / plain["fim_spectral_norm"] - 1) > 1
    assert confident["saturated"] > 0.5 > plain["saturated"]


def test_another_number_of_classes_is_refused() -> None:
    metric = FisherSpectralNorm()
    metric.update(Probe(*build("mlp")))
    with pytest.raises(ValueError, match="logits of 6 classes, as before, but got 10"):
        metric.update(Probe(*build("cnn_batchnorm")))


def test_computing_takes_the_memory_of_the_gram_matrices_and_little_more(monkeypatch: pytest.MonkeyPatch) -> None:
    num_samples, num_classes = 60, 40
    metric = FisherSpectralNorm()
    model, inputs = random_linear(0, num_classes=num_classes, num_features=30), random(1, num_samples, 30)
    metric.update(Probe(model, inputs, torch.arange(num_samples) % num_classes, linearization="exact"))
    expected = metric.compute()
    metric._computed = None
    monkeypatch.setattr(fisher_information, "_MATRIX_ELEMENTS", 2 * num_classes**2)
    monkeypatch.setattr(tensors, "_CHECKED_ELEMENTS", 2 * num_classes**2)
    with PeakMemory() as memory:
        values = metric.compute()
    gram = 8 * num_samples * num_classes**2
    assert gram < memory.peak < 1.5 * gram
    assert metric.bytes_per_sample(num_classes) * num_samples == gram + 8 * num_samples * num_classes**2 / 2
    for key, value in expected.items():
        torch.testing.assert_close(values[key], value, rtol=1e-12, atol=0)


# --- Krylov subspaces -------------------------------------------------------------------------------------------------


def krylov(*parts: Probe) -> tuple[FisherSpectralNorm, dict[str, float]]:
    metric = FisherSpectralNorm()
    for part in parts:
        metric.update(part)
    return metric, {key: float(value) for key, value in metric.compute().items()}


def wide(num_samples: int = 60, num_classes: int = 40, **options: Any) -> Probe:
    """A probe of many classes, half of whose targets are the predictions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.Tanh(), torch.nn.Linear(40, num_classes))
    with torch.no_grad():
        model[2].weight.mul_(6)
        inputs = random(1, num_samples, 20, dtype=torch.float32)
        targets = model(inputs).argmax(dim=1)
    targets[::2] = (targets[::2] + 1) % num_classes
    return Probe(model, inputs, targets, **options)


def test_more_than_32_classes_are_measured_in_krylov_subspaces_and_few_are_not() -> None:
    for num_classes, has in ((32, False), (33, True)):
        assert ("fim_spectral_norm_unconverged" in krylov(wide(num_classes=num_classes))[1]) == has
    assert "fim_spectral_norm_unconverged" in krylov(wide(num_classes=5, linearization="krylov"))[1]
    assert "fim_spectral_norm_unconverged" not in krylov(wide(linearization="exact"))[1]


def test_statistics_from_krylov_subspaces_are_close_to_the_exact_ones() -> None:
    (_, found), (_, exact) = (krylov(wide(200, linearization=name)) for name in ("krylov", "exact"))
    assert found.keys() - exact.keys() == {"fim_spectral_norm_unconverged"}
    assert found["fim_spectral_norm_unconverged"] == 0
    for key, value in exact.items():
        trace = key.startswith("fim_trace")
        if not trace:
            assert found[key] == pytest.approx(value, rel=2e-2), key
    assert found["temperature"] == pytest.approx(exact["temperature"], rel=1e-6)
    assert abs(found["fim_trace"] - exact["fim_trace"]) < 3 * found["fim_trace_stderr"]
    assert found["fim_trace_stderr"] < 2 * exact["fim_trace_stderr"]


@pytest.mark.parametrize("linearization", ["krylov", "exact"])
@pytest.mark.parametrize("away", [0.95, 1.0, 1.05])
def test_calibrated_values_follow_the_temperature_of_all_samples_from_that_of_the_probe(
    away: float, linearization: Any
) -> None:
    """Two parts with a temperature of their own, up to 5 % off, are right to second order."""
    probe = wide(linearization=linearization)
    _, exact = krylov(wide(linearization="exact"))
    told = probe.at_temperature(away * exact["temperature"])
    _, found = krylov(told.rows(slice(25)), told.rows(slice(25, None)))
    for end in ("", "_stderr", "_lower", "_upper"):
        key = f"fim_spectral_norm_calibrated{end}"
        assert found[key] == pytest.approx(exact[key], rel=2e-2), key


@pytest.mark.parametrize("sizes", [[60], [1, 59], [20, 0, 39, 1]], ids=str)
def test_states_of_krylov_subspaces_merge_exactly(sizes: list[int]) -> None:
    probe = wide(temperature=1.3)
    ends = [sum(sizes[: count + 1]) for count in range(len(sizes))]
    parts = [probe.rows(slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    (metric, found), (_, expected) = krylov(*parts), krylov(probe)
    assert found == pytest.approx(expected, rel=1e-5)
    numbers = sum(row.numel() for row in metric.summaries)
    assert numbers == 60 * (1 + 40 + 7)  # and not C²


def test_a_metric_restored_from_its_states_goes_on() -> None:
    first, second = wide(temperature=1.3).rows(slice(20)), wide(temperature=1.3).rows(slice(20, None))
    metric = FisherSpectralNorm()
    metric.persistent(True)
    metric.update(first)
    resumed = FisherSpectralNorm()
    resumed.persistent(True)
    resumed.load_state_dict(metric.state_dict())
    resumed.update(second)
    found = {key: float(value) for key, value in resumed.compute().items()}
    assert found == krylov(first, second)[1]


def test_values_that_have_not_converged_carry_a_flag_and_a_caveat(monkeypatch: pytest.MonkeyPatch) -> None:
    options = input_information.input_information.__kwdefaults__
    monkeypatch.setitem(options, "accuracy", input_information.Accuracy(residual=1e-9, error=1e-9, products=3))
    metric, values = krylov(wide())
    assert values["fim_spectral_norm_unconverged"] == 1
    (key,) = caveats = metric.caveats(values)
    assert key == "fim_spectral_norm_unconverged"
    assert "at least the value that counts" in caveats[key]
    assert '`RobustnessMonitor(linearization="exact")`' in caveats[key]
    assert metric.direction(key) is None
    monkeypatch.undo()
    metric, values = krylov(wide())
    assert metric.caveats(values) == {}


def test_both_ways_in_one_measurement_are_refused() -> None:
    metric = FisherSpectralNorm()
    metric.update(wide(linearization="exact"))
    metric.update(wide(linearization="krylov"))
    with pytest.raises(ValueError, match="one way to linearise for all samples, but got both 'exact' and 'krylov'"):
        metric.compute()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_other_likelihoods_of_many_outputs(likelihood: Any) -> None:
    base = wide()
    outputs = base.model(base.inputs).detach()
    noise = random(4, *outputs.shape, dtype=torch.float32)
    targets = outputs + noise if likelihood == "gaussian" else (outputs + noise > 0).float()
    found, exact = (
        krylov(Probe(base.model, base.inputs, targets, likelihood=likelihood, linearization=name))[1]
        for name in ("krylov", "exact")
    )
    for key, value in exact.items():
        if "stderr" not in key and not key.startswith("fim_trace"):
            assert found[key] == pytest.approx(value, rel=2e-2), key
