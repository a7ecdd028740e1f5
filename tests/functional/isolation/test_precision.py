"""A network in half precision computes in float32 while it is measured, whatever types its forward pass names."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_robust import RobustnessMonitor
from lightning_robust.functional import hessian_trace, linearize
from lightning_robust.functional._isolation.context import differentiable
from tests.helpers.networks import random
from tests.helpers.training import Classifier, loader, trainer

HALVES = [torch.bfloat16, torch.float16]
X, TARGETS = random(7, 12, 4, dtype=torch.float32), torch.arange(12) % 3


class Casting(LightningModule):
    """Does something with types in its forward pass."""

    def __init__(self, act: Callable[["Casting", Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.act = nn.Linear(4, 6), nn.Linear(6, 3), act
        self.register_buffer("count", torch.zeros(()))
        self.constant = torch.linspace(0, 1, 4)
        self.seen: list[Any] = []
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(random(seed, *parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.act(self, x))))


def unchanged(net: Casting, x: Tensor) -> Tensor:
    return x


Act = Callable[[Casting, Tensor], Tensor]
# What the network does, and what that is in float32.
CASTS: dict[str, tuple[Act, Act]] = {
    "to the module's type": (lambda net, x: x.to(net.dtype), unchanged),
    "to that of a weight": (lambda net, x: x.to(dtype=net.body.weight.dtype) + net.body.weight.new_zeros(4), unchanged),
    "to that of any parameter": (lambda net, x: x.to(next(net.parameters()).dtype), unchanged),
    "bfloat16": (lambda net, x: x.bfloat16(), unchanged),
    "half": (lambda net, x: x.half().to(torch.float16), unchanged),
    "by name": (lambda net, x: x.type(torch.bfloat16).type("torch.BFloat16Tensor").type(torch.HalfTensor), unchanged),
    "a new tensor": (lambda net, x: x + torch.zeros(len(x), 4, dtype=net.dtype), unchanged),
    "joined with a new tensor": (
        lambda net, x: torch.cat([x[:, :2], torch.ones(len(x), 2, dtype=torch.bfloat16)], 1),
        lambda net, x: torch.cat([x[:, :2], torch.ones(len(x), 2)], 1),
    ),
    "like another": (lambda net, x: x.type_as(net.constant) * torch.ones_like(net.constant), unchanged),
    "a constant": (
        lambda net, x: x @ torch.diag(net.constant) + net.constant,
        lambda net, x: x * net.constant + net.constant,
    ),
    "written to": (lambda net, x: torch.empty(x.shape, dtype=net.dtype).copy_(x), unchanged),
    "the smallest number": (lambda net, x: x.clamp_min(torch.finfo(x.dtype).min), unchanged),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CASTS)
def test_casts_in_a_forward_pass_follow_the_float32_copies(name: str, dtype: torch.dtype) -> None:
    act, in_single = CASTS[name]
    network = Casting(act).to(dtype)
    network.constant = network.constant.to(dtype)
    single = copy.deepcopy(network).float()
    single.constant, single.act = network.constant.float(), in_single
    measured, expected = linearize(network, X.to(dtype)), linearize(single, X.to(dtype).float())
    torch.testing.assert_close(measured.logits, expected.logits)
    torch.testing.assert_close(measured.gram, expected.gram)
    traces, exact = (
        hessian_trace(net, x, TARGETS, estimator="gauss_newton", num_probes=2, rtol=None)
        for net, x in ((network, X.to(dtype)), (single, X.to(dtype).float()))
    )
    torch.testing.assert_close(traces.total, exact.total, rtol=1e-4, atol=1e-6)
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    assert network.dtype == network.constant.dtype == dtype


def test_what_it_counts_in_half_precision_is_put_back() -> None:
    def count(net: Casting, x: Tensor) -> Tensor:
        net.count += 1
        net.constant.add_(1)
        net.constant[0] = 7
        return x

    network = Casting(count).to(torch.bfloat16)
    network.constant = network.constant.bfloat16()
    constant, before = network.constant, network.constant.clone()
    linearize(network, X)
    hessian_trace(network, X, TARGETS)
    assert network.count == 0
    assert network.constant is constant
    assert torch.equal(constant, before)


def test_types_are_those_of_the_network_again_afterwards() -> None:
    network = Casting(unchanged).to(torch.bfloat16)
    with differentiable(network):
        assert network.dtype == torch.float32
        assert torch.zeros(2, dtype=torch.bfloat16).dtype == torch.float32
    assert network.dtype == torch.bfloat16
    assert torch.zeros(2, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_network_in_single_precision_may_use_half_precision() -> None:
    network = Casting(lambda net, x: net.seen.append(x.bfloat16().dtype) or x)
    with differentiable(network):
        network(X)
        assert network.seen == [torch.bfloat16]


class HiddenState(Classifier):
    """Makes the first state of a recurrent layer in the type of the module."""

    def __init__(self) -> None:
        super().__init__(nn.GRU(4, 6, batch_first=True))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(1, len(x), 6, dtype=self.dtype, device=self.device)
        return self.head(self.network(x.flatten(1, 2).to(self.dtype), state)[0][:, -1])


def test_a_monitor_measures_a_module_that_is_trained_in_half_precision(tmp_path: Any) -> None:
    torch.manual_seed(0)
    run = trainer(RobustnessMonitor(on_error="raise"), root=tmp_path, max_epochs=1, precision="bf16-true")
    run.fit(HiddenState(), loader(), loader())
    assert {"robust/fim_spectral_norm", "robust/hessian_trace"} <= run.callback_metrics.keys()
