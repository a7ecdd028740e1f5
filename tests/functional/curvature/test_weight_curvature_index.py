"""The index follows its definition, is invariant to rescaling of layers, and always has a finite error bar."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_robust.functional import hessian_trace, weight_curvature_index
from lightning_robust.functional.curvature.weight_curvature_index import curvature_slopes, curvature_terms, weight_norms
from tests.helpers.curvature import Case, relu_mlp, seeded, small
from tests.helpers.recording import state_of


def index_of(case: Case) -> float:
    norms = weight_norms(case.model)
    traces = hessian_trace(*case, rtol=None).layers
    return float(weight_curvature_index(list(norms.values()), [float(traces[name]) for name in norms]))


# --- the sum --------------------------------------------------------------------------------------------------------


def test_the_index_is_the_sum_of_norms_times_roots_of_traces() -> None:
    assert float(weight_curvature_index([3.0, 0.5, 2.0], [4.0, 16.0, 0.0])) == 3 * 2 + 0.5 * 4
    norms, traces = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([2.0, 3.0], dtype=torch.float64)
    actual = weight_curvature_index(norms, traces)
    assert float(actual) == pytest.approx(math.sqrt(2) + 2 * math.sqrt(3), rel=1e-12)
    assert actual.shape == ()
    assert actual.dtype == torch.float64
    assert curvature_terms(norms, traces).tolist() == pytest.approx([math.sqrt(2), 2 * math.sqrt(3)])


def test_a_negative_trace_counts_as_zero() -> None:
    assert float(weight_curvature_index([1.0, 2.0], [-1.0, 9.0])) == 6
    assert float(weight_curvature_index([1.0], [-1e-30])) == 0


def test_the_index_of_no_layers_is_zero() -> None:
    assert weight_curvature_index(torch.zeros(0), torch.zeros(0)) == 0


def test_the_index_of_softmax_regression_has_a_closed_form() -> None:
    case = seeded(lambda: nn.Linear(5, 2), 5)
    p = case.model(case.inputs).detach().softmax(dim=1)[:, 0]
    trace = (2 * p * (1 - p) * case.inputs.square().sum(dim=1)).mean()
    assert index_of(case) == pytest.approx(float(case.model.weight.detach().norm() * trace.sqrt()), rel=1e-5)


@pytest.mark.parametrize("factor", [0.1, 7.0])
def test_rescaling_consecutive_layers_of_a_piecewise_linear_network_moves_the_trace_but_not_the_index(
    factor: float,
) -> None:
    case = seeded(lambda: relu_mlp(num_classes=2), 5)  # two classes have no noise
    index, trace = index_of(case), float(hessian_trace(*case).total)
    with torch.no_grad():
        case.model[0].weight.mul_(factor)
        case.model[0].bias.mul_(factor)
        case.model[2].weight.div_(factor)
    assert index_of(case) == pytest.approx(index, rel=1e-4)
    assert float(hessian_trace(*case).total) != pytest.approx(trace, rel=0.1)


@pytest.mark.parametrize(
    ("norms", "traces"),
    [
        ([1.0, 2.0], [1.0]),
        ([[1.0], [2.0]], [[1.0], [2.0]]),
        (torch.tensor(1.0), torch.tensor(1.0)),
        ([-1.0], [1.0]),
        ([math.nan], [1.0]),
        ([1.0], [math.nan]),
        ([1.0], [math.inf]),
        ([math.inf], [0.0]),
    ],
    ids=["lengths", "two dimensions", "no dimension", "negative", "nan norm", "nan trace", "inf trace", "inf norm"],
)
def test_norms_and_traces_must_be_one_finite_number_per_layer(norms: Sequence[Any], traces: Sequence[Any]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        weight_curvature_index(norms, traces)


# --- norms ----------------------------------------------------------------------------------------------------------


def test_norms_cover_trained_tensors_with_at_least_two_dimensions() -> None:
    model = small("relu_cnn").model
    expected = {
        name: float(model[int(name[0])].weight.detach().norm()) for name in ("0.weight", "4.weight", "8.weight")
    }
    before = state_of(model)
    assert {name: float(norm) for name, norm in weight_norms(model).items()} == pytest.approx(expected)
    assert state_of(model) == before
    model[4].weight.requires_grad_(requires_grad=False)
    assert list(weight_norms(model)) == ["0.weight", "8.weight"]
    assert list(weight_norms(model, module=model[8])) == ["weight"]


def test_norms_of_half_precision_are_summed_in_single_precision() -> None:
    model = nn.Linear(300, 300, bias=False).bfloat16()
    expected = float(model.weight.detach().float().norm())
    (norm,) = weight_norms(model).values()
    assert norm.dtype == torch.float32
    assert not norm.requires_grad
    assert float(norm) == pytest.approx(expected, rel=1e-6)


# --- slopes ---------------------------------------------------------------------------------------------------------


def test_slopes_are_derivatives_of_the_terms_where_the_error_is_small() -> None:
    norms, traces = torch.tensor([1.0, 0.3, 4.0]).double(), torch.tensor([2.0, 50.0, 0.1]).double()
    h = 1e-6
    expected = (curvature_terms(norms, traces + h) - curvature_terms(norms, traces - h)) / (2 * h)
    for share in (0.0, 1e-9, 1e-5):
        actual = curvature_slopes(norms, traces, share * traces)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_slopes_are_secants_over_one_standard_error_where_it_is_large() -> None:
    norms, traces, stderr = (torch.tensor(v, dtype=torch.float64) for v in ([2.0, 1.0], [0.0, 3.0], [0.25, 6.0]))
    expected = (curvature_terms(norms, traces + stderr) - curvature_terms(norms, traces)) / stderr
    torch.testing.assert_close(curvature_slopes(norms, traces, stderr), expected)
    assert float(curvature_slopes(norms, traces, stderr)[0]) == 2 / math.sqrt(0.25)


@pytest.mark.parametrize("trace", [0.0, -1.0, 1e-300])
@pytest.mark.parametrize("stderr", [0.0, 1e-300, 1.0, math.nan])
def test_slopes_are_finite_everywhere(trace: float, stderr: float) -> None:
    slopes = curvature_slopes(torch.ones(1).double(), torch.tensor([trace]).double(), torch.tensor([stderr]).double())
    assert slopes.isfinite().all()
    assert (slopes >= 0).all()


def test_the_bias_of_the_root_of_a_noisy_trace_is_as_documented() -> None:
    """``Var / 8 tr^{3/2}``, from the second derivative of the root."""
    noise = 0.1 * torch.randn(10**6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    terms = curvature_terms(torch.ones(1).double(), 2.0 + noise)
    missing, stderr = math.sqrt(2) - float(terms.mean()), float(terms.std()) / 1000
    assert missing == pytest.approx(0.1**2 / (8 * 2**1.5), abs=3 * stderr)


def test_norms_of_a_plain_function_are_refused() -> None:
    with pytest.raises(ValueError, match="plain function"):
        weight_norms(F.relu)
