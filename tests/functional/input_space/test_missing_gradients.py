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


HEAD = nn.Linear(12, 6)
with torch.no_grad():
    HEAD.weight.copy_(3 * random(8, 6, 12))
    HEAD.bias.zero_()


def sure(x: Tensor) -> Tensor:
    """Whether a first head decides a sample alone, (n, 1)."""
    return HEAD(x).softmax(dim=1).amax(dim=1, keepdim=True) > 0.9


def leaves_early(x: Tensor) -> Tensor:
    with torch.no_grad():
        early, done = HEAD(x), sure(x)
    return torch.where(done, early, MODEL(x))


def detached_rows(x: Tensor) -> Tensor:
    outputs, done = MODEL(x).clone(), sure(x)[:, 0]
    outputs[done] = HEAD(x[done]).detach()
    return outputs


def only_one_way(x: Tensor) -> Tensor:
    """Inputs above a threshold pass through NumPy, those below through the network."""
    array = torch.from_numpy(x.detach().numpy().copy())
    return torch.where(x[:, :1] > 0, HEAD(array).detach(), HEAD(x))


def frozen_for_large(x: Tensor) -> Tensor:
    return torch.where(x.norm(dim=1, keepdim=True) > 3, MODEL(x.detach()), MODEL(x))


PARTLY_WITHOUT: dict[str, Network] = {
    "leaves early": leaves_early,
    "detached rows": detached_rows,
    "NumPy for some": only_one_way,
    "detached where large": frozen_for_large,
}


def dying(x: Tensor) -> Tensor:
    """Units are dead on about half of the samples."""
    return MODEL((x - 1.6).relu())


def partly_saturated(x: Tensor) -> Tensor:
    return F.hardtanh(30 * MODEL(x)[:, :3])


def partly_constant(x: Tensor) -> Tensor:
    """A jump to a constant."""
    return torch.where(x[:, :1] > 0, MODEL(x), torch.arange(6.0))


def clamped(x: Tensor) -> Tensor:
    return (30 * MODEL(x)).log_softmax(dim=1).clamp(-5, -0.1)


PARTLY_WITH: dict[str, Network] = {
    "dying": dying,
    "saturated": partly_saturated,
    "constant": partly_constant,
    "clamped": clamped,
    "steep": lambda x: torch.where(x[:, :1] > 0, F.hardtanh(1e5 * HEAD(x)), HEAD(x)),
}


def num_flat(model: Network) -> int:
    leaf = INPUTS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((model(leaf) * torch.arange(1, model(leaf).shape[1] + 1)).sum(), leaf)
    return int((~gradient.any(dim=1)).sum())


@every_pass
@pytest.mark.parametrize("model", PARTLY_WITHOUT.values(), ids=PARTLY_WITHOUT)
def test_networks_without_gradients_for_some_samples_are_refused(
    model: Network, measure: Callable[[Network, Tensor], object]
) -> None:
    assert 0 < num_flat(model) < len(INPUTS)
    with pytest.raises(ValueError, match=r"change without any \(\d+ of \d+ samples.*perfect robustness"):
        measure(model, INPUTS)


@pytest.mark.parametrize("model", PARTLY_WITHOUT.values(), ids=PARTLY_WITHOUT)
def test_the_verdict_does_not_depend_on_the_other_samples(model: Network) -> None:
    refused = []
    for x in INPUTS.split(1):
        try:
            linearize(model, x)
        except ValueError:
            refused.append(True)
    assert len(refused) == num_flat(model)


@every_pass
@pytest.mark.parametrize("model", PARTLY_WITH.values(), ids=PARTLY_WITH)
def test_networks_that_are_flat_at_some_samples_are_not_refused(
    model: Network, measure: Callable[[Network, Tensor], object]
) -> None:
    assert 0 < num_flat(model) < len(INPUTS)
    assert measure(model, INPUTS) is not None


def test_dead_samples_do_not_hide_others_without_gradients() -> None:
    for model in (leaves_early, frozen_for_large):
        with pytest.raises(ValueError, match="change without any"):
            linearize(lambda x, f=model: torch.where(x[:, 1:2] > 0, f(x), dead(x)), INPUTS)


def test_only_samples_without_gradients_pass_through_the_network_again() -> None:
    for model, num_more in ((MODEL, 0), (lambda x: MODEL(x + 100), 0), (dying, 7)):
        recorder = Recorder(_Module(model))
        linearize(recorder, INPUTS)
        sizes = recorder.record.batch_sizes
        flat = num_flat(model)
        assert sizes == [20] + [flat] * (len(sizes) - 1)
        assert len(sizes) - 1 <= num_more
    recorder = Recorder(_Module(lambda x: CONSTANT.expand(len(x), 3)))
    linearize(recorder, INPUTS)
    assert len(recorder.record.batch_sizes) == 7


def test_an_attack_looks_again_at_no_sample_that_is_only_confident() -> None:
    """The loss of a confident network has no gradient with respect to its logits."""
    recorder = Recorder(_Module(lambda x: 30 * MODEL(x)))
    pgd(recorder, INPUTS, MODEL(INPUTS).argmax(dim=1), epsilon=0.01, steps=3)
    assert recorder.record.batch_sizes == [20] * 3


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
