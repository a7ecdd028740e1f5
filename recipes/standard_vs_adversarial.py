"""Does the monitor tell a robust network from an accurate one, and does it predict what an attack finds?

    python -m recipes.standard_vs_adversarial
    python -m recipes.standard_vs_adversarial --figure curves.png

Trains the digits CNN twice with the same budget, once on the images as they are and once on attacked ones, and measures
both on the same validation images: Fisher norms, and predicted accuracy beside the accuracy under PGD-20. About 30 s.
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import Trainer

from lightning_robust import AdversarialAccuracy, FisherSpectralNorm, LinearizedAccuracy, Probe
from lightning_robust.functional import linearized_accuracy
from recipes.common.classifier import DigitsClassifier
from recipes.common.digits import DigitsDataModule
from recipes.common.networks import initialised

EPSILONS = (0.02, 0.05, 0.1)


def train(attack_epsilon: float, *, epochs: int, seed: int) -> DigitsClassifier:
    """Train one classifier, quietly."""
    model = DigitsClassifier(dropout=0.0, attack_epsilon=attack_epsilon)
    initialised(model, seed=seed)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=DigitsDataModule(seed=seed))
    return model


def validation_probe(model: DigitsClassifier, *, num_samples: int) -> Probe:
    """The samples on which everything is measured."""
    data = DigitsDataModule()
    data.setup("validate")
    images, labels = data.val_set.tensors
    return Probe(model, images[:num_samples], labels[:num_samples], valid_range=(0.0, 1.0))


def measure(probe: Probe) -> dict[str, float]:
    """Measure one classifier, predicted and attacked on the same samples."""
    values: dict[str, torch.Tensor] = {}
    for metric in (
        FisherSpectralNorm(),
        LinearizedAccuracy((0.0, *EPSILONS)),
        AdversarialAccuracy(EPSILONS, steps=20),
    ):
        metric.update(probe)
        values |= metric.compute()
    return {key: float(value) for key, value in values.items()}


def table(standard: dict[str, float], adversarial: dict[str, float]) -> str:
    """Both classifiers side by side."""
    rows = [
        ("clean accuracy", "linearized_accuracy_linf_0"),
        ("Fisher norm λ, mean", "fim_spectral_norm"),
        ("Fisher norm λ, calibrated mean", "fim_spectral_norm_calibrated"),
    ]
    for epsilon in EPSILONS:
        rows.append((f"accuracy at L∞ {epsilon:g}: predicted", f"linearized_accuracy_linf_{epsilon:.4g}"))
        rows.append((f"accuracy at L∞ {epsilon:g}: PGD-20", f"adversarial_accuracy_linf_{epsilon:.4g}"))
    lines = [f"{'':36}{'standard':>18}{'adversarial':>18}"]
    for heading, key in rows:
        cells = (f"{values[key]:.3f} ± {values[key + '_stderr']:.3f}" for values in (standard, adversarial))
        lines.append(f"{heading:36}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def draw(probes: dict[str, Probe], path: str) -> None:
    """Draw the predicted accuracy as a curve over ε, and what PGD-20 finds as points with error bars."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    curve, points = torch.linspace(0, 0.2, 101), torch.linspace(0.02, 0.2, 10)
    for name, probe in probes.items():
        predicted = LinearizedAccuracy(curve.tolist())
        attacked = AdversarialAccuracy(points.tolist(), steps=20)
        for metric in (predicted, attacked):
            metric.update(probe)
            metric.compute()
        n = len(probe)
        values = linearized_accuracy(predicted.per_sample["linearized_margin_linf"], curve)
        (line,) = axes.plot(curve, values, label=f"{name} training, predicted")
        error = (values * (1 - values) / n).sqrt()
        axes.fill_between(curve, values - 2 * error, values + 2 * error, color=line.get_color(), alpha=0.2, linewidth=0)
        values = torch.stack([correct.mean() for correct in attacked.per_sample.values()])
        error = 2 * (values * (1 - values) / n).sqrt()
        label = f"{name} training, PGD-20"
        axes.errorbar(points, values, error, fmt="o", markersize=4, color=line.get_color(), label=label)
    axes.set(xlabel="ε (L∞, pixels from 0 to 1)", ylabel="robust accuracy", ylim=(0, 1), xlim=(0, 0.205))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--attack-epsilon", type=float, default=0.1)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", help="also draw predicted and attacked accuracy over ε, into this file")
    options = parser.parse_args()
    probes = {}
    for name, epsilon in (("standard", 0.0), ("adversarial", options.attack_epsilon)):
        model = train(epsilon, epochs=options.epochs, seed=options.seed)
        probes[name] = validation_probe(model, num_samples=options.num_samples)
    standard, adversarial = map(measure, probes.values())
    print(f"\n{options.num_samples} validation images, mean ± standard error\n\n{table(standard, adversarial)}")
    if options.figure:
        draw(probes, options.figure)
        print(f"\nPredicted and attacked accuracy over ε: {options.figure}")


if __name__ == "__main__":
    main()
