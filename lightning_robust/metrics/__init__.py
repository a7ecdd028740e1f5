"""Robustness as torchmetrics: ``update(probe)``, ``compute() -> dict[str, Tensor]``."""

from lightning_robust.metrics.adversarial_accuracy import AdversarialAccuracy
from lightning_robust.metrics.base import ProbeMetric
from lightning_robust.metrics.fisher_rao_margin import FisherRaoMargin
from lightning_robust.metrics.fisher_spectral_norm import FisherSpectralNorm
from lightning_robust.metrics.hessian_trace import HessianTrace
from lightning_robust.metrics.linearized_accuracy import LinearizedAccuracy
from lightning_robust.metrics.weight_curvature_index import WeightCurvatureIndex

METRICS: dict[str, type[ProbeMetric]] = {
    "adversarial_accuracy": AdversarialAccuracy,
    "fisher_rao_margin": FisherRaoMargin,
    "fisher_spectral_norm": FisherSpectralNorm,
    "hessian_trace": HessianTrace,
    "linearized_accuracy": LinearizedAccuracy,
    "weight_curvature_index": WeightCurvatureIndex,
}
"""Metrics by the names that configuration files use."""

__all__ = [
    "METRICS",
    "AdversarialAccuracy",
    "FisherRaoMargin",
    "FisherSpectralNorm",
    "HessianTrace",
    "LinearizedAccuracy",
    "ProbeMetric",
    "WeightCurvatureIndex",
]
