"""Whatever goes wrong inside a measurement, a warning names the cause and training goes on."""

import re
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_robust import FisherSpectralNorm, HessianTrace, LinearizedAccuracy, Probe, RobustnessMonitor
from lightning_robust.callbacks.monitor import diagnostics
from lightning_robust.callbacks.warn_once import WarnOnce
from lightning_robust.functional import hessian_trace
from lightning_robust.metrics import ProbeMetric
from tests.helpers import processes
from tests.helpers.training import (
    CLOCKS,
    NUM_CLASSES,
    Classifier,
    History,
    classifier,
    loader,
    robustness_warnings,
    samples,
    trainer,
)

Loader = Callable[[], Any]


class Quiet(Classifier):
    """Trains, and accepts any validation batch without looking at it."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_score", 1.0, batch_size=1)


def fit(
    model: Classifier, val_loader: Any, root: Path, logger: Any = False, **options: Any
) -> tuple[list[str], list[dict[str, float]]]:
    """Train for a few epochs; return the warnings, and what was logged after each epoch."""
    history, max_epochs = History(), options.pop("max_epochs", 2)
    with robustness_warnings() as messages:
        run = trainer(RobustnessMonitor(**options), history, root=root, logger=logger, max_epochs=max_epochs)
        run.fit(model, loader(), val_loader)
    assert run.state.finished
    assert run.current_epoch == len(history.rows) == max_epochs
    return messages, history.rows


class Outputs(nn.Module):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network, self.change = classifier().network, change

    def forward(self, x: Tensor) -> Any:
        logits = self.network(x)
        return logits if self.training else self.change(logits)


def integers() -> DataLoader:
    return loader(TensorDataset(torch.randint(0, 9, (40, 1, 4, 4)), torch.zeros(40, dtype=torch.long)))


def three_parts() -> DataLoader:
    x, y = samples().tensors
    return loader(TensorDataset(x, y, y))


def nan_inputs() -> DataLoader:
    x, y = samples().tensors
    return loader(TensorDataset(x / 0 * 0, y), batch_size=32)


ALL_SKIPPED = (
    "RobustnessMonitor measured nothing in this run: all 2 measurements were skipped, as explained in epoch 0."
)


@pytest.mark.parametrize(
    ("change", "val_loader", "sentence"),
    [
        (None, three_parts, r"batches `\(inputs, targets\)`.*got a list of 3 \(Tensor, Tensor, Tensor\).*probe_fn"),
        (None, integers, r"inputs` to be floating point, but got torch.int64.*probe_fn"),
        (None, nan_inputs, r"finite inputs, but got NaN or infinity in 8 of 8 samples"),
        (lambda z: z[:, :, None], loader, r"logits of shape \(N, C\).*returned shape \(\d+, 4, 1\)"),
        (lambda z: (z, z), loader, r"returned tuple with several entries.*probe_fn"),
        (lambda z: z[:, :1], loader, r"C ≥ 2 classes, but for \d+ inputs it returned shape \(\d+, 1\).*\(0, z\)"),
        (lambda z: z[:, :2], loader, r"between 0 and 1, one of the 2 classes.*values from"),
        (lambda z: z * torch.nan, loader, r"finite outputs, but got NaN"),
    ],
)
def test_a_measurement_that_cannot_be_is_skipped_with_the_cause(
    tmp_path: Path, change: Callable[[Tensor], Any] | None, val_loader: Loader, sentence: str
) -> None:
    model = Quiet(None if change is None else Outputs(change))
    messages, rows = fit(model, val_loader(), tmp_path)
    assert rows == [{}, {}]
    assert len(messages) == 2
    assert re.search(f"^RobustnessMonitor skipped the measurement in epoch 0: .*{sentence}", messages[0])
    assert messages[1] == ALL_SKIPPED


def test_on_error_raise_lets_the_failure_through(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finite inputs"):
        fit(Quiet(), nan_inputs(), tmp_path, on_error="raise")


def test_after_nan_weights_the_next_measurement_works(tmp_path: Path) -> None:
    class Sick(Quiet):
        def on_validation_start(self) -> None:
            self.healthy = self.network[5].weight.detach().clone()
            if self.current_epoch == 0:
                self.network[5].weight.data.fill_(torch.nan)

        def on_validation_end(self) -> None:
            self.network[5].weight.data.copy_(self.healthy)

    messages, rows = fit(Sick(classifier().network), loader(), tmp_path)
    assert len(messages) == 1
    assert "finite outputs" in messages[0]
    assert rows[0] == {}
    assert rows[1]["robust/num_samples"] == 120


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda z: z.softmax(dim=1), "returns probabilities"),
        (lambda z: z - z.mean(dim=0) / 2, "mixes the samples of a batch"),
        (lambda z: nn.functional.dropout(z, 0.5, training=True), "other outputs when it is called twice"),
    ],
)
def test_a_model_whose_numbers_mislead_is_measured_with_one_warning(
    tmp_path: Path, change: Callable[[Tensor], Tensor], sentence: str
) -> None:
    messages, rows = fit(Quiet(Outputs(change)), loader(), tmp_path)
    assert len(messages) == 1
    assert sentence in messages[0]
    assert all(row["robust/num_samples"] == 120 for row in rows)


def test_a_run_without_validation_warns_once(tmp_path: Path) -> None:
    with robustness_warnings() as messages:
        trainer(RobustnessMonitor(), root=tmp_path, limit_val_batches=0).fit(classifier(), loader(), loader())
    assert len(messages) == 1
    assert "validation loop, but this run has none" in messages[0]


def test_a_shuffled_loader_is_reported_once(tmp_path: Path) -> None:
    # Lightning has a word on it too
    with pytest.warns(UserWarning, match="shuffling enabled"):
        messages, _ = fit(Quiet(), loader(shuffle=True), tmp_path)
    assert len(messages) == 1
    assert "shuffle=False" in messages[0]


def test_a_stream_of_unknown_length_is_measured_by_a_stated_rule(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(samples())

    messages, rows = fit(Quiet(classifier().network), DataLoader(Stream(), 16), tmp_path, max_samples=50)
    assert len(messages) == 1
    assert "uniformly random subset of 50 (reservoir sampling)" in messages[0]
    assert [row["robust/num_samples"] for row in rows] == [50, 50]


def test_the_unit_of_epsilon_is_reported_once_when_inputs_leave_the_unit_interval(tmp_path: Path) -> None:
    x, y = samples().tensors
    normalised = loader(TensorDataset((x - 0.5) / 0.2, y))
    messages, _ = fit(Quiet(classifier().network), normalised, tmp_path)
    assert len(messages) == 1
    assert "inputs range from -2.5 to 2.5 and no `input_std` was given" in messages[0]
    messages, _ = fit(Quiet(classifier().network), normalised, tmp_path, input_std=0.2)
    assert messages == []


def test_bytes_have_their_own_remedy(tmp_path: Path) -> None:
    x, y = samples().tensors
    messages, _ = fit(Quiet(classifier().network), loader(TensorDataset((x * 255).round(), y)), tmp_path)
    assert len(messages) == 1
    assert "For bytes from 0 to 255 pass `input_std=1/255`" in messages[0]


@pytest.mark.parametrize(("unit", "sentence"), [(1e-4, "is nearly 0"), (100.0, "is hardly less than")])
def test_epsilons_far_from_all_margins_of_a_table_are_reported_once(tmp_path: Path, unit: float, sentence: str) -> None:
    x, y = samples().tensors
    table = loader(TensorDataset(unit * (x.flatten(1) - 0.5) / 0.2, y))
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)))
    messages, rows = fit(Classifier(network), table, tmp_path, max_epochs=4)
    assert len({row["robust/linearized_margin_linf"] for row in rows}) == len(rows) == 4
    (message,) = messages
    assert sentence in message
    assert "`LinearizedAccuracy([" in message
    assert fit(Classifier(network), table, tmp_path, metrics=["hessian_trace"])[0] == []


def test_inputs_beyond_their_valid_range_are_reported_once(tmp_path: Path) -> None:
    x, y = samples().tensors
    normalised = loader(TensorDataset((x - 0.5) / 0.2, y))
    messages, _ = fit(
        Quiet(classifier().network), normalised, tmp_path, input_std=0.2, input_mean=0.0, valid_range=(0, 1)
    )
    assert len(messages) == 1
    assert "range from -0.5 to 0.5 before normalisation, beyond the `valid_range` (0.0, 1.0)" in messages[0]
    options = {"input_std": 0.2, "input_mean": 0.5, "valid_range": (0, 1)}
    assert fit(Quiet(classifier().network), normalised, tmp_path, **options)[0] == []


def test_a_stopper_that_would_count_old_values_is_reported(tmp_path: Path) -> None:
    key = "robust/linearized_accuracy_linf_0.03137"
    for cadence, count in ((1, 0), (3, 1)):
        with robustness_warnings() as messages:
            stopper = EarlyStopping(key, mode="max")
            run = trainer(RobustnessMonitor(every_n_epochs=cadence), stopper, root=tmp_path, max_epochs=1)
            run.fit(classifier(), loader(), loader())
        assert len(messages) == count
    assert f"EarlyStopping follows `{key}`, which is measured every 3 epochs" in messages[0]


def test_a_custom_sampler_that_shuffles_is_found_by_its_samples(tmp_path: Path) -> None:
    class Shuffling(torch.utils.data.Sampler):
        def __iter__(self):
            self.passes = getattr(self, "passes", 0) + 1
            return iter(torch.randperm(120, generator=torch.Generator().manual_seed(self.passes)).tolist())

        def __len__(self) -> int:
            return 120

    val_loader = loader(sampler=Shuffling())
    messages, rows = fit(Quiet(classifier().network), val_loader, tmp_path, max_samples=20)
    assert len(messages) == 1
    assert "The validation loader yields other samples than at the last measurement" in messages[0]
    assert rows[1]["robust/num_samples"] == 20


def test_a_layout_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("lightning_robust.callbacks.monitor.reporting.write_layout", full)
    with robustness_warnings() as messages:
        run = trainer(RobustnessMonitor(), root=tmp_path, logger=TensorBoardLogger(tmp_path), max_epochs=1)
        run.fit(classifier(), loader(), loader())
    assert len(messages) == 1
    assert "could not lay out TensorBoard's page: OSError: No space left on device" in messages[0]
    assert run.callback_metrics["robust/num_samples"] == 120


def quantised(z: Tensor) -> Tensor:
    """As dynamic quantisation does it, with a scale from the whole batch."""
    scale = z.detach().abs().mean() / 30
    return (z.detach() / scale).round() * scale


INPUT_SIDE = ["fisher_spectral_norm", "linearized_accuracy", "adversarial_accuracy"]


@pytest.mark.parametrize("change", [Tensor.detach, lambda z: z.round(decimals=1), quantised])
def test_a_model_without_input_gradients_is_not_measured(tmp_path: Path, change: Callable[[Tensor], Tensor]) -> None:
    messages, rows = fit(Quiet(Outputs(change)), loader(), tmp_path, metrics=INPUT_SIDE)
    assert rows == [{}, {}]
    mixes = [message for message in messages if "mixes the samples" in message]
    assert len(mixes) == (change is quantised)
    refusals = [message for message in messages if message not in mixes]
    assert len(refusals) == 2
    assert "outputs have gradients with respect to its inputs, but they change without any" in refusals[0]
    assert refusals[1] == ALL_SKIPPED


class Transferred(Quiet):
    """Features without gradients, and a head that is trained."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(nn.Linear(16, 4))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.change(x).flatten(1)
        return self.network(features)


@pytest.mark.parametrize(
    "change", [torch.sin, torch.round, lambda x: (9 * x).long() / 9], ids=["no_grad", "rounded", "integers"]
)
def test_curvature_needs_no_gradients_with_respect_to_inputs(
    tmp_path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    (x, y), model = samples().tensors, Transferred(change)
    with robustness_warnings() as messages:
        run = trainer(RobustnessMonitor([HessianTrace(num_probes=3)]), root=tmp_path)
        run.validate(model, loader(), verbose=False)
    assert messages == []
    exact = hessian_trace(model.network, change(x).flatten(1), y, num_probes=3, rtol=None)
    assert float(run.callback_metrics["robust/hessian_trace"]) == pytest.approx(float(exact.total), rel=1e-5)
    messages, rows = fit(Transferred(change), loader(), tmp_path)
    assert "robust/hessian_trace" in rows[0]
    assert "robust/fim_spectral_norm" not in rows[0]
    assert len(messages) == 2
    assert "FisherSpectralNorm and LinearizedAccuracy: ValueError" in messages[0]


def test_a_model_that_refuses_inputs_out_of_range_is_measured(tmp_path: Path) -> None:
    class Careful(Quiet):
        def forward(self, x: Tensor) -> Tensor:
            assert x.min() >= 0
            assert x.max() <= 1
            return super().forward(x)

    messages, rows = fit(Careful(classifier().network), loader(), tmp_path)
    assert messages == []
    assert rows[1]["robust/num_samples"] == 120


def test_many_classes_that_take_little_time_cause_no_warning(tmp_path: Path) -> None:
    many = nn.Sequential(nn.Flatten(), nn.Linear(16, 250))
    messages, rows = fit(Quiet(many), loader(), tmp_path, max_samples=5)
    assert messages == []
    assert rows[1]["robust/num_samples"] == 5


def test_infinite_values_are_not_logged_and_reported_once(tmp_path: Path) -> None:
    constant = Outputs(lambda z: (3 * torch.eye(4) - 1)[torch.zeros(len(z), dtype=torch.long)] + 0 * z)
    messages, rows = fit(Quiet(constant), loader(), tmp_path)
    assert messages == [
        "`robust/linearized_margin_linf` is not finite, so it is not logged. Its curve has gaps wherever this happens."
    ]
    assert all("robust/linearized_margin_linf" not in row for row in rows)
    assert all(row["robust/fim_spectral_norm"] == 0 for row in rows)


def test_an_input_std_of_wrong_length_is_reported_and_skips_only_the_metrics_that_need_it(tmp_path: Path) -> None:
    messages, rows = fit(Quiet(classifier().network), loader(batch_size=32), tmp_path, input_std=[0.2, 0.3, 0.4])
    for row in rows:
        assert {key.split("/")[1].split("_")[0] for key in row} == {"hessian", "wci", "num", "seconds", "overhead"}
    assert messages[0].startswith("RobustnessMonitor skipped in epoch 0 FisherSpectralNorm and LinearizedAccuracy: ")
    assert "`input_std` to be one number or one per channel, 1 for inputs of shape (32, 1, 4, 4)" in messages[0]


@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), nn.BCEWithLogitsLoss()], ids=["mse", "bce"])
@pytest.mark.parametrize("output", [slice(1), 0], ids=["column", "squeezed"])
def test_a_single_output_has_curvature(tmp_path: Path, output: slice | int, loss_fn: nn.Module) -> None:
    x, _ = samples().tensors
    y = (x.flatten(1).sum(dim=1, keepdim=True) > 0).float()[:, output]
    model = Quiet(Outputs(lambda z: z[:, output]))
    messages, rows = fit(
        model, loader(TensorDataset(x, y)), tmp_path, metrics=["hessian_trace"], loss_fn=loss_fn, chunk_size=8
    )
    assert messages == []
    network = Outputs(lambda z: z[:, output])
    network.load_state_dict(model.network.state_dict())
    last = hessian_trace(network, x, y, loss_fn=loss_fn, rtol=None)
    assert rows[-1]["robust/hessian_trace"] == pytest.approx(float(last.total), rel=1e-5)


class Segments(nn.Module):
    """Gives every pixel a class in eval mode, and the image one in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, NUM_CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.layers(x)
        return scores.mean(dim=(2, 3)) if self.training else scores


def test_a_network_that_gives_every_pixel_a_class_has_curvature(tmp_path: Path) -> None:
    x, _ = samples().tensors
    y = (x[:, 0] > 0.5).long() + (x[:, 0] > 0.8)
    y[::3, 0] = 255
    loss_fn = nn.CrossEntropyLoss(ignore_index=255)
    network = Segments()
    data = loader(TensorDataset(x, y))
    messages, rows = fit(Quiet(network), data, tmp_path, metrics=["hessian_trace"], loss_fn=loss_fn)
    assert messages == []
    last = hessian_trace(network, x, y, loss_fn=loss_fn, rtol=None, num_probes=2)
    assert rows[-1]["robust/hessian_trace"] == pytest.approx(float(last.total), rel=1e-5)


def test_the_second_of_two_metrics_that_log_the_same_key_is_left_out(tmp_path: Path) -> None:
    metrics = [LinearizedAccuracy([0.1]), LinearizedAccuracy([0.2])]
    messages, rows = fit(classifier(), loader(), tmp_path, metrics=metrics)
    assert all("robust/linearized_accuracy_linf_0.1" in row for row in rows)
    assert all("robust/linearized_accuracy_linf_0.2" not in row for row in rows)
    assert messages[1:] == [
        "RobustnessMonitor skipped LinearizedAccuracy in 1 more measurement, for the reason given in epoch 0."
    ]
    assert "skipped in epoch 0 LinearizedAccuracy: ValueError: Expected each metric to log its own keys" in messages[0]
    assert "two log ['linearized_accuracy_linf_0'" in messages[0]


def test_the_caveat_about_noisy_curvature_is_the_same_at_every_measurement() -> None:
    def said(trace: float, noise: float, num_samples: int = 120) -> list[str]:
        values = {"hessian_trace": trace, "hessian_trace_stderr_probes": noise, "num_samples": float(num_samples)}
        return list(diagnostics.on_values([HessianTrace()], values, prefix="robust/").values())

    (sentence,) = said(1.0, 2.0)
    assert sentence.startswith("`robust/hessian_trace` is mostly noise of its random probes")
    assert said(-1.5, 2.0) == [sentence]
    assert said(2.5, 2.0) == said(1.0, 2.0, num_samples=3) == []


class Once(torch.autograd.Function):
    """The square, with a backward pass that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


def test_metrics_that_cannot_be_measured_do_not_stop_the_others(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), Squared(), nn.Linear(8, 4))
    messages, rows = fit(Quiet(network), loader(), tmp_path)
    assert len(messages) == 2
    assert "skipped in epoch 0 HessianTrace and WeightCurvatureIndex: ValueError: Expected a model that" in messages[0]
    assert "estimator='gauss_newton'" in messages[0]
    for row in rows:
        assert row["robust/num_samples"] == 120
        assert "robust/fim_spectral_norm" in row
        assert "robust/linearized_accuracy_linf_0" in row
        assert not any("hessian" in key or "wci" in key for key in row)


def test_gauss_newton_works_without_a_second_derivative(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), Squared(), nn.Linear(8, 4))
    messages, rows = fit(Quiet(network), loader(), tmp_path, metrics=[HessianTrace(estimator="gauss_newton")])
    assert messages == []
    assert all(row["robust/hessian_trace_gauss_newton"] > 0 for row in rows)


def test_the_two_matrices_can_be_logged_side_by_side(tmp_path: Path) -> None:
    metrics = ["hessian_trace", HessianTrace(estimator="gauss_newton")]
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    messages, rows = fit(Quiet(network), loader(), tmp_path, metrics=metrics)
    assert messages == []
    for row in rows:
        assert row["robust/hessian_trace"] != row["robust/hessian_trace_gauss_newton"]
        assert (
            row["robust/hessian_trace_per_layer/network.1.weight"]
            != row["robust/hessian_trace_gauss_newton_per_layer/network.1.weight"]
        )


def test_the_hint_about_calling_the_module_follows_only_its_own_errors(tmp_path: Path) -> None:
    def refuse(z: Tensor) -> Tensor:
        raise TypeError("conv2d() received an invalid combination of arguments")

    hint = "If the module is not called as `module(inputs)`, pass `probe_fn=lambda module, batch: Probe("
    messages, _ = fit(Quiet(Outputs(refuse)), loader(), tmp_path)
    assert [hint in message for message in messages] == [True, False]
    messages, _ = fit(Quiet(), nan_inputs(), tmp_path)
    assert not any("probe_fn" in message for message in messages)
    messages, _ = fit(Quiet(Outputs(lambda z: z[..., None])), loader(), tmp_path)
    assert "`probe_fn=lambda module, batch: Probe(lambda x: logits_of(module(x)), batch[0]" in messages[0]
    messages, _ = fit(Quiet(Outputs(lambda z: (z, z))), loader(), tmp_path)
    assert messages[0].count("probe_fn=") == 1
    assert "`probe_fn=lambda module, batch: Probe(lambda x: module(x)[0], batch[0]" in messages[0]


def warn_in_two_runs(path: Path) -> None:
    with path.open("w") as file, redirect_stderr(file):
        for _ in range(2):
            WarnOnce().once("beware")


def test_the_second_run_in_a_process_warns_like_the_first(tmp_path: Path) -> None:
    """In a process with Python's own filters, which show a sentence once."""
    assert processes.exit_code(warn_in_two_runs, tmp_path / "stderr.txt") == 0
    assert (tmp_path / "stderr.txt").read_text().count("beware") == 2


def test_a_function_that_calls_the_module_is_measured_on_the_module_s_weights(tmp_path: Path) -> None:
    def probe(pl_module: Any, batch: Any) -> Probe:
        return Probe(lambda x: pl_module(x) + 0, *batch)

    results = []
    for options in ({"probe_fn": probe}, {}):
        torch.manual_seed(0)  # for dropout
        messages, rows = fit(classifier(), loader(), tmp_path, **options)
        assert messages == []
        results.append([{key: value for key, value in row.items() if key not in CLOCKS} for row in rows])
    assert "robust/hessian_trace_per_layer/network.0.weight" in results[0][0]
    assert results[0] == results[1]


def test_a_metric_that_fails_in_compute_is_survived(tmp_path: Path) -> None:
    class Broken(FisherSpectralNorm):
        broken = True

        def compute(self) -> dict[str, Tensor]:
            if self.broken:
                type(self).broken = False
                raise ArithmeticError("a bug")
            return super().compute()

    messages, rows = fit(classifier(), loader(), tmp_path, metrics=[Broken()])
    assert len(messages) == 1
    assert "ArithmeticError: a bug" in messages[0]
    assert rows[0] == {}
    assert rows[1]["robust/num_samples"] == 120


def test_an_interrupt_inside_a_measurement_passes_through(tmp_path: Path) -> None:
    def interrupted(pl_module: Any, batch: Any) -> Probe:
        raise KeyboardInterrupt

    monitor = RobustnessMonitor(probe_fn=interrupted)
    run = trainer(monitor, root=tmp_path)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run.fit(classifier(), loader(), loader())
    assert run.interrupted


def test_two_monitors_that_log_the_same_keys_are_refused(tmp_path: Path) -> None:
    """Lightning refuses them, because they would save their states under one key."""
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `RobustnessMonitor`"):
        trainer(RobustnessMonitor(), RobustnessMonitor(seed=1), root=tmp_path)


def test_a_barebones_trainer_warns_that_nothing_is_measured(tmp_path: Path) -> None:
    class Silent(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    with robustness_warnings() as messages:
        run = Trainer(barebones=True, accelerator="cpu", max_epochs=1, callbacks=[RobustnessMonitor()])
        run.fit(Silent(classifier().network), loader(), loader())
    assert messages == [
        "`Trainer(barebones=True)` logs nothing, so RobustnessMonitor measures nothing. Drop `barebones=True`."
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_samples": 0}, "`max_samples` to be an integer of at least 1, but got 0"),
        ({"max_samples": -3}, "`max_samples` .* but got -3"),
        ({"max_samples": 2.5}, "`max_samples` .* but got 2.5"),
        ({"every_n_epochs": 0}, "`every_n_epochs` .* but got 0"),
        ({"chunk_size": 0}, "`chunk_size` .* but got 0"),
        ({"dataloader_idx": -1}, "`dataloader_idx` .* but got -1"),
        ({"seed": -1}, "`seed` .* but got -1"),
        ({"input_std": 0.0}, "`input_std` to be a positive number, or a list of one per channel, but got 0.0"),
        ({"input_std": [0.1, -1]}, "`input_std` to be a positive number"),
        ({"input_std": []}, r"`input_std` .* but got \[\]"),
        ({"input_std": "0.2"}, "`input_std` .* but got '0.2'"),
        ({"input_mean": float("nan")}, "`input_mean` to be a finite number"),
        ({"log_key_prefix": ""}, "`log_key_prefix` to be a non-empty string"),
        ({"on_error": "ignore"}, r"`on_error` to be one of \('warn', 'raise'\), but got 'ignore'"),
        ({"valid_range": [1, 0]}, r"`valid_range` to be \(low, high\) with low < high, but got \[1, 0\]"),
        ({"valid_range": [0, 1], "input_std": 0.2}, "`input_mean` beside `input_std` and `valid_range`, .* got None"),
        ({"probe_fn": 3}, "`probe_fn` to be a function or a module, but got int"),
        ({"loss_fn": 3}, "`loss_fn` to be a function or a module, but got int"),
        ({"loss_fn": nn.MSELoss}, "`loss_fn` to be a function or a module, but got the class MSELoss"),
        ({"metrics": []}, "`metrics` to be a non-empty list"),
        ({"metrics": "fisher"}, "names among .*, but got 'fisher'"),
        (
            {"metrics": ["fisher"]},
            r"names among \['adversarial_accuracy', 'fisher_rao_margin', 'fisher_spectral_norm', 'hessian_trace',",
        ),
        ({"metrics": [3]}, "but got 3"),
        ({"metrics": FisherSpectralNorm}, "`metrics` to be a non-empty list of metrics"),
        ({"metrics": [FisherSpectralNorm]}, "metrics of lightning_robust.metrics"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MisconfigurationException, match=sentence):
        RobustnessMonitor(**options)


class Own(ProbeMetric):
    """A metric that a user writes, with values under the given keys."""

    def __init__(self, *keys: str) -> None:
        super().__init__()
        self.add_float64_state("count")
        self.keys = keys

    def _add(self, probe: Probe) -> None:
        self.count = self.count + len(probe)

    def compute(self) -> dict[str, Tensor]:
        return dict.fromkeys(self.keys, self.count)


class FolderLogger(DummyLogger):
    """Writes each value to a file in folders that the key names, as file stores do."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            path = self.root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(value))


def test_every_default_key_fits_a_logger_that_makes_folders(tmp_path: Path) -> None:
    messages, rows = fit(classifier(), loader(), tmp_path, logger=FolderLogger(tmp_path / "log"))
    assert messages == []
    assert all((tmp_path / "log" / key).is_file() for key in rows[-1])


@pytest.mark.parametrize(
    ("metrics", "refused"),
    [
        ([Own("mine", "mine/a"), Own("other")], "'mine' and 'mine/a'.*to 'mine_of/a'"),
        ([Own("other"), Own("other/a")], "'other' and 'other/a'"),
        ([Own("other"), Own("seconds/a")], "'seconds' and 'seconds/a'"),
        ([Own("other"), Own("a/b/c", "a")], "'a' and 'a/b/c'"),
        ([Own("other"), Own("num_samples")], r"two log \['num_samples'\]"),
    ],
    ids=["of itself", "of another", "of the monitor", "further up", "twice"],
)
def test_a_metric_with_a_key_that_is_a_folder_is_left_out(
    tmp_path: Path, metrics: list[ProbeMetric], refused: str
) -> None:
    messages, rows = fit(classifier(), loader(), tmp_path, metrics=metrics, logger=FolderLogger(tmp_path / "log"))
    assert all(
        {key for key in row if not key.endswith(("seconds", "overhead", "samples"))} == {"robust/other"} for row in rows
    )
    assert re.search(f"skipped in epoch 0 Own: ValueError: .*{refused}", messages[0])


@pytest.mark.parametrize(
    ("logged", "prefix", "pair"),
    [
        ("robust", "robust/", ("robust", "robust/")),
        ("robust/mine/a", "robust/", ("robust/mine", "robust/mine/a")),
        ("robust_mine", "robust/", None),
        ("robust/loss", "robust/", None),
    ],
)
def test_a_key_of_the_module_that_is_a_folder_of_the_monitor_is_told(
    tmp_path: Path, logged: str, prefix: str, pair: tuple[str, str] | None
) -> None:
    class Logs(Quiet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log(logged, 1.0, batch_size=1)

    messages, _ = fit(Logs(), loader(), tmp_path, metrics=[Own("mine")], log_key_prefix=prefix)
    assert len(messages) == (0 if pair is None else 1)
    if pair is not None:
        assert messages[0].startswith(f"Both `{pair[0]}` and `{pair[1]}")
        assert "RobustnessMonitor(log_key_prefix=" in messages[0]


def test_characters_that_loggers_rename_are_told_once(tmp_path: Path) -> None:
    messages, rows = fit(Quiet(), loader(), tmp_path, metrics=[Own("accuracy (mean)", "größe")])
    assert all({"robust/accuracy (mean)", "robust/größe"} <= row.keys() for row in rows)
    assert len(messages) == 1
    assert messages[0].startswith("`robust/accuracy (mean)` holds characters that some loggers rename")


@pytest.mark.parametrize("in_probe", [False, True], ids=["loss of the monitor", "loss of the probe"])
def test_the_loss_of_the_monitor_says_what_the_targets_of_a_probe_may_be(tmp_path: Path, in_probe: bool) -> None:
    x, y = samples().tensors
    wanted, loss = nn.functional.one_hot(y).float(), {"loss_fn": nn.MSELoss()}
    in_monitor, in_probe_fn = ({}, loss) if in_probe else (loss, {})

    def probe_fn(module: Any, batch: Any) -> Probe:
        return Probe(module, batch[0], batch[2], **in_probe_fn)

    def measured(data: DataLoader, **options: Any) -> float:
        run = trainer(RobustnessMonitor("hessian_trace", max_samples=120, on_error="raise", **options), root=tmp_path)
        run.validate(Quiet(classifier().network), data, verbose=False)
        return float(run.callback_metrics["robust/hessian_trace"])

    found = measured(loader(TensorDataset(x, y, wanted)), probe_fn=probe_fn, **in_monitor)
    assert found == measured(loader(TensorDataset(x, wanted)), **loss)


def test_a_probe_may_leave_the_mean_of_its_range_to_the_monitor(tmp_path: Path) -> None:
    def probe_fn(module: Any, batch: Any) -> Probe:
        return Probe(module, *batch, input_std=0.5, valid_range=(0, 1))

    messages, rows = fit(Quiet(), loader(), tmp_path, metrics="linearized_accuracy", probe_fn=probe_fn, input_mean=0.0)
    assert messages == []
    assert all(row["robust/num_samples"] == 120 for row in rows)


@pytest.mark.parametrize("targets", [Tensor.float, nn.functional.one_hot], ids=["floats", "one-hot"])
def test_without_a_loss_wrong_targets_of_a_probe_are_told_at_once(tmp_path: Path, targets: Any) -> None:
    messages, _ = fit(
        Quiet(), loader(), tmp_path, probe_fn=lambda module, batch: Probe(module, batch[0], targets(batch[1]))
    )
    assert "`targets` to hold one class index per sample" in messages[0]
    with pytest.raises(ValueError, match="one class index per sample"):  # the monitor's loss is not assumed afterwards
        Probe(classifier(), torch.ones(2, 1, 4, 4), torch.ones(2, 4))


class FillsIn(Quiet):
    """Replaces missing values by learnt ones, and tells the network which these are."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES)))
        self.fill = nn.Parameter(torch.rand(1, 1, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        missing = x.isnan()
        return self.network(torch.cat([torch.where(missing, self.fill, x), missing.to(x)], dim=1))


def test_a_network_that_fills_in_missing_values_is_measured_with_the_line_to_paste_and_its_curvature_without(
    tmp_path: Path,
) -> None:
    x, y = samples().tensors
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.2] = torch.nan
    model = FillsIn()

    def validated(**options: Any) -> tuple[list[str], dict[str, float]]:
        with robustness_warnings() as messages:
            run = trainer(RobustnessMonitor(max_samples=120, **options), root=tmp_path)
            run.validate(model, loader(TensorDataset(x, y), 50), verbose=False)
        return messages, {key: float(value) for key, value in run.callback_metrics.items()}

    trace = float(hessian_trace(model, x, y, num_probes=2, rtol=None).total)
    messages, values = validated(metrics=["hessian_trace"])
    assert messages == []
    assert values["robust/hessian_trace"] == pytest.approx(trace, rel=1e-4)

    messages, values = validated()
    assert len(messages) == 1
    assert values["robust/hessian_trace"] == pytest.approx(trace, rel=1e-4)
    assert "robust/fim_spectral_norm" not in values
    found = re.search(r"skipped in epoch 0 Fisher.* Where NaN stands .*`probe_fn=(.*)`. Curvature alone", messages[0])
    assert found is not None

    messages, values = validated(probe_fn=eval(found[1], {"Probe": Probe}))
    assert messages == []
    filled = torch.where(x.isnan(), model.fill.detach(), x)
    known = (~x.isnan()).float()

    def on_known(x: Tensor, known: Tensor) -> Tensor:
        return model.network(torch.cat([known * x + (1 - known) * model.fill, 1 - known], dim=1))

    expected = FisherSpectralNorm()
    expected.update(Probe(on_known, filled, y, extras={"known": known}))
    assert values["robust/fim_spectral_norm"] == pytest.approx(float(expected.compute()["fim_spectral_norm"]), rel=1e-4)
    assert values["robust/hessian_trace"] == pytest.approx(trace, rel=0.2)  # by other signs, of other inputs
