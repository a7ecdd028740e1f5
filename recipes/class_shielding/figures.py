"""Figures of class shielding: two heat maps, and the margin of each class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_robust.functional import ClassShielding
from recipes.common.plotting import pyplot


def draw(found: ClassShielding, names: list[str], folder: Path, *, mode: str) -> list[Path]:
    """Draw the shielding landscape, the path matrix and the margins; return the files."""
    plt = pyplot()
    size = max(5.0, 1.5 + 0.5 * len(names))
    paths = [folder / name for name in ("shielding_landscape.png", "path_matrix.png", "margins.png")]

    figure, axes = plt.subplots(figsize=(size, size), layout="constrained")
    _heat_map(axes, 100 * found.landscape.value, names)
    axes.set(xlabel="shield: class entered first", ylabel="class aimed at")
    axes.set_title(f"paths shielded by a class, % of those it could shield ({len(found.hits)} paths)")
    figure.savefig(paths[0], dpi=150)

    figure, axes = plt.subplots(figsize=(size, size), layout="constrained")
    own = torch.eye(len(names), dtype=torch.bool)
    _heat_map(axes, (100 * found.path_matrix.value).masked_fill(own, torch.nan), names)
    axes.set(xlabel="class entered first", ylabel="class left")
    axes.set_title(f"% of paths from each class ({100 / (len(names) - 1):.0f} % if none is shielded)")
    figure.savefig(paths[1], dpi=150)

    figure, (above, below) = plt.subplots(2, figsize=(size, 5), sharex=True, layout="constrained")
    for axes, estimate, label in (
        (above, found.margin, "mean Fisher–Rao margin" if mode == "path" else "mean number of steps"),
        (below, found.l2, "mean ‖δ‖₂"),
    ):
        error = 2 * estimate.stderr
        ends = torch.stack([torch.minimum(error, estimate.value), error])  # no mean is below 0
        axes.bar(names, estimate.value.numpy(), yerr=ends.numpy(), capsize=3, color="tab:blue")
        axes.set(ylabel=label)
    if mode == "path":
        bound = (found.margin.value / found.excess.value).numpy()
        above.plot(names, bound, "_", color="tab:orange", markersize=24, markeredgewidth=2, label="lower bound")
        figure.legend(loc="outside upper right", frameon=False)
    below.set(xlabel="class left; error bars: ± 2 standard errors")
    below.tick_params(axis="x", rotation=45 if max(map(len, names)) > 2 else 0)
    figure.savefig(paths[2], dpi=150)
    plt.close("all")
    return paths


def _heat_map(axes: Any, values: Tensor, names: list[str]) -> None:
    """Draw a matrix in colours with its numbers; cells that are 0 or NaN have no number."""
    shown = values.numpy()
    top = max(10.0, float(values.nan_to_num(nan=0.0).max()))
    axes.imshow(shown, cmap="viridis", vmin=0, vmax=top)
    for row, column in (values > 0).nonzero().tolist():
        value = float(values[row, column])
        colour = "black" if value > 0.6 * top else "white"
        text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize="small")
    axes.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 2 else 0)
    axes.set_yticks(range(len(names)), names)
