"""Networks of many classes, trained on noisy clusters: as right as exact gradients, at the cost of a few passes."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust import LinearizedAccuracy, Probe
from lightning_robust.functional import fim_spectral_norm, fit_temperature
from tests.helpers.recording import counted_passes

MOST_PASSES = 30  # forward and backward passes, and products with Jacobians, per sample
RANGE = (-8.0, 8.0)


@dataclass(frozen=True)
class Setting:
    """A network, its data, and when it is looked at: after how many steps, and how accurate it is then."""

    num_classes: int
    side: int
    width: int
    num_samples: int
    accuracy: dict[int, tuple[float, float]] = field(hash=False)
    noise: float = 2.0
    batch: int = 256


HUNDRED = Setting(100, 8, 12, 96, {0: (0, 0.05), 20: (0, 0.1), 60: (0.1, 0.4), 150: (0.4, 0.7)}, noise=1.2, batch=128)
THOUSAND = Setting(1000, 16, 32, 48, {0: (0, 0.05), 20: (0, 0.05), 300: (0.4, 0.9)})
SETTINGS = [
    pytest.param(setting, steps, id=f"{setting.num_classes} classes, {steps} steps", marks=marks)
    for setting, marks in ((HUNDRED, ()), (THOUSAND, (pytest.mark.long, pytest.mark.timeout(900))))
    for steps in setting.accuracy
]
every_stage = pytest.mark.parametrize(("setting", "steps"), SETTINGS)


def batches(setting: Setting, num_samples: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of clusters under noise."""
    c, generator = setting.num_classes, torch.Generator().manual_seed(seed)
    centres = torch.randn(c, 3, setting.side // 2, setting.side // 2, generator=torch.Generator().manual_seed(0))
    centres = 0.5 * F.interpolate(centres, scale_factor=2, mode="bilinear")
    while True:
        y = torch.randint(c, (num_samples,), generator=generator)
        noise = torch.randn(num_samples, 3, setting.side, setting.side, generator=generator)
        yield (centres[y] + setting.noise * noise).clamp(*RANGE), y


@cache
def stages(setting: Setting) -> dict[int, Probe]:
    """Probes of the network after so many steps."""
    width, head = setting.width, 4 * setting.width * (setting.side // 4) ** 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.GELU(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(4 * width),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(head, setting.num_classes),
        )
    optimiser, found = torch.optim.Adam(network.parameters(), 1e-3), {}
    x, y = next(batches(setting, setting.num_samples, seed=5))
    training = batches(setting, setting.batch, seed=1)
    for step in range(max(setting.accuracy) + 1):
        if step in setting.accuracy:
            found[step] = Probe(copy.deepcopy(network), x, y, valid_range=RANGE, input_std=1.0, input_mean=0.0)
        images, labels = next(training)
        loss = F.cross_entropy(network(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return found


@cache
def exact(setting: Setting, steps: int) -> Probe:
    """The probe that takes the gradients of all classes."""
    return replace(stages(setting)[steps], linearization="exact")


@every_stage
def test_spectral_norms_are_those_of_exact_gradients_at_a_few_passes(
    setting: Setting, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, linearized = stages(setting)[steps], exact(setting, steps).linearized
    least, most = setting.accuracy[steps]
    assert least <= float((linearized.logits.argmax(dim=1) == probe.targets).double().mean()) <= most
    passes = counted_passes(monkeypatch)
    information = replace(probe).information
    fitted = float(fit_temperature(linearized.logits, probe.targets))
    assert information.temperatures == (pytest.approx(fitted, rel=1e-3), 1.0)
    for value, temperature in zip(information.value, information.temperatures, strict=True):
        expected = fim_spectral_norm(linearized.logits, linearized.gram, temperature=temperature)
        shares = value / expected
        assert float(shares.max()) < 1 + 1e-3
        assert float(shares.median()) > 0.99
        # an untrained network of 1,000 classes has a flat spectrum: 0.963 to 0.990 were measured
        assert float(shares.quantile(0.05)) > (0.95 if setting is THOUSAND and steps == 0 else 0.97)
        assert float(value.mean() / expected.mean()) > 0.98
    assert information.converged.all()
    assert passes.total() / len(probe) - 1 <= MOST_PASSES  # one is for the trace alone


@every_stage
def test_margins_to_ten_classes_are_those_to_all(setting: Setting, steps: int) -> None:
    """Of the predicted classes, so that no margin is 0; L∞ margins stay within the valid range."""
    count, orders = (48, (1, 2)) if setting is HUNDRED else (24, (1,))
    some = stages(setting)[steps].rows(slice(count))
    predicted = exact(setting, steps).linearized.logits[:count].argmax(dim=1)
    probes = [replace(some, targets=predicted, linearization=linearization) for linearization in ("exact", None)]
    equal = []
    for norm, order in itertools.product(("l2", "linf"), orders):
        margins = []
        for probe in probes:
            metric = LinearizedAccuracy([0.1], norm, order)
            metric.update(probe)
            margins.append(torch.cat(metric.margins))
        everywhere, among_ten = margins
        assert (everywhere > 0).all()
        equal.append((among_ten - everywhere).abs() <= 1e-4 * everywhere)
    assert float(torch.cat(equal).double().mean()) >= 0.99
