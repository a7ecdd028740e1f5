import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_robust import (
    FisherSpectralNorm,
    HessianTrace,
    LinearizedAccuracy,
    Probe,
    RobustnessMonitor,
    WeightCurvatureIndex,
)
from lightning_robust.metrics import ProbeMetric
from tests.helpers.training import (
    CLOCKS,
    NUM_CLASSES,
    History,
    classifier,
    loader,
    robustness_warnings,
    samples,
    trainer,
)

BARS = [
    "fim_spectral_norm",
    "fim_spectral_norm_calibrated",
    "fim_trace",
    *(f"linearized_accuracy_linf_{eps}" for eps in ("0.003922", "0.007843", "0.01569", "0.03137", "0")),
    "linearized_margin_linf",
    "linearized_margin_linf_clipped",
    "hessian_trace",
    "wci",
]
PARAMETERS = ["0.weight", "0.bias", "1.weight", "1.bias", "5.weight", "5.bias"]
DOCUMENTED = {
    *(f"robust/{key}{suffix}" for key in BARS for suffix in ("", "_stderr", "_lower", "_upper")),
    *(f"robust/fim_spectral_norm_{statistic}" for statistic in ("median", "p95", "max")),
    *(f"robust/{key}" for key in ("temperature", "saturated", "num_samples", "seconds", "overhead")),
    *(f"robust/{key}_stderr_probes" for key in ("hessian_trace", "wci")),
    *(f"robust/hessian_trace_per_layer/network.{name}" for name in PARAMETERS),
    *(f"robust/wci_per_layer/network.{name}" for name in ("0.weight", "5.weight")),
    "robust/wci_negative_layers",
}


class Recording(ProbeMetric):
    """Keeps the samples of all measurements."""

    def __init__(self) -> None:
        super().__init__()
        self.add_float64_state("count")
        self.seen: list[list[tuple[Tensor, Tensor]]] = []
        self.fresh = True

    def _add(self, probe: Probe) -> None:
        if self.fresh:
            self.seen.append([])
            self.fresh = False
        self.seen[-1].append((probe.inputs, probe.targets))
        self.count = self.count + len(probe)

    def reset(self) -> None:
        super().reset()
        self.fresh = True

    def compute(self) -> dict[str, Tensor]:
        return {"recorded": self.count}

    def samples(self, measurement: int = -1) -> tuple[Tensor, Tensor]:
        inputs, targets = zip(*self.seen[measurement], strict=True)
        return torch.cat(inputs), torch.cat(targets)


def without_time(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key not in CLOCKS}


def test_one_line_logs_every_documented_key_beside_accuracy(tmp_path: Path) -> None:
    run = trainer(RobustnessMonitor(), root=tmp_path)
    run.fit(classifier(), loader(), loader())
    assert {key for key in run.callback_metrics if key.startswith("robust/")} == DOCUMENTED
    assert "val_acc" in run.callback_metrics
    assert all(value.isfinite() for value in run.callback_metrics.values())
    assert run.callback_metrics["robust/num_samples"] == 120


def test_values_are_those_of_the_metrics_on_the_same_samples(tmp_path: Path) -> None:
    run = trainer(RobustnessMonitor(max_samples=500), root=tmp_path)
    model = classifier()
    run.fit(model, loader(), loader())
    metric = FisherSpectralNorm()
    metric.update(Probe(model, *samples().tensors))
    for key, value in metric.compute().items():
        torch.testing.assert_close(run.callback_metrics[f"robust/{key}"].double(), value, rtol=1e-5, atol=1e-6)


def test_csv_logger_holds_every_key_at_the_steps_of_accuracy(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(RobustnessMonitor(), root=tmp_path, logger=logger, max_epochs=3).fit(classifier(), loader(), loader())
    header, *rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    rows = [row for row in rows if row[header.index("val_acc")]]
    assert len(rows) == 3
    assert set(header) >= DOCUMENTED
    assert all(row[header.index(key)] for row in rows for key in DOCUMENTED)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_validate_reproduces_the_last_logged_values_from_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(RobustnessMonitor(max_samples=50), checkpoint, root=tmp_path, enable_checkpointing=True)
    run.fit(classifier(), loader(), loader())
    logged = {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("robust/")}
    later = trainer(RobustnessMonitor(max_samples=50), root=tmp_path)
    (values,) = later.validate(classifier(seed=5), loader(), ckpt_path=checkpoint.last_model_path, verbose=False)
    reproduced = {key: value for key, value in values.items() if key.startswith("robust/")}
    assert without_time(reproduced) == pytest.approx(without_time(logged), rel=1e-6)


def test_trainer_test_measures_too(tmp_path: Path) -> None:
    (values,) = trainer(RobustnessMonitor(on_error="raise"), root=tmp_path).test(classifier(), loader(), verbose=False)
    assert set(values) == DOCUMENTED - {"robust/overhead"} | {"test_acc"}  # the share refers to the time of `fit`


def test_the_same_subset_and_values_for_any_batch_size(tmp_path: Path) -> None:
    results = []
    for batch_size in (7, 32, 200):
        recording = Recording()
        metrics = [FisherSpectralNorm(), LinearizedAccuracy(), HessianTrace(), WeightCurvatureIndex(), recording]
        run = trainer(RobustnessMonitor(metrics, max_samples=50), root=tmp_path)
        (values,) = run.validate(classifier(), loader(batch_size=batch_size), verbose=False)
        results.append((values, *recording.samples()))
    for values, inputs, targets in results[1:]:
        assert torch.equal(inputs, results[0][1])
        assert torch.equal(targets, results[0][2])
        for key in DOCUMENTED - CLOCKS:
            assert values[key] == pytest.approx(results[0][0][key], rel=1e-5, abs=1e-6)


def test_a_sorted_loader_is_measured_on_every_class_and_on_the_same_samples_each_time(tmp_path: Path) -> None:
    recording = Recording()
    run = trainer(RobustnessMonitor([recording], max_samples=20), root=tmp_path, max_epochs=3)
    run.fit(classifier(), loader(), loader())
    inputs, targets = recording.samples()
    assert torch.bincount(targets).tolist() == [5] * NUM_CLASSES
    assert len(recording.seen) == 3
    assert all(torch.equal(recording.samples(i)[0], inputs) for i in range(3))


def test_sanity_checking_is_not_measured(tmp_path: Path) -> None:
    recording = Recording()
    run = trainer(RobustnessMonitor([recording]), root=tmp_path, num_sanity_val_steps=2, max_epochs=1)
    run.fit(classifier(), loader(), loader())
    assert len(recording.seen) == 1


@pytest.mark.parametrize(
    ("cadence", "options", "expected"),
    [
        (1, {}, [0, 1, 2, 3, 4, 5]),
        (2, {}, [0, 2, 4]),
        (4, {}, [0, 4]),
        (2, {"check_val_every_n_epoch": 2}, [1, 3, 5]),  # epochs 0, 2, 4 have no validation
        (3, {"check_val_every_n_epoch": 2}, [1, 5]),
        (3, {"val_check_interval": 0.5}, [0, 0, 3, 3]),
    ],
)
def test_measurements_keep_the_cadence(
    tmp_path: Path, cadence: int, options: dict[str, Any], expected: list[int]
) -> None:
    epochs: list[int] = []
    recording = Recording()

    class Epochs(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            epochs.extend([trainer.current_epoch] * (len(recording.seen) - len(epochs)))

    monitor = RobustnessMonitor([recording], max_samples=8, every_n_epochs=cadence)
    run = trainer(monitor, Epochs(), root=tmp_path, max_epochs=6, **options)
    run.fit(classifier(), loader(), loader())
    assert epochs == expected


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_measures_when_the_uninterrupted_one_does(tmp_path: Path) -> None:
    def run(max_epochs: int, ckpt_path: str | None = None) -> list[dict[str, float]]:
        history = History()
        checkpoint = ModelCheckpoint(tmp_path, save_last=True)
        monitor = RobustnessMonitor(["linearized_accuracy"], every_n_epochs=2)
        torch.manual_seed(0)
        fitter = trainer(monitor, history, checkpoint, root=tmp_path, max_epochs=max_epochs, enable_checkpointing=True)
        fitter.fit(classifier(), loader(), loader(), ckpt_path=ckpt_path, weights_only=True)
        return history.rows

    last = str(tmp_path / "last.ckpt")
    first = run(4)
    resumed = run(7, ckpt_path=last)
    values = [row["robust/seconds"] for row in first + resumed]  # changes exactly when there is a new measurement
    changed = [epoch for epoch, value in enumerate(values) if epoch == 0 or value != values[epoch - 1]]
    assert changed == [0, 2, 4, 6]


def test_progress_bar_shows_headlines_and_a_line_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(RobustnessMonitor(prog_bar=True), root=tmp_path, enable_progress_bar=True, max_epochs=1)
    run.fit(classifier(), loader(), loader())
    assert {"robust/fim_spectral_norm", "robust/linearized_accuracy_linf_0.003922"} <= set(run.progress_bar_metrics)
    out = capsys.readouterr().out
    assert "robustness in epoch 0, on 120 samples: fim_spectral_norm " in out


def test_two_monitors_with_their_own_prefixes(tmp_path: Path) -> None:
    run = trainer(
        RobustnessMonitor(["linearized_accuracy"]),
        RobustnessMonitor(["linearized_accuracy"], log_key_prefix="half/", max_samples=60),
        root=tmp_path,
    )
    run.fit(classifier(), loader(), loader())
    assert run.callback_metrics["robust/num_samples"] == 120
    assert run.callback_metrics["half/num_samples"] == 60


def test_several_validation_loaders(tmp_path: Path) -> None:
    class TwoLoaders(type(classifier())):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    for index, size in ((0, 40), (1, 30)):
        run = trainer(RobustnessMonitor(dataloader_idx=index, on_error="raise"), root=tmp_path, max_epochs=1)
        run.fit(TwoLoaders(), loader(), [loader(samples(40)), loader(samples(30))])
        assert run.callback_metrics["robust/num_samples"] == size


@pytest.mark.parametrize(
    ("options", "num_samples"),
    [
        ({"fast_dev_run": True}, 64),  # one batch
        ({"limit_val_batches": 1}, 64),
        ({"limit_val_batches": 0.5}, 64),
        ({"overfit_batches": 1}, 64),
    ],
    ids=str,
)
def test_only_the_batches_that_are_validated_are_measured(
    tmp_path: Path, options: dict[str, Any], num_samples: int
) -> None:
    run = trainer(RobustnessMonitor(on_error="raise"), root=tmp_path, max_epochs=1, **options)
    with robustness_warnings() as messages:
        run.fit(classifier(), loader(), loader())
    assert run.state.finished
    assert messages == []
    assert run.callback_metrics.keys() >= DOCUMENTED
    assert run.callback_metrics["robust/num_samples"] == num_samples


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_any_precision_is_measured(tmp_path: Path, precision: Any) -> None:
    reference = trainer(RobustnessMonitor(), root=tmp_path)
    reference.validate(classifier(), loader(), verbose=False)
    run = trainer(RobustnessMonitor(on_error="raise"), root=tmp_path, precision=precision)
    run.validate(classifier(), loader(), verbose=False)
    for key in ("robust/fim_spectral_norm", "robust/linearized_margin_linf"):
        torch.testing.assert_close(
            run.callback_metrics[key].float(), reference.callback_metrics[key], rtol=0.03, atol=0
        )


def test_dictionaries_probe_fn_and_robustness_probe_give_the_same(tmp_path: Path) -> None:
    x, y = samples().tensors
    rows = [{"image": image, "label": label} for image, label in zip(x, y, strict=True)]
    triples = torch.utils.data.TensorDataset(x, torch.zeros(len(y)), y)

    class Dictionaries(type(classifier())):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            batch.pop("image", None)  # a module may change its batch, after the monitor has copied its samples

    class Triples(type(classifier())):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("unrelated", 0.0)

    class WithMethod(Triples):
        def robustness_probe(self, batch: Any) -> Probe:
            return Probe(self, batch[0], batch[2])

    def measure(cls: type, data: Any, **options: Any) -> float:
        model = cls(classifier().network)
        run = trainer(RobustnessMonitor(on_error="raise", **options), root=tmp_path)
        run.validate(model, loader(data), verbose=False)
        return float(run.callback_metrics["robust/fim_spectral_norm"])

    expected = measure(type(classifier()), None)
    assert measure(Dictionaries, rows) == expected
    assert measure(WithMethod, triples) == expected
    assert measure(Triples, triples, probe_fn=lambda module, batch: Probe(module, batch[0], batch[2])) == expected


def test_input_std_gives_units_of_the_unnormalised_input(tmp_path: Path) -> None:
    x, y = samples().tensors
    normalised = torch.utils.data.TensorDataset((x - 0.5) / 0.25, y)

    class Normalising(torch.nn.Module):
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network((x - 0.5) / 0.25)

    network = classifier().network
    inside = trainer(RobustnessMonitor(), root=tmp_path)
    inside.validate(type(classifier())(Normalising(network)), loader(), verbose=False)
    outside = trainer(RobustnessMonitor(input_std=[0.25]), root=tmp_path)
    outside.validate(type(classifier())(network), loader(normalised), verbose=False)
    of_inputs = {key for key in DOCUMENTED if not re.search("hessian|wci|seconds|overhead", key)}
    for key in of_inputs:
        torch.testing.assert_close(outside.callback_metrics[key], inside.callback_metrics[key], rtol=1e-4, atol=1e-6)


def test_early_stopping_and_checkpoints_can_follow_a_robustness_key(tmp_path: Path) -> None:
    key = "robust/linearized_accuracy_linf_0.03137"
    checkpoint, history = ModelCheckpoint(tmp_path, monitor=key, mode="max"), History()
    stopper = EarlyStopping(key, mode="max", patience=2)
    run = trainer(
        RobustnessMonitor(), stopper, checkpoint, history, root=tmp_path, enable_checkpointing=True, max_epochs=9
    )
    torch.manual_seed(0)
    run.fit(classifier(), loader(batch_size=32), loader())
    values = [row[key] for row in history.rows]
    best = values.index(max(values))
    assert best > 0
    assert checkpoint.best_model_score == values[best]
    assert Path(checkpoint.best_model_path).name.startswith(f"epoch={best}-")
    assert stopper.stopped_epoch == best + 2 == len(values) - 1


def test_a_sound_run_does_not_warn(tmp_path: Path) -> None:
    with robustness_warnings() as messages:
        trainer(RobustnessMonitor(), root=tmp_path).fit(classifier(), loader(), loader())
    assert messages == []


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_measured_when_they_are_validated(tmp_path: Path, first: bool) -> None:
    """Lightning puts averaged weights in only for the validation, whatever the order of the callbacks."""
    averaging = EMAWeightAveraging(decay=0.5)
    monitor = RobustnessMonitor(["linearized_accuracy"], max_samples=500)
    callbacks = (averaging, monitor) if first else (monitor, averaging)
    accuracies = []

    class Accuracy(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            metrics = trainer.callback_metrics
            accuracies.append((float(metrics["val_acc"]), float(metrics["robust/linearized_accuracy_linf_0"])))

    run = trainer(*callbacks, Accuracy(), root=tmp_path, max_epochs=3, num_sanity_val_steps=0)
    run.fit(classifier(), loader(), loader())
    assert len({accuracy for accuracy, _ in accuracies}) > 1
    assert all(measured == pytest.approx(validated, abs=1e-6) for validated, measured in accuracies)


def test_values_recorded_in_a_forward_pass_are_not_disturbed(tmp_path: Path) -> None:
    class Recorder(type(classifier())):
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__(network)
            self.mean = MeanMetric()

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                self.log("activation", x.mean(), on_step=False, on_epoch=True, batch_size=len(x))
                self.mean.update(x.mean())
            return super().forward(x)

        def on_validation_epoch_end(self) -> None:
            self.log("metric", self.mean.compute())
            self.mean.reset()

    values = []
    for callbacks in ([], [RobustnessMonitor(max_samples=20, on_error="raise")]):
        torch.manual_seed(0)
        run = trainer(*callbacks, root=tmp_path)
        run.fit(Recorder(classifier().network), loader(), loader())
        values.append({key: float(run.callback_metrics[key]) for key in ("activation", "metric", "val_acc")})
    assert values[0] == values[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the oldest version warns about the name of the method
def test_a_loss_of_torch_can_be_named_in_a_configuration() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RobustnessMonitor, "monitor")

    def configured(loss_fn: Any) -> Any:
        monitor = parser.instantiate_classes(parser.parse_object({"monitor": {"loss_fn": loss_fn}})).monitor
        return monitor.loss_fn

    loss = configured({"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.1}})
    assert isinstance(loss, torch.nn.CrossEntropyLoss)
    assert loss.label_smoothing == 0.1
    assert configured("torch.nn.functional.cross_entropy") is torch.nn.functional.cross_entropy


def test_nothing_is_kept_between_measurements(tmp_path: Path) -> None:
    monitor = RobustnessMonitor()
    trainer(monitor, root=tmp_path).fit(classifier(), loader(), loader())
    for metric in monitor.metrics:
        rows = [state for state in metric.metric_state.values() if isinstance(state, list)]
        assert rows
        assert not any(rows)
    assert monitor._loop._measurement is None


def test_fisher_rao_margins_have_a_monitor_of_their_own_at_a_slower_cadence(tmp_path: Path) -> None:
    history = History("paths/")
    slow = RobustnessMonitor(
        ["fisher_rao_margin"], every_n_epochs=2, max_samples=10, log_key_prefix="paths/", on_error="raise"
    )
    run = trainer(
        RobustnessMonitor(["fisher_spectral_norm"], on_error="raise"), slow, history, root=tmp_path, max_epochs=4
    )
    run.fit(classifier(), loader(), loader())
    logged = {key for key in run.callback_metrics if key.startswith("paths/")} - {"paths/overhead", "paths/seconds"}
    bars = ("shielded", "fisher_rao_margin", *(f"fisher_rao_margin_{name}" for name in ("excess", "l2", "linf")))
    assert logged == {
        *(f"paths/{key}{suffix}" for key in bars for suffix in ("", "_stderr", "_lower", "_upper")),
        "paths/fisher_rao_margin_bound",
        "paths/fisher_rao_margin_unreached",
        "paths/num_samples",
        *(
            f"paths/{key}_per_class/{label}"
            for key in ("fisher_rao_margin", "shielded")
            for label in range(NUM_CLASSES)
        ),
    }
    values = [row["paths/fisher_rao_margin"] for row in history.rows]  # Lightning keeps showing the last one
    assert values[0] == values[1] != values[2] == values[3]


def two_monitors(first: ProbeMetric, second: ProbeMetric, root: Path) -> Trainer:
    monitors = [
        RobustnessMonitor([metric], log_key_prefix=prefix, max_samples=60)
        for metric, prefix in ((first, "a/"), (second, "b/"))
    ]
    return trainer(*monitors, root=root, max_epochs=1)


class Wrapping(LinearizedAccuracy):
    """Holds another metric."""

    def __init__(self, inner: ProbeMetric) -> None:
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("wrap", [lambda metric: metric, Wrapping], ids=["itself", "wrapped"])
def test_one_metric_in_two_monitors_is_refused_and_a_clone_is_not(tmp_path: Path, wrap: Any) -> None:
    metric = LinearizedAccuracy([0.05])
    with pytest.raises(MisconfigurationException, match=r"one LinearizedAccuracy object in two.*metric\.clone\(\)"):
        two_monitors(metric, wrap(metric), tmp_path).fit(classifier(), loader(), loader())
    with pytest.raises(MisconfigurationException, match=r"holds each metric once \(`metric\.clone\(\)`"):
        RobustnessMonitor([metric, metric])
    run = two_monitors(metric, wrap(metric.clone()), tmp_path)
    run.fit(classifier(), loader(), loader())
    assert run.callback_metrics["a/num_samples"] == run.callback_metrics["b/num_samples"] == 60


def test_a_metric_may_go_from_one_trainer_to_the_next(tmp_path: Path) -> None:
    metric = LinearizedAccuracy([0.05])
    for _ in range(2):
        run = trainer(RobustnessMonitor([metric], max_samples=60), root=tmp_path, max_epochs=1)
        run.fit(classifier(), loader(), loader())
        assert run.callback_metrics["robust/num_samples"] == 60


def test_a_model_that_only_answers_is_measured_beside_one_with_gradients(tmp_path: Path) -> None:
    """The same network as a function of arrays that returns probabilities: equal values, and no warning."""
    model = classifier()
    network = copy.deepcopy(model.network).eval()

    def predict(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.tensor(x)).softmax(dim=1).numpy()

    def probe_fn(module: LightningModule, batch: Any) -> Probe:
        return Probe(predict, batch[0].numpy(), batch[1].numpy(), queries=100)

    def monitor(prefix: str, **options: Any) -> RobustnessMonitor:
        metrics = [FisherSpectralNorm(), LinearizedAccuracy([0.05, 0.2], norm="l2")]
        return RobustnessMonitor(metrics, log_key_prefix=prefix, max_samples=24, on_error="raise", **options)

    run = trainer(monitor("a/"), monitor("b/", probe_fn=probe_fn), root=tmp_path)
    run.validate(model, loader(), verbose=False)
    values = {key: float(value) for key, value in run.callback_metrics.items()}
    keys = [key[2:] for key in values if key.startswith("a/") and key != "a/seconds"]
    assert len(keys) > 20
    assert {key: values[f"b/{key}"] for key in keys} == pytest.approx(
        {key: values[f"a/{key}"] for key in keys}, rel=0.02, abs=1e-4
    )
