"""Does the monitor predict attacks? Compares every logged statistic with PGD-20 and a strong attack, on many networks.

    python -m recipes.validity                              # trains 15 classifiers of digits
    python -m recipes.validity --zoo epochs                 # epochs of one run that overfits robustly
    python -m recipes.validity --zoo digits --folder runs   # checkpoints of earlier runs of the digits recipes
    python -m recipes.validity --zoo cifar --folder DATA/models --figure validity.png

The strong attack maximises cross-entropy and the difference of logits ratio, three times each from random points, in 60
steps that decay to zero: 360 forward and backward passes. A sample that any of them fools counts as fooled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_robust import (
    AdversarialAccuracy,
    FisherSpectralNorm,
    HessianTrace,
    LinearizedAccuracy,
    Probe,
    ProbeMetric,
    WeightCurvatureIndex,
)
from lightning_robust.functional import pgd
from recipes.common import zoo
from recipes.common.command_line import parser
from recipes.common.plotting import pyplot
from recipes.common.statistics import interval, spearman

Row = dict[str, float]
DETAILS = ("_stderr", "_lower", "_upper", "_probes", "_layers")


def strong_accuracy(probe: Probe, epsilon: float, *, steps: int = 60, restarts: int = 3) -> float:
    """Return the accuracy under the strong attack."""
    standing = probe.logits(probe.inputs).argmax(dim=1) == probe.targets
    for seed in range(restarts):
        for loss in ("cross_entropy", "dlr"):
            rows = standing.nonzero()[:, 0]
            if not len(rows):
                return 0.0
            attacked = pgd(
                probe.model,
                probe.inputs[rows],
                probe.targets[rows],
                epsilon=epsilon,
                steps=steps,
                loss=loss,
                schedule="cosine",
                valid_range=probe.valid_range,
                input_mean=probe.input_mean,
                input_std=probe.input_std,
                generator=torch.Generator().manual_seed(seed),
            )
            standing[rows] &= probe.logits(attacked).argmax(dim=1) == probe.targets[rows]
    return float(standing.float().mean())


def measure(probe: Probe, epsilons: Sequence[float]) -> Row:
    """Return what the monitor logs of one classifier, and its accuracy under PGD-20 and the strong attack."""
    metrics: list[ProbeMetric] = [LinearizedAccuracy(epsilons), LinearizedAccuracy(epsilons, order=2)]
    metrics += [FisherSpectralNorm(), HessianTrace(), WeightCurvatureIndex(), AdversarialAccuracy(epsilons, steps=20)]
    row: Row = {}
    for metric in metrics:
        metric.update(probe)
        row |= {key: float(value) for key, value in metric.compute().items() if not key.endswith(DETAILS)}
    row = {key: value for key, value in row.items() if "/" not in key}
    return row | {f"strong_accuracy_linf_{epsilon:.4g}": strong_accuracy(probe, epsilon) for epsilon in epsilons}


def correlations(rows: list[Row], epsilon: float) -> list[str]:
    """Return Spearman's correlation of each statistic with accuracy under attack at one ε, the strongest first."""
    lines = []
    for key in (key for key in rows[0] if not key.startswith(("strong", "adversarial"))):
        values = torch.tensor([row.get(key, torch.nan) for row in rows]).clamp_max(1e9)
        cells = []
        for attack in ("strong", "adversarial"):
            target = torch.tensor([row[f"{attack}_accuracy_linf_{epsilon:.4g}"] for row in rows])
            statistic = partial(_spearman_of, values, target)
            rho, low, high = interval(statistic, len(rows))
            cells.append((rho, f"{rho:>6.2f} [{low:>5.2f}, {high:>5.2f}]"))
        lines.append((abs(cells[0][0]), f"{key:<42}{cells[0][1]:>24}{cells[1][1]:>24}"))
    heading = f"{'Spearman with accuracy at ε = ' + f'{epsilon:.4g}':<42}{'strong attack':>24}{'PGD-20':>24}"
    return [heading, *(line for _, line in sorted(lines, reverse=True))]


def _spearman_of(values: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """Return the rank correlation over some rows; 0 where one side is constant."""
    return spearman(values[rows], target[rows]).nan_to_num(0.0)


def differences(rows: list[Row], epsilons: Sequence[float]) -> list[str]:
    """Return how far predictions and PGD-20 are from the strong attack, in percentage points."""
    lines = [f"{'percentage points above strong attack':<42}{'mean absolute':>24}{'signed mean':>24}{'worst':>8}"]
    for kind in ("linearized", "linearized_order2", "adversarial"):
        for epsilon in (*epsilons, None):
            chosen = epsilons if epsilon is None else [epsilon]
            keys = [f"accuracy_linf_{e:.4g}" for e in chosen]
            gaps = torch.tensor([[100 * (row[f"{kind}_{key}"] - row[f"strong_{key}"]) for key in keys] for row in rows])
            absolute = "{:.1f} [{:.1f}, {:.1f}]".format(*interval(lambda i, g=gaps: g[i].abs().mean(), len(rows)))  # type: ignore[misc]
            signed = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*interval(lambda i, g=gaps: g[i].mean(), len(rows)))  # type: ignore[misc]
            name = f"{kind}, {'all ε' if epsilon is None else f'ε = {epsilon:.4g}'}"
            lines.append(f"{name:<42}{absolute:>24}{signed:>24}{float(gaps.abs().max()):>8.1f}")
    return lines


def draw(rows: dict[str, Row], epsilons: Sequence[float], path: str) -> None:
    """Draw predicted against attacked accuracy, with a colour per ε."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(8, 4), sharey=True, layout="constrained")
    for axes, (kind, title) in zip(
        panels, {"linearized": "order 1", "linearized_order2": "order 2"}.items(), strict=True
    ):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
        for epsilon in epsilons:
            key = f"accuracy_linf_{epsilon:.4g}"
            x, y = ([row[f"{name}_{key}"] for row in rows.values()] for name in ("strong", kind))
            axes.scatter(x, y, s=18, label=f"ε = {epsilon:.3g}")
        axes.set(xlabel="accuracy under the strong attack", title=title, xlim=(-0.02, 1), ylim=(-0.02, 1))
    panels[0].set(ylabel="predicted without an attack")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure a zoo of classifiers, print tables and draw."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--zoo", choices=("digits", "epochs", "cifar"), default="digits", help="classifiers to measure"
    )
    arguments.add_argument("--folder", help="folder of checkpoints, in place of training; needed by --zoo cifar")
    arguments.add_argument("--num-samples", type=int, default=300, help="images per classifier")
    arguments.add_argument("--figure", help="file to draw predicted against attacked accuracy into")
    options = arguments.parse_args()
    if options.zoo == "cifar" and not options.folder:
        arguments.error("--zoo cifar needs --folder, a folder of weights")
    epsilons: Sequence[float] = (0.02, 0.05, 0.1)
    probes: Iterable[tuple[str, Probe]]
    if options.zoo == "cifar":
        epsilons = (1 / 255, 2 / 255, 4 / 255, 8 / 255)
        probes = zoo.cifar_classifiers(options.folder, num_samples=options.num_samples)
    elif options.folder:
        probes = zoo.digits_checkpoints(options.folder, num_samples=options.num_samples)
    else:
        train = zoo.digits_zoo if options.zoo == "digits" else zoo.epochs_of_one_run
        probes = train(num_samples=options.num_samples)
    rows: dict[str, Row] = {}
    print("Accuracy: predicted, predicted with order=2, and measured under the strong attack\n")
    print(f"{'':<28}" + "".join(f"{f'ε = {epsilon:.4g}':>22}" for epsilon in epsilons))
    for name, probe in probes:
        rows[name] = row = measure(probe, epsilons)
        keys = [f"accuracy_linf_{epsilon:.4g}" for epsilon in epsilons]
        cells = (
            f"{row[f'linearized_{key}']:.3f} {row[f'linearized_order2_{key}']:.3f} {row[f'strong_{key}']:.3f}"
            for key in keys
        )
        print(f"{name:<28}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
    middle = epsilons[len(epsilons) // 2]
    print("\n".join(["", *differences(list(rows.values()), epsilons), "", *correlations(list(rows.values()), middle)]))
    if options.figure:
        draw(rows, epsilons, options.figure)


if __name__ == "__main__":
    main()
