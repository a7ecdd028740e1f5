"""The monitor warns where it measures something other than what the validation step computes, and only there."""

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from lightning_robust import Probe, RobustnessMonitor
from lightning_robust.callbacks.monitor import validation_witness
from lightning_robust.callbacks.monitor.logged_accuracy import CleanAccuracy, agreement, comparable
from lightning_robust.callbacks.monitor.validation_witness import LeftOut
from tests.helpers.networks import random
from tests.helpers.training import Classifier, classifier, loader, robustness_warnings, samples, trainer

FISHER = ["fisher_spectral_norm"]  # says nothing of ε


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


class InContainers(Step):
    """Its networks lie in containers that are never called."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.ModuleList([self.network])
        self.parts = nn.ModuleDict({"body": inner})
        del self.network

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.parts["body"][0](x)  # type: ignore[index]
        return z


class NormalisesForAContainer(InContainers):
    def logits(self, x: Tensor) -> Tensor:
        z: Tensor = self.parts["body"][0](normalised(x))  # type: ignore[index]
        return z


class InPieces(Step):
    def logits(self, x: Tensor) -> Tensor:
        return torch.cat([self(part) for part in x.split(2)])


class OneByOne(Step):
    def logits(self, x: Tensor) -> Tensor:
        return torch.cat([self(image[None]) for image in x])


class Permuted(Step):
    def logits(self, x: Tensor) -> Tensor:
        return self(x.flip(0))  # type: ignore[no-any-return]


class Filtered(Step):
    """Leaves out most samples, also all that are compared: every other one, or the first half."""

    kept = slice(1, None, 8)

    def logits(self, x: Tensor) -> Tensor:
        return self(x[self.kept])  # type: ignore[no-any-return]


class FilteredOut(Filtered):
    kept = slice(0)


class Flattened(Step):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)))

    def logits(self, x: Tensor) -> Tensor:
        return self(x.flatten(1))  # type: ignore[no-any-return]


class CopiesItself(Step):
    """Keeps a copy that it calls in every later validation, and one that went through a file."""

    def logits(self, x: Tensor) -> Tensor:
        network = copy.deepcopy(self.network)
        pickle.loads(pickle.dumps(self.network))(x)
        network(normalised(x))
        return self(x)  # type: ignore[no-any-return]


def said(module: Classifier, root: Path, data: Any = None, **options: Any) -> list[str]:
    monitor = RobustnessMonitor(options.pop("metrics", ["linearized_accuracy"]), on_error="raise", **options)
    data = loader() if data is None else data
    with robustness_warnings() as messages:
        run = trainer(monitor, root=root)
        run.fit(module, data, data)
    assert run.callback_metrics["robust/num_samples"] > 0
    return messages


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            Normalises,
            r"`validation_step` does not call the module on the .* from -[\d.]+ to [\d.]+, and the monitor",
        ),
        (
            NormalisesForAContainer,
            r"does not call `parts\['body'\]\[0\]` on the .*Probe\(module.parts\['body'\]\[0\], norm",
        ),
        (NormalisesForAChild, r"`validation_step` does not call `network` on the inputs .*normalise\(batch\[0\]\)"),
        (Resizes, "`validation_step` does not call the module on the inputs"),
        (GoesOn, r"goes on after what .*`head`.*4 numbers per sample.*lambda x: module.head\(module\(x\)\)"),
        (
            PassesMore,
            r"gets other outputs from the module than .*lambda x: module\(x, scale=…\).*extras=\{'scale': …\}",
        ),
    ],
)
def test_a_step_that_computes_something_else_is_reported_once(
    tmp_path: Path, kind: type[Classifier], sentence: str
) -> None:
    messages = said(kind(), tmp_path)
    assert len(messages) == 1
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(messages[0])


ORDINARY = [Step, CallsAChild, CallsTwice, ChangesItsBatch, InHalfPrecision, WithAHeadInside, InContainers, InPieces]
ORDINARY += [OneByOne, Permuted, Filtered, FilteredOut, Flattened, CopiesItself]


@pytest.mark.parametrize("kind", ORDINARY)
def test_other_steps_are_not(tmp_path: Path, kind: type[Classifier]) -> None:
    assert said(kind(), tmp_path) == []


class Wrapper(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Wraps(SingleDeviceStrategy):
    """Passes the step through a wrapper, as DistributedDataParallel does."""

    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        self.model = Wrapper(self.lightning_module)


class TakesTwo(CallsAChild):
    """Could be called with the arguments of its step, whose outputs have a row per sample."""

    def forward(self, x: Tensor, scale: int = 1) -> Tensor:
        return super().forward(x)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
        return self.network(batch[0]).argmax(dim=1)


def test_a_wrapped_module_is_compared_by_what_its_step_calls(tmp_path: Path) -> None:
    for kind, expected in ((TakesTwo, 0), (Step, 0), (Normalises, 1), (NormalisesForAChild, 1)):
        strategy = Wraps(device=torch.device("cpu"))
        with robustness_warnings() as messages:
            run = trainer(RobustnessMonitor(FISHER, on_error="raise"), root=tmp_path, strategy=strategy)
            run.fit(kind(), loader(), loader())
        assert len(messages) == expected


# --- batches of several entries ---------------------------------------------------------------------------------------


class ByName(Classifier):
    """Takes further arguments by name, and the labels, which change nothing."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4))

    def forward(self, x: Tensor, mask: Tensor, weight: Any = None, y: Any = None) -> Any:
        z = self.network(x * mask)
        return z if weight is None else z * weight[:, None]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(**{key: value for key, value in batch.items() if key != "weight"})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["x"], batch["mask"]), batch["y"])


class AsAWhole(ByName):
    def forward(self, batch: Any) -> Any:  # type: ignore[override]
        return self.network(batch["x"] * batch["mask"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch), batch["y"])


class NormalisesByName(ByName):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(x=normalised(batch["x"]), mask=batch["mask"])


class MasksOthers(ByName):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch["x"], 1 - batch["mask"])


def entries(*names: str, num_samples: int = 48) -> Any:
    """A loader of dictionaries with the given entries, in this order."""
    columns = {
        "x": random(0, num_samples, 6, dtype=torch.float32),
        "y": torch.arange(num_samples) % 4,
        "mask": (random(1, num_samples, 6) > 0).float(),
        "weight": random(2, num_samples, dtype=torch.float32).abs() * 5 + 1,
    }
    return loader([{name: columns[name][i] for name in names} for i in range(num_samples)], 16)


@pytest.mark.parametrize("kind", [ByName, AsAWhole])
@pytest.mark.parametrize("order", [("y", "mask", "x"), ("mask", "y", "x"), ("x", "y", "mask")], ids="-".join)
def test_arguments_are_compared_by_name_whatever_comes_first(
    tmp_path: Path, kind: type[Classifier], order: tuple[str, ...]
) -> None:
    assert said(kind(), tmp_path, entries(*order), metrics=FISHER) == []


def pasted(message: str, **names: Any) -> Any:
    """The function that a message says to pass."""
    found = re.search(r"`probe_fn=(lambda [^`]*)`", message)
    assert found is not None
    names = {"Probe": Probe, "normalise": normalised, **names}
    return eval(found[1].replace("input_mean=…", "input_mean=0.25").replace("input_std=…", "input_std=0.05"), names)


@pytest.mark.parametrize(
    ("kind", "names", "sentence"),
    [
        (
            NormalisesByName,
            ("y", "mask", "x"),
            r"Or say what is to be measured: .*normalise\(batch\['x'\]\), batch\['y'\]",
        ),
        (ByName, ("x", "mask", "y", "weight"), "The monitor passes `weight` from the batch, .* leave it out"),
    ],
)
def test_a_pasted_line_has_the_entries_of_the_batch_and_silences_the_message(
    tmp_path: Path, kind: type[Classifier], names: tuple[str, ...], sentence: str
) -> None:
    (message,) = said(kind(), tmp_path, entries(*names), metrics=FISHER)
    assert re.search(sentence, message)
    assert said(kind(), tmp_path, entries(*names), metrics=FISHER, probe_fn=pasted(message)) == []


def test_other_values_of_an_argument_are_reported_as_such(tmp_path: Path) -> None:
    (message,) = said(MasksOthers(), tmp_path, entries("x", "y", "mask"), metrics=FISHER)
    assert "gets other outputs from the module" in message
    assert "pass other values of further arguments" in message


def test_the_remedies_silence_it(tmp_path: Path) -> None:
    def prepared(module: Any, batch: Any) -> Probe:
        return Probe(module, normalised(batch[0]), batch[1], input_mean=0.25, input_std=0.05)

    def wrapped(module: Any, batch: Any) -> Probe:
        return Probe(lambda x: module(normalised(x)), batch[0], batch[1], module=module)

    def whole(module: Any, batch: Any) -> Probe:
        return Probe(lambda x: module.head(module(x)), batch[0], batch[1], module=module)

    for probe_fn, kind in ((prepared, Normalises), (wrapped, Normalises), (whole, GoesOn)):
        assert said(kind(), tmp_path, probe_fn=probe_fn) == []


# --- nothing is lost or left behind -----------------------------------------------------------------------------------


def scripted(module: nn.Module) -> nn.Module:
    return torch.jit.script(module)  # type: ignore[no-any-return]


def traced(module: nn.Module) -> nn.Module:
    return torch.jit.trace(module, torch.zeros(2, 1, 4, 4))  # type: ignore[no-any-return]


class Refuses(nn.Sequential):
    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no hooks here")


def num_hooks(module: nn.Module) -> int:
    return sum(len(inner._forward_hooks) for inner in module.modules())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [scripted, traced])
def test_children_that_take_no_hooks_cost_nothing(tmp_path: Path, make: Callable[[nn.Module], nn.Module]) -> None:
    for inner in (Step(), InContainers()):
        network = make(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)))
        if isinstance(inner, InContainers):
            inner.parts["body"][0] = network  # type: ignore[index, operator]
        else:
            inner.network = network
        assert said(inner, tmp_path, metrics=["fisher_spectral_norm"]) == []
        assert num_hooks(inner) == 0


def test_a_witness_that_fails_costs_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken")

    def check(module: Classifier, sentence: str) -> None:
        with robustness_warnings() as messages:
            run = trainer(RobustnessMonitor(["linearized_accuracy"]), root=tmp_path, max_epochs=3)
            run.fit(module, loader(), loader())
        assert messages == [
            f"RobustnessMonitor could not compare its samples with `validation_step`: RuntimeError: {sentence}. The run"
            " goes on."
        ]
        assert "robust/linearized_margin_linf" in run.callback_metrics
        assert num_hooks(module) == 0

    check(Step(Refuses(nn.Flatten(), nn.Linear(16, 4))), "no hooks here")
    for place, name in (
        (validation_witness.Rows, "of"),
        (validation_witness.Rows, "equal"),
        (validation_witness.ValidationWitness, "compare"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, broken)
            check(CallsAChild(), "broken")


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
        assert num_hooks(module) == 0


# --- heads that the step calls after what is measured -----------------------------------------------------------------


class Auxiliary(Step):
    """Calls a head after its forward pass that is no classifier, and may log the accuracy."""

    def __init__(self, width: int, *, logs: bool) -> None:
        super().__init__()
        self.aside, self.logs = nn.Linear(4, width), logs

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        z = self(batch[0])
        self.aside(z)
        if self.logs:
            self.log("val_acc", (z.argmax(1) == batch[1]).float().mean())


class Classifies(Auxiliary):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.aside(self(batch[0]))
        self.log("val_acc", 1.0)


@pytest.mark.parametrize(
    ("width", "logs", "metric"),
    [
        (3, False, "linearized_accuracy"),
        (16, False, "fisher_spectral_norm"),
        (2, True, "fisher_spectral_norm"),
        (4, True, "linearized_accuracy"),  # of the width of a classifier: the accuracy tells
        (16, True, "linearized_accuracy"),
    ],
)
def test_an_auxiliary_head_is_no_classifier(tmp_path: Path, width: int, logs: bool, metric: str) -> None:
    assert said(Auxiliary(width, logs=logs), tmp_path, metrics=[metric]) == []


def test_a_head_is_reported_where_the_accuracy_is_not_that_of_the_samples(tmp_path: Path) -> None:
    (message,) = said(Classifies(16, logs=True), tmp_path)
    assert message.startswith("`validation_step` goes on after what RobustnessMonitor measures: it calls `aside`")


@pytest.mark.parametrize(
    ("width", "measured", "num_classes", "takes_more", "classifies"),
    [
        (10, 512, 10, False, True),
        (10, 512, 9, False, True),  # not all classes are seen
        (10, None, 10, False, True),
        (10, 512, 10, True, False),  # a loss on features, or a classifier that takes the labels
        (10, 4, 10, True, True),
        (4, 10, 10, False, False),
        (784, 10, 10, False, False),
        (1, 10, 10, False, False),
        (1, 16, 2, False, True),
        (1, 2, 2, False, False),
        (2, 16, 2, False, True),
        (1000, 2048, 996, False, True),
        (3072, 1000, 996, False, False),
    ],
)
def test_a_head_may_classify_if_it_has_the_outputs_for_it(
    width: int, measured: int | None, num_classes: int, takes_more: bool, classifies: bool
) -> None:
    head = LeftOut("head", width, measured, takes_more, code=None)  # type: ignore[arg-type]
    assert head.may_classify(list(range(num_classes))) == classifies


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
        ({"val_acc": 0.5, "val_student_acc": 0.8}, 0.8, 256, True),
        ({"val_acc_top5": 1.0, "val_loss": 0.1}, 0.5, 256, None),
        ({"val_knn_acc": 1.0}, 0.5, 256, None),
        ({"val_accuracy_domain": 1.0, "val_balanced_accuracy": 0.1, "worst_group_acc": 0.1}, 0.5, 256, None),
        ({"val_acc_class3": 1.0, "acc@5": 0.1, "val_token_acc": 0.1, "macro_acc": 0.1}, 0.5, 256, None),
        ({"val_MulticlassAccuracy": 1.0}, 0.5, 256, False),
        ({"valAcc_top1": 1.0}, 0.5, 256, False),
        ({}, 0.5, 256, None),
    ],
)
def test_accuracies_are_compared_within_their_errors(
    logged: dict[str, float], clean: float, num_samples: int, agrees: bool | None
) -> None:
    shares = comparable(logged, loader=0, num_loaders=1)
    assert agreement(shares, CleanAccuracy(clean, num_samples)) is agrees


def test_accuracies_of_other_loaders_are_left_out() -> None:
    logged = {"val_acc/dataloader_idx_0": 0.9, "val_acc/dataloader_idx_1": 0.4, "val_acc": 0.6}
    assert comparable(logged, loader=1, num_loaders=2) == {"val_acc/dataloader_idx_1": 0.4}
    assert comparable(logged, loader=2, num_loaders=3) == {}
    assert comparable({"val_acc": 0.6}, loader=0, num_loaders=1) == {"val_acc": 0.6}


def test_the_accuracy_of_another_loader_is_not_compared(tmp_path: Path) -> None:
    class OfTheFirst(Step):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self(batch[0])
            if dataloader_idx == 0:
                self.log("val_acc", 1.0)
                self.log("val_accuracy", 0.0, add_dataloader_idx=False)

    with robustness_warnings() as messages:
        run = trainer(RobustnessMonitor(["linearized_accuracy"], dataloader_idx=1), root=tmp_path)
        run.validate(OfTheFirst(), [loader(), loader()], verbose=False)
    assert messages == []


class Constant(Classifier):
    """Predicts the most frequent class, and logs a mean over classes."""

    logged = 0.25

    def forward(self, x: Tensor) -> Tensor:
        return 1e-3 * super().forward(x) + torch.tensor([1.0, 0, 0, 0])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])
        self.log("val_acc", self.logged)


class ConstantElsewhere(Constant):
    logged = 0.6


@pytest.mark.parametrize(("kind", "agrees"), [(Constant, True), (ConstantElsewhere, False)])
def test_a_mean_over_classes_is_an_accuracy_too(tmp_path: Path, kind: type[Classifier], agrees: bool) -> None:
    x, y = samples(160).tensors
    y = torch.where(torch.arange(160) % 10 == 0, torch.arange(160) // 10 % 4, 0)
    with robustness_warnings() as messages:
        run = trainer(RobustnessMonitor(["linearized_accuracy"]), root=tmp_path)
        module = kind(classifier().network)
        run.validate(module, loader(torch.utils.data.TensorDataset(x, y)), verbose=False)
    found = [message for message in messages if message.startswith("The module logs")]
    assert len(found) == (0 if agrees else 1)


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
