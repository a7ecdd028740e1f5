"""Estimators as pure functions: torch in, torch out, options keyword-only."""

from lightning_robust.functional.attacks import pgd
from lightning_robust.functional.fisher import (
    CalibratedSpectralNorm,
    calibrated_fim_spectral_norm,
    fim_spectral_norm,
    fim_trace,
    fit_temperature,
    saturated,
)
from lightning_robust.functional.linearization import Linearization, linearize
from lightning_robust.functional.linearized_margin import (
    linearized_accuracy,
    linearized_margin,
    linearized_margin_linf,
)

__all__ = [
    "CalibratedSpectralNorm",
    "Linearization",
    "calibrated_fim_spectral_norm",
    "fim_spectral_norm",
    "fim_trace",
    "fit_temperature",
    "linearize",
    "linearized_accuracy",
    "linearized_margin",
    "linearized_margin_linf",
    "pgd",
    "saturated",
]
