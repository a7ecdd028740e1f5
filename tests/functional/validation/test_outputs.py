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
        _ = Probe(nn.Linear(12, 3), x, torch.ones(8), loss_fn=nn.BCEWithLogitsLoss()).linearized


def test_the_module_stays_the_owner() -> None:
    model = OneLogit(flat=True)
    assert owner_of(as_two_classes(model)) is model
    assert owner_of(as_two_classes(partial(model.forward))) is model
    assert as_two_classes(model) == as_two_classes(model)


# --- features, losses and confidences beside the logits ---------------------------------------------------------------

LOGITS, LOGIT, FEATURES, PER_SAMPLE = random(1, 6, 3), random(2, 6, 1), random(3, 6, 16), random(4, 6)
Named = namedtuple("Named", ["first", "second"])


@dataclass
class Fields:
    first: Tensor
    second: Tensor


EVIDENT: dict[str, tuple[Any, Tensor]] = {
    "logits and losses": ((LOGITS, PER_SAMPLE), LOGITS),
    "named losses first": ({"loss": PER_SAMPLE, "z": LOGITS}, LOGITS),
    "a named confidence": ({"out": LOGITS, "confidence": LOGIT}, LOGITS),
    "an unnamed entry beside a named confidence": ({"z": LOGITS, "confidence": LOGIT}, LOGITS),
    "a prediction beside features": ({"features": FEATURES, "pred": LOGITS}, LOGITS),
    "class scores beside hidden states": ({"last_hidden_state": FEATURES[:, None], "cls_score": LOGITS}, LOGITS),
    "maps beside maps of an auxiliary head": (
        {"out": LOGITS[:, :, None], "aux": 2 * LOGITS[:, :, None]},
        LOGITS[:, :, None],
    ),
    "one logit beside features, by name": ({"logit": LOGIT[:, 0], "features": FEATURES}, LOGIT[:, 0]),
    "one prediction beside features": ({"features": FEATURES, "prediction": LOGIT}, LOGIT),
    "an attribute": (SimpleNamespace(logits=LOGITS, features=FEATURES), LOGITS),
}


@pytest.mark.parametrize("case", EVIDENT)
def test_logits_are_found_beside_other_numbers(case: str) -> None:
    outputs, expected = EVIDENT[case]
    assert logits_in(outputs, num_samples=6) is expected or torch.equal(logits_in(outputs, num_samples=6), expected)


UNCLEAR: dict[str, tuple[Any, str]] = {
    "one logit, then features": ((LOGIT, FEATURES), "module(x)[0], batch[0], batch[1], module=module, loss_fn=nn.BCE"),
    "features, then one logit": ((FEATURES, LOGIT), "module(x)[0], batch[0], batch[1], module=module)"),
    "a flat logit, then features": ((LOGIT[:, 0], FEATURES), "module(x)[0]"),
    "unnamed features beside one number": ({"body": FEATURES, "head": LOGIT}, "module(x)['body']"),
    "an embedding beside indices": ({"embedding": FEATURES, "pred": LOGITS.argmax(1)}, "module(x)['embedding']"),
    "pooled features alone": ({"last_hidden_state": LOGITS[:, None], "pooler_output": FEATURES}, "'pooler_output'"),
    "two unnamed rows": (Fields(LOGITS, FEATURES), "module(x).first, batch[0], batch[1], module=module)"),
    "two fields of a named tuple": (Named(LOGITS, FEATURES), "module(x).first"),
    "two heads": ({"class_logits": LOGITS, "domain_logits": LOGITS}, "module(x)['class_logits']"),
    "an auxiliary output beside features": ({"embedding": FEATURES, "aux": LOGITS}, "module(x)['embedding']"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_not_evident_is_refused_with_a_line_to_paste(case: str) -> None:
    outputs, line = UNCLEAR[case]
    with pytest.raises(ValueError, match="`probe_fn=lambda module, batch: Probe") as caught:
        logits_in(outputs, num_samples=6)
    assert line in str(caught.value)


class Body(nn.Module):
    """Returns what one function makes of a logit and features."""

    def __init__(self, way: Any, *, width: int = 1) -> None:
        super().__init__()
        self.body, self.head, self.way = nn.Linear(12, 16), nn.Linear(16, width), way
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(random(number, *parameter.shape))

    def forward(self, x: Tensor) -> Any:
        features = torch.tanh(self.body(x))
        return self.way(self.head(features), features)


@pytest.mark.parametrize(
    "way",
    [
        lambda z, f: (z, f),
        lambda z, f: (f, z),
        lambda z, f: (f, z[:, 0]),
        lambda z, f: {"logit": z[:, 0], "features": f},
        lambda z, f: {"features": f, "score": z, "loss": z[:, 0].square()},
        lambda z, f: SimpleNamespace(logits=z, features=f),
    ],
    ids=["first", "last", "last and flat", "named", "beside a loss", "attribute"],
)
def test_the_logit_of_a_binary_classifier_is_found_beside_its_features(way: Any) -> None:
    x, y, options = random(9, 8, 12), torch.arange(8) % 2, {"loss_fn": nn.BCEWithLogitsLoss()}
    found, expected = (Probe(Body(w).double(), x, y, **options) for w in (way, lambda z, f: z))
    assert torch.equal(found.linearized.gram, expected.linearized.gram)
    assert torch.equal(found.curvature().total().means(), expected.curvature().total().means())
    if isinstance(way(x[:, :1], x), tuple):
        for measure in (lambda probe: probe.linearized, lambda probe: probe.curvature()):
            with pytest.raises(ValueError, match="several entries that could be the logits"):
                measure(Probe(Body(way).double(), x, y))


@pytest.mark.parametrize("num_classes", [2, 3])
def test_beside_a_logit_per_class_a_single_number_is_no_logit(num_classes: int) -> None:
    x, y = random(9, 8, 12), torch.arange(8) % num_classes
    for way in (lambda z, f: (z, f[:, :1]), lambda z, f: (f[:, :1], z), lambda z, f: {"z": z, "head": f[:, 0]}):
        found, expected = (Probe(Body(w, width=num_classes).double(), x, y) for w in (way, lambda z, f: z))
        assert torch.equal(found.linearized.gram, expected.linearized.gram)
        assert torch.equal(found.curvature().total().means(), expected.curvature().total().means())
