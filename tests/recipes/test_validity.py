"""Predictions of the monitor agree with what a strong attack finds."""

import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_robust import AdversarialAccuracy, LinearizedAccuracy, Probe
from recipes import validity
from recipes.common import zoo
from recipes.common.classifier import DigitsClassifier
from recipes.common.digits import DigitsDataModule
from recipes.common.statistics import interval
from tests.helpers.networks import build, random, random_linear
from tests.helpers.training import trainer

EPSILONS = (0.02, 0.05, 0.1)


def test_the_strong_attack_finds_at_least_what_pgd_20_finds() -> None:
    model, inputs, _ = build("cnn_batchnorm", num_samples=40)
    targets = model.eval()(inputs).argmax(dim=1)
    probe = Probe(model, inputs, targets)
    for epsilon in (0.02, 0.1):
        weak = AdversarialAccuracy([epsilon])
        weak.update(probe)
        (accuracy, *_) = weak.compute().values()
        assert 0 < validity.strong_accuracy(probe, epsilon, steps=20, restarts=1) <= float(accuracy) < 1
    assert validity.strong_accuracy(probe, 0.0) == 1
    assert validity.strong_accuracy(probe, 10.0) == 0


def test_the_strong_attack_is_exact_on_a_linear_network() -> None:
    model, inputs = random_linear(0, num_classes=4, num_features=6), random(1, 60, 6)
    probe = Probe(model, inputs, model(inputs).argmax(dim=1))
    predicted = LinearizedAccuracy([0.05, 0.3])
    predicted.update(probe)
    values = predicted.compute()
    for epsilon in (0.05, 0.3):
        expected = float(values[f"linearized_accuracy_linf_{epsilon:g}"])
        assert validity.strong_accuracy(probe, epsilon) == pytest.approx(expected)
        assert 0.1 < expected < 1


def rows(*pairs: tuple[float, float]) -> list[validity.Row]:
    """Return made-up measurements of classifiers with given predicted and attacked accuracies."""
    return [
        {
            "linearized_accuracy_linf_0.1": predicted,
            "linearized_order2_accuracy_linf_0.1": attacked,
            "adversarial_accuracy_linf_0.1": attacked + 0.01,
            "strong_accuracy_linf_0.1": attacked,
            "constant": 1.0,
            "reversed": -attacked,
        }
        for predicted, attacked in pairs
    ]


def test_differences_are_in_percentage_points() -> None:
    lines = validity.differences(rows((0.5, 0.4), (0.2, 0.24), (0.9, 0.9)), [0.1])
    first = next(line for line in lines if line.startswith("linearized, ε = 0.1"))
    assert "4.7 [" in first  # (10 + 4 + 0) / 3
    assert "+2.0 [" in first
    assert first.endswith(" 10.0")
    assert "+1.0 [+1.0, +1.0]" in next(line for line in lines if line.startswith("adversarial, all ε"))


def test_correlations_are_those_of_ranks_with_an_interval_the_strongest_first() -> None:
    spread = [(0.1 * i + 0.01 * (-1) ** i, 0.1 * i) for i in range(8)]
    lines = validity.correlations(rows(*spread), 0.1)
    order = [line.split()[0] for line in lines[1:]]
    assert set(order[:3]) == {"linearized_accuracy_linf_0.1", "linearized_order2_accuracy_linf_0.1", "reversed"}
    by_name = {line.split()[0]: line for line in lines[1:]}
    assert "-1.00 [-1.00, -1.00]" in by_name["reversed"]
    assert "strong_accuracy_linf_0.1" not in by_name


def test_a_95_percent_interval_covers_the_truth_that_often() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        sample = torch.randn(30, generator=generator)
        _, low, high = interval(lambda i, s=sample: s[i].mean(), 30, resamples=200)
        covered += low <= 0 <= high
    assert 0.89 <= covered / 200 <= 0.98


def test_the_checkpoints_of_a_folder_are_found(tmp_path: Path) -> None:
    model = DigitsClassifier(width=4)
    run = trainer(root=tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    run.fit(model, datamodule=DigitsDataModule())
    run.save_checkpoint(tmp_path / "deep" / "one.ckpt")
    found = dict(zoo.digits_checkpoints(str(tmp_path), num_samples=10))
    probe = found["one"]
    assert len(probe) == 10
    with torch.no_grad():
        torch.testing.assert_close(probe.logits(probe.inputs), model.eval().network(probe.inputs))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_predicted_accuracy_is_that_under_the_strong_attack_over_a_zoo_of_digits() -> None:
    measured = [validity.measure(probe, EPSILONS) for _, probe in zoo.digits_zoo(num_samples=200)]
    assert len(measured) >= 12
    gaps = torch.tensor(
        [
            [100 * (row[f"linearized_accuracy_linf_{e:g}"] - row[f"strong_accuracy_linf_{e:g}"]) for e in EPSILONS]
            for row in measured
        ]
    )
    assert gaps.abs().mean() <= 3
    assert abs(gaps.mean()) <= 2
    for epsilon in EPSILONS[1:]:  # at the smallest ε nearly all accuracies are 1
        lines = validity.correlations(measured, epsilon)
        (line,) = (line for line in lines if line.startswith(f"linearized_accuracy_linf_{epsilon:g} "))
        assert float(line.split()[1]) >= 0.95


def test_the_script_prints_tables_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def few(*, num_samples: int) -> list[tuple[str, Probe]]:
        probes = []
        for seed in range(3):
            model, inputs = random_linear(seed, num_classes=3, num_features=5), random(seed, num_samples, 5)
            network = nn.Sequential(model.float())
            probes.append((f"network {seed}", Probe(network, inputs.float(), model(inputs.float()).argmax(dim=1))))
        return probes

    monkeypatch.setattr(zoo, "digits_zoo", few)
    monkeypatch.setattr(validity, "interval", partial(interval, resamples=50))
    monkeypatch.setattr(validity, "strong_accuracy", lambda probe, epsilon: math.exp(-epsilon))
    monkeypatch.setattr(sys, "argv", ["validity", "--num-samples", "20", "--figure", str(tmp_path / "validity.png")])
    validity.main()
    printed = capsys.readouterr().out
    assert all(f"network {seed}" in printed for seed in range(3))
    assert "Spearman with accuracy at ε = 0.05" in printed
    assert (tmp_path / "validity.png").read_bytes().startswith(b"\x89PNG")
