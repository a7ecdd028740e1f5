import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_robust.functional import (
    FisherRaoPaths,
    fisher_rao_distance,
    fisher_rao_margin_bound,
    trace_fisher_rao_paths,
)
from lightning_robust.functional.fisher_rao._natural_gradient import solve_by_conjugate_gradients, solve_by_gram
from tests.helpers.contexts import every_context
from tests.helpers.networks import NETWORKS, Linear, Normalised, build, normalise, random, random_linear
from tests.helpers.paths import dense_natural_gradient, dense_path
from tests.helpers.recording import PeakMemory, Recorder, state_of

every_network = pytest.mark.parametrize("name", NETWORKS)
every_solver = pytest.mark.parametrize("solver", ["gram", "cg"])
OPTIONS = {"damping": 0.05, "step_length": 0.3, "max_euclidean_step": 0.2}


def predictions(seed: int, *shape: int) -> Tensor:
    return (2 * random(seed, *shape)).softmax(dim=-1)


def smooth(seed: int = 0, *, features: int = 8, num_classes: int = 5) -> nn.Module:
    """A float64 network, twice differentiable, with a Jacobian of full rank."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(features, 24), nn.Tanh(), nn.Linear(24, num_classes)).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
    return model


# --- distances on the simplex ---------------------------------------------------------------------------------------


def test_the_distance_of_two_classes_is_that_of_two_angles() -> None:
    p, q = torch.rand(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 2 * (p.sqrt().asin() - q.sqrt().asin()).abs()
    actual = fisher_rao_distance(torch.stack([p, 1 - p], dim=1), torch.stack([q, 1 - q], dim=1))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_the_distance_is_twice_the_angle_of_the_square_roots() -> None:
    p, q = predictions(0, 40, 6), predictions(1, 40, 6)
    torch.testing.assert_close(fisher_rao_distance(p, q), 2 * (p * q).sqrt().sum(dim=1).acos(), rtol=1e-10, atol=0)


def test_the_distance_is_zero_to_itself_and_pi_where_no_class_is_common() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    assert torch.equal(fisher_rao_distance(p, p), torch.zeros(2))
    torch.testing.assert_close(fisher_rao_distance(p, torch.tensor([0.0, 0.0, 1.0])), torch.full((2,), math.pi))


@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-9, 1e-12])
def test_small_distances_are_those_of_the_fisher_metric(step: float) -> None:
    p = predictions(0, 20, 5)
    change = random(1, 20, 5)
    change = step * (change - change.mean(dim=1, keepdim=True)) * p.amin(dim=1, keepdim=True)
    expected = (change.square() / p).sum(dim=1).sqrt()  # of changes that are rounded to 1e-16
    torch.testing.assert_close(fisher_rao_distance(p, p + change), expected, rtol=2 * step + 1e-14 / step, atol=0)


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), num_classes=st.integers(2, 7))
def test_the_distance_is_a_metric(seed: int, num_classes: int) -> None:
    p, q, r = predictions(seed, 3, num_classes)
    assert fisher_rao_distance(p, q) == fisher_rao_distance(q, p)
    assert fisher_rao_distance(p, r) <= fisher_rao_distance(p, q) + fisher_rao_distance(q, r) + 1e-12
    assert fisher_rao_distance(p, q) <= math.pi


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), num_classes=st.integers(2, 7))
def test_the_bound_is_the_distance_to_the_nearest_point_at_even_odds(seed: int, num_classes: int) -> None:
    p = predictions(seed, 1, num_classes)
    source, target = p.argmax(dim=1), p.argmin(dim=1)
    bound = fisher_rao_margin_bound(p, source, target)
    roots = predictions(seed + 1, 500, num_classes).sqrt()
    nearest = p.sqrt().clone()  # projected onto the hyperplane, and back onto the sphere
    for points in (roots, nearest):
        points[:, [int(source), int(target)]] = points[:, [int(source), int(target)]].mean(dim=1, keepdim=True)
    others, nearest = (points.square() / points.square().sum(dim=1, keepdim=True) for points in (roots, nearest))
    assert (fisher_rao_distance(p, others) >= bound - 1e-12).all()
    torch.testing.assert_close(fisher_rao_distance(p, nearest), bound, rtol=1e-9, atol=1e-12)
    formula = 2 * (1 - (p[0, source].sqrt() - p[0, target].sqrt()).square() / 2).sqrt().acos()
    torch.testing.assert_close(bound, formula, rtol=1e-6, atol=1e-7)


def test_the_bound_is_zero_beyond_even_odds_and_close_to_a_right_angle_where_confident() -> None:
    p = torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.4, 0.6], [1.0, 0.0]])
    bound = fisher_rao_margin_bound(p, torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long))
    assert bound[0] > 0
    assert torch.equal(bound[1:3], torch.zeros(2))
    assert float(bound[3]) == pytest.approx(math.pi / 2)


# --- one step -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    features=st.integers(1, 9),
    num_classes=st.integers(2, 6),
    damping=st.sampled_from([1e-3, 0.1, 10.0]),
)
def test_both_solvers_solve_the_dense_system(seed: int, features: int, num_classes: int, damping: float) -> None:
    probs, rows = predictions(seed, 3, num_classes), random(seed + 1, 3, num_classes, features)
    contrast, weights = random(seed + 2, 3, num_classes), torch.full((3,), damping, dtype=torch.float64)
    fisher = rows.mT @ (torch.diag_embed(probs) - probs[:, :, None] * probs[:, None]) @ rows
    gradient = (rows.mT @ contrast[..., None])[..., 0]
    expected = torch.linalg.solve(fisher + damping * torch.eye(features, dtype=torch.float64), gradient)

    def push(p: Tensor) -> Tensor:
        return (rows @ p[..., None])[..., 0]

    def pull(u: Tensor) -> Tensor:
        return (rows.mT @ u[..., None])[..., 0]

    for natural in (
        solve_by_gram(probs, rows, contrast, weights, which=torch.arange(3)),
        solve_by_conjugate_gradients(probs, push, pull, contrast, weights),
    ):
        torch.testing.assert_close(natural.direction, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
        torch.testing.assert_close(natural.change, push(natural.direction), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(natural.squared_norm, (gradient * expected).sum(dim=1), rtol=1e-6, atol=1e-9)


@every_solver
@every_network
def test_the_first_unit_step_is_the_dense_natural_gradient_of_length_one(name: str, solver: Any) -> None:
    model, inputs, _ = build(name, num_samples=4)
    model, inputs = model.double().eval(), inputs.double()
    given = trace_fisher_rao_paths(model, inputs, damping=0.05, max_steps=1, solver=solver, mode="unit_steps")
    for n, x in enumerate(inputs):
        source = int(model(x[None].clone()).argmax())
        for k, target in enumerate(given.targets[n].tolist()):
            v, _, g = dense_natural_gradient(model, x, source=source, target=target, damping=0.05)
            step = v / (g @ v).sqrt()
            assert float(given.l2[n, k]) == pytest.approx(float(step.norm()), rel=1e-6)
            assert float(given.linf[n, k]) == pytest.approx(float(step.abs().max()), rel=1e-6)
            end = model((x - step.view(x.shape))[None].clone())[0]  # downwards: the gap to the target closes
            torch.testing.assert_close(given.logits[n, k], end, rtol=1e-6, atol=1e-6)


# --- whole paths ----------------------------------------------------------------------------------------------------


@every_solver
@every_network
def test_paths_are_those_of_dense_matrices_taken_one_by_one(name: str, solver: Any) -> None:
    model, inputs, _ = build(name, num_samples=2)
    model, inputs = model.double().eval(), inputs.double()
    paths = trace_fisher_rao_paths(model, inputs, solver=solver, **OPTIONS)
    for n, x in enumerate(inputs):
        for k in range(0, paths.targets.shape[1], 2):
            source, target = int(paths.source[n]), int(paths.targets[n, k])
            dense = dense_path(model, x, source=source, target=target, **OPTIONS)
            assert (int(paths.first_hit[n, k]), int(paths.steps[n, k])) == (dense.hit, dense.steps)
            # the crossing is located to a gap of 1e-6 nats
            assert float(paths.margins[n, k]) == pytest.approx(dense.margin, abs=5e-6)
            assert float(paths.l2[n, k]) == pytest.approx(float((dense.end - x).norm()), abs=1e-5)
            assert float(paths.linf[n, k]) == pytest.approx(float((dense.end - x).abs().max()), abs=1e-5)


@every_network
def test_both_solvers_agree_in_single_precision(name: str) -> None:
    model, inputs, _ = build(name, num_samples=4)
    for options in ({}, OPTIONS):
        one, other = (trace_fisher_rao_paths(model, inputs, solver=solver, **options) for solver in ("gram", "cg"))
        torch.testing.assert_close(one.margins, other.margins, rtol=1e-4, atol=1e-4)
        assert torch.equal(one.first_hit, other.first_hit)


@pytest.mark.parametrize("scale", [0.5, 2.0, 10.0])
def test_of_two_classes_the_margin_is_the_distance_on_the_simplex(scale: float) -> None:
    model, inputs = Linear(scale * random(0, 2, 5), random(1, 2)), random(2, 30, 5)
    probs = model(inputs).detach().softmax(dim=1)
    paths = trace_fisher_rao_paths(model, inputs)
    assert paths.margins.shape == (30, 1)
    assert paths.success.all()
    largest = probs.amax(dim=1)
    closed = 2 * (largest.sqrt().asin() - math.pi / 4)
    tolerance = 1e-5  # the gap, in nats, up to which the crossing is located
    torch.testing.assert_close(paths.margins[:, 0], closed, rtol=0, atol=tolerance)
    torch.testing.assert_close(paths.margins, paths.bound, rtol=0, atol=tolerance)
    # the path through input space is the shortest one, of the length of the distance to the plane
    distances = (model(inputs).detach() @ torch.tensor([1.0, -1.0], dtype=torch.float64)).abs()
    distances = distances / (model.weight[0] - model.weight[1]).detach().norm()
    torch.testing.assert_close(paths.l2[:, 0], distances, rtol=1e-4, atol=1e-4)


def exchange(probs: Tensor, source: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Length (N, K) of the path on which source and target exchange probability and all other classes keep theirs.

    That is the natural gradient flow without damping of any network whose Jacobian has full rank. Also the largest
    probability of another class, as a share of that of source and target at the end: above 1 it is entered first.
    """
    own = probs.gather(1, source[:, None]).expand_as(targets)
    aimed = probs.gather(1, targets)
    both = own + aimed
    length = 2 * both.sqrt() * (math.pi / 4 - (aimed / own).sqrt().atan())
    rest = torch.stack([probs.scatter(1, source[:, None], 0).scatter(1, k[:, None], 0) for k in targets.T], dim=1)
    return length, rest.amax(dim=2) / (both / 2)


@pytest.mark.parametrize("network", ["linear", "smooth"])
def test_without_damping_source_and_target_exchange_probability_whatever_the_network(network: str) -> None:
    model = random_linear(0, num_classes=5, num_features=8) if network == "linear" else smooth()
    inputs = random(1, 20, 8)
    probs = model(inputs).detach().softmax(dim=1)
    errors = []
    for finer in (1, 2, 4):
        options = {"step_length": 0.2 / finer, "max_euclidean_step": 0.2 / finer}
        paths = trace_fisher_rao_paths(model, inputs, damping=1e-10, max_steps=10_000, **options)
        expected, rival = exchange(probs, paths.source, paths.targets)
        reached, shielded = rival < 0.9, rival > 1.1
        assert reached.sum() > 20
        assert shielded.sum() > 5
        assert torch.equal(paths.first_hit[reached], paths.targets[reached])
        assert paths.shielded[shielded].all()
        errors.append(float((paths.margins - expected)[reached].abs().max()))
    assert errors[-1] < 1e-4
    order = [math.log2(before / after) for before, after in pairwise(errors)]
    assert min(order) > 1.8, errors


def test_refining_the_step_converges_with_the_square_of_the_step() -> None:
    model, inputs = smooth(1), random(2, 12, 8)

    def margins(finer: int) -> Tensor:
        options = {"step_length": 0.3 / finer, "max_euclidean_step": 0.3 / finer}
        return trace_fisher_rao_paths(model, inputs, damping=0.3, max_steps=10_000, **options).margins

    truth = margins(64)
    errors = [float((margins(finer) - truth).abs().mean()) for finer in (1, 2, 4, 8)]
    order = [math.log2(before / after) for before, after in pairwise(errors)]
    assert min(order) > 1.7, errors
    assert errors[-1] < 1e-3 * float(truth.mean())


@settings(deadline=None, max_examples=15)
@given(
    name=st.sampled_from(list(NETWORKS)),
    seed=st.integers(0, 100),
    damping=st.sampled_from([None, 1e-4, 1.0, 100.0]),
    step_length=st.sampled_from([None, 0.05, 3.0]),
    solver=st.sampled_from(["gram", "cg"]),
)
def test_no_path_is_shorter_than_the_bound_or_than_the_distance_of_its_ends(
    name: str, seed: int, damping: float | None, step_length: float | None, solver: Any
) -> None:
    model, inputs, _ = build(name, num_samples=4, seed=seed)
    paths = trace_fisher_rao_paths(model, inputs, damping=damping, step_length=step_length, max_steps=30, solver=solver)
    start, end = paths.start_logits.double().softmax(dim=1), paths.logits.double().softmax(dim=2)
    geodesic = fisher_rao_distance(start[:, None], end)
    assert (paths.margins.double() >= geodesic - 1e-6).all()
    assert (paths.margins.double() >= paths.bound.double() - 1e-6)[paths.success].all()
    assert torch.equal(paths.success, paths.logits.argmax(dim=2) != paths.source[:, None])
    assert torch.equal(paths.first_hit, paths.logits.argmax(dim=2).where(paths.success, -1))


def test_the_bound_is_that_of_the_class_that_was_hit() -> None:
    model, inputs, _ = build("cnn_batchnorm")
    paths = trace_fisher_rao_paths(model, inputs)
    assert paths.shielded.any()
    probs = paths.start_logits.softmax(dim=1)
    for k in range(paths.targets.shape[1]):
        expected = fisher_rao_margin_bound(probs, paths.source, paths.first_hit[:, k])
        torch.testing.assert_close(paths.bound[:, k], expected, rtol=1e-4, atol=1e-5)


# --- which paths ----------------------------------------------------------------------------------------------------


def test_a_misclassified_sample_has_margin_zero() -> None:
    model, inputs, targets = build("mlp")
    paths = trace_fisher_rao_paths(model, inputs, labels=targets)
    wrong = paths.start_logits.argmax(dim=1) != targets
    assert 0 < wrong.sum() < len(wrong)
    assert torch.equal(paths.source, targets)
    for found in (paths.margins, paths.l2, paths.linf, paths.steps, paths.bound):
        assert not found[wrong].any()
    assert paths.success[wrong].all()
    assert not paths.shielded[wrong].any()
    assert torch.equal(paths.first_hit[wrong], paths.start_logits.argmax(dim=1)[wrong][:, None].expand(-1, 5))
    none = trace_fisher_rao_paths(model, inputs[wrong], labels=targets[wrong])  # no path is traced at all
    assert torch.equal(none.first_hit, paths.first_hit[wrong])
    alone = trace_fisher_rao_paths(model, inputs[~wrong])
    torch.testing.assert_close(paths.margins[~wrong], alone.margins)
    assert (alone.margins > 0).all()


def test_by_default_paths_aim_at_every_other_class() -> None:
    model, inputs, _ = build("mlp")
    paths = trace_fisher_rao_paths(model, inputs)
    for source, targets in zip(paths.source.tolist(), paths.targets.tolist(), strict=True):
        assert targets == [c for c in range(6) if c != source]


def test_paths_aim_where_they_are_told_to_one_class_for_all_or_several_for_each() -> None:
    model, inputs, _ = build("mlp")
    every = trace_fisher_rao_paths(model, inputs)
    chosen = every.targets[:, [3, 0]]
    some = trace_fisher_rao_paths(model, inputs, targets=chosen)
    assert torch.equal(some.targets, chosen)
    torch.testing.assert_close(some.margins, every.margins[:, [3, 0]])
    unused = [c for c in range(6) if c not in every.source]
    assert unused
    for_all = trace_fisher_rao_paths(model, inputs, targets=torch.tensor(unused))
    each = trace_fisher_rao_paths(model, inputs, targets=torch.tensor([unused] * 9))
    assert torch.equal(for_all.targets, each.targets)
    assert torch.equal(for_all.margins, each.margins)


def test_samples_are_traced_each_for_itself_whatever_the_order_and_how_many_at_once() -> None:
    model, inputs, _ = build("cnn_batchnorm", num_samples=5)
    expected = trace_fisher_rao_paths(model, inputs)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    for chunk_size in (1, 4):
        paths = trace_fisher_rao_paths(model, inputs[order], chunk_size=chunk_size)
        torch.testing.assert_close(paths.margins, expected.margins[order], rtol=1e-4, atol=1e-4)
        assert torch.equal(paths.first_hit, expected.first_hit[order])
        assert torch.equal(paths.steps, expected.steps[order])
    parts = [trace_fisher_rao_paths(model, part) for part in inputs.split(3)]
    torch.testing.assert_close(FisherRaoPaths.joined(parts).margins, expected.margins, rtol=1e-4, atol=1e-4)


def test_finished_paths_make_room_for_others() -> None:
    model, inputs, _ = build("cnn_batchnorm")
    recorder = Recorder(model)
    paths = trace_fisher_rao_paths(recorder, inputs, chunk_size=7)
    sizes = recorder.record.batch_sizes
    assert max(sizes) == 7
    assert len(set(paths.steps.flatten().tolist())) > 3  # paths of different lengths
    steps = int(paths.steps.sum())
    # nine backward passes per step, with as many steps as possible at once, and ten for at most seven new paths
    assert recorder.record.num_input_backwards < 1.35 * 9 * steps / 7 + 10 * paths.steps.numel() / 2


def test_paths_of_one_sample_begin_together() -> None:
    model, inputs, _ = build("cnn_batchnorm", num_samples=4)
    recorder = Recorder(model)
    paths = trace_fisher_rao_paths(recorder, inputs, chunk_size=100)
    sizes = recorder.record.batch_sizes
    assert sizes[:2] == [4, 36]  # all samples, all paths at the start
    assert sizes[2:5] == [4, 36, 36]  # at the start, in the middle of the first step, at its end
    assert paths.steps.max() > 1


# --- where no path leads --------------------------------------------------------------------------------------------


class Walled(nn.Module):
    """No path leaves the first of three classes: the gap to the others shrinks but never closes."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), -1)
        first = 1 + 1 / (1 + x.square().sum(dim=1))
        return torch.stack([first, x[:, 0].tanh() * 0.5, x[:, 1].tanh() * 0.5], dim=1)


@every_solver
@pytest.mark.parametrize("mode", ["path", "unit_steps"])
def test_an_unreachable_target_ends_without_success_at_the_last_step(solver: Any, mode: Any) -> None:
    recorder = Recorder(Walled())
    paths = trace_fisher_rao_paths(recorder, random(0, 4, 3), max_steps=7, solver=solver, mode=mode)
    assert not paths.success.any()
    assert (paths.first_hit == -1).all()
    assert (paths.steps == 7).all()
    assert (paths.margins > 0).all()
    assert len(recorder.record.batch_sizes) < 30


def test_where_no_gradient_leads_on_a_path_ends_at_once() -> None:
    flat = trace_fisher_rao_paths(Linear(torch.zeros(3, 4), torch.tensor([1.0, 0.0, 0.0])), torch.ones(2, 4))
    assert not flat.success.any()
    assert not flat.steps.any()
    assert not flat.margins.any()


def test_in_a_range_that_is_too_narrow_a_path_ends_at_its_corner() -> None:
    model, inputs = Linear(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), torch.tensor([10.0, 0.0])), torch.zeros(1, 2)
    paths = trace_fisher_rao_paths(model, inputs, valid_range=(-1, 1))
    assert not paths.success.any()
    assert paths.steps < 100
    assert float(paths.linf) == 1
    torch.testing.assert_close(paths.logits[0, 0], torch.tensor([7.0, 3.0]))


def test_a_path_that_leaves_what_the_network_can_compute_ends_where_it_could() -> None:
    class Bounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([2 * (x[:, 0] + 1).log() + 9, x[:, 0]], dim=1).where(x > -0.5, torch.nan)

    paths = trace_fisher_rao_paths(Bounded(), torch.zeros(2, 1), max_euclidean_step=0.2, step_length=10)
    assert not paths.success.any()
    assert paths.logits.isfinite().all()
    assert paths.margins.isfinite().all()
    assert ((paths.steps > 0) & (paths.steps < 100)).all()


def test_where_the_middle_of_a_step_has_no_gradient_the_step_at_the_start_is_taken() -> None:
    def steep(x: Tensor) -> Tensor:
        return torch.stack([3 * torch.tanh(20 * x[:, 0]), 0 * x[:, 0]], dim=1)

    paths = trace_fisher_rao_paths(steep, torch.tensor([[0.4], [0.3], [0.2], [0.05]]).double())
    assert paths.success.all()
    torch.testing.assert_close(paths.margins, paths.bound, rtol=0, atol=1e-5)


@every_solver
def test_no_step_leads_away_from_the_target_and_so_no_path_goes_round_in_circles(solver: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3)]
        model, inputs = nn.Sequential(*layers), torch.randn(30, 4)
    for layer in (0, 2, 4):
        layers[layer].weight.data *= 3
    few, many = (trace_fisher_rao_paths(model, inputs, max_steps=n, solver=solver) for n in (3, 200))
    assert few.success.double().mean() < 0.95
    assert many.success.double().mean() > 0.95
    assert few.margins.max() < 6
    ended = ~many.success
    assert (many.steps[ended] < 200).all()  # at a point from where the gap closes no further
    row, column = torch.arange(30)[:, None], torch.arange(2)
    for paths in (few, many):
        gap = paths.logits[row, column, paths.source[:, None]] - paths.logits[row, column, paths.targets]
        start = paths.start_logits.gather(1, paths.source[:, None]) - paths.start_logits.gather(1, paths.targets)
        assert (gap < start).all()


def test_functions_without_a_graph_that_squeeze_or_return_another_precision_are_traced_as_they_can_be() -> None:
    weight, inputs = random(0, 4, 3, dtype=torch.float32), random(1, 5, 4, dtype=torch.float32)
    expected = trace_fisher_rao_paths(lambda x: x @ weight, inputs)
    for network in (lambda x: x.double() @ weight.double(), lambda x: (x @ weight).squeeze()):
        paths = trace_fisher_rao_paths(network, inputs)
        torch.testing.assert_close(paths.margins, expected.margins, rtol=1e-4, atol=1e-4)
    for solver in ("gram", "cg"):
        constant = trace_fisher_rao_paths(lambda x: weight[:1].expand(len(x), -1), inputs, solver=solver)
        assert not constant.success.any()
        assert not constant.steps.any()


# --- units ----------------------------------------------------------------------------------------------------------

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def test_all_lengths_are_in_units_of_the_un_normalised_input() -> None:
    model, inputs, _ = build("cnn_batchnorm")
    raw = (0.5 + 0.2 * inputs).clamp(0, 1)
    whole, inner = Normalised(model, MEAN, STD), normalise(raw, MEAN, STD)
    for options in ({}, {"valid_range": (0.0, 1.0)}, {"mode": "unit_steps", "damping": 1.0}):
        expected = trace_fisher_rao_paths(whole, raw, **options)
        actual = trace_fisher_rao_paths(model, inner, input_std=STD, input_mean=MEAN, **options)
        for field in ("margins", "l2", "linf", "logits"):
            torch.testing.assert_close(getattr(actual, field), getattr(expected, field), rtol=1e-3, atol=1e-3)
        assert torch.equal(actual.first_hit, expected.first_hit)


@pytest.mark.parametrize("unit", [1 / 255, 1.0, 255.0])
def test_the_defaults_follow_the_unit_of_the_input(unit: float) -> None:
    model, inputs, _ = build("mlp")
    expected = trace_fisher_rao_paths(model.double(), inputs.double())
    actual = trace_fisher_rao_paths(model, inputs.double(), input_std=unit)
    torch.testing.assert_close(actual.margins, expected.margins, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actual.l2, unit * expected.l2, rtol=1e-9, atol=0)


def test_paths_stay_within_the_valid_range_except_where_they_begin_outside() -> None:
    model, inputs, _ = build("cnn_batchnorm")
    raw = (0.5 + 0.3 * inputs).clamp(0, 1)
    raw[0, 0, 0, 0] = 1.2
    seen = []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return model.eval()(x)

    trace_fisher_rao_paths(watched, raw, valid_range=(0, 1))
    everything = torch.cat(seen)
    assert everything.min() >= 0
    assert everything.max() <= 1.2
    elsewhere = everything.flatten(1)[:, 1:]
    assert elsewhere.max() <= 1


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), max_euclidean_step=st.sampled_from([0.01, 0.1, 1.0]))
def test_no_step_is_longer_than_its_euclidean_bound(seed: int, max_euclidean_step: float) -> None:
    model, inputs, _ = build("mlp", num_samples=3, seed=seed)
    paths = trace_fisher_rao_paths(model, inputs, max_euclidean_step=max_euclidean_step, max_steps=20)
    assert (paths.l2 <= paths.steps * max_euclidean_step * (1 + 1e-5)).all()


def test_unit_steps_have_length_one_and_are_counted() -> None:
    model, inputs, _ = build("cnn_batchnorm", num_samples=5)
    model, inputs = model.double().eval(), inputs.double()
    paths = trace_fisher_rao_paths(model, inputs, damping=0.5, mode="unit_steps", max_steps=12)
    for n, x in enumerate(inputs):
        for k, target in enumerate(paths.targets[n].tolist()):
            source, here, steps = int(paths.source[n]), x, 0
            while int(model(here[None].clone()).argmax()) == source and steps < 12:
                v, _, g = dense_natural_gradient(model, here, source=source, target=target, damping=0.5)
                here = here - (v / (g @ v).sqrt()).view(x.shape)
                steps += 1
            assert int(paths.margins[n, k]) == steps == int(paths.steps[n, k])
            assert float(paths.l2[n, k]) == pytest.approx(float((here - x).norm()), rel=1e-5)


# --- a guest --------------------------------------------------------------------------------------------------------


@every_context
@every_solver
@every_network
def test_the_network_is_left_as_it_was_in_any_context(
    name: str, solver: Any, context: Callable[[], AbstractContextManager[Any]]
) -> None:
    model, inputs, _ = build(name, num_samples=2)
    before, given = state_of(model), inputs.clone()
    expected = trace_fisher_rao_paths(model, inputs, max_steps=2, solver=solver)
    with context():
        paths = trace_fisher_rao_paths(model, given, max_steps=2, solver=solver)
    assert state_of(model) == before
    assert torch.equal(given, inputs)
    torch.testing.assert_close(paths.margins, expected.margins, rtol=1e-5, atol=1e-5)
    assert not paths.logits.requires_grad


def test_networks_in_half_precision_are_traced_as_their_copies_in_single_precision() -> None:
    model, inputs, _ = build("mlp")
    half = trace_fisher_rao_paths(model.bfloat16(), inputs.bfloat16())
    single = trace_fisher_rao_paths(model.float(), inputs.bfloat16().float())
    assert half.margins.dtype == torch.float32
    torch.testing.assert_close(half.margins, single.margins)


@pytest.mark.long
def test_memory_is_bounded_by_the_chunk_size_and_not_by_the_number_of_paths() -> None:
    model, inputs, _ = build("cnn_batchnorm", num_samples=48)
    targets = (model.eval()(inputs).argmax(dim=1, keepdim=True) + torch.tensor([1, 2, 3])) % 10
    peaks = {}
    for num_samples in (12, 48):
        for chunk_size in (2, 20):
            with PeakMemory() as memory:
                trace_fisher_rao_paths(
                    model, inputs[:num_samples], targets=targets[:num_samples], chunk_size=chunk_size, max_steps=1
                )
            peaks[num_samples, chunk_size] = memory.peak
    more = 36 * 3 * inputs[0].nbytes  # an input for each path more
    assert peaks[48, 2] < peaks[12, 20] / 4
    assert peaks[48, 2] - peaks[12, 2] < more
    assert peaks[48, 20] - peaks[12, 20] < more


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": torch.tensor([[0, 1]])}, r"targets` to hold K ≥ 1 classes, of shape \(9, K\) or \(K,\), but got"),
        ({"targets": torch.tensor([6])}, "`targets` to lie between 0 and 5"),
        (
            {"targets": torch.arange(6)},
            r"than the one to leave, but got shape \(6,\) with class . for sample 0",
        ),
        ({"targets": [1, 2]}, r"`targets` to be a tensor \(N, K\) or \(K,\), but got list"),
        ({"labels": torch.full((9,), 6)}, "`labels` to lie between 0 and 5"),
        ({"labels": torch.zeros(8, dtype=torch.long)}, "`labels` to hold one class index per sample"),
        ({"damping": 0.0}, "`damping` to be a positive number or None, but got 0.0"),
        ({"step_length": -1.0}, "`step_length` to be a positive number or None, but got -1.0"),
        ({"max_euclidean_step": math.inf}, "`max_euclidean_step` to be a positive number or None, but got inf"),
        ({"max_steps": 0}, "`max_steps` to be a positive integer, but got 0"),
        ({"solver": "lu"}, "`solver` to be one of"),
        ({"mode": "exact"}, "`mode` to be one of"),
        (
            {"mode": "unit_steps", "step_length": 0.5},
            "None in mode 'unit_steps', whose steps have length 1, but got 0.5",
        ),
        ({"chunk_size": 0}, "`chunk_size` to be a positive integer"),
        ({"valid_range": (1, 0)}, "`valid_range` to be"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    model, inputs, _ = build("mlp")
    with pytest.raises((ValueError, TypeError), match=message):
        trace_fisher_rao_paths(model, inputs, **options)


def test_values_that_are_not_probabilities_are_refused() -> None:
    p = torch.tensor([[0.5, 0.5]])
    for wrong in (torch.tensor([[1.0, 1.0]]), torch.tensor([[1.5, -0.5]]), torch.tensor([[torch.nan, 0.5]])):
        with pytest.raises(ValueError, match="`q` to hold probabilities, not negative and with sum 1"):
            fisher_rao_distance(p, wrong)
        with pytest.raises(ValueError, match="`probs` to hold probabilities"):
            fisher_rao_margin_bound(wrong, torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(ValueError, match="as many classes in `p` as in `q`, but got 2 and 3"):
        fisher_rao_distance(p, torch.full((1, 3), 1 / 3))
    with pytest.raises(ValueError, match="that broadcast"):
        fisher_rao_distance(p.expand(2, 2), p.expand(3, 2))
    with pytest.raises(TypeError, match="`p` to be floating point"):
        fisher_rao_distance(torch.tensor([1, 0]), p)
    with pytest.raises(ValueError, match=r"of shape \(N, C\)"):
        fisher_rao_margin_bound(p[0], torch.tensor(0), torch.tensor(1))
    with pytest.raises(ValueError, match="`target` to lie between 0 and 1"):
        fisher_rao_margin_bound(p, torch.tensor([0]), torch.tensor([2]))
