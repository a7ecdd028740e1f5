"""Each likelihood against its dense Fisher matrix, its loss, and brute force, in float64 and one sample at a time."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.func import hessian, jacrev
from torch.nn import functional as F

from lightning_robust.functional import (
    calibrated_fim_spectral_norm,
    fim_spectral_norm,
    fim_trace,
    fit_temperature,
    linearize,
    linearized_margin,
    linearized_margin_linf,
    relinearize,
    saturated,
)
from lightning_robust.functional.input_space.likelihoods import NAMES, likelihood_of

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
COLUMNS = [name for name in NAMES if name != "token"]
INDEPENDENT = ("bernoulli", "gaussian")
N, D = 6, 5

every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
every_likelihood = pytest.mark.parametrize("likelihood", COLUMNS)
independent = pytest.mark.parametrize("likelihood", INDEPENDENT)
every_width = pytest.mark.parametrize("width", [1, 4])


def network(width: int, dtype: torch.dtype = torch.float64, *, scale: float = 2.0) -> nn.Module:
    generator = torch.Generator().manual_seed(width)
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, width)).double()
    for parameter in model.parameters():
        parameter.data = scale / 2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.to(dtype)


def inputs_of(dtype: torch.dtype = torch.float64, *, num_samples: int = N) -> Tensor:
    return torch.randn(num_samples, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def draw(likelihood: str, outputs: Tensor, *, seed: int = 0, sigma: float = 0.7) -> Tensor:
    """Targets that follow outputs, as their likelihood says."""
    generator = torch.Generator().manual_seed(seed)
    if likelihood == "categorical":
        return torch.multinomial(outputs.double().softmax(dim=1), 1, generator=generator)[:, 0]
    if likelihood == "bernoulli":
        return (torch.rand(outputs.shape, generator=generator) < outputs.sigmoid()).float()
    return outputs + sigma * torch.randn(outputs.shape, generator=generator, dtype=torch.float64)


def log_probability(likelihood: str, outputs: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Logarithm of the probability of the target of one sample, from outputs (C,), by the definition."""
    if likelihood == "categorical":
        return (outputs / temperature).log_softmax(0)[target]
    if likelihood == "bernoulli":
        probs = (outputs / temperature).sigmoid()
        return torch.where(target == 1, probs, 1 - probs).log().sum()
    return torch.distributions.Normal(outputs, temperature).log_prob(target).sum()


def dense_information(likelihood: str, model: nn.Module, x: Tensor, temperature: float) -> Tensor:
    """D × D: the expectation of outer products of scores, over all targets; quadrature for numbers."""
    width = model(x).numel()
    if likelihood == "categorical":
        weighted = [(1.0, torch.tensor(c)) for c in range(width)]
    elif likelihood == "bernoulli":
        weighted = [(1.0, torch.tensor(bits)) for bits in itertools.product([0, 1], repeat=width)]
    else:  # three-point Gauss–Hermite nodes integrate the squares of numbers that are normal exactly
        nodes = ((1 / 6, -math.sqrt(3)), (2 / 3, 0.0), (1 / 6, math.sqrt(3)))
        mean = model(x).detach()
        weighted = [
            (
                math.prod(w for w, _ in point),
                mean + temperature * torch.tensor([at for _, at in point], dtype=torch.float64),
            )
            for point in itertools.product(nodes, repeat=width)
        ]
    total = torch.zeros(D, D, dtype=torch.float64)
    for weight, target in weighted:

        def log_p(flat: Tensor, target: Tensor = target) -> Tensor:
            return log_probability(likelihood, model(flat), target, temperature)

        score = jacrev(log_p)(x)
        probability = 1.0 if likelihood == "gaussian" else log_p(x).exp()
        total += weight * probability * score[:, None] * score[None, :]
    return total.detach()


def widths(likelihood: str) -> list[int]:
    return [2, 4] if likelihood == "categorical" else [1, 3]


# ---- information -----------------------------------------------------------------------------------------------------


@every_dtype
@every_likelihood
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_the_spectral_norm_and_the_trace_are_those_of_the_dense_fisher_matrix(
    likelihood: Any, dtype: torch.dtype, temperature: float
) -> None:
    for width in widths(likelihood):
        at = linearize(network(width, dtype), inputs_of(dtype), likelihood=likelihood)
        options = {"temperature": temperature, "likelihood": likelihood}
        found = fim_spectral_norm(at.logits, at.gram, **options), fim_trace(at.logits, at.gram, **options)
        dense = [dense_information(likelihood, network(width), x, temperature) for x in inputs_of(dtype).double()]
        expected = [torch.linalg.eigvalsh(g)[-1] for g in dense], [g.trace() for g in dense]
        for value, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(value.double(), torch.stack(truth), rtol=TOLERANCE[dtype], atol=1e-12)


@every_likelihood
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_information_in_the_outputs_is_the_hessian_of_the_loss_and_has_the_stated_root(
    likelihood: Any, temperature: float
) -> None:
    """For all three the Hessian of the negative log-likelihood does not depend on the target."""
    kind = likelihood_of(likelihood)
    for width in widths(likelihood):
        outputs = network(width)(inputs_of()).detach()
        target = draw(likelihood, outputs)
        vectors = torch.randn(N, width, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = kind.times_information(outputs, vectors, temperature)
        z = kind.prepared(outputs) / temperature
        root = kind.transposed_root_times(z, torch.eye(width).double().expand(N, -1, -1))  # Fᵀ
        torch.testing.assert_close(root @ root.mT @ vectors / temperature**2, found, rtol=1e-9, atol=1e-12)
        gram = vectors @ vectors.mT
        torch.testing.assert_close(kind.information(z, gram), root.mT @ gram @ root, rtol=1e-9, atol=1e-12)
        for n in range(N):
            matrix = hessian(lambda f, y=target[n]: -log_probability(likelihood, f, y, temperature))(outputs[n])
            torch.testing.assert_close(found[n], matrix @ vectors[n], rtol=1e-9, atol=1e-12)


def test_masked_classes_have_no_part_in_products_with_the_information() -> None:
    outputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    vectors = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(1))
    kind = likelihood_of("categorical")
    for mask in (-math.inf, -1e6):
        masked = outputs.clone()
        masked[:, 2] = mask
        rest = [0, 1, 3, 4]
        found = kind.times_information(masked, vectors, 1.5)
        assert found.dtype == torch.float64
        assert (found[:, 2] == 0).all()
        torch.testing.assert_close(found[:, rest], kind.times_information(outputs[:, rest], vectors[:, rest], 1.5))


def test_one_label_is_a_class_of_two() -> None:
    z = 3 * torch.randn(40, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = torch.rand(40, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = draw("bernoulli", z / 2)
    two = F.pad(z, (1, 0)), F.pad(gram, (1, 0, 1, 0))
    classes = targets[:, 0].long()
    calibrated = calibrated_fim_spectral_norm(z, gram, targets, likelihood="bernoulli")
    expected = calibrated_fim_spectral_norm(*two, classes)
    for name in ("value", "mean", "stderr", "temperature"):
        torch.testing.assert_close(getattr(calibrated, name), getattr(expected, name), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        linearized_margin(z, gram, targets, likelihood="bernoulli"), linearized_margin(*two, classes)
    )
    assert torch.equal(saturated(z, likelihood="bernoulli"), saturated(two[0]))


def test_samples_are_saturated_if_all_labels_are() -> None:
    z = torch.tensor([[9.0, -9.0], [9.0, 1.0], [6.9, 6.9], [-6.91, 20.0]])
    assert saturated(z, likelihood="bernoulli").tolist() == [True, False, False, True]


# ---- temperature -----------------------------------------------------------------------------------------------------


def log_loss(likelihood: str, outputs: Tensor, targets: Tensor, temperature: float) -> float:
    pairs = zip(outputs, targets, strict=True)
    return -float(sum(log_probability(likelihood, f, y, temperature) for f, y in pairs))


@every_likelihood
def test_the_fitted_temperature_minimises_the_negative_log_likelihood(likelihood: Any) -> None:
    outputs = network(3, scale=3.0)(inputs_of(num_samples=60)).detach()
    for seed, factor in ((0, 1.0), (1, 4.0)):
        targets = draw(likelihood, outputs, seed=seed)
        given = factor * outputs if likelihood != "gaussian" else outputs
        best = minimize_scalar(
            lambda log_t: log_loss(likelihood, given, targets, math.exp(log_t)),  # noqa: B023
            bounds=(-4, 4),
            method="bounded",
            options={"xatol": 1e-10},
        )
        found = float(fit_temperature(given, targets, likelihood=likelihood))
        assert found == pytest.approx(math.exp(best.x), rel=1e-5)


@every_likelihood
def test_influences_are_the_changes_of_the_inverse_temperature_without_a_sample(likelihood: Any) -> None:
    n = 400
    outputs = 2 * torch.randn(n, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    targets = draw(likelihood, outputs / 1.5)
    fit = likelihood_of(likelihood).fit(outputs, targets)
    assert fit.influences.sum().abs() < 1e-6 * fit.influences.abs().sum()
    for i in (0, 7, 123):
        rest = torch.arange(n) != i
        without = fit_temperature(outputs[rest], targets[rest], likelihood=likelihood)
        change = n * (1 / fit.temperature - 1 / without)
        torch.testing.assert_close(fit.influences[i], change, rtol=0.05, atol=0.01 * float(1 / fit.temperature))


def test_labels_without_a_single_error_have_a_finite_temperature_that_is_continuous() -> None:
    z = 3 * torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = (z > 0).double()
    fitted = fit_temperature(z, right, likelihood="bernoulli")
    assert 0.01 < float(fitted) < 2
    torch.testing.assert_close(fit_temperature(5 * z, right, likelihood="bernoulli"), 5 * fitted)
    z[0, 0] = 1e-6
    by_a_hair = []
    for label in (0.0, 1.0):
        right[0, 0] = label
        by_a_hair.append(fit_temperature(z, right, likelihood="bernoulli"))
    torch.testing.assert_close(*by_a_hair, rtol=1e-3, atol=0)


def test_a_label_masked_by_a_large_number_does_not_set_the_temperature() -> None:
    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = draw("bernoulli", z)
    masked, with_mask = (
        torch.cat([z, torch.full((50, 1), -1e4)], dim=1),
        torch.cat([targets, torch.zeros(50, 1)], dim=1),
    )
    found, expected = (fit_temperature(*pair, likelihood="bernoulli") for pair in ((masked, with_mask), (z, targets)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_sigma_is_the_root_mean_square_residual_of_samples_that_have_not_diverged() -> None:
    outputs = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = draw("gaussian", outputs)
    sigma = (outputs - targets).square().mean().sqrt()
    torch.testing.assert_close(fit_temperature(outputs, targets, likelihood="gaussian"), sigma)
    diverged = torch.cat([outputs, torch.full((1, 2), 1e6)])
    found = fit_temperature(diverged, torch.cat([targets, torch.zeros(1, 2)]), likelihood="gaussian")
    torch.testing.assert_close(found, sigma)
    assert fit_temperature(outputs, outputs, likelihood="gaussian") == 1


@independent
def test_the_calibrated_norm_is_that_at_the_fitted_temperature_with_the_error_of_the_jackknife(likelihood: Any) -> None:
    n = 150
    generator = torch.Generator().manual_seed(3)
    outputs = 2 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    rows = torch.randn(n, 2, 3, generator=generator, dtype=torch.float64) * (0.5 * outputs).exp()[..., None]
    targets, gram = draw(likelihood, outputs / 2), rows @ rows.mT
    found = calibrated_fim_spectral_norm(outputs, gram, targets, likelihood=likelihood)
    assert found.temperature == fit_temperature(outputs, targets, likelihood=likelihood)
    expected = fim_spectral_norm(outputs, gram, temperature=found.temperature, likelihood=likelihood)
    torch.testing.assert_close(found.value, expected)
    rest = [torch.arange(n) != i for i in range(n)]
    parts = [calibrated_fim_spectral_norm(outputs[r], gram[r], targets[r], likelihood=likelihood).mean for r in rest]
    means = torch.stack(parts)
    jackknife = ((n - 1) / n * (means - means.mean()).square().sum()).sqrt()
    torch.testing.assert_close(found.stderr, jackknife, rtol=0.05, atol=0)


@independent
def test_the_standard_error_covers_the_population_value(likelihood: Any) -> None:
    """Also that part of the error which comes from the temperature."""

    temperature = 0.7

    def population(seed: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        outputs = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        rows = torch.randn(n, 2, 3, generator=generator, dtype=torch.float64) + 2
        mean = outputs if likelihood == "gaussian" else outputs / temperature
        return outputs, rows @ rows.mT, draw(likelihood, mean, seed=seed + 10**6, sigma=temperature)

    outputs, gram, _ = population(10**6, 20_000)
    truth = float(fim_spectral_norm(outputs, gram, temperature=temperature, likelihood=likelihood).mean())
    draws, covered, naive = 150, 0, 0
    for seed in range(draws):
        outputs, gram, targets = population(seed, 100)
        found = calibrated_fim_spectral_norm(outputs, gram, targets, likelihood=likelihood)
        covered += bool((found.mean - truth).abs() < 2 * found.stderr)
        naive += bool((found.mean - truth).abs() < 2 * found.value.std() / 10)
    assert 0.90 <= covered / draws <= 0.99
    assert naive < covered


# ---- margins ---------------------------------------------------------------------------------------------------------


def changes(likelihood: str, moved: Tensor, at: Tensor, tolerance: float | None) -> Tensor:
    """Whether predictions (n, C) differ from one (C,)."""
    if likelihood == "gaussian":
        assert tolerance is not None
        return ((moved - at).abs() >= tolerance).any(dim=1)
    return ((moved > 0) != (at > 0)).any(dim=1)


@every_dtype
@every_width
@independent
def test_margins_are_the_smallest_perturbations_that_change_a_linear_prediction(
    likelihood: Any, width: int, dtype: torch.dtype
) -> None:
    """By brute force: no random perturbation of that size changes it, and the best of each output does."""
    tolerance = 0.3 if likelihood == "gaussian" else None
    model = nn.Linear(D, width).to(dtype)
    generator = torch.Generator().manual_seed(width)
    model.weight.data = torch.randn(width, D, generator=generator).to(dtype)
    model.bias.data = torch.randn(width, generator=generator).to(dtype)
    x = inputs_of(dtype)
    outputs = model(x).detach()
    targets = (outputs > 0).long() if likelihood == "bernoulli" else outputs
    options: dict[str, Any] = {"likelihood": likelihood, "tolerance": tolerance}
    at = linearize(model, x, **options)
    assert at.gap_l1 is not None
    found = {
        2: linearized_margin(at.logits, at.gram, targets, **options),
        math.inf: linearized_margin_linf(at.logits, at.gap_l1, targets, **options),
    }
    weight, bias = model.weight.detach().double(), model.bias.detach().double()
    for order, margins in found.items():
        for n, margin in enumerate(margins.double()):
            start = weight @ x[n].double() + bias
            noise = torch.randn(4000, D, generator=generator, dtype=torch.float64)
            noise = noise if order == 2 else noise.sign()
            unit = noise / torch.linalg.vector_norm(noise, ord=order, dim=1, keepdim=True)
            best = weight if order == 2 else weight.sign()
            best = best / torch.linalg.vector_norm(best, ord=order, dim=1, keepdim=True)
            unit = torch.cat([unit, best, -best])
            inside, outside = (start + (x_scale * margin * unit) @ weight.T for x_scale in (0.9999, 1.0001))
            assert not changes(likelihood, inside, start, tolerance).any()
            assert changes(likelihood, outside, start, tolerance).any()


@independent
def test_margins_of_networks_are_those_of_single_gradients(likelihood: Any) -> None:
    tolerance = 0.2 if likelihood == "gaussian" else None
    options: dict[str, Any] = {"likelihood": likelihood, "tolerance": tolerance}
    model, x = network(3), inputs_of()
    outputs = model(x).detach()
    targets = (outputs > 0).double()
    targets[0, 1] = 1 - targets[0, 1]  # one label of the first sample is wrong
    at = linearize(model, x, **options)
    assert at.gap_l1 is not None
    for dual, found in (
        (2, linearized_margin(at.logits, at.gram, targets, **options)),
        (1, linearized_margin_linf(at.logits, at.gap_l1, targets, **options)),
    ):
        for n in range(N):
            norms = torch.linalg.vector_norm(jacrev(model)(x[n]), ord=dual, dim=1)
            expected = ((tolerance or outputs[n].abs()) / norms).min()
            if likelihood == "bernoulli" and n == 0:
                expected = torch.zeros_like(expected)
            torch.testing.assert_close(found[n], expected.detach(), rtol=1e-9, atol=0)


def smallest_in_range(row: Tensor, gap: float, x: Tensor, low: float, high: float) -> float:
    """Smallest ε at which moves by at most ε, within the range, lower ``row · x`` by ``gap``: by bisection."""

    def achieved(epsilon: float) -> float:
        ends = torch.where(row > 0, (x - epsilon).clamp_min(low), (x + epsilon).clamp_max(high))
        return float((row * (x - ends)).sum())

    if achieved(1e6) < gap:
        return math.inf
    below, above = 0.0, 1e6
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (below, middle) if achieved(middle) >= gap else (middle, above)
    return above


@every_width
@independent
def test_margins_stay_within_the_valid_range_and_numbers_may_rise_or_fall(likelihood: Any, width: int) -> None:
    tolerance = 0.3 if likelihood == "gaussian" else None
    options: dict[str, Any] = {"likelihood": likelihood, "tolerance": tolerance}
    model = network(width)
    x = inputs_of(num_samples=8).clamp(-0.5, 0.5)  # most features lie at an end of the range
    at = linearize(model, x, valid_range=(-0.5, 0.5), **options)
    assert at.gap_l1 is not None
    targets = (at.logits > 0).double()
    found = linearized_margin_linf(at.logits, at.gap_l1, targets, **options)
    for n in range(len(x)):
        rows = jacrev(model)(x[n]).detach()
        distances = []
        for z, row in zip(at.logits[n], rows, strict=True):
            ways = [(z.sign() * row, float(z.abs()))] if tolerance is None else [(row, tolerance), (-row, tolerance)]
            distances += [smallest_in_range(way, gap, x[n], -0.5, 0.5) for way, gap in ways]
        assert float(found[n]) == pytest.approx(min(distances), rel=1e-8)


@independent
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("valid_range", [None, (-0.9, 0.9)])
def test_the_second_linearisation_has_the_gradients_where_the_prediction_is_about_to_change(
    likelihood: Any, norm: Any, valid_range: tuple[float, float] | None
) -> None:
    tolerance = 0.4 if likelihood == "gaussian" else None
    options: dict[str, Any] = {"likelihood": likelihood, "tolerance": tolerance, "valid_range": valid_range}
    model, x = network(2), inputs_of().clamp(-0.9, 0.9)
    at = linearize(model, x, **options)
    near = relinearize(model, x, at, norm=norm, fraction=0.5, **options)
    assert torch.equal(near.logits, at.logits)
    low, high = valid_range or (-1e9, 1e9)
    for n in range(N):
        rows, z = jacrev(model)(x[n]).detach(), at.logits[n]
        falling = [[z[k].sign() * rows[k]] if tolerance is None else [rows[k], -rows[k]] for k in range(2)]
        gaps = [float(z[k].abs()) if tolerance is None else tolerance for k in range(2)]

        def size(row: Tensor, gap: float, n: int = n) -> float:
            return gap / float(row.norm()) if norm == "l2" else smallest_in_range(row, gap, x[n], low, high)

        sizes = [min(size(row, gap) for row in ways) for ways, gap in zip(falling, gaps, strict=True)]
        k = sizes.index(min(sizes))
        steps = [row / row.norm() if norm == "l2" else row.sign() for row in falling[k]]
        length = sizes[k] if sizes[k] < math.inf else 0.0  # nothing within the range changes the prediction
        ends = [x[n] - length * step for step in steps]
        ends = [end if norm == "l2" else end.clamp(low, high) for end in ends]
        points = [(x[n] + end) / 2 for end in ends]
        point = max(points, key=lambda point: float((model(point).detach() - z)[k].abs()))
        rows = jacrev(model)(point).detach()
        torch.testing.assert_close(near.gram[n], rows @ rows.T, rtol=1e-7, atol=1e-12)


# ---- what is refused -------------------------------------------------------------------------------------------------

OUTPUTS = torch.tensor([[0.5, -1.0], [2.0, 0.3], [-0.4, 1.0]])
GRAM = torch.eye(2).expand(3, 2, 2).contiguous()
CALLS: dict[str, Callable[..., object]] = {
    "fit": lambda y, **options: fit_temperature(OUTPUTS, y, **options),
    "calibrated": lambda y, **options: calibrated_fim_spectral_norm(OUTPUTS, GRAM, y, **options),
    "margin": lambda y, **options: linearized_margin(OUTPUTS, GRAM, y, **options),
    "linf": lambda y, **options: linearized_margin_linf(OUTPUTS, OUTPUTS.abs(), y, **options),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("likelihood", "targets", "told"),
    [
        ("bernoulli", torch.tensor([0, 1, 1]), "class indices go with likelihood 'categorical'"),
        ("bernoulli", torch.tensor([0.0, 1.0, 1.0]), "a 0 or 1 for each of the 2 labels"),
        ("bernoulli", torch.tensor([[0, 2], [1, 1], [0, 0]]), "values from 0 to 2"),
        ("bernoulli", torch.tensor([[0.0, 0.3], [1.0, 1.0], [0.0, 0.0]]), "soft labels only curvature"),
        ("bernoulli", torch.zeros(3, 3), r"\(3, 2\)"),
        ("gaussian", torch.tensor([0.1, 0.2, 0.3]), "prediction alone"),
        ("gaussian", torch.tensor([[0.1], [0.2], [0.3]]), "prediction alone"),
        ("gaussian", torch.tensor([0, 1, 1]), "Class indices go with likelihood 'categorical'"),
        ("gaussian", torch.full((3, 2), torch.nan), "finite targets"),
        ("categorical", torch.zeros(3, 2), "`likelihood='bernoulli'`"),
        ("categorical", torch.tensor([0.1, 0.2, 0.3]), "`likelihood='gaussian'`"),
    ],
)
def test_targets_that_contradict_the_likelihood_are_refused(
    call: str, likelihood: str, targets: Tensor, told: str
) -> None:
    options = {"tolerance": 0.1} if likelihood == "gaussian" and call in ("margin", "linf") else {}
    with pytest.raises(ValueError, match=told):
        CALLS[call](targets, likelihood=likelihood, **options)


def test_unknown_likelihoods_and_tolerances_that_say_nothing_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"`likelihood` to be one of \('categorical', 'bernoulli', 'gaussian', 'token'\)"
    ):
        likelihood_of("poisson")
    for tolerance in (0, -1, math.nan, math.inf, "1"):
        with pytest.raises(ValueError, match="`tolerance` to be a positive number"):
            likelihood_of("gaussian", tolerance)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only 'gaussian' has one"):
        likelihood_of("bernoulli", 0.5)
    with pytest.raises(ValueError, match=r"`tolerance` with likelihood 'gaussian'.*tolerance=0\.1\)"):
        linearized_margin(OUTPUTS, GRAM, OUTPUTS, likelihood="gaussian")
    with pytest.raises(ValueError, match="has none"):
        saturated(OUTPUTS, likelihood="gaussian")


def test_outputs_that_contradict_the_likelihood_are_refused() -> None:
    x = inputs_of()
    with pytest.raises(ValueError, match="`likelihood='gaussian'`"):
        linearize(network(1), x)
    with pytest.raises(ValueError, match=r"outputs of shape \(N, C\)"):
        linearize(lambda x: x.sum(dim=1), x, likelihood="gaussian")
    masked = torch.tensor([0.0, -math.inf])
    for likelihood in INDEPENDENT:
        with pytest.raises(ValueError, match="Expected finite outputs"):
            linearize(lambda x: x[:, :2] + masked, x, likelihood=likelihood)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="Expected finite logits"):
            fim_trace(OUTPUTS + masked, GRAM, likelihood=likelihood)  # type: ignore[arg-type]


def test_numbers_without_a_tolerance_have_no_distances_in_a_range_but_all_else() -> None:
    model, x = network(2), inputs_of().clamp(-0.5, 0.5)
    at = linearize(model, x, valid_range=(-0.5, 0.5), likelihood="gaussian")
    assert at.gap_l1 is None
    torch.testing.assert_close(at.gram, linearize(model, x, likelihood="gaussian").gram)
    with pytest.raises(ValueError, match="`tolerance`"):
        relinearize(model, x, linearize(model, x, likelihood="gaussian"), likelihood="gaussian")


def test_an_output_that_does_not_depend_on_the_input_has_an_infinite_margin() -> None:
    gram = torch.zeros(3, 2, 2)
    labels = (OUTPUTS > 0).long()
    assert linearized_margin(OUTPUTS, gram, labels, likelihood="bernoulli").isposinf().all()
    assert linearized_margin(OUTPUTS, gram, OUTPUTS, likelihood="gaussian", tolerance=1.0).isposinf().all()
    undecided = torch.zeros(3, 2)
    assert (linearized_margin(undecided, gram, labels, likelihood="bernoulli") == 0).all()
