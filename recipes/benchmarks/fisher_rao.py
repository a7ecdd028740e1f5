"""How many Fisher–Rao paths per second, against a plain loop over paths with conjugate gradients?

    python -m recipes.benchmarks.fisher_rao
    python -m recipes.benchmarks.fisher_rao --images DATA/cifar10_test_1000_dev.npz --weights DATA/…_resnet20.pth

Measures CPU time of one thread. Each round times the two right after each other, so that a busy machine slows both, and
the ratio is the median over rounds. The loop is a straightforward implementation: one path at a time, by Euler steps,
with conjugate gradients on Fisher-vector products from torch.func, and bisection for the crossing. Its steps are half
as long, because Euler's method needs that for the same accuracy. The accuracy of both is measured against steps eight
times shorter.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp

from lightning_robust.functional import fisher_rao_distance, trace_fisher_rao_paths
from recipes.benchmarks.timing import cpu_seconds, median_and_range
from recipes.common.command_line import parser
from recipes.common.images import IMAGENET, evenly, normalised, read_images
from recipes.common.networks import CifarResNet, initialised, with_weights

# steps of the loop: half of the package's defaults
STEP_LENGTH, SHARE_OF_THE_WAY, HALVINGS = 0.2, 0.125, 20
_RESIDUAL, _ITERATIONS = 1e-5, 40


def natural_step(
    logits_of: Callable[[Tensor], Tensor], x: Tensor, contrast: Tensor, damping: float, longest: float
) -> Tensor:
    """Return a step of a single path, (1, ...): ``(G + λI)⁻¹ g`` by conjugate gradients, cut to its length."""
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
    """Return the length of the path of one image, (1, ...), towards one of ten classes."""

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
    arguments = parser(__doc__)
    arguments.add_argument("--num-images", type=int, default=10, help="number of images, with nine paths each")
    arguments.add_argument("--depth", type=int, default=20, help="depth of the ResNet, 6n + 2")
    arguments.add_argument("--rounds", type=int, default=3, help="rounds of measurements")
    arguments.add_argument(
        "--max-steps", type=int, default=100, help="most steps of a path; the loop may take twice that"
    )
    arguments.add_argument("--images", help="npz file with arrays x and y; without it, random images")
    arguments.add_argument("--weights", help="file with the network's weights; without it, random weights")
    options = arguments.parse_args()
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
    print(f"  ratio: {median_and_range(ratios)}")


if __name__ == "__main__":
    main()
