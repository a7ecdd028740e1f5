"""Robustness curves beside accuracy, for PyTorch Lightning, measured without running attacks.

Add :class:`RobustnessMonitor` to a Trainer's callbacks. The metrics work without Lightning, on a :class:`Probe`; the
estimators without either, in :mod:`lightning_robust.functional`.
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
except PackageNotFoundError:  # a source tree on the path, which was never installed
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
