"""Lightning callbacks."""

from lightning_robust.callbacks.drift_stopping import RobustnessDriftStopping
from lightning_robust.callbacks.notices import RobustnessWarning
from lightning_robust.callbacks.robustness_monitor import RobustnessMonitor

__all__ = ["RobustnessDriftStopping", "RobustnessMonitor", "RobustnessWarning"]
