import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.functional import linearize, linearized_margin, linearized_margin_linf, pgd
from tests.helpers.networks import Linear, build, normalise, random, random_linear
from tests.helpers.recording import Recorder, state_of

MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.5, 2.0]

every_norm = pytest.mark.parametrize("norm", ["linf", "l2"])


def size(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), ord=2 if norm == "l2" else torch.inf, dim=1)


def raw(inputs: Tensor) -> Tensor:
    """Undo the normalisation by MEAN and STD."""
    shape = (1, 3, 1, 1)
    return inputs * inputs.new_tensor(STD).view(shape) + inputs.new_tensor(MEAN).view(shape)


@pytest.fixture
def images() -> tuple[nn.Module, Tensor, Tensor]:
    """A network for normalised images in [0, 1], some of whose pixels are black or white."""
    model, _, _ = build("cnn_batchnorm")
    pixels = (random(5, 8, 3, 7, 7, dtype=torch.float32) * 0.5 + 0.5).clamp(0, 1)
    inputs = normalise(pixels, MEAN, STD)
    return model, inputs, linearize(model, inputs).logits.argmax(dim=1)


@pytest.mark.parametrize("start", [None, 0], ids=["from the input", "random start"])
@pytest.mark.parametrize("valid_range", [None, (0.0, 1.0)], ids=["unbounded", "bounded"])
@every_norm
def test_the_attack_stays_in_the_ball_and_the_valid_range_of_the_raw_inputs(
    images: tuple[nn.Module, Tensor, Tensor], norm: Any, valid_range: tuple[float, float] | None, start: int | None
) -> None:
    model, inputs, targets = images
    generator = None if start is None else torch.Generator().manual_seed(start)
    epsilon = 0.05 if norm == "linf" else 0.8
    attacked = pgd(
        model,
        inputs,
        targets,
        epsilon=epsilon,
        steps=4,
        norm=norm,
        valid_range=valid_range,
        input_mean=MEAN,
        input_std=STD,
        generator=generator,
    )
    moved = size(raw(attacked) - raw(inputs), norm)
    assert (moved <= epsilon + 1e-6).all()
    assert moved.max() > 0.5 * epsilon
    outside = (raw(attacked) < -1e-6) | (raw(attacked) > 1 + 1e-6)
    assert outside.any() == (valid_range is None)


@every_norm
def test_the_attack_works_in_raw_units_as_on_a_network_that_normalises_itself(norm: Any) -> None:
    weight, std, mean = random(0, 3, 6), torch.tensor([0.5, 2.0, 4.0]).double(), torch.tensor([0.1, -0.2, 0.3]).double()
    pixels = random(1, 5, 3, 2)
    scale = std.repeat_interleave(2)
    inside = Linear(weight / scale, -(weight / scale) @ mean.repeat_interleave(2))
    outside, targets = Linear(weight), torch.tensor([0, 1, 2, 0, 1])
    options: dict[str, Any] = {"epsilon": 0.3, "steps": 5, "norm": norm, "valid_range": (-1.0, 1.5)}
    expected = pgd(inside, pixels, targets, **options)
    normalised = (pixels - mean[:, None]) / std[:, None]
    actual = pgd(outside, normalised, targets, input_mean=mean, input_std=std, **options)
    torch.testing.assert_close(actual * std[:, None] + mean[:, None], expected)


def test_an_input_outside_the_valid_range_may_stay_but_not_move_further_out() -> None:
    inputs = torch.tensor([[1.1, -0.2, 0.5]])
    for sign in (1.0, -1.0):
        model = Linear(torch.stack([torch.zeros(3), sign * torch.ones(3)]))
        attacked = pgd(model, inputs, torch.tensor([0]), epsilon=0.1, steps=3, valid_range=(0.0, 1.0))
        expected = [[1.1, -0.1, 0.6]] if sign > 0 else [[1.0, -0.2, 0.4]]
        torch.testing.assert_close(attacked, torch.tensor(expected))


@pytest.mark.parametrize("start", [None, 0], ids=["from the input", "random start"])
@every_norm
def test_epsilon_zero_returns_the_inputs(norm: Any, start: int | None) -> None:
    model, inputs, targets = build("mlp")
    generator = None if start is None else torch.Generator().manual_seed(start)
    attacked = pgd(model, inputs, targets, epsilon=0, steps=2, norm=norm, generator=generator)
    assert torch.equal(attacked, inputs)


@every_norm
def test_one_step_on_a_linear_network_is_the_closed_form_gradient_step(norm: Any) -> None:
    model, inputs, targets = (
        random_linear(0, num_classes=4, num_features=6),
        random(1, 5, 6),
        torch.tensor([0, 1, 2, 3, 0]),
    )
    probs = model(inputs).softmax(dim=1).detach()
    weight = model.weight.detach()
    gradient = probs @ weight - weight[targets]
    step = gradient.sign() if norm == "linf" else gradient / gradient.norm(dim=1, keepdim=True)
    attacked = pgd(model, inputs, targets, epsilon=0.25, steps=1, norm=norm, step_size=0.1)
    torch.testing.assert_close(attacked, inputs + 0.1 * step, rtol=0, atol=1e-12)


@every_norm
def test_the_attack_flips_a_linear_binary_classifier_exactly_beyond_the_margin(norm: Any) -> None:
    model, inputs = random_linear(0, num_classes=2, num_features=6), random(1, 10, 6)
    at = linearize(model, inputs)
    targets = at.logits.argmax(dim=1)
    assert at.gap_l1 is not None
    margins = (
        linearized_margin(at.logits, at.gram, targets)
        if norm == "l2"
        else linearized_margin_linf(at.logits, at.gap_l1, targets)
    )
    for x, y, r in zip(inputs.split(1), targets.split(1), margins.tolist(), strict=True):
        for factor, stays in ((1 - 1e-6, True), (1 + 1e-6, False)):
            attacked = pgd(model, x, y, epsilon=factor * r, steps=3, norm=norm)
            assert (model(attacked).argmax() == y) == stays


@every_norm
def test_accuracy_falls_with_epsilon_and_the_loss_rises(norm: Any) -> None:
    model, inputs, _ = build("resnet", num_samples=40)
    targets = linearize(model, inputs).logits.argmax(dim=1)
    unit = 0.02 if norm == "linf" else 0.1
    accuracies, losses = [], []
    for factor in (0, 1, 4, 16):
        attacked = pgd(model, inputs, targets, epsilon=factor * unit, steps=5, norm=norm)
        logits = linearize(model, attacked).logits
        accuracies.append(float((logits.argmax(dim=1) == targets).float().mean()))
        losses.append(float(nn.functional.cross_entropy(logits, targets)))
    assert accuracies[0] == 1
    assert accuracies == sorted(accuracies, reverse=True)
    assert losses == sorted(losses)
    assert accuracies[-1] < 0.5


@every_norm
def test_a_random_start_depends_on_the_generator_alone(norm: Any) -> None:
    model, inputs, targets = build("mlp")

    def attack(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pgd(model, inputs, targets, epsilon=0.1, steps=1, norm=norm, step_size=1e-3, generator=generator)

    before = torch.get_rng_state()
    assert torch.equal(attack(0), attack(0))
    assert not torch.equal(attack(0), attack(1))
    assert torch.equal(torch.get_rng_state(), before)


@every_norm
def test_a_random_start_fills_the_ball_uniformly(norm: Any) -> None:
    """In either norm, a share of 2^-D of the starts lies within half of the radius."""
    constant = Recorder(Linear(torch.zeros(2, 3)))
    inputs, epsilon = torch.zeros(20_000, 3), 2.0
    start = pgd(
        constant,
        inputs,
        torch.zeros(20_000, dtype=torch.long),
        epsilon=epsilon,
        steps=1,
        norm=norm,
        generator=torch.Generator().manual_seed(0),
    )
    assert size(start, norm).max() <= epsilon + 1e-6
    assert abs((size(start, norm) < epsilon / 2).float().mean() - 1 / 8) < 4 * (1 / 8 * 7 / 8 / 20_000) ** 0.5
    assert (start.mean(dim=0).abs() < 4 * start.std(dim=0) / 20_000**0.5).all()


@every_norm
def test_a_sample_is_attacked_alone_as_in_a_batch(norm: Any) -> None:
    model, inputs, targets = build("attention")
    together = pgd(model.double(), inputs.double(), targets, epsilon=0.1, steps=3, norm=norm)
    alone = [
        pgd(model, x[None].double(), y[None], epsilon=0.1, steps=3, norm=norm)
        for x, y in zip(inputs, targets, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-9)


@every_norm
def test_scalar_samples_are_attacked_like_any_other(norm: Any) -> None:
    slope, inputs, targets = torch.tensor([1.0, -2.0]), torch.linspace(-1, 1, 5), torch.zeros(5, dtype=torch.long)
    attacked = pgd(lambda x: x[:, None] * slope, inputs, targets, epsilon=0.1, steps=2, norm=norm)
    torch.testing.assert_close(attacked, inputs - 0.1)


def test_a_network_that_ignores_its_input_cannot_be_attacked() -> None:
    inputs = random(0, 3, 4, dtype=torch.float32)
    attacked = pgd(lambda x: torch.ones(len(x), 2), inputs, torch.tensor([0, 1, 0]), epsilon=0.1, steps=2)
    assert torch.equal(attacked, inputs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_class_indices_of_any_integer_type_are_the_same(dtype: torch.dtype) -> None:
    model, inputs, targets = build("mlp")
    expected = pgd(model, inputs, targets, epsilon=0.1, steps=2)
    assert torch.equal(pgd(model, inputs, targets.to(dtype), epsilon=0.1, steps=2), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_the_attack_changes_nothing_and_needs_no_grad_mode(mode: Any) -> None:
    model, inputs, targets = build("cnn_batchnorm")
    expected = pgd(model, inputs, targets, epsilon=0.1, steps=2)
    recorder, before = Recorder(model), state_of(model)
    with mode():
        attacked = pgd(recorder, inputs.clone(), targets.clone(), epsilon=0.1, steps=2)
    assert torch.equal(attacked, expected)
    assert not attacked.requires_grad
    assert state_of(model) == before
    assert not any(recorder.record.any_training)
    assert not any(recorder.record.any_parameter_requires_grad)
    assert recorder.record.num_input_backwards == 2


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"epsilon": -0.1}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"epsilon": float("inf")}, "epsilon"),
        ({"steps": 0}, "steps"),
        ({"norm": "l1"}, "norm"),
        ({"loss": "hinge"}, "loss"),
        ({"schedule": "linear"}, "schedule"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": -1.0}, "step_size"),
        ({"valid_range": (1.0, 0.0)}, "valid_range"),
        ({"valid_range": (0.0, float("nan"))}, "valid_range"),
        ({"input_mean": [0.0, float("nan")]}, "input_mean"),
        ({"input_mean": [0.0, 0.0, 0.0]}, "input_mean"),
        ({"input_std": [1.0, 0.0]}, "input_std"),
        ({"input_std": [1.0, 1.0, 1.0]}, "input_std"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], argument: str) -> None:
    model, inputs = random_linear(0, num_classes=3, num_features=2), random(0, 4, 2)
    with pytest.raises(ValueError, match=f"`{argument}`"):
        pgd(model, inputs, torch.tensor([0, 1, 2, 0]), **({"epsilon": 0.1, "steps": 1} | options))


def test_the_ratio_of_logit_differences_is_ascended_where_cross_entropy_is_flat() -> None:
    """A network so confident that the gradient of its cross-entropy underflows."""
    model, inputs, _ = build("cnn_batchnorm")
    model, inputs = model.float().eval(), inputs.float()
    targets = model(inputs).argmax(dim=1)
    fooled = {}

    def confident(x: Tensor) -> Tensor:
        return model(x) * 1e4

    for loss in ("cross_entropy", "dlr"):
        attacked = pgd(confident, inputs, targets, epsilon=0.3, steps=20, loss=loss)  # type: ignore[arg-type]
        fooled[loss] = int((model(attacked).argmax(dim=1) != targets).sum())
    assert fooled["dlr"] > fooled["cross_entropy"]


def test_the_ratio_is_that_of_the_source() -> None:
    """One step follows the sign of the gradient that autograd takes of the formula."""
    model, inputs = random_linear(0, num_classes=4, num_features=5), random(1, 6, 5)
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    leaf = inputs.clone().requires_grad_()
    z = model(leaf)
    ranked = z.sort(dim=1, descending=True).values
    others = z.masked_fill(nn.functional.one_hot(targets, 4).bool(), -torch.inf).amax(dim=1)
    own = z.gather(1, targets[:, None])[:, 0]
    loss = -(own - others) / (ranked[:, 0] - ranked[:, 2])
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    attacked = pgd(model, inputs, targets, epsilon=0.1, steps=1, step_size=0.1, loss="dlr")
    torch.testing.assert_close(attacked, inputs + 0.1 * gradient.sign())


def test_two_classes_have_no_such_ratio() -> None:
    model, inputs = random_linear(0, num_classes=2, num_features=3), random(0, 4, 3)
    with pytest.raises(ValueError, match="three classes or more for `loss='dlr'`, but it has 2"):
        pgd(model, inputs, torch.zeros(4, dtype=torch.long), epsilon=0.1, steps=1, loss="dlr")


def test_steps_of_a_cosine_schedule_decay_to_zero() -> None:
    """On a linear network all steps have the same direction, so they add up."""
    model, inputs = random_linear(0, num_classes=2, num_features=3), random(0, 4, 3)
    targets = model(inputs).argmax(dim=1)
    attacked = pgd(model, inputs, targets, epsilon=100.0, steps=4, step_size=0.1, schedule="cosine")
    sizes = [0.1 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    torch.testing.assert_close(size(attacked - inputs, "linf"), torch.full((4,), sum(sizes), dtype=torch.float64))


def test_tied_logits_have_a_finite_ratio() -> None:
    model = nn.Linear(6, 3, bias=False).requires_grad_(False)
    model.weight.copy_(60 * random(0, 3, 6))
    attacked = pgd(model, torch.zeros(4, 6), torch.zeros(4).long(), epsilon=0.1, steps=3, norm="l2", loss="dlr")
    assert attacked.isfinite().all()
