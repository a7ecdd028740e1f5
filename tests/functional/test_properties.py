"""Laws that estimators and metrics obey for any network, samples, dtype and chunk size."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_robust import (
    AdversarialAccuracy,
    FisherSpectralNorm,
    HessianTrace,
    LinearizedAccuracy,
    Probe,
    ProbeMetric,
    WeightCurvatureIndex,
)
from lightning_robust.functional import (
    Linearization,
    calibrated_fim_spectral_norm,
    fim_spectral_norm,
    fim_trace,
    fit_temperature,
    hessian_trace,
    linearize,
    linearized_accuracy,
    linearized_margin,
    linearized_margin_linf,
    saturated,
)
from tests.helpers.networks import random
from tests.helpers.oracles import Scaled, dense_hessian_traces, dense_margins, dense_spectral_norms, dense_traces

HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64)
# Sums of a few dozen products in float64, in a different order, and eigenvalues of the results.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
METRICS: dict[str, Callable[[], ProbeMetric]] = {
    "fisher": FisherSpectralNorm,
    "linf": lambda: LinearizedAccuracy([0.05, 0.2]),
    "l2": lambda: LinearizedAccuracy([0.1, 0.5], "l2"),
    "adversarial": lambda: AdversarialAccuracy([0.1], steps=2),
    "trace": HessianTrace,
    "wci": lambda: WeightCurvatureIndex(num_probes=3),
}


class Case(NamedTuple):
    """A network, samples and class indices, about half of which are its predictions."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor


def draw_case(
    seed: int, shape: tuple[int, ...], num_classes: int, num_samples: int, *, smooth: bool, dtype: torch.dtype
) -> Case:
    features, hidden = math.prod(shape), 5
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(features, hidden), nn.Tanh() if smooth else nn.ReLU(), nn.Linear(hidden, num_classes)
    ).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(random(seed + number, *parameter.shape) / parameter.shape[-1] ** 0.5)
    inputs = random(seed + 10, num_samples, *shape)
    predictions = model(inputs).argmax(dim=1)
    others = torch.randint(0, num_classes, (num_samples,), generator=torch.Generator().manual_seed(seed))
    targets = torch.where(torch.arange(num_samples) % 2 == 0, predictions, others)
    return Case(model.to(dtype), inputs.to(dtype), targets)


def cases(
    *, smooth: st.SearchStrategy[bool] | None = None, dtypes: tuple[torch.dtype, ...] = (torch.float64,)
) -> st.SearchStrategy[Case]:
    return st.builds(
        draw_case,
        seed=st.integers(0, 2**31),
        shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
        num_classes=st.integers(2, 12),
        num_samples=st.integers(1, 9),
        smooth=st.booleans() if smooth is None else smooth,
        dtype=st.sampled_from(dtypes),
    )


chunk_sizes = st.none() | st.integers(1, 12)
scales = st.floats(0.01, 100)


def some(max_examples: int) -> settings:
    return settings(max_examples=max_examples, deadline=None, derandomize=True, database=None)


def margins(at: Linearization, targets: Tensor) -> dict[str, Tensor]:
    assert at.gap_l1 is not None
    return {
        "l2": linearized_margin(at.logits, at.gram, targets),
        "linf": linearized_margin_linf(at.logits, at.gap_l1, targets),
    }


def quantities(at: Linearization, targets: Tensor) -> dict[str, Tensor]:
    """Every quantity computed from a linearisation, sample by sample."""
    calibrated = calibrated_fim_spectral_norm(at.logits, at.gram, targets)
    return {
        "norm": fim_spectral_norm(at.logits, at.gram),
        "trace": fim_trace(at.logits, at.gram),
        "calibrated": calibrated.value,
        "temperature": calibrated.temperature.expand(len(targets)),
        "saturated": saturated(at.logits).double(),
        **margins(at, targets),
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float, atol: float) -> None:
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


def measured(name: str, probes: list[Probe]) -> dict[str, Tensor]:
    metric = METRICS[name]()
    for probe in probes:
        metric.update(probe)
    return metric.compute()


# --- against dense matrices -----------------------------------------------------------------------------------------


@some(25)
@given(case=cases(), chunk_size=chunk_sizes)
def test_all_quantities_agree_with_dense_matrices(case: Case, chunk_size: int | None) -> None:
    at = linearize(case.model, case.inputs, chunk_size=chunk_size)
    expected = {
        "norm": dense_spectral_norms(case.model, case.inputs),
        "trace": dense_traces(case.model, case.inputs),
        "l2": dense_margins(*case, dual=2),
        "linf": dense_margins(*case, dual=1),
    }
    actual = quantities(at, case.targets)
    # if all hidden units are off, the remaining gradients are zero, in the oracle up to rounding
    assert_same({key: actual[key] for key in expected}, expected, **CLOSE)


@some(25)
@given(case=cases(dtypes=(torch.float32,)), chunk_size=chunk_sizes)
def test_single_precision_costs_no_more_than_rounding(case: Case, chunk_size: int | None) -> None:
    """An error of δ in each logit and, relative to ‖J‖, in the Jacobian, moves λ and the trace by a few δ ‖J‖²."""
    at = linearize(case.model, case.inputs, chunk_size=chunk_size)
    exact = linearize(case.model.double(), case.inputs.double())
    squared = exact.gram.diagonal(dim1=1, dim2=2).sum(dim=1)
    delta = 64 * torch.finfo(torch.float32).eps * (1 + exact.logits.abs().amax(dim=1))  # 64: no sum here is longer
    for quantity in (fim_spectral_norm, fim_trace):
        error = quantity(at.logits, at.gram).double() - quantity(exact.logits, exact.gram)
        assert (error.abs() <= 4 * delta * squared).all()


@some(20)
@given(case=cases(smooth=st.just(value=False)), chunk_size=chunk_sizes)
def test_one_probe_less_than_classes_gives_the_hessian_of_a_piecewise_linear_network_exactly(
    case: Case, chunk_size: int | None
) -> None:
    num_classes = case.model(case.inputs).shape[1]
    estimate = hessian_trace(*case, num_probes=num_classes - 1, rtol=None, chunk_size=chunk_size)
    expected = dense_hessian_traces(*case, nn.functional.cross_entropy)
    assert {name: float(trace) for name, trace in estimate.layers.items()} == pytest.approx(
        expected, rel=1e-9, abs=1e-12
    )


# --- how samples are cut up -----------------------------------------------------------------------------------------


@some(40)
@given(case=cases(dtypes=FLOATS), chunk_size=chunk_sizes, data=st.data())
def test_samples_are_linearised_each_for_itself_whatever_the_order_and_the_chunks(
    case: Case, chunk_size: int | None, data: st.DataObject
) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(case.inputs)))))
    whole, shuffled = (
        linearize(case.model, case.inputs),
        linearize(case.model, case.inputs[order], chunk_size=chunk_size),
    )
    eps = torch.finfo(case.inputs.dtype).eps
    for field in ("logits", "gram", "gap_l1"):
        expected = getattr(whole, field)[order]
        size = float(expected.abs().max())
        # kernels for other batch sizes sum up to 64 products in a different order
        torch.testing.assert_close(getattr(shuffled, field), expected, rtol=0, atol=64 * eps * size)


@pytest.mark.parametrize("name", METRICS)
@some(12)
@given(case=cases(), chunk_size=chunk_sizes, data=st.data())
def test_metrics_do_not_depend_on_order_chunks_and_batches(
    name: str, case: Case, chunk_size: int | None, data: st.DataObject
) -> None:
    n = len(case.inputs)
    order = torch.tensor(data.draw(st.permutations(range(n))))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=3)))  # equal ones make batches without samples
    whole = measured(name, [Probe(*case)])
    parts = [order[start:stop] for start, stop in pairwise([0, *cuts, n])]
    probes = [Probe(case.model, case.inputs[p], case.targets[p], chunk_size=chunk_size) for p in parts]
    size = max(float(value.abs()) for value in whole.values() if value.isfinite())
    # error bars are roots of differences of squares, so a zero becomes the root of a rounding error
    together = measured(name, probes)
    assert_same(together, whole, rtol=1e-5, atol=1e-6 * size)
    assert_same(without_errors(together), without_errors(whole), rtol=1e-8, atol=1e-11 * size)


def without_errors(values: dict[str, Tensor]) -> dict[str, Tensor]:
    suffixes = ("_stderr", "_stderr_probes", "_lower", "_upper")
    return {key: value for key, value in values.items() if not key.endswith(suffixes)}


@pytest.mark.parametrize(
    "name", sorted(METRICS.keys() - {"fisher"})
)  # whose temperature is smoothed less among more samples
@some(6)
@given(case=cases(dtypes=FLOATS), times=st.integers(2, 3))
def test_means_do_not_change_when_all_samples_come_several_times(name: str, case: Case, times: int) -> None:
    once, often = measured(name, [Probe(*case)]), measured(name, [Probe(*case)] * times)
    headline = next(iter(once))
    torch.testing.assert_close(often[headline], once[headline], rtol=1e-12, atol=0)


# --- scales ---------------------------------------------------------------------------------------------------------


@some(30)
@given(case=cases(), std=scales, chunk_size=chunk_sizes)
def test_the_unit_of_the_input_is_all_that_its_deviation_changes(
    case: Case, std: float, chunk_size: int | None
) -> None:
    plain = linearize(case.model, case.inputs, chunk_size=chunk_size)
    scaled = linearize(case.model, case.inputs, input_std=std, chunk_size=chunk_size)
    assert torch.equal(scaled.logits, plain.logits)
    torch.testing.assert_close(scaled.gram * std**2, plain.gram, **CLOSE)
    before, after = quantities(plain, case.targets), quantities(scaled, case.targets)
    for key in ("norm", "trace", "calibrated"):
        torch.testing.assert_close(after[key] * std**2, before[key], **CLOSE)
    for key in ("l2", "linf"):
        torch.testing.assert_close(after[key], std * before[key], **CLOSE)


@some(30)
@given(case=cases(), factor=scales)
def test_multiplying_logits_moves_the_information_and_neither_margins_nor_what_is_calibrated(
    case: Case, factor: float
) -> None:
    plain, scaled = linearize(case.model, case.inputs), linearize(Scaled(case.model, factor), case.inputs)
    torch.testing.assert_close(scaled.gram, factor**2 * plain.gram, rtol=1e-9, atol=1e-12 * factor**2)
    before, after = quantities(plain, case.targets), quantities(scaled, case.targets)
    torch.testing.assert_close(after["temperature"], factor * before["temperature"], **CLOSE)
    assert_same(
        {key: after[key] for key in ("l2", "linf", "calibrated")},
        {key: before[key] for key in ("l2", "linf", "calibrated")},
        **CLOSE,
    )
    for quantity in (fim_spectral_norm, fim_trace):
        torch.testing.assert_close(
            quantity(scaled.logits, scaled.gram, temperature=factor), quantity(plain.logits, plain.gram), **CLOSE
        )
        divided = quantity(plain.logits / factor, plain.gram / factor**2)
        torch.testing.assert_close(quantity(plain.logits, plain.gram, temperature=factor), divided, **CLOSE)


class Shifted(nn.Module):
    """A network with the same function of the input added to all of its logits."""

    def __init__(self, model: nn.Module, slope: float, shift: float) -> None:
        super().__init__()
        self.model, self.slope, self.shift = model, slope, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + self.shift + self.slope * x.reshape(len(x), -1).sin().sum(dim=1, keepdim=True)


@some(30)
@given(case=cases(), slope=st.floats(-10, 10), shift=st.floats(-100, 100))
def test_what_is_common_to_all_logits_changes_nothing(case: Case, slope: float, shift: float) -> None:
    plain, moved = linearize(case.model, case.inputs), linearize(Shifted(case.model, slope, shift), case.inputs)
    # up to rounding (1e-16) of the added squared slopes in the Gram matrix, and its root where they cancel
    size = float(moved.gram.abs().max()) + float(moved.logits.abs().max()) + 1
    before, after = quantities(plain, case.targets), quantities(moved, case.targets)
    for key in ("norm", "trace", "saturated"):
        torch.testing.assert_close(after[key], before[key], rtol=1e-9, atol=1e-13 * size)


@some(30)
@given(case=cases(), data=st.data())
def test_the_names_of_classes_do_not_matter(case: Case, data: st.DataObject) -> None:
    at = linearize(case.model, case.inputs)
    order = torch.tensor(data.draw(st.permutations(range(at.logits.shape[1]))))
    assert at.gap_l1 is not None
    renamed = Linearization(at.logits[:, order], at.gram[:, order][:, :, order], at.gap_l1[:, order])
    assert_same(quantities(renamed, order.argsort()[case.targets]), quantities(at, case.targets), **CLOSE)


# --- bounds ---------------------------------------------------------------------------------------------------------


@some(30)
@given(case=cases(dtypes=(*FLOATS, *HALF)), chunk_size=chunk_sizes)
def test_gram_matrices_are_symmetric_and_positive_semi_definite_and_gaps_are_norms(
    case: Case, chunk_size: int | None
) -> None:
    at = linearize(case.model, case.inputs, chunk_size=chunk_size)
    trace = at.gram.diagonal(dim1=1, dim2=2).sum(dim=1)
    torch.testing.assert_close(at.gram, at.gram.mT, rtol=1e-12, atol=0)  # products of the same rows, in float64
    assert (torch.linalg.eigvalsh(at.gram)[:, 0] >= -1e-14 * len(at.gram[0]) * trace).all()
    assert at.gap_l1 is not None
    assert (at.gap_l1 >= 0).all()
    assert not at.gap_l1.gather(1, at.logits.argmax(dim=1, keepdim=True)).any()


@some(60)
@given(
    logits=st.integers(2, 12).flatmap(
        lambda c: st.lists(
            st.lists(st.sampled_from([-200.0, 200.0]) | st.floats(-200, 200, width=32), min_size=c, max_size=c),
            min_size=1,
            max_size=9,
        )
    ),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(FLOATS),
)
def test_nothing_is_infinite_or_negative_at_logits_of_200(
    logits: list[list[float]], seed: int, dtype: torch.dtype
) -> None:
    z = torch.tensor(logits, dtype=dtype)
    n, c = z.shape
    jacobian = random(seed, n, c, 3, dtype=dtype)
    at = Linearization(
        z, jacobian @ jacobian.mT, torch.cdist(jacobian, jacobian, p=1)[torch.arange(n), z.argmax(dim=1)]
    )
    targets = torch.randint(0, c, (n,), generator=torch.Generator().manual_seed(seed))
    for key, value in quantities(at, targets).items():
        assert value.isfinite().all(), key
        assert (value >= 0).all(), key
    assert fit_temperature(z, targets) > 0


@some(60)
@given(
    values=st.lists(st.floats(0, math.inf), min_size=1, max_size=9),
    epsilons=st.lists(st.floats(0, 1e30), min_size=1, max_size=9),
    dtype=st.sampled_from((*FLOATS, *HALF)),
)
def test_predicted_accuracy_is_a_share_that_never_rises_with_epsilon(
    values: list[float], epsilons: list[float], dtype: torch.dtype
) -> None:
    given_margins = torch.tensor(values, dtype=dtype)
    curve = linearized_accuracy(given_margins, sorted(epsilons))
    assert ((curve >= 0) & (curve <= 1)).all()
    assert (curve.diff() <= 0).all()
    at_once = torch.tensor([float(linearized_accuracy(given_margins, [epsilon])) for epsilon in sorted(epsilons)])
    torch.testing.assert_close(curve.float(), at_once, rtol=0, atol=0)


# --- half precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fisher", "linf", "l2", "adversarial"])
@some(8)
@given(case=cases(dtypes=HALF), chunk_size=chunk_sizes)
def test_networks_in_half_precision_are_measured_as_their_copies_in_single_precision(
    name: str, case: Case, chunk_size: int | None
) -> None:
    half = measured(name, [Probe(*case, chunk_size=chunk_size)])
    single = measured(name, [Probe(case.model.float(), case.inputs.float(), case.targets, chunk_size=chunk_size)])
    assert half.keys() == single.keys()
    for key, value in half.items():
        torch.testing.assert_close(value, single[key], rtol=0, atol=0)


@some(12)
@given(case=cases(dtypes=HALF), estimator=st.sampled_from(["auto", "gauss_newton", "hutchinson"]))
def test_so_is_curvature_with_the_same_random_signs(case: Case, estimator: Any) -> None:
    """Without a generator the signs follow from the bits of the samples, which differ between dtypes."""

    def traces(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return hessian_trace(model, inputs, case.targets, estimator=estimator, rtol=None, generator=generator).layers

    half = traces(case.model, case.inputs)
    assert_same(half, traces(case.model.float(), case.inputs.float()), rtol=0, atol=0)
