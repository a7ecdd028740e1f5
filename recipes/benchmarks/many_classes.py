"""What does the input side cost with many classes, in forward passes of the same batch?

    python -m recipes.benchmarks.many_classes --classes 10 100 1000

Measures CPU time of one thread on EfficientNet-Lite0 and photographs (see recipes/common/imagenet.py). With fewer than
1,000 classes it has those of the photographs, and others up to the number. Each round times a forward pass and what
follows right after each other, so that a busy machine slows all, and ratios are medians over rounds. ``--exact`` adds
the gradients of all classes, once: half a minute per image with 1,000 classes.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust import FisherSpectralNorm, LinearizedAccuracy, Probe
from lightning_robust.functional import fim_spectral_norm, fit_temperature, linearize
from recipes.benchmarks.timing import cpu_seconds, median_and_range
from recipes.common import imagenet
from recipes.common.command_line import parser

# An epoch of ImageNet: a training step takes a forward pass, and a backward pass twice as long.
_EPOCH = 1_281_167 * 3
_MEASURED = 256  # samples of a default measurement


class SomeClasses(torch.nn.Module):
    """A network with some of its classes."""

    def __init__(self, network: torch.nn.Module, classes: Tensor) -> None:
        super().__init__()
        self.network, self.classes = network, classes

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C) of these classes."""
        logits: Tensor = self.network(x)
        return logits[:, self.classes]


def measure(
    network: torch.nn.Module, images: Tensor, classes: Tensor, num_classes: int, *, rounds: int, exact: bool
) -> None:
    """Measure and print one number of classes."""
    own, labels = torch.unique(classes, return_inverse=True)
    if len(own) > num_classes:
        raise ValueError(f"Expected --classes of at least {len(own)}, those of the photographs, but got {num_classes}.")
    others = torch.tensor(sorted(set(range(1000)) - set(own.tolist())))
    model = SomeClasses(network, torch.cat([own, others])[:num_classes]).eval()

    def probe() -> Probe:
        return Probe(
            model,
            images,
            labels,
            input_std=imagenet.STD,
            input_mean=imagenet.MEAN,
            valid_range=(0, 1),
            linearization="krylov",
        )

    def forward() -> None:
        with torch.no_grad():
            model(images)

    def everything() -> None:
        shared = probe()
        for metric in (FisherSpectralNorm(), LinearizedAccuracy()):
            metric.update(shared)
            metric.compute()

    works: dict[str, Callable[[], object]] = {
        "λ at two temperatures, and trace": lambda: FisherSpectralNorm().update(probe()),
        "margins to the ten most probable": lambda: LinearizedAccuracy().update(probe()),
        "both, as the monitor takes them": everything,
    }
    forward()
    everything()  # warm up
    plain: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            plain.append(cpu_seconds(forward))
            ratios[name].append(cpu_seconds(work) / plain[-1])
    information = probe().information
    print(f"EfficientNet-Lite0, {num_classes} classes, {len(images)} photographs, one CPU thread, in forward passes")
    print(f"  forward pass of the batch         {statistics.median(plain):.2f} s")
    print(f"  products with the Jacobian        {information.num_products.double().mean():.1f} per sample")
    for name, found in ratios.items():
        print(f"  {name}  {median_and_range(found)}")
    share = _MEASURED * statistics.median(ratios["both, as the monitor takes them"]) / _EPOCH
    print(f"  {_MEASURED} samples of an epoch of ImageNet  {share:.2%}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  memory of the process so far, at its peak  {peak:.2f} GB")
    if exact:
        _against_exact(model, images, labels, information.value, plain=statistics.median(plain))


def _against_exact(model: torch.nn.Module, images: Tensor, labels: Tensor, found: Tensor, *, plain: float) -> None:
    parts: list[Tensor] = []

    def norms() -> None:
        for image in torch.split(images, 1):
            linearization = linearize(model, image, input_std=imagenet.STD)
            at = (fitted, 1.0)
            each = [fim_spectral_norm(linearization.logits, linearization.gram, temperature=t) for t in at]
            parts.append(torch.stack(each))

    with torch.no_grad():
        fitted = float(fit_temperature(model(images), labels))
    ratio = cpu_seconds(norms) / plain
    shares = found / torch.cat(parts, dim=1)
    print(f"  exact λ  {ratio:.0f}; share of it that is found  least {shares.min():.4f}, median {shares.median():.4f}")


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--classes", type=int, nargs="+", default=[1000], help="numbers of classes")
    arguments.add_argument("--batch-size", type=int, default=8, help="photographs in the batch")
    arguments.add_argument("--rounds", type=int, default=5, help="rounds of measurements")
    arguments.add_argument("--exact", action="store_true", help="take the gradients of all classes, too")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    network, (images, classes) = imagenet.efficientnet_lite0(), imagenet.photographs()
    some = torch.arange(0, len(images), max(1, len(images) // options.batch_size))[: options.batch_size]
    images = imagenet.normalised(images[some])
    with torch.no_grad():
        classes = network(images).argmax(dim=1) if classes is None else classes[some]
    for num_classes in options.classes:
        measure(network, images, classes, num_classes, rounds=options.rounds, exact=options.exact)


if __name__ == "__main__":
    main()
