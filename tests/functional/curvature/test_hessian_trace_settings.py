"""Curvature does not depend on the state of network, caller or batch, and leaves all three unchanged."""

import copy
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint

from lightning_robust.functional import TraceEstimate, hessian_trace
from lightning_robust.functional.curvature import _use_norms
from lightning_robust.functional.curvature._sample_gradients import SampleGradients
from tests.helpers import networks
from tests.helpers.contexts import CONTEXTS, every_context
from tests.helpers.curvature import NETWORKS as SMALL_NETWORKS
from tests.helpers.curvature import Case, assert_same, assert_within, relu_mlp, seed, seeded, small, tanh_mlp
from tests.helpers.oracles import dense_gauss_newton_traces, hessian_traces_by_differences
from tests.helpers.recording import Recorder, state_of

CROSS_ENTROPY = nn.CrossEntropyLoss()
every_small_network = pytest.mark.parametrize("name", SMALL_NETWORKS)
every_estimator = pytest.mark.parametrize("estimator", ["auto", "hutchinson", "gauss_newton"])


def measure(case: Case, **options: Any) -> TraceEstimate:
    return hessian_trace(*case, **{"rtol": None, "num_probes": 2, **options})


def values(estimate: TraceEstimate) -> dict[str, float]:
    return {name: float(trace) for name, trace in estimate.layers.items()}


# --- which parameters -----------------------------------------------------------------------------------------------


def two_classes() -> Case:
    """A case without noise in its Gauss–Newton traces: the root for two classes has one column."""
    return seeded(lambda: relu_mlp(num_classes=2), 5)


def test_frozen_parameters_are_left_out_without_effect_on_others() -> None:
    case = two_classes()
    everything = values(measure(case))
    case.model[0].weight.requires_grad_(requires_grad=False)
    some = values(measure(case))
    assert list(some) == ["0.bias", "2.weight", "2.bias"]
    assert some == pytest.approx({name: everything[name] for name in some}, rel=1e-5)
    assert not case.model[0].weight.requires_grad


@every_estimator
def test_a_completely_frozen_network_is_refused(estimator: Any) -> None:
    case = two_classes()
    case.model.requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="Sequential has none with `requires_grad=True`"):
        measure(case, estimator=estimator)


class WithSpare(nn.Module):
    """A network with an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.body = nn.Linear(3, 3), tanh_mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@every_estimator
def test_unused_parameters_are_left_out_and_named(estimator: Any) -> None:
    estimate = measure(seeded(WithSpare, 5), estimator=estimator)
    assert estimate.unreached == ("spare.weight", "spare.bias")
    by_layer = (estimate.layers, estimate.stderr, estimate.sample_stderr, estimate.estimator, estimate.matrix)
    assert all(layers.keys() == estimate.layers.keys() for layers in by_layer)
    assert all(name.startswith("body") and trace != 0 for name, trace in estimate.layers.items())


def test_an_unused_layer_costs_no_second_derivatives() -> None:
    class Spare(WithSpare):
        def __init__(self) -> None:
            super().__init__()
            self.body = relu_mlp()

    assert set(measure(seeded(Spare, 5)).estimator.values()) == {"gauss_newton"}


class LinearInOne(nn.Module):
    """The loss is linear in ``level``, which raises all logits alike, and curved in the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.level, self.head = nn.Parameter(torch.ones(1)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.level


@every_estimator
def test_a_parameter_in_which_the_loss_is_linear_has_a_trace_of_zero(estimator: Any) -> None:
    estimate = measure(seeded(LinearInOne, 5), estimator=estimator)
    assert estimate.unreached == ()
    assert float(estimate.layers["level"]) == pytest.approx(0, abs=1e-6)
    assert float(estimate.stderr["level"]) == pytest.approx(0, abs=1e-6)


class Merged(nn.Module):
    """A low-rank adapter that is folded into the weight in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(5, 4)
        self.down, self.up = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(4, 2))
        self.head = nn.Linear(4, 3)
        self.merged = False

    def train(self, mode: bool = True) -> "Merged":
        if mode == self.merged:
            with torch.no_grad():
                self.base.weight += (-1 if mode else 1) * (self.up @ self.down)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        z = self.base(x)
        return self.head(torch.tanh(z if self.merged else z + x @ self.down.T @ self.up.T))


def test_an_adapter_that_is_folded_into_a_weight_is_left_out_and_the_rest_is_measured() -> None:
    case, options = seeded(Merged, 5), {"estimator": "gauss_newton", "num_probes": 2, "rtol": None}  # exact
    apart = hessian_trace(*case, **options)
    assert apart.unreached == ()
    case.model.eval()
    folded = hessian_trace(*case, **options)
    assert folded.unreached == ("down", "up")
    assert set(folded.layers) == {"base.weight", "base.bias", "head.weight", "head.bias"}
    for name, trace in folded.layers.items():  # the same function of these weights
        torch.testing.assert_close(trace, apart.layers[name], rtol=1e-4, atol=1e-6)


def test_buffers_are_left_out_and_bare_parameters_are_measured() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))
            self.register_buffer("factor", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor + self.shift

    assert list(measure(seeded(Bare, 3)).layers) == ["shift"]


# --- kinds of networks ------------------------------------------------------------------------------------


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("name", ["relu_mlp", "tanh_mlp"])
def test_a_compiled_network_is_measured_as_itself(name: str) -> None:
    case = small(name)
    expected = measure(case)
    whole = torch.compile(case.model, backend="eager")
    inner = nn.Sequential(torch.compile(case.model[:-1], backend="eager"), case.model[-1])
    for compiled in (whole, inner):
        compiled(case.inputs)  # compiles
        actual = measure(case._replace(model=compiled))
        assert_same(actual, expected)
        assert not any("_orig_mod" in layer for layer in actual.layers)
    assert list(measure(case._replace(model=whole)).layers) == list(expected.layers)


class Checkpointed(nn.Module):
    """A network with activation checkpointing in the middle."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 5), tanh_mlp()[:3], nn.Linear(6, 3)
        self.use_reentrant: bool | None = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if self.use_reentrant is None:
            return self.last(self.middle(x))
        return self.last(checkpoint(self.middle, x, use_reentrant=self.use_reentrant))


@every_estimator
def test_activation_checkpointing_changes_nothing(estimator: Any) -> None:
    case = seeded(lambda: Checkpointed(use_reentrant=False), 5)
    actual = measure(case, estimator=estimator)
    case.model.use_reentrant = None
    assert_same(actual, measure(case, estimator=estimator))
    assert float(actual.layers["middle.0.weight"]) != 0


def test_a_checkpointed_network_agrees_with_finite_differences() -> None:
    case = seeded(lambda: Checkpointed(use_reentrant=False), 5, num_samples=4)
    assert_within(measure(case, num_probes=24, generator=seed(0)), hessian_traces_by_differences(*case, CROSS_ENTROPY))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # under no_grad, by torch
@every_estimator
def test_re_entrant_checkpointing_is_refused_with_the_remedy(estimator: Any) -> None:
    case = seeded(lambda: Checkpointed(use_reentrant=True), 5)
    with pytest.raises((ValueError, RuntimeError), match="use_reentrant=False"):
        measure(case, estimator=estimator)


@pytest.mark.parametrize("estimator", ["auto", "hutchinson"])
def test_a_recurrent_network_agrees_with_finite_differences(estimator: Any) -> None:
    model, inputs, targets = networks.build("recurrent", num_samples=2)
    expected = hessian_traces_by_differences(model, inputs, targets, CROSS_ENTROPY)
    assert_within(
        measure(Case(model, inputs, targets), estimator=estimator, num_probes=24, generator=seed(0)), expected
    )


class Tokens(nn.Module):
    """Embeds token ids, which come as floats, in one of several ways."""

    def __init__(self, way: str, *, sparse: bool) -> None:
        super().__init__()
        kind = nn.EmbeddingBag if way == "bag" else nn.Embedding
        self.table, self.head, self.way = kind(7, 5, sparse=sparse), nn.Linear(5, 3), way
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(networks.random(number, *parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        ids = x.long()
        if self.way == "bag":
            found = self.table(ids)
        elif self.way == "function":
            found = F.embedding(ids, self.table.weight, sparse=self.table.sparse).mean(dim=1)
        else:
            found = self.table(ids).mean(dim=1) + (self.table.weight.mean(dim=0) if self.way == "tied" else 0)
        out: Tensor = self.head(torch.tanh(found))
        return out


@pytest.mark.parametrize("way", ["layer", "function", "tied", "bag"])
def test_sparse_embeddings_are_measured_as_dense_ones_are(way: str) -> None:
    inputs, targets = torch.arange(24).reshape(6, 4).float() * 3 % 7, torch.arange(6) % 3
    sparse = Case(Tokens(way, sparse=True), inputs, targets)
    dense = Case(Tokens("tied" if way == "tied" else "layer", sparse=False), inputs, targets)
    exact = measure(sparse, estimator="gauss_newton")
    assert values(exact) == pytest.approx(dense_gauss_newton_traces(*dense, CROSS_ENTROPY), rel=1e-4)
    if way != "bag":  # torch has no second derivative of it
        for estimator in ("auto", "hutchinson"):
            assert values(measure(sparse, estimator=estimator)) == values(measure(dense, estimator=estimator))
    (slope,) = torch.autograd.grad(sparse.model(inputs).sum(), sparse.model.table.weight)
    assert slope.is_sparse or way == "tied"


def test_parametrised_weights_are_measured_in_their_parameters() -> None:
    case = seeded(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, 3)), 5)
    estimate = measure(case, num_probes=24, generator=seed(0))
    assert_within(estimate, hessian_traces_by_differences(*case, CROSS_ENTROPY))
    assert estimate.estimator["0.parametrizations.weight.original1"] == "hutchinson"
    assert estimate.estimator["0.parametrizations.weight.original0"] == "gauss_newton"


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_old_and_new_weight_norm_give_equal_numbers_and_the_old_keeps_its_weight() -> None:
    new = parametrizations.weight_norm(nn.Linear(5, 4))
    old = weight_norm(nn.Linear(5, 4))
    with torch.no_grad():
        old.weight_g.copy_(new.parametrizations.weight.original0)
        old.weight_v.copy_(new.parametrizations.weight.original1)
        old.bias.copy_(new.bias)
    head, inputs = nn.Linear(4, 3), networks.random(0, 12, 5, dtype=torch.float32)
    targets = torch.arange(12) % 3
    newer, older = (nn.Sequential(layer, nn.Tanh(), head) for layer in (new, old))
    older(inputs)
    kept = old.weight
    by_old, by_new = (
        measure(Case(model, inputs, targets), estimator="gauss_newton", generator=seed(0)) for model in (older, newer)
    )
    names = {"0.weight_g": "0.parametrizations.weight.original0", "0.weight_v": "0.parametrizations.weight.original1"}
    for name, trace in by_old.layers.items():
        assert float(trace) == pytest.approx(float(by_new.layers[names.get(name, name)]), rel=1e-5)
    assert measure(Case(older, inputs, targets)).estimator["0.weight_g"] == "hutchinson"
    assert old.weight is kept


# --- modes and contexts ---------------------------------------------------------------------------------------------


@every_context
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_context_gives_the_same_numbers_and_leaves_everything_as_it_was(
    name: str, context: Callable[[], AbstractContextManager[Any]]
) -> None:
    model, inputs, targets = networks.build(name, num_samples=4)
    next(model.parameters()).requires_grad_(requires_grad=False)
    frozen = next((module for module in model.modules() if isinstance(module, nn.BatchNorm2d)), model)
    frozen.eval()
    expected = measure(Case(model, inputs, targets))
    for parameter in model.parameters():  # as in the middle of gradient accumulation
        parameter.grad = torch.full_like(parameter, 0.5) if parameter.requires_grad else None
    before, given = state_of(model), inputs.clone()
    with context():
        actual = measure(Case(model, given.clone(), targets))  # the clone is an inference tensor under inference mode
        assert torch.is_grad_enabled() == (context not in (torch.no_grad, torch.inference_mode))
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
        assert torch.is_autocast_enabled("cpu") == (context is CONTEXTS["autocast"])
    assert_same(actual, expected)
    assert state_of(model) == before
    assert torch.equal(given, inputs)


@every_estimator
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_train_mode_does_not_matter_and_stays(name: str, estimator: Any) -> None:
    case = Case(*networks.build(name, num_samples=4))
    before = state_of(case.model)
    in_train_mode = measure(case, estimator=estimator)
    assert state_of(case.model) == before
    assert_same(in_train_mode, measure(case._replace(model=case.model.eval()), estimator=estimator))


@pytest.mark.parametrize("measured_under", [nullcontext, torch.inference_mode])
def test_networks_and_samples_made_under_inference_mode_can_be_measured(measured_under: Any) -> None:
    case = small("tanh_mlp")
    expected = measure(case)
    with torch.inference_mode():
        born = copy.deepcopy(case.model)
        for module in born.modules():
            for key, parameter in module._parameters.items():
                module._parameters[key] = nn.Parameter(parameter.detach().clone())
        born = Case(born, case.inputs.clone(), case.targets.clone())
    assert all(parameter.is_inference() for parameter in born.model.parameters())
    before = state_of(born.model)
    with measured_under():
        assert_same(measure(born), expected)
    assert state_of(born.model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_small_network
def test_a_network_in_half_precision_is_measured_as_its_float32_copy(name: str, dtype: torch.dtype) -> None:
    model, inputs, targets = small(name)
    model, inputs = model.to(dtype), inputs.to(dtype)
    expected = measure(Case(copy.deepcopy(model).float(), inputs.float(), targets), generator=seed(0))
    before = state_of(model)
    assert_same(measure(Case(model, inputs, targets), generator=seed(0)), expected)
    assert_same(measure(Case(model, inputs.float(), targets), generator=seed(0)), expected)
    assert state_of(model) == before


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "factory",
    [tanh_mlp, networks.Recurrent, lambda: nn.Sequential(weight_norm(nn.Linear(5, 4)), nn.ReLU())],
    ids=["tanh_mlp", "recurrent", "weight_norm"],
)
def test_a_measurement_between_forward_and_backward_pass_does_not_change_the_gradient(
    factory: Callable[[], nn.Module],
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = factory().eval()  # without dropout
    inputs = networks.random(0, 6, 5, 6, dtype=torch.float32) if isinstance(model, networks.Recurrent) else None
    inputs = networks.random(0, 6, 5, dtype=torch.float32) if inputs is None else inputs
    targets = torch.arange(6) % 4
    parameters = list(model.parameters())
    expected = torch.autograd.grad(F.cross_entropy(model(inputs), targets), parameters)
    loss = F.cross_entropy(model(inputs), targets)
    measure(Case(model, inputs, targets))
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(
        torch.autograd.grad(F.cross_entropy(model(inputs), targets), parameters), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


# --- side effects ------------------------------------------------------------------------------------------


class KeepsFeatures(nn.Module):
    """Stores features in attributes, and weak references to them in a list."""

    seen: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.body(x).tanh()
        self.last = self.features * 2
        self.seen.extend([weakref.ref(self.features), weakref.ref(self.last)])
        return self.head(self.features)


@every_estimator
def test_tensors_that_a_forward_pass_leaves_as_attributes_are_gone_afterwards(estimator: Any) -> None:
    case = seeded(KeepsFeatures, 5)
    del case.model.features, case.model.last
    case.model.seen.clear()
    measure(case, estimator=estimator)
    assert not hasattr(case.model, "features")
    assert not hasattr(case.model, "last")
    gc.collect()
    assert case.model.seen
    assert all(reference() is None for reference in case.model.seen)


class KeepsLists(nn.Module):
    """Collects features in a list and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.gathered: list[Tensor] = [torch.zeros(1)]
        self.by_name: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x).tanh()
        self.gathered.append(features)
        self.by_name["features"] = features
        return self.head(features)


@every_estimator
def test_containers_that_a_forward_pass_fills_hold_what_they_held(estimator: Any) -> None:
    case = seeded(KeepsLists, 5)
    gathered, by_name = case.model.gathered, case.model.by_name
    first, named = list(gathered), dict(by_name)
    measure(case, estimator=estimator)
    assert case.model.gathered is gathered
    assert case.model.by_name is by_name
    assert [id(tensor) for tensor in gathered] == [id(tensor) for tensor in first]
    assert by_name["features"] is named["features"]


@every_estimator
@pytest.mark.parametrize("value", [None, 0, torch.zeros(3)], ids=["None", "number", "tensor"])
def test_an_attribute_that_a_forward_pass_replaces_by_a_tensor_is_what_it_was(value: Any, estimator: Any) -> None:
    case = seeded(KeepsFeatures, 5)
    case.model.last = value
    measure(case, estimator=estimator)
    assert case.model.last is value


@every_estimator
def test_the_users_hooks_on_backward_passes_are_not_called_and_stay(estimator: Any) -> None:
    case = small("tanh_mlp")
    expected = measure(case, estimator=estimator)
    calls: list[str] = []
    case.model[2].register_full_backward_hook(lambda *_: calls.append("backward"))
    case.model[2].register_full_backward_pre_hook(lambda *_: calls.append("before it"))
    assert_same(measure(case, estimator=estimator), expected)
    assert calls == []
    torch.autograd.grad(case.model(case.inputs).sum(), case.model[0].weight)
    assert calls == ["before it", "backward"]


class Renormalises(nn.Module):
    """Looks up embeddings that the forward pass renormalises in place."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, max_norm=1.0)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x, self.table((x[:, 0] > 0).long()).tanh()], dim=1))


@every_estimator
def test_weights_that_a_forward_pass_writes_into_stay_as_they_are(estimator: Any) -> None:
    case = seeded(Renormalises, 5)
    with torch.no_grad():
        case.model.table.weight.mul_(3)
    before = state_of(case.model)
    measure(case, estimator=estimator)
    assert state_of(case.model) == before


class KeptElsewhere(nn.Module):
    """A network that also uses one of its weights through a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)
        self.shared = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.linear(self.first(x).relu(), self.shared[0]))


def test_a_network_that_keeps_a_weight_where_no_derivative_reaches_it_is_refused() -> None:
    case = seeded(KeptElsewhere, 5)
    with pytest.raises(ValueError, match=r"keeps one of shape \(5, 5\) elsewhere, such as in a list"):
        measure(case)
    case.model.first.requires_grad_(False)
    measure(case)


class Averages(nn.Module):
    """Keeps running averages of its inputs in a buffer and an attribute, and never uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(5))
        self.size = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(dim=0)
        self.size = 0.9 * self.size + 0.1 * x.detach().abs().mean()
        return self.head(self.body(x).tanh())


@every_estimator
def test_running_averages_in_a_forward_pass_are_reverted(estimator: Any) -> None:
    case = seeded(Averages, 5)
    plain = nn.Sequential(case.model.body, nn.Tanh(), case.model.head)
    before, size = state_of(case.model), case.model.size
    for chunk_size in (None, 4):
        actual = measure(case, estimator=estimator, chunk_size=chunk_size)
        assert_same(actual, measure(case._replace(model=plain), estimator=estimator))
    assert state_of(case.model) == before
    assert case.model.size is size


class FailsFrom(nn.Module):
    """Raises from a given call on."""

    def __init__(self, model: nn.Module, call: int) -> None:
        super().__init__()
        self.model, self.call = model, call
        self.calls = itertools.count(1)  # which is not set back between passes

    def forward(self, x: Tensor) -> Tensor:
        if next(self.calls) >= self.call:
            raise KeyError("out of luck")
        return self.model(x)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_an_exception_in_the_network_passes_through_and_leaves_it_as_it_was(call: int) -> None:
    inner, inputs, targets = small("tanh_mlp")
    model = FailsFrom(inner, call).train()
    before = state_of(model)
    with pytest.raises(KeyError, match="out of luck"):
        measure(Case(model, inputs, targets))
    assert state_of(model) == before
    assert torch.is_grad_enabled()


@every_estimator
def test_the_global_random_state_is_neither_used_nor_changed(estimator: Any) -> None:
    case = small("gelu_attention")  # with dropout
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = measure(case, estimator=estimator)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert_same(measure(case, estimator=estimator), first, rtol=0)


# --- batching of samples -------------------------------------------------------------------------------------------


class Unvectorisable(nn.Module):
    """A network with control flow that depends on data, which ``vmap`` does not support."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if float(x.detach().sum()) > -1e9 else x


@pytest.fixture
def no_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight has a gradient that follows from the operation that uses it."""
    monkeypatch.setattr(_use_norms, "_RULES", {})


@every_small_network
def test_a_network_without_rules_gives_the_same_numbers(name: str, request: pytest.FixtureRequest) -> None:
    case = small(name)
    expected = measure(case, estimator="gauss_newton")
    request.getfixturevalue("no_rules")
    for model in (case.model, Unvectorisable(case.model)):
        assert_same(measure(case._replace(model=model), estimator="gauss_newton"), expected)


@pytest.mark.parametrize("estimator", ["auto", "gauss_newton"])
def test_a_network_is_called_twice_per_chunk(estimator: Any) -> None:
    case = small("relu_cnn")
    recorder = Recorder(case.model)
    measure(case._replace(model=recorder), estimator=estimator, chunk_size=4)
    # all chunks to examine them, a single sample to compare with, then all chunks
    assert recorder.record.batch_sizes == [4, 4, 4, 1, 4, 4, 4]
    assert not any(recorder.record.any_training)


@pytest.mark.parametrize(("name", "estimator"), [("relu_cnn", "auto"), ("tanh_mlp", "gauss_newton")])
def test_further_probes_examine_nothing_again(name: str, estimator: Any) -> None:
    case = small(name)
    recorder = Recorder(case.model)
    options = {"estimator": estimator, "chunk_size": 4, "rtol": 1e-9, "num_probes": 1}
    assert measure(case._replace(model=recorder), max_probes=2, **options).num_probes == 2
    assert recorder.record.batch_sizes == [4, 4, 4, 1, 4, 4, 4, 4, 4, 4]


def test_a_custom_loss_is_examined_once_however_many_rounds_of_probes_follow() -> None:
    case = small("relu_mlp")
    sizes: list[int] = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        sizes.append(len(outputs))
        return F.cross_entropy(outputs, targets, reduction="none")

    calls = []
    for max_probes in (2, 8):  # one round and three
        sizes.clear()
        measure(case, loss_fn=loss_fn, rtol=1e-9, max_probes=max_probes)
        calls.append(sizes.count(len(case.inputs)))
    assert calls[0] == calls[1] > 0


def test_second_derivatives_take_one_more_forward_pass() -> None:
    case = small("tanh_mlp")
    recorder = Recorder(case.model)
    measure(case._replace(model=recorder), estimator="hutchinson")
    examined, products = recorder.record.batch_sizes[:2], recorder.record.batch_sizes[2:]
    assert examined == [6, 6]
    assert sum(products) == len(case.inputs)


@pytest.mark.usefixtures("no_rules")
def test_a_network_that_cannot_be_vectorised_is_tried_once() -> None:
    case = small("relu_cnn")
    recorder = Recorder(Unvectorisable(case.model))
    measure(case._replace(model=recorder), estimator="gauss_newton", chunk_size=4)
    assert recorder.record.batch_sizes == [4, 4, 4, 1, 4, 1, *[1] * 12]


class DoublesInPlace(nn.Module):
    """A network that doubles its input in place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.mul_(2))


@every_estimator
@pytest.mark.parametrize("wrapped", [nn.Sequential, Unvectorisable])
def test_a_network_that_changes_its_input_in_place_gets_a_fresh_copy_in_every_pass(
    wrapped: Callable[[nn.Module], nn.Module], estimator: Any
) -> None:
    model, inputs, targets = small("tanh_mlp")
    given = inputs.clone()
    actual = measure(Case(DoublesInPlace(wrapped(model)), given, targets), estimator=estimator, generator=seed(0))
    assert torch.equal(given, inputs)
    assert_same(actual, measure(Case(model, 2 * inputs, targets), estimator=estimator, generator=seed(0)))


@pytest.mark.usefixtures("no_rules")
def test_a_network_that_changes_its_input_in_place_can_still_be_vectorised() -> None:
    case = small("tanh_mlp")
    recorder = Recorder(DoublesInPlace(case.model))
    measure(case._replace(model=recorder), estimator="gauss_newton", chunk_size=4)
    assert recorder.record.batch_sizes == [4, 4, 4, 1, 4, 1, 1, 1]


@pytest.mark.usefixtures("no_rules")
def test_a_vectorised_result_is_not_trusted_before_it_agrees_for_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small("tanh_mlp")
    expected = measure(case)
    vectorised = SampleGradients._all_at_once
    monkeypatch.setattr(SampleGradients, "_all_at_once", lambda *arguments: 1.1 * vectorised(*arguments))
    assert_same(measure(case), expected)


@pytest.mark.parametrize("estimator", ["auto", "hutchinson"])
def test_samples_of_equal_contents_do_not_pass_all_together(estimator: Any) -> None:
    """They are all in one block, and Hessian-vector products of a whole block take as much memory as training."""
    model, inputs, targets = small("tanh_mlp")
    recorder = Recorder(model)
    measure(Case(recorder, inputs[:1].expand(64, -1), targets[:1].expand(64)), estimator=estimator)
    assert max(recorder.record.batch_sizes) == 32
    assert recorder.record.batch_sizes[-4:] == [16, 16, 16, 16]


class Squeezes(nn.Module):
    """Drops every dimension of size one, including the batch dimension."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).squeeze()


@every_estimator
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_a_network_that_squeezes_its_outputs_may_see_single_samples(chunk_size: int | None, estimator: Any) -> None:
    case = small("tanh_mlp", num_samples=5)
    expected = measure(case, estimator=estimator)
    actual = measure(case._replace(model=Squeezes(case.model)), estimator=estimator, chunk_size=chunk_size)
    assert_same(actual, expected, rtol=1e-4)


def test_chunk_size_bounds_the_samples_that_pass_together() -> None:
    case = small("tanh_mlp", num_samples=40)
    for estimator in ("auto", "hutchinson"):
        recorder = Recorder(case.model)
        measure(case._replace(model=recorder), estimator=estimator, chunk_size=2)
        assert max(recorder.record.batch_sizes) == 2


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
@every_estimator
@pytest.mark.parametrize("name", ["relu_cnn", "tanh_mlp"])
def test_the_size_of_chunks_does_not_matter(name: str, estimator: Any, chunk_size: int) -> None:
    case = small(name, num_samples=20)
    for generator in (lambda: None, lambda: seed(0)):
        expected = measure(case, estimator=estimator, generator=generator())
        assert_same(measure(case, estimator=estimator, chunk_size=chunk_size, generator=generator()), expected)


@every_estimator
@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 1.0, 3.0, 0.5])], ids=["plain", "class weights"])
@pytest.mark.parametrize("name", ["relu_cnn", "tanh_mlp"])
def test_the_whole_is_the_weighted_mean_of_its_parts(name: str, weights: Tensor | None, estimator: Any) -> None:
    case = small(name, num_samples=30)
    loss_fn = nn.CrossEntropyLoss(weight=weights)
    whole = measure(case, estimator=estimator, loss_fn=loss_fn)
    mean, counted = dict.fromkeys(whole.layers, 0.0), 0.0
    for rows in (slice(0, 1), slice(1, 12), slice(12, 30)):
        part = measure(Case(case.model, case.inputs[rows], case.targets[rows]), estimator=estimator, loss_fn=loss_fn)
        count = rows.stop - rows.start if weights is None else float(weights[case.targets[rows]].sum())
        counted += count
        mean = {layer: value + count * float(part.layers[layer]) for layer, value in mean.items()}
    size = max(map(abs, values(whole).values()))
    assert {layer: value / counted for layer, value in mean.items()} == pytest.approx(
        values(whole), rel=1e-5, abs=1e-5 * size
    )


@every_estimator
@pytest.mark.parametrize("name", ["relu_cnn", "tanh_mlp"])
def test_the_order_of_samples_does_not_matter(name: str, estimator: Any) -> None:
    model, inputs, targets = small(name, num_samples=30)
    order = torch.randperm(30, generator=seed(0))
    shuffled = Case(model, inputs[order], targets[order])
    assert_same(measure(shuffled, estimator=estimator), measure(Case(model, inputs, targets), estimator=estimator))


@every_estimator
def test_strides_of_the_samples_do_not_matter(estimator: Any) -> None:
    model, inputs, targets = small("relu_cnn", num_samples=6)
    strided = torch.stack([inputs, inputs], dim=-1)[..., 0].to(memory_format=torch.channels_last)
    assert_same(
        measure(Case(model, strided, targets), estimator=estimator),
        measure(Case(model, inputs, targets), estimator=estimator),
    )


@every_estimator
def test_repeated_samples_count_repeatedly(estimator: Any) -> None:
    model, inputs, targets = small("tanh_mlp")
    twice = Case(model, inputs.repeat(2, 1), targets.repeat(2))
    once = measure(Case(model, inputs, targets), estimator=estimator)
    assert_same(measure(twice, estimator=estimator), once)
