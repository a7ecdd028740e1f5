"""Metric of Fisher–Rao margins: how far predictions must travel before the class changes, and who stands in the way."""

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
from lightning_robust.probe import Probe

_QUANTITIES = ("margin", "bound", "excess", "l2", "linf", "shielded", "unreached")


class FisherRaoMargin(ProbeMetric):
    """Length of natural-gradient paths on the simplex until the class changes, and what stands in their way.

    From each sample paths aim at the other classes. That costs dozens of backward passes for each of them: meant for a
    monitor of its own that measures few samples every n epochs.

    The margin compares classes of one network. It does not tell robust networks from others: it grows with their
    confidence, towards π/2. How far the inputs must move, ``…_l2`` and ``…_linf``, does.

    **Logged metrics** (each under the monitor's prefix)

    - ``fisher_rao_margin``: mean margin over all paths that leave their class, in nats, 0 where misclassified, with
      ``_stderr``, ``_lower``, ``_upper``
    - ``fisher_rao_margin_bound``: mean of what these paths cannot fall short of. It depends on the predictions alone,
      and is close to π/2 in a confident network.
    - ``fisher_rao_margin_excess``: the one divided by the other, ≥ 1: what detour the network makes the paths take,
      with ``_stderr``, ``_lower``, ``_upper``
    - ``fisher_rao_margin_l2``, ``fisher_rao_margin_linf``: mean Euclidean distance of the ends of these paths from
      their samples, and mean largest change of a feature, in units of the un-normalised input, 0 where misclassified,
      with ``_stderr``, ``_lower``, ``_upper``; higher is more robust
    - ``shielded``: share of the paths that first enter another class than the one aimed at, among those of correctly
      classified samples that leave their class, with ``_stderr``, ``_lower``, ``_upper``
    - ``fisher_rao_margin_unreached``: share of paths that have not left their class, which count in nothing else
    - ``fisher_rao_margin/<class>``, ``shielded/<class>``: of the paths from each class

    Standard errors are over samples: paths of one sample are no independent draws.

    Args:
        num_targets: Aim at so many of the most probable other classes of each sample; by default at all of them.
        damping: See :func:`~lightning_robust.functional.trace_fisher_rao_paths`, as for the following.
        step_length: See there.
        max_euclidean_step: See there.
        max_steps: See there.
        solver: See there.
        per_class: Whether to return the values of each class, too.

    Raises:
        ValueError: If an option has a wrong value.

    State: sums for each class, ``42 C`` numbers.

    Source: De & Säfken, "The Myth of Robust Classes"; bound and excess are ours.
    """

    higher_is_better = None
    rows: list[Tensor] | Tensor
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
        self.add_float64_rows("rows")  # one row, flat: a process without samples knows no number of classes
        self.add_float64_state("num_classes", reduce="max")

    def direction(self, key: str) -> bool | None:
        """Distances are better the longer they are; nobody can say so of margins, detours and shields."""
        return True if key.startswith(("fisher_rao_margin_l2", "fisher_rao_margin_linf")) else None

    def _add(self, probe: Probe) -> None:
        paths = probe.fisher_rao_paths(num_targets=self.num_targets, options=self.options)
        c = paths.logits.shape[2]
        if self.num_classes not in (0, c):
            raise ValueError(f"Expected logits of {int(self.num_classes)} classes, as before, but got {c}.")
        sums = _sums(paths).to(self.num_classes).flatten()
        assert isinstance(self.rows, list)
        self.rows = [self.rows[0] + sums] if self.rows else [sums]
        self.num_classes = torch.full_like(self.num_classes, c)

    def compute(self) -> dict[str, Tensor]:
        """Return the statistics over all samples, as the class docstring lists them."""
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
                values |= {f"{key}/{label}": value for label, value in enumerate(of_class[quantity].value)}
        return {key: value for key, value in values.items() if not value.isnan()}  # of which there are no paths


def _sums(paths: FisherRaoPaths) -> Tensor:
    """What the ratios of all quantities follow from, (6, quantities, C)."""
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
