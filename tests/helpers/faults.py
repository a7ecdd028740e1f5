"""A toy run in which measurements fail by a schedule, and the checks of its outcome."""

import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_robust import FisherSpectralNorm, LinearizedAccuracy, Probe, RobustnessMonitor
from tests.helpers.training import CLOCKS, Classifier, robustness_warnings, samples, trainer

TRAIN, VALIDATION = samples(16), samples(24, seed=1)
BATCH_SIZE = 4
# Prefixes of keys that a fault in the faulty metric leaves alone.
UNHARMED = ("robust/linearized", "robust/num_samples", *CLOCKS)
EVERYTHING, ONE_METRIC, NOTHING = "everything", "one metric", "nothing"
LOST = {  # by kind of fault
    "batch": EVERYTHING,
    "unprintable": EVERYTHING,
    "forward": EVERYTHING,
    "nan weights": EVERYTHING,
    "infinite weights": EVERYTHING,
    "update": ONE_METRIC,
    "compute": ONE_METRIC,
    "reset": EVERYTHING,
    "out of memory": NOTHING,
    "loader ends early": NOTHING,  # the samples it still yields are measured
}


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one epoch.

    Attributes:
        kind: See ``LOST``.
        ranks: Processes in which it goes wrong.
        batch: Index of the batch, for faults that concern one.
    """

    kind: str
    ranks: frozenset[int]
    batch: int


Schedule = dict[int, Fault]  # by epoch


def random_schedule(seed: int, *, num_epochs: int, num_processes: int = 1) -> Schedule:
    draw = random.Random(seed)
    everyone = range(num_processes)
    return {
        epoch: Fault(
            kind=draw.choice(list(LOST)),
            ranks=frozenset(draw.choice([*([rank] for rank in everyone), list(everyone)])),
            batch=draw.randrange(len(VALIDATION) // BATCH_SIZE // num_processes),
        )
        for epoch in range(num_epochs)
        if draw.random() < 0.6
    }


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise TypeError("no words")


UnprintableError.__name__ = "Un\nprintable"


class Toy(Classifier):
    """A linear network that fails on schedule; its metric and its loader ask it when to fail."""

    def __init__(self, schedule: Schedule) -> None:
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network[1].reset_parameters()
        super().__init__(network)
        self.schedule = schedule

    def suffers(self, kind: str) -> Fault | None:
        fault = self.schedule.get(self.current_epoch)
        return fault if fault and fault.kind == kind and self.global_rank in fault.ranks else None

    def robustness_probe(self, batch: Any) -> Probe:
        if (fault := self.suffers("batch")) and torch.equal(batch[0], self.batches[fault.batch]):
            raise OSError("no batch")
        if self.suffers("unprintable"):
            raise UnprintableError
        return Probe(self, *batch)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not self.training:  # this is a measurement
            if self.suffers("forward"):
                raise OSError("no forward")
            if self.suffers("out of memory") and len(x) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.network(x)

    def on_validation_start(self) -> None:
        self.batches = [batch[0] for batch in DataLoader.__iter__(self.trainer.val_dataloaders)]
        self.healthy = self.network[1].weight.detach().clone()
        for kind, value in (("nan weights", math.nan), ("infinite weights", math.inf)):
            if self.suffers(kind):
                self.network[1].weight.data[0, 0] = value

    def on_validation_end(self) -> None:
        self.network[1].weight.data.copy_(self.healthy)


class FaultyMetric(FisherSpectralNorm):
    """A metric with lists of states. An error after they were gathered leaves them joined."""

    def __init__(self, suffers: Callable[[str], Fault | None]) -> None:
        super().__init__()
        self.suffers = suffers

    def _fail(self, kind: str) -> None:
        if self.suffers(kind):
            raise OSError(f"no {kind}")

    def _add(self, probe: Probe) -> None:
        self._fail("update")
        super()._add(probe)

    def compute(self) -> dict[str, Tensor]:
        self._fail("compute")
        return super().compute()

    def reset(self) -> None:
        if hasattr(self, "suffers"):
            self._fail("reset")
        super().reset()


class FaultyLoader(DataLoader):
    """A loader whose length counts batches that it may not yield."""

    suffers: Callable[[str], Fault | None] = staticmethod(lambda kind: None)

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(super().__iter__()):
            if (fault := self.suffers("loader ends early")) and index > fault.batch:
                return
            yield batch


class Records(DummyLogger):
    """Keeps the metrics logged after each validation."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "val_acc" in metrics:
            self.rows.append({key: value for key, value in metrics.items() if key.startswith("robust/")})


@dataclass(frozen=True)
class Outcome:
    """The results of a run.

    Attributes:
        rows: Values logged in each epoch, on rank zero.
        said: Warnings of the monitor, on rank zero.
        weights: Parameters at the end.
        finished: Whether the run reached its last epoch.
    """

    rows: list[dict[str, float]]
    said: list[str]
    weights: list[Tensor]
    finished: bool


def run(
    schedule: Schedule, root: Path, *, num_epochs: int, rank: int = 0, num_processes: int = 1, monitored: bool = True
) -> Outcome:
    model = Toy(schedule)
    records = Records()
    val_loader = FaultyLoader(VALIDATION, BATCH_SIZE)
    options: dict[str, Any] = {}
    if num_processes > 1:
        sampler = DistributedSampler(VALIDATION, num_processes, rank, shuffle=False)
        val_loader = FaultyLoader(VALIDATION, BATCH_SIZE, sampler=sampler)
        options = {"strategy": "ddp", "devices": num_processes, "use_distributed_sampler": False}
    val_loader.suffers = model.suffers
    metrics = [FaultyMetric(model.suffers), LinearizedAccuracy([0.1])]
    monitor = RobustnessMonitor(metrics, max_samples=12)  # several in each of three processes
    with robustness_warnings() as said:
        fitter = trainer(
            *([monitor] if monitored else []),
            root=root,
            logger=records,
            max_epochs=num_epochs,
            num_sanity_val_steps=0,
            log_every_n_steps=1000,
            **options,
        )
        fitter.fit(model, DataLoader(TRAIN, 8), val_loader)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    return Outcome(records.rows, said, weights, fitter.state.finished and fitter.current_epoch == num_epochs)


def check_explained(losses: list[int], skipped: list[str]) -> None:
    """Assert that each cause was explained in the epoch in which it came first, and counted at the end of the run."""
    explained = [
        int(found[1]) for sentence in skipped if (found := re.search(r"skipped .*?in epoch (\d+)[: ]", sentence))
    ]
    assert explained == sorted(explained)
    assert set(explained) <= set(losses)
    assert explained[:1] == losses[:1]
    again = [int(found[1]) for sentence in skipped if (found := re.search(r"(\d+) more measurement", sentence))]
    everything = [int(found[1]) for sentence in skipped if (found := re.search(r"all (\d+) measurements", sentence))]
    assert len(skipped) == len(explained) + len(again) + len(everything)
    assert (sum(everything) or len(explained) + sum(again)) == len(losses)


def check(schedule: Schedule, outcome: Outcome, reference: Outcome) -> None:
    """Assert that only scheduled values are lost, and that warnings say so."""
    assert outcome.finished
    assert all(torch.equal(a, b) for a, b in zip(outcome.weights, reference.weights, strict=True))
    assert len(outcome.rows) == len(reference.rows)
    skipped = [sentence for sentence in outcome.said if "skipped" in sentence]
    losses: list[int] = []
    tolerance = 0.0  # smaller groups of samples round differently
    for epoch, (row, expected) in enumerate(zip(outcome.rows, reference.rows, strict=True)):
        fault = schedule.get(epoch)
        lost = NOTHING if fault is None else LOST[fault.kind]
        others = {key: value for key, value in expected.items() if key.startswith(UNHARMED)}
        kept = others if lost == ONE_METRIC else expected
        kept = {} if lost == EVERYTHING else kept
        if fault is not None and fault.kind == "loader ends early":
            assert 1 <= row["robust/num_samples"] <= kept["robust/num_samples"]
            assert {"robust/fim_spectral_norm", "robust/linearized_accuracy_linf_0.1"} <= row.keys() <= kept.keys()
        else:
            assert row.keys() == kept.keys(), (epoch, fault)
            if fault is not None and fault.kind == "out of memory":
                tolerance = 1e-5
            for key in kept.keys() - CLOCKS:
                assert math.isclose(row[key], kept[key], rel_tol=tolerance, abs_tol=tolerance), (epoch, fault, key)
        losses += [epoch] if lost != NOTHING else []
    check_explained(losses, skipped)
    notices = [sentence for sentence in outcome.said if "skipped" not in sentence]
    assert len(notices) == len(set(notices))
    kinds = {fault.kind for fault in schedule.values()}
    first_shortage = next((fault for fault in schedule.values() if fault.kind == "out of memory"), None)
    told = any("ran out of memory" in sentence for sentence in notices)
    if first_shortage is None:
        assert not told
    elif 0 in first_shortage.ranks:
        assert told
    other_samples = [sentence for sentence in notices if "ran out of memory" not in sentence]
    assert all("yields other samples" in sentence for sentence in other_samples)
    assert "loader ends early" in kinds or not other_samples
