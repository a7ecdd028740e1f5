"""How many Fisher–Rao paths per second, against a plain loop over paths with conjugate gradients?

    python -m recipes.benchmarks.fisher_rao
    python -m recipes.benchmarks.fisher_rao --images DATA/cifar10_test_1000_dev.npz --weights DATA/…_resnet20.pth

CPU time of one thread, each round timing the two one after the other, so that a busy machine slows both; medians over
rounds. The loop is what one writes first: one path after the other, Euler steps, each by conjugate gradients with
products of the Fisher matrix from torch.func, the crossing by bisection. Its steps are half as long, because Euler's
method takes that to be as accurate; how accurate both are is measured against steps eight times shorter.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp

from lightning_robust.functional import fisher_rao_distance, trace_fisher_rao_paths
from recipes.benchmarks.linearize import cpu_seconds
from recipes.common.images import evenly, normalised, read_images
from recipes.common.networks import CifarResNet, initialised
from recipes.common.zoo import IMAGENET, with_weights

# of the loop: half of the defaults of the package
STEP_LENGTH, SHARE_OF_THE_WAY, HALVINGS = 0.2, 0.125, 20
_RESIDUAL, _ITERATIONS = 1e-5, 40


def natural_step(
    logits_of: Callable[[Tensor], Tensor], x: Tensor, contrast: Tensor, damping: float, longest: float
) -> Tensor:
    """One step of a single path, (1, ...): ``(G + λI)⁻¹ g`` by conjugate gradients, cut to its length."""
    z, pull = vjp(logits_of, x)[:2]
    p = z.softmax(dim=1)

    def metric(u: Tensor) -> Tensor:
        result: Tensor = p * (u - (p * u).sum())
        return result

    def change(v: Tensor) -> Tensor:
        result: Tensor = jvp(logits_of, (x,), (v,))[1]
        return result

    (gradient,) = pull(contrast)
    direction, residual = torch.zeros_like(gradient), gradient
    search, squared = residual, residual.square().sum()
    enough = _RESIDUAL**2 * squared
    for _ in range(_ITERATIONS):
        if squared <= enough:
            break
        image = pull(metric(change(search)))[0] + damping * search
        length = squared / (search * image).sum()
        direction, residual = direction + length * search, residual - length * image
        before, squared = squared, residual.square().sum()
        search = residual + squared / before * search
    along = change(direction)
    speed = (along * metric(along)).sum().clamp_min(0).sqrt()
    return torch.minimum(STEP_LENGTH / speed, longest / direction.norm()) * direction


def one_path(network: nn.Module, x: Tensor, source: int, target: int, *, max_steps: int) -> float:
    """Length of the path of one image, (1, ...), towards one of ten classes."""

    def logits_of(points: Tensor) -> Tensor:
        logits: Tensor = network(points)
        return logits

    start, contrast = x, torch.zeros(1, 10)
    contrast[0, source], contrast[0, target] = 1.0, -1.0
    z, pull = vjp(logits_of, x)[:2]
    slope = float(pull(contrast)[0].square().sum())
    damping, longest = slope / 400, SHARE_OF_THE_WAY * (float((z * contrast).sum()) + 1) / slope**0.5
    before, total = z.softmax(dim=1), 0.0
    for _ in range(max_steps):
        end = start - natural_step(logits_of, start, contrast, damping, longest)
        with torch.no_grad():
            crossed = int(network(end).argmax()) != source
            if crossed:
                for _ in range(HALVINGS):
                    half = (start + end) / 2
                    start, end = (start, half) if int(network(half).argmax()) != source else (half, end)
            after = network(end).softmax(dim=1)
        total += float(fisher_rao_distance(before, after))
        if crossed:
            break
        start, before = end, after
    return total


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=10)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=100, help="of a path; the loop takes twice as many")
    parser.add_argument("--images", help="file with arrays x and y; random ones by default")
    parser.add_argument("--weights", help="of the network; random ones by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    network = initialised(CifarResNet(options.depth), seed=0).eval().requires_grad_(requires_grad=False)
    images = torch.rand(options.num_images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    if options.weights:
        with_weights(network, Path(options.weights))
    if options.images:
        images = normalised(evenly(*read_images(options.images), options.num_images)[0], *IMAGENET)
    margins: dict[str, Tensor] = {}
    limit: int = options.max_steps
    paths = trace_fisher_rao_paths(network, images, max_steps=limit)  # warms up
    sources, targets = paths.source.tolist(), paths.targets.tolist()

    def together() -> None:
        margins["together"] = trace_fisher_rao_paths(network, images, max_steps=limit).margins

    def one_by_one() -> None:
        rows = zip(torch.split(images, 1), sources, targets, strict=True)
        margins["one by one"] = torch.tensor(
            [[one_path(network, x, y, k, max_steps=2 * limit) for k in aims] for x, y, aims in rows]
        )

    rounds = [(cpu_seconds(together), cpu_seconds(one_by_one)) for _ in range(options.rounds)]
    longest = float((paths.l2 / paths.steps).median()) / 8
    truth = trace_fisher_rao_paths(
        network, images, step_length=0.05, max_euclidean_step=longest, max_steps=8 * limit
    ).margins
    count, ratios = truth.numel(), [alone / joint for joint, alone in rounds]
    print(f"ResNet-{options.depth}, 10 classes, {count} paths from {len(images)} images of 3 × 32 × 32, one CPU thread")
    print(f"  mean margin {float(truth.mean()):.3f}")
    for side, name in enumerate(margins):
        speed = count / statistics.median(part[side] for part in rounds)
        error = (margins[name] - truth).abs()
        typical, mean = float(error.median()), float(error.mean())
        print(f"  {name:10}  {speed:6.2f} paths per second, absolute error {typical:.4f} (median), {mean:.4f} (mean)")
    spread = f"from {min(ratios):.1f} to {max(ratios):.1f}, {len(ratios)} rounds"
    print(f"  ratio: median {statistics.median(ratios):.1f} ({spread})")


if __name__ == "__main__":
    main()
