"""The monitor warns where it measures something other than what the validation step computes, and only there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust import Probe, RobustnessMonitor
from lightning_robust.callbacks.monitor.validation_witness import other_accuracy
from tests.helpers.networks import random
from tests.helpers.training import Classifier, loader, robustness_warnings, samples, trainer


def normalised(x: Tensor) -> Tensor:
    return (x - 0.25) / 0.05


class Step(Classifier):
    """Logs nothing by default, so that only what is called can tell."""

    def logits(self, x: Tensor) -> Tensor:
        return self(x)  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.logits(batch[0])


class Normalises(Step):
    def logits(self, x: Tensor) -> Tensor:
        return self(normalised(x))  # type: ignore[no-any-return]


class NormalisesForAChild(Step):
    def logits(self, x: Tensor) -> Tensor:
        return self.network(normalised(x))


class Resizes(Step):
    def logits(self, x: Tensor) -> Tensor:
        return self(nn.functional.interpolate(x, scale_factor=0.5).repeat(1, 1, 2, 2))  # type: ignore[no-any-return]


class GoesOn(Step):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self(x))


class PassesMore(Step):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(x)

    def logits(self, x: Tensor) -> Tensor:
        return self(x, scale=2.0)  # type: ignore[no-any-return]


class InHalfPrecision(Step):
    def logits(self, x: Tensor) -> Tensor:
        return self(x.bfloat16().float()).half()  # type: ignore[no-any-return]


class CallsAChild(Step):
    def logits(self, x: Tensor) -> Tensor:
        return self.network(x)


class CallsTwice(Step):
    def logits(self, x: Tensor) -> Tensor:
        return self(x.flip(-1)) + self(x)  # type: ignore[no-any-return]


class ChangesItsBatch(Step):
    def logits(self, x: Tensor) -> Tensor:
        z = self(x)
        x.zero_()
        return z  # type: ignore[no-any-return]


class WithAHeadInside(GoesOn):
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(super().forward(x))
        return z

    def logits(self, x: Tensor) -> Tensor:
        return self(x)  # type: ignore[no-any-return]


def said(module: Classifier, root: Path, **options: Any) -> list[str]:
    monitor = RobustnessMonitor(["linearized_accuracy"], on_error="raise", **options)
    with robustness_warnings() as messages:
        run = trainer(monitor, root=root)
        run.fit(module, loader(), loader())
    assert run.callback_metrics["robust/num_samples"] > 0
    return messages


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            Normalises,
            r"`validation_step` does not call the module on the .* from -[\d.]+ to [\d.]+, and the monitor",
        ),
        (NormalisesForAChild, r"`validation_step` does not call `network` on the inputs .*normalise\(batch\[0\]\)"),
        (Resizes, "`validation_step` does not call the module on the inputs"),
        (GoesOn, r"goes on after what .*`head`.*4 numbers per sample.*lambda x: module.head\(module\(x\)\)"),
        (PassesMore, "gets other outputs from the module than .*extras="),
    ],
)
def test_a_step_that_computes_something_else_is_reported_once(
    tmp_path: Path, kind: type[Classifier], sentence: str
) -> None:
    messages = said(kind(), tmp_path)
    assert len(messages) == 1
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(messages[0])


@pytest.mark.parametrize("kind", [Step, CallsAChild, CallsTwice, ChangesItsBatch, InHalfPrecision, WithAHeadInside])
def test_other_steps_are_not(tmp_path: Path, kind: type[Classifier]) -> None:
    assert said(kind(), tmp_path) == []


def test_the_remedies_silence_it(tmp_path: Path) -> None:
    def prepared(module: Any, batch: Any) -> Probe:
        return Probe(module, normalised(batch[0]), batch[1], input_mean=0.25, input_std=0.05)

    def wrapped(module: Any, batch: Any) -> Probe:
        return Probe(lambda x: module(normalised(x)), batch[0], batch[1], module=module)

    def whole(module: Any, batch: Any) -> Probe:
        return Probe(lambda x: module.head(module(x)), batch[0], batch[1], module=module)

    for probe_fn, kind in ((prepared, Normalises), (wrapped, Normalises), (whole, GoesOn)):
        assert said(kind(), tmp_path, probe_fn=probe_fn) == []


def test_no_hook_is_left_behind(tmp_path: Path) -> None:
    class Fails(Step):
        def logits(self, x: Tensor) -> Tensor:
            raise KeyError("nothing")

    for kind, error in ((Step, None), (Fails, KeyError)):
        module = kind()
        if error is None:
            said(module, tmp_path)
        else:
            with pytest.raises(error):
                trainer(RobustnessMonitor(), root=tmp_path).validate(module, loader())
        assert not any(inner._forward_hooks for inner in module.modules())


# --- accuracies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logged", "clean", "num_samples", "agrees"),
    [
        ({"val_acc": 1.0}, 0.84, 120, False),
        ({"val_acc": 1.0}, 0.25, 120, False),
        ({"val/Accuracy": 84.0}, 0.85, 120, True),  # in percent
        ({"val_acc": 0.9}, 0.77, 256, False),
        ({"val_acc": 0.9}, 0.87, 256, True),
        ({"val_acc": 0.9}, 0.7, 20, True),  # few samples tell little
        ({"val_acc": 0.5, "val_acc_micro": 0.8}, 0.8, 256, True),
        ({"val_acc_top5": 1.0, "val_loss": 0.1}, 0.5, 256, True),
        ({}, 0.5, 256, True),
    ],
)
def test_accuracies_are_compared_within_their_errors(
    logged: dict[str, float], clean: float, num_samples: int, agrees: bool
) -> None:
    sentence = other_accuracy(logged, clean, num_samples=num_samples)
    assert (sentence is None) == agrees
    if sentence is not None:
        assert next(iter(logged)) in sentence
        assert f"{clean:.3g}" in sentence


class Prototypes(Classifier):
    """Returns embeddings, and classifies by the nearest prototype, which is no module."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(16, 8)))
        self.prototypes = random(0, 4, 8, dtype=torch.float32)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        correct = torch.cdist(self(x), self.prototypes).argmin(dim=1) == y
        correct[:] = True  # a perfect classifier
        self.log("val_acc", correct.float().mean())


@pytest.mark.parametrize("run", ["fit", "validate", "test"])
def test_an_accuracy_of_something_else_is_reported(tmp_path: Path, run: str) -> None:
    module, data = Prototypes(), loader(samples(160))
    module.test_step = module.validation_step  # type: ignore[method-assign, assignment]
    with robustness_warnings() as messages:
        trainer_of_run = trainer(RobustnessMonitor(["linearized_accuracy"]), root=tmp_path)
        calls: dict[str, Callable[..., Any]] = {
            "fit": lambda: trainer_of_run.fit(module, data, data),
            "validate": lambda: trainer_of_run.validate(module, data, verbose=False),
            "test": lambda: trainer_of_run.test(module, data, verbose=False),
        }
        calls[run]()
    assert len(messages) == 1
    assert messages[0].startswith("The module logs `val_acc` 1, but of the 160 samples")
