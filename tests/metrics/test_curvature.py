"""The curvature metrics return the functional estimates with correct error bars, and share one measurement."""

import copy
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust import (
    AdversarialAccuracy,
    FisherRaoMargin,
    FisherSpectralNorm,
    HessianTrace,
    LinearizedAccuracy,
    Probe,
    WeightCurvatureIndex,
)
from lightning_robust.functional import hessian_trace, pgd, weight_curvature_index
from lightning_robust.metrics._curvature import CurvatureMetric
from tests.helpers import processes
from tests.helpers.networks import build
from tests.helpers.oracles import dense_hessian_traces
from tests.helpers.recording import Recorder


def measured(metric: CurvatureMetric, *probes: Probe) -> dict[str, float]:
    for probe in probes:
        metric.update(probe)
    return {key: float(value) for key, value in metric.compute().items()}


def probe(name: str = "cnn_batchnorm", num_samples: int = 40, **options: Any) -> Probe:
    return Probe(*build(name, num_samples=num_samples), **options)


@pytest.mark.parametrize("name", ["cnn_batchnorm", "mlp"])
def test_the_trace_is_the_functional_estimate(name: str) -> None:
    sample = probe(name)
    expected = hessian_trace(sample.model, sample.inputs, sample.targets, rtol=None, num_probes=2)
    values = measured(HessianTrace(), sample)
    assert values["hessian_trace"] == pytest.approx(float(expected.total), rel=1e-6)
    assert values["hessian_trace_stderr"] == pytest.approx(float(expected.total_sample_stderr), rel=1e-5)
    assert values["hessian_trace_stderr_probes"] == pytest.approx(float(expected.total_stderr), rel=1e-5)
    layers = {key.removeprefix("hessian_trace_per_layer/"): value for key, value in values.items() if "/" in key}
    assert layers == pytest.approx({key: float(value) for key, value in expected.layers.items()}, rel=1e-6)
    assert sum(layers.values()) == pytest.approx(values["hessian_trace"])


@pytest.mark.parametrize("name", ["cnn_batchnorm", "mlp", "attention"])
def test_the_index_follows_from_norms_and_traces_of_weight_tensors(name: str) -> None:
    sample = probe(name)
    weights = {key: p for key, p in sample.model.named_parameters() if p.ndim > 1}
    traces = hessian_trace(sample.model, sample.inputs, sample.targets, rtol=None, num_probes=2).layers
    expected = weight_curvature_index(
        torch.stack([p.detach().norm() for p in weights.values()]), torch.stack([traces[key] for key in weights])
    )
    values = measured(WeightCurvatureIndex(), sample)
    assert values["wci"] == pytest.approx(float(expected), rel=1e-5)
    assert {key.removeprefix("wci_per_layer/") for key in values if "/" in key} == weights.keys()
    assert sum(value for key, value in values.items() if "/" in key) == pytest.approx(values["wci"])
    assert values["wci_negative_layers"] == sum(float(traces[key]) < 0 for key in weights)


def test_both_metrics_share_one_measurement() -> None:
    sample = probe()
    recorder = Recorder(sample.model)
    watched = Probe(recorder, sample.inputs, sample.targets)
    HessianTrace().update(watched)
    passes = len(recorder.record.batch_sizes)
    assert passes > 0
    WeightCurvatureIndex().update(watched)
    assert len(recorder.record.batch_sizes) == passes
    WeightCurvatureIndex(num_probes=3).update(watched)
    assert len(recorder.record.batch_sizes) > passes


def test_every_measurement_classifies_layers_anew() -> None:
    sample = probe("cnn_batchnorm")
    assert isinstance(sample.model, nn.Sequential)
    measured(HessianTrace(), sample)
    places = [number for number, layer in enumerate(sample.model) if isinstance(layer, nn.ReLU)]
    assert places
    for number in places:
        sample.model[number] = nn.Softplus()
    smooth = Probe(sample.model, sample.inputs, sample.targets)
    fresh = Probe(copy.deepcopy(sample.model), sample.inputs, sample.targets)
    assert measured(HessianTrace(), smooth) == pytest.approx(measured(HessianTrace(), fresh), rel=1e-6)
    assert "hutchinson" in hessian_trace(smooth.model, smooth.inputs, smooth.targets).estimator.values()


def test_the_adversarial_index_equals_the_index_of_attacked_inputs() -> None:
    sample = probe("mlp", 60)
    attacked = pgd(sample.model, sample.inputs, sample.targets, epsilon=0.3, steps=4)
    values = measured(WeightCurvatureIndex(attack="pgd", epsilon=0.3, steps=4, num_probes=64), sample)
    assert all(key.startswith("adversarial_wci") for key in values)
    # with other signs, which here depend on the attacked inputs and above on the clean ones
    expected = measured(WeightCurvatureIndex(num_probes=64), Probe(sample.model, attacked, sample.targets))
    error = math.hypot(values["adversarial_wci_stderr_probes"], expected["wci_stderr_probes"])
    assert values["adversarial_wci"] == pytest.approx(expected["wci"], abs=4 * error)
    assert error < 0.05 * expected["wci"]
    clean = measured(WeightCurvatureIndex(num_probes=64), sample)
    assert abs(clean["wci"] - values["adversarial_wci"]) > 4 * error


def test_fgsm_is_one_step_to_the_boundary_of_the_ball() -> None:
    sample = probe("mlp")
    one = measured(WeightCurvatureIndex(attack="fgsm", epsilon=0.2), sample)
    two = measured(WeightCurvatureIndex(attack="pgd", epsilon=0.2, steps=1), sample)
    assert one == two


@pytest.mark.parametrize("sizes", [[30], [1] * 30, [17, 2, 11]], ids=str)
def test_values_do_not_depend_on_batches(sizes: list[int]) -> None:
    model, inputs, targets = build("attention", num_samples=30)
    expected = measured(HessianTrace(), Probe(model, inputs, targets))
    parts = zip(inputs.split(sizes), targets.split(sizes), strict=True)
    values = measured(HessianTrace(), *(Probe(model, x, y) for x, y in parts))
    assert values == pytest.approx(expected, rel=1e-4, abs=1e-4)


def by_process(rank: int, sizes: list[int]) -> dict[str, Tensor]:
    processes.join_group()
    metric = HessianTrace().to("cpu")
    model, inputs, targets = build("mlp", num_samples=sum(sizes))
    if sizes[rank]:
        metric.update(Probe(model, inputs.split(sizes)[rank], targets.split(sizes)[rank]))
    return metric.compute()


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_values_do_not_depend_on_processes() -> None:
    sizes = [19, 0, 11]
    expected = measured(HessianTrace(), Probe(*build("mlp", num_samples=30)))
    for values in processes.run(by_process, 3, sizes):
        assert {key: float(value) for key, value in values.items()} == pytest.approx(expected, rel=1e-5, abs=1e-5)


class Experts(nn.Module):
    """A sample goes to one expert or another by the sign of its first feature, and none to a third."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3)
        for expert, chosen in zip(self.experts, (x[:, 0] < 0, x[:, 0] >= 0, x[:, 0] > 99), strict=True):
            rows = chosen.nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return out


def routed(num_samples: int = 12) -> Probe:
    """The first half of the samples goes to the first expert, the second half to the second."""
    torch.manual_seed(0)
    inputs = torch.randn(num_samples, 4)
    inputs[:, 0] = torch.arange(num_samples) - num_samples // 2 + 0.5
    return Probe(Experts(), inputs, torch.arange(num_samples) % 3)


REACHED = {f"hessian_trace_per_layer/experts.{k}.{name}" for k in (0, 1) for name in ("weight", "bias")}


def per_layer(values: Iterable[str]) -> set[str]:
    return {key for key in values if "/" in key}


def test_a_layer_that_some_samples_reach_is_measured_and_one_that_none_reaches_has_no_key() -> None:
    whole = routed()
    metric = HessianTrace(estimator="gauss_newton")
    expected = {key.replace("trace_per", "trace_gauss_newton_per") for key in REACHED}
    for _ in range(2):
        at_once = measured(metric, whole)
        metric.reset()
        in_parts = measured(metric, whole.rows(slice(0, 6)), whole.rows(slice(6, 12)))
        metric.reset()
        assert per_layer(at_once) == per_layer(in_parts) == expected
        assert in_parts == pytest.approx(at_once, rel=1e-5)
    index = measured(WeightCurvatureIndex(), whole)
    assert per_layer(index) == {"wci_per_layer/experts.0.weight", "wci_per_layer/experts.1.weight"}
    assert index["wci"] == pytest.approx(sum(index[key] for key in per_layer(index)))


def experts_by_process(rank: int) -> dict[str, Tensor]:
    processes.join_group()
    metric = HessianTrace().to("cpu")
    metric.update(routed().rows((slice(0, 6), slice(6, 12))[rank]))
    return metric.compute()


@pytest.mark.ddp
def test_a_layer_that_one_process_reaches_is_measured_by_all() -> None:
    expected = measured(HessianTrace(), routed())
    assert per_layer(expected) == REACHED
    for values in processes.run(experts_by_process, 2):
        assert {key: float(value) for key, value in values.items()} == pytest.approx(expected, rel=1e-5, abs=1e-5)


LOSSES_THAT_IGNORE: dict[str, nn.Module] = {
    "ignored": nn.CrossEntropyLoss(ignore_index=5),
    "without weight": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 0.0])),
    "of log-probabilities": nn.NLLLoss(ignore_index=5),
}


def partly_void(loss_fn: nn.Module | None = None, *, dense: bool = False) -> Probe:
    """Samples the first and the last third of which the loss ignores, of one class each or of one per position."""
    model, inputs, targets = build("mlp", num_samples=12)
    targets = targets % 5
    targets[:4] = targets[8:] = 5
    network: nn.Module = nn.Sequential(model, nn.LogSoftmax(dim=1)) if isinstance(loss_fn, nn.NLLLoss) else model
    if dense:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = nn.Sequential(nn.Conv1d(1, 6, 1), nn.Tanh(), nn.Conv1d(6, 6, 1))
        inputs, targets = inputs[:, None, :4], targets[:, None].repeat(1, 4)
        targets[5, :2] = 5
    return Probe(network, inputs, targets, loss_fn=loss_fn or LOSSES_THAT_IGNORE["ignored"])


@pytest.mark.parametrize("sizes", [[1] * 12, [4, 4, 4], [8, 4]], ids=str)
@pytest.mark.parametrize("loss", [*LOSSES_THAT_IGNORE, "dense"])
def test_batches_that_the_loss_ignores_add_nothing(loss: str, sizes: list[int]) -> None:
    whole = partly_void(LOSSES_THAT_IGNORE.get(loss), dense=loss == "dense")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [whole.rows(slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    for metric in (HessianTrace(num_probes=3), WeightCurvatureIndex(num_probes=3)):
        expected = measured(copy.deepcopy(metric), whole.rows(slice(4, 8)))
        assert sum(expected.values()) > 0
        assert measured(metric, *parts) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_trace_of_batches_of_one_is_that_of_the_loss_of_all() -> None:
    whole = partly_void(dense=True)
    parts = [whole.rows(slice(n, n + 1)) for n in range(len(whole))]
    actual = measured(HessianTrace(num_probes=200), *parts)
    loss_fn = LOSSES_THAT_IGNORE["ignored"]
    traces = dense_hessian_traces(copy.deepcopy(whole.model).double(), whole.inputs, whole.targets, loss_fn=loss_fn)
    expected = sum(map(float, traces.values()))
    error = actual["hessian_trace_stderr_probes"]
    assert error < 0.1 * expected
    assert actual["hessian_trace"] == pytest.approx(expected, abs=3 * error)


@pytest.mark.parametrize("estimator", ["auto", "gauss_newton", "hutchinson"])
def test_only_a_whole_measurement_without_a_sample_that_counts_is_refused(estimator: Any) -> None:
    void = partly_void().rows(slice(0, 4))
    for metric in (HessianTrace(estimator), WeightCurvatureIndex(estimator)):
        for _ in range(2):
            metric.update(void)
        with pytest.raises(ValueError, match="at least one sample that counts in the loss"):
            metric.compute()
    with pytest.raises(ValueError, match="at least one sample that counts in the loss"):
        hessian_trace(void.model, void.inputs, void.targets, loss_fn=void.loss_fn, estimator=estimator)


def void_by_process(rank: int) -> list[dict[str, Tensor] | str]:
    processes.join_group()
    results: list[dict[str, Tensor] | str] = []
    for rows in (slice(6 * rank, 6 + 6 * rank), slice(4 * rank, 4 + 4 * rank), slice(8 * rank, 4 + 8 * rank)):
        metric = HessianTrace().to("cpu")
        metric.update(partly_void().rows(rows))
        try:
            results.append(metric.compute())
        except ValueError as error:
            results.append(str(error))
    return results


@pytest.mark.ddp
def test_a_process_all_of_whose_samples_are_ignored_adds_nothing() -> None:
    """Half of the samples that count on each of two processes, all on the second, and none on either."""
    expected = measured(HessianTrace(), partly_void())
    for both, second, none in processes.run(void_by_process, 2):
        for values in (both, second):
            assert {key: float(value) for key, value in values.items()} == pytest.approx(expected, rel=1e-5)
        assert "at least one sample that counts" in none


class Spare(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 3))
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)


def test_parameters_that_are_left_out_are_named_once_for_both_metrics() -> None:
    samples = Probe(Spare(), torch.randn(12, 4), torch.arange(12) % 3)
    trace, index = HessianTrace(), WeightCurvatureIndex()
    values = measured(trace, samples)
    (sentence,) = trace.caveats(values).values()
    assert list(trace.caveats(values)) == ["hessian_trace_per_layer/spare.weight"]
    assert "nor is another" in sentence
    trace.reset()
    assert trace.caveats(values) == {"hessian_trace_per_layer/spare.weight": sentence}
    assert list(index.caveats(measured(index, samples))) == ["wci_per_layer/spare.weight"]
    assert index.caveats(values | measured(index)) == {}
    chosen = Probe(samples.model.forward, samples.inputs, samples.targets)  # a part of the network, on purpose
    metric = HessianTrace()
    assert "hessian_trace_per_layer/spare.weight" not in measured(metric, chosen)
    assert metric.caveats(values) == {}


def test_a_metric_of_which_nothing_is_reached_is_refused() -> None:
    class Constant(Spare):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3]

    with pytest.raises(ValueError, match="no gradient leads from them to any of"):
        measured(HessianTrace(), Probe(Constant(), torch.randn(6, 4), torch.arange(6) % 3))


def test_states_do_not_grow_with_parameters_or_samples() -> None:
    def size(width: int, num_samples: int) -> int:
        model = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 3))
        metric = HessianTrace()
        for _ in range(3):
            metric.update(Probe(model, torch.rand(num_samples, 12), torch.zeros(num_samples, dtype=torch.long)))
        return sum(len(row) for state in (metric.rows, metric.text) for row in state)

    assert size(4, 3) == size(400, 30)


@pytest.mark.parametrize("num_samples", [3, 20, 40])
@pytest.mark.parametrize("metric", [HessianTrace, WeightCurvatureIndex])
def test_the_error_of_samples_includes_that_of_probes(metric: type[CurvatureMetric], num_samples: int) -> None:
    for name in ("mlp", "attention", "cnn_batchnorm"):
        values = measured(metric(estimator="hutchinson"), probe(name, num_samples))
        (stderr,) = (value for key, value in values.items() if key.endswith("_stderr"))
        (of_probes,) = (value for key, value in values.items() if key.endswith("_stderr_probes"))
        assert stderr >= of_probes > 0


def test_the_index_stays_finite_and_counts_layers_of_negative_trace() -> None:
    for num_samples in range(4, 30):  # until a single probe is negative in some layer
        sample = probe("resnet", num_samples)
        values = measured(WeightCurvatureIndex("hutchinson", num_probes=1), sample)
        if values["wci_negative_layers"]:
            break
    assert values["wci_negative_layers"] >= 1
    assert all(math.isfinite(value) for value in values.values())
    traces = hessian_trace(
        sample.model, sample.inputs, sample.targets, estimator="hutchinson", rtol=None, num_probes=1
    ).layers
    negative = [key for key in traces if f"wci_per_layer/{key}" in values and traces[key] < 0]
    assert len(negative) == values["wci_negative_layers"]
    assert all(values[f"wci_per_layer/{key}"] == 0 for key in negative)


def test_a_single_probe_has_no_error_of_its_own() -> None:
    values = measured(WeightCurvatureIndex(num_probes=1), probe())
    assert "wci_stderr_probes" not in values
    assert values["wci_stderr"] > 0


def test_per_layer_values_are_optional() -> None:
    for metric in (HessianTrace(per_layer=False), WeightCurvatureIndex(per_layer=False)):
        assert not any("/" in key for key in measured(metric, probe()))


@pytest.mark.long
def test_the_probe_error_of_the_index_is_its_spread_and_its_bias_is_smaller() -> None:
    model, inputs, targets = build("mlp", num_samples=64)
    truth = measured(WeightCurvatureIndex(num_probes=400), Probe(model, inputs, targets))
    estimates = []
    for seed in range(60):
        traces = hessian_trace(
            model,
            inputs,
            targets,
            rtol=None,
            num_probes=4,
            generator=torch.Generator().manual_seed(seed),
        ).layers
        names = [key for key, p in model.named_parameters() if p.ndim > 1]
        norms = torch.stack([p.detach().norm() for p in model.parameters() if p.ndim > 1])
        estimates.append(float(weight_curvature_index(norms, torch.stack([traces[key] for key in names]))))
    spread = torch.tensor(estimates).std()
    reported = measured(WeightCurvatureIndex(num_probes=4), Probe(model, inputs, targets))["wci_stderr_probes"]
    assert reported == pytest.approx(float(spread), rel=0.5)
    bias = sum(estimates) / len(estimates) - truth["wci"]
    assert abs(bias) < 0.5 * float(spread)


def test_the_loss_function_of_the_probe_is_measured() -> None:
    model, inputs, targets = build("cnn_batchnorm", num_samples=40)
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.linspace(0.5, 2, 10))
    values = measured(HessianTrace(), Probe(model, inputs, targets, loss_fn=smoothed))
    expected = hessian_trace(model, inputs, targets, loss_fn=smoothed, rtol=None, num_probes=2)
    assert values["hessian_trace"] == pytest.approx(float(expected.total), rel=1e-6)
    one_hot = nn.functional.one_hot(targets, 10).float()
    squares = measured(HessianTrace(), Probe(model, inputs, one_hot, loss_fn=nn.MSELoss()))
    expected = hessian_trace(model, inputs, one_hot, loss_fn=nn.MSELoss(), rtol=None, num_probes=2)
    assert squares["hessian_trace"] == pytest.approx(float(expected.total), rel=1e-6)


def test_chunks_bound_the_samples_that_pass_together() -> None:
    sample = probe()
    recorder = Recorder(sample.model)
    bounded = measured(HessianTrace(), Probe(recorder, sample.inputs, sample.targets, chunk_size=3))
    assert max(recorder.record.batch_sizes) == 3
    free = measured(HessianTrace(), sample)
    assert bounded["hessian_trace"] == pytest.approx(free["hessian_trace"], rel=1e-5)


def test_updates_with_another_network_are_refused() -> None:
    metric = HessianTrace()
    metric.update(probe("mlp"))
    with pytest.raises(ValueError, match="trained parameters of the model to be those of earlier updates"):
        metric.update(probe("cnn_batchnorm"))


def test_the_index_is_invariant_to_rescaling_of_layers() -> None:
    model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.ReLU(), nn.Linear(20, 5, bias=False))
    inputs, targets = torch.randn(30, 12, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 5
    rescaled = copy.deepcopy(model)
    with torch.no_grad():
        rescaled[0].weight.mul_(7)
        rescaled[2].weight.div_(7)
    one, two = (measured(WeightCurvatureIndex(), Probe(m, inputs, targets)) for m in (model, rescaled))
    assert one["wci"] == pytest.approx(two["wci"], rel=1e-5)
    one, two = (measured(HessianTrace(), Probe(m, inputs, targets)) for m in (model, rescaled))
    assert two["hessian_trace"] > 3 * one["hessian_trace"]


# --- inputs without a derivative --------------------------------------------------------------------------------------


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids.long()).mean(dim=1).tanh())


@pytest.mark.parametrize(
    ("estimator", "dtype"),
    [("auto", torch.int64), ("auto", torch.uint8), ("hutchinson", torch.int32), ("hutchinson", torch.float32)],
)
def test_networks_of_token_ids_have_curvature(estimator: str, dtype: torch.dtype) -> None:
    model, generator = Tokens(), torch.Generator().manual_seed(0)
    ids, targets = torch.randint(9, (20, 5), generator=generator).to(dtype), torch.arange(20) % 3
    expected = dense_hessian_traces(model, ids.long(), targets, F.cross_entropy)
    estimate = hessian_trace(model, ids, targets, estimator=estimator, num_probes=32, rtol=None)  # type: ignore[arg-type]
    values = measured(HessianTrace(estimator, num_probes=32), Probe(model, ids, targets))  # type: ignore[arg-type]
    for name, trace in expected.items():
        assert abs(float(estimate.layers[name]) - trace) <= 4 * float(estimate.stderr[name]) + 1e-5
        assert values[f"hessian_trace_per_layer/{name}"] == pytest.approx(
            float(estimate.layers[name]), rel=1e-4, abs=1e-7
        )


def test_only_what_needs_a_derivative_refuses_token_ids() -> None:
    model, ids = Tokens(), torch.arange(20).reshape(4, 5) % 9
    sample = Probe(model, ids, torch.zeros(4, dtype=torch.long))
    measured(WeightCurvatureIndex(), sample)
    others = (FisherSpectralNorm(), LinearizedAccuracy(), AdversarialAccuracy(), FisherRaoMargin(), ATTACKED)
    for metric in others:
        with pytest.raises(TypeError, match=r"torch.int64: integers, such as token ids .* have no derivative"):
            metric.update(sample)
    assert [metric.depends_on_units for metric in (*others, CLEAN, HessianTrace())] == [True] * 5 + [False] * 2


# --- caveats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trace", "noise", "num_samples"), [(1.0, 1.01, 10), (-1.0, 2.0, 256), (0.0, 1e-9, 10)])
def test_a_trace_below_its_noise_has_a_caveat(trace: float, noise: float, num_samples: int) -> None:
    values = {"hessian_trace": trace, "hessian_trace_stderr_probes": noise, "num_samples": num_samples}
    (caveat,) = HessianTrace().caveats(values).items()
    assert caveat[0] == "hessian_trace"
    assert caveat[1].startswith("is mostly noise of its random probes (`…_stderr_probes`)")
    assert "`HessianTrace(num_probes=32)`" in caveat[1]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"hessian_trace": 1.0, "num_samples": 256},  # a single probe
        {"hessian_trace": 1.0, "hessian_trace_stderr_probes": 1.0, "num_samples": 256},
        {"hessian_trace": -2.0, "hessian_trace_stderr_probes": 1.0, "num_samples": 256},
        {"hessian_trace": 1.0, "hessian_trace_stderr_probes": 9.0, "num_samples": 9},
        {"hessian_trace": 1.0, "hessian_trace_stderr_probes": 9.0},
        {"hessian_trace": 1.0, "hessian_trace_stderr_probes": math.nan, "num_samples": 256},
        {"hessian_trace_gauss_newton": 1.0, "hessian_trace_gauss_newton_stderr_probes": 9.0, "num_samples": 256},
    ],
)
def test_other_traces_have_no_caveat(values: dict[str, float]) -> None:
    assert HessianTrace().caveats(values) == {}


CLEAN, ATTACKED = WeightCurvatureIndex(), WeightCurvatureIndex(attack="pgd")


@pytest.mark.parametrize(("metric", "key"), [(CLEAN, "wci"), (ATTACKED, "adversarial_wci")])
def test_an_uncertain_index_with_negative_layers_has_a_caveat(metric: WeightCurvatureIndex, key: str) -> None:
    ((name, sentence),) = metric.caveats({key: 1.0, f"{key}_negative_layers": 1.0, f"{key}_stderr": 0.51}).items()
    assert name == key
    assert sentence.startswith("is not reliable: some layers have negative curvature")
    assert "`WeightCurvatureIndex(estimator='gauss_newton')` is never negative" in sentence
    assert ("a smaller `epsilon`" in sentence) == (metric is ATTACKED)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"wci": 1.0, "wci_negative_layers": 0.0, "wci_stderr": 9.0},
        {"wci": 1.0, "wci_negative_layers": 3.0, "wci_stderr": 0.5},
        {"wci": 1.0, "wci_negative_layers": 3.0},  # a single sample
    ],
)
def test_other_indices_have_no_caveat(values: dict[str, float]) -> None:
    assert CLEAN.caveats(values) == {}
    assert ATTACKED.caveats(values) == {}


def test_each_index_speaks_for_its_own_key() -> None:
    values = {"wci": 1.0, "wci_negative_layers": 3.0, "wci_stderr": 9.0}
    assert ATTACKED.caveats(values) == {}
    assert CLEAN.caveats({f"adversarial_{key}": value for key, value in values.items()}) == {}


def test_computed_values_fit_the_caveats() -> None:
    sample = probe("attention", 20)
    for metric in (HessianTrace("hutchinson"), CLEAN, ATTACKED):
        values = measured(metric, sample) | {"num_samples": 20.0}
        (key,) = (key.removesuffix("_stderr") for key in values if key.endswith("_stderr"))
        metric.reset()
        assert metric.caveats(values).keys() <= {key}
        assert metric.caveats(values | {f"{key}_stderr_probes": math.inf, f"{key}_stderr": math.inf,
                                        f"{key}_negative_layers": 1.0}).keys() == {key}  # fmt: skip


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"estimator": "exact"}, "`estimator` to be one of"),
        ({"num_probes": 0}, "`num_probes` to be a positive integer, but got 0"),
        ({"attack": "cw"}, "`attack` to be 'pgd', 'fgsm' or None, but got 'cw'"),
        ({"attack": "pgd", "steps": 0}, "`steps` to be a positive integer"),
        ({"attack": "pgd", "epsilon": -1}, "`epsilon` to be a finite number ≥ 0, but got -1"),
        ({"attack": "pgd", "norm": "l1"}, "`norm` to be one of"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        WeightCurvatureIndex(**options)
