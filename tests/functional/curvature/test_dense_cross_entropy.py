"""Cross-entropy with a class per pixel or token has the curvature of the loss of the batch as torch defines it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust import HessianTrace, Probe
from lightning_robust.functional import hessian_trace
from lightning_robust.functional.curvature import _gauss_newton_root
from lightning_robust.functional.curvature.losses import SampleLoss
from tests.helpers.curvature import (
    Case,
    assert_same,
    assert_within,
    enumerated,
    enumerated_hessian,
    enumerated_products,
    seed,
    seeded,
)
from tests.helpers.networks import random
from tests.helpers.oracles import Loss, dense_hessian_traces
from tests.helpers.recording import PeakMemory

NUM_SAMPLES = 6
WEIGHT = torch.tensor([0.2, 3.0, 1.0], dtype=torch.float64)


def segmenter(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Maps images (N, 1, 3, 3) to scores of three classes at every pixel, (N, 3, 2, 2)."""
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), activation(), nn.Conv2d(2, 3, 1))


class Tagger(nn.Module):
    """Maps tokens (N, T, 2) to scores of three classes at each of them, (N, 3, T)."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), activation(), nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).movedim(-1, 1)


SHAPES: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "pixels": (segmenter, (1, 3, 3)),
    "tokens": (Tagger, (4, 2)),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def labels(case: Case) -> Tensor:
    return case.targets


def partly_ignored(case: Case, index: int = -100) -> Tensor:
    """The first sample counts at no position, the others at different numbers of positions."""
    targets = case.targets.clone().flatten(1)
    for n, row in enumerate(targets):
        row[n:] = index
    return targets.view_as(case.targets)


def probabilities(case: Case) -> Tensor:
    n, *positions = case.targets.shape
    return random(3, n, 3, *positions).softmax(dim=1)


class Dense(NamedTuple):
    """A loss, its targets, and the loss of the whole batch that defines it if it does not itself."""

    loss_fn: Any
    targets: Callable[[Case], Tensor] = labels
    of_batch: Loss | None = None


def summed(**options: Any) -> Loss:
    """Mean over samples of the sum over positions."""
    return lambda z, y: F.cross_entropy(z, y, reduction="sum", **options) / len(z)


LOSSES = {
    "plain": Dense(nn.CrossEntropyLoss()),
    "function": Dense(F.cross_entropy),
    "ignored": Dense(nn.CrossEntropyLoss(), partly_ignored),
    "another index": Dense(nn.CrossEntropyLoss(ignore_index=255), partial(partly_ignored, index=255)),
    "weight": Dense(nn.CrossEntropyLoss(WEIGHT)),
    "weight, ignored": Dense(nn.CrossEntropyLoss(WEIGHT), partly_ignored),
    "smoothing": Dense(nn.CrossEntropyLoss(label_smoothing=0.3)),
    "weight, ignored, smoothing": Dense(nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.3), partly_ignored),
    "probabilities": Dense(nn.CrossEntropyLoss(), probabilities),
    "probabilities, weight, smoothing": Dense(nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.3), probabilities),
    "sum": Dense(nn.CrossEntropyLoss(reduction="sum"), partly_ignored, summed()),
    "none": Dense(nn.CrossEntropyLoss(WEIGHT, reduction="none"), labels,
                  lambda z, y: F.cross_entropy(z, y, WEIGHT, reduction="none").mean()),
    "nll": Dense(nn.NLLLoss(WEIGHT), partly_ignored),
}  # fmt: skip
every_loss = pytest.mark.parametrize("dense", LOSSES.values(), ids=LOSSES)
every_loss_with_root = pytest.mark.parametrize(
    "dense", [dense for name, dense in LOSSES.items() if name != "nll"], ids=[name for name in LOSSES if name != "nll"]
)


def case_for(dense: Dense, shape: str, activation: type[nn.Module] = nn.ReLU) -> Case:
    factory, size = SHAPES[shape]
    case = seeded(lambda: factory(activation), *size, num_samples=NUM_SAMPLES, dtype=torch.float64)
    return case._replace(targets=dense.targets(case))


@every_loss
def test_the_weighted_mean_over_samples_is_the_loss_of_the_batch(dense: Dense) -> None:
    case = case_for(dense, "pixels")
    outputs = case.model.eval()(case.inputs).detach()
    loss = SampleLoss(dense.loss_fn)
    loss.check(outputs, case.targets)
    values, weights = loss.values(outputs, case.targets), loss.weights(outputs, case.targets)
    assert values.shape == weights.shape == (NUM_SAMPLES,)
    expected = (dense.of_batch or dense.loss_fn)(outputs, case.targets)
    torch.testing.assert_close(values.sum() / weights.sum(), expected)


@every_loss_with_root
def test_the_root_is_that_of_the_hessian_of_each_sample(dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gauss_newton_root, "_ELEMENTS", 2 * 12 * 12)  # two samples at a time
    case = case_for(dense, "pixels")
    outputs = case.model.eval()(case.inputs).detach()
    loss = SampleLoss(dense.loss_fn)
    assert loss.root is not None
    columns = torch.eye(12).unsqueeze(1).expand(12, NUM_SAMPLES, 12)
    root = loss.root.times(columns, outputs, case.targets).permute(1, 2, 0)
    assert not root[:, :, loss.root.num_columns(outputs) :].any()
    for n in range(NUM_SAMPLES):
        matrix = torch.autograd.functional.hessian(
            lambda z, n=n: loss.values(z[None], case.targets[n : n + 1]).sum(), outputs[n]
        )
        torch.testing.assert_close(root[n] @ root[n].mT, matrix.view(12, 12), rtol=1e-6, atol=1e-12)


@every_shape
@every_loss_with_root
def test_the_gauss_newton_trace_is_that_of_the_hessian_of_a_piecewise_linear_network(dense: Dense, shape: str) -> None:
    case = case_for(dense, shape)
    expected = dense_hessian_traces(*case, dense.of_batch or dense.loss_fn)
    assert enumerated(case, dense.loss_fn) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    estimate = hessian_trace(*case, loss_fn=dense.loss_fn, rtol=None, num_probes=24, generator=seed(0))
    assert set(estimate.estimator.values()) == {"gauss_newton"}
    assert float(estimate.total_stderr) == pytest.approx(0, abs=1e-9)  # 8 columns: exact
    assert {name: float(trace) for name, trace in estimate.layers.items()} == pytest.approx(expected, rel=1e-6)


@every_loss
def test_the_trace_is_that_of_the_hessian_of_the_loss_of_the_batch(dense: Dense) -> None:
    case = case_for(dense, "pixels", nn.Tanh)
    expected = dense_hessian_traces(*case, dense.of_batch or dense.loss_fn)
    assert enumerated_products(case, dense.loss_fn, residual=False) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    if SampleLoss(dense.loss_fn).root is not None:
        assert enumerated_hessian(case, dense.loss_fn) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@every_shape
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_random_probes_lie_within_three_standard_errors(shape: str, activation: type[nn.Module]) -> None:
    dense = LOSSES["weight, ignored, smoothing"]
    case = case_for(dense, shape, activation)
    expected = dense_hessian_traces(*case, dense.loss_fn)
    for number in range(3):
        estimate = hessian_trace(*case, loss_fn=dense.loss_fn, rtol=None, num_probes=7, generator=seed(number))
        assert float(estimate.total_stderr) > 1e-3 * float(estimate.total)
        assert_within(estimate, expected)


def test_the_mean_over_batches_is_over_positions_as_in_one_batch() -> None:
    dense = LOSSES["weight, ignored"]
    case = case_for(dense, "pixels", nn.Tanh)
    metric = HessianTrace()
    for rows in (slice(0, 1), slice(1, 2), slice(2, NUM_SAMPLES)):
        if rows.start:  # the first sample alone counts at no position
            metric.update(Probe(case.model, case.inputs[rows], case.targets[rows], loss_fn=dense.loss_fn))
    parts = metric.compute()
    whole = hessian_trace(*case, loss_fn=dense.loss_fn, rtol=None, num_probes=2)
    assert float(parts["hessian_trace"]) == pytest.approx(float(whole.total), rel=1e-5)


def test_a_position_is_a_sample_of_a_network_that_sees_one() -> None:
    """Classes per token have the curvature of the same tokens as samples."""
    dense = LOSSES["weight, ignored"]
    case = case_for(dense, "tokens", nn.Tanh)
    tokens = Case(case.model.layers, case.inputs.flatten(0, 1), case.targets.flatten())
    assert enumerated_hessian(case, dense.loss_fn) == pytest.approx(
        {f"layers.{name}": trace for name, trace in enumerated_hessian(tokens, dense.loss_fn).items()}
    )


def test_torchs_loss_and_a_function_that_calls_it_agree() -> None:
    case = case_for(LOSSES["plain"], "pixels")
    options = {"rtol": None, "num_probes": 64}
    exact = hessian_trace(*case, loss_fn=nn.CrossEntropyLoss(), **options)
    estimate = hessian_trace(*case, loss_fn=lambda z, y: 1.0 * F.cross_entropy(z, y), **options)
    assert_within(estimate, {name: float(trace) for name, trace in exact.layers.items()})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_classes_may_be_of_any_integer_type(dtype: torch.dtype) -> None:
    case = case_for(LOSSES["another index"], "pixels")
    expected, actual = (
        hessian_trace(*case._replace(targets=case.targets.to(kind)), loss_fn=nn.CrossEntropyLoss(ignore_index=255))
        for kind in (torch.int64, dtype)
    )
    assert_same(actual, expected)


def test_wide_maps_take_at_most_twice_the_memory_of_a_training_step() -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))
    inputs, targets = random(0, 16, 3, 48, 48, dtype=torch.float32), torch.arange(16 * 48 * 48).view(16, 48, 48) % 8
    with PeakMemory() as training:
        F.cross_entropy(network(inputs), targets).backward()
    network.zero_grad()
    with PeakMemory() as memory:
        hessian_trace(network, inputs, targets, num_probes=2, rtol=None)
    assert memory.peak < 2 * training.peak


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(4, 1, 2, 2, dtype=torch.long), r"tensor \(N, 2, 2\).*shape \(N, 1, 2, 2\).*\.squeeze\(1\)"),
        (torch.zeros(4, 2, 2), r"torch.float32 of shape \(N, 2, 2\). Take `.long\(\)`"),
        (torch.zeros(4, 2, 2, dtype=torch.bool), r"torch.bool of shape \(N, 2, 2\). Take `.long\(\)`"),
        (torch.zeros(4, 3, 2, dtype=torch.long), r"outputs.movedim\(-1, 1\)"),
        (torch.zeros(4, 5, 5, dtype=torch.long), r"integer tensor \(N, 2, 2\).*got torch.int64 of shape \(N, 5"),
        (torch.full((4, 2, 2), 3), "between 0 and 2.*values from 3 to 3"),
        (torch.full((4, 2, 2), -1), "values from -1 to -1"),
        (torch.full((4, 2, 2), -100), "at least one sample that counts"),
        (torch.zeros(4, dtype=torch.long), r"logits of shape \(N, C\).*probe_fn.*pixel or token.*CrossEntropyLoss"),
        (None, "pixel or token"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value is not None and tuple(value.shape)),
)
def test_targets_of_another_shape_are_refused_with_a_remedy(targets: Tensor | None, message: str) -> None:
    inputs = random(0, 4, 1, 3, 3, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        hessian_trace(segmenter(), inputs, targets, loss_fn=nn.CrossEntropyLoss())


def test_a_single_score_per_position_and_weights_of_other_classes_are_refused() -> None:
    inputs, targets = random(0, 4, 1, 3, 3, dtype=torch.float32), torch.zeros(4, 2, 2, dtype=torch.long)
    single = nn.Conv2d(1, 1, 2)
    with pytest.raises(ValueError, match="BCEWithLogitsLoss"):
        hessian_trace(single, inputs, targets, loss_fn=nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"one class weight for each of 3 classes.*shape \(2,\)"):
        hessian_trace(segmenter(), inputs, targets, loss_fn=nn.CrossEntropyLoss(torch.ones(2)))
