"""Sharded training is measured under `fully_shard`; other strategies get one warning and no measurements."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from lightning_robust import LinearizedAccuracy, Probe, RobustnessMonitor, RobustnessWarning
from tests.helpers import processes
from tests.helpers.training import (
    CLOCKS,
    Classifier,
    History,
    classifier,
    loader,
    robustness_warnings,
    samples,
    trainer,
)

on_cpu = pytest.mark.skipif(not processes.CAN_SHARD, reason=f"torch {torch.__version__} shards on accelerators only")
METRICS = ["fisher_spectral_norm", "linearized_accuracy", "hessian_trace", "weight_curvature_index"]
VALIDATION = samples(23)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 9), nn.GELU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 4))


class Sharded(Classifier):
    fails = False

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for layer in (self.network[1], self.network[3], self.network):
            fully_shard(layer, mesh=mesh)

    def robustness_probe(self, batch: Any) -> Probe:
        def forward(x: Tensor) -> Tensor:
            if self.fails and (self.current_epoch, self.global_rank) == (1, 1):
                raise OSError("one process alone")
            return self(x)

        return Probe(forward, *batch, module=self)


class Fails(Sharded):
    fails = True


class Talks(Sharded):
    """Issues its own collectives between the last validation batch and the end of validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self(batch[0]).sum(), sync_dist=True)


class FailsToReset(LinearizedAccuracy):
    def __init__(self, model: Classifier) -> None:
        super().__init__([0.07], "l2")
        self.model = [model]

    def reset(self) -> None:
        if hasattr(self, "model") and (self.model[0].current_epoch, self.model[0].global_rank) == (1, 1):
            raise OSError("one process alone")
        super().reset()


class Split(Classifier):
    def configure_model(self) -> None:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        columns = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(self.network, self.device_mesh["tensor_parallel"], {"5": columns})


def fit(
    root: Path, cls: type[Classifier], *, monitored: bool = True
) -> tuple[list[dict[str, float]], list[str], list[Tensor]]:
    history = History()
    model = cls(network())
    metrics = [*METRICS, FailsToReset(model)] if cls is Talks else METRICS
    monitor = RobustnessMonitor(metrics, max_samples=17)
    size = 1 if cls is Split else 2
    strategy = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=2 // size)
    callbacks = [monitor, history] if monitored else [history]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(*callbacks, root=root, strategy=strategy, devices=2, max_epochs=3)
        run.fit(model, loader(samples(48), batch_size=8), loader(VALIDATION, batch_size=8))
    said = [str(warning.message) for warning in caught if issubclass(warning.category, RobustnessWarning)]
    if isinstance(model, Sharded):
        model.network.reshard()  # the last forward pass leaves the outermost weights gathered
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return history.rows, said, [weight.detach() for weight in weights]


def every_run(rank: int, root: Path) -> dict[str, Any]:
    return {
        "measured": fit(root, Sharded),
        "alone": fit(root, Sharded, monitored=False),
        "failing": fit(root, Fails),
        "talking": fit(root, Talks),
        "split": fit(root, Split),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes.run(every_run, 2, tmp_path_factory.mktemp("sharded"))


def values(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key not in CLOCKS}


@on_cpu
@pytest.mark.ddp
def test_sharded_weights_give_the_values_of_whole_ones_in_one_process(
    results: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows, said, weights = results[0]["measured"]
    assert rows == results[1]["measured"][0]
    assert said == []
    model = Classifier(network())
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        parameter.data.copy_(weight)
    run = trainer(RobustnessMonitor(METRICS, max_samples=17, on_error="raise"), root=tmp_path)
    run.validate(model, loader(VALIDATION, batch_size=8), verbose=False)
    expected = {key: float(value) for key, value in run.callback_metrics.items() if key.startswith("robust/")}
    assert expected["robust/num_samples"] == 17
    assert "robust/hessian_trace_per_layer/network.1.weight" in expected
    assert values(rows[-1]) == pytest.approx(values(expected), rel=1e-5, abs=1e-6)


@on_cpu
@pytest.mark.ddp
def test_sharded_training_is_bit_identical_with_and_without_the_monitor(results: list[dict[str, Any]]) -> None:
    for result in results:
        for run in ("measured", "failing"):
            assert all(torch.equal(a, b) for a, b in zip(result[run][2], result["alone"][2], strict=True))


@on_cpu
@pytest.mark.ddp
@pytest.mark.parametrize("name", ["failing", "talking"])  # after the weights are gathered, and before
def test_when_one_process_fails_all_gather_and_continue(results: list[dict[str, Any]], name: str) -> None:
    rows, said, _ = results[0][name]
    assert len(said) == 1
    assert "skipped the measurement in epoch 1: OSError: one process alone" in said[0]
    assert rows[1] == rows[0]
    assert values(results[0]["measured"][0][2]).items() <= values(rows[2]).items()


@on_cpu
@pytest.mark.ddp
def test_tensor_parallelism_is_refused_once_and_trains(results: list[dict[str, Any]]) -> None:
    rows, said, _ = results[0]["split"]
    assert rows == [{}] * 3
    assert len(said) == 1
    assert said[0].startswith("RobustnessMonitor measures nothing under tensor parallelism")


@pytest.mark.parametrize("kind", ["DeepSpeedStrategy", "FSDPStrategy"])
def test_strategies_that_cannot_be_undone_are_refused_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pretended = type(kind, (SingleDeviceStrategy,), {})  # neither runs on a CPU
    monkeypatch.setattr(f"lightning_robust.callbacks.monitor.run_diagnostics.{kind}", pretended)
    for method in ("fit", "validate"):
        history = History()
        with robustness_warnings() as messages:
            run = trainer(RobustnessMonitor(), history, root=tmp_path, strategy=pretended("cpu"), devices="auto")
            getattr(run, method)(classifier(), *[loader()] * (2 if method == "fit" else 1))
        assert len(messages) == 1
        assert messages[0].startswith(f"RobustnessMonitor measures nothing under {kind}, which spreads the weights")
        assert "ModelParallelStrategy" in messages[0]
        assert not any(history.rows)
