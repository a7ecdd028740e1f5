"""The monitor under all settings of a Trainer, and its metrics without a Trainer."""

import copy
import itertools
import json
import math
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset, get_worker_info
from torchmetrics import MetricCollection

from lightning_robust import (
    AdversarialAccuracy,
    FisherSpectralNorm,
    HessianTrace,
    LinearizedAccuracy,
    Probe,
    RobustnessMonitor,
    WeightCurvatureIndex,
)
from lightning_robust.metrics import METRICS, ProbeMetric
from tests.helpers import processes, training
from tests.helpers.training import (
    CLOCKS,
    Classifier,
    History,
    classifier,
    robustness_warnings,
    samples,
    trainer,
)

HEADLINES = {
    f"robust/{key}"
    for key in ("fim_spectral_norm", "linearized_accuracy_linf_0", "hessian_trace", "wci", "num_samples", "seconds")
}


class SeveralLoaders(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


def measured(run: Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("robust/")}


def without_time(values: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if key not in CLOCKS}


def monitor(**options: Any) -> RobustnessMonitor:
    return RobustnessMonitor(**{"on_error": "raise"} | options)


# ---- fit, under all settings of a Trainer ----------------------------------------------------------------------------


def loader(dataset: Any = None, batch_size: int = 32, **options: Any) -> DataLoader:
    """Four batches of the 120 samples by default, of which settings take a part."""
    return training.loader(dataset, batch_size, **options)


@dataclass(frozen=True)
class Setting:
    """A run, and the number of samples in each of its measurements."""

    num_samples: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    val_loader: Callable[[], Any] = loader
    model: Callable[[], LightningModule] = classifier
    monitor: dict[str, Any] = field(default_factory=dict)
    says: str = "(?!)"  # the one warning of the monitor
    warns: str = "(?!)"  # warnings of Lightning


class Stream(IterableDataset):
    """Samples without a length, distributed among workers."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return itertools.islice(iter(samples()), start, None, step)


class SizedStream(Stream):
    def __len__(self) -> int:
        return 120


class Buckets(Sampler):
    """Batches of various sizes, without the attributes of torch's own batch sampler."""

    def __iter__(self) -> Iterator[list[int]]:
        indices = iter(range(120))
        return iter([list(itertools.islice(indices, size)) for size in (5, 40, 1, 60, 14)])

    def __len__(self) -> int:
        return 5


class Advertised(Buckets):
    """Batches of various sizes with a batch size that only the first batch has."""

    batch_size = 5


class Backwards(Sampler):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(reversed(range(self.size)))

    def __len__(self) -> int:
        return self.size


def lists() -> list[DataLoader]:
    return [loader(samples(size)) for size in (40, 30)]


class ListOfBatches:
    """An iterable that is not a DataLoader."""

    def __iter__(self) -> Iterator[Any]:
        return iter(loader())


RESERVOIR = r"cannot tell beforehand .* uniformly random subset of 50 \(reservoir sampling\)"
TOO_EARLY = "measured nothing in this run: training ended after 2 steps, before the first validation"

SETTINGS = {
    "fast_dev_run": Setting([32], {"fast_dev_run": True}),
    "fast_dev_run of two batches": Setting([50], {"fast_dev_run": 2}),
    "summary": Setting([50, 50], {"enable_model_summary": True}),
    "profiler": Setting([50, 50], {"profiler": "simple"}),
    "anomaly detection": Setting([50, 50], {"detect_anomaly": True}, warns="Anomaly Detection has been enabled"),
    "no inference mode": Setting([50, 50], {"inference_mode": False}),
    "sanity checking of all batches": Setting([50, 50], {"num_sanity_val_steps": -1}),
    "one batch": Setting([32, 32], {"limit_val_batches": 1}),
    "all batches": Setting([50, 50], {"limit_val_batches": 1.0}),
    "a quarter of the batches": Setting([32, 32], {"limit_val_batches": 0.25}),
    "more batches than there are": Setting([50, 50], {"limit_val_batches": 1000}),
    "validation every second epoch": Setting([50, 50], {"check_val_every_n_epoch": 2, "max_epochs": 5}),
    "validation by steps across epochs": Setting(
        [50, 50, 50], {"check_val_every_n_epoch": None, "val_check_interval": 3, "max_epochs": 3, "max_steps": 11}
    ),
    "validation amid epochs": Setting([50, 50, 50, 50], {"val_check_interval": 2}),
    "the end amid an epoch": Setting([50], {"max_steps": 6}),
    "the end amid the first epoch": Setting([], {"max_steps": 2}, says=TOO_EARLY),
    "overfitting": Setting([50, 50], {"overfit_batches": 2}),
    "overfitting a share": Setting([32, 32], {"overfit_batches": 0.25}),
    "reloaded loaders": Setting([50, 50], {"reload_dataloaders_every_n_epochs": 1}),
    "deterministic algorithms": Setting([50, 50], {"deterministic": "warn"}),
    "batches of one": Setting([12, 12], val_loader=lambda: loader(samples(12), batch_size=1)),
    "one sample": Setting([1, 1], val_loader=lambda: loader(samples(1))),
    "one sample in the last batch": Setting(
        [33, 33], val_loader=lambda: loader(samples(33)), monitor={"max_samples": 33}
    ),
    "the last batch dropped": Setting(
        [96, 96], val_loader=lambda: loader(drop_last=True), monitor={"max_samples": 200}
    ),
    "a stream": Setting([50, 50], val_loader=lambda: loader(Stream()), says=RESERVOIR),
    "a stream from two workers": Setting(
        [50, 50],
        val_loader=lambda: loader(Stream(), num_workers=2, multiprocessing_context="fork"),
        says=RESERVOIR,
    ),
    "a stream with a length": Setting(
        [50, 50],
        val_loader=lambda: loader(SizedStream()),
        says=RESERVOIR,
        warns="Your `IterableDataset` has `__len__` defined",
    ),
    "a stream of which some batches are taken": Setting(
        [50, 50], {"limit_val_batches": 2}, val_loader=lambda: loader(Stream()), says=RESERVOIR
    ),
    "a stream that is shorter than the subset": Setting(
        [120, 120],
        val_loader=lambda: loader(Stream()),
        monitor={"max_samples": 500},
        says="cannot tell beforehand .* subset of 500",
    ),
    "an iterable that is no loader": Setting([50, 50], val_loader=ListOfBatches, says=RESERVOIR),
    "batches of various sizes": Setting(
        [50, 50], val_loader=lambda: DataLoader(samples(), batch_sampler=Buckets()), says=RESERVOIR
    ),
    "batches of various sizes that claim one": Setting(
        [50, 50], val_loader=lambda: DataLoader(samples(), batch_sampler=Advertised())
    ),
    "a sampler of one's own": Setting([50, 50], val_loader=lambda: loader(sampler=Backwards(120))),
    "a sampler of a part": Setting([20, 20], val_loader=lambda: loader(sampler=Backwards(20))),
    "no automatic batches": Setting(
        [50, 50],
        val_loader=lambda: DataLoader(
            [tuple(tensor[i : i + 30] for tensor in samples().tensors) for i in range(0, 120, 30)], batch_size=None
        ),
        says=RESERVOIR,
    ),
    "no such loader": Setting(
        [],
        val_loader=lists,
        model=SeveralLoaders,
        monitor={"dataloader_idx": 2},
        says="`dataloader_idx=2`, but there are 2 loaders",
    ),
    "the last of a dictionary of loaders": Setting(
        [30, 30],
        val_loader=lambda: dict(zip("ba", lists(), strict=True)),
        model=SeveralLoaders,
        monitor={"dataloader_idx": 1},
    ),
    "the first of loaders that yield in turn": Setting(
        [40, 40], val_loader=lambda: CombinedLoader(lists(), "sequential"), model=SeveralLoaders
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_validation_is_measured_on_the_right_number_of_samples(tmp_path: Path, name: str) -> None:
    setting, history = SETTINGS[name], History()
    with robustness_warnings() as messages, warnings.catch_warnings():
        warnings.filterwarnings("ignore", setting.warns)
        run = trainer(monitor(**{"max_samples": 50} | setting.monitor), history, root=tmp_path, **setting.options)
        try:
            run.fit(setting.model(), loader(), setting.val_loader())
        finally:
            torch.use_deterministic_algorithms(False)
            torch.autograd.set_detect_anomaly(False)
    assert run.state.finished
    rows = [row for row in history.rows if row]
    assert [row["robust/num_samples"] for row in rows] == setting.num_samples
    assert len({row["robust/seconds"] for row in rows}) == len(
        rows
    )  # no value is left over from an earlier measurement
    assert all(row.keys() >= HEADLINES for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    if setting.says == "(?!)":
        assert messages == []
    else:
        assert len(messages) == 1
        assert re.search(setting.says, messages[0])


# ---- loggers ---------------------------------------------------------------------------------------------------------


def test_all_of_several_loggers_have_all_keys(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    table, board = CSVLogger(tmp_path, name="table", version=""), TensorBoardLogger(tmp_path, name="board", version="")
    run = trainer(monitor(max_samples=20), root=tmp_path, logger=[table, board])
    run.fit(classifier(), loader(), loader())
    header = (tmp_path / "table" / "metrics.csv").read_text().splitlines()[0].split(",")
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    keys = measured(run).keys()
    assert keys >= HEADLINES
    assert keys <= set(header)
    assert keys <= set(events.Tags()["scalars"])
    assert len(events.Scalars("robust/wci")) == 2


# ---- the entry points ------------------------------------------------------------------------------------------------


def test_a_datamodule_is_measured_in_every_stage(tmp_path: Path) -> None:
    class Data(LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return loader(shuffle=True)

        def val_dataloader(self) -> DataLoader:
            return loader(samples(40))

        def test_dataloader(self) -> DataLoader:
            return loader(samples(30))

        def predict_dataloader(self) -> DataLoader:
            return DataLoader(samples(20).tensors[0], batch_size=8)

    run, model, data = trainer(monitor(), root=tmp_path), classifier(), Data()
    outputs = run.predict(model, data)
    assert sum(map(len, outputs)) == 20
    assert measured(run) == {}
    assert run.validate(model, data, verbose=False)[0]["robust/num_samples"] == 40
    assert run.test(model, data, verbose=False)[0]["robust/num_samples"] == 30
    run.fit(model, data)
    assert measured(run)["robust/num_samples"] == 40
    assert run.test(model, data, verbose=False)[0]["robust/num_samples"] == 30


def test_a_second_fit_of_the_same_trainer_continues_measuring(tmp_path: Path) -> None:
    history = History()
    run, model = trainer(monitor(max_samples=20), history, root=tmp_path), classifier()
    run.fit(model, loader(), loader())
    run.fit_loop.max_epochs = 4
    run.fit(model, loader(), loader())
    assert run.current_epoch == 4
    assert len({row["robust/fim_spectral_norm"] for row in history.rows}) == 4


def test_one_monitor_serves_two_trainers_one_after_the_other(tmp_path: Path) -> None:
    shared = monitor(max_samples=20, every_n_epochs=2)
    histories = []
    for seed in (0, 1):
        histories.append(History())
        run = trainer(shared, histories[-1], root=tmp_path, max_epochs=3)
        torch.manual_seed(0)
        run.fit(classifier(seed), loader(), loader())
    alone = History()
    torch.manual_seed(0)
    fresh = monitor(max_samples=20, every_n_epochs=2)
    trainer(fresh, alone, root=tmp_path, max_epochs=3).fit(classifier(1), loader(), loader())
    assert [without_time(row) for row in histories[1].rows] == [without_time(row) for row in alone.rows]
    assert histories[0].rows[0] != histories[1].rows[0]


def test_a_monitor_whose_run_has_crashed_serves_the_next(tmp_path: Path) -> None:
    class Crashing(Classifier):
        def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("amid a measurement")

    shared = monitor(max_samples=20)
    with pytest.raises(RuntimeError, match="amid a measurement"):
        trainer(shared, root=tmp_path, num_sanity_val_steps=0).fit(Crashing(), loader(), loader())
    values = []
    for one in (shared, monitor(max_samples=20)):
        run = trainer(one, root=tmp_path)
        run.validate(classifier(), loader(), verbose=False)
        values.append(without_time(measured(run)))
    assert values[0] == values[1]


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_a_copy_measures_as_the_original_does(tmp_path: Path, copied: Callable[[Any], Any], used: bool) -> None:
    original = monitor(max_samples=20, input_std=[0.5], loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1))
    if used:
        trainer(original, root=tmp_path).fit(classifier(), loader(), loader())
    values = []
    for one in (original, copied(original)):
        run = trainer(one, root=tmp_path)
        run.validate(classifier(), loader(), verbose=False)
        values.append(without_time(measured(run)))
    assert values[0]["robust/num_samples"] == 20
    assert values[0] == values[1]


def test_a_trainer_can_be_copied_with_its_monitor(tmp_path: Path) -> None:
    run = copy.deepcopy(trainer(monitor(max_samples=20), root=tmp_path))
    run.fit(classifier(), loader(), loader())
    assert measured(run)["robust/num_samples"] == 20


def test_a_module_can_bring_its_monitor(tmp_path: Path) -> None:
    class Bringing(Classifier):
        def configure_callbacks(self) -> list[Callback]:
            return [monitor(max_samples=20)]

    run = trainer(monitor(max_samples=50), root=tmp_path)  # which the module's monitor replaces
    run.fit(Bringing(), loader(), loader())
    assert measured(run)["robust/num_samples"] == 20


def test_a_module_without_a_validation_step_warns_that_nothing_is_measured(tmp_path: Path) -> None:
    class Trained(LightningModule):
        forward, training_step = Classifier.forward, Classifier.training_step
        configure_optimizers = Classifier.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.network = classifier().network

    with robustness_warnings() as messages, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed in a `val_dataloader` but have no `validation_step`")
        run = trainer(monitor(), root=tmp_path)
        run.fit(Trained(), loader(), loader())
    assert measured(run) == {}
    assert len(messages) == 1
    assert "Define `validation_step`" in messages[0]


def test_every_loader_can_have_a_monitor(tmp_path: Path) -> None:
    monitors = [monitor(dataloader_idx=index, log_key_prefix=f"robust/{index}/") for index in (0, 1)]
    run = trainer(*monitors, root=tmp_path)
    run.fit(SeveralLoaders(), loader(), lists())
    assert measured(run)["robust/0/num_samples"] == 40
    assert measured(run)["robust/1/num_samples"] == 30


def test_an_empty_loader_beside_others_reports_that_there_were_no_samples(tmp_path: Path) -> None:
    empty = loader(TensorDataset(torch.empty(0, 1, 4, 4), torch.empty(0, dtype=torch.long)))
    with robustness_warnings() as messages, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Total length of `DataLoader` across ranks is zero")
        run = trainer(RobustnessMonitor(), root=tmp_path, max_epochs=1)
        run.fit(SeveralLoaders(), loader(), [empty, loader()])
    assert run.state.finished
    assert measured(run) == {}
    assert len(messages) == 1
    assert "Expected at least one validation sample, but the loop saw none." in messages[0]


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_one_of_loaders_that_yield_together_is_measured_by_a_probe_fn(tmp_path: Path, mode: Any) -> None:
    class Together(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(next(part for part in batch if part is not None), batch_idx)

    def first(pl_module: LightningModule, batch: Any) -> Probe:
        return Probe(pl_module, *batch[0])

    run = trainer(monitor(probe_fn=first), root=tmp_path, max_epochs=1)
    run.fit(Together(), loader(), CombinedLoader([loader(samples(60)), loader(samples(30))], mode))
    expected = {"min_size": 32, "max_size_cycle": 60, "max_size": 60}
    assert measured(run)["robust/num_samples"] == expected[mode]


# ---- other ways of starting processes --------------------------------------------------------------------------------


class Leaving(Callback):
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if torch.distributed.is_initialized():  # gloo processes that end without this abort now and then
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def train(root: Any, *callbacks: Callback, devices: int = 1, **options: Any) -> dict[str, float]:
    """Train on all samples at once, so that the number of processes does not matter; return what is logged."""
    torch.manual_seed(0)
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)))
    run = trainer(monitor(max_samples=17), *callbacks, root=root, devices=devices, **options)
    run.fit(model, loader(samples(24), batch_size=24 // devices), loader(samples(23), batch_size=4))
    return measured(run)


def train_in_pairs(root: Path, strategies: list[str]) -> None:
    """Write what each strategy logs to ``values.json``, and what all processes say to ``stderr.txt``."""
    with (root / "stderr.txt").open("w") as file:
        os.dup2(file.fileno(), 2)
    warnings.filterwarnings("ignore", "Using `DistributedSampler` with the dataloaders")
    values = {name: train(root, Leaving(), strategy=name, devices=2) for name in strategies}
    (root / "values.json").write_text(json.dumps(values))


@pytest.mark.ddp
@pytest.mark.parametrize(
    "strategies", [["ddp_fork", "ddp_notebook"], pytest.param(["ddp_spawn"], marks=pytest.mark.long)], ids=str
)
def test_two_processes_log_the_values_of_one_however_they_are_started(tmp_path: Path, strategies: list[str]) -> None:
    ended = processes.exit_code(train_in_pairs, tmp_path, strategies)
    said = (tmp_path / "stderr.txt").read_text()
    assert ended == 0, said
    assert "RobustnessWarning" not in said
    values = json.loads((tmp_path / "values.json").read_text())
    assert list(values) == strategies
    alone = without_time(train(tmp_path))
    assert alone["robust/num_samples"] == 17
    for strategy in strategies:
        assert without_time(values[strategy]) == pytest.approx(alone, rel=1e-4, abs=1e-5), strategy


# ---- without Lightning -----------------------------------------------------------------------------------------------


def probes(size: int = 40) -> list[Probe]:
    model = classifier().eval()
    return [Probe(model, x, y) for x, y in loader(samples(size), batch_size=16)]


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_s_forward_gives_the_values_of_the_batch_and_adds_it(name: str) -> None:
    whole = METRICS[name]()
    for probe in probes():
        batch, alone = whole(probe), METRICS[name]()
        alone.update(probe)
        torch.testing.assert_close(batch, alone.compute())
    updated = METRICS[name]()
    for probe in probes():
        updated.update(probe)
    torch.testing.assert_close(whole.compute(), updated.compute())


def test_a_collection_gives_the_values_of_its_metrics() -> None:
    def metrics() -> dict[str, ProbeMetric]:
        return {
            "fisher": FisherSpectralNorm(),
            "linf": LinearizedAccuracy([0.05]),
            "l2": LinearizedAccuracy([0.1], norm="l2"),
            "attack": AdversarialAccuracy([0.05]),
            "hessian": HessianTrace(),
            "gauss_newton": HessianTrace(estimator="gauss_newton"),
            "index": WeightCurvatureIndex(),
        }

    collection, alone = MetricCollection(metrics()), metrics()
    for probe in probes():
        collection.update(probe)
        for metric in alone.values():
            metric.update(probe)
    expected = {key: value for metric in alone.values() for key, value in metric.compute().items()}
    torch.testing.assert_close(collection.compute(), expected)


@pytest.mark.parametrize("name", METRICS)
def test_a_saved_metric_continues_where_it_stopped(name: str, tmp_path: Path) -> None:
    first, rest = probes()[:1], probes()[1:]
    begun, resumed, whole = METRICS[name](), METRICS[name](), METRICS[name]()
    begun.persistent(True)
    resumed.persistent(True)
    for probe in first:
        begun.update(probe)
    torch.save(begun.state_dict(), tmp_path / "metric.pt")
    resumed.load_state_dict(torch.load(tmp_path / "metric.pt"))
    for probe in rest:
        resumed.update(probe)
    for probe in [*first, *rest]:
        whole.update(probe)
    torch.testing.assert_close(resumed.compute(), whole.compute())


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_set_to_another_dtype_gives_the_same_values(name: str) -> None:
    plain, moved = METRICS[name](), METRICS[name]().set_dtype(torch.float32)
    for probe in probes():
        plain.update(probe)
        moved.update(probe)
    torch.testing.assert_close(moved.compute(), plain.compute(), rtol=1e-4, atol=1e-6, check_dtype=False)


def test_a_plain_training_loop_is_not_disturbed_by_metrics_inside_it() -> None:
    def train(metrics: MetricCollection | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = Classifier().network
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for x, y in loader(shuffle=True):
            nn.functional.cross_entropy(model(x), y).backward()
            if metrics is not None:  # in the middle of a step, in train mode
                metrics.update(Probe(model, x[:8], y[:8]))
            optimizer.step()
            optimizer.zero_grad()
        return [*model.state_dict().values(), torch.get_rng_state()]

    metrics = MetricCollection([METRICS[name]() for name in METRICS], compute_groups=False)
    for without, beside in zip(train(None), train(metrics), strict=True):
        assert torch.equal(without, beside)
    assert metrics.compute()["hessian_trace"] > 0
