import copy
from collections.abc import Callable
from typing import Any

import numpy as np
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
from lightning_robust.functional import fim_spectral_norm, linearize
from tests.helpers.networks import build, random, random_linear
from tests.helpers.recording import Recorder, state_of


@pytest.fixture
def probe() -> Probe:
    return Probe(*build("cnn_batchnorm"))


# --- the probe itself -----------------------------------------------------------------------------------------------


def test_all_readers_share_one_linearization() -> None:
    model, inputs, targets = build("cnn_batchnorm")
    recorder = Recorder(model)
    probe = Probe(recorder, inputs, targets)
    assert recorder.record.batch_sizes == []  # nothing before it is asked for
    first = probe.linearized
    assert probe.linearized is first
    assert recorder.record.batch_sizes == [len(inputs)]


def test_the_linearization_is_in_the_units_and_chunks_of_the_probe() -> None:
    model, inputs, targets = build("cnn_batchnorm")
    recorder = Recorder(model)
    actual = Probe(recorder, inputs, targets, input_std=[0.5, 1.0, 2.0], chunk_size=3).linearized
    assert recorder.record.batch_sizes == [3, 3, 3]
    torch.testing.assert_close(actual.gram, linearize(model, inputs, input_std=[0.5, 1.0, 2.0]).gram)


def test_logits_run_in_eval_mode_without_a_graph_and_change_nothing(probe: Probe) -> None:
    model, given = probe.model, probe.inputs.clone().requires_grad_()
    assert isinstance(model, nn.Module)
    before = state_of(model)
    with torch.inference_mode():
        logits = probe.logits(given.clone())
    assert state_of(model) == before
    assert not probe.logits(given).requires_grad
    torch.testing.assert_close(logits, copy.deepcopy(model).eval()(probe.inputs).detach())


def test_a_function_is_measured_in_eval_mode_if_its_module_is_given() -> None:
    model, inputs, targets = build("cnn_batchnorm")
    expected = linearize(model, inputs)
    before = state_of(model.train())
    probe = Probe(lambda x: model(x) + 1, inputs, targets, module=model)
    torch.testing.assert_close(probe.logits(inputs), expected.logits + 1)
    torch.testing.assert_close(probe.linearized.gram, expected.gram)
    assert state_of(model) == before


def test_logits_leave_their_inputs_alone() -> None:
    model, inputs, targets = build("inplace_first")
    given = inputs.clone()
    Probe(model, inputs, targets).logits(given)
    assert torch.equal(given, inputs)


def test_the_length_is_the_number_of_samples(probe: Probe) -> None:
    assert len(probe) == 9
    assert len(Probe(probe.model, probe.inputs[:0], probe.targets[:0])) == 0


def test_rows_of_a_probe_have_its_options_and_share_its_memory() -> None:
    model, inputs, targets = build("mlp")
    options = {"input_std": 2.0, "input_mean": 1.0, "valid_range": (-9, 9), "chunk_size": 7}
    options |= {"loss_fn": nn.MSELoss(), "module": nn.Linear(1, 1)}
    part = Probe(model, inputs, targets, **options).rows(slice(1, 4))
    assert torch.equal(part.inputs, inputs[1:4])
    assert torch.equal(part.targets, targets[1:4])
    assert part.inputs.data_ptr() == inputs[1:].data_ptr()
    assert part.model is model
    assert {name: getattr(part, name) for name in options} == options


def test_rows_of_a_probe_have_their_own_linearization(probe: Probe) -> None:
    whole, part = probe.linearized, probe.rows(slice(2, 5)).linearized
    torch.testing.assert_close(part.gram, whole.gram[2:5])


@pytest.mark.parametrize(
    ("inputs", "targets", "error", "sentence"),
    [
        ([1.0], torch.tensor([0]), TypeError, "`inputs` to be a tensor.*list"),
        (torch.ones(2, 3), [0, 1], TypeError, "`targets` to be a tensor.*list"),
        (torch.ones(2, 3), torch.tensor([0]), ValueError, "`targets`"),
        (torch.ones(2, 3), torch.tensor([0.0, 1.0]), ValueError, "`targets`.*integer"),
        (torch.tensor(1.0), torch.tensor([0]), ValueError, "`inputs`"),
    ],
    ids=["inputs", "targets", "too few", "float", "scalar"],
)
def test_only_labelled_batches_are_accepted(inputs: Any, targets: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        Probe(nn.Identity(), inputs, targets)


# --- models that only answer ----------------------------------------------------------------------------------------


def of_arrays(x: np.ndarray) -> np.ndarray:
    """A model that a framework other than torch has trained."""
    assert isinstance(x, np.ndarray)
    scores = np.tanh(x @ WEIGHTS[0]) @ WEIGHTS[1]
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


WEIGHTS = random(1, 6, 8).numpy(), random(2, 8, 4).numpy()
ROWS = random(3, 20, 6).numpy()
CLASSES = of_arrays(ROWS).argmax(axis=1)


def as_network(x: Tensor) -> Tensor:
    return (x @ torch.tensor(WEIGHTS[0])).tanh() @ torch.tensor(WEIGHTS[1])


def measured(metric: Any, *probes: Probe) -> dict[str, Tensor]:
    for probe in probes:
        metric.update(probe)
    return metric.compute()


@pytest.mark.parametrize(
    "make", [FisherSpectralNorm, lambda: LinearizedAccuracy([0.1, 0.5], norm="l2")], ids=["fisher", "accuracy"]
)
def test_queries_give_a_function_of_arrays_the_values_of_its_network(make: Callable[[], Any]) -> None:
    by_queries = measured(make(), Probe(of_arrays, ROWS, CLASSES, queries=200))
    expected = measured(make(), Probe(as_network, torch.tensor(ROWS), torch.tensor(CLASSES)))
    assert by_queries.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(by_queries[key].double(), value.double(), rtol=1e-4, atol=1e-6)


def test_queries_do_not_depend_on_batches() -> None:
    whole = measured(FisherSpectralNorm(), Probe(of_arrays, ROWS, CLASSES, queries=4))
    parts = [Probe(of_arrays, ROWS[rows], CLASSES[rows], queries=4) for rows in (slice(0, 3), slice(3, 20))]
    for other in (parts, [Probe(of_arrays, ROWS, CLASSES, queries=4).rows(slice(0, 20))]):
        for key, value in measured(FisherSpectralNorm(), *other).items():
            torch.testing.assert_close(value, whole[key])


def test_queries_are_rid_of_their_bias_in_the_mean() -> None:
    """The mean of largest eigenvalues of noisy matrices is too large."""
    model = random_linear(0, num_classes=5, num_features=30)
    model.weight.requires_grad_(False).div_(20)  # unsure, so that several eigenvalues matter
    inputs, targets = random(1, 300, 30), torch.arange(300) % 5
    exact = measured(FisherSpectralNorm(), Probe(model, inputs, targets))
    probe = Probe(model, inputs, targets, queries=10)
    values = measured(FisherSpectralNorm(), probe)
    plain = fim_spectral_norm(probe.linearized.logits, probe.linearized.gram).mean()
    error, plain_error = (float(mean / exact["fim_spectral_norm"]) - 1 for mean in (values["fim_spectral_norm"], plain))
    assert plain_error > 0.2
    assert abs(error) < 0.55 * plain_error  # eigenvalues are close here, so a part of it stays
    calibrated = values["fim_spectral_norm_calibrated"] / exact["fim_spectral_norm_calibrated"]
    assert abs(float(calibrated) - 1) < 0.55 * plain_error


def test_numbers_of_queries_are_not_mixed() -> None:
    metric = FisherSpectralNorm()
    metric.update(Probe(of_arrays, ROWS, CLASSES, queries=4))
    with pytest.raises(ValueError, match="as many queries for all samples"):
        metric.update(Probe(of_arrays, ROWS, CLASSES, queries=3))


@pytest.mark.parametrize("options", [{"likelihood": "bernoulli"}, {"linearization": "krylov"}], ids=str)
def test_queries_are_for_classes_and_take_all_of_them(options: dict[str, Any]) -> None:
    targets = np.eye(4)[CLASSES] if "likelihood" in options else CLASSES
    with pytest.raises(ValueError, match=r"gradients for .*only queried"):
        Probe(of_arrays, ROWS, targets, queries=4, **options)
    with pytest.raises(ValueError, match=r"gradients for margins of a few classes.*only queried"):
        LinearizedAccuracy(norm="l2", num_targets=2).update(Probe(of_arrays, ROWS, CLASSES, queries=4))


def test_many_classes_need_no_more_queries_than_few() -> None:
    model = random_linear(0, num_classes=40, num_features=20)
    model.weight.requires_grad_(False)
    inputs, targets = random(1, 12, 20), torch.arange(12)
    probe = Probe(lambda x: model(x).softmax(dim=1), inputs, targets, queries=20)
    for metric in (FisherSpectralNorm, lambda: LinearizedAccuracy([0.1, 0.5], norm="l2")):
        by_queries, exact = (
            measured(metric(), probe),
            measured(metric(), Probe(model, inputs, targets, linearization="exact")),
        )
        assert by_queries.keys() == exact.keys()
        for key, value in exact.items():
            torch.testing.assert_close(by_queries[key], value, rtol=1e-4, atol=1e-6)


def test_logits_of_a_queried_model_are_logarithms_of_its_probabilities() -> None:
    probe = Probe(of_arrays, ROWS, CLASSES, queries=4)
    torch.testing.assert_close(probe.logits(probe.inputs), as_network(torch.tensor(ROWS)).log_softmax(dim=1))


@pytest.mark.parametrize(
    "metric",
    [
        HessianTrace(),
        WeightCurvatureIndex(),
        AdversarialAccuracy([0.1]),
        FisherRaoMargin(),
        LinearizedAccuracy(),
        LinearizedAccuracy(order=2),
        LinearizedAccuracy(norm="l2", order=2),
    ],
    ids=["hessian", "wci", "attack", "paths", "linf", "order 2", "order 2 in L2"],
)
def test_what_needs_gradients_refuses_queries_with_the_remedy(metric: Any) -> None:
    with pytest.raises(ValueError, match=r"LinearizedAccuracy\(norm=.l2.\)`"):
        metric.update(Probe(of_arrays, ROWS, CLASSES, queries=4))


def test_queries_meet_the_extras_of_their_samples_in_the_type_of_the_inputs() -> None:
    def shifted(x: np.ndarray, shift: np.ndarray) -> np.ndarray:
        assert isinstance(shift, np.ndarray)
        return of_arrays(x + shift)

    shift = random(4, 20, 6).numpy()
    probe = Probe(shifted, ROWS - shift, CLASSES, extras={"shift": shift}, queries=6)
    expected = Probe(of_arrays, ROWS, CLASSES, queries=6)
    found = [fim_spectral_norm(p.linearized.logits, p.linearized.gram) for p in (probe, expected)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)
    part = probe.rows(slice(5, 9)).linearized
    torch.testing.assert_close(part.gram, probe.linearized.gram[5:9], rtol=1e-4, atol=1e-6)


def test_a_network_without_gradients_is_pointed_to_queries() -> None:
    model, inputs, targets = build("mlp")
    with pytest.raises(ValueError, match=r"`Probe\(predict, inputs, targets, queries=200\)`"):
        _ = Probe(lambda x: model(x.detach()), inputs, targets).linearized
    assert Probe(lambda x: model(x.detach()), inputs, targets, module=model, queries=12).linearized.gram.any()
