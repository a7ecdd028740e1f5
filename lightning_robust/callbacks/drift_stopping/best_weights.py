"""The weights of the best measurement, copied to main memory."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_robust.callbacks.drift_stopping import messages


def copy_of_weights(pl_module: LightningModule) -> dict[str, Tensor]:
    """Copy the module's ``state_dict`` to main memory."""
    return {
        key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for key, value in pl_module.state_dict().items()
    }


def check_restorable(trainer: Trainer) -> None:
    """Raise a ``MisconfigurationException`` if weights cannot be copied and put back in this Trainer."""
    if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
        raise MisconfigurationException(messages.sharded_weights(type(trainer.strategy).__name__))
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, WeightAveraging) for callback in callbacks):
        raise MisconfigurationException(messages.averaged_weights())
