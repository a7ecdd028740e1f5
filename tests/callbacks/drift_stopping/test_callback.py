"""The drift stopper in real runs: when it stops, what it reports, which weights it restores, and how it resumes."""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_robust import (
    FisherRaoMargin,
    FisherSpectralNorm,
    Probe,
    ProbeMetric,
    RobustnessDriftStopping,
    RobustnessMonitor,
)
from tests.helpers import processes
from tests.helpers.interrupted import Repeatable
from tests.helpers.training import Classifier, classifier, loader, robustness_warnings, samples, trainer

KEY = "robust/quality"
STATES = Path(__file__).parent / "states"
STEPS = 2  # of an epoch
FALL = [0.5, 0.6, 0.7, 0.7, 0.7] + [0.4] * 30  # epochs 2 to 4 have the best mean of three


class Quality(ProbeMetric):
    """Returns the next of the given values in each validation; raises if it is None."""

    higher_is_better = True

    def __init__(
        self,
        values: Sequence[float | None],
        *,
        stderr: float | None = None,
        key: str = "quality",
        steps: int = STEPS,
    ) -> None:
        super().__init__()
        self.add_float64_state("count")
        self.values, self.stderr, self.key, self.steps = values, stderr, key, steps
        self.number = 0

    def _add(self, probe: Probe) -> None:
        module = probe.model
        assert isinstance(module, LightningModule)
        self.number = module.global_step // self.steps - 1  # also in a resumed run
        if self.values[self.number] is None:
            raise ValueError("no value")
        self.count = self.count + len(probe)

    def compute(self) -> dict[str, Tensor]:
        value = self.values[self.number]
        assert value is not None
        computed = {self.key: torch.tensor(value)}
        return computed if self.stderr is None else computed | {f"{self.key}_stderr": torch.tensor(self.stderr)}


class Harm(Quality):
    higher_is_better = False


class Accuracy(Repeatable):
    """Logs the given clean accuracies, one per epoch."""

    def __init__(self, values: Sequence[float], key: str = "val_acc") -> None:
        super().__init__(classifier().network)
        self.accuracies, self.key = values, key

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        value = math.nan if self.trainer.sanity_checking else self.accuracies[self.current_epoch]
        self.log(self.key, value, batch_size=1)


class Weights(Callback):
    """Keeps the weights of each validation, by epoch."""

    def __init__(self) -> None:
        self.by_epoch: dict[int, dict[str, Tensor]] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.by_epoch[trainer.current_epoch] = copy.deepcopy(pl_module.state_dict())


class KilledError(Exception):
    pass


class Killer(Callback):
    """Ends a run in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise KilledError


def module() -> Repeatable:
    return Repeatable(classifier().network)


def monitor(*metrics: ProbeMetric, **options: Any) -> RobustnessMonitor:
    return RobustnessMonitor(metrics, max_samples=8, **options)


def fit(
    root: Path,
    *callbacks: Callback,
    model: Classifier | None = None,
    ckpt_path: Path | None = None,
    steps: int = STEPS,
    **options: Any,
) -> Trainer:
    data = loader(samples(8 * steps), batch_size=8)
    checkpointing = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    run = trainer(*callbacks, root=root, **{"max_epochs": 20, "enable_checkpointing": checkpointing} | options)
    run.fit(model or module(), data, data, ckpt_path=None if ckpt_path is None else str(ckpt_path), weights_only=True)
    return run


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def series(stopper: RobustnessDriftStopping, key: str = KEY) -> list[float]:
    """The values that it has counted, rounded because they are logged as float32."""
    return [round(value, 5) for value in stopper.state_dict()["record"]["series"][key]["values"]]


@contextmanager
def put_back() -> Iterator[list[str]]:
    """Collect what is logged about weights that were put back."""
    logger, messages, handler = logging.getLogger("lightning.pytorch.utilities.rank_zero"), [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    found: list[str] = []
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        found.extend(message for message in messages if "put back" in message)


# --- when it stops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [1, 3, 5])
def test_a_run_is_stopped_in_the_epoch_in_which_the_drift_is_complete(tmp_path: Path, patience: int) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=patience)
    run = fit(tmp_path, monitor(Quality(FALL)), stopper)
    assert stopper.stopped_epoch == 4 + patience
    assert run.current_epoch == 5 + patience  # Lightning counts the finished one
    assert run.should_stop
    assert stopper.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED
    assert (stopper.wait_count, stopper.best_epoch) == (patience, 2)
    assert float(stopper.best_score) == pytest.approx(0.7)


def test_a_run_that_does_not_drift_is_not_stopped_and_does_not_warn(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=3)
    with robustness_warnings() as messages:
        run = fit(tmp_path, monitor(Quality([0.5, 0.6, 0.3, 0.3, 0.6] * 2)), stopper, max_epochs=10)
    assert (run.current_epoch, stopper.stopped_epoch, stopper.stopping_reason_message) == (10, 0, None)
    assert stopper.stopping_reason is EarlyStoppingReason.NOT_STOPPED
    assert messages == []


def test_the_default_follows_a_key_that_the_default_metrics_log(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping()
    run = fit(tmp_path, RobustnessMonitor(max_samples=8), stopper, max_epochs=7)
    assert len(series(stopper, stopper.monitor)) == 7
    assert stopper.monitor in run.callback_metrics


@pytest.mark.parametrize(("cls", "stops"), [(Quality, True), (Harm, False)])
def test_the_metric_decides_whether_a_fall_counts_as_drift(tmp_path: Path, cls: type[Quality], stops: bool) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=3)
    fit(tmp_path, monitor(cls([1.0] * 3 + [0.5] * 20)), stopper, max_epochs=8)
    assert stopper.stopped_epoch == (5 if stops else 0)


@pytest.mark.parametrize(("cls", "stops"), [(Quality, False), (Harm, True)])
def test_the_metric_decides_whether_a_rise_counts_as_drift(tmp_path: Path, cls: type[Quality], stops: bool) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=3)
    fit(tmp_path, monitor(cls([1.0] * 3 + [1.5] * 20)), stopper, max_epochs=8)
    assert stopper.stopped_epoch == (5 if stops else 0)


@pytest.mark.parametrize(("stderr", "stopped"), [(None, 5), (0.1, 5), (0.2, 0)])
def test_a_fall_within_the_logged_standard_errors_is_no_drift(
    tmp_path: Path, stderr: float | None, stopped: int
) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=3)
    fit(tmp_path, monitor(Quality([1.0] * 3 + [0.6] * 20, stderr=stderr)), stopper, max_epochs=8)
    assert stopper.stopped_epoch == stopped


class OnSamples(Quality):
    """Values are means over samples with a much larger spread; ``shuffled`` draws a new order for each value."""

    def __init__(self, values: Sequence[float], *, spread: float = 2.0, shuffled: bool = False) -> None:
        super().__init__(values, stderr=spread / math.sqrt(8))
        self.spread, self.shuffled = spread, shuffled

    def compute(self) -> dict[str, Tensor]:
        computed, generator = super().compute(), torch.Generator().manual_seed(self.number)
        deviations = self.spread * torch.linspace(-1.5, 1.5, 8) + 0.1 * torch.randn(8, generator=generator)
        order = torch.randperm(8, generator=generator) if self.shuffled else torch.arange(8)
        self.per_sample = {self.key: computed[self.key] + (deviations - deviations.mean())[order]}
        return computed


@pytest.mark.parametrize(("shuffled", "stopped"), [(False, 5), (True, 0)])
def test_measurements_of_the_same_samples_are_told_apart_within_their_standard_errors(
    tmp_path: Path, shuffled: bool, stopped: int
) -> None:
    metric = OnSamples([1.0] * 3 + [0.6] * 20, shuffled=shuffled)
    measuring, stopper = monitor(metric), RobustnessDriftStopping(KEY, patience=3)
    fit(tmp_path, measuring, stopper, max_epochs=8)
    assert stopper.stopped_epoch == stopped
    last = measuring.per_sample[KEY]
    assert last.dtype == torch.float32
    assert float(last.mean()) == pytest.approx(0.6)


def test_values_per_sample_that_are_not_finite_are_not_paired(tmp_path: Path) -> None:
    class Endless(OnSamples):
        def compute(self) -> dict[str, Tensor]:
            computed = super().compute()
            self.per_sample[self.key][0] = math.inf
            return computed

    stopper = RobustnessDriftStopping(KEY, patience=3)
    fit(tmp_path, monitor(Endless([1.0] * 3 + [0.6] * 20)), stopper, max_epochs=8)
    assert stopper.stopped_epoch == 0


@pytest.mark.parametrize(
    "odd",
    [None, [torch.ones(8)], {"quality": None}, {"quality": torch.ones(8, 1)}, {"quality": torch.ones(0)}],
    ids=str,
)
def test_values_per_sample_of_a_wrong_kind_are_a_failure_of_the_metric(tmp_path: Path, odd: Any) -> None:
    class Odd(Quality):
        def compute(self) -> dict[str, Tensor]:
            self.per_sample = odd
            return super().compute()

    measuring = monitor(Odd([1.0] * 20), FisherSpectralNorm())
    with robustness_warnings() as messages:
        run = fit(tmp_path, measuring, RobustnessDriftStopping("robust/fim_spectral_norm", warmup=1), max_epochs=2)
    assert run.current_epoch == 2
    assert "robust/fim_spectral_norm" in run.callback_metrics
    assert [message for message in messages if "Odd" in message]


def test_per_sample_values_are_copies(tmp_path: Path) -> None:
    """A metric may reuse its buffer."""
    kept = []

    class Buffered(OnSamples):
        buffer = torch.empty(100, dtype=torch.float32)

        def compute(self) -> dict[str, Tensor]:
            computed = super().compute()
            self.buffer[:8] = self.per_sample[self.key]
            self.per_sample = {self.key: self.buffer[:8].requires_grad_()}
            return computed

    class Keeper(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            kept.extend(measuring.per_sample.values())

    measuring = monitor(Buffered([1.0] * 3 + [0.6] * 20))
    fit(tmp_path, measuring, Keeper(), max_epochs=5, num_sanity_val_steps=0)
    assert [round(float(found.mean()), 5) for found in kept] == [1.0] * 3 + [0.6] * 2
    assert all(found.untyped_storage().nbytes() == 4 * 8 for found in kept)
    assert not any(found.requires_grad for found in kept)


def test_fluctuations_that_no_standard_error_contains_are_no_drift(tmp_path: Path) -> None:
    unsteady = [1.0, 0.8, 1.0, 0.8, 1.0] + [0.8, 0.78, 0.8, 0.78, 0.8] * 3
    stopper = RobustnessDriftStopping(KEY, patience=3)
    fit(tmp_path, monitor(Quality(unsteady)), stopper, max_epochs=8)
    assert stopper.stopped_epoch == 0
    steady = [0.9, 0.9, 0.9, 0.9, 0.9, *unsteady[5:]]
    fit(tmp_path, monitor(Quality(steady)), stopper, max_epochs=8)
    assert stopper.stopped_epoch == 7


def test_the_warm_up_does_not_count(tmp_path: Path) -> None:
    values = [9.0, 9.0] + [1.0] * 4 + [0.5] * 20
    stopper = RobustnessDriftStopping(KEY, patience=3, warmup=2)
    fit(tmp_path, monitor(Quality(values)), stopper)
    assert stopper.stopped_epoch == 8
    assert stopper.best_epoch == 2


def test_a_fixed_reference_takes_the_place_of_the_best(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=3, reference=0.55, tolerance=0, z=0)
    fit(tmp_path, monitor(Quality([0.6, 0.9, 0.56, 0.56, 0.56, 0.5, 0.5, 0.5, 0.5])), stopper, max_epochs=9)
    assert stopper.stopped_epoch == 7


# --- what it counts -------------------------------------------------------------------------------------------------


def test_old_values_are_not_counted(tmp_path: Path) -> None:
    """`callback_metrics` holds the values of the last measurement until the next one."""
    values = [epoch / 100 for epoch in range(12)]
    stopper = RobustnessDriftStopping(KEY, patience=2)
    fit(tmp_path, monitor(Quality(values), every_n_epochs=3), stopper, max_epochs=12)
    assert series(stopper) == [0.0, 0.03, 0.06, 0.09]


@pytest.mark.parametrize("patience", [2, 3])
def test_measurements_are_counted_and_not_validations(tmp_path: Path, patience: int) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=patience)
    values = [1.0] * 10 + [0.5] * 30  # measured in epochs 0, 5, 10, …
    fit(tmp_path, monitor(Quality(values), every_n_epochs=5), stopper, max_epochs=40)
    assert stopper.stopped_epoch == 5 + 5 * patience


def test_measurements_in_every_second_epoch_are_counted(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=3)
    fit(tmp_path, monitor(Quality([1.0] * 4 + [0.5] * 20)), stopper, check_val_every_n_epoch=2)
    assert stopper.stopped_epoch == 9  # of 1, 3, 5, 7, 9
    assert len(series(stopper)) == 5


def test_several_measurements_in_an_epoch_are_counted(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=3)
    run = fit(tmp_path, monitor(Quality([1.0] * 3 + [0.5] * 20, steps=1)), stopper, val_check_interval=0.5)
    assert stopper.stopped_epoch == 2
    assert run.global_step == 6
    assert len(series(stopper)) == 6


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_values_that_are_missing_or_not_finite_are_skipped(tmp_path: Path, missing: float | None) -> None:
    values = [missing, 0.6, 0.7, missing, 0.7, 0.4, missing, missing, 0.4, 0.4] + [0.4] * 10
    stopper = RobustnessDriftStopping(KEY, patience=3)
    with robustness_warnings() as messages:
        fit(tmp_path, monitor(Quality(values)), stopper)
    assert stopper.stopped_epoch == 9
    assert series(stopper) == [0.6, 0.7, 0.7, 0.4, 0.4, 0.4]
    assert messages
    if missing is None:
        assert [message.split(":")[0] for message in messages] == [
            "RobustnessMonitor skipped the measurement in epoch 0",
            "RobustnessMonitor skipped 3 more measurements, for the reason given in epoch 0.",
        ]
    else:
        assert all("is not finite, so it is not logged" in message for message in messages)


def test_values_of_the_user_that_are_not_finite_are_skipped_with_one_warning(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping("val_acc", mode="max", patience=2)
    with robustness_warnings() as messages:
        fit(tmp_path, stopper, model=Accuracy([0.9, 0.9, math.nan, 0.5, math.inf, 0.5, 0.5]), max_epochs=7)
    assert stopper.stopped_epoch == 5
    assert messages == [
        "RobustnessDriftStopping skips values of `val_acc` that are not finite: they count neither as best nor as"
        " drift."
    ]


def test_neither_sanity_checking_nor_validation_outside_of_fit_counts(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping("val_acc", mode="max", patience=2)
    model = Accuracy([0.9, 0.9, 0.7, 0.7, 0.7])
    run = fit(tmp_path, stopper, model=model, max_epochs=5, num_sanity_val_steps=2)
    assert series(stopper, "val_acc") == [0.9, 0.9, 0.7, 0.7]
    before = stopper.state_dict()
    model.accuracies = [0.1] * 20
    run.validate(model, loader(), verbose=False)
    assert stopper.state_dict() == before


def test_a_second_run_with_the_same_stopper_begins_anew(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=3)
    ends = []
    for _ in range(2):
        fit(tmp_path, monitor(Quality(FALL)), stopper)
        ends.append((stopper.stopped_epoch, stopper.stopping_reason_message, stopper.best_epoch, series(stopper)))
    assert ends[0][0] == 7
    assert ends[1] == ends[0]


def test_a_run_continues_until_min_epochs(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=3)
    run = fit(tmp_path, monitor(Quality(FALL)), stopper, min_epochs=12)
    assert run.current_epoch == 12


def test_a_fast_dev_run_is_not_stopped(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=1, reference=1.0)
    run = fit(tmp_path, monitor(Quality([0.1], steps=1)), stopper, fast_dev_run=True)
    assert run.state.finished
    assert stopper.stopping_reason is EarlyStoppingReason.NOT_STOPPED


def test_a_fast_dev_run_does_not_warn(tmp_path: Path) -> None:
    with robustness_warnings() as messages:
        fit(tmp_path, monitor(Quality([0.1], steps=1)), RobustnessDriftStopping(KEY), fast_dev_run=True)
    assert messages == []


# --- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "stopped"), [("max", 4), ("min", 0)])
def test_a_key_of_the_user_is_followed_in_the_given_direction(tmp_path: Path, mode: Any, stopped: int) -> None:
    stopper = RobustnessDriftStopping("val_acc", mode=mode, patience=2)
    fit(tmp_path, stopper, model=Accuracy([0.9, 0.9, 0.9, 0.5, 0.5, 0.5]), max_epochs=6)
    assert stopper.stopped_epoch == stopped


def test_a_direction_that_agrees_with_the_metric_is_accepted(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping(KEY, mode="min", patience=3)
    fit(tmp_path, monitor(Harm([1.0] * 3 + [1.5] * 20)), stopper)
    assert stopper.stopped_epoch == 5


def test_a_direction_that_contradicts_the_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"`mode` to be None or 'max' for `robust/quality`.*'min'"):
        fit(tmp_path, monitor(Quality(FALL)), RobustnessDriftStopping(KEY, mode="min"))
    with pytest.raises(MisconfigurationException, match=r"`mode` to be None or 'min'.*lower values are better"):
        fit(tmp_path, monitor(Harm(FALL)), RobustnessDriftStopping(KEY, mode="max"))


def test_a_key_that_no_monitor_logs_needs_a_direction(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="does not know whether high values of `val_acc` are good"):
        fit(tmp_path, monitor(Quality(FALL)), RobustnessDriftStopping("val_acc"))
    with pytest.raises(MisconfigurationException, match="there is no RobustnessMonitor in this Trainer"):
        fit(tmp_path, RobustnessDriftStopping(KEY))


def test_a_key_of_the_monitor_without_a_metric_needs_a_direction(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match="does not know whether high values of `robust/num_samples` are good"
    ):
        fit(tmp_path, monitor(Quality(FALL)), RobustnessDriftStopping("robust/num_samples"))
    stopper = RobustnessDriftStopping("robust/num_samples", mode="max")
    fit(tmp_path, monitor(Quality(FALL)), stopper, max_epochs=6)
    assert series(stopper, "robust/num_samples") == [8.0] * 6


def test_a_key_of_a_metric_that_cannot_say_what_is_better_needs_a_direction(tmp_path: Path) -> None:
    paths = FisherRaoMargin(num_targets=1)
    message = "does not know whether high values of `robust/shielded` are good: its metric says that neither"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, monitor(paths), RobustnessDriftStopping("robust/shielded"), max_epochs=2)
    for key, mode, reference in (("robust/shielded", "min", 2.0), ("robust/fisher_rao_margin_l2", None, -1.0)):
        stopper = RobustnessDriftStopping(key, mode=mode, reference=reference)
        fit(tmp_path, monitor(paths), stopper, max_epochs=6)
        assert len(series(stopper, key)) == 6


def test_an_unknown_key_is_refused_with_a_list_of_available_keys(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException) as raised:
        fit(tmp_path, monitor(Quality(FALL, stderr=0.1)), RobustnessDriftStopping("robust/qualty"))
    message = str(raised.value)
    assert "`robust/qualty`, which is not logged. Did you mean `robust/quality`?" in message
    available = message.partition("Available: ")[2]
    assert {"`robust/quality`", "`robust/num_samples`", "`val_acc`"} <= set(available.rstrip(".").split(", "))
    assert "stderr" not in available


def test_an_unknown_key_of_the_user_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"Did you mean `val_acc`\?.*pass `strict=False`"):
        fit(tmp_path, RobustnessDriftStopping("val_ac", mode="max"))


def test_without_strict_a_key_may_be_logged_later(tmp_path: Path) -> None:
    class Late(Accuracy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.current_epoch >= 3:
                super().validation_step(batch, batch_idx)

    values = [0.0] * 3 + [0.9, 0.9, 0.5, 0.5, 0.5]
    with pytest.raises(MisconfigurationException, match="which is not logged"):
        fit(tmp_path, RobustnessDriftStopping("val_acc", mode="max"), model=Late(values))
    stopper = RobustnessDriftStopping("val_acc", mode="max", patience=2, strict=False)
    fit(tmp_path, stopper, model=Late(values), max_epochs=8)
    assert stopper.stopped_epoch == 6


def test_without_strict_a_key_that_is_never_logged_is_reported_at_the_end(tmp_path: Path) -> None:
    with robustness_warnings() as messages:
        run = fit(tmp_path, RobustnessDriftStopping("other", mode="max", strict=False), max_epochs=3)
    assert run.state.finished
    assert len(messages) == 1
    assert "`other` was never logged in a validation" in messages[0]


@pytest.mark.parametrize(
    ("keys", "combine", "stopped"),
    [
        (["robust/a", "robust/b", "robust/c"], {}, 5),
        (["robust/a", "robust/b", "robust/c"], {"combine": "any"}, 5),
        (["robust/a", "robust/b", "robust/c"], {"combine": "all"}, 11),
        ({"robust/a": 1, "robust/b": 1, "robust/c": 3}, {}, 5),
        ({"robust/a": 3, "robust/b": 1, "robust/c": 1}, {"combine": "all"}, 11),
    ],
)
def test_several_keys_stop_a_run_together_whatever_their_weights(
    tmp_path: Path, keys: Any, combine: dict[str, Any], stopped: int
) -> None:
    metrics = [
        Quality([1.0] * 3 + [0.5] * 20, key="a"),
        Harm([1.0] * 6 + [1.5] * 20, key="b"),
        Quality([1.0] * 9 + [0.5] * 20, key="c"),
    ]
    stopper = RobustnessDriftStopping(keys, patience=3, **combine)
    fit(tmp_path, monitor(*metrics), stopper)
    assert stopper.stopped_epoch == stopped


def test_keys_of_several_monitors_are_followed_each_at_its_cadence(tmp_path: Path) -> None:
    often = monitor(Quality([1.0] * 20))
    rarely = monitor(Quality([1.0] * 4 + [0.5] * 20), every_n_epochs=2, log_key_prefix="robust/rare/")
    stopper = RobustnessDriftStopping([KEY, "robust/rare/quality"], patience=3)
    fit(tmp_path, often, rarely, stopper)
    assert stopper.stopped_epoch == 8  # epochs 4, 6 and 8
    assert series(stopper, "robust/rare/quality") == [1.0, 1.0, 0.5, 0.5, 0.5]


# --- what it says ---------------------------------------------------------------------------------------------------


def test_the_reason_gives_the_fall_its_epochs_and_the_change_of_accuracy(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=3)
    model = Accuracy([0.5, 0.55, 0.6, 0.62, 0.64, 0.66, 0.68, 0.725])
    fit(tmp_path, monitor(Quality(FALL)), stopper, model=model, max_epochs=8)
    assert stopper.stopping_reason_message == (
        "RobustnessDriftStopping stops: robust/quality fell 42.9 % below its best at epoch 2 over 3 measurements"
        " (on average 0.7000 to 0.4000); clean accuracy rose 12.5 points (val_acc)."
    )


def test_accuracies_fall_by_points(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping("robust/linearized_accuracy_linf_0.1", patience=1)
    metrics = [Quality(FALL, key="linearized_accuracy_linf_0.1"), Quality([0.9] * 20, key="linearized_accuracy_linf_0")]
    fit(tmp_path, monitor(*metrics), stopper, model=Accuracy([0.5] * 20))
    assert stopper.stopping_reason_message == (
        "RobustnessDriftStopping stops: robust/linearized_accuracy_linf_0.1 fell 30.0 points below its best at epoch 2"
        " over 1 measurement (0.7000 to 0.4000); clean accuracy stayed (robust/linearized_accuracy_linf_0)."
    )


def test_accuracies_that_are_logged_in_percent_stay_in_percent(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=2)
    fit(tmp_path, monitor(Quality([2.0, 2.0, 1.0, 1.0])), stopper, model=Accuracy([50, 51, 52, 62.5]), max_epochs=4)
    assert stopper.stopping_reason_message is not None
    assert stopper.stopping_reason_message.endswith("clean accuracy rose 12.5 points (val_acc).")


def test_where_lower_is_better_the_reason_says_that_it_rose(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=2)
    fit(tmp_path, monitor(Harm([2.0, 2.0, 3.0, 3.0])), stopper, model=Accuracy([0.9, 0.9, 0.8, 0.8]), max_epochs=4)
    assert stopper.stopping_reason_message == (
        "RobustnessDriftStopping stops: robust/quality rose 50.0 % above its best at epoch 0 over 2 measurements"
        " (on average 2.000 to 3.000); clean accuracy fell 10.0 points (val_acc)."
    )


def test_a_fixed_reference_is_not_called_the_best(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=2, reference=0.5)
    fit(tmp_path, monitor(Quality([0.6, 0.6, 0.4, 0.4])), stopper, model=Accuracy([0.9] * 4), max_epochs=4)
    message = stopper.stopping_reason_message
    assert message is not None
    assert "robust/quality fell 20.0 % below its reference 0.5 over 2 measurements (on average 0.4000)" in message
    assert "best" not in message


def test_the_reason_names_all_keys_that_have_drifted_and_no_others(tmp_path: Path) -> None:
    metrics = [Quality(FALL, key="a"), Quality([0.5] * 20, key="b"), Quality(FALL, key="c")]
    stopper = RobustnessDriftStopping(["robust/a", "robust/b", "robust/c"], patience=3)
    fit(tmp_path, monitor(*metrics), stopper)
    message = stopper.stopping_reason_message
    assert message is not None
    assert [f"robust/{key} fell" in message for key in "abc"] == [True, False, True]


def test_each_drift_warns_once_and_training_continues(tmp_path: Path) -> None:
    values = [1.0] * 3 + [0.5] * 4 + [1.0] * 2 + [0.4] * 4
    stopper = RobustnessDriftStopping(KEY, patience=2, action="warn")
    with robustness_warnings() as messages:
        run = fit(tmp_path, monitor(Quality(values)), stopper, max_epochs=13)
    assert run.current_epoch == 13
    assert not run.should_stop
    assert stopper.stopped_epoch == 0
    assert len(messages) == 2
    assert all(message.startswith("RobustnessDriftStopping warns: robust/quality fell") for message in messages)
    assert all(message.endswith("Training goes on.") for message in messages)
    assert ["1.000 to 0.5000)" in message for message in messages] == [True, False]


@pytest.mark.parametrize(("max_epochs", "told"), [(1, True), (5, True), (6, False)])
def test_too_few_measurements_to_stop_a_run_are_reported_once_at_its_end(
    tmp_path: Path, max_epochs: int, told: bool
) -> None:
    with robustness_warnings() as messages:
        fit(tmp_path, monitor(Quality([1.0] * 6)), RobustnessDriftStopping(KEY), max_epochs=max_epochs)
    assert len(messages) == told
    if told:
        count = "measured once" if max_epochs == 1 else f"measured {max_epochs} times"
        assert (
            f"could not have stopped this run: `{KEY}` was {count}, but a drift takes at least 6 measurements."
            in messages[0]
        )


def test_a_run_that_all_keys_must_stop_could_not_have_been_stopped_without_one_of_them(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping([KEY, "other"], mode="max", combine="all", strict=False)
    with robustness_warnings() as messages:
        fit(tmp_path, monitor(Quality([1.0] * 8)), stopper, max_epochs=8)
    assert len(messages) == 1
    assert "could not have stopped this run" in messages[0]
    assert "`other` was never logged in a validation" in messages[0]


# --- the best weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_epochs", [6, 20])
def test_the_best_weights_are_put_back_bit_by_bit_whether_or_not_the_run_was_stopped(
    tmp_path: Path, max_epochs: int
) -> None:
    stopper, weights, model = RobustnessDriftStopping(KEY, patience=3, restore_best_weights=True), Weights(), module()
    fit(
        tmp_path,
        monitor(Quality([0.5, 0.6, 0.7, 0.69] + [0.4] * 20)),
        stopper,
        weights,
        model=model,
        max_epochs=max_epochs,
    )
    assert stopper.best_epoch == 2
    assert same(model.state_dict(), weights.by_epoch[2])
    assert not same(model.state_dict(), weights.by_epoch[max(weights.by_epoch)])


@pytest.mark.parametrize("epochs", [3, 5])
def test_weights_after_the_last_measurement_stay_if_that_was_the_best(tmp_path: Path, epochs: int) -> None:
    """After the last measurement, a budget or the cadence may leave epochs that are not measured."""
    stopper, weights, model = RobustnessDriftStopping(KEY, patience=3, restore_best_weights=True), Weights(), module()
    before = monitor(Quality([0.5, 0.0, 0.0, 0.0, 0.6] + [0.0] * 20), every_n_epochs=4)
    with robustness_warnings() as messages:
        fit(tmp_path, before, stopper, weights, model=model, max_epochs=epochs + 1)
    assert stopper.best_epoch == epochs // 5 * 4
    assert same(model.state_dict(), weights.by_epoch[epochs])
    assert len(messages) == 1  # it could not have stopped the run


def test_weights_stay_as_they_are_unless_the_best_ones_are_wanted(tmp_path: Path) -> None:
    weights, model = Weights(), module()
    fit(tmp_path, monitor(Quality(FALL)), RobustnessDriftStopping(KEY, patience=3), weights, model=model)
    assert same(model.state_dict(), weights.by_epoch[7])


@pytest.mark.parametrize(("cls", "mode", "best"), [(Quality, "max", 4), (Harm, "min", 1)])
def test_a_checkpoint_that_follows_the_same_key_picks_the_same_epoch(
    tmp_path: Path, cls: type[Quality], mode: Any, best: int
) -> None:
    values = [0.5, 0.2, 0.7, 0.2, 0.9, 0.9, 0.3, 0.3, 0.2]
    stopper, model = RobustnessDriftStopping(KEY, patience=3, restore_best_weights=True), module()
    checkpoint = ModelCheckpoint(tmp_path, monitor=KEY, mode=mode)
    fit(tmp_path, monitor(cls(values)), stopper, checkpoint, model=model, max_epochs=9)
    stored = torch.load(checkpoint.best_model_path, weights_only=True)
    assert stored["epoch"] == stopper.best_epoch == best
    assert same(model.state_dict(), stored["state_dict"])


def test_the_best_of_several_keys_has_the_best_weighted_relative_change(tmp_path: Path) -> None:
    a, b = [1.0, 2.0, 1.0], [1.0, 1.0, 0.6]  # half as good in epoch 2 as in epoch 1, and 40 % less harmful
    for weights, best in (({"robust/a": 1, "robust/b": 1}, 1), ({"robust/a": 1, "robust/b": 2}, 2)):
        stopper = RobustnessDriftStopping(weights, patience=1, tolerance=0.999)
        fit(tmp_path, monitor(Quality(a, key="a"), Harm(b, key="b")), stopper, max_epochs=3)
        assert stopper.best_epoch == best


def test_the_best_of_several_keys_survives_measurements_in_which_one_is_missing(tmp_path: Path) -> None:
    a, b = [1.0, None, 0.1, 0.2], [1.0, 1.1, None, 0.2]
    stopper = RobustnessDriftStopping(["robust/a", "robust/b"], patience=1, tolerance=0.999)
    with robustness_warnings():
        fit(tmp_path, monitor(Quality(a, key="a"), Quality(b, key="b")), stopper, max_epochs=4)
    assert stopper.best_epoch == 1


PUT_BACK = "RobustnessDriftStopping put back the weights of epoch 2: robust/quality 0.7000 instead of 0.4000 at epoch 7"
KEEP = " To keep the last weights, pass `restore_best_weights=False`."


@pytest.mark.parametrize(
    ("best", "last", "said"),
    [
        (0.6, 0.725, f"{PUT_BACK}, clean accuracy 60.0 % instead of 72.5 % (val_acc).{KEEP}"),
        (60.0, 72.5, f"{PUT_BACK}, clean accuracy 60.0 % instead of 72.5 % (val_acc).{KEEP}"),
        (0.725, 0.6, f"{PUT_BACK}, clean accuracy 72.5 % instead of 60.0 % (val_acc)."),
        (0.6, 0.60001, f"{PUT_BACK}, clean accuracy still 60.0 % (val_acc)."),
        (math.nan, 0.6, f"{PUT_BACK}."),
        (0.6, math.inf, f"{PUT_BACK}."),
    ],
)
def test_restoring_reports_its_gain_and_its_cost_in_accuracy(
    tmp_path: Path, best: float, last: float, said: str
) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=3, restore_best_weights=True)
    model = Accuracy([0.1, 0.1, best, 0.1, 0.1, 0.1, 0.1, last])
    with put_back() as messages:
        fit(tmp_path, monitor(Quality(FALL)), stopper, model=model, max_epochs=8)
    assert messages == [said]


def test_without_a_known_accuracy_restoring_reports_only_its_gain(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=3, restore_best_weights=True)
    with put_back() as messages:
        fit(tmp_path, monitor(Quality(FALL)), stopper, model=Accuracy([0.1] * 20, key="val_loss"))
    assert messages == [f"{PUT_BACK}."]


def test_restoring_reports_each_key_of_the_best_measurement(tmp_path: Path) -> None:
    a, b, c = [1.0, 3.0, 0.5, 0.4], [2.0, 1.0, 4.0, 5.0], [1.0, None, 1.0, 1.0]
    stopper = RobustnessDriftStopping(["robust/a", "robust/b", "c"], mode="max", restore_best_weights=True)
    with put_back() as messages, robustness_warnings():
        metrics = monitor(Quality(a, key="a"), Harm(b, key="b"))
        fit(tmp_path, metrics, stopper, model=Logging({"c": c, "val_acc": [0.5] * 4}), max_epochs=4)
    assert messages == [
        "RobustnessDriftStopping put back the weights of epoch 1: robust/a 3.000 instead of 0.4000 at epoch 3, robust/b"
        " 1.000 instead of 5.000 at epoch 3, clean accuracy still 50.0 % (val_acc)."
    ]


def test_nothing_is_reported_if_the_weights_stay(tmp_path: Path) -> None:
    with put_back() as messages:
        fit(tmp_path, monitor(Quality(FALL)), RobustnessDriftStopping(KEY, patience=3))
        fit(tmp_path, monitor(Quality([0.1 * n for n in range(9)])), RobustnessDriftStopping(KEY), max_epochs=9)
    assert messages == []


# --- resuming -------------------------------------------------------------------------------------------------------


def killed_and_resumed(
    root: Path,
    values: Sequence[float],
    *,
    killed_in: int,
    every_n_epochs: int = 1,
    metric: type[Quality] = Quality,
    **options: Any,
) -> tuple[RobustnessDriftStopping, Repeatable]:
    """A run that ends in the middle of an epoch and is resumed from its last checkpoint."""
    for ckpt_path, killers in ((None, [Killer(killed_in)]), (root / "last.ckpt", [])):
        stopper, model = RobustnessDriftStopping(KEY, patience=3, **options), module()
        measuring = monitor(metric(values), every_n_epochs=every_n_epochs)
        checkpoint = ModelCheckpoint(root, save_last=True, enable_version_counter=False)
        try:
            fit(root, measuring, stopper, checkpoint, *killers, model=model, ckpt_path=ckpt_path, max_epochs=40)
        except KilledError:
            continue
    return stopper, model


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("killed_in", [2, 6, 8])
def test_a_resumed_run_stops_as_an_uninterrupted_one(tmp_path: Path, killed_in: int) -> None:
    values = [0.5, 0.6, 0.7, 0.7, 0.7, 0.7, 0.7] + [0.65 - epoch / 100 for epoch in range(20)]
    whole = RobustnessDriftStopping(KEY, patience=3)
    fit(tmp_path, monitor(Quality(values)), whole)
    resumed, _ = killed_and_resumed(tmp_path, values, killed_in=killed_in)
    assert resumed.stopped_epoch == whole.stopped_epoch == 9
    assert resumed.stopping_reason_message == whole.stopping_reason_message
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("killed_in", [2, 5, 6])
def test_a_resumed_run_pairs_samples_as_an_uninterrupted_one(tmp_path: Path, killed_in: int) -> None:
    values = [1.0] * 4 + [0.6] * 36
    resumed, _ = killed_and_resumed(tmp_path, values, killed_in=killed_in, metric=OnSamples)
    assert resumed.stopped_epoch == 6


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("killed_in", [4, 5, 6, 7])
def test_a_resumed_run_counts_no_old_values(tmp_path: Path, killed_in: int) -> None:
    """Measured in epochs 0, 3, 6, …; the last checkpoint is of an epoch with or without a measurement."""
    values = [1.0] * 6 + [0.5 - epoch / 100 for epoch in range(34)]
    resumed, _ = killed_and_resumed(tmp_path, values, killed_in=killed_in, every_n_epochs=3)
    assert series(resumed) == [1.0, 1.0, 0.5, 0.47, 0.44]
    assert resumed.stopped_epoch == 12


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("killed_in", [2, 6])  # before the best epoch, and after
def test_a_resumed_run_puts_the_same_best_weights_back(tmp_path: Path, killed_in: int) -> None:
    weights, model = Weights(), module()
    whole = RobustnessDriftStopping(KEY, patience=3, restore_best_weights=True)
    values = [0.5, 0.6, 0.69, 0.7, 0.69] + [0.4] * 20
    fit(tmp_path, monitor(Quality(values)), whole, weights, model=model)
    resumed, again = killed_and_resumed(tmp_path, values, killed_in=killed_in, restore_best_weights=True)
    assert resumed.best_epoch == whole.best_epoch == 3
    assert same(model.state_dict(), weights.by_epoch[3])
    assert same(again.state_dict(), model.state_dict())


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_does_not_warn_twice_of_one_drift(tmp_path: Path) -> None:
    with robustness_warnings() as messages:
        killed_and_resumed(tmp_path, [1.0] * 3 + [0.5] * 40, killed_in=9, action="warn")
    assert len(messages) == 1


def test_a_checkpoint_is_loaded_with_weights_only_and_gives_the_state_back(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping(KEY, patience=3, restore_best_weights=True)
    fit(tmp_path, monitor(Quality(FALL)), stopper, ModelCheckpoint(tmp_path, save_last=True), max_epochs=6)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][stopper.state_key]
    again = RobustnessDriftStopping(KEY, patience=3, restore_best_weights=True)
    again.load_state_dict(state)
    assert again.best_epoch == 2
    restored, saved = again.state_dict(), dict(state)
    assert same(restored.pop("best_weights"), saved.pop("best_weights"))
    assert restored == saved


def test_two_stoppers_in_one_run_keep_their_own_states(tmp_path: Path) -> None:
    first, second = RobustnessDriftStopping(KEY, patience=2, action="warn"), RobustnessDriftStopping(KEY, patience=4)
    other = RobustnessDriftStopping("val_acc", mode="max")
    keys = {stopper.state_key for stopper in (first, second, other)}
    assert len(keys) == 3
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    with robustness_warnings() as messages:
        fit(tmp_path, monitor(Quality(FALL)), first, second, other, checkpoint, model=Accuracy([0.5] * 20))
    assert len(messages) == 1
    assert (first.stopped_epoch, second.stopped_epoch) == (0, 8)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert keys <= stored.keys()


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (
            {},
            "{'monitor': {'robust/linearized_margin_linf_clipped': 1.0}, 'mode': None, 'rule': 'consecutive',"
            " 'combine': 'any', 'action': 'stop'}",
        ),
        (
            {"monitor": ["a", "b"], "mode": "min", "combine": "all", "action": "warn"},
            "{'monitor': {'a': 1.0, 'b': 1.0}, 'mode': 'min', 'rule': 'consecutive', 'combine': 'all',"
            " 'action': 'warn'}",
        ),
    ],
)
def test_a_state_is_found_under_the_key_of_earlier_versions(options: dict[str, Any], settings: str) -> None:
    assert RobustnessDriftStopping(**options).state_key == f"RobustnessDriftStopping{settings}"


@pytest.mark.parametrize("path", sorted(STATES.glob("*.pt")), ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_runs_continue_from_states_of_every_version(tmp_path: Path, path: Path) -> None:
    """Each was stored after epoch 5, with two of three falls counted, and with what its version did in epoch 6."""
    stored = torch.load(path, weights_only=True)
    options: dict[str, Any] = {"patience": 3, "restore_best_weights": True}
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
    fit(tmp_path, monitor(Quality([1.0] * 6)), RobustnessDriftStopping(KEY, **options), checkpoint, max_epochs=6)
    whole = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["state_key"] in whole["callbacks"]
    whole["callbacks"][stored["state_key"]] = stored["state"]
    torch.save(whole, tmp_path / "last.ckpt")

    resumed, model = RobustnessDriftStopping(KEY, **options), Accuracy([0.5] * 6 + [0.9] * 14)
    metric, other = OnSamples([0.9, 1.0, 0.95, 0.97] + [0.6] * 20), ModelCheckpoint(tmp_path, save_last=True)
    with put_back() as messages:
        fit(tmp_path, monitor(metric), resumed, other, model=model, ckpt_path=tmp_path / "last.ckpt")
    then = stored["next"]
    assert resumed.stopped_epoch == then["stopped_epoch"] == 6
    assert resumed.stopping_reason_message == then["message"]
    record = resumed.state_dict()["record"]
    kept, expected = record.pop("series")[KEY], then["record"].pop("series")[KEY]
    assert all(map(torch.equal, kept.pop("per_sample"), expected.pop("per_sample")))
    assert kept == expected
    assert record == then["record"]
    assert same(model.state_dict(), stored["state"]["best_weights"])
    (message,) = messages
    assert "epoch 1: robust/quality 1.000 instead of 0.6000 at epoch 6, clean accuracy 60.0 % instead of" in message


def test_a_state_of_the_current_version_is_stored() -> None:
    assert (STATES / f"{version('lightning-robust')}.pt").exists()


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "others"),
    [
        *(
            ("monitor", value, {})
            for value in ("", [], (), {}, None, 1, b"x", [""], [1], ["a", "a"], {"a": 0}, {"a": -1}, {"a": True})
        ),
        *(("monitor", value, {}) for value in ({"a": math.nan}, {"a": math.inf}, {1: 1.0}, {"a": "1"}, {"a"})),
        *(("patience", value, {}) for value in (0, -1, True, 1.5, "3", None)),
        *(("tolerance", value, {}) for value in (-0.01, math.nan, math.inf, "0.1", True, None)),
        *(("z", value, {}) for value in (-1, math.nan, math.inf, "2", False, None)),
        *(("warmup", value, {}) for value in (-1, True, 0.5, "0", None)),
        *(("reference", value, {}) for value in (math.nan, math.inf, "1", True)),
        ("reference", 0.5, {"monitor": ["a", "b"]}),
        *(("mode", value, {}) for value in ("up", "", True, ["max"])),
        *(("combine", value, {"monitor": ["a", "b"]}) for value in ("most", "majority", "", True, None)),
        *(("combine", value, {"monitor": "a"}) for value in ("all", "majority")),
        ("combine", "majority", {"monitor": {"a": 1, "b": 2}}),
        *(("action", value, {}) for value in ("halt", None, True)),
        *(("restore_best_weights", value, {}) for value in (1, None, "yes")),
        *(("strict", value, {}) for value in (0, None, "no")),
    ],
    ids=repr,
)
def test_a_wrong_argument_is_named_with_its_value(argument: str, value: Any, others: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=f"argument `{argument}`") as raised:
        RobustnessDriftStopping(**others | {argument: value})
    assert str(raised.value).endswith(f"but got {value!r}.")


@pytest.mark.parametrize(
    "options",
    [
        {"monitor": ("a", "b"), "combine": "all"},
        {"monitor": {"a": 0.5, "b": 2}, "combine": "all"},
        {"monitor": {"a": 1}},
        {"monitor": "a", "reference": 0, "tolerance": 0, "z": 0, "patience": 1, "warmup": 0},
        {"mode": "min", "combine": "any", "action": "warn", "strict": False, "restore_best_weights": True},
    ],
    ids=repr,
)
def test_right_arguments_are_accepted(options: dict[str, Any]) -> None:
    stopper = RobustnessDriftStopping(**options)
    kept = options.keys() - {"monitor"}
    assert {name: getattr(stopper, name) for name in kept} == {name: options[name] for name in kept}
    if "monitor" in options:
        assert list(stopper.monitor_weights) == list(options["monitor"])


# --- several processes ----------------------------------------------------------------------------------------------


class Differing(Accuracy):
    """Logs a value that differs between processes; on the second it never falls."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        value = self.accuracies[self.current_epoch] if self.global_rank == 0 else 1.0 + self.current_epoch
        self.log(self.key, value, batch_size=1, sync_dist=False)


def stop_in_two(rank: int, root: Path, key: str) -> dict[str, Any]:
    stopper = RobustnessDriftStopping(key, mode="max", patience=3, restore_best_weights=True)
    weights = Weights()
    values = [0.5, 0.6, 0.7, 0.69] + [0.4] * 20
    model = Differing(values)
    torch.manual_seed(0)
    fit(
        root / str(rank),
        monitor(Quality(values, steps=STEPS // 2)),
        stopper,
        weights,
        model=model,
        strategy="ddp",
        devices=2,
    )
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    return {
        "stopped": stopper.stopped_epoch,
        "message": stopper.stopping_reason_message,
        "best": stopper.best_epoch,
        "weights": parameters,
        "restored": same(model.state_dict(), weights.by_epoch[2]),
    }


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:.*sync_dist=True")
@pytest.mark.parametrize("key", [KEY, "val_acc"])
def test_all_processes_stop_together_and_put_the_same_weights_back(tmp_path: Path, key: str) -> None:
    first, second = processes.run(stop_in_two, 2, tmp_path, key)
    assert first["stopped"] == second["stopped"] == 6
    assert first["message"] == second["message"]
    assert first["best"] == second["best"] == 2
    assert first["restored"]
    assert second["restored"]
    assert same(first["weights"], second["weights"])


# --- values and modules of the user ----------------------------------------------------------------------


class Logging(Repeatable):
    """Logs the next value of each key in each validation; None is not logged."""

    def __init__(self, values: dict[str, Sequence[float | None]]) -> None:
        super().__init__(classifier().network)
        self.values, self.number = values, 0

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        for key, values in self.values.items():
            value = values[self.number]
            if value is not None:
                self.log(key, value)
        self.number += 1


def test_mode_is_the_direction_of_keys_without_a_metric_only(tmp_path: Path) -> None:
    """The loss should be low and the quality high: `mode` concerns only the loss."""
    stopper = RobustnessDriftStopping(["val_loss", KEY], mode="min", patience=2, combine="all")
    model = Logging({"val_loss": [0.5] * 6 + [0.9] * 20})
    run = fit(tmp_path, monitor(Quality(FALL)), stopper, model=model)
    assert run.current_epoch - 1 == stopper.stopped_epoch == 7
    assert "val_loss rose" in stopper.stopping_reason_message
    assert "robust/quality fell" in stopper.stopping_reason_message


def test_a_tolerance_that_no_fall_exceeds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"`tolerance` to be a share of the best value.* but got 5,"):
        fit(tmp_path, monitor(Quality(FALL)), RobustnessDriftStopping(KEY, tolerance=5))
    rising = RobustnessDriftStopping(KEY, tolerance=5, patience=2)  # a rise can exceed any tolerance
    fit(tmp_path, monitor(Harm([0.1] * 3 + [0.9] * 20)), rising)
    assert rising.stopped_epoch == 4


def test_a_key_that_is_best_at_initialisation_needs_a_warm_up(tmp_path: Path) -> None:
    for warmup, count in ((0, 1), (2, 0)):
        stopper = RobustnessDriftStopping("robust/fim_spectral_norm", warmup=warmup, patience=1, action="warn")
        with robustness_warnings() as messages:
            fit(tmp_path, monitor(FisherSpectralNorm()), stopper, max_epochs=5)
        said = [message for message in messages if "best at initialisation" in message]
        assert len(said) == count


def test_an_old_standard_error_is_ignored(tmp_path: Path) -> None:
    model = Logging({"val_rob": [0.79] + [0.8] * 5 + [0.5] * 14, "val_rob_stderr": [1.0] + [None] * 19})
    stopper = RobustnessDriftStopping("val_rob", mode="max")
    fit(tmp_path, stopper, model=model)
    assert stopper.stopped_epoch == 10


def test_the_change_of_accuracy_is_that_between_measurements_of_one_epoch(tmp_path: Path) -> None:
    values = {"val_rob": [0.9, 0.9, 0.9, 0.4, 0.4, 0.4], "val_acc": [0.5, 0.5, 0.5, 0.9, 0.9, 0.9]}
    stopper = RobustnessDriftStopping("val_rob", mode="max", patience=2)
    settings = {"max_epochs": 2, "val_check_interval": 0.25, "num_sanity_val_steps": 0}
    fit(tmp_path, stopper, model=Logging(values), steps=4, **settings)
    assert stopper.stopping_reason_message is not None
    assert "clean accuracy rose 40.0 points (val_acc)" in stopper.stopping_reason_message


def test_robust_accuracy_is_not_called_clean(tmp_path: Path) -> None:
    rising = [0.5 + 0.02 * epoch for epoch in range(20)]
    values = {"val_adv_acc": FALL, "val_pgd_accuracy": FALL, "val_acc": rising, "val_rob": FALL}
    stopper = RobustnessDriftStopping("val_rob", mode="max")
    fit(tmp_path, stopper, model=Logging(values))
    assert stopper.stopping_reason_message is not None
    assert stopper.stopping_reason_message.endswith("points (val_acc).")
    assert "clean accuracy rose" in stopper.stopping_reason_message


def test_a_key_that_was_logged_before_a_run_was_resumed_may_come_later(tmp_path: Path) -> None:
    every_second = [value for pair in ([0.8, None],) * 5 for value in pair] + [0.3, None] * 10
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    first = RobustnessDriftStopping("a", mode="max", patience=3)
    with robustness_warnings():
        fit(tmp_path, first, checkpoint, model=Logging({"a": every_second}), max_epochs=5)
    model, again = Logging({"a": every_second}), RobustnessDriftStopping("a", mode="max", patience=3)
    model.number = 5
    path, other = tmp_path / "last.ckpt", ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    fit(tmp_path, again, other, model=model, max_epochs=25, ckpt_path=path, num_sanity_val_steps=0)
    assert again.stopped_epoch == 14


class Frozen(Logging):
    """Leaves frozen weights out of its checkpoints."""

    def __init__(self, values: dict[str, Sequence[float | None]]) -> None:
        super().__init__(values)
        self.strict_loading = False
        self.network[0].requires_grad_(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if "network.0" not in key}


def test_weights_are_put_back_in_a_module_with_incomplete_checkpoints(tmp_path: Path) -> None:
    weights = Weights()
    stopper = RobustnessDriftStopping("a", mode="max", patience=3, restore_best_weights=True)
    model = Frozen({"a": FALL})
    fit(tmp_path, stopper, weights, model=model)
    assert stopper.best_epoch == 2
    assert same(model.state_dict(), weights.by_epoch[2])
    assert not same(model.state_dict(), weights.by_epoch[max(weights.by_epoch)])


def test_weights_are_not_put_back_beside_weight_averaging(tmp_path: Path) -> None:
    stopper = RobustnessDriftStopping(KEY, restore_best_weights=True)
    with pytest.raises(MisconfigurationException, match="`restore_best_weights` to be False with weight averaging"):
        fit(tmp_path, monitor(Quality(FALL)), WeightAveraging(), stopper)


@pytest.mark.parametrize("kept", [True, False])
def test_a_resumed_run_puts_weights_back_only_if_both_runs_keep_them(tmp_path: Path, kept: bool) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    first = RobustnessDriftStopping(KEY, patience=3, restore_best_weights=kept)
    with robustness_warnings():
        fit(tmp_path, monitor(Quality(FALL)), first, checkpoint, max_epochs=5)
    again, weights, model = RobustnessDriftStopping(KEY, patience=3, restore_best_weights=not kept), Weights(), module()
    path, other = tmp_path / "last.ckpt", ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    with robustness_warnings() as messages:
        fit(tmp_path, monitor(Quality(FALL)), again, other, weights, model=model, ckpt_path=path)
    assert same(model.state_dict(), weights.by_epoch[again.stopped_epoch])
    assert [("did not keep" in message) for message in messages] == ([] if kept else [True])
