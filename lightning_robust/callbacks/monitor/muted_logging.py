"""Keeps what the user's module logs during a measurement out of the user's own records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric


@contextmanager
def muted_logging(pl_module: LightningModule) -> Iterator[None]:
    """Silence ``self.log`` of the module, and put the states of its torchmetrics back afterwards."""
    saved = [(metric, _copied(metric)) for metric in pl_module.modules() if isinstance(metric, Metric)]
    silent = {"log": _ignore, "log_dict": _ignore}
    shadowed = {name: vars(pl_module)[name] for name in silent if name in vars(pl_module)}
    vars(pl_module).update(silent)
    try:
        yield
    finally:
        for name in silent:
            del vars(pl_module)[name]
        vars(pl_module).update(shadowed)
        for metric, state in saved:
            vars(metric).update(state)


def _ignore(*args: object, **kwargs: object) -> None:
    """Do nothing, in place of ``self.log``."""


def _copied(metric: Metric) -> dict[str, object]:
    names = (*metric.metric_state, "_update_count", "_computed", "_forward_cache")
    state = {name: vars(metric)[name] for name in names if name in vars(metric)}
    return {name: value.clone() if isinstance(value, Tensor) else _listed(value) for name, value in state.items()}


def _listed(value: object) -> object:
    return list(value) if isinstance(value, list) else value
