import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_robust.functional import (
    ClassShielding,
    Estimate,
    FisherRaoPaths,
    class_shielding,
    trace_fisher_rao_paths,
)
from tests.helpers.networks import Linear, build

C = 4


def random_paths(seed: int, *, num_samples: int = 60, num_classes: int = C) -> FisherRaoPaths:
    """Paths made without a network: some reach their target, some another class, some none."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    n, k = num_samples, num_classes - 1
    source = (uniform(n) * num_classes).long()
    others = torch.arange(k).expand(n, k)
    targets = others + (others >= source[:, None])
    elsewhere = (source[:, None] + 1 + (uniform(n, k) * k).long()) % num_classes
    first_hit = torch.where(uniform(n, k) < 0.5, targets, elsewhere)
    success = uniform(n, k) < 0.8
    misclassified = (uniform(n) < 0.1)[:, None]
    success = success | misclassified
    first_hit = torch.where(misclassified, targets[:, :1], first_hit).where(success, -1)
    steps = torch.where(misclassified, 0, 1 + (uniform(n, k) * 5).long())
    lengths = [uniform(n, k) * (1 + source[:, None]) * ~misclassified for _ in range(4)]
    return FisherRaoPaths(
        source=source,
        targets=targets,
        margins=lengths[0] + lengths[3],
        l2=lengths[1],
        linf=lengths[2],
        first_hit=first_hit,
        success=success,
        steps=steps,
        bound=lengths[3],
        start_logits=torch.zeros(n, num_classes),
        logits=torch.zeros(n, k, num_classes),
    )


class Path(NamedTuple):
    sample: int
    source: int
    target: int
    hit: int
    left: bool
    traced: bool
    success: bool
    values: dict[str, float]


def one_by_one(paths: FisherRaoPaths) -> Iterator[Path]:
    for n, source in enumerate(paths.source.tolist()):
        for k, target in enumerate(paths.targets[n].tolist()):
            success, steps = bool(paths.success[n, k]), int(paths.steps[n, k])
            values = {name: float(getattr(paths, name)[n, k]) for name in ("margins", "bound", "l2", "linf")}
            left = success and steps > 0
            traced = left or not success
            yield Path(n, source, target, int(paths.first_hit[n, k]), left, traced, success, values)


def counted(
    paths: FisherRaoPaths, top: Callable[[Path], float], bottom: Callable[[Path], float], *, share: bool
) -> tuple[float, float]:
    """A ratio of sums over paths, with its error from the sums of each sample, by plain loops."""
    sums: dict[int, list[float]] = {}
    for path in one_by_one(paths):
        if bottom(path):
            of_sample = sums.setdefault(path.sample, [0.0, 0.0])
            of_sample[0] += top(path)
            of_sample[1] += bottom(path)
    rows = list(sums.values())
    total = sum(b for _, b in rows)
    if not total:
        return math.nan, math.nan
    ratio = sum(a for a, _ in rows) / total
    if len(rows) < 2:
        return ratio, math.nan
    if share:
        each = total / len(rows)
        rows += [[each, each]] * 2 + [[0.0, each]] * 2
        total = sum(b for _, b in rows)
    centre = sum(a for a, _ in rows) / total
    scatter = sum((a - centre * b) ** 2 for a, b in rows)
    return ratio, math.sqrt(len(rows) / (len(rows) - 1) * scatter) / total


def assert_estimates(actual: Estimate, index: tuple[int, ...], expected: tuple[float, float]) -> None:
    for found, wanted in zip((actual.value, actual.stderr), expected, strict=True):
        assert float(found[index]) == pytest.approx(wanted, rel=1e-9, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("num_samples", [1, 3, 60])
@pytest.mark.parametrize("seed", range(3))
def test_shares_and_means_are_those_of_plain_counting(seed: int, num_samples: int) -> None:
    paths = random_paths(seed, num_samples=num_samples)
    found = class_shielding(paths, C)
    for a in range(C):
        shielded = counted(paths, lambda p: p.hit != p.target, lambda p, a=a: p.left and p.source == a, share=True)
        assert_estimates(found.shielded, (a,), shielded)
        arrived = counted(paths, lambda p: p.left, lambda p, a=a: p.traced and p.source == a, share=True)
        assert_estimates(found.success, (a,), arrived)
        elsewhere = counted(paths, lambda p: p.hit != p.target, lambda p, a=a: p.left and p.hit == a, share=True)
        assert_estimates(found.shielding, (a,), elsewhere)
        intercepted = counted(
            paths, lambda p, a=a: p.hit == a, lambda p, a=a: p.left and a not in (p.source, p.target), share=True
        )
        assert_estimates(found.interception, (a,), intercepted)
        for name, key in (("margin", "margins"), ("l2", "l2"), ("linf", "linf")):
            mean = counted(
                paths, lambda p, key=key: p.values[key], lambda p, a=a: p.success and p.source == a, share=False
            )
            assert_estimates(getattr(found, name), (a,), mean)
        detour = counted(
            paths,
            lambda p: p.values["margins"],
            lambda p, a=a: p.values["bound"] if p.success and p.source == a else 0.0,
            share=False,
        )
        assert_estimates(found.excess, (a,), detour)
        for b in range(C):
            entered = counted(paths, lambda p, b=b: p.hit == b, lambda p, a=a: p.left and p.source == a, share=True)
            assert_estimates(found.path_matrix, (a, b), entered)
            in_the_way = counted(
                paths,
                lambda p, b=b: p.hit == b,
                lambda p, a=a, b=b: p.left and p.target == a and b not in (p.source, a),
                share=True,
            )
            assert_estimates(found.landscape, (a, b), in_the_way)


def test_first_hits_count_every_path_that_left_its_class_once() -> None:
    paths = random_paths(0)
    hits = class_shielding(paths, C).first_hits
    expected = torch.zeros(C, C, C, dtype=torch.long)
    for path in one_by_one(paths):
        if path.left:
            expected[path.source, path.target, path.hit] += 1
    assert torch.equal(hits, expected)
    assert hits.sum() == paths.has_left.sum()


def test_classes_rank_by_their_mean_margins_and_those_without_paths_do_not() -> None:
    paths = random_paths(0)
    paths = paths.rows(paths.source != 1)
    found = class_shielding(paths, C)
    assert found.vulnerability_rank[1] == 0
    assert found.margin.value[1].isnan()
    order = [int(c) for c in found.margin.value.nan_to_num(nan=-1).argsort(descending=True)]
    assert [int(found.vulnerability_rank[c]) for c in order] == [1, 2, 3, 0]


def test_the_asymmetry_compares_paths_from_robust_to_fragile_classes_with_those_back() -> None:
    paths = random_paths(3, num_samples=200)  # margins rise with the class
    found = class_shielding(paths, C)
    assert found.vulnerability_rank.tolist() == [4, 3, 2, 1]
    there = counted(
        paths,
        lambda p: p.hit != p.target,
        lambda p: p.left and p.source in (2, 3) and p.target in (0, 1),
        share=True,
    )
    back = counted(
        paths,
        lambda p: p.hit != p.target,
        lambda p: p.left and p.source in (0, 1) and p.target in (2, 3),
        share=True,
    )
    assert_estimates(found.robust_to_fragile, (), there)
    assert_estimates(found.fragile_to_robust, (), back)
    assert_estimates(found.asymmetry, (), (there[0] - back[0], math.hypot(there[1], back[1])))


def test_errors_cover_the_truth_although_paths_of_a_sample_go_together() -> None:
    """Each sample has its own chance of being shielded, like inputs near a third class."""
    covered: dict[str, list[bool]] = {"shielded": [], "margin": []}
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        paths = random_paths(seed, num_samples=40)
        paths = replace(paths, source=torch.zeros_like(paths.source), steps=torch.ones_like(paths.steps))
        chance = torch.rand(40, 1, generator=generator)  # 0.5 on average
        shielded = torch.rand(40, C - 1, generator=generator) < chance
        targets = torch.arange(1, C).expand(40, -1)
        paths = replace(
            paths,
            targets=targets,
            success=torch.ones_like(paths.success),
            first_hit=torch.where(shielded, 1 + targets % (C - 1), targets),
            margins=chance.expand(-1, C - 1) + 0.1 * shielded,  # 0.55 on average
        )
        found = class_shielding(paths, C)
        for name, truth in (("shielded", 0.5), ("margin", 0.55)):
            estimate = getattr(found, name)
            covered[name].append(bool((estimate.value[0] - truth).abs() <= 2 * estimate.stderr[0]))
    for hits in covered.values():
        assert 0.92 <= sum(hits) / len(hits) <= 0.98


def test_a_share_that_all_samples_agree_on_is_not_known_exactly() -> None:
    paths = random_paths(0)
    paths = replace(paths, first_hit=paths.targets, success=torch.ones_like(paths.success))
    found = class_shielding(paths, C)
    assert torch.equal(found.shielded.value, torch.zeros(C, dtype=torch.float64))
    assert (found.shielded.stderr > 0.02).all()


def test_it_does_not_matter_how_many_samples_are_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = random_paths(0)
    expected = class_shielding(paths, C)
    module = importlib.import_module(
        "lightning_robust.functional.fisher_rao.class_shielding"
    )  # not the function of that name
    monkeypatch.setattr(module, "_ELEMENTS", 7 * C * C)
    assert_equal(class_shielding(paths, C), expected)


def assert_equal(actual: ClassShielding, expected: ClassShielding) -> None:
    for field in fields(ClassShielding):
        found, wanted = getattr(actual, field.name), getattr(expected, field.name)
        pairs = (
            [(found, wanted)]
            if isinstance(found, Tensor)
            else zip(vars(found).values(), vars(wanted).values(), strict=True)
        )
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_a_class_between_two_others_shields_them_from_each_other() -> None:
    """Three classes along a line: the path from one end to the other leads through the middle."""
    model = Linear(torch.tensor([[-3.0], [0.0], [3.0]]), torch.tensor([-2.0, 0.0, -2.0]))
    inputs = torch.tensor([[-1.5], [-1.2], [1.1], [1.4]])
    found = class_shielding(trace_fisher_rao_paths(model, inputs), 3)
    assert found.first_hits.nonzero().tolist() == [[0, 1, 1], [0, 2, 1], [2, 0, 1], [2, 1, 1]]
    assert found.interception.value[1] == 1
    assert found.landscape.value[2, 1] == found.landscape.value[0, 1] == 1
    assert found.shielding.value[1] == 0.5


def test_paths_of_a_network_are_counted_whatever_their_type_of_numbers() -> None:
    model, inputs, targets = build("cnn_batchnorm")
    for dtype in (torch.float32, torch.float64):
        paths = trace_fisher_rao_paths(model.to(dtype), inputs.to(dtype), labels=targets)
        found = class_shielding(paths, 10)
        assert found.margin.value.dtype == torch.float64
        assert found.shielded.value.nanmean() > 0
        counted_margin = paths.margins[paths.source == targets[0]].double().mean()
        torch.testing.assert_close(found.margin.value[targets[0]], counted_margin)


def test_what_are_no_paths_or_other_classes_is_refused() -> None:
    with pytest.raises(TypeError, match="`paths` to be FisherRaoPaths, but got list"):
        class_shielding([], 3)  # type: ignore[arg-type]
    for wrong in (3, 5, 0, 4.0):
        with pytest.raises(ValueError, match="`num_classes` to be"):
            class_shielding(random_paths(0), wrong)  # type: ignore[arg-type]
