"""No estimate on the inputs is given for a network whose outputs change without gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_robust.functional import linearize, pgd, relinearize, trace_fisher_rao_paths
from tests.helpers.networks import build, random
from tests.helpers.recording import Recorder

Network = Callable[[Tensor], Tensor]
MODEL, INPUTS, TARGETS = build("mlp", num_samples=20)
MODEL.eval()
CONSTANT = torch.tensor([1.0, 0.0, -1.0])


class Rounded(torch.autograd.Function):
    """Rounds with the gradient of the identity, as quantisation-aware training does."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round(decimals=1)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return MODEL(x)


def quantised(x: Tensor) -> Tensor:
    """As dynamic quantisation does it, with a scale from the whole batch."""
    scale = x.detach().abs().max() / 127
    return MODEL((x.detach() / scale).round() * scale)


def stumps(x: Tensor) -> Tensor:
    """Trees of one split each, in NumPy."""
    array = x.detach().numpy()
    votes = (array > 0).astype("float64")
    return torch.from_numpy(votes.reshape(len(array), 3, -1).mean(axis=2))


def saturated(x: Tensor) -> Tensor:
    """Every unit is at one of its ends, but for one sample in thousands."""
    return F.hardtanh(1e5 * MODEL(x))


def dead(x: Tensor) -> Tensor:
    return MODEL((x - 100).relu())


WITHOUT: dict[str, Network] = {
    "detached": lambda x: MODEL(x.detach()),
    "detached in part of the graph": lambda x: MODEL(x.detach()) + 0 * x.sum(dim=1, keepdim=True),
    "no_grad": without_grad,
    "rounded inputs": lambda x: MODEL(x.round(decimals=1)),
    "rounded outputs": lambda x: MODEL(x).round(decimals=1),
    "cast to integers": lambda x: MODEL((10 * x).long() / 10),
    "quantised by the batch": quantised,
    "signs": lambda x: MODEL(x.sign()),
    "argmax": lambda x: F.one_hot(MODEL(x).argmax(dim=1), 6).float(),
    "NumPy": stumps,
    "masked": lambda x: F.pad(MODEL(x.detach()), (0, 2), value=-1e9),
}
WITH: dict[str, Network] = {
    "a network": MODEL,
    "constant": lambda x: CONSTANT.expand(len(x), 3),
    "constant, detached": lambda x: (CONSTANT + 0 * x[:, :3]).detach(),
    "times zero": lambda x: 0 * MODEL(x),
    "dead": dead,
    "saturated": saturated,
    "confident": lambda x: 1e4 * MODEL(x),
    "tiny": lambda x: 1e-20 * MODEL(x),
    "straight through": lambda x: MODEL(Rounded.apply(x)),
    "adds up to the same": lambda x: MODEL(x).softmax(dim=1),
}
LINEARIZATION = linearize(MODEL, INPUTS)
PASSES: dict[str, Callable[[Network, Tensor], object]] = {
    "linearize": linearize,
    "linearize in chunks": lambda model, x: linearize(model, x, chunk_size=3),
    "relinearize": lambda model, x: relinearize(model, x, linearize(_same_classes(model), x)),
    "pgd": lambda model, x: pgd(model, x, model(x).argmax(dim=1), epsilon=0.1, steps=2),
    "paths": lambda model, x: trace_fisher_rao_paths(model, x, max_steps=2),
    "paths by products": lambda model, x: trace_fisher_rao_paths(model, x, max_steps=2, solver="cg"),
}
every_pass = pytest.mark.parametrize("measure", PASSES.values(), ids=PASSES)


def _same_classes(model: Network) -> Network:
    """A network with gradients and as many classes, whose linearisation tells nothing of this one."""
    num_classes = model(INPUTS).shape[1]
    return lambda x: F.pad(MODEL(x)[:, :num_classes], (0, max(0, num_classes - 6)), value=-1e9)


@every_pass
@pytest.mark.parametrize("num_samples", [20, 1])
@pytest.mark.parametrize("model", WITHOUT.values(), ids=WITHOUT)
def test_outputs_that_change_without_gradients_are_refused(
    model: Network, num_samples: int, measure: Callable[[Network, Tensor], object]
) -> None:
    with pytest.raises(ValueError, match=r"change without any.*perfect robustness.*`torch.no_grad\(\)`, `detach\(\)`"):
        measure(model, INPUTS[:num_samples])


@every_pass
@pytest.mark.parametrize("num_samples", [20, 1])
@pytest.mark.parametrize("model", WITH.values(), ids=WITH)
def test_networks_that_are_flat_where_they_are_measured_are_not_refused(
    model: Network, num_samples: int, measure: Callable[[Network, Tensor], object]
) -> None:
    assert measure(model, INPUTS[:num_samples]) is not None


def test_only_networks_without_any_gradient_are_called_more_often() -> None:
    half = INPUTS.clone()
    half[:-1] = -200.0  # where all but one sample are flat
    for model, sizes in ((dead, [20]), (lambda x: MODEL(x.relu()), [20])):
        recorder = Recorder(_Module(model))
        inputs = half if model is not dead else INPUTS + 100
        linearize(recorder, inputs)
        assert recorder.record.batch_sizes == sizes
    recorder = Recorder(_Module(lambda x: CONSTANT.expand(len(x), 3)))
    linearize(recorder, INPUTS)
    assert len(recorder.record.batch_sizes) == 7


def test_extras_do_not_count_as_changes() -> None:
    """Outputs that differ between samples by their extras alone are constant in the inputs."""
    shift = random(0, 20, 3, dtype=torch.float32)
    linearize(lambda x, shift: shift + 0 * x[:, :3], INPUTS, extras={"shift": shift})
    with pytest.raises(ValueError, match="perfect robustness"):
        linearize(lambda x, shift: shift + x[:, :3].detach(), INPUTS, extras={"shift": shift})


class _Module(nn.Module):
    def __init__(self, function: Network) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
