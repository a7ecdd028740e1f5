"""The monitor in several processes: the same numbers as in one, little traffic, and no deadlock when one fails."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from lightning_robust import Probe, RobustnessMonitor, RobustnessWarning
from tests.helpers import processes
from tests.helpers.recording import Traffic
from tests.helpers.training import (
    CLOCKS,
    Classifier,
    History,
    classifier,
    loader,
    robustness_warnings,
    samples,
    trainer,
)

pytestmark = pytest.mark.ddp
INPUT_SIDE = ["fisher_spectral_norm", "linearized_accuracy", "adversarial_accuracy"]
CURVATURE = ["hessian_trace", "weight_curvature_index"]
MAX_SAMPLES = 17


class Stream(IterableDataset):
    """Yields identical samples in every process, and has no length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(samples(23))


LOADERS = {
    "padded by one": lambda: loader(samples(23), batch_size=4),  # two processes: 24 samples
    "a shorter last batch": lambda: loader(samples(26), batch_size=4),
    "one sample more than wanted": lambda: loader(samples(18), batch_size=4),
    "fewer samples than processes": lambda: loader(samples(1), batch_size=4),
    "as many samples as processes": lambda: loader(samples(3), batch_size=4),
    "unshared stream": lambda: DataLoader(Stream(), 4),
}


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using `DistributedSampler` with the dataloaders")
        warnings.filterwarnings("ignore", category=RobustnessWarning, message=".*cannot tell beforehand")
        yield


def validate(
    root: Path, num_processes: int, val_loader: DataLoader, metrics: list[str], model: Classifier
) -> dict[str, float]:
    distribution = {"strategy": "ddp", "devices": num_processes} if num_processes > 1 else {}
    monitors = [RobustnessMonitor(metrics, max_samples=MAX_SAMPLES, on_error="raise")] if metrics else []
    run = trainer(*monitors, root=root, **distribution)
    with quiet():
        run.validate(model, val_loader, verbose=False)
    return {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("robust/")}


def validate_all(rank: int, root: Path, num_processes: int) -> dict[str, dict[str, float]]:
    everything = INPUT_SIDE + CURVATURE
    return {name: validate(root, num_processes, make(), everything, classifier()) for name, make in LOADERS.items()}


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, dict[str, float]]]]:
    """Values by number of processes, then process, then loader."""
    root = tmp_path_factory.mktemp("values")
    together = {count: processes.run(validate_all, count, root, count) for count in (2, 3)}
    return {1: [validate_all(0, root, 1)]} | together


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", LOADERS)
def test_processes_log_the_values_of_one(values: dict[int, list[dict[str, Any]]], name: str, count: int) -> None:
    alone, together = values[1][0][name], [of_process[name] for of_process in values[count]]
    assert all(of_process == together[0] for of_process in together)  # bit by bit
    assert alone["robust/num_samples"] == min(MAX_SAMPLES, len(list(iter(LOADERS[name]().dataset))))
    assert "robust/hessian_trace" in alone
    without_time = [{k: v for k, v in row.items() if k not in CLOCKS} for row in (together[0], alone)]
    assert without_time[0] == pytest.approx(without_time[1], rel=1e-6, abs=1e-7)


class EveryOther(Sampler):
    """Distributes the samples by itself."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, 23, 2))

    def __len__(self) -> int:
        return len(range(self.rank, 23, 2))


class LargestFirst(BatchSampler):
    """Batches in another order than the sampler's, for example sorted by length."""

    def __iter__(self) -> Iterator[list[int]]:
        indices = sorted(self.sampler, reverse=True)
        return (indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size))


def validate_odd_shares(rank: int, root: Path) -> list[tuple[float, list[str]]]:
    results = []
    dataset = samples(23)
    for options in (
        {"sampler": EveryOther(rank), "batch_size": 4},
        {"batch_sampler": LargestFirst(DistributedSampler(dataset, 2, rank, shuffle=False), 4, drop_last=False)},
    ):
        monitor = RobustnessMonitor(["linearized_accuracy"], max_samples=MAX_SAMPLES, on_error="raise")
        run = trainer(monitor, root=root, strategy="ddp", devices=2, use_distributed_sampler=False)
        with robustness_warnings() as messages:
            run.validate(classifier(), DataLoader(dataset, **options), verbose=False)
        results.append((float(run.callback_metrics["robust/num_samples"]), messages))
    return results


def test_unknown_shares_are_reported_or_split_by_another_rule(tmp_path: Path) -> None:
    results = processes.run(validate_odd_shares, 2, tmp_path)
    (own, said), (reordered, said_too) = results[0]
    assert own < MAX_SAMPLES
    assert len(said) == 1
    assert said[0].startswith("Each process sees different validation samples, but not through a `DistributedSampler`")
    assert reordered == MAX_SAMPLES
    assert len(said_too) == 1
    assert "uniformly random subset" in said_too[0]
    assert [messages for _, messages in results[1]] == [[], []]


def network(width: int, depth: int) -> nn.Module:
    hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width, bias=False), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), *hidden, nn.Linear(width, 4))


def bytes_sent(root: Path, metrics: list[str], *, width: int, depth: int) -> Counter[str]:
    """Bytes that a monitor adds to a validation run, by collective, barriers excluded."""
    sent = []
    for measured in (metrics, []):
        with Traffic() as traffic:
            validate(root, 2, loader(samples(23), batch_size=4), measured, Classifier(network(width, depth)))
        sent.append(traffic.bytes_sent)
    sent[0].subtract(sent[1])
    return Counter({name: count for name, count in sent[0].items() if count and name != "barrier"})


def measure_traffic(rank: int, root: Path) -> dict[str, list[Counter[str]]]:
    sizes = [(8, 1), (64, 1), (64, 4), (64, 7)]
    return {
        name: [bytes_sent(root, metrics, width=width, depth=depth) for width, depth in sizes]
        for name, metrics in (("input side", INPUT_SIDE), ("curvature", CURVATURE))
    }


def test_only_metric_states_are_exchanged_whatever_the_number_of_parameters(tmp_path: Path) -> None:
    for sent in processes.run(measure_traffic, 2, tmp_path):
        assert all(counts.keys() == {"allgather_"} for runs in sent.values() for counts in runs)
        input_side, curvature = ([counts["allgather_"] for counts in sent[name]] for name in sent)
        assert len(set(input_side)) == 1
        assert input_side[0] < 5_000
        narrow, wide, deep, deeper = curvature
        assert narrow == wide
        assert 0 < deeper - deep < 1.1 * (deep - wide)  # the same number of extra layers
        assert (deep - wide) / 3 < 3_000  # per layer, whose parameters take 16,384 bytes


class FailsOnRankOne(Classifier):
    def robustness_probe(self, batch: Any) -> Probe:
        if self.current_epoch == 1 and self.global_rank == 1:
            raise OSError("no such image")
        return Probe(self, *batch)


def fit(rank: int, root: Path) -> tuple[list[Any], list[str]]:
    history = History()
    torch.manual_seed(0)
    model = FailsOnRankOne(classifier().network)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(RobustnessMonitor(max_samples=20), history, root=root, strategy="ddp", devices=2, max_epochs=3).fit(
            model, loader(shuffle=True), loader()
        )
    return history.rows, [str(w.message) for w in caught if issubclass(w.category, RobustnessWarning)]


def test_when_one_process_fails_all_skip_the_measurement_and_continue(tmp_path: Path) -> None:
    results = processes.run(fit, 2, tmp_path)
    for rows, _ in results:
        assert rows[1] == rows[0]  # nothing new was logged
        assert rows[2]["robust/num_samples"] == 20
        assert rows[2] != rows[0]
    (_, said), (_, said_elsewhere) = results
    assert len(said) == 1
    assert "skipped the measurement in epoch 1: OSError: no such image" in said[0]
    assert said_elsewhere == []
