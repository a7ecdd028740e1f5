"""In any state of network and caller, a network is measured like its float32 copy and left unchanged."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_robust import Probe
from lightning_robust.functional import (
    Linearization,
    fim_spectral_norm,
    hessian_trace,
    linearize,
    linearized_margin,
    trace_fisher_rao_paths,
)
from lightning_robust.functional._isolation.context import differentiable
from tests.helpers.contexts import CONTEXTS, every_context
from tests.helpers.networks import NETWORKS, build, random
from tests.helpers.recording import Recorder, state_of

every_network = pytest.mark.parametrize("name", NETWORKS)


def assert_equal(actual: Linearization, expected: Linearization) -> None:
    for field in ("logits", "gram", "gap_l1"):
        torch.testing.assert_close(getattr(actual, field), getattr(expected, field), rtol=1e-6, atol=1e-6)


@pytest.fixture
def compiled() -> Iterator[tuple[Callable[[nn.Module], nn.Module], dict[str, int]]]:
    """``torch.compile`` with a backend that counts what is compiled and what is run."""
    counts = {"compiled": 0, "run": 0}

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        counts["compiled"] += 1

        def run(*args: Any) -> Any:
            counts["run"] += 1
            return graph(*args)

        return run

    torch._dynamo.reset()
    yield lambda model: torch.compile(model, backend=backend), counts
    torch._dynamo.reset()


# --- the network is left as it was ----------------------------------------------------------------------------------


@every_context
@every_network
def test_weights_gradients_buffers_and_modes_are_left_as_they_were(
    name: str, context: Callable[[], AbstractContextManager[Any]]
) -> None:
    model, inputs, _ = build(name)
    next(model.parameters()).requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5) if parameter.requires_grad else None
    frozen = next((module for module in model.modules() if isinstance(module, nn.BatchNorm2d)), model)
    frozen.eval()
    before, given = state_of(model), inputs.clone()
    with context():
        linearize(model, given)
    assert state_of(model) == before
    assert torch.equal(given, inputs)
    assert given.grad is None


def test_the_forward_pass_runs_in_eval_mode_without_gradients_of_weights() -> None:
    model, inputs, _ = build("cnn_batchnorm")
    recorder = Recorder(model).train()
    linearize(recorder, inputs)
    assert not any(recorder.record.any_training)
    assert not any(recorder.record.any_parameter_requires_grad)


class Failing(nn.Module):
    """Writes to its buffer and fails at the given call."""

    def __init__(self, model: nn.Module, at_call: int) -> None:
        super().__init__()
        self.model, self.at_call, self.num_calls = model, at_call, 0
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        self.counter.add_(1)
        if self.num_calls == self.at_call:
            raise RuntimeError("out of luck")
        return self.model(x)


@pytest.mark.parametrize("at_call", [1, 2, 3], ids=["first chunk", "second chunk", "third chunk"])
def test_an_exception_in_the_network_passes_through_and_leaves_it_as_it_was(at_call: int) -> None:
    model, inputs, _ = build("cnn_batchnorm")
    failing = Failing(model, at_call).train()
    model[1].eval()
    before = state_of(failing)
    with pytest.raises(RuntimeError, match="out of luck"):
        linearize(failing, inputs, chunk_size=3)
    assert state_of(failing) == before
    assert torch.is_grad_enabled()


class Counting(nn.Module):
    """Counts its calls in two buffers, one updated in place and one replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("in_place", torch.zeros((), dtype=torch.long))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += 1
        self.replaced = self.replaced + 1
        return self.head(x)


def test_a_forward_pass_that_writes_to_its_buffers_leaves_no_trace() -> None:
    model = Counting()
    before = state_of(model)
    linearize(model, torch.ones(3, 4))
    assert state_of(model) == before


class TableOnDemand(nn.Module):
    """Fills a buffer at its first call, in the precision of its input, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("table", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(4).to(x)
        return self.head(x * self.table)


def test_a_buffer_that_is_filled_on_demand_is_empty_afterwards() -> None:
    model = TableOnDemand().bfloat16()
    linearize(model, torch.ones(3, 4))
    assert model.table is None


class OverridesTrain(nn.Module):
    """A network that unfreezes layers by itself, as some LightningModules do."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.calls = 0

    def train(self, mode: bool = True) -> "OverridesTrain":
        self.calls += 1
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_user_overrides_of_train_are_not_called() -> None:
    model = OverridesTrain(build("cnn_batchnorm")[0])
    linearize(model, build("cnn_batchnorm")[1])
    assert model.calls == 0


def test_a_bound_method_shields_its_module() -> None:
    model, inputs, _ = build("cnn_batchnorm")
    before = state_of(model)
    assert_equal(linearize(model.forward, inputs), linearize(model, inputs))
    assert state_of(model) == before


def test_modules_beside_the_model_are_shielded_if_they_are_named() -> None:
    inner, outer = nn.Linear(2, 2), nn.Linear(2, 2)
    with differentiable(outer, inner.forward, lambda x: x):
        assert not inner.training
        assert not outer.training
        assert not any(p.requires_grad for p in (*inner.parameters(), *outer.parameters()))
    assert inner.training
    assert outer.training


def test_nesting_leaves_the_outer_shield_in_place() -> None:
    model = Counting()
    before = state_of(model)
    with differentiable(model):
        during = state_of(model)
        linearize(model, torch.ones(2, 4))
        assert state_of(model) == during
    assert state_of(model) == before


# --- whatever the caller's mode -------------------------------------------------------------------------------------


@every_context
@every_network
def test_every_context_gives_the_same_values(name: str, context: Callable[[], AbstractContextManager[Any]]) -> None:
    model, inputs, targets = build(name)
    expected = linearize(model, inputs)
    with context():
        actual = linearize(model, inputs.clone())  # an inference tensor, under inference mode
        norm = fim_spectral_norm(actual.logits, actual.gram)
        margin = linearized_margin(actual.logits, actual.gram, targets)
        assert torch.is_autocast_enabled("cpu") == (context is CONTEXTS["autocast"])
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
        assert torch.is_grad_enabled() == (context not in (torch.no_grad, torch.inference_mode))
    assert_equal(actual, expected)
    torch.testing.assert_close(norm, fim_spectral_norm(expected.logits, expected.gram), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(margin, linearized_margin(expected.logits, expected.gram, targets), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("measured_under", [nullcontext, torch.inference_mode])
@every_network
def test_networks_and_inputs_made_under_inference_mode_can_be_measured(name: str, measured_under: Any) -> None:
    model, inputs, _ = build(name)
    expected = linearize(model, inputs)
    with torch.inference_mode():
        born = copy.deepcopy(model)
        for module in born.modules():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None:
                        twin = tensor.detach().clone()
                        tensors[key] = nn.Parameter(twin) if isinstance(tensor, nn.Parameter) else twin
        inputs = inputs.clone()
    assert all(parameter.is_inference() for parameter in born.parameters())
    before = state_of(born)
    with measured_under():
        assert_equal(linearize(born, inputs), expected)
    assert state_of(born) == before


# --- whatever the network's own state -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_network
def test_a_network_in_half_precision_is_measured_as_its_float32_copy(name: str, dtype: torch.dtype) -> None:
    model, inputs, _ = build(name)
    model, inputs = model.to(dtype), inputs.to(dtype)
    expected = linearize(copy.deepcopy(model).float(), inputs.float())
    before = state_of(model)
    actual = linearize(model, inputs)
    assert actual.logits.dtype == torch.float32
    assert_equal(actual, expected)
    assert_equal(linearize(model, inputs.float()), expected)
    assert state_of(model) == before


@pytest.mark.parametrize("name", ["mlp", "cnn_batchnorm"])
def test_a_compiled_network_runs_eagerly_and_stays_compiled(name: str, compiled: Any) -> None:
    compile_, counts = compiled
    model, inputs, _ = build(name)
    model.eval()
    fast, expected = compile_(model), linearize(model, inputs)
    fast(inputs)
    warm = dict(counts)
    assert warm["compiled"] > 0
    for _ in range(2):
        assert_equal(linearize(fast, inputs), expected)
        assert_equal(linearize(Recorder(fast), inputs[:3]), linearize(model, inputs[:3]))
    assert counts == warm
    fast(inputs)
    assert counts == {"compiled": warm["compiled"], "run": warm["run"] + warm["run"]}


def test_tied_weights_are_one_tensor() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.second.weight = self.first.weight
            self.same: list[bool] = []

        def forward(self, x: Tensor) -> Tensor:
            self.same.append(self.first.weight is self.second.weight)
            return self.head(self.second(self.first(x).tanh()).tanh())

    model, inputs = Tied(), random(0, 3, 4, dtype=torch.float32)
    before = state_of(model)
    actual = linearize(model.bfloat16(), inputs)
    assert all(model.same)
    assert model.first.weight is model.second.weight
    assert_equal(actual, linearize(copy.deepcopy(model).float(), inputs))
    assert before.keys() == state_of(model).keys()


@pytest.mark.parametrize("parametrization", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_parametrised_weights_are_measured_and_left_as_they_were(
    parametrization: Callable[[nn.Module], nn.Module],
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(parametrization(nn.Linear(6, 8)), nn.Tanh(), parametrization(nn.Linear(8, 3)))
    inputs = random(0, 4, 6, dtype=torch.float32)
    plain = copy.deepcopy(model).eval()
    weights = [layer.weight.detach() for layer in (plain[0], plain[2])]
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    plain.load_state_dict(
        {"0.weight": weights[0], "0.bias": model[0].bias, "2.weight": weights[1], "2.bias": model[2].bias}
    )
    before = state_of(model)
    assert_equal(linearize(model, inputs), linearize(plain, inputs))
    assert state_of(model) == before


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_network_is_measured_and_left_as_it_was() -> None:
    model, inputs, _ = build("cnn_batchnorm")
    scripted = torch.jit.script(model)
    before, mode = {name: value.clone() for name, value in scripted.state_dict().items()}, scripted.training
    assert_equal(linearize(scripted, inputs), linearize(model, inputs))
    assert scripted.training == mode
    assert all(torch.equal(value, before[name]) for name, value in scripted.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in scripted.parameters())


def test_a_copied_recurrent_network_is_measured_as_the_original() -> None:
    model, inputs, _ = build("recurrent")
    expected = linearize(model, inputs)
    twin = copy.deepcopy(model)
    assert_equal(linearize(twin, inputs), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not linearize(twin, inputs).gram.any()
    assert_equal(linearize(model, inputs), expected)


def test_a_recurrent_network_trains_on_its_own_weights_afterwards() -> None:
    model, inputs, _ = build("recurrent")
    expected = torch.autograd.grad(model(inputs).sum(), list(model.parameters()))
    with torch.inference_mode():
        linearize(model, inputs)
    actual = torch.autograd.grad(model(inputs).sum(), list(model.parameters()))
    assert all(map(torch.equal, actual, expected))


def test_a_recurrent_network_holds_on_to_no_stand_in() -> None:
    model, inputs, _ = build("recurrent")
    rnn = model.rnn
    linearize(model.bfloat16(), inputs)
    assert all(
        held is getattr(rnn, name) for held, name in zip(rnn._flat_weights, rnn._flat_weights_names, strict=True)
    )


def test_cudnn_stays_as_the_user_set_it() -> None:
    model, inputs, _ = build("recurrent")
    for enabled in (False, True):
        with torch.backends.cudnn.flags(enabled=enabled):
            linearize(model, inputs)
            assert torch.backends.cudnn.enabled == enabled


def test_a_partial_application_of_a_network_is_shielded_as_the_network_is() -> None:
    model, inputs, _ = build("cnn_batchnorm")
    before = state_of(model)
    assert_equal(linearize(functools.partial(model), inputs), linearize(model, inputs))
    assert state_of(model) == before


# --- a forward pass that takes gradients itself ---------------------------------------------------------------------


class Energy(nn.Module):
    """Classifies by the gradient of an energy, as models of forces do."""

    def __init__(self, *, create_graph: bool = True) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
        self.head, self.create_graph = nn.Linear(5, 3), create_graph

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.clone().requires_grad_()
        (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=self.create_graph)
        return self.head(force)


class ByDefinition(Energy):
    """Its force in closed form: the gradient of ``vᵀ tanh(Wx + b)``."""

    def forward(self, x: Tensor) -> Tensor:
        first, _, last = self.energy
        return self.head((last.weight[0] * (1 - first(x).tanh() ** 2)) @ first.weight)


class WithGradModeOn(Energy):
    """Switches gradients on for itself."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return super().forward(x)


class ByTransform(Energy):
    """Takes the gradient by ``torch.func``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.func.grad(lambda x: self.energy(x).sum())(x))


def energy(cls: type[Energy], **options: bool) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(**options).double(), torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 3


@pytest.mark.parametrize("cls", [Energy, WithGradModeOn, ByTransform])
def test_a_forward_pass_that_takes_a_gradient_is_measured_as_the_function_that_it_is(cls: type[Energy]) -> None:
    (model, x, targets), (plain, _, _) = energy(cls), energy(ByDefinition)
    torch.testing.assert_close(linearize(model, x).gram, linearize(plain, x).gram)
    paths, others = (trace_fisher_rao_paths(net, x, max_steps=4) for net in (model, plain))
    torch.testing.assert_close(paths.margins, others.margins)
    torch.testing.assert_close(Probe(model, x, targets).logits(x), plain(x).detach())
    assert not Probe(model, x, targets).logits(x).requires_grad
    for estimator in ("gauss_newton", "hutchinson"):
        settings: dict[str, Any] = {"estimator": estimator, "num_probes": 3, "rtol": None}
        measured, expected = (hessian_trace(net, x, targets, **settings) for net in (model, plain))
        assert set(expected.unreached) == set(measured.unreached) == {"energy.2.bias"}  # an energy has no level
        torch.testing.assert_close(measured.layers, expected.layers)
    curved = {
        name for name, estimator in hessian_trace(model, x, targets).estimator.items() if estimator != "gauss_newton"
    }
    assert {"energy.0.weight", "energy.0.bias"} <= curved


def test_weights_behind_a_gradient_without_a_graph_are_left_out() -> None:
    model, x, targets = energy(Energy, create_graph=False)
    measured = hessian_trace(model, x, targets)
    assert set(measured.layers) == {"head.weight", "head.bias"}
    assert set(measured.unreached) == {"energy.0.weight", "energy.0.bias", "energy.2.weight", "energy.2.bias"}


def test_other_errors_of_a_pass_without_gradients_are_raised_as_they_are() -> None:
    calls = []

    def fails(x: Tensor) -> Tensor:
        calls.append(len(x))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        Probe(fails, torch.ones(2, 3), torch.zeros(2, dtype=torch.long)).outputs(torch.ones(2, 3))
    assert len(calls) == 1
