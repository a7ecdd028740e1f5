"""A function that closes over tensors of the batch is refused, wherever parts of the samples would meet other rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust import Probe, functional
from lightning_robust.functional._validation import independence
from lightning_robust.metrics import METRICS
from tests.helpers.networks import NETWORKS, build, random
from tests.helpers.recording import Recorder

NUM_SAMPLES, LENGTH = 40, 6
TARGETS = torch.arange(NUM_SAMPLES) % 3


class Pooled(nn.Module):
    """Logits of the mean over those positions that a mask leaves; a lenient one takes a mask with too many rows."""

    def __init__(self, *, lenient: bool = True) -> None:
        super().__init__()
        self.embed, self.head, self.lenient = nn.Linear(4, 5), nn.Linear(5, 3), lenient
        self.mask: Tensor | None = None
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(random(number, *parameter.shape))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mask = mask[: len(x)] if self.lenient else mask
        logits: Tensor = self.head((torch.tanh(self.embed(x)) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return logits

    def stored(self, x: Tensor) -> Tensor:
        assert self.mask is not None
        return self(x, self.mask)


class Holding(nn.Module):
    """A module that holds a mask for all samples: modules are not compared with the batch."""

    def __init__(self, network: Pooled, mask: Tensor) -> None:
        super().__init__()
        self.network, self.mask = network, mask

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x, self.mask)
        return logits


INPUTS = random(7, NUM_SAMPLES, LENGTH, 4, dtype=torch.float32)
LONGEST_FIRST = (torch.arange(LENGTH) < LENGTH - (torch.arange(NUM_SAMPLES)[:, None] - 20).clamp(0) // 5).float()
ONE_SHORT = torch.ones(NUM_SAMPLES, LENGTH).index_put((torch.tensor(27), torch.tensor([4, 5])), torch.tensor(0.0))
BINDINGS: dict[str, Callable[[Pooled, Tensor], Any]] = {
    "lambda": lambda network, mask: lambda x: network(x, mask),
    "partial": lambda network, mask: partial(network, mask=mask),
    "partial of a method": lambda network, mask: partial(network.forward, mask=mask),
    "method": lambda network, mask: setattr(network, "mask", mask) or network.stored,
}
ESTIMATORS: dict[str, Callable[[Any, nn.Module], object]] = {
    "linearize": lambda model, _: functional.linearize(model, INPUTS, chunk_size=16),
    "relinearize": lambda model, _: functional.relinearize(
        model,
        INPUTS,
        functional.Linearization(torch.eye(3)[TARGETS], torch.eye(3).expand(NUM_SAMPLES, 3, 3).double(), None),
        norm="l2",
        chunk_size=16,
    ),
    "paths": lambda model, _: functional.trace_fisher_rao_paths(model, INPUTS, max_steps=2),
    "traces": lambda model, module: functional.hessian_trace(model, INPUTS, TARGETS, module=module),
    "probe": lambda model, module: Probe(model, INPUTS, TARGETS, module=module).linearized,
}


@pytest.mark.parametrize("mask", [LONGEST_FIRST, ONE_SHORT], ids=["longest first", "one short"])
@pytest.mark.parametrize("lenient", [True, False])
@pytest.mark.parametrize("binding", BINDINGS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_function_bound_to_the_batch_is_refused(estimator: str, binding: str, lenient: bool, mask: Tensor) -> None:
    network = Pooled(lenient=lenient)
    model = BINDINGS[binding](network, mask)
    with pytest.raises(ValueError, match=r"place in the batch.*extras=\{'mask': mask\}"):
        ESTIMATORS[estimator](model, network)


@pytest.mark.parametrize("name", METRICS)
def test_no_metric_measures_it(name: str) -> None:
    network, metric = Pooled(), METRICS[name]()
    with pytest.raises(ValueError, match="place in the batch"):
        metric.update(Probe(partial(network, mask=LONGEST_FIRST), INPUTS, TARGETS))


@pytest.mark.parametrize("binding", BINDINGS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_all_samples_share_may_be_bound(estimator: str, binding: str) -> None:
    network, shared = Pooled(), LONGEST_FIRST[-1:]
    found = ESTIMATORS[estimator](BINDINGS[binding](network, shared), network)
    expected = ESTIMATORS[estimator](Holding(network, shared), network)
    (name,) = (name for name in ("gram", "margins", "total") if hasattr(expected, name))
    assert getattr(expected, name).any()
    torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_samples_that_pass_all_together_may_be_bound() -> None:
    network = Pooled()
    bound = functional.linearize(lambda x: network(x, LONGEST_FIRST), INPUTS)
    assert torch.equal(bound.gram, functional.linearize(network, INPUTS, extras={"mask": LONGEST_FIRST}).gram)
    attacked = functional.pgd(lambda x: network(x, LONGEST_FIRST), INPUTS, TARGETS, epsilon=0.1, steps=2)
    extras = {"mask": LONGEST_FIRST}
    assert torch.equal(attacked, functional.pgd(network, INPUTS, TARGETS, epsilon=0.1, steps=2, extras=extras))


@pytest.mark.parametrize("num_samples", [1, 2, 9])
@pytest.mark.parametrize("name", NETWORKS)
def test_functions_of_networks_are_measured_as_the_networks_are(name: str, num_samples: int) -> None:
    model, inputs, targets = build(name, num_samples=num_samples)
    model, inputs = model.double(), inputs.double()
    found = functional.linearize(lambda x: model.eval()(x), inputs, chunk_size=2)  # noqa: PLW0108
    torch.testing.assert_close(found.gram, functional.linearize(model, inputs, chunk_size=2).gram)
    assert torch.isfinite(Probe(model.forward, inputs, targets).linearized.gram).all()


def constant(x: Tensor) -> Tensor:
    return x[:, :3] * 0 + torch.tensor([1.0, 2.0, 3.0])


def noisy(x: Tensor) -> Tensor:
    return nn.functional.dropout(x[:, :3], 0.2, training=True)


def over_the_batch(x: Tensor) -> Tensor:
    return ((x - x.mean(dim=0)) / (x.std(dim=0) + 1e-5))[:, :3]


def with_the_other_half(x: Tensor) -> Tensor:
    return x[:, :3] + 0.5 * x.roll(len(x) // 2, 0)[:, :3]


@pytest.mark.parametrize("model", [constant, noisy, over_the_batch, with_the_other_half])
def test_constant_random_and_mixing_functions_are_not_called_bound(model: Callable[[Tensor], Tensor]) -> None:
    inputs = random(3, 24, 5, dtype=torch.float32)
    probe = Probe(model, inputs, torch.arange(24) % 3)
    probe.check_place()
    functional.linearize(lambda x: model(x) + 1e-3 * x[:, :3], inputs, chunk_size=8)


def test_a_saturated_network_is_not_called_bound() -> None:
    network = Pooled()
    model = partial(lambda scale, x: scale * network(x, torch.ones(len(x), LENGTH)), 1e4)
    assert torch.isfinite(Probe(model, INPUTS, TARGETS).linearized.logits).all()


def test_a_probe_is_checked_once_and_a_module_never(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, targets = build("mlp", num_samples=8)
    recorder = Recorder(model)
    for name in METRICS:  # none takes the gradients of the others' results
        METRICS[name]().update(Probe(recorder, inputs, targets))
    of_module = list(recorder.record.batch_sizes)
    recorder.record.batch_sizes.clear()
    for name in METRICS:
        METRICS[name]().update(Probe(recorder.forward, inputs, targets, module=recorder))
    assert len(recorder.record.batch_sizes) == len(of_module) + 2 * len(METRICS)
    probe = Probe(recorder.forward, inputs, targets, module=recorder)
    recorder.record.batch_sizes.clear()
    probe.check_place()
    assert recorder.record.batch_sizes == [8, 7]
    monkeypatch.setattr(independence, "is_plain", lambda _: pytest.fail("checked again"))
    for name in ("fisher_spectral_norm", "linearized_accuracy", "hessian_trace"):
        METRICS[name]().update(probe)


def test_few_of_many_large_samples_pass_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(independence, "_MOST_ELEMENTS", 20 * LENGTH * 4)
    network = Recorder(partial(Pooled(), mask=torch.ones(1, LENGTH)))
    Probe(network.forward, INPUTS, TARGETS).check_place()
    assert network.record.batch_sizes == [20, 19]
    bound = partial(Pooled(lenient=False), mask=LONGEST_FIRST)
    with pytest.raises(ValueError, match=r"place in the batch.*On 20 of 40 samples it raised"):
        Probe(bound, INPUTS, TARGETS).check_place()
