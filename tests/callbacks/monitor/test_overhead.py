"""The share of time spent measuring is logged, and a budget leaves out the same measurements on every process."""

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_robust import Probe, ProbeMetric, RobustnessMonitor
from lightning_robust.callbacks.monitor import overhead, schedule
from lightning_robust.callbacks.monitor.overhead import Overhead, Times
from tests.helpers import processes
from tests.helpers.interrupted import Repeatable
from tests.helpers.training import History, classifier, loader, robustness_warnings, samples, trainer

BUDGET = 0.05
STEPS = 2  # of an epoch
EPOCH = 4  # seconds


class KilledError(Exception):
    pass


class Clock:
    """A clock that tests advance."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(overhead, "time", SimpleNamespace(perf_counter=clock))
    return clock


class Costly(ProbeMetric):
    """Takes a given time per measurement and keeps the samples of each one."""

    def __init__(self, wait: Callable[[float], object], costs: Sequence[float]) -> None:
        super().__init__()
        self.add_float64_state("total")
        self.wait, self.costs = wait, costs
        self.seen: list[Tensor] = []
        self.shown: list[Tensor] = []

    def _add(self, probe: Probe) -> None:
        self.shown.append(probe.inputs)
        self.total = self.total + probe.inputs.double().sum()

    def compute(self) -> dict[str, Tensor]:
        self.seen.append(torch.cat(self.shown))
        self.shown = []
        self.wait(self.costs[(len(self.seen) - 1) % len(self.costs)])
        return {"total": self.total}


class Slow(Repeatable):
    """Spends the time of an epoch in its training steps."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(classifier().network)
        self.clock = clock

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.clock.now += EPOCH / STEPS
        return super().training_step(batch, batch_idx)


class Measured(Callback):
    """Keeps the epochs that were measured, and the share of time logged in each."""

    def __init__(self, metric: Costly) -> None:
        self.metric = metric
        self.epochs: list[int] = []
        self.shares: list[float] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(self.metric.seen) > len(self.epochs):
            self.epochs.append(trainer.current_epoch)
            self.shares.append(float(trainer.callback_metrics["robust/overhead"]))


def wait_by(clock: Clock) -> Callable[[float], None]:
    def wait(seconds: float) -> None:
        clock.now += seconds

    return wait


def fit(
    root: Path,
    clock: Clock,
    *callbacks: Callback,
    costs: Sequence[float] = (0.5,),
    epochs: int = 40,
    ckpt_path: str | None = None,
    **options: Any,
) -> Measured:
    metric = Costly(wait_by(clock), costs)
    monitor, measured = RobustnessMonitor([metric], max_samples=10, **options), Measured(metric)
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    run = trainer(monitor, measured, *callbacks, root=root, max_epochs=epochs, enable_checkpointing=saves)
    data = loader(samples(8 * STEPS), batch_size=8)
    run.fit(Slow(clock), data, loader(samples(8 * STEPS)), ckpt_path=ckpt_path, weights_only=True)
    return measured


def expected_epochs(costs: Sequence[float], *, epochs: int, budget: float) -> list[int]:
    """The epochs with a measurement, by the inequality in the documentation."""
    elapsed = spent = last = 0.0
    measured: list[int] = []
    for epoch in range(epochs):
        elapsed += EPOCH
        if not measured or (spent + last) / (elapsed + last) <= budget:
            last = costs[len(measured) % len(costs)]
            elapsed, spent = elapsed + last, spent + last
            measured.append(epoch)
    return measured


# --- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "share"),
    [((0.0, 0.0, 0.0), 0.0), ((10.0, 0.0, 0.0), 0.0), ((10.0, 1.0, 0.5), 0.1), ((4.0, 4.0, 4.0), 1.0)],
)
def test_the_share_is_what_was_spent_of_what_has_passed(times: tuple[float, float, float], share: float) -> None:
    assert Times(*times).share == share


@pytest.mark.parametrize(
    ("times", "budget", "affords"),
    [
        ((0.0, 0.0, 0.0), 1e-9, True),  # nothing is known yet
        ((15.0, 1.0, 1.0), 0.125, True),  # 2 of 16
        ((14.9, 1.0, 1.0), 0.125, False),
        ((15.0, 1.0, 2.0), 0.125, False),  # 3 of 17
        ((1.0, 1.0, 1.0), 1.0, True),
        ((100.0, 4.9, 1e-9), 0.05, True),
        ((100.0, 5.1, 1e-9), 0.05, False),
    ],
)
def test_a_measurement_is_afforded_if_the_share_is_within_the_budget_after_it(
    times: tuple[float, float, float], budget: float, affords: bool
) -> None:
    assert Times(*times).affords(budget) is affords


def test_the_clocks_count_what_happens_inside_as_spent(clock: Clock) -> None:
    clocks = Overhead()
    assert clocks.times == Times(0, 0, 0)
    clocks.begin()
    clock.now += 10
    clocks.begin_measurement()
    with clocks.counted():
        clock.now += 2
        assert clocks.times == Times(12, 2, 2)
    clock.now += 5
    with clocks.counted():
        clock.now += 1
    assert clocks.times == Times(18, 3, 3)  # of one measurement, in two parts
    clocks.begin_measurement()
    with suppress(KilledError), clocks.counted():
        clock.now += 4
        raise KilledError
    assert clocks.times == Times(22, 7, 4)


def test_nothing_counts_while_the_clock_does_not_run(clock: Clock) -> None:
    clocks = Overhead()
    with clocks.counted():
        clock.now += 3
    clocks.begin()
    with clocks.counted():
        clock.now += 1
    clocks.end()
    with clocks.counted():
        clock.now += 3
    assert clocks.times == Times(1, 1, 1)


def test_the_clocks_go_on_from_a_state(clock: Clock) -> None:
    clocks, again = Overhead(), Overhead()
    clocks.begin()
    with clocks.counted():
        clock.now += 3
    clock.now += 7
    again.load_state_dict(clocks.state_dict())
    clock.now += 1000  # while nothing runs
    again.begin()
    clock.now += 10
    assert again.times == Times(20, 3, 3)


def test_a_state_that_was_loaded_is_given_back_before_the_run_goes_on() -> None:
    clocks, state = Overhead(), {"elapsed": 20.0, "spent": 3.0, "cost": 1.0, "made": 2, "left_out": 5}
    clocks.load_state_dict(state)
    assert clocks.state_dict() == state


def test_times_of_a_long_run_are_not_rounded() -> None:
    times = Times(30 * 86400.123, 86400.456, 0.789)
    assert Times.largest([times, Times(1, 1, 0.1)]) == times


# --- the budget -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_run_stays_within_the_budget_and_has_a_curve(tmp_path: Path, clock: Clock, seed: int) -> None:
    generator = random.Random(seed)
    costs = [generator.uniform(0.3, 0.7) for _ in range(40)]
    begun = clock.now
    measured = fit(tmp_path, clock, costs=costs, overhead_budget=BUDGET)
    spent = sum(costs[: len(measured.epochs)])
    assert len(measured.epochs) >= 5
    assert spent / (clock.now - begun) <= 0.055
    assert measured.shares[-1] <= 0.055


@pytest.mark.parametrize("budget", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("costs", [(0.5,), (0.2013, 0.9071, 0.4037)])
def test_measurements_are_made_when_the_budget_affords_them(
    tmp_path: Path, clock: Clock, budget: float, costs: tuple[float, ...]
) -> None:
    with robustness_warnings():
        measured = fit(tmp_path, clock, costs=costs, overhead_budget=budget)
    assert measured.epochs == expected_epochs(costs, epochs=40, budget=budget)
    assert len(measured.epochs) > 1


@pytest.mark.parametrize("options", [{}, {"overhead_budget": None}, {"overhead_budget": 1}])
def test_nothing_is_left_out_without_a_bound(tmp_path: Path, clock: Clock, options: dict[str, Any]) -> None:
    with robustness_warnings() as messages:
        measured = fit(tmp_path, clock, costs=[100.0], epochs=6, **options)
    assert measured.epochs == [0, 1, 2, 3, 4, 5]
    assert messages == []


def test_a_measurement_that_was_left_out_is_made_as_soon_as_there_is_time(tmp_path: Path, clock: Clock) -> None:
    measured = fit(tmp_path, clock, costs=[0.65], overhead_budget=BUDGET, every_n_epochs=3)
    # of epochs 0, 3, 6, …, and the one after where that was too early; 13 seconds of run for each measurement
    assert measured.epochs[:4] == [0, 6, 9, 12]
    gaps = [later - earlier for earlier, later in zip(measured.epochs, measured.epochs[1:], strict=False)]
    assert min(gaps) >= 3
    assert any(epoch % 3 for epoch in measured.epochs)


def test_the_first_measurement_is_always_made(tmp_path: Path, clock: Clock) -> None:
    with robustness_warnings() as messages:
        measured = fit(tmp_path, clock, overhead_budget=1e-9, epochs=7)
    assert measured.epochs == [0]
    assert len(messages) == 1
    assert "made 1 of 7 measurements within `overhead_budget=1e-09`; the last one took 0.5 s." in messages[0]


@pytest.mark.parametrize(("epochs", "told"), [(11, True), (12, False)])
def test_fewer_than_five_measurements_are_told_at_the_end(
    tmp_path: Path, clock: Clock, epochs: int, told: bool
) -> None:
    with robustness_warnings() as messages:
        measured = fit(tmp_path, clock, overhead_budget=BUDGET, epochs=epochs)
    assert (len(measured.epochs) < 5) is told
    assert len(messages) == told


def test_the_samples_are_the_same_at_every_measurement(tmp_path: Path, clock: Clock) -> None:
    history = History()
    measured = fit(tmp_path, clock, history, overhead_budget=BUDGET)
    bounded, (unbounded,) = measured.metric.seen, fit(tmp_path, clock, epochs=1).metric.seen
    assert len(bounded) > 5
    assert all(torch.equal(inputs, unbounded) for inputs in bounded)
    assert {row["robust/num_samples"] for row in history.rows} == {10}
    assert len({row["robust/total"] for row in history.rows}) == 1


def test_measurements_outside_of_fit_are_not_bounded(tmp_path: Path, clock: Clock) -> None:
    metric = Costly(wait_by(clock), [100.0])
    run = trainer(RobustnessMonitor([metric], overhead_budget=1e-9), root=tmp_path)
    for count in range(1, 4):
        run.validate(classifier(), loader(), verbose=False)
        assert len(metric.seen) == count
    run.test(classifier(), loader(), verbose=False)
    assert len(metric.seen) == 4


def test_sanity_checking_is_neither_measured_nor_the_first(tmp_path: Path, clock: Clock) -> None:
    metric = Costly(wait_by(clock), [0.5])
    run = trainer(
        RobustnessMonitor([metric], overhead_budget=1e-9), root=tmp_path, max_epochs=1, num_sanity_val_steps=1
    )
    run.fit(Slow(clock), loader(), loader())
    assert len(metric.seen) == 1


@pytest.mark.parametrize(("budget", "epochs"), [(BUDGET, [0, 11, 12, 13, 14, 15]), (None, list(range(16)))])
def test_garbage_is_collected_before_the_first_measurement_lest_it_be_an_estimate_for_the_second(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, budget: float | None, epochs: list[int]
) -> None:
    collected: list[float] = []

    def collect() -> None:
        collected.append(clock.now)
        clock.now += 2

    monkeypatch.setattr(schedule, "gc", SimpleNamespace(collect=collect))
    begun = clock.now
    measured = fit(tmp_path, clock, costs=[0.2], epochs=16, overhead_budget=budget)
    assert measured.epochs == epochs  # the second one after 2.2 + 0.2 of 50.4 seconds
    assert collected == ([] if budget is None else [begun + EPOCH])
    if budget is not None:
        assert measured.shares[:2] == pytest.approx([2.2 / 6.2, 2.4 / 50.4], rel=1e-6)


def test_what_cannot_be_measured_is_no_measurement_within_a_budget(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "gc", SimpleNamespace(collect=lambda: pytest.fail("nothing is measured")))
    metric = Costly(wait_by(clock), [0.2])
    monitor = RobustnessMonitor([metric], dataloader_idx=1, overhead_budget=BUDGET)
    with robustness_warnings() as messages:
        trainer(monitor, root=tmp_path, max_epochs=3).fit(Slow(clock), loader(), loader())
    assert len(messages) == 1
    assert metric.seen == []
    times = monitor.state_dict()["times"]
    assert (times["made"], times["left_out"], times["spent"]) == (0, 0, 0)


def test_a_measurement_that_fails_has_cost_its_time(tmp_path: Path, clock: Clock) -> None:
    class Failing(Costly):
        def compute(self) -> dict[str, Tensor]:
            super().compute()
            raise ValueError("too late")

    metric = Failing(wait_by(clock), [0.5])
    run = trainer(RobustnessMonitor([metric], overhead_budget=BUDGET), root=tmp_path, max_epochs=8)
    data = loader(samples(8 * STEPS), batch_size=8)
    with robustness_warnings():
        run.fit(Slow(clock), data, data)
    assert len(metric.seen) == len(expected_epochs([0.5], epochs=8, budget=BUDGET)) == 3


# --- what is logged -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, BUDGET])
def test_the_share_of_the_time_so_far_is_logged(tmp_path: Path, clock: Clock, budget: float | None) -> None:
    with robustness_warnings():
        measured = fit(tmp_path, clock, costs=[0.5], epochs=8, overhead_budget=budget)
    expected = [
        0.5 * count / (EPOCH * (epoch + 1) + 0.5 * count) for count, epoch in enumerate(measured.epochs, start=1)
    ]
    assert measured.shares == pytest.approx(expected, rel=1e-6)


def test_the_share_of_a_real_run_is_at_least_what_was_slept(tmp_path: Path) -> None:
    metric = Costly(time.sleep, [0.2])
    run = trainer(RobustnessMonitor([metric]), root=tmp_path, max_epochs=3)
    start = time.perf_counter()
    run.fit(classifier(), loader(), loader())
    whole = time.perf_counter() - start
    assert 0.6 / whole <= float(run.callback_metrics["robust/overhead"]) < 1


def test_no_share_is_logged_outside_of_fit(tmp_path: Path) -> None:
    model, run = classifier(), trainer(RobustnessMonitor(["linearized_accuracy"]), root=tmp_path, max_epochs=1)
    run.fit(model, loader(), loader())
    assert 0 < float(run.callback_metrics["robust/overhead"]) < 1
    for measure in (run.validate, run.test):
        (values,) = measure(model, loader(), verbose=False)
        assert "robust/seconds" in values
        assert "robust/overhead" not in values


# --- resuming -------------------------------------------------------------------------------------------------------


class Killer(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.current_epoch == 6:
            raise KilledError


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_goes_on_counting(tmp_path: Path, clock: Clock) -> None:
    costs = [0.5]
    whole = fit(tmp_path, clock, costs=costs, epochs=20, overhead_budget=BUDGET)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
    with pytest.raises(KilledError):
        fit(tmp_path, clock, checkpoint, Killer(), costs=costs, epochs=20, overhead_budget=BUDGET)
    clock.now += 1e6  # until it is resumed
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
    last = str(tmp_path / "last.ckpt")
    resumed = fit(tmp_path, clock, checkpoint, costs=costs, epochs=20, ckpt_path=last, overhead_budget=BUDGET)
    after = [epoch for epoch in whole.epochs if epoch >= 6]
    assert len(after) > 3
    assert resumed.epochs == after
    assert resumed.shares == pytest.approx(whole.shares[-len(after) :], rel=1e-6)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_measurements_before_a_run_was_resumed_are_points_of_its_curve(tmp_path: Path, clock: Clock) -> None:
    """Five measurements are a curve, also if more of them were made before the run was resumed than after."""
    with robustness_warnings() as messages:
        first, second = (ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False) for _ in range(2))
        before = fit(tmp_path, clock, first, epochs=13, overhead_budget=BUDGET)
        after = fit(tmp_path, clock, second, epochs=18, ckpt_path=str(tmp_path / "last.ckpt"), overhead_budget=BUDGET)
    assert len(before.epochs) >= 5
    assert 0 < len(after.epochs) < 5
    assert messages == []


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("between", ["validate", "test"])
def test_what_is_measured_after_a_run_is_no_part_of_its_times(tmp_path: Path, clock: Clock, between: str) -> None:
    metric = Costly(wait_by(clock), [0.5])
    monitor, model = RobustnessMonitor([metric], max_samples=10, overhead_budget=BUDGET), Slow(clock)
    data = loader(samples(8 * STEPS), batch_size=8)
    run = trainer(monitor, root=tmp_path, max_epochs=13)
    run.fit(model, data, data)
    before, count = monitor.state_dict(), len(metric.seen)
    getattr(run, between)(model, data, verbose=False)
    assert len(metric.seen) == count + 1
    assert monitor.state_dict() | {"values": None} == before | {"values": None}
    run.save_checkpoint(tmp_path / "later.ckpt", weights_only=False)
    whole = fit(tmp_path, clock, costs=[0.5], epochs=20, overhead_budget=BUDGET).epochs
    resumed = fit(tmp_path, clock, epochs=20, ckpt_path=str(tmp_path / "later.ckpt"), overhead_budget=BUDGET).epochs
    assert resumed == [epoch for epoch in whole if epoch >= 13] != []


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget", [0, 0.0, -1, -0.05, 1.5, 5, "x", "0.05", True, False, math.nan, math.inf, [0.05], 1j, {}], ids=repr
)
def test_a_budget_that_is_no_share_is_refused(budget: Any) -> None:
    with pytest.raises(MisconfigurationException, match="`overhead_budget`") as raised:
        RobustnessMonitor(overhead_budget=budget)
    assert str(raised.value).endswith(f"but got {budget!r}.")


@pytest.mark.parametrize("budget", [1, 1.0, 0.05, Fraction(1, 20), torch.tensor(0.5), 1e-300], ids=repr)
def test_a_share_is_taken(budget: Any) -> None:
    assert RobustnessMonitor(overhead_budget=budget).overhead_budget == float(budget)


# --- several processes ----------------------------------------------------------------------------------------------

COSTS = (0.1, 0.8071)  # of a measurement, by process


def measure_in_two(rank: int, root: Path) -> tuple[list[int], list[float]]:
    clock = Clock()
    overhead.time = SimpleNamespace(perf_counter=clock)  # type: ignore[assignment]
    steps = {"limit_train_batches": STEPS, "strategy": "ddp", "devices": 2}
    metric = Costly(wait_by(clock), [COSTS[rank]])
    measured = Measured(metric)
    data = loader(samples(16 * STEPS), batch_size=8)
    monitor = RobustnessMonitor([metric], max_samples=10, overhead_budget=BUDGET)
    run = trainer(monitor, measured, root=root, max_epochs=20, num_sanity_val_steps=0, **steps)
    run.fit(Slow(clock), data, data)
    return measured.epochs, measured.shares


@pytest.mark.ddp
def test_processes_of_different_speeds_decide_alike_by_the_slowest(tmp_path: Path) -> None:
    (fast, fast_shares), (slow, slow_shares) = processes.run(measure_in_two, 2, tmp_path)
    assert fast == slow == expected_epochs([COSTS[1]], epochs=20, budget=BUDGET)
    assert slow != expected_epochs([COSTS[0]], epochs=20, budget=BUDGET)
    assert fast_shares == slow_shares
    assert slow_shares[-1] <= 0.055


def test_the_time_in_which_a_measurement_is_left_out_is_spent_but_no_part_of_its_cost(clock: Clock) -> None:
    clocks = Overhead()
    clocks.begin()
    clocks.begin_measurement()
    with clocks.counted():
        clock.now += 3
    with clocks.counted(as_cost=False):
        clock.now += 1
    assert clocks.times == Times(4, 4, 3)


def test_the_share_is_logged_where_a_measurement_is_left_out(tmp_path: Path, clock: Clock) -> None:
    shares: list[float] = []

    class Watch(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if not trainer.sanity_checking:
                shares.append(float(trainer.callback_metrics["robust/overhead"]))

    with robustness_warnings():
        fit(tmp_path, clock, Watch(), costs=[0.65], overhead_budget=BUDGET, epochs=6)
    assert len(set(shares)) == 6
    assert shares[0] > BUDGET
