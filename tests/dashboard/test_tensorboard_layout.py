"""The layout as a value, and as a run writes it to the event file."""

import re
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_robust import RobustnessMonitor
from lightning_robust.dashboard.tensorboard_layout import layout
from tests.dashboard.digits import Run
from tests.dashboard.server import page_filter
from tests.helpers.training import classifier, loader, trainer

_LAYOUT_TAG = "custom_scalars__config__"
PREFIXES = ["robust/", "robust_l2/val.", "(r+)[0]*^$|\\d?/", "R{2}-#& ~/"]


def charts(keys: list[str], prefix: str, kind: str) -> dict[str, list[str]]:
    """Tags of the charts of a kind, by title."""
    (category,) = layout({prefix: keys}).values()
    return {title: tags for title, (its_kind, tags) in category.items() if its_kind == kind}


def is_drawn(name: str, prefix: str, keys: tuple[str, ...] = ("linearized_accuracy_linf_0.03137",)) -> bool:
    """Whether the accuracy chart draws a series of this name, by the rules of TensorBoard."""
    (tags,) = charts([prefix + key for key in keys], prefix, "Multiline").values()
    return re.compile(page_filter(tags)).match(name) is not None


def read(logdir: Path) -> EventAccumulator:
    events = EventAccumulator(str(logdir), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "name",
    [
        "val_acc",
        "valid_accuracy",
        "train/Acc",
        "test_top1_acc",
        "ACC",
        "train_acc_epoch",
        "val_acc/dataloader_idx_0",
        "valAcc",
        "accuracy",
    ],
)
def test_finds_the_accuracy_of_the_user(name: str, prefix: str) -> None:
    assert is_drawn(name, prefix)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "name",
    [
        "val_loss",
        "val_acc_step",
        "train/Acc_step",
        "val_acc_step/dataloader_idx_0",
        "grad_accumulation",
        "accelerator/power",
        "acceptance_rate",
        "vaccine",
        "epoch",
    ],
)
def test_leaves_out_keys_that_are_not_accuracies_per_epoch(name: str, prefix: str) -> None:
    assert not is_drawn(name, prefix)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_draws_predicted_accuracies_without_the_edges_of_their_bands(prefix: str) -> None:
    accuracies = ("linearized_accuracy_linf_0.03137", "linearized_accuracy_l2_1e-05", "pgd_accuracy_linf_0.03137")
    edges = [f"{key}_{edge}" for key in accuracies for edge in ("stderr", "lower", "upper")]
    others = ["fim_trace", "num_samples", "linearized_margin_linf", "linearized_accuracy_linf_0x03137"]
    keys = (*accuracies, *edges, *others)
    assert [key for key in keys if is_drawn(prefix + key, prefix, keys)] == list(accuracies)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_draws_one_band_for_every_key_that_has_both_edges(prefix: str) -> None:
    complete = ["fim_spectral_norm", "fim_spectral_norm_calibrated", "linearized_accuracy_linf_0.03137"]
    keys = [key + edge for key in complete for edge in ("", "_stderr", "_lower", "_upper")]
    keys += ["fim_trace", "only_lower", "only_lower_lower", "only_upper", "only_upper_upper", "no_lower", "no_upper"]
    bands = charts([prefix + key for key in keys], prefix, "Margin")
    assert sorted(bands.values()) == [[prefix + key + edge for edge in ("", "_lower", "_upper")] for key in complete]
    assert all(title.startswith(f"{band[0].removeprefix(prefix)} ") for title, band in bands.items())


def test_the_most_telling_key_is_shown_beside_the_accuracy_chart() -> None:
    """TensorBoard shows margin charts in the opposite order of the layout."""
    keys = [f"robust/{key}{edge}" for key in ("first", "second") for edge in ("", "_lower", "_upper")]
    assert list(charts(keys, "robust/", "Margin")) == ["second ± 2 standard errors", "first ± 2 standard errors"]


def test_two_monitors_share_one_layout_and_leave_out_each_others_accuracies() -> None:
    keys = {prefix: [f"{prefix}linearized_accuracy_l2_0.1"] for prefix in ("robust/", "robust_l2/")}
    categories = layout(keys)
    assert len(categories) == 2
    for prefix, category in zip(keys, categories.values(), strict=True):
        (tags,) = (tags for kind, tags in category.values() if kind == "Multiline")
        drawn = [
            name
            for name in ("val_acc", "robust/linearized_accuracy_l2_0.1", "robust_l2/linearized_accuracy_l2_0.1")
            if re.compile(page_filter(tags)).match(name)
        ]
        assert drawn == ["val_acc", f"{prefix}linearized_accuracy_l2_0.1"]


def test_a_run_has_one_layout_for_all_monitors_also_after_fit_and_validate(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    monitors = RobustnessMonitor(["linearized_accuracy"]), RobustnessMonitor(log_key_prefix="second/")
    run = trainer(*monitors, root=tmp_path, logger=[CSVLogger(tmp_path), logger])
    run.fit(classifier(), loader(), loader())
    run.validate(classifier(), loader(), verbose=False)
    logger.finalize("success")
    (written,) = read(tmp_path).Tensors(_LAYOUT_TAG)
    assert b"robust/linearized_accuracy" in written.tensor_proto.string_val[0]
    assert b"second/fim_spectral_norm" in written.tensor_proto.string_val[0]


def test_run_has_the_layout_once(run: Run) -> None:
    assert len(read(run.logdir / run.name).Tensors(_LAYOUT_TAG)) == 1


def test_run_has_robustness_at_every_step_at_which_it_has_accuracy(run: Run) -> None:
    events = read(run.logdir / run.name)
    steps = [event.step for event in events.Scalars("val_acc")]
    assert len(steps) == run.epochs
    assert len(run.robust_keys) > 20
    for key in run.robust_keys:
        scalars = events.Scalars(key)
        assert [event.step for event in scalars] == steps, key
        assert scalars[-1].value == pytest.approx(run.metrics[key], rel=1e-6)
