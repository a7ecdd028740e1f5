"""L∞ margins among perturbations that keep every feature in its valid range."""

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from lightning_robust.functional import Linearization, linearize, linearized_margin_linf, pgd
from tests.helpers.networks import build
from tests.helpers.oracles import score_jacobian


def margins_by_linear_programming(model: nn.Module, inputs: Tensor, targets: Tensor, low: float, high: float) -> Tensor:
    """Smallest ε for which some δ with |δ| ≤ ε and low ≤ x + δ ≤ high closes a gap of the linearised network."""
    margins = []
    for x, y in zip(inputs.double(), targets.tolist(), strict=True):
        probs, scores = score_jacobian(model, x)
        flat, candidates = x.flatten(), []
        if probs.argmax() != y:
            margins.append(0.0)
            continue
        for k in range(len(probs)):
            if k == y:
                continue
            gap, gradient = float((probs[y] / probs[k]).log()), (scores[y] - scores[k]).numpy()
            # variables δ and ε; rows: the gap closes, δ ≤ ε, −δ ≤ ε
            size = len(flat)
            eye, ones = torch.eye(size), torch.ones(size, 1)
            rows = torch.cat([torch.cat([eye, -ones], dim=1), torch.cat([-eye, -ones], dim=1)]).numpy()
            bounds = [*zip((low - flat).tolist(), (high - flat).tolist(), strict=True), (0, None)]
            result = linprog(
                [0.0] * size + [1.0],
                A_ub=[[*gradient, 0.0], *rows],
                b_ub=[-gap, *[0.0] * (2 * size)],
                bounds=bounds,
                method="highs",
                options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
            )
            candidates.append(result.fun if result.status == 0 else torch.inf)
        margins.append(min(candidates))
    return torch.tensor(margins, dtype=torch.float64)


def margins(linearization: Linearization, targets: Tensor) -> Tensor:
    assert linearization.gap_l1 is not None
    return linearized_margin_linf(linearization.logits, linearization.gap_l1, targets)


@pytest.mark.parametrize("name", ["mlp", "cnn_batchnorm", "attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_margins_are_those_of_linear_programming(name: str, dtype: torch.dtype) -> None:
    model, inputs, targets = build(name, num_samples=6)
    low, high = 0.25, 0.75  # exact in float32
    inputs = inputs.sigmoid().clamp(low, high)  # many values at the ends of the range
    targets = model.eval()(inputs).argmax(dim=1)
    expected = margins_by_linear_programming(model, inputs, targets, low, high)
    linearization = linearize(model.to(dtype), inputs.to(dtype), valid_range=(low, high))
    actual = margins(linearization, targets).double()
    assert (expected > 0).sum() > 3
    torch.testing.assert_close(actual, expected, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-9)
    plain = margins(linearize(model, inputs.to(dtype)), targets).double()
    assert (actual > 1.05 * plain).any()


def test_a_range_out_of_reach_changes_nothing() -> None:
    model, inputs, _ = build("resnet")
    free, wide = linearize(model, inputs), linearize(model, inputs, valid_range=(-1e3, 1e3))
    assert free.gap_l1 is not None
    assert wide.gap_l1 is not None
    torch.testing.assert_close(wide.gap_l1, free.gap_l1)
    assert torch.equal(wide.gram, free.gram)


def test_margins_grow_as_the_range_shrinks_until_nothing_can_move() -> None:
    model, inputs, _ = build("mlp")
    inputs = inputs.tanh() / 10
    targets = model.eval()(inputs).argmax(dim=1)
    previous = torch.zeros(len(inputs))
    for width in (10.0, 1.0, 0.3, 0.15, 0.1):
        current = margins(linearize(model, inputs, valid_range=(-width, width)), targets)
        assert (current >= previous * (1 - 1e-5)).all()
        previous = current
    stuck = linearize(model, torch.full_like(inputs, 0.5), valid_range=(0.5, 0.5 + 1e-12))
    assert margins(stuck, stuck.logits.argmax(dim=1)).isinf().all()


def test_an_attack_on_a_linear_network_succeeds_just_beyond_the_margin() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(30, 2)
    model.weight.data = torch.randn(2, 30, generator=generator)
    inputs = torch.rand(40, 30, generator=generator).round(decimals=1)
    targets = model(inputs).argmax(dim=1)
    radii = margins(linearize(model, inputs, valid_range=(0, 1)), targets)
    assert radii.isfinite().all()
    for factor, flips in ((0.999, False), (1.001, True)):
        for x, y, radius in zip(inputs, targets, radii.tolist(), strict=True):
            attacked = pgd(model, x[None], y[None], epsilon=radius * factor, steps=5, valid_range=(0, 1))
            assert bool(model(attacked).argmax() != y) is flips


def test_normalised_inputs_have_the_margins_of_the_originals() -> None:
    model, raw, _ = build("cnn_batchnorm")
    raw = raw.sigmoid()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]))

    class Normalising(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model.eval()((x - mean) / std)

    targets = Normalising()(raw).argmax(dim=1)
    inside = linearize(Normalising(), raw, valid_range=(0, 1))
    outside = linearize(
        model, (raw - mean) / std, input_mean=mean.flatten(), input_std=std.flatten(), valid_range=(0, 1)
    )
    torch.testing.assert_close(margins(outside, targets), margins(inside, targets), rtol=1e-4, atol=0)


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 25])
def test_chunks_change_nothing(chunk_size: int) -> None:
    model, inputs, _ = build("cnn_batchnorm")
    inputs = inputs.sigmoid()
    whole, parts = (linearize(model, inputs, valid_range=(0, 1), chunk_size=size) for size in (None, chunk_size))
    torch.testing.assert_close(parts.gap_l1, whole.gap_l1, rtol=1e-5, atol=0)


@pytest.mark.parametrize("valid_range", [(1, 0), (0.5, 0.5), (0,), (0, float("nan"))])
def test_an_invalid_range_is_refused(valid_range: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"`valid_range` to be \(low, high\) with low < high, but got"):
        linearize(nn.Linear(3, 2), torch.ones(4, 3), valid_range=valid_range)
