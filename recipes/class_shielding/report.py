"""The results of a study of class shielding: a table, a summary in words, and a file of estimates."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightning_robust.functional import ClassShielding, Estimate, FisherRaoPaths, class_shielding
from recipes.common.statistics import interval, spearman

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Figures of the poster "The Myth of Robust Classes" by class: 800 test images of CIFAR-10, 3,659 paths.
PUBLISHED = {
    "shielding": (58.2, 40.5, 12.1, 9.8, 18.4, 14.2, 21.0, 27.5, 62.7, 51.7),  # %
    "margin": (3.21, 2.76, 1.05, 0.98, 1.48, 1.12, 1.78, 2.05, 3.45, 2.98),  # steps
    "l2": (0.98, 0.84, 0.32, 0.28, 0.52, 0.35, 0.60, 0.70, 1.12, 0.95),
    "rank": (1, 3, 9, 10, 7, 8, 6, 5, 2, 4),
}


def table(found: ClassShielding, names: list[str], *, mode: str) -> str:
    """Return a row per class with standard errors, and the published figures if the classes are those of CIFAR-10."""
    ours = {
        "shields %": _cells(found.shielding, 100, 1),
        "mean FR margin" if mode == "path" else "mean steps": _cells(found.margin, 1, 2),
        "mean ‖δ‖₂": _cells(found.l2, 1, 3),
        "rank": [str(int(rank)) for rank in found.vulnerability_rank],
        "is shielded %": _cells(found.shielded, 100, 1),
        "margin / bound": _cells(found.excess, 1, 3) if mode == "path" else [],
    }
    columns = {heading: cells for heading, cells in ours.items() if cells}
    if tuple(names) == CIFAR10:
        columns |= {f"published: {name}": [f"{value:g}" for value in values] for name, values in PUBLISHED.items()}
    widths = [max(map(len, (heading, *cells))) for heading, cells in columns.items()]
    first = max(map(len, (*names, "class")))

    def line(name: str, cells: list[str]) -> str:
        return f"{name:{first}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    rows = [line(name, [cells[c] for cells in columns.values()]) for c, name in enumerate(names)]
    return "\n".join([line("class", list(columns)), *rows])


def legend(*, mode: str) -> str:
    """Return what the columns of the table mean."""
    lines = [
        "± one standard error over images; near 0 and 100 % it counts two more images on either side.",
        "nan: too few images to tell.",
        "shields: of the paths that first enter this class, the share that aimed at another.",
        "is shielded: of the paths from this class, the share that first enter a class they did not aim at.",
        "mean FR margin: mean Fisher–Rao length of the paths from this class until the class changes, in nats."
        if mode == "path"
        else "mean steps: mean number of natural-gradient steps from this class until the class changes.",
        "mean ‖δ‖₂: mean Euclidean distance from an image to the end of its paths.",
        "Both means count misclassified images as 0. rank: 1 has the largest margin.",
    ]
    if mode == "path":
        lines.append("margin / bound: length of the paths over the least that any path could have; 1 is no detour.")
    return "\n".join(lines)


def _cells(estimate: Estimate, factor: float, digits: int) -> list[str]:
    pairs = zip(estimate.value.tolist(), estimate.stderr.tolist(), strict=True)
    return [f"{factor * value:.{digits}f} ± {factor * stderr:.{digits}f}" for value, stderr in pairs]


def summary(found: ClassShielding, paths: FisherRaoPaths, names: list[str]) -> str:
    """Return how many paths are shielded, which classes shield most, and in which direction."""
    left, of_all = int(paths.has_left.sum()), int(paths.traced.sum())
    order = found.shielding.value.nan_to_num(nan=0.0).argsort(descending=True, stable=True)[:3].tolist()
    shares = [f"{names[c]}: {_cells(found.shielding, 100, 1)[c]} %" for c in order if found.shielding.value[c] > 0]
    there, back, difference = (
        f"{100 * float(share.value):.1f} ± {100 * float(share.stderr):.1f} %"
        for share in (found.robust_to_fragile, found.fragile_to_robust, found.asymmetry)
    )
    lines = [
        f"{left} of {of_all} paths left their class; {int(paths.shielded.sum())} of these were shielded:"
        " they first entered another class than they aimed at.",
        f"Classes that shield most: {', '.join(shares) or 'none'}.",
        f"Shielded paths from the half of the classes with the larger margins to the other half: {there};",
        f"  in the opposite direction: {back}; difference: {difference}.",
    ]
    if tuple(names) == CIFAR10:
        agreement = ", ".join(
            f"{name} {value:.2f} [{low:.2f}, {high:.2f}]" for name, (value, low, high) in with_published(paths).items()
        )
        lines.append(
            f"Spearman correlation with the published figures over classes, [95 % bootstrap interval]: {agreement}."
        )
    return "\n".join(lines)


def with_published(paths: FisherRaoPaths, *, resamples: int = 200) -> dict[str, tuple[float, ...]]:
    """Return rank correlations with the published figures over classes, with 95 % intervals over resampled images."""

    def correlation(rows: Tensor, name: str) -> Tensor:
        estimate = getattr(class_shielding(paths.rows(rows), len(CIFAR10)), name)
        return spearman(estimate.value.float(), torch.tensor(PUBLISHED[name]))

    return {
        name: interval(partial(correlation, name=name), len(paths.source), resamples=resamples)
        for name in ("margin", "l2", "shielding")
    }


def write_csv(found: ClassShielding, names: list[str], path: Path) -> None:
    """Write one row per class, each estimate beside its standard error."""
    estimates = ("shielding", "interception", "shielded", "success", "margin", "excess", "l2", "linf")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        heads = [head for name in estimates for head in (name, f"{name}_stderr")]
        writer.writerow(["class", *heads, "vulnerability_rank"])
        for c, name in enumerate(names):
            pairs = (getattr(found, estimate) for estimate in estimates)
            cells = [float(part[c]) for pair in pairs for part in (pair.value, pair.stderr)]
            writer.writerow([name, *cells, int(found.vulnerability_rank[c])])
