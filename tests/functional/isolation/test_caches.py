"""A function of a weight that a network keeps in eval mode is computed from the weight while that is measured."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust import HessianTrace, RobustnessMonitor
from lightning_robust.functional import hessian_trace, linearize
from lightning_robust.functional._isolation import caches
from tests.helpers.networks import random
from tests.helpers.training import Classifier, loader, samples, trainer

INDEX = torch.tensor([2, 0, 1, 5, 3, 4])


class Biased(nn.Module):
    """A network with a bias that is a function of a weight, and with constants beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(random(1, 2, 6, dtype=torch.float32))
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 4)
        self.shift, self.scales = torch.full((4,), 0.1), [torch.ones(6), torch.full((6,), 2.0)]
        self.kept: Any = None
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(random(seed, *parameter.shape))

    def made(self) -> Tensor:
        return self.table[:, INDEX].sum(dim=0).tanh()

    def bias(self) -> Tensor:
        return self.made()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x - self.shift) * self.bias()) * self.scales[1])


class ByDevice(Biased):
    """As LeViT and TinyViT: a dictionary that is emptied in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {}

    def train(self, mode: bool = True) -> "ByDevice":
        super().train(mode)
        if mode and self.kept:
            self.kept = {}
        return self

    def bias(self) -> Tensor:
        if self.training:
            return self.made()
        key = str(self.table.device)
        if key not in self.kept:
            self.kept[key] = self.made()
        return self.kept[key]


class InAList(Biased):
    def __init__(self) -> None:
        super().__init__()
        self.kept = []

    def bias(self) -> Tensor:
        if not self.kept:
            self.kept.append(self.made())
        return self.kept[0]


class InAnAttribute(Biased):
    def bias(self) -> Tensor:
        if self.kept is None:
            self.kept = self.made()
        return self.kept


class WithItsVersion(Biased):
    """Keeps a pair, deep inside."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"pairs": [None]}

    def bias(self) -> Tensor:
        if self.kept["pairs"] is None or not self.kept["pairs"] or self.kept["pairs"][0] is None:
            self.kept["pairs"] = [("first", self.made())]
        return self.kept["pairs"][0][1]


class InADictionaryOfDictionaries(Biased):
    """Looks at the outer dictionary alone; keeps two functions under a key of the inputs' size."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"constants": torch.ones(6)}

    def bias(self) -> Tensor:
        if 4 not in self.kept:
            self.kept[4] = {"filters": [self.made().detach() * 0 + 1, self.made()], "halves": (self.made() / 2,)}
        found = self.kept[4]
        return (found["filters"][1] / 2 + found["halves"][0]) * self.kept["constants"]


class InAListOfDictionaries(Biased):
    def __init__(self) -> None:
        super().__init__()
        self.kept = []

    def bias(self) -> Tensor:
        if not self.kept:
            self.kept.append({"bias": {"value": self.made()}})
        return self.kept[0]["bias"]["value"]


class InABuffer(Biased):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table_sum", None, persistent=False)

    def bias(self) -> Tensor:
        if self.table_sum is None:
            self.table_sum = self.made()
        return self.table_sum


class AsAProperty(Biased):
    @functools.cached_property
    def once(self) -> Tensor:
        return self.made()

    def bias(self) -> Tensor:
        return self.once


class AsItIsSwitched(Biased):
    """As EfficientFormer and the original TinyViT: ``eval()`` computes, the forward pass only reads."""

    def train(self, mode: bool = True) -> "AsItIsSwitched":
        super().train(mode)
        self.kept = None if mode else self.made()
        return self

    def bias(self) -> Tensor:
        return self.made() if self.training else self.kept


class UsedTwice(ByDevice):
    """The weight is used directly, too, so that a gradient reaches it in any case."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.table[0, :4] * x[:, :1]


NESTED = [WithItsVersion, InADictionaryOfDictionaries, InAListOfDictionaries]
KINDS = [ByDevice, InAList, InAnAttribute, *NESTED, InABuffer, AsAProperty, AsItIsSwitched, UsedTwice]
FILLED: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "empty": torch.no_grad,
    "by a validation": torch.no_grad,
    "in inference mode": torch.inference_mode,
    "with gradients": nullcontext,
}
X, TARGETS = random(7, 20, 4, dtype=torch.float32), torch.arange(20) % 3


def filled(kind: type[Biased], how: str) -> Biased:
    """In eval mode, which some networks must be switched to, after a pass."""
    network = kind()
    with FILLED[how]():
        network.eval()
        if how != "empty":
            network(X)
    return network


def inside(kept: Any) -> list[Any]:
    return list(kept.values()) if isinstance(kept, dict) else list(kept) if isinstance(kept, list) else []


@pytest.mark.parametrize("how", FILLED)
@pytest.mark.parametrize("kind", KINDS)
def test_the_trace_is_that_of_the_network_that_keeps_nothing(kind: type[Biased], how: str) -> None:
    class Plain(kind):  # type: ignore[misc, valid-type]
        def bias(self) -> Tensor:
            return self.made()

    others = ("hutchinson", "auto") if how == "by a validation" else ()
    for estimator in ("gauss_newton", *others):
        settings: dict[str, Any] = {"estimator": estimator, "num_probes": 2, "rtol": None}
        network = filled(kind, how)
        before = set(vars(network))
        measured, expected = (hessian_trace(n, X, TARGETS, **settings) for n in (network, Plain().eval()))
        assert measured.unreached == ()
        assert set(vars(network)) == before
        for name, trace in expected.layers.items():
            torch.testing.assert_close(measured.layers[name], trace, rtol=1e-4, atol=1e-6)
    assert expected.layers["table"] != 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_kept_is_there_afterwards(kind: type[Biased]) -> None:
    network = filled(kind, "by a validation")
    kept, buffer, held = network.kept, getattr(network, "table_sum", None), inside(network.kept)
    hessian_trace(network, X, TARGETS)
    linearize(network, X)
    assert network.kept is kept
    assert getattr(network, "table_sum", None) is buffer
    assert all(a is b for a, b in zip(inside(network.kept), held, strict=True))


@pytest.mark.parametrize("kind", [ByDevice, WithItsVersion, AsItIsSwitched])
def test_the_input_side_takes_what_a_pass_in_inference_mode_has_kept(kind: type[Biased]) -> None:
    torch.testing.assert_close(
        linearize(filled(kind, "in inference mode"), X).gram, linearize(filled(kind, "empty"), X).gram
    )


class WithExtras(ByDevice):
    """Takes an argument beside its inputs, and returns more than logits."""

    def forward(self, x: Tensor, scale: Tensor) -> Any:
        z = super().forward(x * scale)
        return {"logits": z, "features": z.detach()}


def test_networks_with_extras_and_outputs_beside_the_logits_are_examined_like_others() -> None:
    scale = 1 + random(8, 20, 1, dtype=torch.float32).abs()
    settings: dict[str, Any] = {"estimator": "gauss_newton", "num_probes": 4, "rtol": None}  # all columns
    expected = hessian_trace(filled(ByDevice, "empty"), X * scale, TARGETS, **settings)
    network = WithExtras().eval()
    with torch.no_grad():
        network(X, scale)
    measured = hessian_trace(network, X, TARGETS, extras={"scale": scale}, **settings)
    assert measured.layers["table"] != 0
    for name, trace in expected.layers.items():
        torch.testing.assert_close(measured.layers[name], trace, rtol=1e-4, atol=1e-6)


class Flagged(Biased):
    """Remembers by a flag that it has computed it."""

    def __init__(self) -> None:
        super().__init__()
        self.valid = False

    def bias(self) -> Tensor:
        if not self.valid:
            self.kept, self.valid = self.made(), True
        return self.kept


def test_a_cache_that_the_network_does_not_make_anew_leaves_its_weight_out() -> None:
    measured = hessian_trace(filled(Flagged, "by a validation"), X, TARGETS)
    assert measured.unreached == ("table",)
    assert "table" not in measured.layers


class Stateful(Biased):
    """Reads what its last pass has left, which depends on the inputs: that is no function of weights alone."""

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        if self.kept is not None:
            z = z + self.kept.detach().mean()
        self.kept = z.detach() if self.training else self.kept
        return z


def test_constants_and_states_are_left_alone() -> None:
    network = Stateful().eval()
    network.kept = torch.full((3,), 5.0)
    found: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        remedies = caches._remedies
        patch.setattr(caches, "_remedies", lambda *args: found.append(remedies(*args)) or found[-1])
        hessian_trace(network, X, TARGETS)
    assert found == [[]]


def test_a_constant_is_tried_once() -> None:
    calls: list[int] = []

    class Counting(Biased):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    network, small = Counting().eval(), []
    for _ in range(3):
        calls.clear()
        hessian_trace(network, X, TARGETS, estimator="gauss_newton", num_probes=2, rtol=None)
        small.append(calls.count(2))
    assert small[0] > small[1] == small[2] == 1  # which looks for what is read


def test_a_monitor_measures_the_weight_after_the_validation_has_filled_the_cache(tmp_path: Any) -> None:
    torch.manual_seed(0)
    network = ByDevice()
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 4), network))
    monitor = RobustnessMonitor([HessianTrace()], on_error="raise")
    run = trainer(monitor, root=tmp_path, max_epochs=1)
    run.fit(model, loader(samples(32)), loader(samples(32)))
    fitted = float(run.callback_metrics["robust/hessian_trace_per_layer/network.2.table"])
    assert fitted != 0
    run.validate(model, loader(samples(32)), verbose=False)
    assert float(run.callback_metrics["robust/hessian_trace_per_layer/network.2.table"]) == pytest.approx(
        fitted, rel=1e-4
    )
