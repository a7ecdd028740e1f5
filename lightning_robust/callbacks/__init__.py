"""Lightning callbacks."""

from lightning_robust.callbacks.drift_stopping.callback import RobustnessDriftStopping
from lightning_robust.callbacks.monitor.callback import RobustnessMonitor
from lightning_robust.callbacks.warn_once import RobustnessWarning

__all__ = ["RobustnessDriftStopping", "RobustnessMonitor", "RobustnessWarning"]
