"""The weights of the best measurement, copied to main memory."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor


def copy_of_weights(pl_module: LightningModule) -> dict[str, Tensor]:
    """Copy the module's ``state_dict`` to main memory."""
    return {
        key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for key, value in pl_module.state_dict().items()
    }


def check_restorable(trainer: Trainer) -> None:
    """Raise a ``MisconfigurationException`` if weights cannot be copied and put back in this Trainer."""
    if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy):
        strategy = type(trainer.strategy).__name__
        raise MisconfigurationException(
            f"Expected argument `restore_best_weights` to be False with {strategy}, which spreads the weights over"
            " processes. To keep the best weights, add a `ModelCheckpoint` that monitors the same key."
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, WeightAveraging) for callback in callbacks):
        raise MisconfigurationException(
            "Expected argument `restore_best_weights` to be False with weight averaging, which puts in its own"
            " weights for validation and at the end. To keep the best weights, add a `ModelCheckpoint` that monitors"
            " the same key."
        )
