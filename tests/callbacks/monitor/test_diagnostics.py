"""What the monitor finds on the first samples of a run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust import Probe, RobustnessMonitor
from lightning_robust.callbacks.monitor.diagnostics import on_probe
from tests.helpers.networks import NETWORKS, build, random
from tests.helpers.recording import Record, Recorder, state_of
from tests.helpers.training import Classifier, loader, robustness_warnings, trainer


def find_flaws(probe: Probe) -> list[str]:
    return [sentence for sentence in on_probe(probe) if sentence.startswith("The model")]


def probe_of(model: Callable[[Tensor], Tensor]) -> Probe:
    return Probe(model, random(0, 9, 12, dtype=torch.float32), torch.arange(9) % 6)


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


def beside(scale: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Two functions that close over one number per sample: one takes as many as it needs, one insists on all."""
    return lambda x: x[:, :3] * (1 + scale[: len(x), None]), lambda x: x[:, :3] * (1 + scale[:, None])


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda x: x.softmax(dim=1), "returns probabilities"),
        (lambda x: torch.stack([x[:, 0].sigmoid(), 1 - x[:, 0].sigmoid()], dim=1), "returns probabilities"),
        (Noisy(nn.Linear(12, 6)), "called twice"),
        (batch_normalised, "mixes the samples"),
        (pairwise, "mixes the samples"),
        (lambda x: x @ x.T, "mixes the samples"),
        (beside(torch.arange(8.0))[0], "place in the batch"),
        (beside(torch.tensor([1.0, 2, 2, 2, 2, 2, 2, 1]))[0], "place in the batch"),
    ],
    ids=["softmax", "sigmoid", "dropout", "batch statistics", "similarities", "outer product", "closure", "few differ"],
)
def test_a_flaw_is_found(model: Callable[[Tensor], Tensor], sentence: str) -> None:
    (flaw,) = find_flaws(probe_of(model))
    assert sentence in flaw
    assert flaw.startswith("The model")


def test_a_function_that_only_takes_the_whole_batch_is_refused_with_the_remedy() -> None:
    scale = torch.arange(8.0)
    with pytest.raises(ValueError, match=r"close over .*extras=\{'mask': mask\}.*On 7 of 8 samples it raised"):
        find_flaws(probe_of(beside(scale)[1]))
    inputs = random(0, 20, 12)
    extras = {"scale": torch.arange(20.0)}
    probe = Probe(lambda x, scale: x[:, :3] * (1 + scale[:, None]), inputs, torch.zeros(20).long(), extras=extras)
    assert find_flaws(probe) == []


def test_several_flaws_are_all_found() -> None:
    flaws = find_flaws(probe_of(lambda x: batch_normalised(x).softmax(dim=1)))
    assert ["probabilities" in flaws[0], "mixes" in flaws[1]] == [True, True]


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_mixing_is_found_whatever_the_first_sample_is(value: float) -> None:
    probe = probe_of(batch_normalised)
    probe.inputs[0] = value
    assert len(find_flaws(probe)) == 1


@pytest.mark.parametrize("num_samples", [1, 2, 9, 20])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_valid_network_has_no_flaws(name: str, num_samples: int) -> None:
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
    assert find_flaws(probe_of(model)) == []


def test_looking_for_flaws_takes_a_few_passes_of_a_few_samples_and_changes_nothing() -> None:
    model, inputs, targets = build("cnn_batchnorm", num_samples=20)
    recorder, given = Recorder(model).train(), inputs.clone()
    before = state_of(recorder)
    with torch.inference_mode():
        find_flaws(Probe(recorder, given, targets))
    assert recorder.record.batch_sizes == [8, 8, 7]
    assert state_of(recorder) == before
    assert torch.equal(given, inputs)


def test_integer_inputs_that_the_network_does_not_take_are_refused_with_a_way_out() -> None:
    with pytest.raises(TypeError, match=r"embeddings.*`probe_fn`"):
        find_flaws(Probe(nn.Linear(4, 3), torch.ones(3, 4, dtype=torch.long), torch.tensor([0, 1, 2])))


@pytest.mark.parametrize("change", [lambda ids: ids, lambda ids: ids.float()], ids=["integers", "floats"])
def test_token_ids_are_examined_although_they_have_no_derivative(change: Callable[[Tensor], Tensor]) -> None:
    embedding, generator = nn.Embedding(9, 4), torch.Generator().manual_seed(0)
    ids, targets = change(torch.randint(9, (8, 5), generator=generator)), torch.zeros(8, dtype=torch.long)

    def network(ids: Tensor) -> Tensor:
        return embedding(ids.long()).mean(dim=1)

    assert on_probe(Probe(network, ids, targets)) == []
    (flaw,) = find_flaws(Probe(lambda ids: batch_normalised(network(ids)), ids, targets))
    assert "mixes the samples" in flaw


# --- scales that one class or one sample sets -------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [-1e4, -1e9, -torch.inf], ids=str)
@pytest.mark.parametrize(
    ("model", "sentence"),
    [(Noisy(nn.Linear(12, 6)), "called twice"), (batch_normalised, "mixes the samples")],
    ids=["dropout", "batch statistics"],
)
def test_masked_classes_hide_no_flaw(model: Callable[[Tensor], Tensor], sentence: str, fill: float) -> None:
    (flaw,) = find_flaws(probe_of(lambda x: nn.functional.pad(model(x), (0, 2), value=fill)))
    assert sentence in flaw


@pytest.mark.parametrize("fill", [-1e4, -1e9, -torch.inf], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_valid_network_with_masked_classes_has_no_flaws(name: str, fill: float) -> None:
    model, inputs, targets = build(name)
    assert find_flaws(Probe(lambda x: nn.functional.pad(model.eval()(x), (0, 2), value=fill), inputs, targets)) == []


def test_a_diverged_sample_hides_no_flaw() -> None:
    probe = probe_of(lambda x: batch_normalised(x) * (1 + 1e6 * (torch.arange(len(x)) == 4))[:, None])
    assert len(find_flaws(probe)) == 1


# --- tensors with a row per sample that a model keeps -----------------------------------------------------------------


class FixedState(nn.Module):
    """Keeps a state for batches of one size, as some recurrent networks do."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer, self.state = nn.Linear(12, 3), torch.zeros(size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.state


class KeepsRows(FixedState):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.arange(100.0)[: len(x), None]


def test_a_module_is_not_taken_for_a_function_that_closes_over_something() -> None:
    (flaw,) = find_flaws(probe_of(KeepsRows(8)))
    assert "Does the module keep a tensor with a row per sample" in flaw
    with pytest.raises(ValueError, match=r"takes only some numbers of samples.*state.*On 7 of 8 samples it raised"):
        find_flaws(probe_of(FixedState(8)))


class Masked(Classifier):
    """A mean over those positions that a mask leaves; its own methods may be measured, too."""

    def __init__(self, *, lenient: bool) -> None:
        super().__init__(nn.Linear(4, 3))
        self.lenient, self.record = lenient, Record()
        with torch.no_grad():
            for number, parameter in enumerate(self.network.parameters()):
                parameter.copy_(3 * random(number, *parameter.shape))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.record.batch_sizes.append(len(x))
        mask = mask[: len(x)] if self.lenient else mask
        return self.network((torch.tanh(x) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    def full(self, x: Tensor) -> Tensor:
        return self(x, torch.ones(len(x), x.shape[1]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.network(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Leave all passes to the measurement."""


LONGEST_FIRST = (torch.arange(6) < 6 - (torch.arange(64)[:, None] % 32 - 12).clamp(0) // 5).float()
BINDINGS: dict[str, Callable[[Any, Any], Probe]] = {
    "lambda": lambda module, batch: Probe(lambda x: module(x, batch[1]), batch[0], batch[2]),
    "partial": lambda module, batch: Probe(partial(module, mask=batch[1]), batch[0], batch[2]),
}


def measured(
    root: Path, module: Masked, mask: Tensor, *, size: int, fit: bool = False, **options: Any
) -> tuple[dict[str, Tensor], list[str]]:
    rows = list(zip(random(5, len(mask), 6, 4, dtype=torch.float32), mask, torch.arange(len(mask)) % 3, strict=True))
    monitor = RobustnessMonitor(["fisher_spectral_norm", "hessian_trace"], **options)
    run = trainer(monitor, root=root, max_epochs=2)
    with robustness_warnings() as messages:
        if fit:
            run.fit(module, loader(rows, size), loader(rows, size))
        else:
            run.validate(module, loader(rows, size), verbose=False)
    return {key: value for key, value in run.callback_metrics.items() if key.startswith("robust/")}, messages


@pytest.mark.parametrize("fit", [False, True], ids=["validate", "fit"])
@pytest.mark.parametrize("lenient", [True, False], ids=["lenient", "strict"])
@pytest.mark.parametrize(
    ("size", "max_samples"), [(32, 32), (32, 256), (8, 8)], ids=["some", "all", "one of each batch"]
)
@pytest.mark.parametrize("binding", BINDINGS)
def test_a_function_bound_to_the_batch_is_never_measured(
    tmp_path: Path, binding: str, size: int, max_samples: int, lenient: bool, fit: bool
) -> None:
    mask = LONGEST_FIRST if size == 32 else LONGEST_FIRST[torch.arange(64) * 7 % 64]
    options = {"size": size, "max_samples": max_samples, "probe_fn": BINDINGS[binding]}
    values, (message, *again) = measured(tmp_path, Masked(lenient=lenient), mask, fit=fit, **options)
    assert ["all 2 measurements were skipped" in sentence for sentence in again] == ([True] if fit else [])
    assert not values.keys() - {"robust/overhead", "robust/num_samples", "robust/seconds"}
    assert "place in the batch" in message
    assert "extras={'mask': mask}" in message


def test_functions_are_measured_as_extras_are_and_checked_in_the_first_measurement_alone(tmp_path: Path) -> None:
    mask, found = torch.ones(64, 6), []
    calls = {
        "method": lambda module, batch: Probe(module.full, batch[0], batch[2]),
        "lambda": lambda module, batch: Probe(lambda x: module(x, mask[: len(x)]), batch[0], batch[2]),
        "extras": lambda module, batch: Probe(module, batch[0], batch[2], extras={"mask": batch[1]}),
    }
    passes = {}
    for name, probe_fn in calls.items():
        module = Masked(lenient=True)
        values, messages = measured(tmp_path, module, mask, size=32, max_samples=32, probe_fn=probe_fn, fit=True)
        assert messages == []
        found.append({key: values[key] for key in ("robust/fim_spectral_norm", "robust/hessian_trace")})
        passes[name] = len(module.record.batch_sizes)
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])
    assert passes["method"] == passes["extras"] + 2 * 3  # two batches: all samples, the selected ones, one less


def test_a_tensor_of_the_batch_that_all_samples_share_is_explained_in_inference_mode(tmp_path: Path) -> None:
    probe_fn = BINDINGS["partial"]
    _, (message,) = measured(tmp_path, Masked(lenient=False), LONGEST_FIRST[:4], size=1, probe_fn=probe_fn)
    assert "Inference tensors" in message
    assert "extras={'mask': mask}" in message


# --- units ------------------------------------------------------------------------------------------------------------


def sentences_on(*shape: int, **options: bool) -> list[str]:
    inputs = 3 * random(0, 8, *shape, dtype=torch.float32)
    return on_probe(
        Probe(nn.Sequential(nn.Flatten(), nn.Linear(inputs[0].numel(), 3)), inputs, torch.arange(8) % 3), **options
    )


@pytest.mark.parametrize("shape", [(3, 6, 6), (1, 4, 4), (28, 28), (2, 4, 4, 4)])
def test_units_of_images_outside_of_zero_to_one_are_reported(shape: tuple[int, ...]) -> None:
    (sentence,) = sentences_on(*shape)
    assert "in units of pixels between 0 and 1" in sentence
    assert sentences_on(*shape, units_matter=False) == []


@pytest.mark.parametrize("shape", [(12,), (784,), (10, 16), (5, 6), (3, 500)])
def test_tables_and_sequences_are_not_taken_for_images(shape: tuple[int, ...]) -> None:
    assert sentences_on(*shape) == []
