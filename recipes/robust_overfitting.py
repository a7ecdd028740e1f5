"""Adversarial training on few images overfits: robust accuracy falls while clean accuracy stands. Who notices?

    python -m recipes.robust_overfitting
    python -m recipes.robust_overfitting --seeds 5 --figure robust_overfitting.png
    python -m recipes.robust_overfitting --folder DATA --epochs 50

Trains to the end, on 1,000 digits with 30 % wrong labels or on 4,000 images of CIFAR-10, with the drift stopper and,
beside it, plain EarlyStopping on clean accuracy, and takes down when they would have stopped. PGD-20 attacks images
that neither has seen, in every epoch, to say what their choices are worth. Two minutes per seed on digits, half an hour
on CIFAR-10.
"""

from __future__ import annotations

import argparse
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
from recipes.common.digits import NoisyDigitsDataModule

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
    """Takes down every epoch, and which epoch the stopper and EarlyStopping would have left.

    Attributes:
        curves: A list per column.
        stopped: Epoch of the stop, and epoch of the checkpoint that is best by then, by who stopped.
    """

    def __init__(self, epsilon: float, stopper: RobustnessDriftStopping, early: EarlyStopping) -> None:
        self.suffix = f"_linf_{epsilon:.4g}"
        self.stopper, self.early = stopper, early
        self.curves: dict[str, list[float]] = {heading: [] for heading in COLUMNS}
        self.stopped: dict[str, tuple[int, int]] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take down an epoch."""
        logged = trainer.callback_metrics
        for heading, key in COLUMNS.items():
            self.curves[heading].append(float(logged.get(key, logged.get(key + self.suffix, math.nan))))
        epoch = trainer.current_epoch
        if self.stopper.drifted and self.stopper.best_epoch is not None:
            self.stopped.setdefault("drift stopper", (epoch, self.stopper.best_epoch))
        if self.early.stopped_epoch:  # it looks after this hook, at the end of the epoch
            stop = self.early.stopped_epoch
            self.stopped.setdefault("EarlyStopping", (stop, self.best("clean", until=stop)))

    def best(self, column: str, *, until: int | None = None) -> int:
        """The epoch that is best by one column, up to an epoch."""
        values = self.curves[column][: None if until is None else until + 1]
        return values.index(max(values) if HIGHER_IS_BETTER[column] else min(values))

    def kept(self, epoch: int) -> float:
        """Share of the best accuracy under attack, of any epoch, that there is in this one."""
        return self.curves["PGD-20"][epoch] / max(self.curves["PGD-20"])

    def choice(self, who: str) -> tuple[int, int]:
        """When a stopper stopped, or the last epoch, and the epoch that it chose."""
        column = "margin" if who == "drift stopper" else "clean"
        return self.stopped.get(who, (len(self.curves["clean"]) - 1, self.best(column)))


def train(seed: int, *, epochs: int, folder: str | None = None, curvature: bool = True) -> Notes:
    """Train one network to the end; without λ and WCI, if wanted, in two thirds of the time."""
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
    trainer = Trainer(
        max_epochs=epochs,
        min_epochs=epochs,
        accelerator="auto",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=data)
    return notes


def table(notes: Notes) -> str:
    """Every epoch, and what became of the choices."""
    lines = ["epoch  " + "".join(f"{heading:>10}" for heading in COLUMNS)]
    for epoch, row in enumerate(zip(*notes.curves.values(), strict=True)):
        lines.append(f"{epoch:>5}  " + "".join(f"{value:>10.3f}" for value in row))
    oracle = notes.best("PGD-20")
    lines.append(f"\nbest under attack: {max(notes.curves['PGD-20']):.3f} in epoch {oracle}")
    for who in ("drift stopper", "EarlyStopping"):
        stop, chosen = notes.choice(who)
        lines.append(f"{who}: stops after epoch {stop} with epoch {chosen}, which keeps {notes.kept(chosen):.1%}")
    others = (f"{column} {notes.kept(notes.best(column)):.1%}" for column in COLUMNS if column != "PGD-20")
    return "\n".join([*lines, "kept by the best epoch of the whole run by: " + ", ".join(others)])


def draw(notes: Notes, path: str) -> None:
    """Draw the curves, and the epochs that were chosen."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

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


def main() -> None:
    """Train, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=1, help="how many runs")
    parser.add_argument("--folder", help="with CIFAR-10; digits by default")
    parser.add_argument("--figure", help="also draw the first run, into this file")
    options = parser.parse_args()
    for seed in range(options.seeds):
        notes = train(seed, epochs=options.epochs, folder=options.folder)
        print(f"\nseed {seed}\n\n{table(notes)}", flush=True)
        if options.figure and seed == 0:
            draw(notes, options.figure)


if __name__ == "__main__":
    main()
