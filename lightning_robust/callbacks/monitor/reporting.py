"""Hands the values of a measurement to Lightning: callback metrics, loggers, progress bar, TensorBoard's layout."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torchmetrics import SumMetric

from lightning_robust.callbacks.monitor.measurement import Values
from lightning_robust.callbacks.monitor.status import JointStatus
from lightning_robust.dashboard.tensorboard_layout import write_layout
from lightning_robust.metrics import ProbeMetric


class Reporter:
    """Logs the values of one monitor, and remembers them.

    Args:
        prefix: Beginning of the logged keys.
        prog_bar: Whether headlines go into the progress bar, and a line of text above it.

    Attributes:
        values: The last values logged in this run, by logged key.
        directions: Whether higher values are better, by logged key.
        best_untrained: Logged keys whose best values are those of a network at initialisation.
    """

    def __init__(self, prefix: str, *, prog_bar: bool) -> None:
        self.prefix, self._prog_bar = prefix, prog_bar
        self._laid_out: set[str] = set()  # directories that have a layout
        self.values: dict[str, float] = {}
        self.directions: dict[str, bool | None] = {}
        self.best_untrained: set[str] = set()

    def report(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        metrics: Sequence[ProbeMetric],
        values: Values,
        status: JointStatus,
    ) -> dict[str, float]:
        """Log the values of a measurement, and return them by key, without the prefix."""
        for number, computed in values.items():
            self.directions |= {self.prefix + key: metrics[number].direction(key) for key in computed}
            if metrics[number].best_untrained:
                directed = (self.prefix + key for key in computed)
                self.best_untrained.update(key for key in directed if self.directions[key] is not None)
        flat = {key: float(value) for computed in values.values() for key, value in computed.items()}
        flat |= {"num_samples": float(status.num_samples), "seconds": status.seconds}
        flat |= {"overhead": status.overhead} if status.overhead else {}
        headlines = [next(iter(computed)) for computed in values.values() if computed]  # the most telling key of each
        self.log(pl_module, flat, in_bar=headlines if self._prog_bar else ())
        if self._prog_bar and trainer.progress_bar_callback is not None:
            summary = ", ".join(f"{key} {flat[key]:.4g}" for key in headlines)
            trainer.progress_bar_callback.print(
                f"robustness in epoch {trainer.current_epoch}, on {status.num_samples} samples: {summary}"
                f" ({status.seconds:.1f} s)"
            )
        return flat

    def log(self, pl_module: LightningModule, values: dict[str, float], *, in_bar: Sequence[str] = ()) -> None:
        """Log the finite values, which are the same on all processes.

        Lightning warns about values that are not synchronised, except for those of a metric that does not synchronise.
        It asks which attribute holds the metric, but never looks there.
        """
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        for key, value in finite.items():
            agreed = SumMetric(sync_on_compute=False)
            agreed.update(value)
            LightningModule.log(  # the module may override its own
                pl_module,
                self.prefix + key,
                agreed,
                metric_attribute=self.prefix + key,
                prog_bar=key in in_bar,
                on_step=False,
                on_epoch=True,
                batch_size=1,
            )
        self.values |= {self.prefix + key: value for key, value in finite.items()}

    def lay_out(self, trainer: Trainer, reporters: Sequence[Reporter]) -> None:
        """Write TensorBoard's Custom Scalars layout for the keys of all reporters, once per log directory."""
        keys = {reporter.prefix: list(reporter.values) for reporter in reporters if reporter.values}
        for logger in trainer.loggers if keys else ():
            if isinstance(logger, TensorBoardLogger) and logger.log_dir not in self._laid_out:
                self._laid_out.add(logger.log_dir)
                write_layout(logger, keys)
