"""Metric of accuracy under an attack: the reference that other metrics predict without an attack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_robust.functional._validation.arguments import check_positive_integer
from lightning_robust.functional.input_space.attacks import Norm, check_norm
from lightning_robust.metrics.base import ProbeMetric, error_bar_of_share, joined
from lightning_robust.metrics.keys import accuracy_key
from lightning_robust.metrics.linearized_accuracy import check_epsilons
from lightning_robust.probe import Attack, Probe


class AdversarialAccuracy(ProbeMetric):
    """Share of samples that are classified correctly under projected gradient descent; higher is more robust.

    The attack starts at the sample itself, so the same samples give the same value at every measurement and on any
    number of processes. Each ε costs ``steps`` forward and backward passes: use it as a check rather than a monitor.

    **Logged metrics** (each under the monitor's prefix, with ``_stderr``, ``_lower``, ``_upper``)

    - ``adversarial_accuracy_<norm>_<ε as %.4g>``: accuracy under an attack of that size

    Args:
        epsilons: Perturbation sizes, in units of the un-normalised input if the probe has ``input_std``.
        norm: ``"linf"`` or ``"l2"``.
        steps: Number of gradient steps of each attack, of size 2.5 · ε / steps. The attack stays within the probe's
            valid range if there is one.

    Raises:
        ValueError: If ``epsilons`` is empty, holds a negative number or two that agree in their first four digits,
            ``norm`` is unknown, or ``steps`` is not positive.

    State: whether each sample is classified correctly at each ε.

    Source: arXiv 1706.06083.
    """

    higher_is_better = True
    correct: list[Tensor]

    def __init__(self, epsilons: Sequence[float] = (8 / 255,), norm: Norm = "linf", steps: int = 20) -> None:
        super().__init__()
        check_positive_integer("steps", steps)
        self.epsilons = check_epsilons(epsilons)
        self.norm = check_norm(norm)
        self.steps = steps
        self.add_configuration(self.epsilons, norm, steps)
        self.add_float64_rows("correct")  # flat: len(epsilons) values per sample

    def _add(self, probe: Probe) -> None:
        correct, targets = [], probe.labels
        for epsilon in self.epsilons:
            attacked = probe.attacked(Attack(epsilon, self.norm, self.steps))
            correct.append(probe.logits(attacked).argmax(dim=1) == targets)
        self.correct.append(torch.stack(correct, dim=1).to(self.device, torch.float64).flatten())

    def compute(self) -> dict[str, Tensor]:
        """Return the accuracy at each ε over all samples."""
        columns = joined(self.correct).view(-1, len(self.epsilons)).T
        if columns.numel() == 0:
            return {}
        keys = [accuracy_key("adversarial", self.norm, epsilon) for epsilon in self.epsilons]
        self.per_sample = dict(zip(keys, columns, strict=True))
        values: dict[str, Tensor] = {}
        for key, correct in self.per_sample.items():
            values |= error_bar_of_share(key, correct)
        return values
