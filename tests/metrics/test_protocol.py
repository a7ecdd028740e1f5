"""What every metric must do, in one process and in several."""

import copy
import pickle
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust import (
    AdversarialAccuracy,
    FisherRaoMargin,
    FisherSpectralNorm,
    HessianTrace,
    LinearizedAccuracy,
    Probe,
    WeightCurvatureIndex,
)
from lightning_robust.metrics import METRICS, ProbeMetric
from lightning_robust.metrics._curvature import CurvatureMetric
from lightning_robust.metrics.keys import has_renamed_characters, leaves_and_folders
from tests.helpers import processes
from tests.helpers.networks import build

FACTORIES: dict[str, Callable[[], ProbeMetric]] = {
    "fisher": FisherSpectralNorm,
    "fisher_krylov": FisherSpectralNorm,
    "linearized_linf": LinearizedAccuracy,
    "linearized_l2": lambda: LinearizedAccuracy([0.05, 0.2], "l2"),
    "linearized_order2": lambda: LinearizedAccuracy([0.05, 0.2], order=2),
    "hessian_trace": HessianTrace,
    "wci": WeightCurvatureIndex,
    "adversarial_wci": lambda: WeightCurvatureIndex(attack="pgd", epsilon=0.1, steps=3),
    "adversarial": lambda: AdversarialAccuracy([0.02, 0.1], steps=3),
    "fisher_rao_margin": lambda: FisherRaoMargin(num_targets=2, max_steps=20, per_class=False),
}
# of the probes; in a monitor, all processes are told one temperature
OPTIONS: dict[str, dict[str, Any]] = {"fisher_krylov": {"linearization": "krylov", "temperature": 1.3}}
SHARDS = {"even": [10, 10, 10], "uneven": [17, 2, 11], "with an empty one": [12, 0, 18]}
every_metric = pytest.mark.parametrize("name", FACTORIES)


def probes(name: str, sizes: list[int]) -> list[Probe]:
    model, inputs, targets = build("cnn_batchnorm", num_samples=sum(sizes))
    options, parts = OPTIONS.get(name, {}), zip(inputs.split(sizes), targets.split(sizes), strict=True)
    return [Probe(model, x, y, **options) for x, y in parts]


@cache
def measured(name: str, *sizes: int) -> dict[str, Tensor]:
    metric = FACTORIES[name]()
    for probe in probes(name, [*sizes]):
        metric.update(probe)
    return metric.compute()


Found = tuple[dict[str, Tensor], dict[str, Tensor]]  # values, and values per sample


def measured_by_process(rank: int, sizes: list[int]) -> dict[str, Found]:
    processes.join_group()
    values = {}
    for name, factory in FACTORIES.items():
        metric = factory().to("cpu")  # `to` makes torchmetrics forget the type of states
        if sizes[rank]:  # a process without samples may not even know of the update
            metric.update(probes(name, sizes)[rank])
        values[name] = metric.compute(), metric.per_sample
    return values


@every_metric
def test_values_are_finite_scalars_with_bands_around_the_mean(name: str) -> None:
    values = measured(name, 30)
    assert any(key.endswith("_stderr") for key in values)
    for key, value in values.items():
        assert value.shape == ()
        assert value.isfinite(), key
        if f"{key}_stderr" in values:
            ends = (0, 1) if "accuracy" in key or key == "shielded" else (-torch.inf, torch.inf)
            for edge, sign in (("lower", -1), ("upper", 1)):
                expected = (value + 2 * sign * values[f"{key}_stderr"]).clamp(*ends)
                torch.testing.assert_close(values[f"{key}_{edge}"], expected)


@every_metric
@pytest.mark.parametrize("sizes", [[30], [1] * 30, *SHARDS.values()], ids=str)
def test_values_do_not_depend_on_how_samples_are_batched(name: str, sizes: list[int]) -> None:
    expected, values = measured(name, 30), measured(name, *sizes)
    assert values.keys() == expected.keys()
    for key, value in values.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("shards", SHARDS)
def test_several_processes_give_the_values_of_one(shards: str) -> None:
    results = processes.run(measured_by_process, 3, SHARDS[shards])
    for name, factory in FACTORIES.items():
        metric = factory()
        for probe in probes(name, SHARDS[shards]):
            metric.update(probe)
        alone = metric.compute(), metric.per_sample
        for result in results:
            for found, expected, first in zip(result[name], alone, results[0][name], strict=True):
                assert found.keys() == expected.keys()
                for key, value in found.items():
                    torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-9)
                    assert torch.equal(value, first[key])


@every_metric
@pytest.mark.parametrize("sizes", [[30], [17, 2, 11]], ids=str)
def test_values_per_sample_have_the_mean_that_is_returned_in_the_order_of_the_samples(
    name: str, sizes: list[int]
) -> None:
    metric = FACTORIES[name]()
    assert metric.per_sample == {}
    for probe in probes(name, sizes):
        metric.update(probe)
    values = metric.compute()
    means = {key for key in values if f"{key}_stderr" in values} - {"fim_spectral_norm_calibrated"}
    assert set(metric.per_sample) == (set() if isinstance(metric, CurvatureMetric | FisherRaoMargin) else means)
    singles = probes(name, [1] * 30)
    for key, found in metric.per_sample.items():
        torch.testing.assert_close(found.mean(), values[key])
        for sample in (0, 29):
            single = FACTORIES[name]()
            single.update(singles[sample])
            torch.testing.assert_close(found[sample], single.compute()[key], rtol=1e-5, atol=1e-7)
    metric.reset()
    assert metric.per_sample == {}


@every_metric
def test_a_metric_without_samples_has_no_values(name: str) -> None:
    metric = FACTORIES[name]()
    metric.update(Probe(torch.nn.Identity(), torch.empty(0), torch.empty(0, dtype=torch.long)))
    assert metric.compute() == {}


@every_metric
def test_one_sample_has_means_without_error_bars(name: str) -> None:
    values = measured(name, 1)
    assert values
    assert not any(key.endswith(("_stderr", "_lower", "_upper")) for key in values if "accuracy" not in key)


@every_metric
def test_reset_forgets(name: str) -> None:
    metric = FACTORIES[name]()
    first, second = probes(name, [20, 10])
    metric.update(first)
    metric.reset()
    metric.update(second)
    fresh = FACTORIES[name]()
    fresh.update(second)
    assert metric.compute() == fresh.compute()


@every_metric
def test_a_metric_started_in_inference_mode_continues_outside(name: str) -> None:
    metric = FACTORIES[name]()
    first, second = probes(name, [20, 10])
    with torch.inference_mode():
        metric.reset()
        metric.update(first)
    with torch.no_grad():
        metric.update(second)
    assert metric.compute() == measured(name, 20, 10)


@every_metric
def test_clones_and_pickles_are_independent(name: str) -> None:
    metric = FACTORIES[name]()
    first, second = probes(name, [20, 10])
    metric.update(first)
    for twin in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        twin.update(second)
        assert twin.compute() == measured(name, 20, 10)
    alone = FACTORIES[name]()
    alone.update(first)
    assert metric.compute() == alone.compute()


@every_metric
def test_conversions_of_a_module_leave_states_in_float64(name: str) -> None:
    metric = FACTORIES[name]()
    first, second = probes(name, [20, 10])
    metric.update(first)
    torch.nn.ModuleList([metric.half()]).bfloat16()  # by itself, and inside of a module
    metric.update(second)
    states = [
        value for state in metric.metric_state.values() for value in (state if isinstance(state, list) else [state])
    ]
    assert states
    assert all(state.dtype == torch.float64 for state in states)
    assert metric.compute() == measured(name, 20, 10)


@every_metric
def test_only_probes_are_accepted(name: str) -> None:
    with pytest.raises(TypeError, match=r"update to be given a Probe\(model, inputs, targets\), but got Tensor"):
        FACTORIES[name]().update(torch.ones(3))  # type: ignore[arg-type]


@every_metric
def test_direction_is_stated(name: str) -> None:
    metric, first = FACTORIES[name](), next(iter(measured(name, 30)))
    assert metric.higher_is_better is (None if name == "fisher_rao_margin" else "accuracy" in first)
    assert metric.direction(first) is metric.higher_is_better


# of neither direction, beside the standard errors of all keys
NEITHER = {
    "temperature",
    "saturated",
    "fim_spectral_norm_unconverged",
    "wci_negative_layers",
    "adversarial_wci_negative_layers",
}


@every_metric
def test_no_key_has_a_better_direction_that_tells_nothing_of_robustness(name: str) -> None:
    metric = FACTORIES[name]()
    for key in measured(name, 30):
        neither = key in NEITHER or "_stderr" in key
        assert (metric.direction(key) is None) == (
            neither or (name == "fisher_rao_margin" and not re.search("_l(2|inf)", key))
        ), key


def test_every_metric_has_a_name() -> None:
    assert {type(FACTORIES[name]()) for name in FACTORIES} == set(METRICS.values())


class OddlyNamed(nn.Module):
    """Layers whose names are those of folders, and names that loggers rename."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
        for name in ("a/0", "a/0/weight", "b (1)", "b_(1)"):
            self.add_module(name, nn.Linear(5, 5))
        self.extra = nn.ParameterDict({"a": torch.ones(5, 2), "a/weight": torch.ones(2, 3)})

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            x = x if name == "extra" else layer(x)
        return x @ self.extra["a"] @ self.extra["a/weight"]


def test_no_key_is_the_folder_of_another_and_no_logger_renames_one() -> None:
    torch.manual_seed(0)
    model = OddlyNamed()
    probe = Probe(model, torch.rand(12, 6), torch.arange(12) % 3)
    factories = [
        *FACTORIES.values(),
        lambda: FisherRaoMargin(max_steps=3),
        lambda: HessianTrace("gauss_newton"),
        lambda: WeightCurvatureIndex("gauss_newton"),
        lambda: WeightCurvatureIndex("gauss_newton", attack="fgsm"),
    ]
    keys = ["num_samples", "seconds", "overhead"]
    layers = 0
    for factory in factories:
        metric = factory()
        metric.update(probe)
        keys += metric.compute()
        layers += isinstance(metric, HessianTrace) and len(list(model.parameters()))
    assert sum("hessian_trace" in key and "_per_layer/" in key for key in keys) == layers == 24
    assert len(set(keys)) >= 100
    assert list(leaves_and_folders(keys)) == []
    assert not any(has_renamed_characters(key) for key in keys)
