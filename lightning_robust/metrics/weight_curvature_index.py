"""Metric of the Weight-Curvature Index, on clean and on attacked inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_robust.functional._validation.arguments import as_number, check_positive_integer, expected_but_got
from lightning_robust.functional.curvature.plan import Estimator
from lightning_robust.functional.curvature.weight_curvature_index import curvature_slopes, curvature_terms
from lightning_robust.functional.input_space.attacks import Norm, check_norm
from lightning_robust.metrics._curvature import CurvatureMetric, stderr_of_probes
from lightning_robust.metrics.base import error_bar
from lightning_robust.metrics.keys import per_layer
from lightning_robust.probe import Attack


class WeightCurvatureIndex(CurvatureMetric):
    """``Σ_k ‖W_k‖_F √(tr H_k)`` over weight tensors with at least two dimensions; lower is more robust.

    With the same estimator and number of probes as :class:`HessianTrace`, both share one measurement.

    **Logged metrics** (each under the monitor's prefix)

    - ``wci``: the index, with ``_stderr``, ``_lower``, ``_upper``: the error from the choice of samples and probes, by
      the delta method
    - ``wci_stderr_probes``: the error from the choice of probes alone
    - ``wci_negative_layers``: how many layers have a negative trace and count as 0
    - ``wci_per_layer/<parameter>``: the term of each weight tensor; they add up to the index. A weight to which no
      gradient leads from the outputs of any sample has no key
    - with ``attack`` all of these under ``adversarial_wci``
    - with ``estimator="gauss_newton"`` under ``wci_gauss_newton`` or ``adversarial_wci_gauss_newton``

    On smooth networks and attacked inputs most layers can have negative curvature. They count as 0, which makes the
    index meaningless: check ``adversarial_wci_negative_layers``, or use ``estimator="gauss_newton"``, which is never
    negative.

    Units: square root of the loss.

    State: see the base class.

    Args:
        estimator: ``"auto"``, ``"gauss_newton"`` or ``"hutchinson"``, see
            :func:`~lightning_robust.functional.hessian_trace`.
        num_probes: Probes per sample.
        per_layer: Whether to return the term of each weight tensor as well.
        attack: Measures the loss on inputs attacked by ``"pgd"``, as the source does, or by ``"fgsm"``, a single step
            of PGD.
        epsilon: Size of the attack, in units of the un-normalised input if the probe has ``input_std``.
        norm: Norm of the attack, ``"linf"`` or ``"l2"``.
        steps: Number of steps of PGD.

    Raises:
        ValueError: If an argument has a wrong value.

    Source: arXiv 2410.07719.
    """

    def __init__(
        self,
        estimator: Estimator = "auto",
        num_probes: int = 2,
        per_layer: bool = True,
        attack: Literal["pgd", "fgsm"] | None = None,
        epsilon: float = 8 / 255,
        norm: Norm = "linf",
        steps: int = 10,
    ) -> None:
        super().__init__(estimator, num_probes, per_layer)
        if attack is not None and not (isinstance(attack, str) and attack in ("pgd", "fgsm")):
            raise ValueError(expected_but_got("attack", "'pgd', 'fgsm' or None", attack))
        check_positive_integer("steps", steps)
        size = as_number(epsilon)
        if not 0 <= size < math.inf:
            raise ValueError(expected_but_got("epsilon", "a finite number ≥ 0", epsilon))
        check_norm(norm)
        if attack is not None:
            self.depends_on_units = True
            self.attack = Attack(size, norm, steps if attack == "pgd" else 1)
            self.add_configuration(estimator, num_probes, self.attack)

    def direction(self, key: str) -> bool | None:
        """Lower values are better, but for the count of layers without one."""
        return None if key == f"{self._key(self._index)}_negative_layers" else super().direction(key)

    @property
    def _index(self) -> str:
        return "wci" if self.attack is None else "adversarial_wci"

    def compute(self) -> dict[str, Tensor]:
        """Return the index over all samples, as the class docstring lists it."""
        gathered = self._gathered()
        if gathered is None:
            return {}
        key, (sums, norms) = self._key(self._index), gathered
        counted, norms, traces = norms.isfinite(), norms.nan_to_num(nan=0.0), sums.means()
        terms = curvature_terms(norms, traces)

        def linearised(stderr: Tensor) -> Tensor:
            return curvature_slopes(norms, traces, stderr)[:, None]

        by_samples = sums.combined(linearised(sums.sample_stderr())).sample_stderr()[0]
        by_probes = sums.combined(linearised(sums.probe_stderr())).probe_stderr()[0]
        by_samples = torch.maximum(by_samples, by_probes.nan_to_num(nan=0.0))  # each has a linearisation of its own
        values = {name: value.clamp_min(0) for name, value in error_bar(key, terms.sum(), by_samples).items()}
        values |= stderr_of_probes(key, by_probes)
        values[f"{key}_negative_layers"] = (counted & (traces < 0)).sum().to(terms)
        if self.per_layer:
            layers = zip(sums.names, terms, counted, strict=True)
            values |= per_layer(key, {name: term for name, term, is_counted in layers if is_counted})
        return values

    def caveats(self, values: Mapping[str, float]) -> dict[str, str]:
        """Warn if weights are left out or negative curvature makes it unreliable (see :meth:`ProbeMetric.caveats`)."""
        key = self._index
        traced = any(name.startswith("hessian_trace") for name in values)  # that metric has the same caveat
        caveats = {} if traced else self._about_left_out(self._key(key))
        negative, stderr = values.get(f"{key}_negative_layers", 0.0), values.get(f"{key}_stderr", 0.0)
        if not (negative > 0 and stderr > 0.5 * values[key]):
            return caveats
        remedy = "" if self.attack is None else " or a smaller `epsilon`"
        return caveats | {
            key: "is not reliable: some layers have negative curvature (`…_negative_layers`), truly or by noise of"
            " the probes, and count as 0. `WeightCurvatureIndex(estimator='gauss_newton')` is never negative; more"
            f" `num_probes`{remedy} may also help."
        }
