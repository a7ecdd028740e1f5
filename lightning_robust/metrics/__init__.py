"""Robustness as torchmetrics: ``update(probe)``, ``compute() -> dict[str, Tensor]``."""

from lightning_robust.metrics._base import ProbeMetric
from lightning_robust.metrics.attacks import AdversarialAccuracy
from lightning_robust.metrics.fisher import FisherSpectralNorm
from lightning_robust.metrics.linearized_margin import LinearizedAccuracy

METRICS: dict[str, type[ProbeMetric]] = {
    "adversarial_accuracy": AdversarialAccuracy,
    "fisher_spectral_norm": FisherSpectralNorm,
    "linearized_accuracy": LinearizedAccuracy,
}
"""Metrics by the names that configuration files use."""

__all__ = ["METRICS", "AdversarialAccuracy", "FisherSpectralNorm", "LinearizedAccuracy", "ProbeMetric"]
