"""Robustness curves next to accuracy in PyTorch Lightning, measured without running attacks.

Add :class:`RobustnessMonitor` to the callbacks of a Trainer. Without Lightning, update the metrics with a
:class:`Probe`, or call the estimators in :mod:`lightning_robust.functional`.
"""

from importlib.metadata import PackageNotFoundError, version

from lightning_robust import functional
from lightning_robust.callbacks import RobustnessDriftStopping, RobustnessMonitor, RobustnessWarning
from lightning_robust.metrics import (
    AdversarialAccuracy,
    FisherRaoMargin,
    FisherSpectralNorm,
    HessianTrace,
    LinearizedAccuracy,
    ProbeMetric,
    WeightCurvatureIndex,
)
from lightning_robust.probe import Probe

try:
    __version__ = version("lightning-robust")
except PackageNotFoundError:  # run from a source tree without installation
    __version__ = "unknown"

__all__ = [
    "AdversarialAccuracy",
    "FisherRaoMargin",
    "FisherSpectralNorm",
    "HessianTrace",
    "LinearizedAccuracy",
    "Probe",
    "ProbeMetric",
    "RobustnessDriftStopping",
    "RobustnessMonitor",
    "RobustnessWarning",
    "WeightCurvatureIndex",
    "__version__",
    "functional",
]
