"""When memory runs out, the monitor halves the samples that it measures at once; the values stay the same."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust import (
    AdversarialAccuracy,
    FisherSpectralNorm,
    HessianTrace,
    LinearizedAccuracy,
    RobustnessMonitor,
    WeightCurvatureIndex,
)
from lightning_robust.callbacks.monitor.measurement import ran_out_of_memory
from lightning_robust.metrics import ProbeMetric
from tests.helpers.recording import Record
from tests.helpers.training import CLOCKS, Classifier, History, classifier, loader, robustness_warnings, trainer

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you")
ONEDNN = RuntimeError("could not create a primitive")
MPS = RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, other allocations: 1.02 GB).")


def metrics() -> list[ProbeMetric]:
    return [
        FisherSpectralNorm(),
        LinearizedAccuracy(),
        AdversarialAccuracy([0.05], steps=2),
        HessianTrace(),
        WeightCurvatureIndex(),
    ]


def without_time(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key not in CLOCKS}


class Small(Classifier):
    """A model on a device with room for `room` samples with gradients, and for any number without."""

    room = 10**9
    error: Exception = CUDA

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not self.training:
            self.record.batch_sizes.append(len(x))
            if len(x) > self.room:
                raise self.error
        return super().forward(x)


def fit(
    root: Path, room: int, error: Exception = CUDA, **options: Any
) -> tuple[list[dict[str, float]], list[str], list[list[int]]]:
    """Return the logged rows, the warnings, and how many samples each measurement tried at once."""
    model = Small(classifier().network)
    model.room, model.error = room, error
    tried: list[list[int]] = []

    class Tried(History):
        def on_validation_epoch_start(self, *args: Any) -> None:
            model.record = Record()
            tried.append(model.record.batch_sizes)

    history = Tried()
    torch.manual_seed(0)
    with robustness_warnings() as messages:
        run = trainer(RobustnessMonitor(metrics(), **options), history, root=root, num_sanity_val_steps=0)
        run.fit(model, loader(), loader(batch_size=32))
    return history.rows, messages, tried


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Rows of a run with room for all samples."""
    rows, messages, tried = fit(tmp_path_factory.mktemp("expected"), 10**9)
    assert messages == []
    assert max(tried[0]) == 32
    return [without_time(row) for row in rows]


@pytest.mark.parametrize(
    ("error", "room", "size"),
    [
        (CUDA, 12, 8),  # eight samples are examined first
        (ONEDNN, 5, 4),
        (MemoryError(), 5, 4),
    ],
    ids=str,
)
def test_the_numbers_are_those_of_a_larger_memory_and_the_size_is_remembered(
    expected: list[dict[str, float]], tmp_path: Path, error: Exception, room: int, size: int
) -> None:
    rows, messages, tried = fit(tmp_path, room, error)
    assert len(messages) == 1
    assert f"ran out of memory, and from now on measures at most {size} samples at once" in messages[0]
    assert max(tried[0]) > room
    assert max(tried[1]) == size
    assert len(rows) == 2
    for row, reference in zip(rows, expected, strict=True):
        assert without_time(row) == pytest.approx(reference, rel=1e-4, abs=1e-5)


def test_krylov_subspaces_of_fewer_samples_at_once_have_the_same_numbers(tmp_path: Path) -> None:
    (expected, said, _), (rows, messages, tried) = (fit(tmp_path, room, linearization="krylov") for room in (10**9, 12))
    assert said == []
    assert len(messages) == 1
    assert max(tried[1]) == 8
    for row, reference in zip(rows, expected, strict=True):
        assert without_time(row) == pytest.approx(without_time(reference), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("error", [CUDA, CPU, MPS, ONEDNN, MemoryError()], ids=str)
def test_a_shortage_is_recognised(error: Exception) -> None:
    assert ran_out_of_memory(error)


@pytest.mark.parametrize(
    "words", ["could not create a primitive descriptor for a convolution forward propagation primitive", "no memory"]
)
def test_other_failures_are_not_taken_for_a_shortage(words: str) -> None:
    assert not ran_out_of_memory(RuntimeError(words))


def test_if_not_even_one_sample_fits_the_cause_is_reported(tmp_path: Path) -> None:
    rows, messages, tried = fit(tmp_path, 0)
    assert rows == [{}, {}]
    assert [message.startswith("RobustnessMonitor skipped the measurement") for message in messages].count(True) == 1
    assert any("OutOfMemoryError: CUDA out of memory" in message for message in messages)
    assert messages[-1].startswith("RobustnessMonitor measured nothing in this run: all 2 measurements")
    assert all(min(of_measurement) == 1 for of_measurement in tried)
    assert len(tried[1]) < 10  # it does not try every sample in turn


def validate_wide(root: Path, *, limit_mb: int | None = None) -> tuple[list[str], float]:
    """Measure a network that keeps 30 MB for each of 17 layers, but only for a backward pass."""
    import resource

    torch.manual_seed(0)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(16, 2**16), *[nn.GELU()] * 16, nn.Linear(2**16, 4))
    run = trainer(RobustnessMonitor(["fisher_spectral_norm"]), root=root)
    if limit_mb is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limit_mb * 2**20, resource.RLIM_INFINITY))
    with robustness_warnings() as messages:
        run.validate(Classifier(wide), loader(batch_size=120), verbose=False)
    return messages, float(run.callback_metrics.get("robust/fim_spectral_norm", math.nan))


LIMITED = """
import json, sys
from pathlib import Path
from tests.callbacks.monitor.test_memory import validate_wide

print(json.dumps(validate_wide(Path(sys.argv[1]), limit_mb=320)))
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="address space is limited through Linux's /proc")
def test_a_real_shortage_of_memory_is_survived(tmp_path: Path) -> None:
    said, expected = validate_wide(tmp_path)
    assert not any("out of memory" in message for message in said)
    # Threads reserve address space that they do not use, and the heap keeps freed memory, so that code which oneDNN
    # compiles may not fit. With these settings, large blocks are mapped one by one and returned when freed.
    frugal = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-W", "ignore", "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | frugal)
    assert done.returncode == 0, done.stderr[-2000:]
    said, measured = json.loads(done.stdout.splitlines()[-1])
    assert any("RobustnessMonitor ran out of memory" in message for message in said)
    assert math.isclose(measured, expected, rel_tol=1e-4), said
