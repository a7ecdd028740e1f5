"""Metric of the curvature of the loss: the trace of its Hessian with respect to the weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_robust.metrics._curvature import CurvatureMetric, stderr_of_probes
from lightning_robust.metrics.base import error_bar
from lightning_robust.metrics.keys import per_layer

_FEW_SAMPLES = 10  # fewer leave a large error with any number of probes


class HessianTrace(CurvatureMetric):
    """Trace of the Hessian of the mean loss with respect to the weights; lower is a flatter minimum.

    **Logged metrics** (each under the monitor's prefix)

    - ``hessian_trace``: trace over all trained parameters, with ``_stderr``, ``_lower``, ``_upper``: the error from the
      choice of samples and probes
    - ``hessian_trace_stderr_probes``: the error from the choice of probes alone, which more ``num_probes`` reduce
    - ``hessian_trace_per_layer/<parameter>``: trace of each parameter tensor; they add up to the total. A parameter to
      which no gradient leads from the outputs of any sample has no key
    - with ``estimator="gauss_newton"`` all of these under ``hessian_trace_gauss_newton``, because the matrix differs on
      networks that are not piecewise linear

    Units: loss per squared unit of weight.

    State: see the base class; it grows with the number of layers, but not of parameters or samples.

    Args:
        estimator: ``"auto"``, ``"gauss_newton"`` or ``"hutchinson"``, see
            :func:`~lightning_robust.functional.hessian_trace`.
        num_probes: Probes per sample. Two are plenty for piecewise linear networks and at least 32 samples; with fewer
            samples the error bar is too small. On other networks two probes leave an error of 3 to 30 %, the same at
            every measurement, so differences along a curve are known better.
        per_layer: Whether to return the value of each parameter tensor as well.

    Raises:
        ValueError: If ``estimator`` is unknown, ``num_probes`` is not positive, or ``per_layer`` is not a boolean.

    Source: Hutchinson 1989; PyHessian (arXiv 1912.07145); the estimator is ours.
    """

    def compute(self) -> dict[str, Tensor]:
        """Return the trace over all samples, as the class docstring lists it."""
        gathered = self._gathered()
        if gathered is None:
            return {}
        key, sums = self._key("hessian_trace"), gathered[0]
        total = sums.total()
        values = error_bar(key, total.means()[0], total.sample_stderr()[0])
        values |= stderr_of_probes(key, total.probe_stderr()[0])
        if self.per_layer:
            values |= per_layer(key, dict(zip(sums.names, sums.means(), strict=True)))
        return values

    def caveats(self, values: Mapping[str, float]) -> dict[str, str]:
        """Warn if parameters are left out or the trace is mostly noise of probes (see :meth:`ProbeMetric.caveats`)."""
        caveats = self._about_left_out(self._key("hessian_trace"))
        trace, noise = values.get("hessian_trace", 0.0), values.get("hessian_trace_stderr_probes", 0.0)
        if not (noise > abs(trace) and values.get("num_samples", 0) >= _FEW_SAMPLES):
            return caveats
        return caveats | {
            "hessian_trace": "is mostly noise of its random probes (`…_stderr_probes`), so its level means little. The"
            " noise is the same at every measurement. `HessianTrace(num_probes=32)` has a quarter of it. torch's own"
            " losses (modules, functions and `functools.partial` of them, but not lambdas) need fewer probes than"
            " custom ones."
        }
