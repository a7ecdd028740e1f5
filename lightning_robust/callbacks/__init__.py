"""Lightning callbacks."""

from lightning_robust.callbacks.notices import RobustnessWarning
from lightning_robust.callbacks.robustness_monitor import RobustnessMonitor

__all__ = ["RobustnessMonitor", "RobustnessWarning"]
