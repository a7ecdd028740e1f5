"""Does the monitor tell a robust network from an accurate one, and does it predict what an attack finds?

    python -m recipes.standard_vs_adversarial
    python -m recipes.standard_vs_adversarial --figure curves.png

Trains the digits CNN twice with the same budget, on clean and on attacked images, and measures both on the same
validation images: Fisher norms, and predicted accuracy beside the accuracy under PGD-20. Takes about 30 seconds.
"""

from __future__ import annotations

import torch

from lightning_robust import AdversarialAccuracy, FisherSpectralNorm, LinearizedAccuracy, Probe
from lightning_robust.functional import linearized_accuracy
from recipes.common.classifier import DigitsClassifier
from recipes.common.command_line import parser
from recipes.common.digits import DigitsDataModule, validation_digits
from recipes.common.networks import initialised
from recipes.common.plotting import pyplot
from recipes.common.training import train_quietly

EPSILONS = (0.02, 0.05, 0.1)


def train(attack_epsilon: float, *, epochs: int, seed: int) -> DigitsClassifier:
    """Train one classifier, on attacked images if ε is positive."""
    model = DigitsClassifier(dropout=0.0, attack_epsilon=attack_epsilon)
    initialised(model, seed=seed)
    train_quietly(model, DigitsDataModule(seed=seed), epochs=epochs)
    return model


def validation_probe(model: DigitsClassifier, *, num_samples: int) -> Probe:
    """Return a probe of a classifier on the first validation images."""
    return Probe(model, *validation_digits(num_samples), valid_range=(0.0, 1.0))


def measure(probe: Probe) -> dict[str, float]:
    """Measure one classifier: Fisher norms, predicted accuracy and accuracy under attack, on the same samples."""
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
    """Return both classifiers side by side."""
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
    """Draw predicted accuracy over ε as curves, and accuracy under PGD-20 as points, with ± 2 standard errors."""
    plt = pyplot()
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
    plt.close(figure)


def main() -> None:
    """Train both classifiers, measure them and print a table."""
    arguments = parser(__doc__)
    arguments.add_argument("--epochs", type=int, default=12, help="epochs of each training")
    arguments.add_argument("--attack-epsilon", type=float, default=0.1, help="L∞ radius of adversarial training")
    arguments.add_argument("--num-samples", type=int, default=500, help="validation images, 500 at most")
    arguments.add_argument("--seed", type=int, default=0, help="seed of the weights and of the batches")
    arguments.add_argument("--figure", help="file to draw predicted and attacked accuracy over ε into")
    options = arguments.parse_args()
    probes = {}
    for name, epsilon in (("standard", 0.0), ("adversarial", options.attack_epsilon)):
        model = train(epsilon, epochs=options.epochs, seed=options.seed)
        probes[name] = validation_probe(model, num_samples=options.num_samples)
    standard, adversarial = map(measure, probes.values())
    count = len(probes["standard"])
    print(f"\nStandard and adversarial training, measured on {count} validation images, ± one standard error:\n")
    print(table(standard, adversarial))
    print("\nHigher accuracy and lower λ are better. PGD-20 attacks the images; the prediction runs no attack.")
    if options.figure:
        draw(probes, options.figure)
        print(f"\nThe figure of predicted and attacked accuracy over ε is in {options.figure}.")


if __name__ == "__main__":
    main()
