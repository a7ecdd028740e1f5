"""Descriptions of failures, and the joint status of several processes."""

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_robust import Probe
from lightning_robust.callbacks.monitor import diagnostics
from lightning_robust.callbacks.monitor.batch_reading import read_batch
from lightning_robust.callbacks.monitor.overhead import Times
from lightning_robust.callbacks.monitor.status import WHOLE, Failure, JointStatus, Status
from lightning_robust.functional import linearize

IMAGES, CLASSES = torch.ones(3, 2, 4, 4), torch.tensor([0, 1, 2])


class Checks(nn.Module):
    """A user's network whose errors read like those of this package."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("Expected argument `mask` to be a tensor, but got None.")


def failure(step: Any) -> Failure:
    with pytest.raises((ValueError, TypeError, RuntimeError, MisconfigurationException)) as caught:
        step()
    return Failure.of(caught.value)


@pytest.mark.parametrize(
    ("step", "kind", "words"),
    [
        (lambda: linearize(nn.Conv2d(3, 1, 2), IMAGES), "raised", "RuntimeError: Given groups=1, weight of size"),
        (lambda: linearize(nn.Conv2d(2, 1, 2), torch.ones(3, 4)), "raised", "RuntimeError: Expected 3D (unbatched)"),
        (lambda: linearize(nn.LSTM(4, 2), IMAGES), "raised", "ValueError: LSTM: Expected input to be 2D or 3D"),
        (lambda: linearize(Checks(), IMAGES), "raised", "ValueError: Expected argument `mask`"),
        (lambda: linearize(nn.Identity(), IMAGES), "refused", "Expected the model to return logits of shape (N, C)"),
        (lambda: Probe(nn.Identity(), [1.0], CLASSES), "refused", "TypeError: Expected argument `inputs`"),
        (
            lambda: read_batch(nn.Identity(), [1], probe_fn=None, defaults={}),  # type: ignore[arg-type]
            "refused",
            "MisconfigurationException: Expected batches",
        ),
    ],
    ids=["groups", "dimensions", "recurrent", "their own check", "outputs", "inputs", "batch"],
)
def test_errors_of_this_package_are_recognised_by_where_they_were_raised(step: Any, kind: str, words: str) -> None:
    found = failure(step)
    assert found.kind == kind
    assert words in found.message
    sentence = diagnostics.skipped({WHOLE: found}, {0: "FisherSpectralNorm"}, epoch=3)
    assert (
        "If the module is not called as `module(inputs)`, pass `probe_fn=lambda module, batch: Probe(" in sentence
    ) == (kind == "raised")


def test_the_statuses_of_all_processes_are_joined() -> None:
    first, second = Failure("raised", "OSError: first"), Failure("refused", "ValueError: second")
    other = Failure("raised", "OSError: other")
    joint = JointStatus.of(
        [
            Status({0: first}, num_samples=3, seconds=1.0, key=5, times=Times(10.0, 2.0, 1.0)),
            Status({0: second, 1: other}, num_samples=4, seconds=2.0, key=None, times=Times(8.0, 4.0, 0.5)),
            Status(num_samples=0, seconds=0.5, key=6),
        ]
    )
    assert joint.failures == {0: first, 1: other}
    assert (joint.num_samples, joint.seconds, joint.disagree, joint.overhead) == (7, 2.0, True, 0.4)


def test_no_samples_on_any_process_is_a_failure() -> None:
    joint = JointStatus.of([Status(), Status()])
    assert list(joint.failures) == [WHOLE]
    assert "Expected at least one validation sample" in joint.failures[WHOLE].message
    assert not joint.disagree
