"""Sharded networks are gathered once, or refused with an error that says what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_robust import Probe
from lightning_robust.functional import gathered_weights, hessian_trace, linearize, pgd
from tests.helpers import processes
from tests.helpers.networks import build
from tests.helpers.recording import state_of

on_cpu = pytest.mark.skipif(not processes.CAN_SHARD, reason=f"torch {torch.__version__} shards on accelerators only")


def sharded(how: str) -> nn.Module:
    """The network of these tests, sharded over the processes of the group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    network, _, _ = build("mlp")
    if how == "tensor parallel":
        return parallelize_module(network, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    if how == "frozen":
        network[3].requires_grad_(False)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if how == "bf16" else MixedPrecisionPolicy()
    if how != "root alone":
        fully_shard([network[0], network[3]] if how == "grouped" else network[0], mp_policy=policy)
    return fully_shard(network, mp_policy=policy)


def measures(network: nn.Module, *, size: int) -> dict[str, Tensor]:
    _, inputs, targets = build("mlp")
    x, y = inputs[:size], targets[:size]
    linearization = linearize(network, x)
    estimate = hessian_trace(network, x, y, num_probes=4, rtol=None, generator=torch.Generator().manual_seed(0))
    values = {"logits": linearization.logits, "gram": linearization.gram, "total": estimate.total}
    return values | {"attacked": pgd(network, x, y, epsilon=0.1, steps=3), **estimate.layers}


def measure_sharded(rank: int, how: str) -> tuple[dict[str, Tensor], bool, bool]:
    """Values on the samples of this process, whether the network is unchanged, and whether it trains unchanged."""
    network = sharded(how)
    _, inputs, targets = build("mlp")
    with torch.no_grad():  # leaves the weights of the outermost group gathered
        network(inputs)
    objects = {name: id(module) for name, module in network.named_modules()}
    hooks = {name: list(module._forward_pre_hooks) for name, module in network.named_modules()}
    with gathered_weights(network):
        values = measures(network, size=9 - 6 * rank)  # each process makes another number of passes
    same = objects == {name: id(module) for name, module in network.named_modules()}
    same &= hooks == {name: list(module._forward_pre_hooks) for name, module in network.named_modules()}
    same &= all(type(p).__name__ == "DTensor" for p in network.parameters())

    losses = []
    for model in (network, sharded(how)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            torch.manual_seed(0)  # for dropout
            loss = nn.functional.cross_entropy(model(inputs).float(), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return values, same, losses[:2] == losses[2:]


WAYS = ["nested", "root alone", "grouped", "bf16", "frozen"]


def measure_every_way(rank: int) -> dict[str, tuple[dict[str, Tensor], bool, bool]]:
    processes.join_group()
    return {how: measure_sharded(rank, how) for how in WAYS}


@pytest.fixture(scope="module")
def results() -> list[dict[str, tuple[dict[str, Tensor], bool, bool]]]:
    return processes.run(measure_every_way, 2)


@on_cpu
@pytest.mark.ddp
@pytest.mark.parametrize("how", WAYS)
def test_each_process_measures_its_own_samples_on_gathered_weights(how: str, results: list[dict[str, Any]]) -> None:
    whole, _, _ = build("mlp")
    whole[3].requires_grad_(how != "frozen")
    for rank, (values, same, trains) in enumerate(result[how] for result in results):
        expected = measures(whole, size=9 - 6 * rank)
        assert values.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(values[key], value, rtol=1e-6, atol=1e-9)
        assert same
        assert trains


def exhausted(*args: Any, **options: Any) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def refused(rank: int) -> list[str]:
    processes.join_group()
    _, inputs, targets = build("mlp")
    network, split, wrapped = sharded("nested"), sharded("tensor parallel"), DistributedDataParallel(build("mlp")[0])

    def inside(model: nn.Module) -> None:
        with gathered_weights(model):
            raise AssertionError("entered")

    attempts: list[Callable[[], Any]] = [
        lambda: linearize(network, inputs),
        lambda: Probe(network, inputs, targets).curvature(),
        lambda: linearize(split, inputs),
        lambda: inside(split),
        lambda: linearize(wrapped, inputs),
    ]
    sentences = []
    for attempt in attempts:
        with pytest.raises(ValueError, match="Expected") as caught:
            attempt()
        sentences.append(str(caught.value))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(torch, "empty", exhausted)
        with pytest.raises(torch.OutOfMemoryError) as full:
            inside(network)
    sentences.append(str(full.value))
    with pytest.raises(KeyboardInterrupt), gathered_weights(network):
        raise KeyboardInterrupt
    is_sharded = all(type(p).__name__ == "DTensor" for p in network.parameters()) and network._forward_pre_hooks
    return [*sentences, "is as before" if is_sharded else "is left gathered"]


@on_cpu
@pytest.mark.ddp
def test_what_a_process_cannot_call_on_its_own_is_refused_and_an_interrupt_leaves_it_sharded() -> None:
    results = processes.run(refused, 2)
    assert [sentences.pop(5) for sentences in results] == [
        "Another process has no room for the weights of the whole network.",
        "CUDA out of memory.",
    ]
    for sentences in results:
        assert all("`with lightning_robust.functional.gathered_weights(network):`" in said for said in sentences[:2])
        assert all("spread over processes by tensor parallelism" in said for said in sentences[2:4])
        assert "Pass its `.module`" in sentences[4]
        assert sentences[5] == "is as before"


def test_nothing_happens_to_an_ordinary_network() -> None:
    network, _, _ = build("cnn_batchnorm")
    before = state_of(network)
    with gathered_weights(network):
        assert state_of(network) == before
    assert state_of(network) == before


@pytest.mark.parametrize("marker", ["ds_id", "FullyShardedDataParallel"])
def test_other_ways_of_spreading_weights_are_named(marker: str) -> None:
    network, inputs, _ = build("mlp")
    if marker == "ds_id":  # DeepSpeed ZeRO-3 marks each parameter so
        network[0].weight.ds_id = 0
        name = "DeepSpeed ZeRO-3"
    else:
        network = type(marker, (nn.Sequential,), {})(network)
        name = marker
    with pytest.raises(ValueError, match=f"sharded by `torch.distributed.fsdp.fully_shard` .* by {name}"):
        linearize(network, inputs)
