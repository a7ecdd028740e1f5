"""Metrics of networks whose outputs are labels or numbers: shapes, batches, processes, curvature, and refusals."""

from typing import Any, NamedTuple

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
from lightning_robust.functional import calibrated_fim_spectral_norm, linearize, linearized_margin_linf
from lightning_robust.metrics import ProbeMetric
from tests.helpers import processes
from tests.helpers.networks import random
from tests.helpers.oracles import dense_hessian_traces

N, D, C = 24, 5, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "bernoulli": {"likelihood": "bernoulli"},
    "gaussian": {"likelihood": "gaussian", "tolerance": 0.5},
}
every_likelihood = pytest.mark.parametrize("likelihood", OPTIONS)


def build(width: int = C) -> nn.Module:
    model = nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, width))
    for number, parameter in enumerate(model.parameters()):
        parameter.data = random(number, *parameter.shape, dtype=torch.float32)
    return model


def samples(likelihood: str, width: int = C) -> tuple[Tensor, Tensor]:
    inputs = random(0, N, D, dtype=torch.float32)
    targets = build(width)(inputs).detach() + random(1, N, width, dtype=torch.float32)
    return inputs, (targets > 0).float() if likelihood == "bernoulli" else targets


def metrics() -> list[ProbeMetric]:
    return [FisherSpectralNorm(), LinearizedAccuracy([0.01, 0.1]), LinearizedAccuracy([0.1], "l2", order=2)]


def measured(*probes: Probe, which: list[ProbeMetric] | None = None) -> dict[str, Tensor]:
    values = {}
    for metric in metrics() if which is None else which:
        for probe in probes:
            metric.update(probe)
        values |= metric.compute()
    return values


@every_likelihood
def test_values_are_those_of_the_functions_and_do_not_depend_on_batches(likelihood: str) -> None:
    (x, y), options, model = samples(likelihood), OPTIONS[likelihood], build()
    values = measured(Probe(model, x, y, **options))
    at = linearize(model, x, **options)
    calibrated = calibrated_fim_spectral_norm(at.logits, at.gram, y, likelihood=options["likelihood"])
    torch.testing.assert_close(values["fim_spectral_norm_calibrated"].float(), calibrated.mean)
    torch.testing.assert_close(values["fim_spectral_norm_calibrated_stderr"].float(), calibrated.stderr)
    torch.testing.assert_close(values["temperature"].float(), calibrated.temperature)
    assert at.gap_l1 is not None
    margins = linearized_margin_linf(at.logits, at.gap_l1, y, **options)
    torch.testing.assert_close(values["linearized_accuracy_linf_0.1"].float(), (margins > 0.1).float().mean())
    torch.testing.assert_close(values["linearized_margin_linf"].float(), margins.mean())
    in_parts = measured(*(Probe(model, x[i:j], y[i:j], **options) for i, j in ((0, 7), (7, 8), (8, 24))))
    assert in_parts.keys() == values.keys()
    for key, value in in_parts.items():
        torch.testing.assert_close(value, values[key], rtol=1e-5, atol=1e-7)


def test_clean_accuracy_is_that_all_labels_are_right_and_numbers_always_are() -> None:
    x, y = samples("bernoulli")
    exact = ((build()(x) > 0) == (y > 0)).all(dim=1).double().mean()
    assert 0 < exact < 1
    assert measured(Probe(build(), x, y, **OPTIONS["bernoulli"]))["linearized_accuracy_linf_0"] == exact
    values = measured(Probe(build(), *samples("gaussian"), **OPTIONS["gaussian"]))
    assert values["linearized_accuracy_linf_0"] == 1
    assert "saturated" not in values


class Shaped(nn.Module):
    """One output per sample, in any wrapping."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.network, self.wrap = build(1), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.network(x))


class Prediction(NamedTuple):
    features: Tensor
    value: Tensor


WRAPS = {
    "(N,)": lambda z: z.squeeze(1),
    "squeezed": lambda z: z.squeeze(),
    "(N, 1, 1)": lambda z: z[:, :, None],
    "dictionary": lambda z: {"loss": z.mean(), "prediction": z},
    "tuple": lambda z: Prediction(z.expand(-1, 7), z),
}


@every_likelihood
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("column", [False, True])
def test_a_single_output_may_have_any_shape_and_so_may_its_target(likelihood: str, wrap: str, column: bool) -> None:
    x, y = samples(likelihood, 1)
    which = [*metrics(), HessianTrace(), WeightCurvatureIndex()]
    expected = measured(Probe(build(1), x, y, **OPTIONS[likelihood]), which=which)
    y = y if column else y[:, 0]
    y = y.long() if likelihood == "bernoulli" else y.double()
    probe = Probe(Shaped(WRAPS[wrap]), x, y, **OPTIONS[likelihood])
    found = measured(probe, which=[*metrics(), HessianTrace(), WeightCurvatureIndex()])
    for key, value in expected.items():
        inside = key.replace("_per_layer/", "_per_layer/network.")
        torch.testing.assert_close(found[inside], value, rtol=1e-5, atol=1e-7)
    single = measured(probe.rows(slice(0, 1)), which=[FisherSpectralNorm()])
    assert single["fim_trace"] > 0


def test_outputs_that_could_both_be_the_prediction_are_not_guessed() -> None:
    x, y = samples("gaussian", 1)
    probe = Probe(Shaped(lambda z: (z, z.exp())), x, y, **OPTIONS["gaussian"])
    with pytest.raises(
        ValueError, match=r"several entries.*Probe\(lambda x: module\(x\)\[0\], batch\[0\], batch\[1\]"
    ) as error:
        measured(probe)
    assert "BCE" not in str(error.value)


@pytest.mark.parametrize(("likelihood", "loss"), [("bernoulli", nn.BCEWithLogitsLoss()), ("gaussian", nn.MSELoss())])
def test_curvature_is_that_of_the_loss_of_the_likelihood(likelihood: str, loss: nn.Module) -> None:
    x, y = samples(likelihood)
    found = measured(Probe(build(), x, y, **OPTIONS[likelihood]), which=[HessianTrace(num_probes=400)])
    error = 4 * float(found["hessian_trace_stderr_probes"]) + 1e-6
    expected = sum(dense_hessian_traces(build(), x, y, loss).values())
    assert float(found["hessian_trace"]) == pytest.approx(expected, abs=error)


def test_a_loss_of_ones_own_gets_outputs_and_targets_as_they_are() -> None:
    x, y = samples("gaussian", 1)

    def huber(outputs: Tensor, targets: Tensor) -> Tensor:
        assert outputs.shape[1:] == (1,)
        assert targets.ndim == 1
        return nn.functional.huber_loss(outputs.squeeze(1), targets)

    found = measured(Probe(build(1), x, y[:, 0], loss_fn=huber, **OPTIONS["gaussian"]), which=[HessianTrace()])
    by_torch = Probe(build(1), x, y[:, 0], loss_fn=nn.HuberLoss(), **OPTIONS["gaussian"])
    torch.testing.assert_close(found["hessian_trace"], measured(by_torch, which=[HessianTrace()])["hessian_trace"])


def measured_by_process(rank: int, sizes: list[int]) -> dict[str, dict[str, Tensor]]:
    processes.join_group()
    return {likelihood: measured(*shard(likelihood, sizes, rank)) for likelihood in OPTIONS}


def shard(likelihood: str, sizes: list[int], rank: int) -> list[Probe]:
    x, y = (part.split(sizes)[rank] for part in samples(likelihood))
    return [Probe(build(), x, y, **OPTIONS[likelihood])] if len(x) else []


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_several_processes_give_the_values_of_one_also_where_one_has_no_samples() -> None:
    sizes = [17, 0, 7]
    results = processes.run(measured_by_process, 3, sizes)
    for likelihood, options in OPTIONS.items():
        expected = measured(Probe(build(), *samples(likelihood), **options))
        for result in results:
            assert result[likelihood].keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(result[likelihood][key], value, rtol=1e-6, atol=1e-9)


@every_likelihood
@pytest.mark.parametrize("metric", [AdversarialAccuracy, FisherRaoMargin, lambda: WeightCurvatureIndex(attack="fgsm")])
def test_what_leads_to_other_classes_refuses_in_words(likelihood: str, metric: Any) -> None:
    with pytest.raises(ValueError, match=f"likelihood 'categorical', because attacks and paths.*{likelihood}.*Leave"):
        metric().update(Probe(build(), *samples(likelihood), **OPTIONS[likelihood]))


@every_likelihood
def test_targets_that_contradict_the_likelihood_are_refused_by_metrics_of_the_inputs(likelihood: str) -> None:
    x, y = samples(likelihood)
    for metric in metrics():
        with pytest.raises(ValueError, match=rf"`targets` of the shape of the outputs, \({N}, {C}\)"):
            metric.update(Probe(build(), x, y[:, 0].round().long(), **OPTIONS[likelihood]))


def test_margins_of_numbers_need_a_tolerance_and_a_line_to_paste_says_so() -> None:
    x, y = samples("gaussian")
    probe = Probe(build(), x, 100 * y, likelihood="gaussian", valid_range=(-9, 9))
    for metric in (LinearizedAccuracy(), LinearizedAccuracy(order=2), LinearizedAccuracy(norm="l2")):
        with pytest.raises(ValueError, match=r"RobustnessMonitor\(likelihood='gaussian', tolerance=\d0\)"):
            metric.update(probe)
    assert measured(probe, which=[FisherSpectralNorm()])["fim_trace"] > 0


def test_one_metric_does_not_mix_likelihoods() -> None:
    metric = FisherSpectralNorm()
    metric.update(Probe(build(), *samples("gaussian"), **OPTIONS["gaussian"]))
    with pytest.raises(ValueError, match="likelihood 'gaussian', as before, but got 'bernoulli'"):
        metric.update(Probe(build(), *samples("bernoulli"), **OPTIONS["bernoulli"]))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"likelihood": "poisson"}, "`likelihood` to be one of"),
        ({"likelihood": "gaussian", "tolerance": 0}, "`tolerance` to be a positive number"),
        ({"tolerance": 0.5}, "only 'gaussian' has one"),
    ],
)
def test_options_are_checked_when_the_probe_is_made(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Probe(build(), torch.zeros(2, D), torch.tensor([0, 1]), **options)
