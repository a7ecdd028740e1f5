"""A network that masks classes is measured as the network without them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust import (
    AdversarialAccuracy,
    FisherRaoMargin,
    FisherSpectralNorm,
    HessianTrace,
    LinearizedAccuracy,
    Probe,
    ProbeMetric,
    WeightCurvatureIndex,
)
from lightning_robust.functional import (
    calibrated_fim_spectral_norm,
    fim_spectral_norm,
    fit_temperature,
    hessian_trace,
    linearize,
    linearized_margin,
    linearized_margin_linf,
    pgd,
    relinearize,
    saturated,
    trace_fisher_rao_paths,
)
from tests.helpers.networks import random

NUM_CLASSES, NUM_MASKED = 4, 3
FILLS = [-1e4, -1e9, -math.inf]
INPUTS = random(0, 40, 6, dtype=torch.float32)
every_fill = pytest.mark.parametrize("fill", FILLS, ids=str)


class Body(nn.Module):
    """A network with more classes than it may use."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(6, 16), activation, nn.Linear(16, NUM_CLASSES + NUM_MASKED))
        with torch.no_grad():
            self.layers[2].weight.mul_(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Masking(nn.Module):
    """The network without its last classes (None), or with masks over them."""

    def __init__(self, body: nn.Module, mask: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.body, self.mask = body, mask

    def forward(self, x: Tensor) -> Tensor:
        logits = self.body(x)
        return logits[:, :NUM_CLASSES] if self.mask is None else self.mask(logits)


def filled(fill: float) -> Callable[[Tensor], Tensor]:
    return lambda z: z.masked_fill(torch.arange(NUM_CLASSES + NUM_MASKED) >= NUM_CLASSES, fill)


def appended(fill: float) -> Callable[[Tensor], Tensor]:
    return lambda z: F.pad(z[:, :NUM_CLASSES], (0, NUM_MASKED), value=fill)


def added(fill: float) -> Callable[[Tensor], Tensor]:
    shift = torch.zeros(NUM_CLASSES + NUM_MASKED)
    shift[NUM_CLASSES:] = fill
    return lambda z: z + shift


def targets_of(body: nn.Module, *, correct: float) -> Tensor:
    predicted = body(INPUTS)[:, :NUM_CLASSES].argmax(dim=1)
    wrong = torch.arange(len(INPUTS)) >= correct * len(INPUTS)
    return torch.where(wrong, (predicted + 1) % NUM_CLASSES, predicted)


METRICS: dict[str, Callable[[], ProbeMetric]] = {
    "fisher": FisherSpectralNorm,
    "linf": lambda: LinearizedAccuracy([0.01, 0.1, 0.3]),
    "linf, order 2": lambda: LinearizedAccuracy([0.01, 0.1, 0.3], order=2),
    "l2, order 2": lambda: LinearizedAccuracy([0.1, 0.5], norm="l2", order=2),
    "attack": lambda: AdversarialAccuracy([0.1, 0.3], steps=5),
    "paths": lambda: FisherRaoMargin(max_steps=30),
    "paths to all": lambda: FisherRaoMargin(num_targets=NUM_CLASSES, max_steps=30),
    "paths by products": lambda: FisherRaoMargin(num_targets=2, max_steps=30, solver="cg"),
    "trace": HessianTrace,
    "trace, three probes": lambda: HessianTrace(num_probes=3),
    "products": lambda: HessianTrace(estimator="hutchinson"),
    "index": lambda: WeightCurvatureIndex(attack="pgd", epsilon=0.1),
}


@pytest.mark.parametrize(
    ("mask", "fill", "activation"),
    [
        (filled, -math.inf, nn.ReLU()),
        (filled, -1e4, nn.Tanh()),
        (appended, -1e4, nn.ReLU()),
        (added, -1e9, nn.ReLU()),
        (added, -math.inf, nn.Tanh()),
    ],
    ids=["filled", "filled, finite", "appended", "added, finite", "added"],
)
@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_that_of_the_network_without_masked_classes(
    name: str, mask: Callable[[float], Callable[[Tensor], Tensor]], fill: float, activation: nn.Module
) -> None:
    body = Body(activation)
    few = slice(36 if "paths" in name else 0, None)
    targets, values = targets_of(body, correct=0.95), []
    for model in (Masking(body, None), Masking(body, mask(fill))):
        metric = METRICS[name]()
        metric.update(Probe(model, INPUTS[few], targets[few], valid_range=(-4, 4)))
        values.append({key: float(value) for key, value in metric.compute().items()})
    assert values[1] == pytest.approx(values[0], rel=1e-5, abs=1e-7)


@every_fill
@pytest.mark.parametrize("correct", [1.0, 0.98, 0.7])
def test_the_temperature_does_not_know_the_masks(fill: float, correct: float) -> None:
    """With few errors or none the fit rests on a smoothing over all classes."""
    body = Body(nn.ReLU())
    targets = targets_of(body, correct=correct)
    expected = fit_temperature(Masking(body, None)(INPUTS).detach(), targets)
    torch.testing.assert_close(fit_temperature(Masking(body, filled(fill))(INPUTS).detach(), targets), expected)


MODERATE = [-50.0, math.log(1e-45), -500.0, -700.0]  # too close to the logits to be told from them


def masks_of(kind: str, num_samples: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """Masked classes (N, C), bool: two or more are left, but in each tenth sample of the last kind, which has one."""
    if kind == "same":
        return (torch.arange(num_classes) >= max(2, num_classes // 3)).expand(num_samples, -1)
    left = torch.randint(2, num_classes + 1, (num_samples, 1), generator=generator)
    if kind == "own, or a single one":
        left[::10] = 1
    return torch.rand(num_samples, num_classes, generator=generator).argsort(dim=1).argsort(dim=1) >= left


@pytest.mark.parametrize("kind", ["same", "own", "own, or a single one"])
@pytest.mark.parametrize(("num_samples", "num_classes"), [(20, 3), (1000, 3), (40, 10), (20, 1000)])
@pytest.mark.parametrize("correct", [1.0, 0.8])
def test_no_class_of_vanishing_probability_moves_the_calibration(
    kind: str, num_samples: int, num_classes: int, correct: float
) -> None:
    """Whatever the masks are: the likelihood does not care, and the smoothing of few errors must not."""
    generator = torch.Generator().manual_seed(num_samples)
    logits = 1.5 * torch.randn(num_samples, num_classes, generator=generator, dtype=torch.float64)
    masked = masks_of(kind, num_samples, num_classes, generator)
    first, second = logits.masked_fill(masked, -math.inf).topk(2, dim=1).indices.T
    wrong = (torch.arange(num_samples) >= correct * num_samples) & ~masked.gather(1, second[:, None])[:, 0]
    targets = torch.where(wrong, second, first)
    logits.scatter_add_(1, first[:, None], torch.full((num_samples, 1), 2.0, dtype=torch.float64))
    jacobian = torch.randn(num_samples, num_classes, 4, generator=generator, dtype=torch.float64)
    gram = (jacobian @ jacobian.mT) * (~masked[:, None] & ~masked[:, :, None])

    left = logits.masked_fill(masked, -math.inf)
    expected = fit_temperature(left, targets)
    rtol = 0.05 if "single" in kind else 1e-3  # a single class has a large margin; a median feels that they are many
    for given in (*(logits.masked_fill(masked, fill) for fill in MODERATE), logits + MODERATE[1] * masked):
        torch.testing.assert_close(fit_temperature(given, targets), expected, rtol=rtol, atol=0)
    if num_classes == 10:
        whole = calibrated_fim_spectral_norm(left, gram, targets)
        actual = calibrated_fim_spectral_norm(logits.masked_fill(masked, MODERATE[1]), gram, targets)
        torch.testing.assert_close(actual.mean, whole.mean, rtol=2 * rtol, atol=0)
        torch.testing.assert_close(actual.stderr, whole.stderr, rtol=2 * rtol, atol=0)


@pytest.mark.parametrize("fill", MODERATE, ids=str)
def test_the_fisher_norms_of_a_network_do_not_know_moderate_masks(fill: float) -> None:
    body = Body(nn.Tanh())
    values = []
    for model in (Masking(body, None), Masking(body, filled(fill)), Masking(body, added(fill))):
        metric = FisherSpectralNorm()
        metric.update(Probe(model, INPUTS, targets_of(body, correct=0.8)))
        values.append({key: float(value) for key, value in metric.compute().items()})
    for masked in values[1:]:
        assert masked == pytest.approx(values[0], rel=2e-3)


@pytest.mark.parametrize("fill", [-500.0, -1e4, -math.inf], ids=str)
def test_a_sample_with_masks_has_not_diverged(fill: float) -> None:
    """Among samples without any, by its largest logit it is a thousand times larger than they are."""
    logits = 0.3 * random(5, 60, 10)
    targets = logits.argmax(dim=1)
    targets[:6] = logits[:6].topk(3).indices[:, 2]
    rest = torch.arange(60) > 0
    masked = torch.zeros(60, 10, dtype=torch.bool)
    masked[0] = logits[0] < logits[0, targets[0]]
    expected = fit_temperature(logits.masked_fill(masked, -math.inf), targets)
    assert abs(expected / fit_temperature(logits[rest], targets[rest]) - 1) > 0.01
    torch.testing.assert_close(fit_temperature(logits.masked_fill(masked, fill), targets), expected)


@every_fill
@pytest.mark.parametrize("loss", ["cross_entropy", "dlr"])
def test_attacks_do_not_know_the_masks(fill: float, loss: str) -> None:
    body = Body(nn.Tanh())
    targets = targets_of(body, correct=0.9)
    attacked = [
        pgd(model, INPUTS, targets, epsilon=0.3, steps=5, norm="l2", loss=loss)  # type: ignore[arg-type]
        for model in (Masking(body, None), Masking(body, filled(fill)))
    ]
    torch.testing.assert_close(attacked[1], attacked[0])


@every_fill
def test_masks_may_differ_from_sample_to_sample(fill: float) -> None:
    """Each sample is then measured as by the network without the classes that this sample cannot have."""
    body, inputs = Body(nn.Tanh()), INPUTS[:12]
    open_ = random(3, 12, NUM_CLASSES + NUM_MASKED).argsort(dim=1) < 3  # three classes in every sample, or five
    open_[::5] = random(4, 3, NUM_CLASSES + NUM_MASKED).argsort(dim=1) < 5
    best = body(inputs).masked_fill(~open_, -math.inf).argmax(dim=1)
    wrong = body(inputs).masked_fill(~open_, math.inf).argmin(dim=1)
    targets = torch.where(torch.arange(12) % 4 == 0, wrong, best)

    def masked(x: Tensor, allowed: Tensor) -> Tensor:
        return body(x).masked_fill(~allowed, fill)

    extras = {"allowed": open_}
    whole = linearize(masked, inputs, extras=extras)
    calibrated = calibrated_fim_spectral_norm(whole.logits, whole.gram, targets)
    margins = linearized_margin(whole.logits, whole.gram, targets)
    margins_linf = linearized_margin_linf(whole.logits, whole.gap_l1, targets)  # type: ignore[arg-type]
    paths = trace_fisher_rao_paths(masked, inputs, labels=targets, extras=extras, max_steps=20)
    sums = {name: 0.0 for name, _ in body.named_parameters()}
    for n, classes in enumerate(open_):

        def single(x: Tensor, classes: Tensor = classes) -> Tensor:
            return body(x)[:, classes]

        x, y = inputs[n : n + 1], targets[n : n + 1]
        target = (classes[: int(y)]).sum()[None]
        one = linearize(single, x)
        norm = fim_spectral_norm(one.logits, one.gram, temperature=calibrated.temperature)
        torch.testing.assert_close(norm[0], calibrated.value[n], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(saturated(one.logits), saturated(whole.logits)[n : n + 1])
        torch.testing.assert_close(linearized_margin(one.logits, one.gram, target)[0], margins[n])
        torch.testing.assert_close(linearized_margin_linf(one.logits, one.gap_l1, target)[0], margins_linf[n])  # type: ignore[arg-type]
        own = trace_fisher_rao_paths(single, x, labels=target, max_steps=20)
        exist = paths.exist[n]
        assert int(exist.sum()) == int(classes.sum()) - 1
        torch.testing.assert_close(paths.margins[n, exist], own.margins[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(paths.linf[n, exist], own.linf[0], rtol=1e-4, atol=1e-6)
        assert torch.equal(paths.success[n, exist], own.success[0])
        exact = hessian_trace(single, x, target, module=body, num_probes=6, rtol=None, estimator="gauss_newton")
        for name, trace in exact.layers.items():
            sums[name] += float(trace) / len(inputs)
    nll = [
        float(F.cross_entropy((whole.logits.double() / t).masked_fill(~open_, -math.inf), targets))
        for t in (calibrated.temperature * factor for factor in (0.99, 1.0, 1.01))
    ]
    assert nll[1] == min(nll)
    gauss_newton = hessian_trace(
        masked, inputs, extras=extras, module=body, num_probes=6, rtol=None, estimator="gauss_newton"
    )
    for name, trace in gauss_newton.layers.items():
        assert float(trace) == pytest.approx(sums[name], rel=1e-5)
        assert float(gauss_newton.stderr[name]) == 0


@every_fill
def test_a_masked_target_counts_as_misclassified_and_not_for_the_temperature(fill: float) -> None:
    body = Body(nn.ReLU())
    targets = targets_of(body, correct=0.8)
    impossible = targets.clone()
    impossible[::7] = NUM_CLASSES
    model = Masking(body, filled(fill))
    at = linearize(model, INPUTS, valid_range=(-4, 4))
    rest = torch.arange(len(INPUTS)) % 7 != 0
    expected = fit_temperature(at.logits[rest], targets[rest])
    torch.testing.assert_close(fit_temperature(at.logits, impossible), expected)
    calibrated = calibrated_fim_spectral_norm(at.logits, at.gram, impossible)
    assert calibrated.value.isfinite().all()
    assert calibrated.stderr.isfinite()
    margins = linearized_margin_linf(at.logits, at.gap_l1, impossible)  # type: ignore[arg-type]
    assert not margins[::7].any()
    torch.testing.assert_close(margins[rest], linearized_margin_linf(at.logits, at.gap_l1, targets)[rest])  # type: ignore[arg-type]
    attacked = pgd(model, INPUTS, impossible, epsilon=0.1, steps=3)
    assert attacked.isfinite().all()
    assert fit_temperature(at.logits, torch.full_like(targets, NUM_CLASSES)) == 1
    paths = trace_fisher_rao_paths(model, INPUTS, labels=impossible, max_steps=10)
    assert not paths.traced[::7].any()


@every_fill
def test_a_sample_with_a_single_class_left_is_safe(fill: float) -> None:
    body = Body(nn.ReLU())
    alone = torch.arange(len(INPUTS)) % 3 == 0
    mask = alone[:, None] & (torch.arange(NUM_CLASSES + NUM_MASKED) > 0)

    def masked(x: Tensor, mask: Tensor) -> Tensor:
        return body(x).masked_fill(mask, fill)

    at = linearize(masked, INPUTS, extras={"mask": mask}, valid_range=(-4, 4))
    targets = at.logits.argmax(dim=1)
    calibrated = calibrated_fim_spectral_norm(at.logits, at.gram, targets)
    assert not calibrated.value[alone].any()
    rest = fit_temperature(at.logits[~alone], targets[~alone])
    torch.testing.assert_close(calibrated.temperature, rest)
    for margins in (
        linearized_margin(at.logits, at.gram, targets),
        linearized_margin_linf(at.logits, at.gap_l1, targets),  # type: ignore[arg-type]
    ):
        assert torch.equal(margins.isposinf(), alone)
    moved = relinearize(masked, INPUTS, at, extras={"mask": mask})
    assert torch.equal(moved.gram[alone], at.gram[alone])  # there is no boundary to move to
    paths = trace_fisher_rao_paths(masked, INPUTS, extras={"mask": mask}, max_steps=5)
    assert not paths.exist[alone].any()
    assert paths.exist[~alone].all()
    assert not paths.margins[alone].any()


@every_fill
@pytest.mark.parametrize("batch_size", [1, 40])
@pytest.mark.parametrize("options", [{}, {"norm": "l2"}, {"order": 2}], ids=str)
def test_samples_with_a_single_class_are_left_out_of_the_mean_margin_alone(
    options: dict[str, Any], batch_size: int, fill: float
) -> None:
    body = Body(nn.ReLU())
    mask = torch.zeros(40, NUM_CLASSES + NUM_MASKED, dtype=torch.bool)
    mask[1::3, 1:], mask[::3, 5:] = True, True  # a single class, and two masked ones
    targets = body(INPUTS).masked_fill(mask, -math.inf).argmax(dim=1)
    targets[[2, 4]] = 2  # wrong; the second one is masked itself

    def values(rows: Tensor, fill: float) -> dict[str, float]:
        metric = LinearizedAccuracy([0.01, 0.3], **options)
        for part in rows.split(batch_size):
            extras = {"mask": mask[part]}
            model = lambda x, mask: body(x).masked_fill(mask, fill)  # noqa: E731
            metric.update(Probe(model, INPUTS[part], targets[part], extras=extras))
        found = {key: float(value) for key, value in metric.compute().items()}
        assert all(len(numbers) == len(rows) for numbers in metric.per_sample.values())
        return found

    every, rest = torch.arange(40), (~(mask.sum(dim=1) > 3) | (targets == 2)).nonzero()[:, 0]
    actual, expected, without = values(every, fill), values(every, -math.inf), values(rest, -math.inf)
    assert actual == pytest.approx(expected, rel=1e-5)
    order, norm = "_order2" if "order" in options else "", options.get("norm", "linf")
    key = f"linearized{order}_margin_{norm}"
    for name in (key, f"{key}_stderr"):
        assert actual[name] == pytest.approx(without[name], rel=1e-5)
        assert math.isfinite(actual[name])
    assert actual[f"{key}_clipped"] > without[f"{key}_clipped"]
    assert actual[f"linearized{order}_accuracy_{norm}_0"] == pytest.approx(38 / 40)


def test_paths_cannot_aim_at_a_masked_class() -> None:
    model = Masking(Body(nn.ReLU()), filled(-1e4))
    own = model(INPUTS).argmax(dim=1)
    aims = torch.stack([(own + 1) % NUM_CLASSES, torch.full_like(own, NUM_CLASSES)], dim=1)
    paths = trace_fisher_rao_paths(model, INPUTS, targets=aims, max_steps=10)
    assert (paths.targets[:, 1] == -1).all()
    assert not paths.traced[:, 1].any()
    for values in (paths.bound, paths.steps, paths.success, paths.margins, paths.l2, paths.linf):
        assert not values[:, 1].any()
    whole = trace_fisher_rao_paths(model, INPUTS, targets=aims[:, :1], max_steps=10)
    torch.testing.assert_close(paths.margins[:, :1], whole.margins)


def test_two_classes_are_too_few_for_the_difference_of_logits_ratio() -> None:
    body = Body(nn.ReLU())

    def masked(x: Tensor) -> Tensor:
        return body(x).masked_fill(torch.arange(NUM_CLASSES + NUM_MASKED) > 1, -math.inf)

    with pytest.raises(ValueError, match=r"three classes or more that are not masked .* a sample has 2\. Use"):
        pgd(masked, INPUTS, torch.zeros(40, dtype=torch.long), epsilon=0.1, steps=1, loss="dlr")


@pytest.mark.parametrize(
    ("logits", "sentence"),
    [
        ([[0.0, math.nan, -math.inf]], "finite logits, but got NaN or infinity in 1 of 1 samples"),
        ([[0.0, math.inf, -math.inf]], "finite logits, but got NaN or infinity in 1 of 1 samples"),
        (
            [[0.0, 1.0, 2.0], [-math.inf] * 3],
            r"at least one class that is not masked .* in 1 of 2 samples \(first: .* 1",
        ),
    ],
    ids=["nan", "inf", "all masked"],
)
def test_what_is_no_mask_is_refused(logits: list[list[float]], sentence: str) -> None:
    given = torch.tensor(logits)
    targets = torch.zeros(len(given), dtype=torch.long)
    with pytest.raises(ValueError, match=sentence):
        fit_temperature(given, targets)
    with pytest.raises(ValueError, match=sentence):
        linearize(lambda x: given + 0 * x, torch.ones_like(given))


def test_losses_that_know_no_masks_refuse_them() -> None:
    model = Masking(Body(nn.ReLU()), filled(-math.inf))
    targets = torch.zeros(len(INPUTS), NUM_CLASSES + NUM_MASKED)
    for loss_fn in (nn.MSELoss(), nn.BCEWithLogitsLoss()):
        with pytest.raises(ValueError, match="finite outputs, but got NaN or infinity"):
            hessian_trace(model, INPUTS, targets, loss_fn=loss_fn)
