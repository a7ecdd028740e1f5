"""A trained network of 1,000 classes on real photographs: λ and margins against the gradients of all classes."""

import time
from dataclasses import replace

import pytest
import torch

from lightning_robust import LinearizedAccuracy, Probe
from lightning_robust.functional import Linearization, fim_spectral_norm, fit_temperature, linearize
from recipes.common import imagenet
from tests.helpers.recording import counted_passes

SECONDS = 120.0  # for exact values, an image at a time
MOST = 16  # images


@pytest.fixture(scope="module")
def probe() -> Probe:
    """Images with their labels; with predictions, where they have none."""
    try:
        network, (images, labels) = imagenet.efficientnet_lite0(), imagenet.photographs()
    except ModuleNotFoundError as error:
        pytest.skip(f"{error}; `make test-models` installs it")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    some = slice(None, None, max(1, len(images) // MOST))
    images = imagenet.normalised(images[some])
    with torch.no_grad():
        labels = network(images).argmax(dim=1) if labels is None else labels[some]
    options = {"input_std": imagenet.STD, "input_mean": imagenet.MEAN, "valid_range": (0, 1)}
    return Probe(network, images, labels, **options)


@pytest.fixture(scope="module")
def exact(probe: Probe) -> Linearization:
    """Of as many images as fit into the time."""
    parts, start = [], time.perf_counter()
    for row in range(len(probe)):
        parts.append(linearize(probe.model, probe.inputs[row : row + 1], **probe._options))
        each = (time.perf_counter() - start) / len(parts)
        if each * (len(parts) + 1) > SECONDS:
            break
    fields = ("logits", "gram", "gap_l1")
    return Linearization(*(torch.cat([getattr(part, field) for part in parts]) for field in fields))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("temperature", [None, 2.0], ids=["the one that fits", "another"])
def test_spectral_norms_are_those_of_exact_gradients(
    probe: Probe, exact: Linearization, temperature: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = counted_passes(monkeypatch)
    if temperature is None:
        temperature = float(fit_temperature(probe.own_outputs, probe.labels))
    information = replace(probe.rows(slice(len(exact.logits))), temperature=temperature).information
    for value, at in zip(information.value, (temperature, 1.0), strict=True):
        shares = value / fim_spectral_norm(exact.logits, exact.gram, temperature=at)
        assert float(shares.max()) < 1 + 1e-3
        assert float(shares.median()) > 0.99
        assert float(shares.quantile(0.05)) > 0.97
    assert information.converged.all()
    assert passes.total() / len(exact.logits) <= 30


@pytest.mark.timeout(900)
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_margins_to_ten_classes_are_those_to_all(probe: Probe, exact: Linearization, norm: str) -> None:
    """Of the predicted classes, so that no margin is 0."""
    some = replace(probe.rows(slice(len(exact.logits))), targets=exact.logits.argmax(dim=1))
    whole = replace(some, linearization="exact")
    whole._done["linearized",] = exact
    margins = []
    for one in (some, whole):
        metric = LinearizedAccuracy(norm=norm)  # type: ignore[arg-type]
        metric.update(one)
        margins.append(torch.cat(metric.margins))
    among_ten, everywhere = margins
    assert (everywhere > 0).all()
    assert float(((among_ten - everywhere).abs() <= 1e-3 * everywhere).double().mean()) >= 0.99
