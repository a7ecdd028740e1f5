"""The weights of the best measurement: copied to main memory, and put back as a whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_robust.callbacks.monitor.status import in_words, synchronised

# Path components that wrappers around a module add to its keys: compiled, checkpointed, data-parallel modules.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"}


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


def put_weights_back(pl_module: LightningModule, weights: Mapping[str, Tensor]) -> str | None:
    """Load weights if they fit the module in every process; else leave it as it is in all of them, and say why.

    Modules may have been wrapped or unwrapped since, which changes keys but nothing else. Every process must call this.
    """
    fitting, reason = _fitted(weights, pl_module.state_dict())
    if reason := _of_any(synchronised(reason)):
        return reason
    before = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in _tensors(pl_module)]
    try:
        pl_module.load_state_dict(fitting, strict=pl_module.strict_loading)
    except Exception as error:  # from the module's own hooks
        reason = in_words(error)
    if reason := _of_any(synchronised(reason)):
        with torch.no_grad():
            for tensor, values in before:
                tensor.copy_(values)
    return reason


def _tensors(pl_module: LightningModule) -> list[Tensor]:
    return [tensor for tensor in (*pl_module.parameters(), *pl_module.buffers()) if not is_lazy(tensor)]


def _of_any(reasons: Sequence[str | None]) -> str | None:
    return next(filter(None, reasons), None)


def _fitted(weights: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str | None]:
    """The weights under the keys of the module as it is now, and why they do not fit, if so."""
    keys = {key: key for key in weights}
    if weights.keys() != current.keys():
        keys, now = _by_unwrapped(weights), _by_unwrapped(current)
        if len(keys) < len(weights) or len(now) < len(current) or keys.keys() != now.keys():
            gone, new = sorted(weights.keys() - current.keys()), sorted(current.keys() - weights.keys())
            changes = [f"{what} {_listed(found)}" for what, found in (("lacks", gone), ("has", new)) if found]
            return {}, f"it {' and '.join(changes)} now"
        keys = {now[unwrapped]: key for unwrapped, key in keys.items()}
    fitting = {name: weights[key] for name, key in keys.items()}
    for name, value in fitting.items():
        if (was := _kind(value)) != (now_is := _kind(current[name])):
            return {}, f"`{name}` was {was} and is now {now_is}"
    return fitting, None


def _by_unwrapped(keys: Mapping[str, object]) -> dict[str, str]:
    """Keys by what they are without wrappers."""
    return {".".join(part for part in key.split(".") if part not in _WRAPPERS): key for key in keys}


def _kind(value: object) -> str:
    """Shape and kind of numbers; other values than tensors may be anything."""
    if not isinstance(value, Tensor):
        return "no tensor"
    if value.is_quantized:
        return "quantised"
    return f"{'floating point' if value.is_floating_point() else str(value.dtype)} of shape {tuple(value.shape)}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(f"`{name}`" for name in names[:2]) + more
