"""Weights are put back as a whole, in every process, or not at all."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_robust import RobustnessDriftStopping
from lightning_robust.callbacks.drift_stopping.best_weights import copy_of_weights, put_weights_back
from tests.helpers import processes
from tests.helpers.training import Classifier, classifier, loader, robustness_warnings, trainer

Change = Callable[[Classifier], Any]


class Wrapped(nn.Module):
    """Keeps a network under the name that data-parallel wrappers use."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class Choking(nn.Linear):
    """Takes its weight from a state, then fails."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        raise ValueError("choked")


def compiled(model: Classifier) -> None:
    model.network = torch.compile(model.network, backend="eager")  # type: ignore[assignment]


def wrapped(model: Classifier) -> None:
    model.network = Wrapped(model.network)


def inner_compiled(model: Classifier) -> None:
    model.network[0] = torch.compile(model.network[0], backend="eager")  # type: ignore[index]


def pruned(model: Classifier) -> None:
    prune.l1_unstructured(model.network[5], "weight", 0.3)  # type: ignore[index]


def reparametrised(model: Classifier) -> None:
    parametrizations.weight_norm(model.network[5])  # type: ignore[index]


def grown(model: Classifier) -> None:
    model.network[5] = nn.Linear(96, 7)  # type: ignore[index]


def deepened(model: Classifier) -> None:
    model.network.append(nn.Linear(4, 4))  # type: ignore[operator]


def quantised(model: Classifier) -> None:
    weight = model.network[5].weight  # type: ignore[index]
    model.network[5].weight = nn.Parameter((weight * 10).to(torch.int8), requires_grad=False)  # type: ignore[index]


def choking(model: Classifier) -> None:
    model.network[5] = Choking(96, 4)  # type: ignore[index]


FITTING: list[Change] = [lambda model: None, compiled, wrapped, inner_compiled]
OTHERS: list[Change] = [pruned, reparametrised, grown, deepened, quantised, choking]


def unwrapped(model: Classifier) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


@pytest.mark.parametrize("change", FITTING, ids=["unchanged", "compiled", "wrapped", "inner compiled"])
@pytest.mark.parametrize("backwards", [False, True], ids=["wrapped since", "unwrapped since"])
def test_weights_return_into_a_module_that_was_wrapped_or_unwrapped(change: Change, backwards: bool) -> None:
    best, last = classifier(1), classifier(2)
    change(best if backwards else last)
    assert put_weights_back(last, copy_of_weights(best)) is None
    assert all(map(torch.equal, unwrapped(last), unwrapped(best)))


@pytest.mark.parametrize("change", OTHERS, ids=lambda change: change.__name__)
def test_a_module_of_another_structure_keeps_all_of_its_weights(change: Change) -> None:
    best, last = classifier(1), classifier(2)
    change(last)
    before = unwrapped(last)
    reason = put_weights_back(last, copy_of_weights(best))
    assert reason is not None
    assert ("choked" if change is choking else "network.") in reason
    assert all(map(torch.equal, unwrapped(last), before))


def test_ambiguous_wrappers_are_not_guessed() -> None:
    class Twins(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Linear(2, 2))
            self.network.module = nn.Linear(2, 2)

    best, last = Twins(), Twins()
    compiled(last)
    before = unwrapped(last)
    assert put_weights_back(last, copy_of_weights(best)) is not None
    assert all(map(torch.equal, unwrapped(last), before))


def put_back_on_one_of_two(rank: int, name: str) -> tuple[bool, bool]:
    processes.join_group()
    best, last = classifier(1), classifier(2)
    if rank == 1:
        globals()[name](last)
    before = unwrapped(last)
    reason = put_weights_back(last, copy_of_weights(best))
    return reason is not None, all(map(torch.equal, unwrapped(last), before))


@pytest.mark.ddp
@pytest.mark.parametrize("name", ["grown", "choking"])
def test_if_one_process_cannot_none_does(name: str) -> None:
    assert processes.run(put_back_on_one_of_two, 2, name) == [(True, True)] * 2


class Scored(Classifier):
    """Logs a score that is best in epoch 1, and is changed in epoch 3."""

    def __init__(self, change: Change) -> None:
        super().__init__(classifier().network)
        self.change = change
        self.kept: dict[int, dict[str, Tensor]] = {}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", [0.5, 0.9, 0.8, 0.7, 0.6][self.current_epoch], batch_size=1)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 3:
            self.change(self)

    def on_train_end(self) -> None:  # after the callbacks
        self.at_end = unwrapped(self)

    def on_validation_end(self) -> None:
        self.kept[self.current_epoch] = copy.deepcopy(self.state_dict())


@pytest.mark.parametrize("change", [pruned, grown, compiled], ids=lambda change: change.__name__)
def test_a_run_whose_network_changes_ends_well_and_says_what_it_kept(tmp_path: Path, change: Change) -> None:
    stopper, model = RobustnessDriftStopping("score", mode="max", restore_best_weights=True, patience=2), Scored(change)
    with robustness_warnings() as messages:
        run = trainer(stopper, root=tmp_path, max_epochs=5)
        run.fit(model, loader(), loader())
    assert run.state.finished
    expected = model.kept[1 if change is compiled else 4]
    assert all(map(torch.equal, unwrapped(model), expected.values()))
    assert len(messages) == (0 if change is compiled else 1)
    for message in messages:
        assert "did not put back the weights of epoch 1: the network has changed since then (" in message
        assert "`ModelCheckpoint(monitor='score', mode='max')`" in message
