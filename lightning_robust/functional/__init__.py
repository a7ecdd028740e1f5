"""Estimators as pure functions: torch in, torch out, options keyword-only."""

from lightning_robust.functional._isolation.sharding import gathered_weights
from lightning_robust.functional.curvature.hessian_trace import TraceEstimate, hessian_trace
from lightning_robust.functional.curvature.weight_curvature_index import weight_curvature_index
from lightning_robust.functional.drift.rule import Drift, drift, drift_history, drifted_together
from lightning_robust.functional.fisher_rao.class_shielding import ClassShielding, class_shielding
from lightning_robust.functional.fisher_rao.geometry import fisher_rao_distance, fisher_rao_margin_bound
from lightning_robust.functional.fisher_rao.paths import FisherRaoPaths, trace_fisher_rao_paths
from lightning_robust.functional.fisher_rao.ratios import Estimate
from lightning_robust.functional.input_space.attacks import pgd
from lightning_robust.functional.input_space.decision_margin import decision_margin
from lightning_robust.functional.input_space.fisher_information import (
    CalibratedSpectralNorm,
    calibrated_fim_spectral_norm,
    fim_spectral_norm,
    fim_trace,
    saturated,
)
from lightning_robust.functional.input_space.likelihoods import fit_temperature
from lightning_robust.functional.input_space.linearization import Linearization, linearize
from lightning_robust.functional.input_space.linearized_margin import (
    linearized_accuracy,
    linearized_margin,
    linearized_margin_linf,
)
from lightning_robust.functional.input_space.matrix_free import (
    SpectralNormEstimate,
    fim_spectral_norm_matrix_free,
)
from lightning_robust.functional.input_space.queries import (
    QueriedSpectralNorm,
    fim_spectral_norm_by_queries,
    linearize_by_queries,
)
from lightning_robust.functional.input_space.relinearization import relinearize

__all__ = [
    "CalibratedSpectralNorm",
    "ClassShielding",
    "Drift",
    "Estimate",
    "FisherRaoPaths",
    "Linearization",
    "QueriedSpectralNorm",
    "SpectralNormEstimate",
    "TraceEstimate",
    "calibrated_fim_spectral_norm",
    "class_shielding",
    "decision_margin",
    "drift",
    "drift_history",
    "drifted_together",
    "fim_spectral_norm",
    "fim_spectral_norm_by_queries",
    "fim_spectral_norm_matrix_free",
    "fim_trace",
    "fisher_rao_distance",
    "fisher_rao_margin_bound",
    "fit_temperature",
    "gathered_weights",
    "hessian_trace",
    "linearize",
    "linearize_by_queries",
    "linearized_accuracy",
    "linearized_margin",
    "linearized_margin_linf",
    "pgd",
    "relinearize",
    "saturated",
    "trace_fisher_rao_paths",
    "weight_curvature_index",
]
