"""The second linearisation: gaps of the input itself, with gradients close to the predicted boundary."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust import LinearizedAccuracy, Probe
from lightning_robust.functional import (
    Linearization,
    linearize,
    linearized_margin,
    linearized_margin_linf,
    relinearize,
)
from tests.helpers.networks import NETWORKS, build, normalise, random, random_linear
from tests.helpers.recording import Recorder, state_of

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
DUAL = {"l2": 2, "linf": 1}

every_norm = pytest.mark.parametrize("norm", DUAL)


def margins(linearization: Linearization, targets: Tensor, norm: str) -> Tensor:
    if norm == "l2":
        return linearized_margin(linearization.logits, linearization.gram, targets)
    assert linearization.gap_l1 is not None
    return linearized_margin_linf(linearization.logits, linearization.gap_l1, targets)


def gap_gradients(model: nn.Module, x: Tensor, y: int) -> tuple[Tensor, Tensor]:
    """Gaps of one sample to all classes (C,), and their gradients (C, D)."""
    leaf = x[None].clone().requires_grad_()
    logits = model(leaf.clone())[0]
    gradients = [torch.autograd.grad(logits[y] - z, leaf, retain_graph=True)[0].flatten() for z in logits]
    return (logits[y] - logits).detach(), torch.stack(gradients)


def expected_margins(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    norm: str,
    *,
    fraction: float = 0.9,
    box: tuple[float, float] | None,
) -> Tensor:
    """Margins sample by sample and pair by pair, in float64; with a box, by bisection over the perturbation size."""

    def distances(gaps: Tensor, gradients: Tensor, x: Tensor, y: int) -> Tensor:
        if box is None or norm == "l2":
            result = gaps / torch.linalg.vector_norm(gradients, ord=DUAL[norm], dim=1)
        else:
            result = torch.stack([bisect(gap, d, x.flatten(), box) for gap, d in zip(gaps, gradients, strict=True)])
        result[y] = torch.inf
        return result

    values = []
    for x, y in zip(inputs.double(), targets.tolist(), strict=True):
        gaps, gradients = gap_gradients(model, x, y)
        if (gaps < 0).any():
            values.append(torch.tensor(0.0, dtype=torch.float64))
            continue
        first = distances(gaps, gradients, x, y)
        nearest = gradients[first.argmin()]
        step = -nearest.sign() if norm == "linf" else -nearest / nearest.norm()
        step = first.min() * step
        if box is not None and norm == "linf":
            step = (x.flatten() + step).clamp(*box) - x.flatten()
        _, there = gap_gradients(model, x + fraction * step.view_as(x), y)
        values.append(distances(gaps, there, x, y).min())
    return torch.stack(values)


def bisect(gap: Tensor, gradient: Tensor, x: Tensor, box: tuple[float, float]) -> Tensor:
    """Smallest ε for which the best step of that size within the box closes a gap."""

    def achieved(epsilon: float) -> float:
        return float(((-epsilon * gradient.sign() + x).clamp(*box) - x) @ -gradient)

    low, high = 0.0, box[1] - box[0]
    if achieved(high) < gap:
        return torch.tensor(torch.inf, dtype=torch.float64)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if achieved(middle) < gap else (low, middle)
    return torch.tensor(high, dtype=torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@every_norm
@pytest.mark.parametrize("name", NETWORKS)
def test_margins_agree_with_one_gradient_per_pair_of_classes(name: str, norm: Any, dtype: torch.dtype) -> None:
    model, inputs, targets = build(name)
    expected = expected_margins(model.double().eval(), inputs, targets, norm, box=None)
    model, inputs = model.to(dtype), inputs.to(dtype)
    actual = margins(relinearize(model, inputs, linearize(model, inputs), norm=norm), targets, norm)
    assert 0 < expected.count_nonzero() < len(expected)
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("name", ["mlp", "cnn_batchnorm", "attention"])
@every_norm
def test_margins_agree_within_a_valid_range_of_normalised_inputs(name: str, norm: Any) -> None:
    model, inputs, _ = build(name, num_samples=8)
    raw = inputs.double().sigmoid().clamp(0.25, 0.75)  # many values at the ends of the range
    normalised = nn.Sequential(_Normalise(), model.double()).eval()
    targets = normalised(raw).argmax(dim=1)
    expected = expected_margins(normalised, raw, targets, norm, box=(0.25, 0.75))
    units: Any = {"input_mean": 0.5, "input_std": 0.2, "valid_range": (0.25, 0.75)}
    x = (raw - 0.5) / 0.2
    actual = margins(relinearize(model, x, linearize(model, x, **units), norm=norm, **units), targets, norm)
    assert expected.isfinite().sum() > 3
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


class _Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) / 0.2


@every_norm
def test_a_linear_network_keeps_its_margins(norm: Any) -> None:
    model, inputs = random_linear(0, num_classes=4, num_features=5), random(1, 20, 5)
    targets = model(inputs).argmax(dim=1)
    first = linearize(model, inputs)
    torch.testing.assert_close(
        margins(relinearize(model, inputs, first, norm=norm), targets, norm), margins(first, targets, norm)
    )


@every_norm
def test_no_part_of_the_way_is_the_first_linearisation(norm: Any) -> None:
    model, inputs, _ = build("resnet")
    first = linearize(model, inputs)
    again = relinearize(model, inputs, first, norm=norm, fraction=0.0)
    torch.testing.assert_close(again.logits, first.logits, rtol=0, atol=0)
    torch.testing.assert_close(again.gram, first.gram)
    torch.testing.assert_close(again.gap_l1, first.gap_l1)


@pytest.mark.parametrize("chunk_size", [1, 4, 17])
@every_norm
def test_chunks_change_nothing(norm: Any, chunk_size: int) -> None:
    model, inputs, _ = build("cnn_batchnorm")
    first = linearize(model, inputs, valid_range=(-3, 3))
    whole = relinearize(model, inputs, first, norm=norm, valid_range=(-3, 3))
    parts = relinearize(model, inputs, first, norm=norm, valid_range=(-3, 3), chunk_size=chunk_size)
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.gap_l1, whole.gap_l1, rtol=1e-5, atol=1e-6)


def test_samples_without_a_gradient_stay_where_they_are() -> None:
    model, inputs = nn.Linear(3, 2).double(), random(0, 4, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([1.0, 0.0]))
    first = linearize(model, inputs)
    for norm in ("l2", "linf"):
        again = relinearize(model, inputs, first, norm=norm)  # type: ignore[arg-type]
        assert margins(again, torch.zeros(4, dtype=torch.long), norm).isinf().all()


def test_nothing_of_the_network_changes_and_it_costs_one_more_pass_than_the_first() -> None:
    model, inputs, _ = build("cnn_batchnorm")
    recorder = Recorder(model.train())
    before = state_of(recorder)
    first = linearize(recorder, inputs)
    num_first = recorder.record.num_input_backwards
    relinearize(recorder, inputs, first)
    assert recorder.record.num_input_backwards == 2 * num_first + 1
    assert recorder.record.batch_sizes == [9, 9, 9]
    assert state_of(recorder) == before
    assert not any(recorder.record.any_training)


def test_the_units_are_those_of_the_unnormalised_input() -> None:
    model, inputs, targets = build("cnn_batchnorm")
    mean, std = [0.5, 0.4, 0.3], [0.25, 0.5, 2.0]

    class Normalising(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(normalise(x, mean, std))

    outer, x = Normalising().eval(), normalise(inputs, mean, std)
    model.eval()
    for norm in ("l2", "linf"):
        inside = margins(relinearize(outer, inputs, linearize(outer, inputs), norm=norm), targets, norm)  # type: ignore[arg-type]
        first = linearize(model, x, input_std=std)
        outside = margins(relinearize(model, x, first, norm=norm, input_std=std), targets, norm)  # type: ignore[arg-type]
        torch.testing.assert_close(outside, inside, rtol=1e-3, atol=1e-7)


@every_norm
def test_the_metric_counts_these_margins_and_logs_them_under_names_of_their_own(norm: Any) -> None:
    model, inputs, targets = build("resnet", num_samples=25)
    probe = Probe(model, inputs, targets)
    values = margins(relinearize(model, inputs, linearize(model, inputs), norm=norm), targets, norm)
    epsilon = float(values.quantile(0.7))
    first, second = LinearizedAccuracy([epsilon], norm), LinearizedAccuracy([epsilon], norm, order=2)
    for metric in (first, second):
        metric.update(probe)
    computed = second.compute()
    share = float((values > epsilon).float().mean())
    assert float(computed[f"linearized_order2_accuracy_{norm}_{epsilon:.4g}"]) == pytest.approx(share)
    assert float(computed[f"linearized_order2_margin_{norm}"]) == pytest.approx(float(values.mean()), rel=1e-5)
    assert not computed.keys() & first.compute().keys()


def test_wrong_arguments_are_named() -> None:
    model, inputs, _ = build("mlp")
    first = linearize(model, inputs)
    with pytest.raises(ValueError, match=r"`fraction` to be a number between 0 and 1, but got 1\.5"):
        relinearize(model, inputs, first, fraction=1.5)
    with pytest.raises(ValueError, match="`norm` to be one of"):
        relinearize(model, inputs, first, norm="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one of the 2 inputs, but it has \d+ samples"):
        relinearize(model, inputs[:2], first)
    with pytest.raises(ValueError, match="`gap_l1` for norm 'linf', but it has none"):
        relinearize(model, inputs, replace(first, gap_l1=None))
    with pytest.raises(ValueError, match="`order` to be 1 or 2, but got 3"):
        LinearizedAccuracy(order=3)  # type: ignore[arg-type]


def test_a_sample_whose_boundary_lies_beyond_what_can_be_computed_stays_where_it_is() -> None:
    """The square of an input 1e30 away is infinite in float32."""

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([1 + 0 * x[:, 0].square(), 1e-30 * x[:, 0]], dim=1)

    inputs = torch.tensor([[0.5], [0.25]])
    first = linearize(Flat(), inputs)
    again = relinearize(Flat(), inputs, first)
    assert margins(first, torch.zeros(2, dtype=torch.long), "linf").min() > 1e29
    torch.testing.assert_close(again.gap_l1, first.gap_l1, rtol=0, atol=0)


def test_another_number_of_classes_is_named() -> None:
    inputs = random(0, 5, 4)
    first = linearize(nn.Linear(4, 3).double(), inputs)
    for num_classes in (2, 5):
        with pytest.raises(ValueError, match=f"but got 3 in the linearisation and {num_classes} in the model"):
            relinearize(nn.Linear(4, num_classes).double(), inputs, first)
