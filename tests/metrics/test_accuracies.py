from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_robust import AdversarialAccuracy, LinearizedAccuracy, Probe
from lightning_robust.functional import linearized_margin, linearized_margin_linf
from tests.helpers.networks import Linear, build


def test_linearized_accuracy_counts_margins_above_epsilon() -> None:
    model, inputs, targets = build("resnet", num_samples=25)
    probe = Probe(model, inputs, targets)
    linearization = probe.linearized
    margins = {
        "linf": linearized_margin_linf(linearization.logits, linearization.gap_l1, targets),
        "l2": linearized_margin(linearization.logits, linearization.gram, targets),
    }
    for norm, values in margins.items():
        epsilons = [float(values.quantile(0.6)), float(values.max()) * 1.01]
        metric = LinearizedAccuracy(epsilons, norm)
        metric.update(probe)
        computed = metric.compute()
        for epsilon in (0.0, *epsilons):
            count = float((values > epsilon).sum())
            key = f"linearized_accuracy_{norm}_{epsilon:.4g}"
            assert float(computed[key]) == pytest.approx(count / 25)
            variance = (count + 2) * (25 - count + 2) / 29**3
            assert float(computed[f"{key}_stderr"]) == pytest.approx(variance**0.5)
        assert float(computed[f"linearized_accuracy_{norm}_{epsilons[-1]:.4g}_upper"]) > 0  # of a share of 0
        clean = (linearization.logits.argmax(dim=1) == targets).double().mean()
        assert float(computed[f"linearized_accuracy_{norm}_0"]) == float(clean)
        clipped = values.clamp_max(2 * epsilons[-1])
        assert float(computed[f"linearized_margin_{norm}"]) == pytest.approx(float(values.mean()))
        assert float(computed[f"linearized_margin_{norm}_clipped"]) == pytest.approx(float(clipped.mean()))
        assert float(computed[f"linearized_margin_{norm}_stderr"]) == pytest.approx(float(values.std() / 5))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_prediction_and_attack_agree_exactly_on_a_linear_network(norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 8, generator=generator)
    inputs = torch.randn(300, 8, generator=generator)
    model = nn.Linear(8, 2)
    model.weight.data, model.bias.data = weight, torch.zeros(2)
    probe = Probe(model, inputs, (inputs @ weight.T).argmax(dim=1))
    epsilons = [0.05, 0.2, 0.5]
    predicted, attacked = LinearizedAccuracy(epsilons, norm), AdversarialAccuracy(epsilons, norm, steps=20)
    for metric in (predicted, attacked):
        metric.update(probe)
    for epsilon in epsilons:
        value = float(predicted.compute()[f"linearized_accuracy_{norm}_{epsilon}"])
        assert 0.05 < value < 0.99
        assert value == pytest.approx(float(attacked.compute()[f"adversarial_accuracy_{norm}_{epsilon}"]), abs=1e-6)


def test_the_attack_is_the_same_at_every_measurement() -> None:
    values = []
    for _ in range(2):
        metric = AdversarialAccuracy([0.1], steps=4)
        metric.update(Probe(*build("cnn_batchnorm", num_samples=30)))
        values.append(metric.compute())
    assert values[0] == values[1]


# --- ε that do not fit the margins ------------------------------------------------------------------------------------


def linear_probe(*shape: int, scale: float, **options: float) -> Probe:
    """Margins of a linear network are proportional to the scale of its inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(60, *shape, generator=generator) * 2 - 1
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs[0].numel(), 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(model[1].weight.shape, generator=generator))
        model[1].bias.zero_()
        targets = model(inputs).argmax(dim=1)
    targets[::6] = 1 - targets[::6]
    return Probe(model, inputs * scale, targets, **options)  # type: ignore[arg-type]


def caveats_of(metric: LinearizedAccuracy, probe: Probe) -> dict[str, str]:
    metric.update(probe)
    values = {key: float(value) for key, value in metric.compute().items()}
    metric.reset()
    return metric.caveats(values)


@pytest.mark.parametrize(
    ("scale", "key", "sentence"),
    [
        (1e-3, "linearized_accuracy_linf_0.003922", "is nearly 0, and so is the accuracy at every larger ε"),
        (100.0, "linearized_accuracy_linf_0.03137", "is hardly less than the accuracy at ε = 0"),
    ],
)
def test_margins_far_from_every_epsilon_have_a_caveat_with_a_remedy_to_paste(
    scale: float, key: str, sentence: str
) -> None:
    probe = linear_probe(10, scale=scale)
    ((name, caveat),) = caveats_of(LinearizedAccuracy(), probe).items()
    assert name == key
    assert caveat.startswith(sentence)
    remedy = caveat.split("`")[1]
    metric = eval(remedy, {"LinearizedAccuracy": LinearizedAccuracy})
    assert caveats_of(metric, probe) == {}
    metric.update(probe)
    values = [float(metric.compute()[f"linearized_accuracy_linf_{epsilon:.4g}"]) for epsilon in metric.epsilons]
    assert values[0] - values[-1] > 0.3  # of a clean accuracy of 0.83


@pytest.mark.parametrize(("norm", "order"), [("l2", 1), ("linf", 2), ("l2", 2)])
def test_the_remedy_keeps_the_other_options(norm: str, order: int) -> None:
    metric = LinearizedAccuracy([10.0, 20.0], norm, order)  # type: ignore[arg-type]
    (caveat,) = caveats_of(metric, linear_probe(10, scale=1.0)).values()
    remedy = eval(caveat.split("`")[1], {"LinearizedAccuracy": LinearizedAccuracy})
    assert (remedy.norm, remedy.order) == (norm, order)


@pytest.mark.parametrize(
    "probe",
    [
        linear_probe(10, scale=1.0),
        linear_probe(10, scale=0.1),
        linear_probe(2, scale=0.3),
        linear_probe(1, 4, 4, scale=0.5),
        linear_probe(3, 8, 8, scale=1e-2, input_std=1.0),
        linear_probe(3, 8, 8, scale=100.0),  # whose units are in doubt, as another sentence says
        linear_probe(10, scale=0.0),
        linear_probe(10, scale=1e-3).rows(slice(9)),
        Probe(lambda x: torch.eye(2)[0].expand(len(x), 2), torch.rand(40, 4), torch.zeros(40, dtype=torch.long)),
    ],
    ids=["table", "small table", "two features", "images", "fragile", "unknown units", "zero", "few", "constant"],
)
def test_other_margins_have_no_caveat(probe: Probe) -> None:
    assert caveats_of(LinearizedAccuracy(), probe) == {}
    assert LinearizedAccuracy().caveats({}) == {}


@pytest.mark.parametrize("cls", [LinearizedAccuracy, AdversarialAccuracy])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epsilons": [-0.1]}, r"`epsilons` to be a list of at least one finite number ≥ 0, but got \[-0.1\]"),
        ({"epsilons": []}, r"`epsilons` .* but got \[\]"),
        ({"epsilons": [float("nan")]}, r"`epsilons` .* but got \[nan\]"),
        ({"epsilons": 0.1}, r"`epsilons` to be a list of at least one finite number ≥ 0, but got 0.1"),
        ({"epsilons": [8 / 255, 0.03137]}, "`epsilons` to differ in their first four digits"),
        ({"norm": "l1"}, r"`norm` to be one of \('linf', 'l2'\), but got 'l1'"),
    ],
)
def test_bad_arguments_are_named(cls: type, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        cls(**options)


def test_an_attack_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="`steps` to be a positive integer, but got 0"):
        AdversarialAccuracy(steps=0)


def of_rank(rank: int) -> Probe:
    """A linear network of nearly equal gaps, in which a class of this rank by probability has the nearest boundary."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 16, generator=generator, dtype=torch.float64)
    x = torch.ones(1, 16, dtype=torch.float64)
    weight[rank] *= 3
    logits = -1 - 1e-3 * torch.arange(100.0, dtype=torch.float64)
    logits[0] = 0.0
    return Probe(Linear(weight, logits - weight @ x[0]), x, torch.tensor([0]))


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(("rank", "num_targets", "is_found"), [(5, 10, True), (25, 10, False), (25, None, True)])
def test_more_classes_are_looked_at_where_ten_leave_doubt(
    norm: Any, rank: int, num_targets: int | None, is_found: bool
) -> None:
    probe = of_rank(rank)
    exact, found = LinearizedAccuracy([0.1], norm), LinearizedAccuracy([0.1], norm, num_targets=num_targets)
    exact.update(replace(probe, linearization="exact"))
    found.update(probe)
    expected, margin = (float(torch.cat(metric.margins)) for metric in (exact, found))
    assert (margin == pytest.approx(expected)) is is_found
    assert margin >= expected * (1 - 1e-9)


def test_doubt_that_is_left_is_said() -> None:
    metric = LinearizedAccuracy([0.1], "l2", num_targets=3)
    metric.update(of_rank(50))
    (sentence,) = metric.caveats({"num_samples": 1.0}).values()
    assert "for 1 samples a class beyond the 3 most probable ones may be nearer" in sentence
    assert "`LinearizedAccuracy(num_targets=12)`" in sentence
    metric.reset()
    spread = Linear(torch.eye(40, dtype=torch.float64), -torch.arange(40.0, dtype=torch.float64))
    metric.update(Probe(spread, torch.zeros(1, 40, dtype=torch.float64), torch.tensor([0])))
    assert metric.caveats({"num_samples": 1.0}) == {}
