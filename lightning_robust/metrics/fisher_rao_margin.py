"""Metric of Fisher–Rao margins: how far predictions travel until the class changes, and which classes intervene."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.functional._validation.arguments import check_boolean, check_positive_integer
from lightning_robust.functional.fisher_rao.class_shielding import MEANS, sums_of_samples
from lightning_robust.functional.fisher_rao.path_options import Solver, check_path_options
from lightning_robust.functional.fisher_rao.paths import FisherRaoPaths
from lightning_robust.functional.fisher_rao.ratios import Estimate, ratio_of_sums, ratio_sums
from lightning_robust.metrics.base import ProbeMetric, error_bar, joined
from lightning_robust.metrics.keys import is_standard_error, per_class
from lightning_robust.probe import Probe

_QUANTITIES = ("margin", "bound", "excess", "l2", "linf", "shielded", "unreached")


class FisherRaoMargin(ProbeMetric):
    """Length of natural-gradient paths on the simplex until the class changes, and which classes are in the way.

    Paths from each sample aim at the other classes. Each path costs dozens of backward passes, so give this metric a
    monitor of its own that measures a few samples every n epochs.

    The margin compares classes of one network. It does not separate robust networks from others, because it grows with
    confidence, towards π/2. The distances that the inputs must move, ``…_l2`` and ``…_linf``, do.

    **Logged metrics** (each under the monitor's prefix)

    - ``fisher_rao_margin``: mean margin in nats over all paths that leave their class, with 0 for misclassified
      samples, with ``_stderr``, ``_lower``, ``_upper``
    - ``fisher_rao_margin_bound``: mean lower bound of the lengths of these paths. It depends on the predictions alone
      and is close to π/2 in a confident network.
    - ``fisher_rao_margin_excess``: mean margin divided by mean bound, ≥ 1: the detour that the network forces on the
      paths, with ``_stderr``, ``_lower``, ``_upper``
    - ``fisher_rao_margin_l2``, ``fisher_rao_margin_linf``: mean Euclidean distance from the samples to the ends of
      these paths, and mean largest change of a feature, in units of the un-normalised input, with 0 for misclassified
      samples, with ``_stderr``, ``_lower``, ``_upper``; higher is more robust
    - ``shielded``: share of paths that first enter a class other than the one aimed at, among the paths of correctly
      classified samples that leave their class, with ``_stderr``, ``_lower``, ``_upper``
    - ``fisher_rao_margin_unreached``: share of paths that do not leave their class; no other value includes them
    - ``fisher_rao_margin_per_class/<class>``, ``shielded_per_class/<class>``: values of the paths from each class

    Standard errors are over samples, because paths of one sample are not independent draws.

    Args:
        num_targets: Number of most probable other classes of each sample to aim at; by default all of them.
        damping: See :func:`~lightning_robust.functional.trace_fisher_rao_paths`.
        step_length: See :func:`~lightning_robust.functional.trace_fisher_rao_paths`.
        max_euclidean_step: See :func:`~lightning_robust.functional.trace_fisher_rao_paths`.
        max_steps: See :func:`~lightning_robust.functional.trace_fisher_rao_paths`.
        solver: See :func:`~lightning_robust.functional.trace_fisher_rao_paths`.
        per_class: Whether to return the values of each class as well.

    Raises:
        ValueError: If an option has a wrong value.

    State: sums for each class, ``42 C`` numbers in total.

    Source: De & Säfken, "The Myth of Robust Classes"; bound and excess are ours.
    """

    higher_is_better = None
    rows: list[Tensor]
    num_classes: Tensor

    def __init__(
        self,
        num_targets: int | None = None,
        damping: float | None = None,
        step_length: float | None = None,
        max_euclidean_step: float | None = None,
        max_steps: int = 100,
        solver: Solver = "gram",
        per_class: bool = True,
    ) -> None:
        super().__init__()
        if num_targets is not None:
            check_positive_integer("num_targets", num_targets)
        self.num_targets = num_targets
        self.options = check_path_options(
            damping=damping,
            step_length=step_length,
            max_euclidean_step=max_euclidean_step,
            max_steps=max_steps,
            solver=solver,
        )
        self.per_class = check_boolean("per_class", per_class)
        self.add_configuration(num_targets, self.options)
        self.add_float64_rows("rows")  # one row, flat: a process without samples does not know C
        self.add_float64_state("num_classes", reduce="max")

    def direction(self, key: str) -> bool | None:
        """Larger distances are better; margins, detours and shields have no better direction."""
        distances = ("fisher_rao_margin_l2", "fisher_rao_margin_linf")
        return True if key.startswith(distances) and not is_standard_error(key) else None

    def _add(self, probe: Probe) -> None:
        paths = probe.fisher_rao_paths(num_targets=self.num_targets, options=self.options)
        c = paths.logits.shape[2]
        if self.num_classes not in (0, c):
            raise ValueError(f"Expected logits of {int(self.num_classes)} classes, as before, but got {c}.")
        sums = _sums(paths).to(self.num_classes).flatten()
        self.rows = [self.rows[0] + sums] if self.rows else [sums]
        self.num_classes = torch.full_like(self.num_classes, c)

    def compute(self) -> dict[str, Tensor]:
        """Return the statistics over all samples that the class docstring lists."""
        c = int(self.num_classes)
        if c == 0:
            return {}
        sums = joined(self.rows).view(-1, 6, len(_QUANTITIES), c).sum(dim=0)
        whole, of_class = (_estimates(part) for part in (sums.sum(dim=2), sums))
        values = _with_error_bar("fisher_rao_margin", whole["margin"])
        for name in ("excess", "l2", "linf"):
            values |= _with_error_bar(f"fisher_rao_margin_{name}", whole[name])
        for name in ("bound", "unreached"):
            values[f"fisher_rao_margin_{name}"] = whole[name].value
        shielded = _with_error_bar("shielded", whole["shielded"])
        values |= {key: value.clamp(0, 1) for key, value in shielded.items()}
        if self.per_class:
            for key, quantity in (("fisher_rao_margin", "margin"), ("shielded", "shielded")):
                values |= per_class(key, of_class[quantity].value)
        return {key: value for key, value in values.items() if not value.isnan()}  # NaN: no such paths


def _sums(paths: FisherRaoPaths) -> Tensor:
    """Sums (6, quantities, C) from which the ratios of all quantities follow."""
    of_samples = sums_of_samples(paths)
    in_class = F.one_hot(paths.source, paths.logits.shape[2]).double()[:, None]  # (N, 1, C)
    pairs = (torch.stack([of_samples[name][side] for name in _QUANTITIES], dim=1) for side in (0, 1))
    numerator, denominator = (sums[..., None] * in_class for sums in pairs)
    return ratio_sums(numerator, denominator)


def _with_error_bar(key: str, estimate: Estimate) -> dict[str, Tensor]:
    return error_bar(key, estimate.value, estimate.stderr)


def _estimates(sums: Tensor) -> dict[str, Estimate]:
    """Ratios of sums (6, quantities, ...), by name."""
    return {name: ratio_of_sums(sums[:, i], share=name not in MEANS) for i, name in enumerate(_QUANTITIES)}
