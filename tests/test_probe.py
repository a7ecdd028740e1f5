import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_robust import Probe
from lightning_robust.functional import linearize
from tests.helpers.networks import build
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
