"""The predictions hold on CIFAR-10 classifiers that others have trained, where a folder of them is at hand."""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_robust import AdversarialAccuracy, FisherSpectralNorm, LinearizedAccuracy, Probe
from recipes.networks import CifarResNet

FOLDER = Path(os.environ.get("LIGHTNING_ROBUST_DATA", Path(__file__).parents[3] / "shared" / "data"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FOLDER / "models").is_dir(),
        reason="no CIFAR-10 classifiers; set LIGHTNING_ROBUST_DATA to a folder of them",
    ),
]
EPSILONS = (2 / 255, 8 / 255)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)
SMALL = {  # in the order of robustness
    "smallcnn_standard": CIFAR,
    "smallcnn_mix2": CIFAR,
    "smallcnn_pgd2": CIFAR,
    "smallcnn_certified": (IMAGENET[0], (0.225, 0.225, 0.225)),
}


def small_cnn() -> nn.Sequential:
    convolutions = [nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(2048, 100), nn.ReLU(), nn.Linear(100, 10))


def load(network: nn.Module, name: str, mean: tuple[float, ...], std: tuple[float, ...], every: int) -> Probe:
    state = torch.load(FOLDER / "models" / f"cifar10_{name}.pth", weights_only=True)
    names = [key for key in network.state_dict() if not key.endswith("num_batches_tracked")]
    network.load_state_dict(dict(zip(names, state.values(), strict=True)), strict=False)
    data = np.load(FOLDER / "cifar10_test_1000_dev.npz")
    images = torch.tensor(data["x"][::every]).permute(0, 3, 1, 2) / 255
    shift, scale = (torch.tensor(constant).view(3, 1, 1) for constant in (mean, std))
    targets = torch.tensor(data["y"][::every])
    return Probe(network, (images - shift) / scale, targets, input_std=std, input_mean=mean, valid_range=(0, 1))


def measure(probe: Probe, *metrics: FisherSpectralNorm | LinearizedAccuracy | AdversarialAccuracy) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for metric in metrics:
        metric.update(probe)
        values |= metric.compute()
    return values


def test_predicted_accuracy_is_the_attacked_one_on_small_networks_and_both_norms_order_them() -> None:
    rows = []
    for name, (mean, std) in SMALL.items():
        probe = load(small_cnn(), name, mean, std, every=5)
        rows.append(measure(probe, FisherSpectralNorm(), LinearizedAccuracy(EPSILONS), AdversarialAccuracy(EPSILONS)))
    for row in rows:
        for epsilon in EPSILONS:
            gap = row[f"linearized_accuracy_linf_{epsilon:.4g}"] - row[f"adversarial_accuracy_linf_{epsilon:.4g}"]
            assert abs(gap) <= 0.05  # PGD-20 is itself one to three points too optimistic
    for less, more in pairwise(rows):
        assert more["fim_spectral_norm"] < less["fim_spectral_norm"]
        assert more["fim_spectral_norm_calibrated"] < less["fim_spectral_norm_calibrated"]
        key = f"linearized_accuracy_linf_{8 / 255:.4g}"
        assert more[key] > less[key]


def test_a_confident_resnet_is_flagged_as_saturated_and_its_median_says_nothing() -> None:
    probe = load(CifarResNet(20), "resnet20", *IMAGENET, every=20)
    values = measure(probe, FisherSpectralNorm(), LinearizedAccuracy((0.0, *EPSILONS)))
    assert values["linearized_accuracy_linf_0"] > 0.85
    assert values["linearized_accuracy_linf_0.007843"] < 0.05
    assert values["saturated"] > 0.5
    assert values["temperature"] > 1.5
    assert values["fim_spectral_norm"] > 100 * values["fim_spectral_norm_median"]
