"""What does the exact linearisation of a batch cost, in forward passes of the same batch?

    python -m recipes.benchmarks.linearize

CPU time of one thread, each round timing the two one after the other, so that a busy machine slows both; medians over
rounds. The weights do not matter for the cost and are random.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from lightning_robust.functional import fim_spectral_norm, linearize
from recipes.common.networks import CifarResNet, initialised


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    network = initialised(CifarResNet(options.depth), seed=0).eval()
    images = torch.rand(options.batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def forward() -> None:
        with torch.no_grad():
            network(images)

    def spectral_norms() -> None:
        linearization = linearize(network, images)
        fim_spectral_norm(linearization.logits, linearization.gram)

    cpu_seconds(forward)  # warm up
    cpu_seconds(spectral_norms)
    rounds = [(cpu_seconds(forward), cpu_seconds(spectral_norms)) for _ in range(options.rounds)]
    ratios = [exact / plain for plain, exact in rounds]
    print(f"ResNet-{options.depth}, 10 classes, {options.batch_size} images of 3 × 32 × 32, one CPU thread")
    print(f"  forward pass of the batch              {statistics.median(plain for plain, _ in rounds):7.3f} s")
    print(f"  exact λ and margins of the whole batch {statistics.median(exact for _, exact in rounds):7.3f} s")
    print(
        f"  ratio: median {statistics.median(ratios):.1f} forward passes"
        f" (from {min(ratios):.1f} to {max(ratios):.1f} in {len(ratios)} rounds)"
    )


if __name__ == "__main__":
    main()
