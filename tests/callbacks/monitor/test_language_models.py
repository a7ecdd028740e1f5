"""The monitor on language models: one option, batches as they are, no false alarm, and the words that are predicted."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_robust import (
    AdversarialAccuracy,
    FisherRaoMargin,
    FisherSpectralNorm,
    LinearizedAccuracy,
    Probe,
    RobustnessMonitor,
)
from lightning_robust.callbacks.monitor import announced_cost
from lightning_robust.callbacks.monitor.announced_cost import on_cost
from lightning_robust.callbacks.monitor.token_targets import words_to_predict
from tests.helpers.language import LanguageModel, texts
from tests.helpers.training import robustness_warnings, trainer

V, T, N = 40, 8, 20
KEYS = ("fim_spectral_norm", "fim_spectral_norm_calibrated", "fim_trace", "temperature", "hessian_trace", "wci")


class Causal(LightningModule):
    """Takes ids, or a dictionary of ids, mask and labels, whose loss moves the labels itself if they are the ids."""

    def __init__(self, num_words: int = V, *, last: nn.Module | None = None) -> None:
        super().__init__()
        self.network = LanguageModel(num_words, width=16, length=16)
        self.last = last or nn.Identity()

    def get_input_embeddings(self) -> nn.Module:
        return self.network.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.last(self.network(input_ids))}

    def _loss(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            logits = self(batch["input_ids"], batch["attention_mask"])["logits"]
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        return F.cross_entropy(self(batch[0])["logits"].flatten(0, 1), batch[1].flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))
        self.log("val_acc", 0.97)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def pairs(count: int = N) -> list[Any]:
    ids, words = texts(count, T, V, seed=0)
    words[:3, 5:] = -100
    return list(zip(ids, words, strict=True))


def dictionaries(*, padding: int = -100) -> list[dict[str, Tensor]]:
    """Labels are the ids; some texts are padded."""
    rows = []
    for number, (text, _) in enumerate(pairs()):
        mask = (torch.arange(T) < T - number % 4).long()
        ids = text * mask
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, padding)})
    return rows


def run(
    module: LightningModule, rows: list[Any], root: Path, *, epochs: int = 1, **options: Any
) -> tuple[dict[str, float], list[str]]:
    fitting = trainer(RobustnessMonitor(**{"likelihood": "token", **options}), root=root, max_epochs=epochs)
    with robustness_warnings() as sentences:
        fitting.fit(module, DataLoader(rows, 8), DataLoader(rows, 8))
    return {key.removeprefix("robust/"): float(value) for key, value in fitting.callback_metrics.items()}, sentences


@pytest.mark.parametrize(
    "rows", [pairs(), dictionaries(), dictionaries(padding=0)], ids=["pairs", "HF", "padded labels"]
)
def test_one_option_measures_the_default_metrics_but_margins_without_a_false_alarm(rows: Any, tmp_path: Path) -> None:
    values, sentences = run(Causal(), rows, tmp_path, epochs=2)
    assert sentences == []
    for key in KEYS:
        assert values[key] > 0
    assert values["fim_spectral_norm_unconverged"] == 0
    assert "saturated" not in values
    assert not any("linearized" in key for key in values)
    assert values["num_samples"] == N
    assert 0.25 < values["temperature"] < 2.5  # of words that are predicted, not of those that are read


def test_values_are_those_of_a_probe_with_words_moved_by_hand(tmp_path: Path) -> None:
    module, rows = Causal(), dictionaries(padding=0)
    monitored = trainer(RobustnessMonitor("fisher_spectral_norm", likelihood="token"), root=tmp_path)
    monitored.validate(module, DataLoader(rows, 8), verbose=False)
    ids, mask = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask"))
    words = torch.full_like(ids, -100)
    words[:, :-1] = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    unit = float(module.network.words.weight.detach().square().mean()) ** -0.5
    metric, x = FisherSpectralNorm(), module.network.words(ids).detach()
    # padding is not perturbed: its embeddings stay as they are
    network = lambda x, kept: module.network.from_embeddings(torch.where(kept[..., None], x, x.detach()))  # noqa: E731
    metric.update(
        Probe(network, x, words, extras={"kept": mask > 0}, likelihood="token", module=module, input_std=unit)
    )
    for key, value in metric.compute().items():
        assert float(monitored.callback_metrics[f"robust/{key}"]) == pytest.approx(float(value), rel=2e-3, abs=1e-9), (
            key
        )


def test_labels_are_moved_only_where_they_are_the_ids() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [0, 8, 9, 4]])
    mask = (ids > 0).long()
    expected = torch.tensor([[6, 7, -100, -100], [-100, 9, 4, -100]])
    for padding in (-100, 0):
        assert torch.equal(words_to_predict(ids, ids.masked_fill(ids == 0, padding), mask), expected)
    prompt = ids.masked_fill(torch.arange(4) < 2, -100)  # only answers count
    assert torch.equal(words_to_predict(ids, prompt), torch.tensor([[-100, 7, 0, -100], [-100, 9, 4, -100]]))
    moved = torch.tensor([[6, 7, -100, -100], [8, 9, 4, -100]])
    assert torch.equal(words_to_predict(ids, moved), moved)
    masked = torch.tensor([[-100, 6, -100, -100], [-100, -100, 9, -100]])  # words that the ids hide
    assert torch.equal(words_to_predict(torch.full_like(ids, 3), masked), masked)
    for other in (torch.tensor([1, 0]), torch.rand(2, 4), torch.full((2, 4), -100)):
        assert torch.equal(words_to_predict(ids, other), other)


def test_texts_of_other_lengths_pass_in_batches_of_their_own_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    rows = pairs(16)
    rows = [(ids[: T - 2], words[: T - 2]) if number >= 8 else (ids, words) for number, (ids, words) in enumerate(rows)]
    rows[1] = (rows[1][0], torch.full((T,), -100))
    values, sentences = run(Causal(), rows, tmp_path)
    assert sentences == []
    assert values["num_samples"] == 16
    monitor = RobustnessMonitor("fisher_spectral_norm", likelihood="token")
    trainer(monitor, root=tmp_path).validate(Causal(), DataLoader(rows, 8), verbose=False)
    assert len(monitor.per_sample["robust/fim_spectral_norm"]) == 15
    assert (monitor.per_sample["robust/fim_spectral_norm"] > 0).all()


def test_attacks_margins_and_paths_are_refused_in_one_sentence(tmp_path: Path) -> None:
    metrics = ["fisher_spectral_norm", LinearizedAccuracy(), AdversarialAccuracy(), FisherRaoMargin()]
    values, sentences = run(Causal(), pairs(), tmp_path, metrics=metrics)
    assert values["fim_spectral_norm"] > 0
    (sentence,) = sentences
    assert "LinearizedAccuracy: ValueError: Expected another likelihood than 'token' for margins" in sentence
    assert "AdversarialAccuracy and FisherRaoMargin: ValueError: Expected likelihood 'categorical'" in sentence
    with pytest.raises(MisconfigurationException, match="Expected another likelihood than 'token'"):
        RobustnessMonitor(likelihood="token", linearization="exact")


def test_probabilities_are_told_and_log_probabilities_are_logits(tmp_path: Path) -> None:
    _, sentences = run(Causal(last=nn.Softmax(dim=2)), pairs(), tmp_path, metrics="fisher_spectral_norm")
    assert "returns probabilities" in sentences[0]
    assert "'token'" in sentences[0]
    _, sentences = run(Causal(last=nn.LogSoftmax(dim=2)), pairs(), tmp_path, metrics="fisher_spectral_norm")
    assert sentences == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda ids, words: (ids, words[0].clamp_min(0)),
            r"for each position.*shape \(20, T\)|shape \(8, T\)|\(\d+, T\)",
        ),
        (lambda ids, words: (ids, words + V), "`targets` to lie between 0 and 39"),
        (lambda ids, words: (ids, words[:5]), r"logits \(N, 5, V\) for targets \(N, 5\)"),
    ],
)
def test_targets_that_are_no_words_are_told(change: Any, told: str, tmp_path: Path) -> None:
    module = Causal()
    module.training_step = lambda batch, batch_idx: module(batch[0])["logits"].mean()  # type: ignore[method-assign]
    module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    rows = [change(ids, words) for ids, words in pairs()]
    _, sentences = run(module, rows, tmp_path, metrics="fisher_spectral_norm")
    assert re.search(told, sentences[0])


def test_a_likelihood_that_is_missing_is_named(tmp_path: Path) -> None:
    module = Causal()
    _, sentences = run(module, pairs(), tmp_path, likelihood="categorical")
    assert '`RobustnessMonitor(likelihood="token")`' in sentences[0]


def test_a_long_measurement_is_told_with_the_algebra_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, words = texts(8, T, V, seed=0)
    model = LanguageModel(V, width=16, length=T).eval()
    probe = Probe(model.from_embeddings, model.words(ids).detach(), words, likelihood="token", module=model)
    outputs = probe.outputs(probe.inputs)
    assert on_cost([FisherSpectralNorm()], probe, outputs, num_samples=256, seconds=0.01) == []
    (found,) = on_cost([FisherSpectralNorm()], probe, outputs, num_samples=256, seconds=0.32)  # 0.01 s a pass
    assert "about 120 s: 256 samples, with about 48 forward passes for each." in found
    monkeypatch.setattr(announced_cost, "_MANY_LOGITS", 0)
    monkeypatch.setattr(FisherSpectralNorm, "seconds_per_sample", lambda self, outputs: 1.0)
    (found,) = on_cost([FisherSpectralNorm()], probe, outputs, num_samples=256, seconds=0.32)
    assert "about 380 s: 256 samples, with about 48 forward passes for each, and the algebra of its logits" in found
