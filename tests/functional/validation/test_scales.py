"""Scales that neither masked classes nor diverged samples set."""

import math

import pytest
import torch
from torch import Tensor

from lightning_robust.functional._validation.scales import (
    are_alone,
    computable,
    gaps_below_a_class,
    masked_classes,
    ordinary,
    tolerances,
)
from tests.helpers.networks import random

FILLS = [-1e3, -1e4, -65504.0, -1e9, -1e30, torch.finfo(torch.float32).min, -math.inf]


def filled(logits: Tensor, masked: Tensor, fill: float) -> Tensor:
    return logits.masked_fill(masked, fill)


@pytest.mark.parametrize("fill", FILLS, ids=str)
@pytest.mark.parametrize("num_samples", [1, 2, 64])
def test_masks_are_found_in_every_sample_whatever_fills_them(fill: float, num_samples: int) -> None:
    logits = 3 * random(0, num_samples, 10)
    same = torch.arange(10).expand(num_samples, -1) >= 6
    own = random(1, num_samples, 10).argsort(dim=1) >= 3  # seven of ten, others in every sample
    for masked in (same, own, torch.zeros_like(same)):
        assert torch.equal(masked_classes(filled(logits, masked, fill)), masked)
        if math.isfinite(fill):  # as in `logits + (1 - mask) * -1e4`
            assert torch.equal(masked_classes(logits + fill * masked), masked)


@pytest.mark.parametrize("fill", [-1e4, -1e9, -math.inf], ids=str)
def test_samples_of_a_single_class_are_found_beside_others(fill: float) -> None:
    masked = torch.zeros(20, 5, dtype=torch.bool)
    masked[::3, 1:] = True
    assert torch.equal(masked_classes(filled(2 * random(0, 20, 5), masked, fill)), masked)


@pytest.mark.parametrize("fill", [-1e3, -1e4, -1e9, -math.inf], ids=str)
@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_samples_of_a_single_class_are_found_in_any_batches(fill: float, num_classes: int) -> None:
    logits, masked = 2 * random(0, 30, num_classes), random(1, 30, num_classes).argsort(dim=1) >= 2
    masked[::4] = random(2, 8, num_classes).argsort(dim=1) > 0
    given = filled(logits, masked, fill)
    for size in (1, 4, 30):
        gaps, spans = (torch.cat(parts) for parts in zip(*map(gaps_below_a_class, given.split(size)), strict=True))
        assert torch.equal(are_alone(gaps, spans), (~masked_classes(given)).sum(dim=1) == 1)
    if num_classes > 2 or fill == -math.inf:
        assert torch.equal(are_alone(gaps, spans), torch.arange(30) % 4 == 0)
    assert not are_alone(*gaps_below_a_class(logits)).any()
    assert not are_alone(*gaps_below_a_class(given[:1])).any() or fill == -math.inf  # nothing to compare with
    assert not len(are_alone(torch.zeros(0), torch.zeros(0)))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 100.0, 1e4, 1e9])
@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
def test_no_class_of_an_ordinary_network_is_masked(num_classes: int, scale: float) -> None:
    logits = scale * random(0, 500, num_classes)
    tied = logits.clone()
    tied[::2, 1] = tied[::2, 0]  # the range of the two is 0
    for given in (logits, tied, logits.exp().log1p() if scale == 1 else logits, logits * 0):
        assert not masked_classes(given).any()


def test_a_diverged_sample_has_no_masks() -> None:
    logits = 3 * random(0, 256, 6)
    logits[5] *= 1e6
    assert not masked_classes(logits).any()


@pytest.mark.parametrize("factor", [1e3, 1e6, 1e30])
@pytest.mark.parametrize(("num_samples", "num_diverged"), [(2, 1), (9, 1), (256, 1), (256, 20)])
def test_only_diverged_samples_are_out_of_the_ordinary(num_samples: int, num_diverged: int, factor: float) -> None:
    sizes = random(0, num_samples).exp()
    assert ordinary(sizes).all()
    sizes[:num_diverged] = 5 * factor
    assert ordinary(sizes).logical_not().nonzero()[:, 0].tolist() == list(range(num_diverged))


def test_samples_without_any_size_do_not_make_others_diverge() -> None:
    sizes = torch.zeros(100)
    assert ordinary(sizes).all()
    sizes[:3] = 1.0
    assert ordinary(sizes).all()


@pytest.mark.parametrize("shape", [(8, 5), (8, 1), (8, 3, 4)])
def test_the_tolerance_of_a_sample_does_not_depend_on_one_that_has_diverged(shape: tuple[int, ...]) -> None:
    outputs = random(0, *shape)
    before = tolerances(outputs)
    outputs[3] *= 1e6
    after, others = tolerances(outputs), torch.arange(8) != 3
    torch.testing.assert_close(after[others], before[others], rtol=1, atol=0)  # the median may be another sample
    torch.testing.assert_close(after[3], 1e-4 * outputs[3].abs().max().expand_as(after[3]))


@pytest.mark.parametrize("fill", FILLS, ids=str)
def test_the_tolerance_of_a_sample_does_not_depend_on_masks(fill: float) -> None:
    outputs = random(0, 8, 4)
    whole = tolerances(torch.cat([outputs, torch.full((8, 3), fill, dtype=torch.float64)], dim=1))
    assert torch.equal(whole[:, :4], tolerances(outputs))
    if math.isfinite(fill):  # the masks themselves are rounded as coarsely as large numbers are
        torch.testing.assert_close(whole[:, 4:], torch.full_like(whole[:, 4:], -1e-4 * fill))


def test_only_masks_from_before_may_be_infinite() -> None:
    before = torch.tensor([[0.0, -math.inf], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    after = torch.tensor([[1.0, -math.inf], [1.0, -math.inf], [math.nan, 1.0], [1.0, 1.0]])
    assert computable(after, before).tolist() == [True, False, False, True]
