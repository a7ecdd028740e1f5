"""Per-sample arguments beside the inputs stay with their samples, wherever these go."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust import Probe, functional
from lightning_robust.metrics import METRICS
from tests.helpers.networks import random

NUM_SAMPLES, LENGTH = 6, 5


class MaskedMean(nn.Module):
    """Logits of the mean over those positions that a mask leaves, shifted by a category."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 3)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(random(number, *parameter.shape))

    def forward(self, x: Tensor, mask: Tensor, category: Tensor) -> Tensor:
        mean = (torch.tanh(x) * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        logits: Tensor = self.head(mean + self.embed(category))
        return logits


MODEL = MaskedMean().double()
INPUTS = random(7, NUM_SAMPLES, LENGTH, 3).double()
EXTRAS = {
    "mask": (torch.arange(LENGTH) <= torch.arange(NUM_SAMPLES)[:, None] % LENGTH).double(),
    "category": torch.arange(NUM_SAMPLES) % 4,
}
TARGETS = torch.arange(NUM_SAMPLES) % 3


def alone(row: int) -> partial[Tensor]:
    """The network with the extras of one sample."""
    return partial(MODEL, **{name: extra[row : row + 1] for name, extra in EXTRAS.items()})


def linearized(model: Any, rows: slice, **options: Any) -> tuple[Tensor, ...]:
    found = functional.linearize(model, INPUTS[rows], **options)
    again = functional.relinearize(model, INPUTS[rows], found, **options)
    return found.logits, found.gram, *(part for part in (found.gap_l1, again.gap_l1) if part is not None)


def traced(model: Any, rows: slice, **options: Any) -> tuple[Tensor, ...]:
    paths = functional.trace_fisher_rao_paths(model, INPUTS[rows], **options)
    return paths.margins, paths.l2, paths.logits


def attacked(model: Any, rows: slice, **options: Any) -> tuple[Tensor, ...]:
    options.pop("chunk_size", None)
    return (functional.pgd(model, INPUTS[rows], TARGETS[rows], epsilon=0.1, steps=3, **options),)


FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "linearisations": linearized,
    "attacks": attacked,
    "paths": traced,
    "paths by conjugate gradients": partial(traced, solver="cg"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_results_are_those_of_each_sample_alone(name: str, chunk_size: int | None) -> None:
    together = FUNCTIONS[name](MODEL, slice(None), extras=EXTRAS, chunk_size=chunk_size)
    each = [FUNCTIONS[name](alone(row), slice(row, row + 1)) for row in range(NUM_SAMPLES)]
    for found, parts in zip(together, zip(*each, strict=True), strict=True):
        rtol = 1e-5 if "paths" in name else 1e-9  # crossings are located to 1e-6 nats
        torch.testing.assert_close(found, torch.cat(parts), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("estimator", ["auto", "gauss_newton", "hutchinson"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_traces_are_the_mean_of_those_of_each_sample_alone(estimator: Any, chunk_size: int | None) -> None:
    options: dict[str, Any] = {"estimator": estimator, "num_probes": 2, "rtol": None}
    found = functional.hessian_trace(MODEL, INPUTS, TARGETS, extras=EXTRAS, chunk_size=chunk_size, **options)
    each = [
        functional.hessian_trace(alone(row), INPUTS[row : row + 1], TARGETS[row : row + 1], **options)
        for row in range(NUM_SAMPLES)
    ]
    for name, trace in found.layers.items():
        expected = sum(float(one.layers[name]) for one in each) / NUM_SAMPLES
        assert float(trace) == pytest.approx(expected, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("name", METRICS)
def test_metrics_pass_them_on(name: str) -> None:
    together, apart = METRICS[name](), METRICS[name]()
    together.update(Probe(MODEL, INPUTS, TARGETS, extras=EXTRAS, chunk_size=4))
    for row in range(NUM_SAMPLES):
        apart.update(Probe(alone(row), INPUTS[row : row + 1], TARGETS[row : row + 1]))
    expected = apart.compute()
    for key, value in together.compute().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6, equal_nan=True, msg=key)


def test_rows_of_a_probe_have_their_extras() -> None:
    probe = Probe(MODEL, INPUTS, TARGETS, extras=EXTRAS)
    logits = probe.logits(INPUTS)
    some = probe.rows(slice(2, 5))
    torch.testing.assert_close(some.logits(some.inputs), logits[2:5])


def test_half_precision_and_inference_tensors_are_taken() -> None:
    with torch.inference_mode():
        half = {"mask": EXTRAS["mask"].half(), "category": EXTRAS["category"].clone()}
    expected = functional.linearize(MODEL, INPUTS, extras=EXTRAS)
    torch.testing.assert_close(functional.linearize(MODEL, INPUTS, extras=half).gram, expected.gram)
    assert half["mask"].dtype == torch.float16


@pytest.mark.parametrize("wrong", [[1] * NUM_SAMPLES, None, 1.0, EXTRAS["mask"].numpy()])
def test_what_is_not_a_tensor_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"`extras` .* but got {type(wrong).__name__} for 'mask'.*functools.partial"):
        Probe(MODEL, INPUTS, TARGETS, extras={"mask": wrong})


@pytest.mark.parametrize("wrong", [EXTRAS["mask"][:4], EXTRAS["mask"][0], torch.tensor(1.0), EXTRAS["mask"].T])
def test_what_is_not_per_sample_is_refused(wrong: Tensor) -> None:
    for function in (Probe, functional.pgd, functional.hessian_trace):
        options = {"epsilon": 0.1, "steps": 1} if function is functional.pgd else {}
        with pytest.raises(ValueError, match=r"`extras` .* \(6, ...\), but 'mask' has shape .*functools.partial"):
            function(MODEL, INPUTS, TARGETS, extras={"mask": wrong}, **options)
