"""Class shielding: which classes stand in the way of Fisher–Rao paths.

A path that leaves class A, aims at B and first enters another class C is *shielded*: C is the shield. Many traced paths
show how often this happens, between which classes, and whether robust classes are merely well shielded.

All shares and means are over paths, with standard errors over samples, because paths of one sample are not independent
draws.

Source: De & Säfken, "The Myth of Robust Classes"; the standard errors are ours.
Cost: counting; no forward or backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust.functional._validation.arguments import check_integer, check_kind, expected_but_got
from lightning_robust.functional.fisher_rao.paths import FisherRaoPaths
from lightning_robust.functional.fisher_rao.ratios import Estimate, ratio_of_sums, ratio_sums

# Estimates that are means; all others are shares.
MEANS = ("margin", "bound", "excess", "l2", "linf")
# Elements of per-sample tables held at once.
_ELEMENTS = 2**22


@dataclass(frozen=True)
class ClassShielding:
    """Counts, shares and means over paths between C classes.

    Paths of misclassified samples count as 0 in means of margins and distances, and nowhere else. Paths that did not
    leave their class count in ``success`` alone.

    Attributes:
        hits: ``(P, 3)``, source, target and first class entered, of each path that left its class.
        path_matrix: ``(C, C)``, share of the paths leaving class A (row) that first entered B (column), whatever their
            target.
        landscape: ``(C, C)``, share of the paths aimed at B (row) from classes other than C that were shielded by C
            (column).
        shielding: ``(C,)``, share of the paths that first entered a class but aimed at another one: how much of the
            class's arrivals it has intercepted.
        interception: ``(C,)``, share shielded by a class among the paths that neither left it nor aimed at it.
        shielded: ``(C,)``, share of the paths from a class that were shielded.
        success: ``(C,)``, share of the paths from a class that left it.
        margin: ``(C,)``, mean margin of the paths from a class.
        excess: ``(C,)``, mean margin divided by mean bound: the detour that the paths take.
        l2: ``(C,)``, mean Euclidean distance from samples of a class to the ends of their paths.
        linf: ``(C,)``, mean largest change of a feature between samples of a class and the ends of their paths.
        vulnerability_rank: ``(C,)``, 1 for the class with the largest mean margin; 0 for classes without paths.
        robust_to_fragile: ``()``, share of shielded paths among those from the half of the classes with the larger mean
            margins to the other half. With an odd number of classes the middle one is left out.
        fragile_to_robust: ``()``, share of shielded paths in the opposite direction.
        asymmetry: ``()``, ``robust_to_fragile`` minus ``fragile_to_robust``.
    """

    hits: Tensor
    path_matrix: Estimate
    landscape: Estimate
    shielding: Estimate
    interception: Estimate
    shielded: Estimate
    success: Estimate
    margin: Estimate
    excess: Estimate
    l2: Estimate
    linf: Estimate
    vulnerability_rank: Tensor
    robust_to_fragile: Estimate
    fragile_to_robust: Estimate
    asymmetry: Estimate

    @property
    def first_hits(self) -> Tensor:
        """``(C, C, C)``, number of paths from A, aimed at B, that first entered C."""
        c = len(self.vulnerability_rank)
        flat = (self.hits * self.hits.new_tensor([c * c, c, 1])).sum(dim=1)
        return torch.bincount(flat, minlength=c**3).view(c, c, c)


def class_shielding(paths: FisherRaoPaths, num_classes: int) -> ClassShielding:
    """Count which classes paths enter first, and average their margins and lengths.

    Args:
        paths: From :func:`~lightning_robust.functional.trace_fisher_rao_paths`.
        num_classes: C, the number of classes of the logits.

    Returns:
        :class:`ClassShielding`.

    Raises:
        TypeError: If ``paths`` is not a :class:`~lightning_robust.functional.FisherRaoPaths`.
        ValueError: If ``num_classes`` is not the number of classes of the paths.

    Source: De & Säfken, "The Myth of Robust Classes". The poster does not define the denominators of its shielding
    rates; those used here are ours.
    """
    check_kind("paths", paths, FisherRaoPaths, "FisherRaoPaths")
    if check_integer("num_classes", num_classes, at_least=2) != paths.logits.shape[-1]:
        raise ValueError(expected_but_got("num_classes", f"{paths.logits.shape[-1]}, like the paths", num_classes))
    estimates = _estimates(paths, num_classes)
    ranks = _ranks(estimates["margin"].value)
    there, back = _between_halves(paths, ranks)
    sample, column = paths.has_left.nonzero(as_tuple=True)
    return ClassShielding(
        hits=torch.stack([paths.source[sample], paths.targets[sample, column], paths.first_hit[sample, column]], dim=1),
        **estimates,
        vulnerability_rank=ranks,
        robust_to_fragile=there,
        fragile_to_robust=back,
        # the two shares come from different samples, and so are independent
        asymmetry=Estimate(there.value - back.value, there.stderr.hypot(back.stderr)),
    )


def _estimates(paths: FisherRaoPaths, num_classes: int) -> dict[str, Estimate]:
    """Estimates that are ratios of sums over all samples."""
    size = max(1, _ELEMENTS // num_classes**2)
    sums: dict[str, Tensor] = {}
    for start in range(0, len(paths.source), size):
        for name, (numerator, denominator) in _terms(paths.rows(slice(start, start + size)), num_classes).items():
            sums[name] = sums.get(name, 0) + ratio_sums(numerator, denominator)
    return {name: ratio_of_sums(total, share=name not in MEANS) for name, total in sums.items()}


def sums_of_samples(paths: FisherRaoPaths) -> dict[str, tuple[Tensor, Tensor]]:
    """Numerators and denominators of the estimates per source class, summed over the paths of each sample (N,)."""
    ended, exist = paths.success.double(), paths.exist.double()
    left = paths.has_left.double()
    terms = {
        "margin": (ended * paths.margins, ended),
        "bound": (ended * paths.bound, ended),
        "excess": (ended * paths.margins, ended * paths.bound),
        "l2": (ended * paths.l2, ended),
        "linf": (ended * paths.linf, ended),
        "shielded": (paths.shielded.double(), left),
        "success": (left, paths.traced.double()),
        "unreached": (exist - ended, exist),
    }
    return {name: (top.sum(dim=1), bottom.sum(dim=1)) for name, (top, bottom) in terms.items()}


def _terms(paths: FisherRaoPaths, num_classes: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Numerator and denominator of each ratio, per sample: (n, C) or (n, C, C)."""
    left, shielded = paths.has_left.double(), paths.shielded.double()
    source, target, hit = (
        F.one_hot(classes.clamp_min(0), num_classes).double()
        for classes in (paths.source, paths.targets, paths.first_hit)
    )
    hit = hit * left[..., None]
    caught = torch.einsum("nk,nkc->nc", shielded, hit)
    elsewhere, others = 1 - source, 1 - torch.eye(num_classes, dtype=left.dtype, device=left.device)
    past = elsewhere * torch.einsum("nk,nkc->nc", left, 1 - target)

    of_samples = sums_of_samples(paths)
    by_source = {}  # values go to the column of each sample's class
    for name in ("shielded", "success", "margin", "excess", "l2", "linf"):
        top, bottom = of_samples[name]
        by_source[name] = source * top[:, None], source * bottom[:, None]
    return {
        "path_matrix": (source[:, :, None] * hit.sum(dim=1)[:, None], by_source["success"][0][..., None]),
        "landscape": (
            torch.einsum("nkb,nkc->nbc", target, hit * shielded[..., None]),
            torch.einsum("nkb,nk->nb", target, left)[..., None] * elsewhere[:, None] * others,
        ),
        "shielding": (caught, hit.sum(dim=1)),
        "interception": (caught, past),
        **by_source,
    }


def _ranks(margins: Tensor) -> Tensor:
    """Rank margins from the largest, 1, downwards; 0 for NaN."""
    order = margins.nan_to_num(nan=-1.0).argsort(descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(0, order, torch.arange(1, len(order) + 1, device=order.device))
    return ranks.where(margins.isfinite(), 0)


def _between_halves(paths: FisherRaoPaths, ranks: Tensor) -> tuple[Estimate, Estimate]:
    """Share of shielded paths from the more robust half of the ranked classes to the other half, and back."""
    num_ranked = int((ranks > 0).sum())
    robust = (ranks > 0) & (ranks <= num_ranked // 2)
    fragile = ranks > num_ranked - num_ranked // 2
    shares = []
    for begin, end in ((robust, fragile), (fragile, robust)):
        counted = paths.has_left & begin[paths.source][:, None] & end[paths.targets]
        sums = ratio_sums((counted & paths.shielded).sum(dim=1), counted.sum(dim=1))
        shares.append(ratio_of_sums(sums, share=True))
    return shares[0], shares[1]
