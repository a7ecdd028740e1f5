"""Metric of the curvature of the loss: the trace of its Hessian with respect to the weights."""

from __future__ import annotations

from torch import Tensor

from lightning_robust.metrics._curvature import CurvatureMetric, stderr_of_probes
from lightning_robust.metrics.base import error_bar


class HessianTrace(CurvatureMetric):
    """Trace of the Hessian of the mean loss with respect to the weights; lower is a flatter minimum.

    **Logged metrics** (each under the monitor's prefix)

    - ``hessian_trace``: of all trained parameters together, with ``_stderr``, ``_lower``, ``_upper``: the error from
      the choice of samples, probes included
    - ``hessian_trace_stderr_probes``: the error from the choice of probes alone, which ``num_probes`` lowers
    - ``hessian_trace/<parameter>``: of each parameter tensor; they add up to the whole
    - with ``estimator="gauss_newton"`` the same as ``hessian_trace_gauss_newton``, because on networks that are not
      piecewise linear it is another matrix

    Units: loss per squared unit of weight.

    State: see the base class; it grows with the number of layers, not with that of parameters or samples.

    Args:
        estimator: ``"auto"``, ``"gauss_newton"`` or ``"hutchinson"``, see
            :func:`~lightning_robust.functional.hessian_trace`.
        num_probes: Probes per sample. Two are plenty for piecewise linear networks and 32 samples or more; with fewer
            samples they are too few for an honest error bar. On other networks they leave an error of some 3 to 30 %,
            the same at every measurement, so that differences along a curve are known better.
        per_layer: Whether to return the value of each parameter tensor, too.

    Raises:
        ValueError: If ``estimator`` is unknown or ``num_probes`` is not positive, or ``per_layer`` no boolean.

    Source: Hutchinson 1989; PyHessian (arXiv 1912.07145); the estimator is ours.
    """

    def compute(self) -> dict[str, Tensor]:
        """Return the trace over all samples, as the class docstring lists it."""
        curvature = self._gathered()
        if curvature is None:
            return {}
        sums, total = curvature.sums, curvature.sums.total()
        key = self._key("hessian_trace")
        values = error_bar(key, total.means()[0], total.sample_stderr()[0])
        values |= stderr_of_probes(key, total.probe_stderr()[0])
        if self.per_layer:
            values |= {f"{key}/{name}": trace for name, trace in zip(sums.names, sums.means(), strict=True)}
        return values
