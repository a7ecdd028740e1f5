"""Lightning callbacks."""

from lightning_robust.callbacks.robustness_monitor import RobustnessMonitor, RobustnessWarning

__all__ = ["RobustnessMonitor", "RobustnessWarning"]
