"""Which classes are far from a change of class, and which stand in the way? The study of "The Myth of Robust Classes".

    python -m recipes.class_shielding
    python -m recipes.class_shielding --config configs/class_shielding_cifar10.yaml --images … --weights …

Traces Fisher–Rao paths from images of every class towards every other class, and counts which class they enter first.
By default it trains a small CNN on the digits of scikit-learn; any other network, weights and images can be named.
"""

from __future__ import annotations

import re
from argparse import Action
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import DefaultHelpFormatter, auto_cli
from torch import Tensor, nn
from tqdm import tqdm

from lightning_robust.functional import FisherRaoPaths, class_shielding, trace_fisher_rao_paths
from recipes.class_shielding.figures import draw
from recipes.class_shielding.report import legend, summary, table, write_csv
from recipes.common.classifier import DigitsClassifier
from recipes.common.digits import DigitsDataModule
from recipes.common.images import evenly, normalised, read_images
from recipes.common.networks import initialised, with_weights
from recipes.common.training import train_quietly

GROUP = 20  # images between two updates of the progress bar


class ShortHelp(DefaultHelpFormatter):
    """Help without the list of all subclasses of ``nn.Module``, of which torch alone has hundreds."""

    def _get_help_string(self, action: Action) -> str:
        return re.sub(r", known subclasses: [^)]*", "", super()._get_help_string(action))


def trace(
    network: nn.Module, inputs: Tensor, targets: Tensor, *, quiet: bool = False, **options: Any
) -> FisherRaoPaths:
    """Trace paths from all images towards all other classes, with a progress bar."""
    groups = zip(torch.split(inputs, GROUP), torch.split(targets, GROUP), strict=True)
    with tqdm(total=len(inputs), unit=" images", disable=quiet, desc="tracing") as bar:
        parts = []
        for x, y in groups:
            parts.append(trace_fisher_rao_paths(network, x, labels=y, **options))
            bar.update(len(x))
    return FisherRaoPaths.joined(parts)


def digits_to_study(num_images: int, *, epochs: int, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Train a network on digits, and return it with validation images and their classes."""
    data, model = DigitsDataModule(seed=seed), DigitsClassifier(dropout=0.0)
    initialised(model, seed=seed)
    train_quietly(model, data, epochs=epochs)
    images, labels = data.val_set.tensors
    return model.network, *evenly(images, labels, num_images)


def study(
    network: nn.Module | None = None,
    weights: str | None = None,
    images: str | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    class_names: list[str] | None = None,
    num_images: int = 200,
    mode: Literal["path", "unit_steps"] = "path",
    damping: float | None = None,
    max_steps: int = 100,
    solver: Literal["gram", "cg"] = "gram",
    folder: str = "runs/class_shielding",
    epochs: int = 12,
    seed: int = 0,
) -> None:
    """Trace Fisher–Rao paths between classes, count which class they enter first, print tables and draw figures.

    Args:
        network: Class path of any classifier, with --images; by default a small CNN is trained on digits.
        weights: File with the network's weights (a state dict or checkpoint), which are assigned in its order.
        images: File (npz) with arrays ``x``, bytes (N, S, S) or (N, S, S, 3), and ``y``, classes.
        mean: Mean per channel that is subtracted from images in [0, 1].
        std: Standard deviation per channel that they are divided by after that.
        class_names: Names of the classes, in order.
        num_images: Number of images, spread evenly over the classes.
        mode: ``path`` measures lengths of paths; ``unit_steps`` counts natural-gradient steps of length 1.
        damping: λ of the natural gradient, see ``trace_fisher_rao_paths``.
        max_steps: Number of steps after which a path is given up.
        solver: How steps are solved for, see ``trace_fisher_rao_paths``.
        folder: Folder that figures and the table are written into.
        epochs: Epochs of the training on digits.
        seed: Seed of the training on digits.
    """
    if (network is None) != (images is None) or (network is None and (weights or mean or std)):
        raise ValueError(
            "Expected --network and --images together (--weights, --mean and --std go with them), or none of them."
        )
    if std is not None and not all(scale > 0 for scale in std):
        raise ValueError(f"Expected --std to be positive, but got {std}.")
    if network is None or images is None:
        network, inputs, targets = digits_to_study(num_images, epochs=epochs, seed=seed)
    else:
        given, targets = evenly(*read_images(images), num_images)
        inputs = normalised(given, mean, std)
        if weights is None:
            print(f"Without --weights, {type(network).__name__} keeps the weights that its constructor gave it.")
        network = network if weights is None else with_weights(network, Path(weights))
    units: dict[str, Any] = {"input_mean": mean, "input_std": std, "valid_range": (0.0, 1.0)}
    options: dict[str, Any] = {"mode": mode, "damping": damping, "max_steps": max_steps, "solver": solver}
    with torch.no_grad():
        logits = network.eval()(inputs)
    num_classes, num_correct = logits.shape[1], int((logits.argmax(dim=1) == targets).sum())
    names = class_names or [str(c) for c in range(num_classes)]
    if len(names) != num_classes:
        raise ValueError(f"Expected {num_classes} names in --class_names, as many as classes, but got {len(names)}.")
    share = 100 * num_correct / len(targets)
    print(f"{len(targets)} images, {num_correct} of them classified correctly ({share:.1f} %).")
    print(f"From each of these, {num_classes - 1} paths lead towards the other classes.")
    paths = trace(network, inputs, targets, **units, **options)
    found = class_shielding(paths, num_classes)
    print(f"\n{table(found, names, mode=mode)}\n\n{legend(mode=mode)}\n\n{summary(found, paths, names)}\n")
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_csv(found, names, Path(folder) / "classes.csv")
    print("Written:")
    for path in (Path(folder) / "classes.csv", *draw(found, names, Path(folder), mode=mode)):
        print(f"  {path}")


if __name__ == "__main__":
    auto_cli(study, as_positional=False, formatter_class=ShortHelp)
