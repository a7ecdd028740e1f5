"""Spectral norms from products with Jacobians, against those of exact linearisations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.functional import (
    SpectralNormEstimate,
    fim_spectral_norm,
    fim_spectral_norm_matrix_free,
    fim_trace,
    linearize,
)
from lightning_robust.functional.input_space import input_information as input_information_module
from lightning_robust.functional.input_space.input_information import input_information
from lightning_robust.functional.input_space.likelihoods import likelihood_of
from tests.helpers.networks import NETWORKS, Normalised, build, normalise, random, random_linear
from tests.helpers.recording import PeakMemory

TIGHT: dict[str, Any] = {"tolerance": 1e-4, "max_products": 60}
TEMPERATURES = [1.0, 0.4, 3.0]
every_network = pytest.mark.parametrize("name", NETWORKS)


def wide(num_classes: int = 60, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A smooth network of many classes, and samples from torn to confident."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, num_classes)).to(dtype)
        inputs = torch.randn(12, 20) * torch.linspace(0.2, 6, 12)[:, None]
    with torch.no_grad():
        model[2].weight.mul_(4)
    return model, inputs.to(dtype)


def exact(
    model: Callable[..., Tensor], inputs: Tensor, temperatures: list[float], *, likelihood: Any = None, **options: Any
) -> Tensor:
    """Spectral norms (S, N)."""
    meaning = {} if likelihood is None else {"likelihood": likelihood}
    found = linearize(model, inputs, **meaning, **options)
    norms = [fim_spectral_norm(found.logits, found.gram, temperature=t, **meaning) for t in temperatures]
    return torch.stack(norms)


def assert_from_below(found: SpectralNormEstimate, expected: Tensor, *, rounding: float = 1e-4) -> None:
    assert found.value.shape == found.residual.shape == found.converged.shape == expected.shape
    assert (found.value <= expected * (1 + rounding)).all()
    assert (found.value >= 0).all()
    assert (found.residual >= 0).all()


# --- the values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["krylov", "power"])
@every_network
def test_with_a_tight_tolerance_they_are_the_exact_ones(name: str, method: Any) -> None:
    model, inputs, _ = build(name, num_samples=4)
    expected = exact(model.double(), inputs.double(), TEMPERATURES)
    options = {"krylov": {"tolerance": 1e-5}, "power": {"tolerance": 1e-3, "max_products": 3000}}[method]
    found = fim_spectral_norm_matrix_free(model, inputs.double(), temperature=TEMPERATURES, method=method, **options)
    torch.testing.assert_close(found.value, expected, rtol=1e-5, atol=1e-12)
    assert found.converged.all()
    one = fim_spectral_norm_matrix_free(model, inputs.double(), temperature=3.0, method=method, **options)
    torch.testing.assert_close(one.value, expected[2], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("method", ["krylov", "power"])
@pytest.mark.parametrize("tolerance", [0.3, 0.03, 0.003])
def test_they_are_from_below_and_an_eigenvalue_is_within_the_residual(tolerance: float, method: Any) -> None:
    model, inputs = wide(dtype=torch.float64)
    options: dict[str, Any] = {"tolerance": tolerance, "max_products": 20, "method": method}
    found = fim_spectral_norm_matrix_free(model, inputs, temperature=TEMPERATURES, **options)
    assert_from_below(found, exact(model, inputs, TEMPERATURES), rounding=1e-9)
    small = found.residual <= tolerance * found.value
    assert (small | ~found.converged).all()
    assert torch.equal(small, found.converged) or method == "krylov"  # which also bounds the error
    linearization = linearize(model, inputs)
    for row, temperature in enumerate(TEMPERATURES):
        p = (linearization.logits / temperature).softmax(dim=1)
        factor = p.sqrt()[:, :, None] * (torch.eye(60).double() - p[:, None]) / temperature
        spectra = torch.linalg.eigvalsh(factor @ linearization.gram @ factor.mT)
        distances = (spectra - found.value[row][:, None]).abs().amin(dim=1)
        assert (distances <= found.residual[row] * (1 + 1e-9) + 1e-9 * spectra[:, -1]).all()


def test_by_default_they_are_within_a_percent_of_the_exact_ones() -> None:
    model, inputs = wide(300)
    shares = fim_spectral_norm_matrix_free(model, inputs, temperature=TEMPERATURES).value
    shares = shares / exact(model, inputs, TEMPERATURES)
    assert float(shares.median()) > 0.995
    assert float(shares.min()) > 0.97
    assert float(shares.max()) < 1 + 1e-4


def test_several_temperatures_cost_less_together_and_a_single_one_has_no_dimension() -> None:
    model, inputs = wide()
    together = fim_spectral_norm_matrix_free(model, inputs, temperature=TEMPERATURES)
    alone = [fim_spectral_norm_matrix_free(model, inputs, temperature=t) for t in TEMPERATURES]
    assert together.value.shape == (3, 12)
    assert together.num_products.shape == (12,)
    assert all(one.value.shape == one.converged.shape == (12,) for one in alone)
    assert (together.num_products <= sum(one.num_products for one in alone)).all()
    assert int(together.num_products.sum()) < 0.8 * int(sum(one.num_products for one in alone).sum())
    assert fim_spectral_norm_matrix_free(model, inputs, temperature=torch.tensor([2.0])).value.shape == (1, 12)
    assert fim_spectral_norm_matrix_free(model, inputs, temperature=torch.tensor(2.0)).value.shape == (12,)


def test_a_krylov_subspace_takes_fewer_products_than_power_iteration() -> None:
    model, inputs = wide()
    krylov, power = (
        fim_spectral_norm_matrix_free(model, inputs, method=method, tolerance=0.01, max_products=500)
        for method in ("krylov", "power")
    )
    assert krylov.converged.all()
    assert power.converged.all()
    assert 2 * int(krylov.num_products.sum()) < int(power.num_products.sum())


def test_too_few_products_are_said_not_to_converge() -> None:
    model, inputs = wide()
    found = fim_spectral_norm_matrix_free(model, inputs / 20, max_products=2)
    assert not found.converged.any()
    assert (found.num_products == 2).all()
    assert (found.residual > 0.005 * found.value).all()
    assert_from_below(found, exact(model, inputs / 20, [1.0])[0])


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_other_likelihoods_with_many_outputs(likelihood: Any) -> None:
    model, inputs = wide(40, dtype=torch.float64)
    expected = exact(model, inputs, TEMPERATURES, likelihood=likelihood)
    found = fim_spectral_norm_matrix_free(model, inputs, temperature=TEMPERATURES, likelihood=likelihood, **TIGHT)
    torch.testing.assert_close(found.value, expected, rtol=1e-5, atol=0)
    assert found.converged.all()
    rough = fim_spectral_norm_matrix_free(model, inputs, temperature=TEMPERATURES, likelihood=likelihood)
    assert_from_below(rough, expected, rounding=1e-9)
    assert float((rough.value / expected).median()) > 0.99


# --- where there is little to find ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["krylov", "power"])
def test_two_classes_have_information_of_rank_one_which_one_product_finds(method: Any) -> None:
    model, inputs = wide(2)
    found = fim_spectral_norm_matrix_free(model, inputs, temperature=TEMPERATURES, method=method)
    torch.testing.assert_close(found.value, exact(model, inputs, TEMPERATURES), rtol=1e-5, atol=0)
    assert found.converged.all()
    if method == "krylov":
        assert (found.num_products == 1).all()


def test_a_single_output_has_information_of_rank_one() -> None:
    model, inputs = wide(1)
    found = fim_spectral_norm_matrix_free(model, inputs, likelihood="gaussian")
    torch.testing.assert_close(found.value, exact(model, inputs, [1.0], likelihood="gaussian")[0], rtol=1e-5, atol=0)
    assert found.converged.all()


def test_inputs_of_few_features_are_done_when_the_subspace_is_the_whole_space() -> None:
    model, inputs = random_linear(0, num_classes=50, num_features=3), random(1, 6, 3)
    found = fim_spectral_norm_matrix_free(model, inputs, temperature=TEMPERATURES, tolerance=1e-12)
    torch.testing.assert_close(found.value, exact(model, inputs, TEMPERATURES), rtol=1e-9, atol=0)
    assert (found.num_products <= 3).all()


@pytest.mark.parametrize("method", ["krylov", "power"])
@pytest.mark.parametrize("scale", [50.0, 1e3], ids=["probabilities of 1 - 1e-40", "of exactly 1"])
def test_saturated_samples_have_the_small_values_that_exact_ones_have(scale: float, method: Any) -> None:
    model, inputs = wide(50, dtype=torch.float64)
    expected = exact(lambda x: scale * model(x), inputs, [1.0])[0]
    found = fim_spectral_norm_matrix_free(lambda x: scale * model(x), inputs, method=method)
    assert float(expected.min()) < 1e-30
    torch.testing.assert_close(found.value, expected, rtol=0.01, atol=1e-300)
    assert found.converged.all()
    single = fim_spectral_norm_matrix_free(lambda x: scale * model.float()(x), inputs.float(), tolerance=1e-3)
    seen = expected > 1e-37
    torch.testing.assert_close(single.value[seen].double(), expected[seen], rtol=0.02, atol=0)


@pytest.mark.parametrize("method", ["krylov", "power"])
def test_samples_where_a_network_is_constant_have_zeros_and_spoil_no_others(method: Any) -> None:
    model, inputs = wide()
    found = fim_spectral_norm_matrix_free(lambda x: 0 * model(x), inputs, method=method)
    assert not found.value.any()
    assert not found.residual.any()
    assert found.converged.all()

    def partly(x: Tensor) -> Tensor:
        return model(torch.where(x[:, :1] > 0, x, 0 * x))

    flat = ~(inputs[:, 0] > 0)
    assert 0 < int(flat.sum()) < len(flat)
    found = fim_spectral_norm_matrix_free(partly, inputs, method=method)
    assert torch.equal(found.value == 0, flat)
    assert found.converged[flat].all()
    alone = fim_spectral_norm_matrix_free(model, inputs[~flat], method=method)
    torch.testing.assert_close(found.value[~flat], alone.value, rtol=1e-5, atol=0)


@pytest.mark.parametrize("fill", [-torch.inf, -1e9, -1e4])
def test_masked_classes_count_as_little_as_if_the_network_did_not_have_them(fill: float) -> None:
    model, inputs = wide()
    masked = torch.arange(60) % 3 == 1
    expected = exact(lambda x: model(x)[:, ~masked], inputs, TEMPERATURES)
    found = fim_spectral_norm_matrix_free(
        lambda x: model(x).masked_fill(masked, fill), inputs, temperature=TEMPERATURES, **TIGHT
    )
    torch.testing.assert_close(found.value, expected, rtol=1e-4, atol=0)
    assert found.converged.all()


def test_samples_with_masks_over_all_classes_but_one_have_zeros() -> None:
    model, inputs = wide()

    def single(x: Tensor) -> Tensor:
        return model(x).masked_fill((x[:, :1] > 0) & (torch.arange(60) != 3), -torch.inf)

    found = fim_spectral_norm_matrix_free(single, inputs)
    alone = inputs[:, 0] > 0
    assert not found.value[alone].any()
    assert found.converged.all()
    assert (found.value[~alone] > 0).all()


# --- the same sample, the same value ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 12, 100])
@every_network
def test_values_do_not_depend_on_the_batch_its_order_or_the_chunks(name: str, chunk_size: int) -> None:
    model, inputs, _ = build(name, num_samples=6)
    options: dict[str, Any] = {"temperature": [0.5, 1.0]}
    together = fim_spectral_norm_matrix_free(model, inputs, **options)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    found = fim_spectral_norm_matrix_free(model, inputs[order], chunk_size=chunk_size, **options)
    size = together.value.amax()
    torch.testing.assert_close(found.value, together.value[:, order], rtol=1e-5, atol=1e-6 * float(size))
    assert torch.equal(found.num_products, together.num_products[order])
    assert torch.equal(found.converged, together.converged[:, order])


def test_a_generator_draws_other_signs_and_the_same_generator_the_same() -> None:
    model, inputs = wide()

    def products(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return fim_spectral_norm_matrix_free(model, inputs, generator=generator, max_products=2).value

    assert torch.equal(products(1), products(1))
    assert not torch.equal(products(1), products(2))
    assert torch.equal(products(None), products(None))
    generator = torch.Generator().manual_seed(1)
    state = torch.get_rng_state()
    fim_spectral_norm_matrix_free(model, inputs, generator=generator)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_that_are_done_leave_the_passes_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = wide()
    sizes: list[int] = []
    transposed = input_information_module.JacobianProducts.transposed

    def recorded(self: Any, vectors: Tensor) -> Tensor:
        sizes.append(len(vectors))
        return transposed(self, vectors)

    monkeypatch.setattr(input_information_module.JacobianProducts, "transposed", recorded)
    fim_spectral_norm_matrix_free(model, inputs)
    assert sizes[0] == 12
    assert sizes[-1] < 12
    assert sorted(sizes, reverse=True) == sizes


# --- options of the network -------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Takes the rows of an argument beside the inputs, and returns its logits in a dictionary."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, gate: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(x * gate), "features": x}


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_extras_belong_to_their_samples(chunk_size: int | None) -> None:
    model, inputs = wide()
    gates = torch.linspace(0.1, 1, 12)[:, None]
    gated, options = Gated(model), {"extras": {"gate": gates}}
    expected = exact(gated, inputs, [1.0], **options)[0]
    found = fim_spectral_norm_matrix_free(gated, inputs, chunk_size=chunk_size, **options, **TIGHT)
    torch.testing.assert_close(found.value, expected, rtol=1e-4, atol=0)


def test_input_std_gives_the_values_of_a_network_that_normalises_itself() -> None:
    model, mean, std = build("cnn_batchnorm")[0].double(), [0.5, 0.4, 0.3], [0.2, 0.5, 2.0]
    raw = random(3, 4, 3, 7, 7)
    expected = exact(Normalised(model, mean, std), raw, [1.0])[0]
    for given in (std, torch.tensor(std)):
        found = fim_spectral_norm_matrix_free(model, normalise(raw, mean, std), input_std=given, **TIGHT)
        torch.testing.assert_close(found.value, expected, rtol=1e-5, atol=0)
    half = fim_spectral_norm_matrix_free(model, raw, input_std=0.5, **TIGHT)
    torch.testing.assert_close(half.value, 4 * exact(model, raw, [1.0])[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_results_are_of_the_type_of_the_network_or_of_single_precision(dtype: torch.dtype) -> None:
    model, inputs = wide()
    found = fim_spectral_norm_matrix_free(model.to(dtype), inputs.to(dtype))
    expected = torch.float32 if dtype == torch.bfloat16 else dtype
    assert found.value.dtype == found.residual.dtype == expected
    assert found.converged.dtype == torch.bool
    assert found.num_products.dtype == torch.int64
    assert not found.value.requires_grad


def test_under_no_grad_and_inference_mode_as_everywhere() -> None:
    model, inputs = wide()
    expected = fim_spectral_norm_matrix_free(model, inputs).value
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(fim_spectral_norm_matrix_free(model, inputs).value, expected)


# --- the trace --------------------------------------------------------------------------------------------------------


def test_the_trace_is_unbiased_and_most_of_it_is_known() -> None:
    model, inputs = wide(dtype=torch.float64)
    linearization = linearize(model, inputs)
    expected = fim_trace(linearization.logits, linearization.gram)
    kind, generator = likelihood_of("categorical"), torch.Generator().manual_seed(0)
    found = input_information(  # every sample draws signs of its own
        model, inputs.repeat(300, 1), temperatures=[0.5, 1.0], likelihood=kind, generator=generator
    )
    traces = found.trace.view(300, 12)
    stderr = traces.std(dim=0) / len(traces) ** 0.5
    off = (traces.mean(dim=0) - expected) / stderr.clamp_min(1e-9 * expected)
    assert float(off.abs().max()) < 3.5  # of twelve samples
    assert float(off.square().mean().sqrt()) < 1.7
    assert float((traces.std(dim=0) / expected).max()) < 0.3  # a plain estimate of the trace has about 0.6
    means = traces.mean(dim=1)  # as the metric reports them, with the spread of samples beside that of signs
    errors = traces.std(dim=1) / len(inputs) ** 0.5
    covered = (means - expected.mean()).abs() <= 2 * errors
    assert float(covered.double().mean()) > 0.95


# --- what is refused --------------------------------------------------------------------------------------------------


WITHOUT: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "detached": lambda model: lambda x: model(x.detach()),
    "rounded": lambda model: lambda x: model(x).round(decimals=1),
    "some samples": lambda model: lambda x: torch.where(x[:, :1] > 0, model(x), model(x.detach())),
}


@pytest.mark.parametrize("method", ["krylov", "power"])
@pytest.mark.parametrize("name", WITHOUT)
def test_outputs_that_change_without_gradients_are_refused(name: str, method: Any) -> None:
    model, inputs = wide()
    with pytest.raises(ValueError, match=r"change without any.*perfect robustness"):
        fim_spectral_norm_matrix_free(WITHOUT[name](model), inputs, method=method)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temperature": 0.0}, ValueError, "`temperature` to be positive and finite"),
        ({"temperature": [1.0, -1.0]}, ValueError, "`temperature` to be positive and finite"),
        ({"temperature": []}, ValueError, r"`temperature` to be positive and finite.*but got \[\]"),
        ({"temperature": "1"}, ValueError, "`temperature` to be positive and finite"),
        ({"temperature": float("nan")}, ValueError, "`temperature` to be positive and finite"),
        ({"method": "lanczos"}, ValueError, "`method` to be .*'krylov'.*'power'.* but got 'lanczos'"),
        ({"tolerance": 0}, ValueError, "`tolerance` to be a positive number"),
        ({"max_products": 0}, ValueError, "`max_products` to be a positive integer, but got 0"),
        ({"max_products": 2.5}, ValueError, "`max_products` to be a positive integer"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` to be a positive integer"),
        ({"generator": 3}, TypeError, "`generator` to be"),
        ({"likelihood": "poisson"}, ValueError, "`likelihood` to be"),
        ({"input_std": -1.0}, ValueError, "`input_std`"),
        ({"extras": {"mask": torch.ones(3)}}, ValueError, "`extras` to hold one row per sample"),
        ({"extras": [1]}, TypeError, "`extras`"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model, inputs = wide()
    with pytest.raises(error, match=words):
        fim_spectral_norm_matrix_free(model, inputs, **options)


def test_wrong_inputs_and_outputs_are_refused() -> None:
    model, inputs = wide()
    with pytest.raises(TypeError, match="integers, such as token ids"):
        fim_spectral_norm_matrix_free(model, inputs.long())
    with pytest.raises(ValueError, match="Expected finite inputs"):
        fim_spectral_norm_matrix_free(model, inputs / 0)
    with pytest.raises(ValueError, match="at least one sample"):
        fim_spectral_norm_matrix_free(model, inputs[:0])
    with pytest.raises(TypeError, match="`model`"):
        fim_spectral_norm_matrix_free(3, inputs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="A single output z of a binary classifier"):
        fim_spectral_norm_matrix_free(lambda x: model(x)[:, :1], inputs)
    with pytest.raises(ValueError, match="Expected finite logits"):
        fim_spectral_norm_matrix_free(lambda x: model(x) / 0, inputs)
    with pytest.raises(ValueError, match="place"):
        fim_spectral_norm_matrix_free(lambda x: model(x * torch.arange(len(x))[:, None]), inputs, chunk_size=5)


def test_gradients_that_are_not_finite_are_refused() -> None:
    model, inputs = wide()
    with pytest.raises(ValueError, match="Expected finite gradients"):
        fim_spectral_norm_matrix_free(lambda x: model(x) + (x - x.detach()).sum(dim=1, keepdim=True).sqrt(), inputs)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_grows_with_the_chunk_size_and_not_with_the_number_of_samples_or_classes() -> None:
    def peak(num_samples: int, chunk_size: int, num_classes: int = 40) -> int:
        model, inputs = nn.Linear(2_000, num_classes), random(0, num_samples, 2_000, dtype=torch.float32)
        with PeakMemory() as memory:
            fim_spectral_norm_matrix_free(model, inputs, chunk_size=chunk_size, max_products=5)
        return memory.peak

    few = peak(4, 1)
    assert peak(10, 1) - few < 1.1 * 6 * 2_000 * 7  # while the inputs are checked
    assert 1.5 * few < peak(4, 4)
    assert peak(4, 1, 400) < 1.5 * few
