"""How the values of a measurement reach Lightning: callback metrics, loggers, progress bar."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer
from torchmetrics import SumMetric

from lightning_robust.callbacks.monitor.measurement import Values
from lightning_robust.callbacks.monitor.status import Verdict


def flattened(values: Values, verdict: Verdict) -> dict[str, float]:
    """The values of all metrics, then what is known of the measurement itself."""
    flat = {key: float(value) for computed in values.values() for key, value in computed.items()}
    flat |= {"num_samples": float(verdict.num_samples), "seconds": verdict.seconds}
    return flat | {"overhead": verdict.overhead} if verdict.overhead else flat


def headlines(values: Values) -> list[str]:
    """The most telling key of each metric."""
    return [next(iter(computed)) for computed in values.values() if computed]


def log(pl_module: LightningModule, values: Mapping[str, float], *, prefix: str, in_bar: list[str]) -> dict[str, float]:
    """Log those of the values that are finite, and return them by the keys under which they are logged.

    All processes hold the same values already, so none travels: a metric that does not synchronise is what Lightning
    takes for that without a warning. It asks for the attribute that holds it, and looks at it nowhere.
    """
    finite = {prefix + key: value for key, value in values.items() if math.isfinite(value)}
    shown = {prefix + key for key in in_bar}
    for key, value in finite.items():
        agreed = SumMetric(sync_on_compute=False)
        agreed.update(value)
        LightningModule.log(  # whatever the module makes of its own
            pl_module,
            key,
            agreed,
            metric_attribute=key,
            prog_bar=key in shown,
            on_step=False,
            on_epoch=True,
            batch_size=1,
        )
    return finite


def print_line(trainer: Trainer, values: Mapping[str, float], *, keys: list[str]) -> None:
    """Print a line of text above the progress bar, if there is one."""
    if trainer.progress_bar_callback is not None:
        summary = ", ".join(f"{key} {values[key]:.4g}" for key in keys)
        trainer.progress_bar_callback.print(
            f"robustness in epoch {trainer.current_epoch}, on {values['num_samples']:.0f} samples: {summary}"
            f" ({values['seconds']:.1f} s)"
        )
