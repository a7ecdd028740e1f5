"""Keeps what the user's module logs during a measurement out of the user's own records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule


@contextmanager
def muted_logging(pl_module: LightningModule) -> Iterator[None]:
    """Silence ``self.log`` and ``self.log_dict`` of the module."""
    silent = {"log": _ignore, "log_dict": _ignore}
    shadowed = {name: vars(pl_module)[name] for name in silent if name in vars(pl_module)}
    vars(pl_module).update(silent)
    try:
        yield
    finally:
        for name in silent:
            del vars(pl_module)[name]
        vars(pl_module).update(shadowed)


def _ignore(*args: object, **kwargs: object) -> None:
    """Do nothing, in place of ``self.log``."""
