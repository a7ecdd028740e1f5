"""What one measurement does: a probe for each group of samples, one isolation, and few forward passes."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust import Probe, RobustnessMonitor
from lightning_robust.callbacks.monitor import announced_cost
from lightning_robust.functional._isolation import context
from tests.helpers.training import Classifier, loader, samples, trainer

NUM_GROUPS = 4  # 256 samples in groups of 64, the size of a validation batch
EXAMINING = 3  # forward passes of a few samples, once per run
PER_GROUP = {
    "linearisation": 1,
    "outputs and graph, in chunks of 32": 2,
    "gradients of single samples, in chunks of 32": 2,
    "one sample, to check the vectorised gradients": 1,
}


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counted: Counter[str] = Counter()
    construct, isolate = Probe.__post_init__, context._isolation

    def constructed(probe: Probe) -> None:
        counted["probes"] += 1
        construct(probe)

    @contextmanager
    def isolated(modules: list[nn.Module]) -> Iterator[None]:
        counted["isolations"] += 1
        with isolate(modules):
            yield

    monkeypatch.setattr(Probe, "__post_init__", constructed)
    monkeypatch.setattr(context, "_isolation", isolated)
    return counted


class Counted(Classifier):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)))
        self.note = counts.update  # a method of an object that is not a container of the network's

    def forward(self, x: Tensor) -> Tensor:
        self.note(["passes"])
        return super().forward(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Leave the counting to the measurement."""


def test_a_default_measurement_takes_few_probes_isolations_and_passes(
    tmp_path: Path, counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announced_cost, "_LONG", math.inf)  # on a slow machine a backward pass is timed
    torch.manual_seed(0)
    monitor = RobustnessMonitor(on_error="raise")
    run = trainer(monitor, root=tmp_path)
    run.validate(Counted(counts), loader(samples(1280), batch_size=64), verbose=False)
    assert run.callback_metrics["robust/num_samples"] == 256
    assert counts == {
        "probes": NUM_GROUPS + 1,  # a small one is examined, once per run
        "isolations": 1,
        "passes": EXAMINING + NUM_GROUPS * sum(PER_GROUP.values()),
    }
