import pytest
import torch

from lightning_robust import FisherSpectralNorm, Probe
from lightning_robust.functional import calibrated_fim_spectral_norm, fim_spectral_norm, fim_trace
from lightning_robust.functional._validation import tensors
from lightning_robust.functional.input_space import fisher_information
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
