"""Invalid arguments are refused with reason and remedy; probes stop when they should, and are repeatable."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_robust.functional import hessian_trace, linearize
from lightning_robust.functional.curvature.problem import CurvatureProblem
from lightning_robust.functional.curvature.signs import ProbeSeeds, sample_signs
from lightning_robust.functional.curvature.sums import joined
from tests.helpers.curvature import assert_same, assert_within, relu_mlp, seed, seeded, small
from tests.helpers.oracles import dense_gauss_newton_traces, dense_hessian_traces, hessian_traces_by_differences

every_estimator = pytest.mark.parametrize("estimator", ["auto", "hutchinson", "gauss_newton"])
by_second_derivatives = pytest.mark.parametrize("estimator", ["auto", "hutchinson"])


# --- wrong values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_probes": 0}, "`num_probes` to be a positive integer, but got 0"),
        ({"num_probes": 1.5}, "`num_probes` to be a positive integer, but got 1.5"),
        ({"max_probes": 0}, "`max_probes` to be a positive integer, but got 0"),
        ({"chunk_size": 0}, "`chunk_size` to be a positive integer, but got 0"),
        ({"rtol": 0.0}, "`rtol` to be a positive number or None, but got 0.0"),
        ({"rtol": -1}, "`rtol` to be a positive number or None, but got -1"),
        ({"rtol": math.nan}, "`rtol` to be a positive number or None, but got nan"),
        ({"rtol": math.inf}, "`rtol` to be a positive number or None, but got inf"),
        ({"estimator": "hutch"}, "`estimator` to be one of .*'auto'.*'hutchinson'.*'gauss_newton'.*, but got 'hutch'"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hessian_trace(*small("relu_mlp"), **option)


@every_estimator
def test_inputs_that_are_not_samples_which_the_network_takes_are_refused(estimator: Any) -> None:
    model, inputs, targets = small("relu_mlp")
    with pytest.raises(TypeError, match=r"floating point, but got torch\.int64, which the model does not take"):
        hessian_trace(model, inputs.long(), targets, estimator=estimator)
    with pytest.raises(TypeError, match=r"floating point or integer, but got torch\.complex64"):
        hessian_trace(model, inputs * 1j, targets, estimator=estimator)
    with pytest.raises(TypeError, match=r"tensor .*, but got list"):
        hessian_trace(model, inputs.tolist(), targets, estimator=estimator)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one sample"):
        hessian_trace(model, inputs[:0], targets[:0], estimator=estimator)


@every_estimator
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_refused(estimator: Any, value: float) -> None:
    model, inputs, targets = small("tanh_mlp")
    inputs[3] = value
    with pytest.raises(ValueError, match=r"finite inputs.* 1 of 6 samples .*sample 3"):
        hessian_trace(model, inputs, targets, estimator=estimator)


@every_estimator
def test_inputs_need_not_be_finite_where_the_network_fills_them_in(estimator: Any) -> None:
    model, inputs, targets = small("tanh_mlp")
    missing = torch.arange(inputs.numel()).view_as(inputs) % 5 == 0
    given, filled = inputs.masked_fill(missing, math.nan), inputs.masked_fill(missing, 0.5)

    class Filling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x.nan_to_num(0.5))

    actual = hessian_trace(Filling(), given, targets, estimator=estimator, num_probes=60, rtol=None)
    expected = hessian_trace(model, filled, targets, estimator=estimator, num_probes=60, rtol=None)
    error = 4 * float(actual.total_stderr + expected.total_stderr) + 1e-6
    assert float(actual.total) == pytest.approx(float(expected.total), abs=error)
    with pytest.raises(ValueError, match=r"finite inputs.*Where NaN stands for missing values.*`probe_fn="):
        linearize(Filling(), given)


@every_estimator
def test_outputs_that_are_not_finite_are_refused(estimator: Any) -> None:
    model, inputs, targets = small("tanh_mlp")
    with torch.no_grad():
        model[0].bias[0] = math.nan
    with pytest.raises(ValueError, match="finite outputs, but got NaN or infinity"):
        hessian_trace(model, inputs, targets, estimator=estimator)


def own_mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets)


@by_second_derivatives
def test_losses_that_are_not_finite_are_refused(estimator: Any) -> None:
    model, inputs, _ = small("tanh_mlp")
    targets = torch.zeros(12, 4)
    targets[5] = math.nan
    for loss_fn in (nn.MSELoss(), own_mse):
        with pytest.raises(ValueError, match="finite losses"):
            hessian_trace(model, inputs, targets, loss_fn=loss_fn, estimator=estimator)


@every_estimator
def test_probabilities_that_are_not_finite_are_refused(estimator: Any) -> None:
    model, inputs, _ = small("relu_mlp")
    targets = torch.full((12, 4), math.nan)
    with pytest.raises(ValueError, match="finite"):
        hessian_trace(model, inputs, targets, estimator=estimator)


# --- models ---------------------------------------------------------------------------------------------------------


@every_estimator
def test_a_plain_function_needs_a_module(estimator: Any) -> None:
    model, inputs, targets = small("tanh_mlp")

    def shifted(x: Tensor) -> Tensor:
        return model(x + 0)

    options = {"estimator": estimator, "rtol": None}
    with pytest.raises(ValueError, match=r"a plain function 'shifted'\. Pass the network that it calls as `module`"):
        hessian_trace(shifted, inputs, targets, **options)
    expected = hessian_trace(model, inputs, targets, **options)
    assert_same(hessian_trace(shifted, inputs, targets, module=model, **options), expected)
    assert_same(hessian_trace(model.forward, inputs, targets, **options), expected)


def test_only_the_weights_of_the_given_module_are_measured() -> None:
    model, inputs, targets = small("tanh_mlp")
    actual = hessian_trace(model, inputs, targets, module=model[2])
    assert list(actual.layers) == ["weight", "bias"]
    expected = hessian_traces_by_differences(model, inputs, targets, nn.CrossEntropyLoss())
    actual = hessian_trace(model, inputs, targets, module=model[2], num_probes=24, rtol=None, generator=seed(0))
    assert_within(actual, {name: expected[f"2.{name}"] for name in ("weight", "bias")})


@every_estimator
def test_outputs_that_are_not_a_tensor_of_samples_are_refused(estimator: Any) -> None:
    model, inputs, targets = small("relu_mlp")
    for wrong, expected in ((lambda x: {"loss": model(x).sum()}, "dict"), (lambda x: (str(model(x)),), "tuple")):
        with pytest.raises(TypeError, match=rf"outputs of shape .*, but for \d+ inputs it returned {expected}"):
            hessian_trace(wrong, inputs, targets, module=model, estimator=estimator)
    with pytest.raises(ValueError, match=r"outputs of shape \(N, ...\), but for \d+ inputs it returned shape \(4,\)"):
        hessian_trace(lambda x: model(x).sum(dim=0), inputs, targets, module=model, estimator=estimator)


@every_estimator
def test_an_error_of_the_network_itself_is_not_taken_for_a_missing_derivative(estimator: Any) -> None:
    model, inputs, targets = small("tanh_mlp")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        hessian_trace(model, inputs[:, :3], targets, estimator=estimator)
    assert "twice" not in str(raised.value)


class Tanh(torch.autograd.Function):
    """A custom function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()


class OnceTanh(Tanh):
    """The custom function with a backward pass that cannot be differentiated, as in many extensions."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0].tanh().square())


class OneDerivative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.above(OnceTanh.apply(self.below(x)))


@by_second_derivatives
def test_a_function_that_is_differentiable_once_is_refused_where_two_derivatives_are_needed(estimator: Any) -> None:
    case = seeded(OneDerivative, 5)
    message = "differentiated twice.*layer 'below.(weight|bias)'.*Use estimator='gauss_newton'"
    with pytest.raises(ValueError, match=message):
        hessian_trace(*case, estimator=estimator)


def test_a_function_that_is_differentiable_once_suffices_for_gauss_newton() -> None:
    case = seeded(OneDerivative, 5)
    actual = hessian_trace(*case, estimator="gauss_newton", rtol=None)
    smooth = nn.Sequential(case.model.below, nn.Tanh(), case.model.above)
    assert_same(actual, hessian_trace(smooth, *case[1:], estimator="gauss_newton", rtol=None))


@by_second_derivatives
def test_a_function_that_is_differentiable_once_does_no_harm_below_frozen_layers(estimator: Any) -> None:
    case = seeded(OneDerivative, 5)
    case.model.below.requires_grad_(requires_grad=False)
    smooth = nn.Sequential(case.model.below, nn.Tanh(), case.model.above)
    expected = hessian_trace(smooth, *case[1:], estimator=estimator, rtol=None)
    assert_same(hessian_trace(*case, estimator=estimator, rtol=None), expected)


class TwiceTanh(Tanh):
    """The custom function with a differentiable backward pass, under autograd's other name for it."""

    @staticmethod
    def vjp(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0].tanh().square())


@every_estimator
def test_a_custom_function_that_is_differentiable_twice_is_measured_correctly(estimator: Any) -> None:
    model, inputs, targets = seeded(OneDerivative, 5)

    def outputs(x: Tensor) -> Tensor:
        return model.above(TwiceTanh.apply(model.below(x)))

    smooth = nn.Sequential(model.below, nn.Tanh(), model.above)
    expected = hessian_trace(smooth, inputs, targets, estimator=estimator, rtol=None)
    assert_same(hessian_trace(outputs, inputs, targets, module=model, estimator=estimator, rtol=None), expected)


class Distances(nn.Module):
    """Logits are distances to centres, by a kernel that torch cannot differentiate twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.centres = nn.Linear(5, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.linear(x), self.centres)


@by_second_derivatives
def test_a_kernel_without_a_second_derivative_is_refused(estimator: Any) -> None:
    x = torch.eye(3, 4).requires_grad_()
    (slope,) = torch.autograd.grad(torch.cdist(x, torch.ones(2, 4)).sum(), x, create_graph=True)
    try:
        torch.autograd.grad(slope.sum(), x)
    except RuntimeError:
        case = seeded(Distances, 5)
    else:
        pytest.skip(f"torch {torch.__version__} has a second derivative of its distances")
    message = r"failed in layer 'centres': .*_cdist_backward' is not implemented\. Use estimator='gauss_newton'"
    with pytest.raises(ValueError, match=message):
        hessian_trace(*case, estimator=estimator)
    hessian_trace(*case, estimator="gauss_newton")


class Excited(nn.Module):
    """Features weighted by a gate, as in MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate, self.head = (
            nn.Linear(5, 4),
            nn.Sequential(nn.Linear(4, 4), nn.Hardsigmoid()),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        features = self.inner(x)
        return self.head(features * self.gate(features))


@every_estimator
def test_hard_sigmoid_is_differentiated_twice_although_torch_cannot(estimator: Any) -> None:
    case = seeded(Excited, 5)
    expected = hessian_traces_by_differences(
        case.model.double(), case.inputs.double(), case.targets, nn.CrossEntropyLoss()
    )
    if estimator == "gauss_newton":
        expected = dense_gauss_newton_traces(*case, nn.CrossEntropyLoss())
    case.model.float()
    estimate = hessian_trace(*case, estimator=estimator, num_probes=24, rtol=None, generator=seed(0))
    assert_within(estimate, expected)
    assert "forward" not in vars(case.model.gate[1])
    if estimator == "auto":
        assert {name for name, kind in estimate.estimator.items() if kind == "hutchinson"} == {
            "inner.weight",
            "inner.bias",
        }


def test_complex_weights_are_refused() -> None:
    model = nn.Linear(5, 3)
    model.weight = nn.Parameter(model.weight.to(torch.complex64))
    with pytest.raises(ValueError, match="Expected a model with real weights, but Linear has complex ones"):
        hessian_trace(model, torch.randn(4, 5), torch.zeros(4, dtype=torch.long))


class Indifferent(nn.Module):
    """Outputs that do not depend on any weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3]


@every_estimator
def test_a_network_that_does_not_depend_on_its_weights_is_refused(estimator: Any) -> None:
    with pytest.raises(ValueError, match=r"no gradient leads from them to any of \['weight'\]"):
        hessian_trace(*seeded(Indifferent, 5), estimator=estimator)


# --- losses and targets ---------------------------------------------------------------------------------------------


def test_gauss_newton_refuses_a_loss_without_a_known_root() -> None:
    for loss_fn, name in ((own_mse, "own_mse"), (nn.HuberLoss(), "HuberLoss")):
        with pytest.raises(ValueError, match=f"gauss_newton', but got {name}. Use estimator='hutchinson'"):
            hessian_trace(*small("relu_mlp"), loss_fn=loss_fn, estimator="gauss_newton")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("relu_mlp", {"estimator": "hutchinson"}),
        ("tanh_mlp", {"estimator": "auto"}),
        ("relu_mlp", {"loss_fn": nn.CrossEntropyLoss(weight=torch.ones(4))}),
        ("relu_mlp", {"loss_fn": nn.MSELoss(), "estimator": "gauss_newton"}),
        ("relu_mlp", {"loss_fn": own_mse}),
    ],
    ids=["hutchinson", "curved", "class weights", "mse", "own loss"],
)
def test_targets_are_required_where_they_matter(name: str, options: dict[str, Any]) -> None:
    model, inputs, _ = small(name)
    with pytest.raises(ValueError, match=r"`targets` to be a tensor, because estimator='.*but got None"):
        hessian_trace(model, inputs, **options)


@pytest.mark.parametrize(("name", "estimator"), [("relu_mlp", "auto"), ("tanh_mlp", "gauss_newton")])
def test_the_gauss_newton_trace_of_cross_entropy_needs_no_targets(name: str, estimator: Any) -> None:
    model, inputs, targets = small(name)
    for loss_fn in (None, nn.CrossEntropyLoss(label_smoothing=0.1)):
        options = {"estimator": estimator, "loss_fn": loss_fn, "rtol": None}
        with_targets = hessian_trace(model, inputs, targets, **options)
        assert_same(hessian_trace(model, inputs, **options), with_targets)


def test_class_weights_are_refused_where_all_samples_have_the_same_loss() -> None:
    _, inputs, targets = small("relu_mlp")
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs[0].numel(), 4, dtype=inputs.dtype))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    weight = torch.tensor([1.0, 2.0, 1.0, 3.0], dtype=inputs.dtype)
    with pytest.raises(ValueError, match="`loss_fn` to return a mean over samples, but its gradient on 12 samples is"):
        hessian_trace(model, inputs, targets, loss_fn=lambda z, y: F.cross_entropy(z, y, weight=weight.to(z)))


def test_a_loss_of_the_wrong_shape_is_refused() -> None:
    model, inputs, targets = small("relu_mlp")
    with pytest.raises(ValueError, match=r"`loss_fn` to return one loss per sample, .*but got shape \(4,\)"):
        hessian_trace(model, inputs, targets, loss_fn=lambda z, _: z.mean(dim=0))


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda z, y: F.cross_entropy(z, y, weight=torch.tensor([0.2, 5.0, 1.0, 8.0])),
        lambda z, y: F.cross_entropy(z, y, ignore_index=1),
        lambda z, y: F.cross_entropy(z - z.mean(dim=0), y),
        lambda z, y: F.cross_entropy(z, y, reduction="sum"),
        lambda z, y: F.cross_entropy(z, y).sqrt(),
    ],
    ids=["class weights", "ignored class", "compares samples", "sum", "root of the mean"],
)
def test_a_loss_that_is_not_a_mean_over_samples_is_refused(loss_fn: Any) -> None:
    model, inputs, targets = small("relu_mlp")
    for chunk_size in (None, 1):
        with pytest.raises(
            ValueError, match=r"`loss_fn` to return a mean over samples, but its value on 12 samples is"
        ):
            hessian_trace(model, inputs, targets, loss_fn=loss_fn, chunk_size=chunk_size)


class SquaredError(torch.autograd.Function):
    """Mean squared error with a backward pass that cannot be differentiated; torch does not always raise."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(2 * (outputs - targets) / outputs.numel())
        return (outputs - targets).square().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class OneByOne(nn.Module):
    """A fused cross-entropy that ignores the first two samples."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = torch.stack([FusedCrossEntropy.apply(z[None], y[None]) for z, y in zip(outputs, targets, strict=True)])
        return losses * (outputs.new_ones(len(outputs)).cumsum(0) > 2)


class FusedCrossEntropy(torch.autograd.Function):
    """Cross-entropy that computes its gradient in the forward pass, as fused kernels do: a constant for autograd."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward((outputs.softmax(1) - F.one_hot(targets, outputs.shape[1])) / len(outputs))
        return F.cross_entropy(outputs, targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


@by_second_derivatives
@pytest.mark.parametrize("kind", [SquaredError, FusedCrossEntropy])
def test_a_loss_without_a_second_derivative_is_refused(kind: Any, estimator: Any) -> None:
    model, inputs, targets = small("relu_mlp")
    targets = F.one_hot(targets, 4).float() if kind is SquaredError else targets
    for factor in (0.0, 1.0):
        with torch.no_grad():
            for parameter in model[-1].parameters():
                parameter.mul_(factor)
        with pytest.raises(
            ValueError, match=f"`loss_fn` to be a loss that can be differentiated twice, but {kind.__name__}"
        ):
            hessian_trace(model, inputs, targets, loss_fn=kind.apply, estimator=estimator)


def test_a_missing_second_derivative_is_found_where_the_first_samples_are_ignored() -> None:
    with pytest.raises(ValueError, match="FusedCrossEntropyBackward has another second derivative"):
        hessian_trace(*small("relu_mlp"), loss_fn=OneByOne())


class TrueCrossEntropy(torch.autograd.Function):
    """Cross-entropy with a custom backward pass that autograd can differentiate."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(outputs, targets)
        return F.cross_entropy(outputs, targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        outputs, targets = ctx.saved_tensors
        return grad * (outputs.softmax(1) - F.one_hot(targets, outputs.shape[1])) / len(outputs), None


def absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - 0 * targets[:, None]).abs().mean()


def in_single_precision(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.float(), targets, weight=torch.ones(4), reduction="none")


def of_probabilities(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy((0.01 * outputs).sigmoid(), F.one_hot(targets, 4).to(outputs))


def cubed(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.pow(3).sum(dim=1).mean()


@pytest.mark.parametrize(
    ("loss_fn", "in_double"),
    [
        (absolute_error, absolute_error),
        (in_single_precision, F.cross_entropy),
        (cubed, cubed),
        (of_probabilities, of_probabilities),
        (TrueCrossEntropy.apply, F.cross_entropy),
    ],
    ids=["kinks", "constants", "cubed", "probabilities", "by hand"],
)
@pytest.mark.parametrize("factor", [0.0, 1.0, 100.0])
def test_losses_with_kinks_constants_or_unusual_scales_are_accepted(
    loss_fn: Any, in_double: Any, factor: float
) -> None:
    case = small("tanh_mlp")
    with torch.no_grad():
        for parameter in case.model[-1].parameters():
            parameter.mul_(factor)
    estimate = hessian_trace(*case, loss_fn=loss_fn, rtol=None, num_probes=16)
    assert_within(estimate, dense_hessian_traces(*case, in_double), num_stderr=4)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (nn.MSELoss, "`loss_fn` to be a function or a module, but got the class MSELoss"),
        ("mse", "`loss_fn` to be a function or a module, but got str"),
        (lambda z, y: 0.5, "`loss_fn` to return a tensor, but got float"),
    ],
)
def test_a_loss_that_is_not_a_function_of_tensors_is_refused(loss_fn: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        hessian_trace(*small("relu_mlp"), loss_fn=loss_fn)


@every_estimator
def test_targets_must_be_as_many_as_inputs(estimator: Any) -> None:
    model, inputs, targets = small("tanh_mlp")
    for wrong in (targets[:5], targets.repeat(2)):
        with pytest.raises(ValueError, match="targets"):
            hessian_trace(model, inputs, wrong, estimator=estimator)


# --- when to stop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", [lambda: None, lambda: seed(0)], ids=["by contents", "at random"])
def test_probes_are_taken_until_the_standard_error_is_small_enough(generator: Callable[[], Any]) -> None:
    case = small("tanh_mlp", num_samples=32)
    rough = hessian_trace(*case, rtol=None, num_probes=2, generator=generator())
    share = float(rough.total_stderr / rough.total)
    precise = hessian_trace(*case, rtol=share / 2, num_probes=2, max_probes=400, generator=generator())
    assert precise.total_stderr <= share / 2 * precise.total
    assert 2 < precise.num_probes < 100  # about eight are needed
    enough = hessian_trace(*case, rtol=1.01 * share, num_probes=2, generator=generator())
    assert enough.num_probes == 2


@pytest.mark.parametrize(("num_samples", "num_probes"), [(1, 64), (2, 64), (20, 13), (100, 3), (128, 2), (300, 2)])
def test_by_default_there_are_256_single_sample_probes_in_total(num_samples: int, num_probes: int) -> None:
    case = small("relu_mlp", num_samples=num_samples)
    assert hessian_trace(*case, rtol=None).num_probes == num_probes


def test_the_number_of_probes_is_never_above_the_largest_allowed() -> None:
    case = small("tanh_mlp")
    assert hessian_trace(*case, rtol=1e-4, max_probes=7).num_probes == 7
    assert hessian_trace(*case, rtol=1e-4, max_probes=1, num_probes=1).num_probes == 1
    assert hessian_trace(*case, rtol=1e-4, max_probes=3, num_probes=8).num_probes == 3


def test_the_number_of_probes_at_most_doubles_at_once() -> None:
    """The first error estimate is rough and must not decide the number of probes alone."""
    case = small("tanh_mlp")
    taken = [hessian_trace(*case, rtol=1e-6, num_probes=2, max_probes=limit).num_probes for limit in (8, 9)]
    assert taken == [8, 9]


def test_a_single_probe_has_no_error_and_more_follow_only_if_one_is_needed() -> None:
    case = small("relu_cnn")
    single = hessian_trace(*case, num_probes=1, rtol=None)
    assert single.num_probes == 1
    assert single.total_stderr.isnan()
    assert all(error.isnan() for error in single.stderr.values())
    assert single.total_sample_stderr > 0
    assert hessian_trace(*case, num_probes=1, rtol=0.5).num_probes > 1


@every_estimator
def test_probes_taken_in_rounds_equal_those_taken_at_once(estimator: Any) -> None:
    case = small("tanh_mlp", num_samples=4)
    problem = CurvatureProblem(*case, estimator=estimator)
    for seeds in (ProbeSeeds.from_contents(case.inputs), ProbeSeeds.random(len(case.inputs), seed(0))):
        with problem.examined() as examined:
            few, later = (examined.sums(seeds, examined.plan.probes(*ends)) for ends in ((0, 3), (3, 8)))
        with problem.examined() as examined:
            all_at_once = examined.sums(seeds, examined.plan.probes(0, 8))
        both = joined(few, later)
        for ours, theirs in zip(both.parts, all_at_once.parts, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert torch.equal(both.weights, all_at_once.weights)


@pytest.mark.parametrize(
    ("name", "estimator"), [("relu_cnn", "auto"), ("tanh_mlp", "hutchinson"), ("tanh_mlp", "gauss_newton")]
)
def test_stopping_at_a_number_of_probes_equals_asking_for_that_number(name: str, estimator: Any) -> None:
    case = small(name)
    for generator in (lambda: None, lambda: seed(3)):
        options = {"estimator": estimator, "max_probes": 11}
        stopped = hessian_trace(*case, rtol=0.005, generator=generator(), **options)
        assert stopped.num_probes > 2
        asked = hessian_trace(*case, rtol=None, num_probes=stopped.num_probes, generator=generator(), **options)
        assert_same(stopped, asked, rtol=1e-6)


# --- random signs -------------------------------------------------------------------------------------------------


@every_estimator
def test_without_a_generator_the_same_samples_give_the_same_numbers(estimator: Any) -> None:
    case = small("tanh_mlp", num_samples=4)
    first, again = (hessian_trace(*case, estimator=estimator, rtol=0.2) for _ in range(2))
    assert_same(again, first, rtol=0)


@every_estimator
def test_the_generator_determines_all_signs(estimator: Any) -> None:
    case = small("tanh_mlp")
    first, again, other = (
        hessian_trace(*case, estimator=estimator, rtol=None, num_probes=2, generator=seed(number))
        for number in (0, 0, 1)
    )
    assert_same(again, first, rtol=0)
    assert all(other.layers[name] != trace for name, trace in first.layers.items())
    generator = seed(0)
    hessian_trace(*case, estimator=estimator, rtol=None, num_probes=2, generator=generator)
    second = hessian_trace(*case, estimator=estimator, rtol=None, num_probes=2, generator=generator)
    assert all(second.layers[name] != trace for name, trace in first.layers.items())


def pixels(levels: int) -> Tensor:
    """Images with few grey levels, whose floats end in many zero bits."""
    return torch.randint(levels, (1600, 64), generator=seed(0)).float()


CONTENTS: dict[str, Tensor] = {
    "normal": torch.randn(1600, 3, generator=seed(0)),
    "normal in half precision": torch.randn(1600, 3, generator=seed(0)).bfloat16(),
    "normal in double precision": torch.randn(1600, 3, generator=seed(0)).double(),
    "one number": torch.arange(1600.0)[:, None],
    "bytes": pixels(256) / 255,
    "digits": pixels(17),
    "digits in double precision": pixels(17).double() / 16,
    "black and white": pixels(2),
    "black and white in double precision": pixels(2).double(),
}
every_contents = pytest.mark.parametrize("inputs", CONTENTS.values(), ids=CONTENTS)


@every_contents
def test_different_samples_get_different_signs(inputs: Tensor) -> None:
    different = len(inputs.unique(dim=0))
    signs = sample_signs(ProbeSeeds.from_contents(inputs).keys, range(1), [64] * 1600, width=64)[0]
    assert different == 1600
    assert len(signs.unique(dim=0)) >= different - 1


@every_contents
def test_blocks_are_about_equally_full(inputs: Tensor) -> None:
    for seeds in (ProbeSeeds.from_contents(inputs), ProbeSeeds.random(1600, seed(0))):
        counts = torch.tensor(seeds.blocks).bincount(minlength=16)
        assert len(counts) == 16
        assert (counts - 100).abs().max() <= 40  # four standard deviations


@every_estimator
def test_as_many_probes_as_degrees_of_freedom_leave_no_noise(estimator: Any) -> None:
    """C classes have C − 1 degrees of freedom, so C − 1 probes are exact."""
    for num_classes, num_probes in ((2, 1), (3, 2), (4, 3), (4, 8)):
        case = seeded(lambda c=num_classes: relu_mlp(num_classes=c), 5)
        for generator in (None, seed(0)):
            estimate = hessian_trace(*case, estimator=estimator, num_probes=num_probes, rtol=None, generator=generator)
            if estimator != "hutchinson":
                assert estimate.total_stderr == 0
                expected = dense_hessian_traces(*case, nn.CrossEntropyLoss())
                assert {k: float(v) for k, v in estimate.layers.items()} == pytest.approx(expected, rel=1e-4)
                assert estimate.num_probes == num_probes
    assert hessian_trace(*small("relu_mlp", num_samples=3), rtol=1e-9, max_probes=5).total_stderr == 0


def test_the_signs_of_weights_depend_on_every_bit_of_the_seed() -> None:
    problem = CurvatureProblem(*small("tanh_mlp", num_samples=1), estimator="hutchinson")
    with problem.examined() as examined:
        traces = {
            float(examined.sums(ProbeSeeds([0], [0], seed=number), examined.plan.probes(0, 1)).means()[0])
            for number in (1, 1 + 2**12, 1 + 2**20, 1 + 2**30, 1 + 2**42)
        }
    assert len(traces) == 5
