"""Faults of every kind at random times, in one process and in several, cost only the values that failed."""

from pathlib import Path

import pytest

from tests.helpers import processes
from tests.helpers.faults import LOST, Fault, Outcome, check, random_schedule, run

NUM_EPOCHS = 4


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run({}, tmp_path_factory.mktemp("reference"), num_epochs=NUM_EPOCHS)


def test_a_run_without_faults_is_measured_each_time_and_trains_as_without_the_monitor(
    reference: Outcome, tmp_path: Path
) -> None:
    assert reference.said == []
    assert len({row["robust/fim_spectral_norm"] for row in reference.rows}) == NUM_EPOCHS
    alone = run({}, tmp_path, num_epochs=NUM_EPOCHS, monitored=False)
    check({}, Outcome(reference.rows, [], alone.weights, alone.finished), reference)


@pytest.mark.parametrize("kind", LOST)
def test_a_fault_of_each_kind_costs_only_its_own_values_and_the_next_measurement_works(
    reference: Outcome, tmp_path: Path, kind: str
) -> None:
    schedule = {1: Fault(kind, frozenset({0}), batch=2), 2: Fault(kind, frozenset({0}), batch=0)}
    check(schedule, run(schedule, tmp_path, num_epochs=NUM_EPOCHS), reference)


MANY = [pytest.param(range(first, first + 250), marks=pytest.mark.long) for first in range(20, 1020, 250)]


@pytest.mark.parametrize("seeds", [range(20), *MANY], ids=str)
@pytest.mark.timeout(900)
def test_random_schedules_lose_nothing_but_what_fails(reference: Outcome, tmp_path: Path, seeds: range) -> None:
    for seed in seeds:
        schedule = random_schedule(seed, num_epochs=NUM_EPOCHS)
        check(schedule, run(schedule, tmp_path, num_epochs=NUM_EPOCHS), reference)


def in_processes(rank: int, root: Path, num_processes: int, seeds: list[int], num_epochs: int) -> list[Outcome]:
    schedules = [random_schedule(seed, num_epochs=num_epochs, num_processes=num_processes) for seed in seeds]
    options = {"num_epochs": num_epochs, "rank": rank, "num_processes": num_processes}
    return [run(schedule, root, **options) for schedule in [{}, *schedules]]


@pytest.mark.ddp
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_processes", [2, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("seeds", "num_epochs"),
    [([0], 10), pytest.param(list(range(1, 9)), 60, marks=pytest.mark.long)],
)
def test_no_process_hangs_whichever_fails(
    tmp_path: Path, num_processes: int, seeds: list[int], num_epochs: int
) -> None:
    results = processes.run(in_processes, num_processes, tmp_path, num_processes, seeds, num_epochs, timeout_s=600)
    reference, *outcomes = results[0]
    for seed, outcome in zip(seeds, outcomes, strict=True):
        schedule = random_schedule(seed, num_epochs=num_epochs, num_processes=num_processes)
        check(schedule, outcome, reference)
    for of_others in results[1:]:
        assert all(outcome.finished and not outcome.said for outcome in of_others)
