"""What does the exact linearisation of a batch cost, in forward passes of the same batch?

    python -m recipes.benchmarks.linearize

Measures CPU time of one thread. Each round times a forward pass and a linearisation right after each other, so that a
busy machine slows both, and the ratio is the median over rounds. Weights are random, because the cost does not depend
on them.
"""

from __future__ import annotations

import statistics

import torch

from lightning_robust.functional import fim_spectral_norm, linearize
from recipes.benchmarks.timing import cpu_seconds, median_and_range
from recipes.common.command_line import parser
from recipes.common.networks import CifarResNet, initialised


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--batch-size", type=int, default=64, help="images in the batch")
    arguments.add_argument("--depth", type=int, default=20, help="depth of the ResNet, 6n + 2")
    arguments.add_argument("--rounds", type=int, default=7, help="rounds of measurements")
    options = arguments.parse_args()
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
    print(f"  ratio: {median_and_range(ratios)}")


if __name__ == "__main__":
    main()
