"""The logits are found in what networks return, and one logit stands for two classes."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust import Probe
from lightning_robust.functional import hessian_trace, linearize, pgd, trace_fisher_rao_paths
from lightning_robust.functional._isolation.context import owner_of
from lightning_robust.functional._validation.outputs import as_two_classes, logits_in
from lightning_robust.metrics import METRICS
from tests.helpers.networks import build, random

NETWORK, INPUTS, TARGETS = build("mlp", num_samples=6)
Pair = namedtuple("Pair", ["logits", "features"])


@dataclass
class Output:
    prediction: Tensor
    loss: Tensor | None = None


WAYS: dict[str, Any] = {
    "a tuple": lambda z: (z,),
    "a list beside no tensor": lambda z: ["name", z, None],
    "a tuple beside a map of attention": lambda z: (z, z[:, None, None].expand(-1, 2, 3, -1)),
    "a tuple beside the loss": lambda z: (z.sum(), z),
    "a dictionary": lambda z: {"logits": z, "features": 2 * z},
    "a dictionary with another name": lambda z: {"pred": z, "loss": z.sum(), "steps": torch.ones(len(z)).long()},
    "an ordered dictionary": lambda z: OrderedDict(hidden=2 * z, logits=z),
    "a named tuple": lambda z: Pair(z, 2 * z),
    "an object": lambda z: SimpleNamespace(logits=z, hidden_states=2 * z),
    "a dataclass": Output,
}


class Wrapped(nn.Module):
    def __init__(self, way: Any) -> None:
        super().__init__()
        self.network, self.way = NETWORK, way

    def forward(self, x: Tensor) -> Any:
        return self.way(self.network(x))


@pytest.mark.parametrize("way", WAYS)
def test_logits_are_found_by_every_estimator(way: str) -> None:
    def results(model: Any) -> list[Tensor]:
        traces = [
            hessian_trace(model, INPUTS, TARGETS, estimator=estimator, num_probes=1, rtol=None).total
            for estimator in ("auto", "hutchinson")
        ]
        paths = trace_fisher_rao_paths(model, INPUTS[:2], max_steps=2)
        return [
            linearize(model, INPUTS).gram,
            paths.margins,
            pgd(model, INPUTS, TARGETS, epsilon=0.1, steps=2),
            *traces,
        ]

    for found, expected in zip(results(Wrapped(WAYS[way])), results(NETWORK), strict=True):
        assert torch.equal(found, expected)


def test_dense_outputs_are_found_too() -> None:
    maps = random(0, 4, 3, 2, 2)
    assert logits_in({"out": maps, "count": 3}, num_samples=4) is maps


# --- one logit --------------------------------------------------------------------------------------------------------


class OneLogit(nn.Module):
    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.network, self.flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 1)), flat
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(random(number, *parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.network(x)
        return z[:, 0] if self.flat else z


class TwoLogits(nn.Module):
    """What a user would have written by hand."""

    def __init__(self, network: OneLogit) -> None:
        super().__init__()
        self.inner = network

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x).reshape(-1, 1)
        return torch.cat([0 * z, z], dim=1)


@pytest.mark.parametrize(("flat", "targets"), [(True, torch.float32), (False, torch.int64), (False, torch.bool)])
@pytest.mark.parametrize("name", METRICS)
def test_a_binary_classifier_is_measured_as_one_of_two_classes(name: str, targets: torch.dtype, flat: bool) -> None:
    model, x, y = OneLogit(flat=flat).double(), random(9, 8, 12).double(), torch.arange(8) % 2
    one, two = METRICS[name](), METRICS[name]()
    one.update(Probe(model, x, y.to(targets), loss_fn=nn.BCEWithLogitsLoss()))
    column = Probe(model, x, y.to(targets)[:, None], loss_fn=nn.functional.binary_cross_entropy_with_logits)
    two.update(Probe(TwoLogits(model), x, y))
    expected = {key.replace("inner.", ""): value for key, value in two.compute().items()}
    for probe in (None, column):
        if probe is not None:
            one.reset()
            one.update(probe)
        found = one.compute()
        assert found.keys() == expected.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-7, equal_nan=True, msg=key)


def test_the_weight_of_the_positive_class_counts_in_the_curvature() -> None:
    model, x, y = OneLogit(flat=False).double(), random(9, 8, 12).double(), torch.arange(8) % 2
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))
    probe, plain = (Probe(model, x, y, loss_fn=loss_fn) for loss_fn in (loss, nn.BCEWithLogitsLoss()))
    expected = hessian_trace(model, x, y.double()[:, None], loss_fn=loss, num_probes=2, rtol=None)
    assert float(probe.curvature().total().means()) == pytest.approx(float(expected.total))
    assert float(expected.total) > 1.2 * float(plain.curvature().total().means())


def test_soft_targets_and_several_logits_are_refused_by_name() -> None:
    model, x = OneLogit(flat=False), random(9, 8, 12, dtype=torch.float32)
    soft = Probe(model, x, torch.full((8,), 0.9), loss_fn=nn.BCEWithLogitsLoss())
    assert float(soft.curvature().total().means()) > 0
    with pytest.raises(ValueError, match=r"binary classifier to be 0 or 1, but got values from 0.9 to 0.9"):
        _ = soft.labels
    with pytest.raises(ValueError, match=r"one logit per sample.*returned \(8, 3\).*CrossEntropyLoss"):
        _ = Probe(nn.Linear(12, 3), x, torch.ones(8), loss_fn=nn.BCEWithLogitsLoss()).linearization


def test_the_module_stays_the_owner() -> None:
    model = OneLogit(flat=True)
    assert owner_of(as_two_classes(model)) is model
    assert owner_of(as_two_classes(partial(model.forward))) is model
    assert as_two_classes(model) == as_two_classes(model)
