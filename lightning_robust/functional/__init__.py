"""Estimators as pure functions: torch in, torch out, options keyword-only."""

from lightning_robust.functional._sharding import gathered_weights
from lightning_robust.functional.attacks import pgd
from lightning_robust.functional.drift import Drift, drift, drift_history, drifted_together
from lightning_robust.functional.fisher import (
    CalibratedSpectralNorm,
    calibrated_fim_spectral_norm,
    fim_spectral_norm,
    fim_trace,
    fit_temperature,
    saturated,
)
from lightning_robust.functional.hessian_trace import TraceEstimate, hessian_trace
from lightning_robust.functional.linearization import Linearization, linearize, relinearize
from lightning_robust.functional.linearized_margin import (
    linearized_accuracy,
    linearized_margin,
    linearized_margin_linf,
)
from lightning_robust.functional.weight_curvature_index import weight_curvature_index

__all__ = [
    "CalibratedSpectralNorm",
    "Drift",
    "Linearization",
    "TraceEstimate",
    "calibrated_fim_spectral_norm",
    "drift",
    "drift_history",
    "drifted_together",
    "fim_spectral_norm",
    "fim_trace",
    "fit_temperature",
    "gathered_weights",
    "hessian_trace",
    "linearize",
    "linearized_accuracy",
    "linearized_margin",
    "linearized_margin_linf",
    "pgd",
    "relinearize",
    "saturated",
    "weight_curvature_index",
]
