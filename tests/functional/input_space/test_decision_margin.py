"""Distances found by labels alone: never below the exact margin, and equal to it where the shortest way is given."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor

from lightning_robust.functional import decision_margin, linearize, linearized_margin, linearized_margin_linf
from recipes.common.digits import digits
from tests.helpers.networks import build, normalise, random, random_linear

MODEL = random_linear(0, num_classes=5, num_features=20)
INPUTS = random(1, 40, 20)
TARGETS = MODEL(INPUTS).argmax(dim=1)
TARGETS[::7] = (TARGETS[::7] + 1) % 5
RIGHT = MODEL(INPUTS).argmax(dim=1) == TARGETS
every_norm = pytest.mark.parametrize("norm", ["l2", "linf"])


def labels(x: Tensor) -> Tensor:
    return MODEL(x).argmax(dim=1)


def exact(norm: str, **options: Any) -> Tensor:
    found = linearize(MODEL, INPUTS, **options)
    if norm == "l2":
        return linearized_margin(found.logits, found.gram, TARGETS)
    assert found.gap_l1 is not None
    return linearized_margin_linf(found.logits, found.gap_l1, TARGETS)


def shortest_ways(norm: str) -> Tensor:
    """Towards all boundaries of a linear model, (N, C, D); the way to a sample's own class is none."""
    ways = MODEL.weight.detach()[None] - MODEL.weight.detach()[TARGETS][:, None]
    return ways if norm == "l2" else ways.sign()


@every_norm
@pytest.mark.parametrize("num_directions", [1, 20])
def test_it_is_never_below_the_exact_margin(norm: Any, num_directions: int) -> None:
    margins = decision_margin(labels, INPUTS, TARGETS, norm=norm, num_directions=num_directions)
    assert (margins[RIGHT] >= exact(norm)[RIGHT]).all()
    assert (margins[~RIGHT] == 0).all()
    assert (margins[RIGHT] > 0).all()
    if num_directions == 20:
        assert (margins[RIGHT] < 4.5 * exact(norm)[RIGHT]).all()


@every_norm
def test_it_is_the_exact_margin_if_the_shortest_way_is_among_the_directions(norm: Any) -> None:
    margins = decision_margin(labels, INPUTS, TARGETS, norm=norm, num_directions=1, directions=shortest_ways(norm))
    torch.testing.assert_close(margins, exact(norm), rtol=1e-7, atol=0)
    assert (margins >= exact(norm) * (1 - 1e-12)).all()


def test_distances_are_in_units_of_the_unnormalised_input() -> None:
    directions = shortest_ways("l2")
    margins = decision_margin(labels, INPUTS, TARGETS, num_directions=1, directions=directions, input_std=0.25)
    torch.testing.assert_close(margins, exact("l2", input_std=0.25), rtol=1e-7, atol=0)


@every_norm
def test_normalised_images_have_the_distances_of_their_pixels(norm: Any) -> None:
    model, raw, _ = build("cnn_batchnorm")
    model, raw = model.double().eval(), raw.double().clamp(-1, 1)
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    options = {"norm": norm, "num_directions": 6, "valid_range": (-1, 1), "directions": random(5, 9, 2, 3, 7, 7)}

    def of_pixels(x: Tensor) -> Tensor:
        return model(normalise(x, mean, std)).argmax(dim=1)

    targets = of_pixels(raw)
    inside = decision_margin(of_pixels, raw, targets, **options)
    images = normalise(raw, mean, std)
    constants = {"input_std": std, "input_mean": mean}
    outside = decision_margin(lambda x: model(x).argmax(dim=1), images, targets, **options, **constants)
    predicted = linearize(model, images, **constants)
    assert inside.isfinite().all()
    assert outside.isfinite().all()
    assert 0.5 < float((outside / inside).median()) < 2  # other random directions
    nearest = linearized_margin(predicted.logits, predicted.gram, targets)
    assert norm == "linf" or (outside > 0.5 * nearest).all()


@every_norm
def test_no_query_leaves_the_valid_range_or_the_largest_distance(norm: Any) -> None:
    inputs, seen = INPUTS.clamp(-1, 1), []

    def watched(x: Tensor) -> Tensor:
        seen.append(x)
        return labels(x)

    targets = labels(inputs)
    margins = decision_margin(watched, inputs, targets, norm=norm, valid_range=(-1, 1))
    assert all(bool((x.abs() <= 1 + 1e-12).all()) for x in seen)
    assert (margins > 0).all()
    seen.clear()
    near = decision_margin(watched, inputs, targets, norm=norm, max_distance=0.3)
    order = 2 if norm == "l2" else torch.inf
    distances = [torch.cdist(x, inputs, p=order).amin(dim=1).max() for x in seen]
    assert max(distances) <= 0.3 + 1e-9
    assert ((near <= 0.3) | near.isinf()).all()
    assert near.isinf().any()


def test_more_directions_and_longer_searches_are_never_worse_than_the_samples_of_other_classes() -> None:
    margins = decision_margin(labels, INPUTS, TARGETS, num_directions=2)
    apart = torch.cdist(INPUTS, INPUTS).masked_fill(labels(INPUTS)[:, None] == labels(INPUTS)[None], torch.inf)
    assert (margins[RIGHT] <= apart.amin(dim=1)[RIGHT]).all()


def test_directions_are_those_of_the_sample_and_the_generator() -> None:
    def found(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return decision_margin(labels, INPUTS, TARGETS, num_directions=3, generator=generator)

    assert torch.equal(found(None), found(None))
    assert torch.equal(found(1), found(1))
    assert not torch.equal(found(1), found(2))
    chunked = decision_margin(labels, INPUTS, TARGETS, num_directions=3, chunk_size=1)
    torch.testing.assert_close(chunked, found(None))


def test_a_forest_has_a_margin_by_its_labels() -> None:
    images, targets = (part.numpy() for part in digits())
    images = images.reshape(len(images), -1).astype(float)
    forest = RandomForestClassifier(20, random_state=0).fit(images[:600], targets[:600])
    inputs, classes = images[1300:1316], targets[1300:1316]
    margins = decision_margin(forest.predict, inputs, classes, num_directions=10, valid_range=(0, 1))
    right = torch.tensor(forest.predict(inputs) == classes)
    assert right.any()
    assert torch.equal(margins > 0, right)
    assert margins.isfinite().all()


def test_a_network_in_train_mode_is_measured_in_eval_mode() -> None:
    model, inputs, _ = build("cnn_batchnorm")
    model.train()
    classes = linearize(model, inputs).logits.argmax(dim=1)

    class Labels(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).argmax(dim=1)

    assert (decision_margin(Labels(), inputs, classes, num_directions=4) > 0).all()
    assert model.training


def test_a_label_that_never_changes_has_no_boundary() -> None:
    margins = decision_margin(lambda x: np.ones(len(x), dtype=int), INPUTS.numpy(), np.ones(40, dtype=int))
    assert margins.isinf().all()


class Forgetful:
    """Labels everything right once, and then wrong in turn."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return labels(x) if self.calls % 2 else (labels(x) + 1) % 5


WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "scores": (MODEL, r"it returned shape \(\d+, 5\). Of scores take `.argmax\(1\)`"),
    "text": (lambda x: np.array(["cat"] * len(x)), "it returned ndarray"),
    "shares": (lambda x: MODEL(x).softmax(dim=1)[:, 0], "numbers that are no integers"),
    "one": (lambda x: torch.tensor(1), r"it returned shape \(\)"),
    "remembers calls": (Forgetful(), "another label when it is made again"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_are_no_labels_is_refused(kind: str) -> None:
    predict, sentence = WRONG[kind]
    with pytest.raises((TypeError, ValueError), match=sentence):
        decision_margin(predict, INPUTS, TARGETS)


def test_where_nothing_is_classified_correctly_all_margins_are_zero() -> None:
    model = random_linear(0, num_classes=3, num_features=4)
    inputs = random(1, 5, 4)
    wrong = (model(inputs).argmax(dim=1) + 1) % 3
    for rows in (slice(None), slice(1)):
        margins = decision_margin(lambda x: model(x).argmax(dim=1), inputs[rows], wrong[rows], num_directions=4)
        assert torch.equal(margins, torch.zeros(len(inputs[rows]), dtype=margins.dtype))
