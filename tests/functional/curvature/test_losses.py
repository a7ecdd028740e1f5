"""Per-sample values, gradients and weights of losses, and roots of their Hessians with respect to the outputs."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.functional import hessian_trace
from lightning_robust.functional.curvature.losses import SampleLoss
from lightning_robust.functional.input_space.softmax_root import softmax_root
from tests.helpers.curvature import (
    Case,
    assert_same,
    assert_within,
    enumerated,
    enumerated_hessian,
    enumerated_products,
    relu_mlp,
    seeded,
    small,
)
from tests.helpers.networks import random
from tests.helpers.oracles import Loss, dense_hessian_traces

# --- the root of the softmax ----------------------------------------------------------------------------------------


def columns_of_root(logits: Tensor) -> Tensor:
    """``F`` (N, C, C), from unit vectors in place of signs."""
    n, c = logits.shape
    return softmax_root(logits, torch.eye(c).unsqueeze(1).expand(c, n, c)).permute(1, 2, 0)


def covariance(logits: Tensor) -> Tensor:
    p = logits.double().softmax(dim=1)
    return p.diag_embed() - p[:, :, None] * p[:, None]


LOGITS: dict[str, Tensor] = {
    "random": random(0, 20, 6),
    "single precision": random(0, 20, 6, dtype=torch.float32),
    "confident": 10 * random(1, 20, 6),
    "two classes": random(2, 20, 2),
    "one class": random(3, 4, 1),
    "thousand classes": 3 * random(4, 3, 1000),
    "all tied": torch.zeros(2, 5),
    "two tied at the top": torch.tensor([[3.0, 3.0, 0.0], [1.0, 3.0, 3.0]]),
    "ties below": torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 5.0, 1.0, 1.0]]),
    "200": torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, 200.0], [200.0, 200.0, 200.0], [0.0, 0.0, -200.0]]),
    "one-hot": torch.tensor([[800.0, 0.0, -800.0], [0.0, 4000.0, 0.0], [-1e30, 0.0, 1e30]]),
}


@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
def test_the_root_times_its_transpose_is_the_covariance_of_the_label(logits: Tensor) -> None:
    root = columns_of_root(logits)
    assert root.dtype == torch.float64
    assert root.isfinite().all()
    torch.testing.assert_close(root @ root.mT, covariance(logits), rtol=1e-12, atol=1e-15)


def test_small_covariances_are_relatively_accurate() -> None:
    """At a margin of 60 the largest probability rounds to one, so the root must not depend on one minus it."""
    logits = torch.tensor([[60.0, 0.0, -1.0], [0.0, 1.0, 90.0]], dtype=torch.float64)
    trace = columns_of_root(logits).square().sum(dim=(1, 2))
    rest = [math.exp(-60) + math.exp(-61), math.exp(-90) + math.exp(-89)]  # tr ≈ 2 (1 − max p)
    assert trace.tolist() == pytest.approx([2 * r for r in rest], rel=1e-9)


def test_the_root_sets_the_most_probable_class_against_all_others() -> None:
    """A sample torn between two classes then has a single non-zero column, and no noise."""
    logits = torch.tensor([[0.0, -100.0, 0.0], [7.0, -100.0, 5.0]], dtype=torch.float64)
    norms = columns_of_root(logits).square().sum(dim=1)
    torch.testing.assert_close(norms[:, 0], covariance(logits).diagonal(dim1=1, dim2=2).sum(dim=1))
    assert norms[:, 1:].max() < 1e-40


def test_signs_of_all_probes_are_applied_at_once() -> None:
    logits, signs = random(0, 5, 4), random(1, 3, 5, 4).sign()
    expected = torch.einsum("nij,mnj->mni", columns_of_root(logits), signs)
    order = logits.argsort(dim=1, descending=True)
    assert order.unique(dim=0).shape[0] > 1
    torch.testing.assert_close(softmax_root(logits, signs), expected)


# --- every loss -----------------------------------------------------------------------------------------------------


class LossCase(NamedTuple):
    """A loss with targets for outputs (N, 4), and the loss of the whole batch that defines it."""

    loss_fn: Any
    targets: Callable[[int], Tensor]
    of_batch: Loss | None = None
    has_root: bool = True

    def defined(self) -> Loss:
        return self.of_batch or self.loss_fn


def labels(n: int) -> Tensor:
    return torch.arange(n) % 4


def some_ignored(n: int) -> Tensor:
    return torch.where(torch.arange(n) % 3 == 0, -100, labels(n))


def probabilities(n: int) -> Tensor:
    return random(0, n, 4, dtype=torch.float32).softmax(dim=1)


def numbers(n: int) -> Tensor:
    return 2 * random(0, n, 4, dtype=torch.float32)


def zeros_and_ones(n: int) -> Tensor:
    return (random(0, n, 4, dtype=torch.float32) > 0).float()


def sum_over_outputs(loss: Loss) -> Loss:
    """Mean over samples of the sum over outputs."""
    return lambda outputs, targets: loss(outputs, targets) * outputs[0].numel()


def double(loss: Any) -> Any:
    """A loss of doubled logits, without a known root."""
    return lambda outputs, targets: loss(2 * outputs, targets)


def in_double(value: Any) -> Any:
    """A loss or targets converted to float64 where that applies."""
    if isinstance(value, partial):
        return partial(value.func, **{name: in_double(option) for name, option in value.keywords.items()})
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


class OwnModule(nn.Module):
    """A custom loss with a constant in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.scale * outputs, targets)


class Subclass(nn.CrossEntropyLoss):
    """A subclass of cross-entropy that computes something else."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().forward(2 * outputs, targets)


NUM_SAMPLES = 6
CLASS_WEIGHTS = torch.tensor([0.2, 5.0, 1.0, 8.0])
LOSSES: dict[str, LossCase] = {
    "default": LossCase(None, labels, F.cross_entropy),
    "cross_entropy": LossCase(nn.CrossEntropyLoss(), labels),
    "function": LossCase(F.cross_entropy, labels),
    "sum": LossCase(nn.CrossEntropyLoss(reduction="sum"), labels, F.cross_entropy),
    "none": LossCase(nn.CrossEntropyLoss(reduction="none"), labels, F.cross_entropy),
    "label_smoothing": LossCase(nn.CrossEntropyLoss(label_smoothing=0.3), labels),
    "weight": LossCase(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), labels),
    "weight and smoothing": LossCase(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.3), labels),
    "weight and sum": LossCase(
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, reduction="sum"),
        labels,
        lambda z, y: F.cross_entropy(z, y, CLASS_WEIGHTS.to(z), reduction="none").mean(),
    ),
    "partial": LossCase(
        partial(F.cross_entropy, weight=CLASS_WEIGHTS, label_smoothing=0.3),
        labels,
        lambda z, y: F.cross_entropy(z, y, CLASS_WEIGHTS.to(z), label_smoothing=0.3),
    ),
    "partial, ignored": LossCase(partial(F.cross_entropy, ignore_index=2), labels),
    "partial of bce": LossCase(
        partial(F.binary_cross_entropy_with_logits, pos_weight=CLASS_WEIGHTS),
        zeros_and_ones,
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=CLASS_WEIGHTS.to(z)),
    ),
    "ignore_index": LossCase(nn.CrossEntropyLoss(), some_ignored),
    "another ignore_index": LossCase(nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.1), labels),
    "ignored and weight": LossCase(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), some_ignored),
    "probabilities": LossCase(nn.CrossEntropyLoss(), probabilities),
    "probabilities, weight and smoothing": LossCase(
        nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.3), probabilities
    ),
    "mse": LossCase(nn.MSELoss(), numbers),
    "mse function": LossCase(F.mse_loss, numbers),
    "mse sum": LossCase(nn.MSELoss(reduction="sum"), numbers, sum_over_outputs(F.mse_loss)),
    "mse none": LossCase(nn.MSELoss(reduction="none"), numbers, F.mse_loss),
    "bce": LossCase(nn.BCEWithLogitsLoss(), zeros_and_ones),
    "bce function": LossCase(F.binary_cross_entropy_with_logits, probabilities),
    "bce pos_weight": LossCase(nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHTS), zeros_and_ones),
    "bce weight": LossCase(nn.BCEWithLogitsLoss(weight=CLASS_WEIGHTS, reduction="mean"), zeros_and_ones),
    "bce sum": LossCase(
        nn.BCEWithLogitsLoss(reduction="sum"), zeros_and_ones, sum_over_outputs(F.binary_cross_entropy_with_logits)
    ),
    "lambda": LossCase(double(F.cross_entropy), labels, has_root=False),
    "lambda of mse": LossCase(double(F.mse_loss), numbers, has_root=False),
    "one loss per sample": LossCase(
        lambda z, y: F.cross_entropy(z, y, reduction="none"), labels, F.cross_entropy, has_root=False
    ),
    "own module": LossCase(OwnModule(), labels, has_root=False),
    "subclass": LossCase(Subclass(), labels, has_root=False),
    "smooth_l1": LossCase(nn.SmoothL1Loss(), numbers, has_root=False),
    "poisson": LossCase(nn.PoissonNLLLoss(), zeros_and_ones, has_root=False),
    "kl_div": LossCase(nn.KLDivLoss(reduction="batchmean"), probabilities, has_root=False),
    "multi_label": LossCase(nn.MultiLabelSoftMarginLoss(weight=CLASS_WEIGHTS), zeros_and_ones, has_root=False),
    "nll": LossCase(nn.NLLLoss(), labels, has_root=False),
}
every_loss = pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES)
every_loss_with_root = pytest.mark.parametrize(
    "case", [case for case in LOSSES.values() if case.has_root], ids=[n for n, c in LOSSES.items() if c.has_root]
)


@every_loss
def test_the_weighted_mean_over_samples_is_the_loss_of_the_batch(case: LossCase) -> None:
    outputs, targets = random(5, 10, 4, dtype=torch.float32), case.targets(10)
    loss = SampleLoss(case.loss_fn)
    values, weights = loss.values(outputs, targets).double(), loss.weights(outputs, targets)
    assert values.shape == weights.shape == (10,)
    torch.testing.assert_close(
        values.sum() / weights.sum(), case.defined()(outputs, targets).double(), rtol=1e-6, atol=0
    )


@every_loss
def test_gradients_are_those_of_each_sample(case: LossCase) -> None:
    outputs, targets = random(5, 10, 4), in_double(case.targets(10))
    loss = SampleLoss(in_double(case.loss_fn))
    expected = torch.autograd.functional.jacobian(lambda z: loss.values(z, targets), outputs)
    torch.testing.assert_close(loss.gradients(outputs, targets), torch.einsum("nnc->nc", expected))


@every_loss_with_root
def test_the_root_is_that_of_the_hessian_of_each_sample(case: LossCase) -> None:
    outputs, targets = random(5, 10, 4), case.targets(10)
    loss, doubled = SampleLoss(in_double(case.loss_fn)), in_double(targets)
    assert loss.root is not None
    root = loss.root.times(torch.eye(4).unsqueeze(1).expand(4, 10, 4), outputs, targets).permute(1, 2, 0)
    for n in range(10):
        expected = torch.autograd.functional.hessian(
            lambda z, n=n: loss.values(z[None], doubled[n : n + 1]).sum(), outputs[n]
        )
        torch.testing.assert_close(root[n] @ root[n].mT, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, case in LOSSES.items() if not case.has_root])
def test_other_losses_have_no_root(name: str) -> None:
    assert SampleLoss(LOSSES[name].loss_fn).root is None


def narrow_tanh_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))


def case_for(name: str, loss_fn: Any, targets: Callable[[int], Tensor]) -> Case:
    """A network in float64 whose outputs suit the loss."""
    model, inputs, _ = (
        seeded(narrow_tanh_mlp, 5, num_samples=NUM_SAMPLES, dtype=torch.float64)
        if name == "tanh_mlp"
        else small(name, num_samples=NUM_SAMPLES, dtype=torch.float64)
    )
    wants_log = isinstance(loss_fn, nn.NLLLoss | nn.KLDivLoss)
    return Case(
        nn.Sequential(model, nn.LogSoftmax(dim=1)) if wants_log else model, inputs, in_double(targets(NUM_SAMPLES))
    )


def close(expected: dict[str, float]) -> Any:
    """Equal up to rounding of float32 constants in losses."""
    return pytest.approx(expected, rel=1e-6, abs=1e-9)


@every_loss_with_root
def test_the_gauss_newton_trace_is_that_of_the_hessian_of_a_piecewise_linear_network(case: LossCase) -> None:
    loss_fn = in_double(case.loss_fn)
    measured = case_for("relu_mlp", loss_fn, case.targets)
    assert enumerated(measured, loss_fn) == close(dense_hessian_traces(*measured, case.defined()))
    estimate = hessian_trace(*measured, loss_fn=loss_fn, rtol=None, num_probes=1)
    assert set(estimate.estimator.values()) == {"gauss_newton"}


@every_loss
def test_the_trace_is_that_of_the_hessian_of_the_loss_of_the_batch(case: LossCase) -> None:
    loss_fn = in_double(case.loss_fn)
    measured = case_for("tanh_mlp", loss_fn, case.targets)
    expected = dense_hessian_traces(*measured, case.defined())
    assert enumerated_products(measured, loss_fn, residual=False) == close(expected)
    if case.has_root:
        assert enumerated_hessian(measured, loss_fn) == close(expected)
    estimate = hessian_trace(*measured, loss_fn=loss_fn, rtol=None, num_probes=1)
    by_second_derivatives = [name for name, kind in estimate.estimator.items() if kind == "hutchinson"]
    assert len(by_second_derivatives) == (4 if case.has_root else 6)


class Renamed(nn.CrossEntropyLoss):
    """A subclass that changes only the constructor."""

    def __init__(self, smoothing: float) -> None:
        super().__init__(weight=CLASS_WEIGHTS, label_smoothing=smoothing)


def test_a_subclass_that_computes_its_parents_loss_has_its_root() -> None:
    case = small("relu_mlp")
    expected = hessian_trace(*case, loss_fn=nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.2))
    assert_same(hessian_trace(*case, loss_fn=Renamed(0.2)), expected)


def test_a_compiled_loss_is_measured_as_its_original_and_unchanged() -> None:
    case = small("relu_mlp")
    loss_fn = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)
    compiled = torch.compile(loss_fn, backend="eager")
    assert_same(hessian_trace(*case, loss_fn=compiled), hessian_trace(*case, loss_fn=loss_fn))
    outputs = case.model(case.inputs).detach()
    assert torch.equal(compiled(outputs, case.targets), loss_fn(outputs, case.targets))


class Weighted(nn.Module):
    """A custom loss with a ``reduction`` attribute, as torch's losses have."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses, weights = F.cross_entropy(outputs, targets, reduction="none"), CLASS_WEIGHTS[targets]
        if self.reduction == "mean":
            return (losses * weights).sum() / weights.sum()
        return losses * weights / CLASS_WEIGHTS.mean()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_patched_hooked_or_scripted_loss_is_not_taken_for_torchs() -> None:
    case = small("tanh_mlp")
    patched, hooked, prehooked = (nn.CrossEntropyLoss() for _ in range(3))
    patched.forward = lambda outputs, targets: 3 * F.cross_entropy(outputs, targets)
    hooked.register_forward_hook(lambda module, inputs, loss: 3 * loss)
    prehooked.register_forward_pre_hook(lambda module, inputs: (3 * inputs[0], inputs[1]))
    scripted = torch.jit.script(nn.CrossEntropyLoss(label_smoothing=0.4))
    for loss_fn in (patched, hooked, prehooked, scripted):
        assert SampleLoss(loss_fn).root is None
        estimate = hessian_trace(*case, loss_fn=loss_fn, rtol=None, num_probes=16)
        assert_within(estimate, dense_hessian_traces(case.model, *case[1:], copy.deepcopy(loss_fn)))


def test_a_custom_reduction_attribute_is_left_alone() -> None:
    case = small("tanh_mlp")
    with pytest.raises(ValueError, match="`loss_fn` to return a mean over samples"):
        hessian_trace(*case, loss_fn=Weighted("mean"))
    loss_fn = Weighted("per sample")
    estimate = hessian_trace(*case, loss_fn=loss_fn, rtol=None, num_probes=16)
    assert loss_fn.reduction == "per sample"
    assert_within(estimate, dense_hessian_traces(*case, lambda z, y: loss_fn(z, y).mean()))


@pytest.mark.parametrize(
    ("loss_fn", "targets"),
    [
        (nn.NLLLoss(weight=CLASS_WEIGHTS), labels),
        (nn.NLLLoss(), some_ignored),
        (nn.NLLLoss(weight=CLASS_WEIGHTS, ignore_index=2), labels),
        (nn.NLLLoss(weight=CLASS_WEIGHTS, reduction="sum"), labels),
        (F.nll_loss, some_ignored),
    ],
    ids=["class weights", "ignored", "both", "sum", "function"],
)
def test_the_negative_log_likelihood_weighs_samples_as_cross_entropy_does(
    loss_fn: Any, targets: Callable[[int], Tensor]
) -> None:
    loss_fn = in_double(loss_fn)
    case = case_for("relu_mlp", nn.NLLLoss(), targets)
    summed = getattr(loss_fn, "reduction", "mean") == "sum"
    expected = dense_hessian_traces(*case, lambda z, y: loss_fn(z, y) / len(z) if summed else loss_fn(z, y))
    assert enumerated_products(case, loss_fn, residual=False) == close(expected)


@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), nn.BCEWithLogitsLoss()], ids=["mse", "bce"])
@pytest.mark.parametrize("kind", ["one number", "several dimensions"])
def test_outputs_need_not_have_two_dimensions(kind: str, loss_fn: nn.Module) -> None:
    if kind == "one number":
        model, inputs, _ = seeded(lambda: nn.Sequential(relu_mlp(num_classes=1)), 5, dtype=torch.float64)
        case = Case(nn.Sequential(model, nn.Flatten(0)), inputs, random(0, 12).sigmoid())
    else:
        layers = lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 1))  # noqa: E731
        model, inputs, _ = seeded(layers, 1, 4, 4, dtype=torch.float64)
        case = Case(model, inputs, random(0, 12, 3, 2, 2).sigmoid())
    expected = dense_hessian_traces(*case, loss_fn)
    assert enumerated(case, loss_fn) == close(expected)
    assert enumerated_products(case, loss_fn, residual=False) == close(expected)
    estimate = hessian_trace(*case, loss_fn=loss_fn, rtol=None)
    assert set(estimate.estimator.values()) == {"gauss_newton"}
    assert float(estimate.total) == pytest.approx(sum(expected.values()), rel=0.5)


def test_a_loss_is_left_as_it_was() -> None:
    loss_fn = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS.clone(), reduction="sum")
    weight = loss_fn.weight
    hessian_trace(*small("tanh_mlp"), loss_fn=loss_fn)
    assert loss_fn.reduction == "sum"
    assert loss_fn.training
    assert loss_fn.weight is weight
    assert torch.equal(weight, CLASS_WEIGHTS)


def test_class_weights_may_be_in_half_precision() -> None:
    case = small("tanh_mlp")
    half = CLASS_WEIGHTS.bfloat16()
    expected, actual = (
        hessian_trace(*case, loss_fn=nn.CrossEntropyLoss(weight=weight), rtol=None).total
        for weight in (half.float(), half)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
@pytest.mark.parametrize("name", ["relu_mlp", "tanh_mlp"])
def test_class_indices_may_be_of_any_integer_type(name: str, dtype: torch.dtype) -> None:
    case = small(name)
    expected = hessian_trace(*case, rtol=None).total
    torch.testing.assert_close(hessian_trace(*case._replace(targets=case.targets.to(dtype)), rtol=None).total, expected)


def test_a_loss_need_not_be_hashable() -> None:
    @dataclass
    class Own:
        scale: float

        def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.scale * outputs, targets)

    case = small("tanh_mlp")
    expected = hessian_trace(*case, loss_fn=double(F.cross_entropy), rtol=None).total
    torch.testing.assert_close(hessian_trace(*case, loss_fn=Own(2.0), rtol=None).total, expected)


def test_a_batch_of_one_sample_is_a_batch() -> None:
    case = small("relu_mlp", num_samples=1, dtype=torch.float64)
    expected = dense_hessian_traces(*case, F.cross_entropy)
    assert enumerated(case) == close(expected)
    assert enumerated_products(case, nn.CrossEntropyLoss().forward, residual=False) == close(expected)
    estimate = hessian_trace(*case, rtol=None)
    assert all(value.isnan() for value in estimate.sample_stderr.values())
    assert all(value.isfinite() for value in estimate.stderr.values())


def test_a_loss_that_is_linear_in_the_outputs_leaves_only_the_curvature_of_the_network() -> None:
    """Such a loss has no Gauss–Newton part, so the last layer has no curvature."""

    def linear(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.gather(1, targets[:, None]).mean()

    case = small("tanh_mlp", dtype=torch.float64)
    traces = enumerated_products(case, linear, residual=False)
    assert traces == close(dense_hessian_traces(*case, linear))
    assert traces["0.weight"] != 0
    assert traces["5.weight"] == traces["5.bias"] == 0
