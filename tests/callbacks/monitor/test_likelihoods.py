"""The monitor on networks whose outputs are labels or numbers: one line, all default metrics, no false alarm."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_robust import AdversarialAccuracy, LinearizedAccuracy, Probe, RobustnessMonitor
from tests.helpers.training import robustness_warnings, trainer

N, D, C = 64, 6, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "bernoulli": {"likelihood": "bernoulli"},
    "gaussian": {"likelihood": "gaussian", "tolerance": 0.2},
}
LOSSES = {"bernoulli": nn.BCEWithLogitsLoss, "gaussian": nn.MSELoss}
METRICS = ["fisher_spectral_norm", LinearizedAccuracy([0.1, 0.6]), "hessian_trace", "weight_curvature_index"]
every_likelihood = pytest.mark.parametrize("likelihood", OPTIONS)


class Network(LightningModule):
    """Logs accuracies as users do: per label, or within a tolerance of its own."""

    def __init__(self, likelihood: str, width: int = C, *, last: nn.Module | None = None, flat: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, width), *([last] if last else []))
        self.criterion, self.flat = LOSSES[likelihood](), flat

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.body(x)
        return outputs.squeeze(1) if self.flat else outputs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self(batch[0])
        return self.criterion(outputs.reshape(batch[1].shape), batch[1].float())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))
        self.log("val_acc", 0.97)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def pairs(likelihood: str, width: int = C) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator)
    y = x @ torch.randn(D, width, generator=generator) + 0.3 * torch.randn(N, width, generator=generator)
    return x, (y > 0.3).float() if likelihood == "bernoulli" else y


def run(
    module: LightningModule, x: Tensor, y: Tensor, root: Path, **options: Any
) -> tuple[dict[str, float], list[str]]:
    """Logged values, and the warnings, of a short training."""
    fitting = trainer(RobustnessMonitor(**options), root=root, max_epochs=1)
    loader = DataLoader(list(zip(x, y, strict=True)), 16)
    with robustness_warnings() as sentences:
        fitting.fit(module, loader, loader)
    return {key: float(value) for key, value in fitting.callback_metrics.items()}, sentences


@every_likelihood
@pytest.mark.parametrize("width", [C, 1])
def test_one_line_measures_all_default_metrics_without_a_false_alarm(
    likelihood: str, width: int, tmp_path: Path
) -> None:
    x, y = pairs(likelihood, width)
    y = y[:, 0] if width == 1 else y
    values, sentences = run(Network(likelihood, width), x, y, tmp_path, metrics=METRICS, **OPTIONS[likelihood])
    assert sentences == []
    for key in ("fim_spectral_norm", "fim_spectral_norm_calibrated", "temperature", "hessian_trace", "wci"):
        assert values[f"robust/{key}"] > 0
    assert ("robust/saturated" in values) is (likelihood == "bernoulli")
    shares = [values[f"robust/linearized_accuracy_linf_{epsilon}"] for epsilon in ("0", "0.1", "0.6")]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]
    assert shares[0] == 1 or likelihood == "bernoulli"
    assert values["robust/num_samples"] == N


@every_likelihood
def test_outputs_and_targets_of_a_single_number_have_any_shape_and_type(likelihood: str, tmp_path: Path) -> None:
    x, y = pairs(likelihood, 1)
    options = {"metrics": METRICS, **OPTIONS[likelihood]}
    expected, _ = run(Network(likelihood, 1), x, y, tmp_path, **options)
    whole = y.long() if likelihood == "bernoulli" else y.double()
    for targets, flat in ((whole, True), (whole[:, 0], False), (y[:, 0], True)):
        values, sentences = run(Network(likelihood, 1, flat=flat), x, targets, tmp_path, **options)
        assert sentences == []
        for key, value in values.items():
            if key not in ("robust/seconds", "robust/overhead"):
                assert value == pytest.approx(expected[key], rel=1e-4), key


@every_likelihood
def test_a_probe_that_says_nothing_gets_the_likelihood_of_the_monitor(likelihood: str, tmp_path: Path) -> None:
    x, y = pairs(likelihood)
    options = {"metrics": METRICS, **OPTIONS[likelihood]}
    expected, _ = run(Network(likelihood), x, y, tmp_path, **options)
    values, sentences = run(
        Network(likelihood), x, y, tmp_path, probe_fn=lambda module, batch: Probe(module, batch[0], batch[1]), **options
    )
    assert sentences == []
    assert values["robust/fim_trace"] == expected["robust/fim_trace"]
    own = {name: option for name, option in OPTIONS["bernoulli"].items() if likelihood == "bernoulli"}
    own = own or OPTIONS["gaussian"]
    values, _ = run(
        Network(likelihood),
        x,
        y,
        tmp_path,
        metrics=METRICS,
        likelihood="gaussian",
        tolerance=9.0,
        probe_fn=lambda module, batch: Probe(module, batch[0], batch[1], **own),
    )
    assert values["robust/linearized_margin_linf"] == expected["robust/linearized_margin_linf"]


def test_numbers_without_a_tolerance_lose_their_margins_alone(tmp_path: Path) -> None:
    values, sentences = run(Network("gaussian"), *pairs("gaussian"), tmp_path, likelihood="gaussian")
    assert "robust/fim_spectral_norm" in values
    assert "robust/hessian_trace" in values
    assert not any(key.startswith("robust/linearized") for key in values)
    assert "LinearizedAccuracy" in sentences[0]
    assert "RobustnessMonitor(likelihood='gaussian', tolerance=0." in sentences[0]


@pytest.mark.parametrize(
    ("likelihood", "targets", "options", "told"),
    [
        ("bernoulli", lambda y: y, {}, '`RobustnessMonitor(likelihood="bernoulli")`'),
        ("bernoulli", lambda y: y.long(), {}, '`RobustnessMonitor(likelihood="bernoulli")`'),
        ("gaussian", lambda y: y, {}, '`RobustnessMonitor(likelihood="gaussian", tolerance=…)`'),
        ("gaussian", lambda y: y[:, 0], {}, '`RobustnessMonitor(likelihood="gaussian", tolerance=…)`'),
        ("gaussian", lambda y: y[:, :1], {}, '`RobustnessMonitor(likelihood="gaussian", tolerance=…)`'),
        ("gaussian", lambda y: y, {"likelihood": "bernoulli"}, "numbers with 'gaussian'"),
        ("gaussian", lambda y: y.argmax(dim=1), OPTIONS["bernoulli"], "go with likelihood 'categorical'"),
        ("gaussian", lambda y: y.argmax(dim=1), OPTIONS["gaussian"], "go with likelihood 'categorical'"),
        ("gaussian", lambda y: y[:, :1], OPTIONS["gaussian"], "Probe(lambda x: module(x)[:, 0], batch[0], batch[1]"),
    ],
)
def test_a_likelihood_that_the_targets_contradict_is_told_with_the_remedy(
    likelihood: str, targets: Any, options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    x, y = pairs(likelihood)
    module = Network(likelihood)
    module.training_step = lambda batch, batch_idx: module(batch[0]).square().mean()  # type: ignore[method-assign]
    metrics = ["fisher_spectral_norm", "linearized_accuracy"]
    _, sentences = run(module, x, targets(y), tmp_path, metrics=metrics, **options)
    assert told in sentences[0]


def test_the_remedy_for_a_prediction_with_a_variance_works_as_pasted(tmp_path: Path) -> None:
    x, y = pairs("gaussian")
    module = Network("gaussian")
    module.training_step = lambda batch, batch_idx: module(batch[0]).square().mean()  # type: ignore[method-assign]
    values, sentences = run(
        module,
        x,
        y[:, 0],
        tmp_path,
        metrics=METRICS,
        probe_fn=lambda module, batch: Probe(lambda x: module(x)[:, 0], batch[0], batch[1], module=module),
        **OPTIONS["gaussian"],
    )
    assert sentences == []
    assert values["robust/fim_spectral_norm"] > 0


def test_probabilities_in_place_of_logits_of_labels_are_told_and_bounded_numbers_are_not(tmp_path: Path) -> None:
    x, y = pairs("bernoulli")
    for last in (nn.Sigmoid(), nn.Sequential(nn.Sigmoid(), nn.Unflatten(1, (1, C)), nn.Flatten())):
        module = Network("bernoulli", last=last)
        _, sentences = run(module, x, y, tmp_path, metrics=METRICS, **OPTIONS["bernoulli"])
        assert "returns probabilities (its last operation is a sigmoid" in sentences[0]
    for likelihood, harmless in (("bernoulli", nn.ReLU()), ("gaussian", nn.Sigmoid()), ("gaussian", nn.Softmax(1))):
        module = Network(likelihood, last=harmless)
        options = {"likelihood": likelihood, **({"tolerance": 0.1} if likelihood == "gaussian" else {})}
        _, sentences = run(module, x, y, tmp_path, metrics=["fisher_spectral_norm", "hessian_trace"], **options)
        assert sentences == []


@every_likelihood
def test_attacks_are_refused_and_all_else_is_measured(likelihood: str, tmp_path: Path) -> None:
    metrics = ["fisher_spectral_norm", AdversarialAccuracy()]
    values, sentences = run(Network(likelihood), *pairs(likelihood), tmp_path, metrics=metrics, **OPTIONS[likelihood])
    assert values["robust/fim_spectral_norm"] > 0
    assert "AdversarialAccuracy: ValueError: Expected likelihood 'categorical'" in sentences[0]


def test_integers_to_predict_are_not_taken_for_classes_of_a_head_that_is_left_out(tmp_path: Path) -> None:
    """The step also calls an auxiliary head with as many outputs as there would be classes."""
    x, y = pairs("gaussian", 1)
    ages = (y[:, 0] * 5).round().clamp_min(0).long()
    module = Network("gaussian", 1)
    module.auxiliary = nn.Linear(D, int(ages.max()) + 1)
    step = module.validation_step

    def with_a_head(batch: Any, batch_idx: int) -> None:
        step(batch, batch_idx)
        module.auxiliary(batch[0])

    module.validation_step = with_a_head  # type: ignore[method-assign]
    values, sentences = run(
        module,
        x,
        ages,
        tmp_path,
        metrics=["fisher_spectral_norm", "linearized_accuracy"],
        likelihood="gaussian",
        tolerance=0.01,
    )
    assert sentences == []
    assert values["robust/fim_spectral_norm"] > 0


@pytest.mark.parametrize(
    "options", [{"likelihood": "poisson"}, {"tolerance": 1.0}, {"likelihood": "gaussian", "tolerance": -1.0}]
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=r"`(likelihood|tolerance)`"):
        RobustnessMonitor(**options)
