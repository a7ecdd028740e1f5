"""Adversarial training on few images overfits: robust accuracy falls, clean accuracy does not. Which stopper notices?

    python -m recipes.robust_overfitting
    python -m recipes.robust_overfitting --seeds 5 --figure robust_overfitting.png
    python -m recipes.robust_overfitting --folder DATA --epochs 50

Trains to the end, on 1,000 digits with 30 % wrong labels or on 4,000 images of CIFAR-10, and records when the drift
stopper and Lightning's EarlyStopping on clean accuracy would have stopped, and which epoch they would have chosen. In
every epoch PGD-20 attacks held-out images, which neither stopper sees, to show what these choices are worth. A seed
takes two minutes on digits and half an hour on CIFAR-10.
"""

from __future__ import annotations

import math

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from lightning_robust import (
    AdversarialAccuracy,
    FisherSpectralNorm,
    LinearizedAccuracy,
    ProbeMetric,
    RobustnessDriftStopping,
    RobustnessMonitor,
    WeightCurvatureIndex,
)
from recipes.common.cifar import CifarDataModule
from recipes.common.classifier import OverfittingClassifier
from recipes.common.command_line import parser
from recipes.common.digits import NoisyDigitsDataModule
from recipes.common.plotting import pyplot
from recipes.common.training import train_quietly

COLUMNS = {
    "PGD-20": "attack/adversarial_accuracy",
    "predicted": "robust/linearized_accuracy",
    "margin": "robust/linearized_margin_linf_clipped",
    "λ": "robust/fim_spectral_norm",
    "WCI": "robust/wci",
    "clean": "val_acc",
    "loss": "val_loss",
}
HIGHER_IS_BETTER = {"PGD-20": True, "predicted": True, "margin": True, "λ": False, "WCI": False}
HIGHER_IS_BETTER |= {"clean": True, "loss": False}


class Notes(Callback):
    """Records every epoch, and when each stopper would have stopped.

    Attributes:
        curves: Values of all epochs by column.
        stopped: Epoch of the stop and epoch of the best checkpoint by then, by stopper; only those that stopped.
    """

    def __init__(self, epsilon: float, stopper: RobustnessDriftStopping, early: EarlyStopping) -> None:
        self.suffix = f"_linf_{epsilon:.4g}"
        self.stopper, self.early = stopper, early
        self.curves: dict[str, list[float]] = {heading: [] for heading in COLUMNS}
        self.stopped: dict[str, tuple[int, int]] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record one epoch."""
        logged = trainer.callback_metrics
        for heading, key in COLUMNS.items():
            self.curves[heading].append(float(logged.get(key, logged.get(key + self.suffix, math.nan))))
        epoch = trainer.current_epoch
        if self.stopper.drifted and self.stopper.best_epoch is not None:
            self.stopped.setdefault("drift stopper", (epoch, self.stopper.best_epoch))
        if self.early.stopped_epoch:  # set later than this hook, at the end of the epoch
            stop = self.early.stopped_epoch
            self.stopped.setdefault("EarlyStopping", (stop, self.best("clean", until=stop)))

    def best(self, column: str, *, until: int | None = None) -> int:
        """Return the epoch with the best value in a column, up to and including an epoch."""
        values = self.curves[column][: None if until is None else until + 1]
        return values.index(max(values) if HIGHER_IS_BETTER[column] else min(values))

    def kept(self, epoch: int) -> float:
        """Return the accuracy under attack in an epoch, as a share of the best in any epoch."""
        return self.curves["PGD-20"][epoch] / max(self.curves["PGD-20"])

    def choice(self, who: str) -> tuple[int, int]:
        """Return the epoch after which a stopper stopped, or the last one, and the epoch that it chose."""
        column = "margin" if who == "drift stopper" else "clean"
        return self.stopped.get(who, (len(self.curves["clean"]) - 1, self.best(column)))


def train(seed: int, *, epochs: int, folder: str | None = None, curvature: bool = True) -> Notes:
    """Train one network to the end; without ``curvature`` (λ and WCI) it takes two thirds of the time."""
    data: NoisyDigitsDataModule | CifarDataModule
    if folder is None:
        epsilon = 0.1
        data = NoisyDigitsDataModule(seed=seed)
        model = OverfittingClassifier(seed=seed)
    else:
        epsilon = 4 / 255
        data = CifarDataModule(folder, seed=seed)
        model = OverfittingClassifier(0.02, epsilon, attack_steps=3, image_size=32, decay=False, seed=seed)
    metrics: list[ProbeMetric] = [LinearizedAccuracy([epsilon])]
    if curvature:
        metrics += [FisherSpectralNorm(), WeightCurvatureIndex()]
    stopper = RobustnessDriftStopping(action="warn")
    early = EarlyStopping("val_acc", mode="max", patience=stopper.patience)
    notes = Notes(epsilon, stopper, early)
    callbacks = [
        RobustnessMonitor(metrics, valid_range=(0, 1), max_samples=data.num_val),
        RobustnessMonitor(
            [AdversarialAccuracy([epsilon], steps=20)],
            dataloader_idx=1,
            max_samples=2000,
            log_key_prefix="attack/",
            valid_range=(0, 1),
        ),
        stopper,
        early,
        notes,
    ]
    options = {"min_epochs": epochs, "accelerator": "auto", "limit_val_batches": None}
    train_quietly(model, data, *callbacks, epochs=epochs, **options)
    return notes


def table(notes: Notes) -> str:
    """Return a row per epoch, when each stopper would have stopped, and what its choice is worth."""
    lines = ["epoch  " + "".join(f"{heading:>10}" for heading in COLUMNS)]
    for epoch, row in enumerate(zip(*notes.curves.values(), strict=True)):
        lines.append(f"{epoch:>5}  " + "".join(f"{value:>10.3f}" for value in row))
    oracle = notes.best("PGD-20")
    lines.append(f"\nBest accuracy under PGD-20: {max(notes.curves['PGD-20']):.3f}, in epoch {oracle}.")
    for who in ("drift stopper", "EarlyStopping"):
        stop, chosen = notes.choice(who)
        end = f"stops after epoch {stop} and chooses" if who in notes.stopped else "does not stop; its best is"
        lines.append(f"{who}: {end} epoch {chosen}, with {notes.kept(chosen):.1%} of that accuracy.")
    others = (f"{column} {notes.kept(notes.best(column)):.1%}" for column in COLUMNS if column != "PGD-20")
    return "\n".join([*lines, f"Choosing the best epoch of the whole run by one column keeps: {', '.join(others)}."])


def draw(notes: Notes, path: str) -> None:
    """Draw the curves, the stops and the chosen epochs."""
    plt = pyplot()
    figure, (above, below) = plt.subplots(2, figsize=(7, 6), sharex=True, layout="constrained")
    for column, label in {"clean": "clean", "PGD-20": "PGD-20, held out", "predicted": "predicted, no attack"}.items():
        above.plot(notes.curves[column], label=label)
    above.set(ylabel="accuracy", ylim=(0, 1))
    for column in ("margin", "λ", "WCI"):
        values = notes.curves[column]
        below.plot([value / max(values) for value in values], label=column)
    below.set(xlabel="epoch", ylabel="share of its maximum", ylim=(0, 1.05))
    for who, colour in (("drift stopper", "black"), ("EarlyStopping", "tab:red")):
        stop, chosen = notes.choice(who)
        above.axvline(stop, color=colour, linestyle=":", label=f"{who} stops")
        above.axvline(chosen, color=colour, label=f"… with epoch {chosen}")
        below.axvline(stop, color=colour, linestyle=":")
        below.axvline(chosen, color=colour)
    above.legend(frameon=False, fontsize="small", loc="lower right", ncols=2)
    below.legend(frameon=False, fontsize="small", loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Train once per seed and print a table of each run."""
    arguments = parser(__doc__)
    arguments.add_argument("--epochs", type=int, default=80, help="epochs of each run")
    arguments.add_argument("--seeds", type=int, default=1, help="number of runs")
    arguments.add_argument("--folder", help="folder with CIFAR-10 files; without it, digits")
    arguments.add_argument("--figure", help="file to draw the first run into")
    options = arguments.parse_args()
    print(
        "\nPGD-20: accuracy under attack on held-out images. The other columns are measured on validation images:\n"
        "predicted: predicted accuracy under attack; margin: mean distance to the linearised decision boundary,\n"
        "clipped (the drift stopper follows it); λ: Fisher norm; WCI: Weight-Curvature Index; clean: accuracy\n"
        "(EarlyStopping follows it); loss: cross-entropy."
    )
    for seed in range(options.seeds):
        notes = train(seed, epochs=options.epochs, folder=options.folder)
        print(f"\nseed {seed}\n\n{table(notes)}", flush=True)
        if options.figure and seed == 0:
            draw(notes, options.figure)


if __name__ == "__main__":
    main()
