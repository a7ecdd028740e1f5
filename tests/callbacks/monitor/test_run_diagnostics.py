"""What the monitor says about a run as a whole: who takes old values for new, and why nothing was measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_robust import Probe, RobustnessDriftStopping, RobustnessMonitor
from lightning_robust.metrics import ProbeMetric
from tests.helpers.training import Classifier, classifier, loader, robustness_warnings, trainer

KEY = "robust/value"


class Epochs(ProbeMetric):
    """Returns the epoch, or raises in the given ones."""

    higher_is_better = True

    def __init__(self, failing: Sequence[int] = (), key: str = "value") -> None:
        super().__init__()
        self.add_float64_state("epoch")
        self.failing, self.key = failing, key

    def _add(self, probe: Probe) -> None:
        epoch = probe.model.current_epoch  # type: ignore[attr-defined]
        if epoch in self.failing:
            raise RuntimeError(f"broken in {epoch}")
        self.epoch = torch.full_like(self.epoch, epoch)

    def compute(self) -> dict[str, Tensor]:
        return {self.key: self.epoch}


class Plateau(Classifier):
    """Lowers the learning rate when the value does not rise, and records it."""

    def __init__(self, key: str = KEY, *, mode: Any = "max", **config: Any) -> None:
        super().__init__(classifier().network)
        self.config, self.rates, self.mode = {"monitor": key, **config}, [], mode

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 1.0)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode=self.mode, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **self.config}}

    def on_train_epoch_start(self) -> None:
        self.rates.append(self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]


def fit(
    root: Path, *callbacks: Callback, model: Classifier | None = None, val_loader: Any = None, **options: Any
) -> tuple[list[str], Trainer]:
    with robustness_warnings() as messages:
        run = trainer(*callbacks, root=root, **{"max_epochs": 8, "enable_checkpointing": True} | options)
        run.fit(model or classifier(), loader(batch_size=32), loader() if val_loader is None else val_loader)
    assert run.state.finished
    return messages, run


def monitor(metric: ProbeMetric | None = None, **options: Any) -> RobustnessMonitor:
    return RobustnessMonitor(metric or Epochs(), max_samples=8, **options)


# --- old values that are taken for new --------------------------------------------------------------------------------


def test_old_values_mislead_three_consumers_and_each_warning_has_the_line_to_paste(tmp_path: Path) -> None:
    model = Plateau()
    checkpoint = ModelCheckpoint(tmp_path, monitor=KEY, mode="max", save_top_k=3, filename="{epoch}")
    stopping = EarlyStopping(KEY, mode="max", patience=20)
    messages, _ = fit(tmp_path, monitor(every_n_epochs=3), checkpoint, stopping, model=model)
    assert sorted(messages) == [
        f"EarlyStopping follows `{KEY}`, which is measured every 3 epochs. Its `patience` counts validations, and a"
        f" validation without a measurement counts as no improvement. Use `RobustnessDriftStopping('{KEY}')` instead,"
        " which counts measurements.",
        f"ModelCheckpoint follows `{KEY}`, which is measured every 3 epochs. It ranks the weights of the epochs in"
        " between by the last measured value. To keep measured weights alone, pass"
        f" `ModelCheckpoint(monitor='{KEY}', mode='max', save_top_k=1)`, or measure in every validation:"
        " `Trainer(check_val_every_n_epoch=3)` with `RobustnessMonitor(every_n_epochs=1)`.",
        f"ReduceLROnPlateau follows `{KEY}`, which is measured every 3 epochs. Its `patience` counts the epochs in"
        f' between as no improvement. Return `{{"scheduler": scheduler, "monitor": "{KEY}", "frequency": 3}}` from'
        " `configure_optimizers`, so that it counts measurements.",
    ]
    kept = {int(Path(path).stem.removeprefix("epoch=")) for path in checkpoint.best_k_models}
    assert not kept <= {0, 3, 6}  # weights that were never measured
    assert model.rates[-1] < 1


def test_with_the_pasted_lines_nobody_is_misled(tmp_path: Path) -> None:
    single = ModelCheckpoint(tmp_path, monitor=KEY, mode="max", filename="{epoch}")
    model = Plateau(frequency=3)
    messages, _ = fit(tmp_path, monitor(every_n_epochs=3), single, model=model)
    assert messages == []
    assert Path(single.best_model_path).stem == "epoch=6"
    assert model.rates == [1.0] * 8
    several = ModelCheckpoint(tmp_path / "several", monitor=KEY, mode="max", save_top_k=3, filename="{epoch}")
    stopping = EarlyStopping(KEY, mode="max", patience=1)
    messages, _ = fit(tmp_path, monitor(), several, stopping, max_epochs=12, check_val_every_n_epoch=3)
    assert messages == []
    assert {float(value) for value in several.best_k_models.values()} == {5.0, 8.0, 11.0}


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {}),
        ({"every_n_epochs": 3}, {"check_val_every_n_epoch": 3}),
        ({"every_n_epochs": 2}, {"check_val_every_n_epoch": 4}),
        ({"every_n_epochs": 3, "log_key_prefix": "other/"}, {}),
        ({"every_n_epochs": 3, "log_key_prefix": "rob"}, {}),
    ],
    ids=["every epoch", "every validation", "rarer validations", "other keys", "another monitor's keys"],
)
def test_there_is_no_warning_where_values_are_never_old(
    tmp_path: Path, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    often = [monitor()] if "log_key_prefix" in options else []
    checkpoint = ModelCheckpoint(tmp_path, monitor=KEY, mode="max", save_top_k=3)
    stopping = EarlyStopping(KEY, mode="max", patience=20)
    frequency = {"frequency": settings.get("check_val_every_n_epoch", 1)}
    messages, _ = fit(
        tmp_path, *often, monitor(**options), checkpoint, stopping, model=Plateau(**frequency), **settings
    )
    assert messages == []


@pytest.mark.parametrize("save", [{"save_top_k": 1, "every_n_epochs": 2}, {"save_top_k": 2}])
def test_a_checkpoint_of_epochs_in_between_is_told(tmp_path: Path, save: dict[str, Any]) -> None:
    messages, _ = fit(tmp_path, monitor(every_n_epochs=3), ModelCheckpoint(tmp_path, monitor=KEY, mode="max", **save))
    assert len(messages) == 1
    assert messages[0].startswith("ModelCheckpoint follows")


def test_a_budget_misleads_as_a_cadence_does(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor=KEY, mode="max", save_top_k=3)
    messages, _ = fit(tmp_path, monitor(overhead_budget=0.9999), checkpoint, model=Plateau(frequency=5), max_epochs=1)
    told = [message for message in messages if "follows" in message]
    assert len(told) == 2
    assert all("which is measured as often as the budget allows" in message for message in told)
    assert "with `RobustnessMonitor(every_n_epochs=1)` and no `overhead_budget`" in told[0]
    assert "with `RobustnessMonitor(every_n_epochs=5)` and no `overhead_budget`" in told[1]


# --- the wrong end of a key -------------------------------------------------------------------------------------------


class Directed(Epochs):
    """Has keys that are better high, better low though best untrained, and of neither direction."""

    def compute(self) -> dict[str, Tensor]:
        return {self.key: self.epoch, f"{self.key}_stderr": self.epoch, f"{self.key}_lower": self.epoch}


class BestUntrained(Directed):
    higher_is_better = False
    best_untrained = True


def wrong_modes(*, key: str) -> list[str]:
    so = f"follows `{key}` with `mode='min'`, but higher values are better, so it"
    return [
        f"EarlyStopping {so} stops the run while robustness improves. Pass `EarlyStopping('{key}', mode='max')`.",
        f"ModelCheckpoint {so} keeps the least robust weights. Pass `ModelCheckpoint(monitor='{key}', mode='max')`.",
        f"ReduceLROnPlateau {so} lowers the learning rate while robustness improves. Pass"
        f" `{{\"scheduler\": ReduceLROnPlateau(optimizer, mode='max'), \"monitor\": '{key}'}}`.",
    ]


def wrong_keys(*, key: str, instead: str) -> list[str]:
    so = f"follows `{key}`, which is best at initialisation and gets worse while the network learns, so it"
    follow = "Follow a key that training improves:"
    return [
        f"EarlyStopping {so} stops the run too early. {follow} `EarlyStopping('{instead}', mode='max')`.",
        f"ModelCheckpoint {so} keeps the weights of the first epochs. {follow}"
        f" `ModelCheckpoint(monitor='{instead}', mode='max')`.",
        f"ReduceLROnPlateau {so} lowers the learning rate too early. {follow}"
        f" `{{\"scheduler\": ReduceLROnPlateau(optimizer, mode='max'), \"monitor\": '{instead}'}}`.",
    ]


@pytest.mark.parametrize(
    ("key", "mode", "sentences"),
    [
        ("robust/value", "min", wrong_modes(key="robust/value")),
        ("robust/value_lower", "min", wrong_modes(key="robust/value_lower")),
        ("robust/trace", "min", wrong_keys(key="robust/trace", instead="robust/value")),
        ("robust/trace", "max", wrong_keys(key="robust/trace", instead="robust/value")),
        ("robust/value", "max", []),
        ("robust/value_lower", "max", []),
        ("robust/value_stderr", "min", []),
        ("robust/trace_stderr", "max", []),
        ("robust/seconds", "min", []),
        ("val_acc", "min", []),
    ],
)
def test_the_worst_values_are_not_taken_for_the_best_in_silence(
    tmp_path: Path, key: str, mode: Any, sentences: list[str]
) -> None:
    metrics = RobustnessMonitor([Directed(), BestUntrained(key="trace")], max_samples=8)
    consumers = [ModelCheckpoint(tmp_path, monitor=key, mode=mode), EarlyStopping(key, mode=mode, patience=20)]
    messages, _ = fit(tmp_path, metrics, *consumers, model=Plateau(key, mode=mode), max_epochs=3)
    assert sorted(messages) == sentences


def test_a_checkpoint_that_keeps_nothing_or_what_another_rule_keeps_is_left_alone(tmp_path: Path) -> None:
    class OtherRule(EarlyStopping):
        def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
            return False, None

    last = ModelCheckpoint(tmp_path, monitor=KEY, mode="min", save_top_k=0, save_last=True)
    assert fit(tmp_path, monitor(), last, OtherRule(KEY, mode="min"), max_epochs=2)[0] == []


def test_where_only_curvature_is_measured_the_key_to_follow_has_to_be_measured_first(tmp_path: Path) -> None:
    messages, _ = fit(tmp_path, monitor(BestUntrained()), ModelCheckpoint(tmp_path, monitor=KEY), max_epochs=2)
    assert len(messages) == 1
    assert messages[0].endswith(
        "Measure `linearized_accuracy`, too, and follow a key that training improves:"
        " `ModelCheckpoint(monitor='robust/linearized_margin_linf_clipped', mode='max')`."
    )


def test_two_monitors_of_one_prefix_are_refused_by_the_name_of_the_argument(tmp_path: Path) -> None:
    run = trainer(monitor(), root=tmp_path)
    run.callbacks.append(monitor())  # type: ignore[attr-defined]  # Lightning itself refuses two in the constructor
    with pytest.raises(MisconfigurationException, match=r"`log_key_prefix` to differ .* e\.g\. 'robust_2/'"):
        run.validate(classifier(), loader(), verbose=False)


# --- runs in which nothing was measured -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize(
    ("val_loader", "settings", "cause"),
    [
        ([], {}, "there are no validation batches. Pass a validation dataloader that yields some."),
        (
            None,
            {"check_val_every_n_epoch": 10},
            "validation runs every 10 epochs, and training ended after 8. Pass `Trainer(check_val_every_n_epoch=8)` or"
            " less.",
        ),
        (
            None,
            {"max_steps": 2},
            "training ended after 2 steps, before the first validation. Train longer, or pass a smaller"
            " `Trainer(val_check_interval=…)`.",
        ),
        (
            None,
            {"check_val_every_n_epoch": None, "val_check_interval": 1000},
            "training ended after 32 steps, before the first validation. Train longer, or pass a smaller"
            " `Trainer(val_check_interval=…)`.",
        ),
    ],
    ids=["no loader", "few epochs", "few steps", "rare validations"],
)
def test_a_run_without_a_measurement_ends_with_the_cause(
    tmp_path: Path, val_loader: Any, settings: dict[str, Any], cause: str
) -> None:
    stopper = RobustnessDriftStopping(KEY)
    messages, run = fit(tmp_path, monitor(), stopper, val_loader=val_loader, **settings)
    assert not any(key.startswith("robust/") for key in run.callback_metrics)
    assert messages[0] == f"RobustnessMonitor measured nothing in this run: {cause}"
    assert messages[1:] == [
        f"RobustnessDriftStopping could not have stopped this run: `{KEY}` was never logged in a validation, but a"
        " drift takes at least 6 measurements. RobustnessMonitor measured nothing in this run; its own warning says"
        " why."
    ]


def test_a_run_that_does_not_train_says_nothing(tmp_path: Path) -> None:
    messages, _ = fit(tmp_path, monitor(), max_epochs=0)
    assert messages == []


def test_a_run_whose_loaders_are_all_skipped_says_why(tmp_path: Path) -> None:
    messages, _ = fit(tmp_path, monitor(dataloader_idx=1))
    assert len(messages) == 1
    assert "`dataloader_idx=1`, but there are 1" in messages[0]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_part_of_a_run_between_two_measurements_says_nothing(tmp_path: Path) -> None:
    fit(tmp_path, monitor(every_n_epochs=5), ModelCheckpoint(tmp_path, save_last=True), max_epochs=2)
    rare = monitor(every_n_epochs=5)
    with robustness_warnings() as messages:
        run = trainer(rare, root=tmp_path, max_epochs=4)
        run.fit(classifier(), loader(), loader(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    assert run.current_epoch == 4
    assert rare.num_measurements == 0
    assert messages == []


# --- failures that repeat ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        (range(8), ["skipped in epoch 0 Epochs: RuntimeError: broken in 0.", "Epochs in 7 more measurements, for the"]),
        ([2], ["skipped in epoch 2 Epochs: "]),
        (
            [2, 5],
            ["skipped in epoch 2 Epochs: ", "skipped Epochs in 1 more measurement, for the reason given in epoch 2."],
        ),
    ],
    ids=["always", "once", "twice"],
)
def test_a_cause_is_explained_once_and_counted_at_the_end(
    tmp_path: Path, failing: Sequence[int], expected: list[str]
) -> None:
    with robustness_warnings() as messages:
        metrics = [Epochs(failing), Epochs(key="sound")]
        run = trainer(RobustnessMonitor(metrics, max_samples=8), root=tmp_path, max_epochs=8)
        run.fit(classifier(), loader(), loader())
    assert len(messages) == len(expected)
    assert all(part in message for part, message in zip(expected, messages, strict=True))


def test_a_new_cause_is_explained_although_another_is_known(tmp_path: Path) -> None:
    class Odd(Epochs):
        def _add(self, probe: Probe) -> None:
            epoch = probe.model.current_epoch  # type: ignore[attr-defined]
            raise RuntimeError("odd" if epoch % 2 else "even")

    with robustness_warnings() as messages:
        run = trainer(RobustnessMonitor([Odd(), Epochs(key="sound")], max_samples=8), root=tmp_path, max_epochs=6)
        run.fit(classifier(), loader(), loader())
    assert ["even" in messages[0], "odd" in messages[1]] == [True, True]
    assert [message.split(", for")[0] for message in messages[2:]] == [
        "RobustnessMonitor skipped Odd in 2 more measurements",
        "RobustnessMonitor skipped Odd in 2 more measurements",
    ]


def test_every_measurement_that_fails_is_one_explanation_and_one_count(tmp_path: Path) -> None:
    messages, _ = fit(tmp_path, monitor(Epochs(range(8))))
    assert len(messages) == 2
    assert messages[1].endswith("all 8 measurements were skipped, as explained in epoch 0.")


# --- the advice of the stopper ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "settings", "advice"),
    [
        ({}, {}, "Train for more epochs, or lower `patience` or `warmup`."),
        (
            {"every_n_epochs": 2},
            {},
            "Measure more often (a smaller `every_n_epochs` than 2 in the RobustnessMonitor), train",
        ),
        ({}, {"check_val_every_n_epoch": 2}, "(a smaller `check_val_every_n_epoch` than 2 in the Trainer), train for"),
    ],
)
def test_the_stopper_advises_only_what_would_help(
    tmp_path: Path, options: dict[str, Any], settings: dict[str, Any], advice: str
) -> None:
    messages, _ = fit(tmp_path, monitor(**options), RobustnessDriftStopping(KEY), max_epochs=5, **settings)
    assert len(messages) == 1
    assert advice in messages[0]


def test_the_stopper_asks_for_a_key_of_the_user_that_is_never_logged(tmp_path: Path) -> None:
    messages, _ = fit(tmp_path, RobustnessDriftStopping("mine", mode="max", strict=False))
    assert len(messages) == 1
    assert messages[0].endswith("Log it there, e.g. `self.log('mine', value)` in `validation_step`.")


def test_keys_that_are_not_finite_together_are_one_warning(tmp_path: Path) -> None:
    class Undefined(Epochs):
        def compute(self) -> dict[str, Tensor]:
            undefined = ["a", "b"] if self.epoch < 2 else ["a", "b", "c", "d", "e", "f"]
            return super().compute() | dict.fromkeys(undefined, torch.tensor(float("nan")))

    messages, _ = fit(tmp_path, monitor(Undefined()), max_epochs=4)
    gaps = "are not finite, so they are not logged. Their curves have gaps wherever this happens."
    assert messages == [
        f"`robust/a` and `robust/b` {gaps}",
        f"`robust/c`, `robust/d`, `robust/e` and 1 more {gaps}",
    ]
