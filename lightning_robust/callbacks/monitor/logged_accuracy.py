"""Compares the accuracy of the measured samples with the accuracies that the module has logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_robust.callbacks.monitor.probe_code import ProbeCode
from lightning_robust.metrics.keys import is_accuracy_at_zero, is_plain_accuracy, is_validation_accuracy, loader_of


class CleanAccuracy(NamedTuple):
    """Accuracy of the network on the measured samples.

    Attributes:
        share: Share of the samples that is classified correctly.
        num_samples: How many samples these are.
        over_classes: Mean over classes of the share in each, and its standard error, where they are known.
    """

    share: float
    num_samples: int
    over_classes: tuple[float, float] | None = None

    @classmethod
    def of(
        cls,
        values: Mapping[str, float],
        per_sample: Mapping[str, Tensor],
        targets: Sequence[object],
        *,
        num_samples: int,
    ) -> CleanAccuracy | None:
        """Take it from the values of a measurement; None if nothing measured it.

        Args:
            values: By key, without the prefix.
            per_sample: Values on each sample, by key.
            targets: Of the samples of this process, in the same order.
            num_samples: Over all processes.
        """
        key = next((key for key in values if is_accuracy_at_zero(key)), None)
        if key is None:
            return None
        hits, over_classes = per_sample.get(key), None
        known = hits is not None and len(hits) == len(targets) and all(isinstance(target, int) for target in targets)
        if hits is not None and known:
            over_classes = _over_classes(hits, torch.tensor(targets))
        return cls(values[key], num_samples, over_classes)

    def agrees(self, share: float) -> bool:
        """Whether a share may be the same accuracy, within four standard errors, or its mean over classes."""
        middle = (share + self.share) / 2
        stderr = math.sqrt(middle * (1 - middle) / self.num_samples)
        expected = [(self.share, stderr), *([self.over_classes] if self.over_classes is not None else [])]
        return any(abs(share - mean) <= 4 * error + 0.02 for mean, error in expected)


def _over_classes(hits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Mean over the classes that occur, and its standard error (Agresti and Coull's, as classes may be rare)."""
    _, classes, counts = torch.unique(targets, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add(0, classes, hits.double())
    middle = (sums + 2) / (counts + 4)
    variance = (middle * (1 - middle) / (counts + 4)).sum() / len(counts) ** 2
    return float((sums / counts).mean()), float(variance.sqrt())


def comparable(logged: Mapping[str, float], *, loader: int, num_loaders: int) -> dict[str, float]:
    """Shares that name an accuracy of one loader; with several loaders, a key that names none may be about any."""
    of_loader = {key: value for key, value in logged.items() if num_loaders < 2 or loader_of(key) == loader}
    found = {key: value for key, value in of_loader.items() if is_plain_accuracy(key) and 0 <= value <= 100}
    return {key: value / 100 if value > 1 else value for key, value in found.items()}


def agreement(shares: Mapping[str, float], clean: CleanAccuracy | None) -> bool | None:
    """Whether logged accuracies are that of the measured samples; None if they cannot be compared.

    One that agrees is enough. Only keys that name a validation accuracy and nothing else can disagree: others may be
    those of neighbours, groups, domains or parts of the network.
    """
    if clean is None or not shares:
        return None
    if any(map(clean.agrees, shares.values())):
        return True
    return False if any(map(is_validation_accuracy, shares)) else None


def other_accuracy(shares: Mapping[str, float], clean: CleanAccuracy, code: ProbeCode) -> str:
    """The sentence about accuracies that disagree."""
    key, value = next((key, value) for key, value in shares.items() if is_validation_accuracy(key))
    line = code.line(network="lambda x: module.head(module(x))", inputs="prepare({})", more="module=module")
    consequence = "so the numbers are not about what is validated"
    if clean.over_classes is None:
        consequence = "which is right if it averages over classes. If not, the numbers are about something else"
    return (
        f"The module logs `{key}` {value:.3g}, but of the {clean.num_samples} samples that RobustnessMonitor measures,"
        f" the network classifies {clean.share:.3g} correctly, {consequence}. Does `validation_step` prepare its"
        f" inputs, or go on after `forward`? Then say what is to be measured: {line}."
    )
