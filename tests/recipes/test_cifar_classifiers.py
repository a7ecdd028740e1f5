"""Predictions hold on CIFAR-10 classifiers that others have trained; skipped without a folder of their weights."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_robust import (
    AdversarialAccuracy,
    FisherSpectralNorm,
    LinearizedAccuracy,
    Probe,
    ProbeMetric,
    functional,
)
from recipes import validity
from recipes.common import zoo
from recipes.common.cifar import DATA

pytestmark = pytest.mark.skipif(
    not (DATA / "models").is_dir(), reason="no CIFAR-10 classifiers; set LIGHTNING_ROBUST_DATA to a folder of them"
)
EPSILONS = (2 / 255, 8 / 255)


def small_networks(num_samples: int) -> list[Probe]:
    """Return probes of the small networks, the least robust first."""
    probes = zoo.cifar_classifiers(DATA / "models", num_samples=num_samples)
    return [probe for name, probe in probes if name.startswith("smallcnn")]


@pytest.mark.long
def test_queries_find_the_spectral_norms_of_networks() -> None:
    for _, probe in zoo.cifar_classifiers(DATA / "models", num_samples=16):
        exact = functional.fim_spectral_norm(probe.linearized.logits, probe.linearized.gram)
        queried = dataclasses.replace(probe, queries=200)
        estimate = functional.fim_spectral_norm_by_queries(queried.linearized)
        assert 0.9 <= (estimate.value / exact).median() <= 1.1
        assert ((estimate.value - exact).abs() <= 2 * estimate.stderr).float().mean() >= 0.8  # of 16


def measure(probe: Probe, *metrics: ProbeMetric) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for metric in metrics:
        metric.update(probe)
        values |= metric.compute()
    return values


@pytest.mark.long
def test_predicted_accuracy_is_that_under_pgd_on_small_networks_and_both_norms_order_them() -> None:
    rows = [
        measure(probe, FisherSpectralNorm(), LinearizedAccuracy(EPSILONS), AdversarialAccuracy(EPSILONS))
        for probe in small_networks(200)
    ]
    assert len(rows) == 4
    for row in rows:
        for epsilon in EPSILONS:
            gap = row[f"linearized_accuracy_linf_{epsilon:.4g}"] - row[f"adversarial_accuracy_linf_{epsilon:.4g}"]
            assert abs(gap) <= 0.05  # PGD-20 is itself one to three points too optimistic
    for less, more in pairwise(rows):
        assert more["fim_spectral_norm"] < less["fim_spectral_norm"]
        assert more["fim_spectral_norm_calibrated"] < less["fim_spectral_norm_calibrated"]
        key = f"linearized_accuracy_linf_{8 / 255:.4g}"
        assert more[key] > less[key]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_both_orders_are_within_two_points_of_a_strong_attack_on_small_networks() -> None:
    gaps: dict[int, list[float]] = {1: [], 2: []}
    for probe in small_networks(200):
        strong = {epsilon: validity.strong_accuracy(probe, epsilon) for epsilon in EPSILONS}
        for order, of_order in gaps.items():
            values = measure(probe, LinearizedAccuracy(EPSILONS, order=order))  # type: ignore[arg-type]
            kind = "linearized" if order == 1 else "linearized_order2"
            predicted = [float(values[f"{kind}_accuracy_linf_{epsilon:.4g}"]) for epsilon in EPSILONS]
            of_order += [100 * (p - strong[epsilon]) for p, epsilon in zip(predicted, EPSILONS, strict=True)]
    for of_order in gaps.values():
        assert torch.tensor(of_order).abs().mean() <= 2
        assert abs(torch.tensor(of_order).mean()) <= 2


def test_a_confident_resnet_is_flagged_as_saturated_and_its_median_norm_is_negligible() -> None:
    probe = dict(zoo.cifar_classifiers(DATA / "models", num_samples=50))["resnet20"]
    values = measure(probe, FisherSpectralNorm(), LinearizedAccuracy((0.0, *EPSILONS)))
    assert values["linearized_accuracy_linf_0"] > 0.85
    assert values["linearized_accuracy_linf_0.007843"] < 0.05
    assert values["saturated"] > 0.5
    assert values["temperature"] > 1.5
    assert values["fim_spectral_norm"] > 100 * values["fim_spectral_norm_median"]
