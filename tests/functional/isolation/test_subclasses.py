"""Tensors of subclasses, such as images with metadata, are measured as plain ones."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_robust import HessianTrace, LinearizedAccuracy, Probe, RobustnessMonitor, WeightCurvatureIndex
from lightning_robust.functional import hessian_trace, linearize, pgd, relinearize, trace_fisher_rao_paths
from tests.helpers.networks import build
from tests.helpers.training import Classifier, samples, trainer


class Labelled(Tensor):
    """A tensor that hands its metadata on, and insists on having some."""

    origin: str

    @classmethod
    def of(cls, tensor: Tensor) -> "Labelled":
        found = tensor.as_subclass(cls)
        found.origin = "scanner"
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, Labelled):
            result.origin = next(arg.origin for arg in args if isinstance(arg, Labelled))
        return result


class Named(Tensor):
    """A subclass that adds nothing."""


WRAPPERS: dict[str, Callable[[Tensor], Tensor]] = {"labelled": Labelled.of, "named": lambda t: t.as_subclass(Named)}
MEASUREMENTS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "linearisation": lambda model, x, y: linearize(model, x, input_std=[0.5, 1, 2], valid_range=(-9, 9)).gram,
    "second linearisation": lambda model, x, y: relinearize(model, x, linearize(model, x)).gram,
    "attack": lambda model, x, y: pgd(model, x, y, epsilon=0.1, steps=2, valid_range=(-9, 9)),
    "trace": lambda model, x, y: hessian_trace(model, x, y, num_probes=2, rtol=None).total,
    "paths": lambda model, x, y: trace_fisher_rao_paths(model, x, max_steps=4).l2,
    "metrics": lambda model, x, y: torch.stack(
        [
            value
            for metric in (LinearizedAccuracy(), HessianTrace(), WeightCurvatureIndex(attack="fgsm"))
            for value in (metric.update(Probe(model, x, y)) or metric.compute()).values()
        ]
    ),
}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_inputs_targets_and_weights_of_subclasses_give_plain_numbers(name: str, kind: str) -> None:
    model, inputs, targets = build("cnn_batchnorm")
    wrap, measure = WRAPPERS[kind], MEASUREMENTS[name]
    wrapped = copy.deepcopy(model)
    for module in wrapped.modules():
        for key, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[key] = nn.Parameter(wrap(tensor.detach().clone()))
        for key, buffer in module._buffers.items():
            module._buffers[key] = wrap(buffer.clone())
    kinds = [type(tensor) for tensor in wrapped.state_dict(keep_vars=True).values()]
    measured, expected = measure(wrapped, wrap(inputs.clone()), wrap(targets.clone())), measure(model, inputs, targets)
    assert type(measured) is Tensor
    assert torch.equal(measured, expected)
    assert [type(tensor) for tensor in wrapped.state_dict(keep_vars=True).values()] == kinds
    assert Tensor not in kinds


def test_outputs_of_a_subclass_are_plain() -> None:
    class Returns(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).as_subclass(Named)

    model, inputs, targets = build("cnn_batchnorm")
    for name, measure in MEASUREMENTS.items():
        measured = measure(Returns(model), inputs, targets)
        assert type(measured) is Tensor, name
        torch.testing.assert_close(measured, measure(model, inputs, targets))


def test_a_monitor_measures_batches_with_metadata(tmp_path: Any) -> None:
    def collated(rows: list[Any]) -> tuple[Tensor, Tensor]:
        images, targets = (torch.stack(column) for column in zip(*rows, strict=True))
        return Labelled.of(images), targets

    def measured(**options: Any) -> dict[str, float]:
        torch.manual_seed(0)
        run = trainer(RobustnessMonitor(on_error="raise"), root=tmp_path)
        run.validate(Classifier(), DataLoader(samples(40), 16, **options), verbose=False)
        return {key: float(value) for key, value in run.callback_metrics.items() if "trace" in key or "spectral" in key}

    assert measured(collate_fn=collated) == measured()
