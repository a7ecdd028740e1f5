"""Metrics of words at the positions of sequences: batches, processes, the state, and curvature."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust import FisherSpectralNorm, HessianTrace, Probe, WeightCurvatureIndex
from lightning_robust.functional import fit_temperature
from tests.helpers import processes
from tests.helpers.language import LanguageModel, texts

N, T, V = 12, 6, 30


def model_of() -> LanguageModel:
    return LanguageModel(V, width=8, length=T, heads=2).eval()


def samples() -> tuple[Tensor, Tensor]:
    """Embeddings, and words as a sharper network would predict them."""
    ids, _ = texts(N, T, V, seed=3)
    probs = (model_of()(ids).detach() / 0.4).softmax(dim=2).flatten(0, 1)
    words = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(1)).view(N, T)
    words[0], words[1, 2:], words[5, :4] = -100, -100, -100
    return model_of().words(ids).detach(), words


def probe_of(rows: slice = slice(None), **options: Any) -> Probe:
    model, (x, words) = model_of(), samples()
    options = {"temperature": 1.2, **options}
    return Probe(model.from_embeddings, x[rows], words[rows], likelihood="token", module=model, **options)


def measured(*probes: Probe) -> dict[str, Tensor]:
    metric = FisherSpectralNorm()
    for probe in probes:
        metric.update(probe)
    return metric.compute()


def test_values_are_those_of_the_sequences_with_words_that_count() -> None:
    metric, probe = FisherSpectralNorm(), probe_of()
    metric.update(probe)
    values = metric.compute()
    information = probe.information
    torch.testing.assert_close(metric.per_sample["fim_spectral_norm"], information.value[1, 1:])
    torch.testing.assert_close(values["fim_trace"], information.trace[1:].double().mean())
    assert values["fim_spectral_norm_unconverged"] == 0
    assert "saturated" not in values
    model, (x, words) = model_of(), samples()
    expected = fit_temperature(model.from_embeddings(x).detach(), words, likelihood="token")
    torch.testing.assert_close(values["temperature"].float(), expected, rtol=1e-6, atol=0)
    near, there = (measured(probe_of(temperature=factor * float(expected))) for factor in (1.03, 1.0))
    key = "fim_spectral_norm_calibrated"
    torch.testing.assert_close(near[key], there[key], rtol=0.005, atol=0)


def test_the_state_is_61_numbers_for_any_number_of_words_and_positions() -> None:
    metric = FisherSpectralNorm()
    metric.update(probe_of())
    assert sum(rows.numel() for rows in metric.summaries) == 61 * N
    model = LanguageModel(2 * V, width=8, length=T, heads=2).eval()
    metric.update(Probe(model.from_embeddings, samples()[0][:4, :3], samples()[1][:4, :3], likelihood="token"))
    assert sum(rows.numel() for rows in metric.summaries) == 61 * (N + 4)


def test_batches_change_nothing_and_sequences_without_words_alone_give_nothing() -> None:
    values = measured(probe_of())
    in_parts = measured(*(probe_of(slice(*ends)) for ends in ((0, 1), (1, 4), (4, 12))))
    assert in_parts.keys() == values.keys()
    for key, value in values.items():
        torch.testing.assert_close(in_parts[key], value, rtol=1e-5, atol=1e-9)
    assert measured(probe_of(slice(0, 1))) == {}


def measured_by_process(rank: int, sizes: list[int]) -> dict[str, Tensor]:
    processes.join_group()
    start = sum(sizes[:rank])
    rows = slice(start, start + sizes[rank])
    return measured(*([probe_of(rows)] if sizes[rank] else []))


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_several_processes_give_the_values_of_one() -> None:
    expected = measured(probe_of())
    for result in processes.run(measured_by_process, 3, [7, 0, 5]):
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "loss", [None, nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(ignore_index=2)], ids=str
)
def test_curvature_is_that_of_cross_entropy_over_the_positions_that_count(loss: nn.CrossEntropyLoss | None) -> None:
    model, (x, words) = model_of(), samples()
    if loss is not None and loss.ignore_index == 2:
        words = words.masked_fill(words == -100, 2)
    metric, index = HessianTrace(estimator="gauss_newton"), WeightCurvatureIndex(estimator="gauss_newton")
    probe = Probe(model.from_embeddings, x, words, likelihood="token", module=model, loss_fn=loss)
    metric.update(probe)
    index.update(probe)

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model.from_embeddings(x).transpose(1, 2)

    expected = Probe(Dense(), x, words, loss_fn=loss or nn.CrossEntropyLoss())
    other = HessianTrace(estimator="gauss_newton")
    other.update(expected)
    key = "hessian_trace_gauss_newton"
    torch.testing.assert_close(metric.compute()[key], other.compute()[key], rtol=1e-5, atol=0)
    assert index.compute()["wci_gauss_newton"] > 0


def test_a_custom_loss_gets_what_the_model_returns() -> None:
    model, (x, words) = model_of(), samples()
    words = words.clamp_min(0)
    probe = Probe(
        model.from_embeddings,
        x,
        words,
        likelihood="token",
        module=model,
        loss_fn=lambda logits, words: F.cross_entropy(logits.transpose(1, 2), words, reduction="none").mean(dim=1),
    )
    metric = HessianTrace()
    metric.update(probe)
    plain = HessianTrace()
    plain.update(Probe(model.from_embeddings, x, words, likelihood="token", module=model))
    values, expected = metric.compute(), plain.compute()
    error = 4 * (values["hessian_trace_stderr_probes"] ** 2 + expected["hessian_trace_stderr_probes"] ** 2).sqrt()
    assert abs(values["hessian_trace"] - expected["hessian_trace"]) < error
