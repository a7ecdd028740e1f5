"""Training with the monitor and every metric is bit-identical to training without it."""

import collections
import hashlib
import itertools
import random
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_robust import (
    AdversarialAccuracy,
    FisherSpectralNorm,
    HessianTrace,
    LinearizedAccuracy,
    RobustnessMonitor,
    WeightCurvatureIndex,
)
from lightning_robust.metrics import ProbeMetric
from tests.helpers import processes
from tests.helpers.networks import Attention
from tests.helpers.recording import state_of
from tests.helpers.training import NUM_CLASSES, Classifier, loader, robustness_warnings, trainer

HEADLINES = {
    "fim_spectral_norm",
    "linearized_accuracy_linf_0",
    "linearized_accuracy_l2_0",
    "adversarial_accuracy_linf_0.1",
    "hessian_trace",
    "wci",
    "adversarial_wci",
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def everything() -> list[ProbeMetric]:
    return [
        FisherSpectralNorm(),
        LinearizedAccuracy(),
        LinearizedAccuracy([0.1], norm="l2"),
        AdversarialAccuracy([0.1], steps=2),
        HessianTrace(),
        WeightCurvatureIndex(),
        WeightCurvatureIndex(attack="pgd"),
    ]


# ---- what must be the same -------------------------------------------------------------------------------------------


class Witness(Callback):
    """Records all state that a callback must not change, at the end of every epoch, validation and run."""

    def __init__(self) -> None:
        self.testimony: list[dict[str, str]] = []
        self.batches: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(digest(batch))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._testify("epoch", trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._testify("validation", trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._testify("run", trainer, pl_module)

    def _testify(self, end_of: str, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = trainer.callback_metrics
        notes = {"end of": end_of, "step": str(trainer.global_step), "batches": digest(self.batches)}
        notes |= {f"logged {key}": digest(value) for key, value in logged.items() if not key.startswith("robust/")}
        notes |= {f"optimizer {i}": digest(o.state_dict()) for i, o in enumerate(trainer.optimizers)}
        for i, config in enumerate(trainer.lr_scheduler_configs):
            notes[f"schedule {i}"] = digest(config.scheduler.state_dict())
        for name, tensor in (*pl_module.named_parameters(), *pl_module.named_buffers()):
            notes[f"tensor {name}"] = digest(tensor)
            notes[f"gradient of {name}"] = digest((tensor.requires_grad, tensor.grad if tensor.is_leaf else None))
        for name, module in pl_module.named_modules():
            plain = [item for item in vars(module).items() if isinstance(item[1], bool | int | float | str)]
            notes[f"attributes of {name}"] = digest([item for item in plain if item[0] != "_torchdynamo_wrapper_id"])
        notes["torch"] = digest(torch.get_rng_state())
        notes["numpy"] = digest(np.random.get_state()[1].tolist())  # noqa: NPY002
        notes["random"] = digest(random.getstate())
        self.testimony.append(notes)


def digest(value: object) -> str:
    """A short text that changes with every bit."""
    return hashlib.sha256(_spelled(value).encode()).hexdigest()[:16]


def _spelled(value: object) -> str:
    if isinstance(value, Tensor):
        contents = value.detach().clone().contiguous().reshape(-1).view(torch.uint8).tolist()
        return f"{value.dtype} {tuple(value.shape)} {contents}"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}: {_spelled(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_spelled, value))}]"
    return repr(value)


def differences(without: list[dict[str, str]], beside: list[dict[str, str]]) -> list[str]:
    """Describe where two runs differ."""
    assert len(without) == len(beside)
    return [
        f"{name} at the end of {a['end of']}, step {a['step']}"
        for a, b in zip(without, beside, strict=True)
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]


# ---- modules ---------------------------------------------------------------------------------------------------------


class FrozenNorm(Classifier):
    """Two BatchNorms; one is put into eval mode at the start of every epoch."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), *head(64, dropout=0.1)
            )
        )

    def on_train_epoch_start(self) -> None:
        self.network[1].eval()


class FrozenLayer(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.network[0].requires_grad_(False)
        self.network[5].bias.requires_grad_(False)


class OneCycle(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Thawing(Classifier):
    """`BackboneFinetuning` trains its backbone from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.network[:2]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam((weight for weight in self.parameters() if weight.requires_grad), lr=5e-3)


class Plateau(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, amsgrad=True)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0, threshold=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_acc"}}


class Manual(Classifier):
    """Two optimisers; one steps at every second batch, and gradients remain in between."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        often, seldom = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        often.step()
        often.zero_grad()
        if batch_idx % 2:
            seldom.step()
            seldom.zero_grad()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.network[0].parameters()),
            torch.optim.SGD([*self.network[1].parameters(), *self.network[5].parameters()], 0.1),
        ]


class WithMetrics(Classifier):
    """Two metrics as submodules: one is logged as an object, every forward pass updates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(NUM_CLASSES)
        self.activation = MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        self.activation.update(logits.detach())
        self.log("logit", logits.mean(), batch_size=len(x))
        return logits

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.accuracy.update(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        self.log("activation", self.activation.compute())


class StochasticDepth(nn.Module):
    """Skips its branch at random, even in eval mode, and draws from all three global generators for it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x.flatten(1)))
        draws = torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002
        return self.head(x + sum(draws) / 3 * self.branch(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 6, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(6, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.flatten(1, 2))[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, 16), nn.Linear(16, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._run, x.flatten(1), use_reentrant=False)

    def _run(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(torch.tanh(self.stem(x)), 0.2, training=self.training))


def head(features: int, *, dropout: float = 0.3) -> list[nn.Module]:
    return [nn.Flatten(), nn.Dropout(dropout), nn.Linear(features, NUM_CLASSES)]


def on_network(make: Callable[[], nn.Module]) -> Callable[[], Classifier]:
    return lambda: Classifier(make())


def attention() -> nn.Module:
    return nn.Sequential(nn.Flatten(1, 2), Attention(4, NUM_CLASSES))


def parametrised() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(1, 4, 3, padding=1)),
        nn.Tanh(),
        nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(64, 8)),
        nn.Tanh(),
        parametrizations.orthogonal(nn.Linear(8, 8)),
        spectral_norm(nn.Linear(8, NUM_CLASSES)),
    )


# ---- the matrix ------------------------------------------------------------------------------------------------------


def fit(run: Trainer, model: LightningModule) -> None:
    run.fit(model, loader(batch_size=24, shuffle=True), loader())


def validate_fit_validate(run: Trainer, model: LightningModule) -> None:
    run.validate(model, loader(), verbose=False)
    fit(run, model)
    run.validate(model, loader(), verbose=False)


@dataclass(frozen=True)
class Setting:
    """How a run differs from a plain one."""

    model: Callable[[], Classifier] = Classifier
    options: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)  # options of the monitor
    callbacks: Callable[[], list[Callback]] = list
    script: Callable[[Trainer, LightningModule], None] = fit
    says: str = "(?!)"  # warnings of the monitor
    may_say: str = "(?!)"  # warnings that depend on the last digits of the values
    warns: str = "(?!)"  # warnings of Lightning or torch

    def run(self, root: Path, *, monitored: bool) -> list[dict[str, str]]:
        """Train with everything seeded, and return what the witness saw."""
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)  # noqa: NPY002
        model, witness = self.model(), Witness()
        options = {"max_samples": 20, "on_error": "raise"} | self.measured
        monitors = [RobustnessMonitor(everything(), **options)] if monitored else []
        with robustness_warnings() as messages, warnings.catch_warnings():
            warnings.filterwarnings("ignore", self.warns)
            run = trainer(*monitors, *self.callbacks(), witness, root=root, **self.options)
            self.script(run, model)
        said = [message for message in messages if not re.search(self.may_say, message)]
        assert all(re.search(self.says, message) for message in said), said
        assert bool(said) == (monitored and self.says != "(?!)")
        if monitored:
            assert {f"robust/{key}" for key in HEADLINES} <= run.callback_metrics.keys()
            assert run.callback_metrics["robust/num_samples"] == 20
        return witness.testimony


KRYLOV = {"linearization": "krylov"}
SETTINGS = {
    "plain": Setting(),
    "a BatchNorm frozen at the start of every epoch": Setting(FrozenNorm, warns="Found 1 module"),
    "frozen layers": Setting(FrozenLayer),
    "accumulated gradients": Setting(options={"accumulate_grad_batches": 3}),
    "validation amid an epoch": Setting(options={"val_check_interval": 0.25, "max_epochs": 1}),
    "validation amid an accumulation": Setting(
        options={"accumulate_grad_batches": 2, "val_check_interval": 3, "max_epochs": 1}
    ),
    "bf16-mixed": Setting(options={"precision": "bf16-mixed"}),
    "bf16-true": Setting(options={"precision": "bf16-true"}),
    "64-true": Setting(options={"precision": "64-true"}),
    "clipped gradients": Setting(options={"gradient_clip_val": 0.1}),
    "clipped gradient values": Setting(options={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "moving average of weights": Setting(callbacks=lambda: [EMAWeightAveraging(decay=0.5)]),
    "average of weights with buffers": Setting(callbacks=lambda: [WeightAveraging(use_buffers=True)]),
    "stochastic weight averaging": Setting(
        callbacks=lambda: [StochasticWeightAveraging(1e-3, swa_epoch_start=1, annealing_epochs=1)],
        options={"max_epochs": 3},
    ),
    "thawing weights": Setting(
        Thawing,
        callbacks=lambda: [BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
        warns="The provided params to be frozen already exist",
    ),
    "pruned weights": Setting(callbacks=lambda: [ModelPruning("l1_unstructured", amount=0.3)]),
    "schedule by steps": Setting(OneCycle),
    "schedule by a plateau": Setting(Plateau, options={"max_epochs": 3}),
    "manual optimisation": Setting(Manual),
    "a network that draws random numbers in eval mode": Setting(
        on_network(StochasticDepth), says="returns other outputs when it is called twice", may_say="is not reliable"
    ),
    "deterministic algorithms": Setting(options={"deterministic": True}),
    "recurrence": Setting(on_network(Recurrent), may_say="is not reliable"),
    "attention": Setting(on_network(attention), may_say="is mostly noise of its random probes"),
    "parametrised weights": Setting(on_network(parametrised)),
    "gradient checkpointing": Setting(on_network(Checkpointed)),
    "metrics inside the module": Setting(WithMetrics),
    "validation before and after": Setting(script=validate_fit_validate),
    "sanity checking": Setting(options={"num_sanity_val_steps": 2}),
    "Krylov subspaces": Setting(measured=KRYLOV, script=validate_fit_validate),
    "Krylov subspaces of attention": Setting(
        on_network(attention), measured=KRYLOV, may_say="is mostly noise of its random probes"
    ),
    "Krylov subspaces of parametrised weights": Setting(on_network(parametrised), measured=KRYLOV),
    "Krylov subspaces of checkpointed layers": Setting(on_network(Checkpointed), measured=KRYLOV),
    "no inference mode": Setting(options={"inference_mode": False}, script=validate_fit_validate),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_is_bit_identical_with_and_without_the_monitor(tmp_path: Path, name: str) -> None:
    setting = SETTINGS[name]
    try:
        without, beside = (setting.run(tmp_path, monitored=monitored) for monitored in (False, True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert differences(without, beside) == []


@pytest.mark.parametrize(
    ("careless", "noticed"),
    [
        (lambda module: torch.rand(()), "torch "),
        (lambda module: np.random.rand(), "numpy "),  # noqa: NPY002
        (lambda module: random.random(), "random "),
        (lambda module: module.network[1].train(), "attributes of network.1 "),
        (lambda module: module.network[1].num_batches_tracked.add_(1), "tensor network.1.num_batches_tracked "),
        (lambda module: module.network[0](torch.ones(1, 1, 4, 4)).sum().backward(), "gradient of network.0.bias "),
        (lambda module: module.network[5].weight.data.mul_(1 + 1e-6), "tensor network.5.weight "),
        (lambda module: module.network[5].bias.requires_grad_(False), "gradient of network.5.bias "),
        (lambda module: module.trainer.optimizers[0].param_groups[0].update(lr=0.1), "optimizer 0 "),
    ],
    ids=lambda value: value.strip() if isinstance(value, str) else "",
)
def test_the_comparison_notices_a_careless_guest(
    tmp_path: Path, careless: Callable[[LightningModule], object], noticed: str
) -> None:
    class Guest(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                with torch.inference_mode(False), torch.enable_grad():
                    careless(pl_module)

    plain, disturbed = Setting(), Setting(callbacks=lambda: [Guest()])
    found = differences(plain.run(tmp_path, monitored=False), disturbed.run(tmp_path, monitored=False))
    assert found
    assert all("step 10" in where for where in found)
    assert any(where.startswith(noticed) for where in found)


def test_a_compiled_network_is_compiled_as_often_as_without_the_monitor(tmp_path: Path) -> None:
    graphs: list[int] = []
    eager = torch._dynamo.lookup_backend("aot_eager")

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return eager(graph, inputs)

    def model() -> Classifier:
        return Classifier(torch.compile(Classifier().network, backend=counting))

    outcomes = []
    for monitored in (False, True):
        torch._dynamo.reset()
        graphs.clear()
        testimony = Setting(model, script=validate_fit_validate).run(tmp_path, monitored=monitored)
        outcomes.append((testimony, list(graphs)))
    torch._dynamo.reset()
    (without, compiled_without), (beside, compiled_beside) = outcomes
    assert len(compiled_without) > 1
    assert compiled_without == compiled_beside
    assert differences(without, beside) == []


# ---- networks that keep something from one pass to the next ----------------------------------------------------------


class Remembering(nn.Module):
    """A network whose outputs depend on its earlier passes, even in eval mode."""

    def __init__(self, kept: Any, remember: Callable[[Any], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(16, NUM_CLASSES)
        self.kept, self.remember = kept, remember

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) * (1 + 1e-3 * float(self.remember(self)))


class Stubborn(dict[int, int]):
    def clear(self) -> None:
        raise TypeError("not this one")

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("not this one")


MEMORIES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a buffer": (lambda: nn.Buffer(torch.zeros(())), lambda network: network.kept.add_(1)),
    "a weight that is not trained": (
        lambda: nn.Parameter(torch.zeros(()), requires_grad=False),
        lambda network: network.kept.data.add_(1),
    ),
    "a number": (lambda: 0, lambda network: vars(network).update(kept=network.kept + 1) or network.kept),
    "a tensor that another replaces": (
        lambda: torch.zeros(()),
        lambda network: vars(network).update(kept=network.kept + 1) or network.kept,
    ),
    "a tensor that is written to": (lambda: torch.zeros(()), lambda network: network.kept.add_(1)),
    "a tensor that is written to unnoticed": (
        lambda: torch.zeros(()),
        lambda network: network.kept.data.add_(1),
    ),
    "a list of tensors": (lambda: [torch.zeros(())], lambda network: network.kept[0].add_(1)),
    "tensors deep inside": (lambda: {"k": ([torch.zeros(())],)}, lambda network: network.kept["k"][0][0].add_(1)),
    "an array": (lambda: np.zeros(1), lambda network: float(network.kept.__iadd__(1)[0])),
    "an array that nobody can write to": (lambda: np.broadcast_to(1.0, 3), lambda network: float(network.kept.sum())),
    "a sparse tensor": (lambda: torch.eye(3).to_sparse(), lambda network: network.kept.sum()),
    "a tensor without contents": (lambda: torch.ones(3, device="meta"), lambda network: network.kept.numel()),
    "a dictionary that refuses": (Stubborn, lambda network: dict.__setitem__(network.kept, len(network.kept), 0) or 1),
    "a module in a list": (
        lambda: [nn.BatchNorm1d(1)],
        lambda network: network.kept[0](torch.randn(4, 1)).detach().sum(),
    ),
    "a module that is made": (
        nn.ModuleList,
        lambda network: network.kept.append(nn.Identity()) and len(network.kept),
    ),
    "a list": (list, lambda network: network.kept.append(0) or len(network.kept)),
    "a list in a dictionary": (lambda: {0: []}, lambda network: network.kept[0].append(0) or len(network.kept[0])),
    "a queue": (collections.deque, lambda network: network.kept.append(0) or len(network.kept)),
    "torch's generator": (torch.Generator, lambda network: torch.rand((), generator=network.kept)),
    "numpy's generator": (lambda: np.random.default_rng(0), lambda network: network.kept.random()),
    "python's generator": (lambda: random.Random(0), lambda network: network.kept.random()),
}


# The others return other outputs at every pass.
CONSTANT = {
    "an array that nobody can write to",
    "a sparse tensor",
    "a tensor without contents",
    "a dictionary that refuses",
}


@pytest.mark.parametrize("name", MEMORIES)
def test_a_network_keeps_the_same_values_as_without_the_monitor(tmp_path: Path, name: str) -> None:
    kept, remember = MEMORIES[name]
    said = {} if name in CONSTANT else {"says": "returns other outputs"}
    setting = Setting(on_network(lambda: Remembering(kept(), remember)), **said)
    without, beside = (setting.run(tmp_path, monitored=monitored) for monitored in (False, True))
    assert differences(without, beside) == []


# ---- interrupts ------------------------------------------------------------------------------------------------------


class Interrupting(nn.Module):
    """Interrupts one of the forward passes of a measurement."""

    def __init__(self, network: nn.Module, after: int) -> None:
        super().__init__()
        self.network = network
        self.after, self.passes = after, itertools.count()  # a count in a list would be reverted

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and torch.is_grad_enabled() and next(self.passes) == self.after:
            raise KeyboardInterrupt
        return self.network(x)


def every_kind_of_layer() -> nn.Module:
    """Layers that are each measured in a different way."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Hardsigmoid(),
        nn.Dropout(0.3),
        parametrizations.weight_norm(nn.Conv2d(4, 1, 3, padding=1)),
        Recurrent(),
    )
    network[1].eval()
    network[1].bias.requires_grad_(False)
    network[2].register_forward_hook(lambda *_: None)
    network[3].register_full_backward_hook(lambda *_: None)
    network[5].register_forward_pre_hook(lambda *_: None)
    network[5].head.register_full_backward_pre_hook(lambda *_: None)
    return network


class Before(Callback):
    """Records the state before each measurement; it must come before the monitor."""

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.things, self.surroundings = things(pl_module), surroundings()


def things(module: LightningModule) -> dict[str, object]:
    """Bits and identities of everything in a module."""
    state = state_of(module)
    for name, submodule in module.named_modules():
        state[f"{name} is"] = type(submodule)
        state[f"{name} has"] = sorted(vars(submodule))
        for hooks in HOOKS:
            kept = vars(submodule)[hooks]
            state[f"{name} {hooks}"] = id(kept), [(key, id(hook)) for key, hook in kept.items()]
        for key, value in vars(submodule).items():
            if isinstance(value, list) and key != "_flat_weight_refs":  # recreated whenever Lightning moves a module
                state[f"{name} keeps {key}"] = [id(item) for item in value]
    return state


def surroundings() -> dict[str, object]:
    return {
        "cudnn": torch.backends.cudnn.enabled,
        "stance": torch._dynamo.eval_frame._stance.stance,
        "kernels": torch.backends.cuda.flash_sdp_enabled(),
        "functions": [F.batch_norm, F.hardsigmoid, torch._weight_norm, torch.batch_norm],
        "random": [digest(torch.get_rng_state()), random.getstate()],
    }


@pytest.mark.filterwarnings("ignore:Found . module")
@pytest.mark.parametrize("after", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55])
def test_an_interrupt_amid_a_measurement_leaves_the_very_same_objects(tmp_path: Path, after: int) -> None:
    torch.manual_seed(0)
    model, before = Classifier(Interrupting(every_kind_of_layer(), after)), Before()
    run = trainer(before, RobustnessMonitor(everything(), max_samples=20), root=tmp_path, num_sanity_val_steps=0)
    with robustness_warnings(), pytest.raises((KeyboardInterrupt, SystemExit)):
        run.fit(model, loader(), loader())
    assert run.interrupted
    assert {key for key, value in things(model).items() if before.things.get(key) != value} == set()
    assert before.things.keys() == things(model).keys()
    assert surroundings() == before.surroundings
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_an_interrupt_amid_a_measurement_leaves_the_random_states(tmp_path: Path) -> None:
    before = Before()
    model = Classifier(nn.Sequential(StochasticDepth(), Interrupting(nn.Identity(), 3)))
    run = trainer(before, RobustnessMonitor(), root=tmp_path, num_sanity_val_steps=0)
    with robustness_warnings(), pytest.raises((KeyboardInterrupt, SystemExit)):
        run.fit(model, loader(), loader())
    assert surroundings()["random"] == before.surroundings["random"]


# ---- several processes -----------------------------------------------------------------------------------------------


def train_in_processes(rank: int, root: Path) -> list[list[dict[str, str]]]:
    setting = Setting(options={"strategy": "ddp", "devices": 2}, warns="Using `DistributedSampler`")
    return [setting.run(root, monitored=monitored) for monitored in (False, True)]


@pytest.mark.ddp
def test_training_in_two_processes_is_bit_identical_on_each(tmp_path: Path) -> None:
    runs = processes.run(train_in_processes, 2, tmp_path)
    for without, beside in runs:
        assert differences(without, beside) == []
    assert runs[0][0] != runs[1][0]  # each has its own batches
