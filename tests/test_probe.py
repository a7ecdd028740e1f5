import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust import Probe
from lightning_robust.functional import linearize
from lightning_robust.probe import find_flaws, merge
from tests.helpers.networks import NETWORKS, build, random
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
    first = probe.linearization
    assert probe.linearization is first
    assert recorder.record.batch_sizes == [len(inputs)]


def test_the_linearization_is_in_the_units_and_chunks_of_the_probe() -> None:
    model, inputs, targets = build("cnn_batchnorm")
    recorder = Recorder(model)
    actual = Probe(recorder, inputs, targets, input_std=[0.5, 1.0, 2.0], chunk_size=3).linearization
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


def test_logits_leave_their_inputs_alone() -> None:
    model, inputs, targets = build("inplace_first")
    given = inputs.clone()
    Probe(model, inputs, targets).logits(given)
    assert torch.equal(given, inputs)


def test_the_length_is_the_number_of_samples(probe: Probe) -> None:
    assert len(probe) == 9
    assert len(Probe(probe.model, probe.inputs[:0], probe.targets[:0])) == 0


def test_selected_samples_do_not_follow_later_changes_of_the_batch() -> None:
    model, inputs, targets = build("mlp")
    probe = Probe(model, inputs, targets, input_std=2.0, input_mean=1.0, chunk_size=7)
    part, expected = probe.select(slice(1, 4)), (inputs[1:4].clone(), targets[1:4].clone())
    inputs.zero_()
    targets.zero_()
    assert torch.equal(part.inputs, expected[0])
    assert torch.equal(part.targets, expected[1])
    assert (part.model, part.input_std, part.input_mean, part.chunk_size) == (model, 2.0, 1.0, 7)


def test_selected_samples_have_their_own_linearization(probe: Probe) -> None:
    whole, part = probe.linearization, probe.select(slice(2, 5)).linearization
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
def test_what_is_not_a_labelled_batch_is_refused(
    inputs: Any, targets: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        Probe(nn.Identity(), inputs, targets)


# --- merge ----------------------------------------------------------------------------------------------------------


def pieces(sizes: list[int], model: Callable[[Tensor], Tensor], **options: Any) -> list[Probe]:
    inputs, targets = random(0, sum(sizes), 12, dtype=torch.float32), torch.arange(sum(sizes)) % 6
    return [Probe(model, x, y, **options) for x, y in zip(inputs.split(sizes), targets.split(sizes), strict=True)]


@pytest.mark.parametrize(
    ("sizes", "max_samples", "expected"),
    [
        ([1, 1, 1, 1], 2, [2, 2]),
        ([1, 1, 1, 1, 1], 2, [2, 2, 1]),
        ([3, 2, 4], 5, [5, 4]),
        ([3, 2, 4], 100, [9]),
        ([3, 7, 2], 5, [3, 7, 2]),  # a probe is never cut
        ([], 5, []),
    ],
)
def test_probes_are_joined_in_order_as_far_as_there_is_room(
    sizes: list[int], max_samples: int, expected: list[int]
) -> None:
    parts = pieces(sizes, nn.Linear(12, 6), input_std=2.0, chunk_size=9) if sizes else []
    joined = list(merge(parts, max_samples=max_samples))
    assert [len(probe) for probe in joined] == expected
    assert all((probe.input_std, probe.chunk_size) == (2.0, 9) for probe in joined)
    for field in ("inputs", "targets"):
        before, after = (
            torch.cat([torch.empty(0), *(getattr(p, field).flatten() for p in ps)]) for ps in (parts, joined)
        )
        assert torch.equal(before, after)


def test_joined_probes_have_the_values_of_their_parts() -> None:
    model = build("mlp")[0]
    parts = pieces([2, 3], model)
    (joined,) = merge(parts, max_samples=5)
    torch.testing.assert_close(joined.linearization.gram, torch.cat([part.linearization.gram for part in parts]))


def test_bound_methods_of_one_network_are_one_network() -> None:
    model = build("mlp")[0]
    parts = [*pieces([2], model.forward), *pieces([2], model.forward)]
    assert [len(probe) for probe in merge(parts, max_samples=9)] == [4]


@pytest.mark.parametrize(
    "other",
    [
        {"model": nn.Linear(12, 6)},
        {"inputs": torch.ones(2, 13)},
        {"inputs": torch.ones(2, 12, dtype=torch.float64)},
        {"input_std": 1.0},
        {"input_std": torch.tensor([2.0, 3.0])},
        {"input_std": None},
        {"input_mean": 0.5},
        {"chunk_size": 4},
    ],
    ids=lambda other: next(iter(other)),
)
def test_probes_that_differ_are_not_joined(other: dict[str, Any]) -> None:
    options = {
        "model": nn.Linear(12, 6),
        "inputs": torch.ones(2, 12),
        "targets": torch.tensor([0, 1]),
        "input_std": 2.0,
    }
    parts = [Probe(**options), Probe(**(options | other)), Probe(**options)]
    assert [len(probe) for probe in merge(parts, max_samples=9)] == [2, 2, 2]


@pytest.mark.parametrize("twins", [(2, 2.0), ([2.0], torch.tensor([2.0])), ((1.0, 2.0), [1.0, 2.0])], ids=str)
def test_constants_are_compared_by_value(twins: tuple[Any, Any]) -> None:
    model, (inputs, targets) = nn.Linear(12, 6), (torch.ones(2, 12), torch.tensor([0, 1]))
    parts = [Probe(model, inputs, targets, input_std=std) for std in twins]
    assert [len(probe) for probe in merge(parts, max_samples=9)] == [4]


# --- flaws ----------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(nn.functional.dropout(x, 0.2, training=True))


def batch_normalised(x: Tensor) -> Tensor:
    return (x - x.mean(dim=0)) / (x.std(dim=0) + 1e-5)


def pairwise(x: Tensor) -> Tensor:
    """Similarities within the batch, as contrastive losses make them."""
    return (x @ x.roll(1, 0).T)[:, :3] if len(x) > 2 else x[:, :3]


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda x: x.softmax(dim=1), "returns probabilities"),
        (lambda x: torch.stack([x[:, 0].sigmoid(), 1 - x[:, 0].sigmoid()], dim=1), "returns probabilities"),
        (Noisy(nn.Linear(12, 6)), "called twice"),
        (batch_normalised, "mixes the samples"),
        (pairwise, "mixes the samples"),
    ],
    ids=["softmax", "sigmoid", "dropout", "batch statistics", "similarities"],
)
def test_a_flaw_is_found(model: Callable[[Tensor], Tensor], sentence: str) -> None:
    (flaw,) = find_flaws(pieces([9], model)[0])
    assert sentence in flaw
    assert flaw.startswith("The model")


def test_several_flaws_are_all_found() -> None:
    flaws = find_flaws(pieces([9], lambda x: batch_normalised(x).softmax(dim=1))[0])
    assert ["probabilities" in flaws[0], "mixes" in flaws[1]] == [True, True]


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_mixing_is_found_whatever_the_first_sample_is(value: float) -> None:
    (probe,) = pieces([9], batch_normalised)
    probe.inputs[0] = value
    assert len(find_flaws(probe)) == 1


@pytest.mark.parametrize("num_samples", [1, 2, 9, 20])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_keeps_the_rules_has_no_flaws(name: str, num_samples: int) -> None:
    assert find_flaws(Probe(*build(name, num_samples=num_samples))) == []


@pytest.mark.parametrize(
    "model",
    [
        lambda x: x.log_softmax(dim=1),
        lambda x: x.relu(),
        lambda x: 0 * x,
        lambda x: 1e-6 * x,
        lambda x: 200 * x,
        lambda x: x.softmax(dim=1).cumsum(dim=1),
        lambda x: x - x.mean(dim=1, keepdim=True) + 1 / 12,
    ],
    ids=["log_softmax", "non-negative", "zero", "tiny", "large", "rows of other sums", "rows that sum to 1"],
)
def test_unusual_logits_are_no_flaw(model: Callable[[Tensor], Tensor]) -> None:
    assert find_flaws(pieces([9], model)[0]) == []


def test_looking_for_flaws_takes_a_few_passes_of_a_few_samples_and_changes_nothing() -> None:
    model, inputs, targets = build("cnn_batchnorm", num_samples=20)
    recorder, given = Recorder(model).train(), inputs.clone()
    before = state_of(recorder)
    with torch.inference_mode():
        find_flaws(Probe(recorder, given, targets))
    assert recorder.record.batch_sizes == [8, 8, 8, 8]
    assert state_of(recorder) == before
    assert torch.equal(given, inputs)


def test_integer_inputs_are_refused_with_a_way_out() -> None:
    with pytest.raises(TypeError, match=r"embeddings.*`probe_fn`"):
        find_flaws(Probe(nn.Identity(), torch.ones(3, 4, dtype=torch.long), torch.tensor([0, 1, 2])))


def test_a_forward_pass_that_stops_gradients_is_found() -> None:
    """Without gradients every margin is infinite: the network would look perfectly robust."""
    model, inputs, targets = build("mlp")

    def frozen(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(x)

    with pytest.raises(ValueError, match="every number would claim perfect robustness"):
        find_flaws(Probe(frozen, inputs, targets))
    constant = torch.randn(6, generator=torch.Generator().manual_seed(0))
    assert find_flaws(Probe(lambda x: constant.expand(len(x), 6), inputs, targets)) == []
