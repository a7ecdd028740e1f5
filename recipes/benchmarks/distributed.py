"""How much faster do two processes measure the same samples than one?

    python -m recipes.benchmarks.distributed

Measures the wall time of the monitor's default metrics on a ResNet with random weights, with one thread per process,
and includes gathering the states. Each round times one process alone, while the others wait, and then all together, so
that a busy machine slows both; the ratio is the median over rounds. Needs as many free cores as processes.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import time
import warnings

import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from lightning_robust import FisherSpectralNorm, HessianTrace, LinearizedAccuracy, Probe, WeightCurvatureIndex
from recipes.benchmarks.timing import median_and_range
from recipes.common.command_line import parser
from recipes.common.networks import CifarResNet, initialised


def measure(probes: list[Probe], *, together: bool) -> None:
    """Update the metrics with this process's probes and compute them, from all processes' states or from its own."""
    for kind in (FisherSpectralNorm, LinearizedAccuracy, HessianTrace, WeightCurvatureIndex):
        metric = kind()
        metric.distributed_available_fn = lambda: together
        for probe in probes:
            metric.update(probe)
        metric.compute()


def seconds(probes: list[Probe], *, alone: bool) -> float:
    """Return the wall time until all processes are done; ``alone``, the first one measures while the others wait."""
    distributed.barrier()
    start = time.perf_counter()
    if not alone or distributed.get_rank() == 0:
        measure(probes, together=not alone)
    distributed.barrier()
    return time.perf_counter() - start


def process(rank: int, port: int, options: argparse.Namespace) -> None:
    """Take part in all rounds; process 0 prints."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=options.processes
    )
    network = initialised(CifarResNet(options.depth), seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(options.samples, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (options.samples,), generator=generator)

    def probes(first: int, stride: int) -> list[Probe]:
        x, y = images[first::stride], labels[first::stride]
        batches = zip(*(torch.split(part, options.batch_size) for part in (x, y)), strict=True)
        return [Probe(network, *batch) for batch in batches]

    rounds = []
    for _ in range(options.rounds + 1):  # the first warms up
        one = seconds(probes(0, 1), alone=True)
        rounds.append((one, seconds(probes(rank, options.processes), alone=False)))
    if rank == 0:
        ratios = [one / several for one, several in rounds[1:]]
        print(f"ResNet-{options.depth}, {options.samples} images, default metrics, one thread per process")
        print(f"  one process  {statistics.median(one for one, _ in rounds[1:]):6.2f} s")
        print(f"  {options.processes} processes  {statistics.median(several for _, several in rounds[1:]):6.2f} s")
        print(f"  ratio: {median_and_range(ratios, digits=2)}")
    distributed.barrier()
    distributed.destroy_process_group()


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--processes", type=int, default=2, help="number of processes")
    arguments.add_argument("--samples", type=int, default=256, help="images that they measure together")
    arguments.add_argument("--batch-size", type=int, default=64, help="images in a batch")
    arguments.add_argument("--depth", type=int, default=20, help="depth of the ResNet, 6n + 2")
    arguments.add_argument("--rounds", type=int, default=5, help="rounds of measurements")
    options = arguments.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(process, (port, options), nprocs=options.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
