import math
from functools import cache
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.functional import (
    calibrated_fim_spectral_norm,
    fim_spectral_norm,
    fim_trace,
    fit_temperature,
    linearize,
    saturated,
)
from tests.helpers.networks import NETWORKS, build, random, random_linear
from tests.helpers.oracles import Scaled, dense_spectral_norms, dense_traces, score_jacobian

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}

every_network = pytest.mark.parametrize("name", NETWORKS)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


class Samples(NamedTuple):
    """Logits, Gram matrices and labels without a network."""

    logits: Tensor
    gram: Tensor
    targets: Tensor


def draw_samples(
    seed: int, *, num_samples: int, num_classes: int, temperature: float = 1.0, scale: float = 2.0, features: int = 4
) -> Samples:
    """Labels follow softmax(logits / temperature); gradients are steeper between likely classes, as in networks."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_samples, num_classes, generator=generator, dtype=torch.float64)
    jacobian = torch.randn(num_samples, num_classes, features, generator=generator, dtype=torch.float64)
    jacobian = jacobian * (0.3 * logits).exp()[..., None]
    targets = torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)[:, 0]
    return Samples(logits, jacobian @ jacobian.mT, targets)


@cache
def dense_truth(name: str) -> dict[str, Tensor]:
    model, inputs, targets = build(name)
    with torch.no_grad():
        logits = model.double().eval()(inputs.double())
    temperature = float(fit_temperature(logits, targets))
    return {
        "spectral_norm": dense_spectral_norms(model, inputs),
        "trace": dense_traces(model, inputs),
        "calibrated": dense_spectral_norms(model, inputs, scale=1 / temperature),
    }


# --- spectral norm and trace ----------------------------------------------------------------------------------------


@every_dtype
@every_network
def test_all_quantities_agree_with_the_dense_fisher_matrix(name: str, dtype: torch.dtype) -> None:
    model, inputs, targets = build(name)
    expected, rtol = dense_truth(name), TOLERANCE[dtype]
    at = linearize(model.to(dtype), inputs.to(dtype))
    actual = {
        "spectral_norm": fim_spectral_norm(at.logits, at.gram),
        "trace": fim_trace(at.logits, at.gram),
        "calibrated": calibrated_fim_spectral_norm(at.logits, at.gram, targets).value,
    }
    for quantity, values in actual.items():
        torch.testing.assert_close(
            values.double(), expected[quantity], rtol=rtol, atol=0, msg=lambda m, q=quantity: q + m
        )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_information_of_a_linear_network_is_that_of_its_weights(temperature: float) -> None:
    model, inputs = random_linear(0, num_classes=4, num_features=7), random(1, 5, 7)
    at = linearize(model, inputs)
    weight = model.weight.detach()
    probs = (model(inputs).detach() / temperature).softmax(dim=1)
    information = [weight.T @ (p.diag() - torch.outer(p, p)) @ weight / temperature**2 for p in probs]
    largest = torch.stack([torch.linalg.matrix_norm(g, ord=2) for g in information])
    mean_weight = probs @ weight
    variance = torch.stack([p @ (weight - m).square().sum(dim=1) for p, m in zip(probs, mean_weight, strict=True)])
    actual = fim_spectral_norm(at.logits, at.gram, temperature=temperature)
    torch.testing.assert_close(actual, largest, rtol=1e-12, atol=0)
    actual = fim_trace(at.logits, at.gram, temperature=torch.tensor(temperature))
    torch.testing.assert_close(actual, variance / temperature**2, rtol=1e-12, atol=0)


def test_the_information_of_a_logistic_regression_is_p_times_one_minus_p_times_the_squared_weight_gap() -> None:
    model, inputs = random_linear(0, num_classes=2, num_features=3), random(1, 6, 3)
    at = linearize(model, inputs)
    weight, bias = (parameter.detach() for parameter in (model.weight, model.bias))
    p = torch.sigmoid(inputs @ (weight[1] - weight[0]) + bias[1] - bias[0])
    expected = p * (1 - p) * (weight[1] - weight[0]).square().sum()
    torch.testing.assert_close(fim_spectral_norm(at.logits, at.gram), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(fim_trace(at.logits, at.gram), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["mlp", "recurrent"])
def test_the_trace_is_the_mean_squared_score_of_drawn_labels(name: str) -> None:
    model, inputs, _ = build(name, num_samples=4)
    at = linearize(model.double(), inputs.double())
    num_draws, generator = 100_000, torch.Generator().manual_seed(0)
    for x, trace in zip(inputs, fim_trace(at.logits, at.gram), strict=True):
        probs, scores = score_jacobian(model, x)
        labels = torch.multinomial(probs, num_draws, replacement=True, generator=generator)
        squared = scores.square().sum(dim=1)[labels]
        assert abs(squared.mean() - trace) < 4 * squared.std() / math.sqrt(num_draws)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32),
    num_classes=st.integers(2, 12),
    features=st.integers(1, 15),
    log_scale=st.floats(-2, 2),
    temperature=st.floats(0.1, 10),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_bounds_between_trace_spectral_norm_and_gram_matrix(
    seed: int, num_classes: int, features: int, log_scale: float, temperature: float, dtype: torch.dtype
) -> None:
    logits, gram, _ = draw_samples(seed, num_samples=3, num_classes=num_classes, features=features, scale=10**log_scale)
    gram = gram / gram.abs().amax(dim=(1, 2), keepdim=True)
    logits, gram = logits.to(dtype), gram.to(dtype)
    norm = fim_spectral_norm(logits, gram, temperature=temperature).double()
    trace = fim_trace(logits, gram, temperature=temperature).double()
    # up to rounding of the Gram matrix itself
    slack = (1e-5 if dtype == torch.float32 else 1e-12) / temperature**2 * num_classes
    rank = min(num_classes - 1, features)
    assert (norm >= 0).all()
    assert (norm <= trace + slack).all()
    assert (trace <= rank * norm + slack).all()
    assert (norm <= torch.linalg.eigvalsh(gram.double())[:, -1] / 2 / temperature**2 + slack).all()


@given(shift=st.floats(-50, 50), seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
def test_adding_one_function_to_all_logits_changes_nothing(shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, jacobian, common = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (5, 4, 6), (5, 1, 6))
    )
    moved = jacobian + shift * common
    for quantity in (fim_spectral_norm, fim_trace):
        torch.testing.assert_close(
            quantity(logits + shift, moved @ moved.mT), quantity(logits, jacobian @ jacobian.mT), rtol=1e-8, atol=1e-10
        )


@every_dtype
def test_temperature_stands_for_a_network_with_smaller_logits(dtype: torch.dtype) -> None:
    logits, gram, _ = (
        t.to(dtype) if t.is_floating_point() else t for t in draw_samples(0, num_samples=5, num_classes=4)
    )
    for quantity in (fim_spectral_norm, fim_trace):
        torch.testing.assert_close(quantity(logits, gram, temperature=4.0), quantity(logits / 4, gram / 16))


# --- saturation -----------------------------------------------------------------------------------------------------


@every_dtype
def test_exactly_one_hot_predictions_have_zero_information(dtype: torch.dtype) -> None:
    logits = torch.tensor([[800.0, 0.0, -800.0], [0.0, 4000.0, 0.0]], dtype=dtype)
    gram = torch.eye(3, dtype=dtype).expand(2, 3, 3)
    assert fim_spectral_norm(logits, gram).tolist() == [0, 0]
    assert fim_trace(logits, gram).tolist() == [0, 0]


@every_dtype
@pytest.mark.parametrize("targets", [[0, 1, 2, 0], [1, 1, 1, 1]], ids=["all correct", "some wrong"])
def test_everything_is_finite_at_logits_of_200(dtype: torch.dtype, targets: list[int]) -> None:
    logits = torch.tensor([[200, -200, 0], [-200, 200, 200], [-200, -200, 200], [200, 200, 200]], dtype=dtype)
    gram = (3 * torch.eye(3, dtype=dtype) + 1).expand(4, 3, 3)
    calibrated = calibrated_fim_spectral_norm(logits, gram, torch.tensor(targets))
    for values in (
        fim_spectral_norm(logits, gram),
        fim_trace(logits, gram),
        calibrated.value,
        calibrated.mean,
        calibrated.stderr,
        calibrated.temperature,
    ):
        assert values.isfinite().all()
        assert (values >= 0).all()


def test_saturated_means_a_probability_above_0_999() -> None:
    probs = torch.tensor([[0.9989, 0.0011], [0.0009, 0.9991], [0.5, 0.5], [1.0, 1e-30]])
    assert saturated(probs.log()).tolist() == [False, True, False, True]


# --- temperature ----------------------------------------------------------------------------------------------------


def nll(logits: Tensor, targets: Tensor, temperature: float) -> float:
    return float(F.cross_entropy(logits.double() / temperature, targets))


@every_network
def test_the_temperature_minimises_the_negative_log_likelihood(name: str) -> None:
    model, inputs, targets = build(name, num_samples=40)
    logits = linearize(model.double(), inputs.double()).logits
    fitted = float(fit_temperature(logits, targets))
    grid = [nll(logits, targets, fitted * factor) for factor in torch.logspace(-3, 3, 601).tolist()]
    assert nll(logits, targets, fitted) <= min(grid) + 1e-12

    h = 1e-4
    below, at, above = (nll(logits, targets, fitted * math.exp(s)) for s in (-h, 0, h))
    slope, curvature = (above - below) / (2 * h), (above - 2 * at + below) / h**2
    assert abs(slope / curvature) < 1e-6  # the distance, in log T, to where the gradient is zero


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("num_classes", [2, 10])
def test_the_temperature_is_the_one_that_generated_the_labels(num_classes: int, temperature: float) -> None:
    logits, _, targets = draw_samples(0, num_samples=20_000, num_classes=num_classes, temperature=temperature)
    torch.testing.assert_close(float(fit_temperature(logits, targets)), temperature, rtol=0.05, atol=0)


@pytest.mark.parametrize("factor", [1e-2, 30.0])
@pytest.mark.parametrize("separable", [False, True])
def test_the_temperature_is_proportional_to_the_logits(factor: float, separable: bool) -> None:
    logits, _, targets = draw_samples(1, num_samples=50, num_classes=5)
    if separable:
        targets = logits.argmax(dim=1)
    expected = factor * fit_temperature(logits, targets)
    torch.testing.assert_close(fit_temperature(factor * logits, targets), expected, rtol=1e-9, atol=0)


@every_dtype
@pytest.mark.parametrize("num_samples", [1, 2, 64])
def test_samples_that_are_all_classified_correctly_have_a_finite_temperature(
    dtype: torch.dtype, num_samples: int
) -> None:
    logits = draw_samples(2, num_samples=num_samples, num_classes=3).logits.to(dtype)
    fitted = fit_temperature(logits, logits.argmax(dim=1))
    assert fitted.dtype == dtype
    assert 1e-3 < fitted / logits.std() < 10


def test_a_tie_with_the_target_counts_as_classified_correctly() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    assert 1e-3 < fit_temperature(logits, torch.tensor([0, 1])) < 10


def test_the_temperature_of_constant_logits_is_one() -> None:
    logits = torch.tensor([[3.0, 3.0], [-1.0, -1.0]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == 1
    assert calibrated_fim_spectral_norm(logits, torch.eye(2).expand(2, 2, 2), torch.tensor([0, 1])).stderr == 0


def test_logits_worse_than_chance_get_the_upper_end_of_the_range() -> None:
    logits, _, _ = draw_samples(3, num_samples=30, num_classes=4)
    margin = (logits.amax(dim=1) - logits.amin(dim=1)).max()
    torch.testing.assert_close(fit_temperature(logits, logits.argmin(dim=1)), 1e4 * margin, rtol=1e-9, atol=0)


def test_samples_without_a_margin_do_not_bound_the_temperature() -> None:
    """On most of them the network is dead, and two classes differ by rounding."""
    logits, _, targets = draw_samples(7, num_samples=100, num_classes=4)
    dead = torch.tensor([1.0, 1.0 + 1e-15, -1.0, -1.0], dtype=torch.float64).expand(200, 4)
    every = torch.cat([targets, torch.ones(200, dtype=torch.long)])
    expected = fit_temperature(logits, targets)
    assert 0.5 < fit_temperature(torch.cat([logits, dead]), every) / expected < 1


@pytest.mark.parametrize("missed", [0.0, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("num_samples", [2, 50])
def test_with_few_errors_the_temperature_is_that_of_half_a_sample_more(num_samples: int, missed: float) -> None:
    """All correct margins are 3, so with two classes the odds at the optimum are known in closed form."""
    margins = torch.full((num_samples,), 3.0, dtype=torch.float64)
    logits = torch.stack([margins, 0 * margins], dim=1)
    if missed:
        logits = torch.cat([logits, torch.tensor([[0.0, 3 * missed]], dtype=torch.float64)])
    fitted = fit_temperature(logits, torch.zeros(len(logits), dtype=torch.long))
    pseudo = max(0.5 - missed, 0.0)

    def slope(beta: float) -> float:
        wrong = 1 / (1 + math.exp(3 * beta))
        error = missed / (1 + math.exp(-3 * missed * beta))
        return -num_samples * wrong + error + pseudo * (1 - wrong)

    assert slope(0.999 / float(fitted)) < 0 < slope(1.001 / float(fitted))
    if not missed:
        torch.testing.assert_close(float(fitted), 3 / math.log(2 * num_samples), rtol=1e-9, atol=0)


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("factor", [1e3, 1e6, 1e12])
def test_a_diverged_sample_does_not_set_the_temperature_of_others(
    factor: float, correct: bool, separable: bool
) -> None:
    logits, gram, targets = draw_samples(1, num_samples=256, num_classes=5)
    if separable:
        targets = logits.argmax(dim=1)
    rest = torch.arange(256) != 7
    expected = calibrated_fim_spectral_norm(logits[rest], gram[rest], targets[rest])
    targets[7] = logits[7].argmax() if correct else logits[7].argmin()
    logits[7] *= factor
    actual = calibrated_fim_spectral_norm(logits, gram, targets)
    torch.testing.assert_close(actual.temperature, expected.temperature)
    torch.testing.assert_close(actual.value[rest], expected.value)
    torch.testing.assert_close(actual.stderr, expected.stderr, rtol=0.05, atol=0)
    assert actual.value[7] < 1e-6


# --- calibrated spectral norm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-2, 30.0])
@every_network
def test_the_calibrated_norm_does_not_change_when_all_logits_are_multiplied(name: str, factor: float) -> None:
    model, inputs, targets = build(name)
    before, after = linearize(model, inputs), linearize(Scaled(model, factor), inputs)
    expected, actual = (calibrated_fim_spectral_norm(at.logits, at.gram, targets) for at in (before, after))
    torch.testing.assert_close(actual.value, expected.value, rtol=1e-3, atol=0)
    torch.testing.assert_close(actual.mean, expected.mean, rtol=1e-3, atol=0)
    torch.testing.assert_close(actual.stderr, expected.stderr, rtol=1e-2, atol=0)
    torch.testing.assert_close(actual.temperature, factor * expected.temperature, rtol=1e-3, atol=0)


def test_the_calibrated_norm_is_the_norm_at_the_fitted_temperature() -> None:
    samples = draw_samples(4, num_samples=30, num_classes=4)
    actual = calibrated_fim_spectral_norm(*samples)
    assert actual.temperature == fit_temperature(samples.logits, samples.targets)
    expected = fim_spectral_norm(samples.logits, samples.gram, temperature=actual.temperature)
    torch.testing.assert_close(actual.value, expected)
    torch.testing.assert_close(actual.mean, expected.mean())


def test_the_standard_error_is_that_of_the_jackknife_also_where_the_confidence_is_wrong() -> None:
    """The jackknife repeats everything, including the fit, without one sample at a time."""
    n = 200
    logits, gram, targets = draw_samples(5, num_samples=n, num_classes=3, temperature=2.0)
    wrong = logits.argmax(dim=1) != targets
    gram = gram * (1 + 5 * wrong)[:, None, None]  # steeper where wrong, so that value and fit go together
    rest = (torch.arange(n) != i for i in range(n))
    means = torch.stack([calibrated_fim_spectral_norm(logits[r], gram[r], targets[r]).mean for r in rest])
    jackknife = ((n - 1) / n * (means - means.mean()).square().sum()).sqrt()
    actual = calibrated_fim_spectral_norm(logits, gram, targets).stderr
    torch.testing.assert_close(actual, jackknife, rtol=0.05, atol=0)


def test_the_standard_error_of_one_sample_is_unknown() -> None:
    assert calibrated_fim_spectral_norm(*draw_samples(0, num_samples=1, num_classes=3)).stderr.isnan()


@pytest.mark.long
@pytest.mark.parametrize("temperature", [0.6, 2.5])
def test_the_standard_error_covers_the_population_value_because_it_includes_that_of_the_temperature(
    temperature: float,
) -> None:
    num_classes, num_samples, num_seeds = 3, 250, 300
    population = draw_samples(10**6, num_samples=200_000, num_classes=num_classes)
    truth = fim_spectral_norm(population.logits, population.gram, temperature=temperature).mean()
    covered = naively_covered = 0
    for seed in range(num_seeds):
        samples = draw_samples(seed, num_samples=num_samples, num_classes=num_classes, temperature=temperature)
        estimate = calibrated_fim_spectral_norm(*samples)
        error = (estimate.mean - truth).abs()
        covered += int(error < 2 * estimate.stderr)
        naively_covered += int(error < 2 * estimate.value.std() / math.sqrt(num_samples))
    assert 0.90 <= covered / num_seeds <= 0.99
    assert naively_covered / num_seeds < 0.88


def test_a_temperature_at_the_end_of_its_range_adds_no_error_of_its_own() -> None:
    """There the temperature does not change with the samples."""
    logits, gram, _ = draw_samples(0, num_samples=50, num_classes=4)
    result = calibrated_fim_spectral_norm(logits, gram, logits.argmin(dim=1))
    torch.testing.assert_close(result.stderr, result.value.std() / 50**0.5)


def test_the_calibrated_norm_does_not_jump_when_the_last_wrong_sample_becomes_right() -> None:
    logits, gram, _ = draw_samples(0, num_samples=256, num_classes=5)
    logits = 3 * logits
    targets = logits.argmax(dim=1)
    results = []
    for gap in (1e-3, -1e-3):  # the first sample is right by a hair, and wrong by one
        moved = logits.clone()
        moved[0, targets[0]] = logits[0].topk(2).values[1] + gap
        results.append(calibrated_fim_spectral_norm(moved, gram, targets))
    right, wrong = results
    torch.testing.assert_close(right.mean, wrong.mean, rtol=0.01, atol=0)
    torch.testing.assert_close(right.stderr, wrong.stderr, rtol=0.01, atol=0)
