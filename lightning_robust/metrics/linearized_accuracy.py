"""Metric of robust accuracy, predicted from linearised margins without an attack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_robust.functional._validation.arguments import (
    as_number,
    as_numbers,
    check_positive_integer,
    expected_but_got,
    optional,
)
from lightning_robust.functional._validation.scales import are_alone, gaps_below_a_class
from lightning_robust.functional.input_space.attacks import Norm, check_norm
from lightning_robust.functional.input_space.units import are_images, are_images_of_unknown_scale
from lightning_robust.metrics._nearest_boundaries import MORE_OTHERS, margins_of
from lightning_robust.metrics.base import ProbeMetric, error_bar_of_mean, error_bar_of_share, joined
from lightning_robust.metrics.keys import accuracy_key
from lightning_robust.probe import Probe

DEFAULT_EPSILONS = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
# A caveat says so if the median margin is that many times below or above every ε, and the accuracy that close to 0, or
# to the clean accuracy, at all of them. It takes a few margins to tell. The customary ε of images have more credit.
_FAR, _FAR_FOR_IMAGES = 10, 30
_NEARLY = 0.05
_FEW_MARGINS = 10
# Share of the samples for which classes that were not looked at may be nearer, above which that is said.
_NEGLIGIBLE = 0.05


class LinearizedAccuracy(ProbeMetric):
    """Share of samples whose linearised margin exceeds ε, for several ε at once; higher is more robust.

    **Logged metrics** (each under the monitor's prefix, each with ``_stderr``, ``_lower``, ``_upper``)

    - ``linearized_accuracy_<norm>_<ε as %.4g>``: predicted robust accuracy at that ε. With likelihood ``"gaussian"``,
      the share of predictions that move by less than the probe's ``tolerance``
    - ``linearized_accuracy_<norm>_0``: clean accuracy on the same samples. With likelihood ``"bernoulli"`` a sample is
      classified correctly if all its labels are; with ``"gaussian"`` this is 1
    - ``linearized_margin_<norm>``: mean margin, with 0 for misclassified samples. A single correctly classified sample
      without any gradient makes it infinite; it is then not logged. Samples with masks over all classes but their own
      are left out, because there is no boundary to be at a distance from.
    - ``linearized_margin_<norm>_clipped``: mean of margins clipped at twice the largest ε, so that no single sample can
      dominate: a smooth version of the predicted accuracy

    Args:
        epsilons: Perturbation sizes, in units of the un-normalised input if the probe has ``input_std``.
        norm: ``"linf"`` or ``"l2"``.
        order: 2 linearises once more, close to the predicted boundary, at twice the cost (see
            :func:`~lightning_robust.functional.relinearize`), and logs ``linearized_order2_accuracy…`` and
            ``linearized_order2_margin…``. On deep standard networks these are closer to the results of attacks.
        num_targets: To how many of the most probable other classes of each sample boundaries are sought. By default to
            all of up to 31. Of more, to 10, and to 40 for samples where a class beyond these may be nearer.

    Raises:
        ValueError: If ``epsilons`` is empty, holds a negative number or two that agree in their first four digits,
            ``norm`` is unknown, ``order`` is neither 1 nor 2, or ``num_targets`` is not positive, or, in an update,
            more than there are other classes.

    State: the margin of each sample, and two numbers that tell whether it has another class.

    Source: ours, on the linearised distance of arXiv 1511.04599.
    """

    higher_is_better = True
    margins: list[Tensor]
    gaps: list[Tensor]
    spans: list[Tensor]

    def __init__(
        self,
        epsilons: Sequence[float] = DEFAULT_EPSILONS,
        norm: Norm = "linf",
        order: Literal[1, 2] = 1,
        num_targets: int | None = None,
    ) -> None:
        super().__init__()
        self.epsilons = check_epsilons(epsilons)
        self.norm = check_norm(norm)
        if as_number(order) not in (1, 2):
            raise ValueError(expected_but_got("order", "1 or 2", order))
        self.order = int(order)
        self.num_targets = optional(check_positive_integer, "num_targets", num_targets)
        self.linearizations = ("first",) if self.order == 1 else ("first", f"near the boundary in {norm}")
        self._doubtful = 0  # samples for which a class that was not looked at may be nearer
        self._far: float = _FAR_FOR_IMAGES
        self._quartiles: list[float] = []  # of the margins of correctly classified samples, when last computed
        self.add_configuration(self.epsilons, norm, self.order, num_targets)
        for name in ("margins", "gaps", "spans"):
            self.add_float64_rows(name)

    def _add(self, probe: Probe) -> None:
        probe.reading.check_margins()
        self._far = _far(probe)
        found = margins_of(probe, self.norm, order=self.order, num_targets=self.num_targets)
        margins = found.values
        self._doubtful += int(found.doubtful.sum())
        others = gaps_below_a_class(found.logits) if probe.reading.has_classes else 2 * [margins.new_zeros(())]
        rows = (margins, *(row.expand(len(margins)) for row in others))
        for held, row in zip((self.margins, self.gaps, self.spans), rows, strict=True):
            held.append(row.to(self.device, torch.float64))

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._doubtful = 0

    def compute(self) -> dict[str, Tensor]:
        """Return the statistics over all samples that the class docstring lists."""
        margins, alone = joined(self.margins), are_alone(joined(self.gaps), joined(self.spans))
        if len(margins) == 0:
            return {}
        alone &= margins > 0  # a sample whose own class is masked is misclassified
        margins = margins.masked_fill(alone, torch.inf)
        shares = {self._key(epsilon): (margins > epsilon).double() for epsilon in (*self.epsilons, 0.0)}
        self._quartiles = _quartiles(margins)
        key = f"{self._kind}_margin_{self.norm}"
        means = {key: margins, f"{key}_clipped": margins.clamp_max(2 * max(self.epsilons))}
        self.per_sample = shares | means
        values: dict[str, Tensor] = {}
        for key, hits in shares.items():
            values |= error_bar_of_share(key, hits)
        for key, distances in means.items():
            left = distances.isfinite() | ~alone
            values |= error_bar_of_mean(key, distances[left] if left.any() else distances)
        return values

    @property
    def _kind(self) -> str:
        return "linearized" if self.order == 1 else f"linearized_order{self.order}"

    def _key(self, epsilon: float) -> str:
        return accuracy_key(self._kind, self.norm, epsilon)

    def caveats(self, values: Mapping[str, float]) -> dict[str, str]:
        """Warn if margins are far from every ε, with ε that fit them (see :meth:`ProbeMetric.caveats`)."""
        epsilons, clean = [epsilon for epsilon in self.epsilons if epsilon > 0], values.get(self._key(0.0), 0.0)
        if self._doubtful > _NEGLIGIBLE * values.get("num_samples", 1.0):
            looked_at = self.num_targets or MORE_OTHERS
            return {
                f"{self._kind}_margin_{self.norm}_clipped": f"and the accuracies may be too high: for {self._doubtful}"
                f" samples a class beyond the {looked_at} most probable ones may be nearer."
                f" `LinearizedAccuracy(num_targets={4 * looked_at})` looks at more of them, at their cost."
            }
        if not self._quartiles or not epsilons or not clean > 0:
            return {}
        smallest, median, largest = min(epsilons), self._quartiles[1], max(epsilons)
        if median < smallest / self._far and values.get(self._key(smallest), clean) <= _NEARLY * clean:
            key, what = self._key(smallest), "is nearly 0, and so is the accuracy at every larger ε"
        elif median > self._far * largest and values.get(self._key(largest), 0.0) >= (1 - _NEARLY) * clean:
            key, what = self._key(largest), "is hardly less than the accuracy at ε = 0"
        else:
            return {}
        options = [f"[{', '.join(_rounded(self._quartiles))}]"]
        options += [f"norm={self.norm!r}"] if self.norm != "linf" else []
        options += [f"order={self.order}"] if self.order != 1 else []
        return {
            key: f"{what}: the median of the margins above 0 is {median:.2g}, in the unit in which ε is"
            f" given. `LinearizedAccuracy({', '.join(options)})` has ε of the size of margins."
        }


def _far(probe: Probe) -> float:
    """How many times the median margin may be off ε before a caveat says so."""
    if are_images_of_unknown_scale(probe.inputs, probe.input_std):
        return math.inf  # then the scale of the inputs is the question, not that of ε
    return _FAR_FOR_IMAGES if are_images(probe.inputs) else _FAR


def _quartiles(margins: Tensor) -> list[float]:
    """Quartiles of the positive, finite margins; none if there are only few."""
    counted = margins[(margins > 0) & margins.isfinite()]
    if len(counted) < _FEW_MARGINS:
        return []
    quartiles: list[float] = counted.quantile(counted.new_tensor([0.25, 0.5, 0.75])).tolist()
    return quartiles


def _rounded(epsilons: Sequence[float]) -> list[str]:
    """Numbers in as few digits as tell them apart."""
    texts = ([f"{float(f'{epsilon:.{digits}g}'):g}" for epsilon in epsilons] for digits in (1, 2, 3))
    return next((text for text in texts if len(set(text)) == len(text)), [f"{epsilons[1]:.4g}"])


def check_epsilons(epsilons: Sequence[float]) -> tuple[float, ...]:
    """Return ``epsilons`` as a tuple, or raise a ``ValueError``."""
    values = [value + 0.0 for value in as_numbers(epsilons) or []]  # -0.0 becomes 0.0, or its key would differ
    if not values or not all(0 <= value < math.inf for value in values):
        raise ValueError(expected_but_got("epsilons", "a list of at least one finite number ≥ 0", epsilons))
    if len({f"{value:.4g}" for value in values}) < len(values):
        raise ValueError(f"Expected argument `epsilons` to differ in their first four digits, but got {epsilons}.")
    return tuple(values)
