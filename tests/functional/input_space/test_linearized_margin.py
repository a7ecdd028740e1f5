from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_robust.functional import linearize, linearized_accuracy, linearized_margin, linearized_margin_linf
from tests.helpers.networks import NETWORKS, Linear, build, random, random_linear
from tests.helpers.oracles import dense_margins

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
DUAL = {"l2": 2, "linf": 1}

every_norm = pytest.mark.parametrize("norm", DUAL)


def margins(model: torch.nn.Module, inputs: Tensor, targets: Tensor, *, norm: str) -> Tensor:
    at = linearize(model, inputs)
    if norm == "l2":
        return linearized_margin(at.logits, at.gram, targets)
    assert at.gap_l1 is not None
    return linearized_margin_linf(at.logits, at.gap_l1, targets)


@cache
def dense_truth(name: str, norm: str) -> Tensor:
    return dense_margins(*build(name), dual=DUAL[norm])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@every_norm
@pytest.mark.parametrize("name", NETWORKS)
def test_margins_agree_with_one_gradient_per_pair_of_classes(name: str, norm: str, dtype: torch.dtype) -> None:
    model, inputs, targets = build(name)
    actual, expected = margins(model.to(dtype), inputs.to(dtype), targets, norm=norm), dense_truth(name, norm)
    assert 0 < expected.count_nonzero() < len(expected)  # right and wrong predictions are both covered
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=0)


@every_norm
@pytest.mark.parametrize("seed", range(3))
def test_the_margin_is_the_exact_distance_to_the_nearest_boundary_of_a_linear_network(seed: int, norm: str) -> None:
    model, inputs = random_linear(seed, num_classes=4, num_features=5), random(seed + 10, 8, 5)
    logits, weight = model(inputs).detach(), model.weight.detach()
    targets = logits.argmax(dim=1)
    actual = margins(model, inputs, targets, norm=norm)
    for x, z, y, r in zip(inputs, logits, targets, actual, strict=True):
        gaps = (weight - weight[y])[torch.arange(4) != y]  # directions towards the other classes
        distances = (z[y] - z[torch.arange(4) != y]) / torch.linalg.vector_norm(gaps, ord=DUAL[norm], dim=1)
        nearest = gaps[distances.argmin()]
        torch.testing.assert_close(r, distances.min(), rtol=1e-12, atol=0)
        step = nearest / nearest.norm() if norm == "l2" else nearest.sign()
        short, past = (model((x + factor * r * step)[None]).argmax() for factor in (1 - 1e-6, 1 + 1e-6))
        assert short == y != past


@every_norm
def test_no_perturbation_within_the_margin_changes_the_class_of_a_linear_network(norm: str) -> None:
    model, inputs = random_linear(0, num_classes=5, num_features=6), random(1, 10, 6)
    targets = model(inputs).argmax(dim=1)
    radii = margins(model, inputs, targets, norm=norm)
    noise = random(2, 500, 10, 6)
    noise = noise / torch.linalg.vector_norm(noise, dim=2, keepdim=True) if norm == "l2" else noise.sign()
    moved = inputs + 0.999999 * radii[:, None] * noise
    assert (model(moved.reshape(-1, 6)).argmax(dim=1) == targets.repeat(500)).all()


@every_norm
def test_the_margin_is_zero_where_misclassified_or_tied(norm: str) -> None:
    model = Linear(torch.eye(3))
    inputs = torch.tensor([[1.0, 2.0, 0.0], [2.0, 2.0, 0.0], [3.0, 2.0, 0.0]])
    actual = margins(model, inputs, torch.tensor([0, 0, 0]), norm=norm)
    assert actual[:2].tolist() == [0, 0]
    assert actual[2] > 0


@every_norm
def test_the_margin_is_infinite_where_no_gradient_leads_to_another_class(norm: str) -> None:
    constant, tied = (Linear(torch.zeros(3, 4), torch.tensor(bias)) for bias in ([1.0, 0.0, -1.0], [1.0, 1.0, -1.0]))
    inputs = random(0, 2, 4, dtype=torch.float32)
    assert margins(constant, inputs, torch.tensor([0, 1]), norm=norm).tolist() == [torch.inf, 0]
    assert margins(tied, inputs, torch.tensor([0, 1]), norm=norm).tolist() == [0, 0]


@every_norm
def test_gradients_that_differ_by_rounding_alone_give_no_nan(norm: str) -> None:
    weight = random(0, 1, 100, dtype=torch.float32) * (1 + 1e-7 * random(1, 50, 100, dtype=torch.float32))
    model, inputs = Linear(weight, torch.arange(50.0)), random(2, 8, 100, dtype=torch.float32)
    actual = margins(model, inputs, torch.full((8,), 49), norm=norm)
    assert (actual > 100).all()


@every_norm
def test_a_class_that_cannot_be_reached_does_not_count(norm: str) -> None:
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # classes 0 and 1 move together
    model = Linear(weight, torch.tensor([1.0, 0.9, 0.0]))
    actual = margins(model, torch.tensor([[0.0, 0.0]]), torch.tensor([0]), norm=norm)
    torch.testing.assert_close(actual.double(), torch.tensor([1 / (2**0.5 if norm == "l2" else 2)]).double())


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**31),
    num_classes=st.integers(2, 7),
    features=st.integers(1, 9),
    factor=st.floats(1e-3, 1e3),
)
def test_margins_ignore_the_scale_of_the_logits_and_order_as_the_norms_do(
    seed: int, num_classes: int, features: int, factor: float
) -> None:
    model = random_linear(seed, num_classes=num_classes, num_features=features)
    inputs = random(seed + 1, 6, features)
    targets = model(inputs).argmax(dim=1)
    l2, linf = (margins(model, inputs, targets, norm=norm) for norm in ("l2", "linf"))
    assert (linf <= l2 * (1 + 1e-9)).all()
    assert (l2 <= features**0.5 * linf * (1 + 1e-9)).all()
    scaled = Linear(factor * model.weight.detach(), factor * model.bias.detach())
    for norm, expected in (("l2", l2), ("linf", linf)):
        torch.testing.assert_close(margins(scaled, inputs, targets, norm=norm), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@every_norm
def test_class_indices_of_any_integer_type_are_the_same(norm: str, dtype: torch.dtype) -> None:
    model, inputs, targets = build("mlp")
    expected = margins(model, inputs, targets, norm=norm)
    assert torch.equal(margins(model, inputs, targets.to(dtype), norm=norm), expected)


# --- linearised accuracy --------------------------------------------------------------------------------------------


def test_accuracy_is_the_share_of_larger_margins() -> None:
    accuracy = linearized_accuracy(torch.tensor([0.0, 0.1, 0.2, torch.inf]), [0.0, 0.1, 0.15, 1e9])
    assert accuracy.tolist() == [0.75, 0.5, 0.5, 0.25]


@every_norm
@pytest.mark.parametrize("name", NETWORKS)
def test_accuracy_at_zero_is_the_clean_accuracy(name: str, norm: str) -> None:
    model, inputs, targets = build(name, num_samples=20)
    predictions = linearize(model, inputs).logits.argmax(dim=1)
    actual = linearized_accuracy(margins(model, inputs, targets, norm=norm), [0.0])
    torch.testing.assert_close(float(actual), float((predictions == targets).double().mean()), rtol=1e-6, atol=0)


@every_norm
def test_accuracy_never_rises_with_epsilon(norm: str) -> None:
    model, inputs, targets = build("cnn_batchnorm", num_samples=50)
    curve = linearized_accuracy(margins(model, inputs, targets, norm=norm), torch.linspace(0, 3, 100))
    assert (curve.diff() <= 0).all()
    assert curve[0] > curve[-1]


@pytest.mark.parametrize("epsilons", [[-0.1], [0.1, float("nan")], 0.1, [[0.1]]])
def test_epsilons_must_be_a_vector_of_non_negative_numbers(epsilons: list[float]) -> None:
    with pytest.raises(ValueError, match="`epsilons`"):
        linearized_accuracy(torch.ones(3), epsilons)


@pytest.mark.parametrize("bad", [torch.tensor([0.1, torch.nan]), torch.ones(2, 2), torch.ones(0)])
def test_margins_must_be_a_vector_without_nan(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="`margins`"):
        linearized_accuracy(bad, [0.1])
