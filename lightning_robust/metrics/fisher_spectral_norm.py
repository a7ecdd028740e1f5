"""Metric of the input Fisher information, always with several statistics: no single one can be trusted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from lightning_robust.functional.input_space.fisher_information import (
    calibrated_fim_spectral_norm,
    fim_spectral_norm,
    fim_trace,
    saturated,
)
from lightning_robust.functional.input_space.likelihoods import (
    NAMES,
    LikelihoodName,
    column_likelihood_of,
    likelihood_of,
)
from lightning_robust.functional.input_space.loss_curves import loss_curves, num_positions
from lightning_robust.metrics._information_rows import (
    NUM_SUMMARIES,
    Measured,
    from_summaries,
    from_triangles,
    summaries,
    upper_triangles,
)
from lightning_robust.metrics.base import ProbeMetric, error_bar, error_bar_of_mean, joined
from lightning_robust.probe import Probe

_MANY_CLASSES = 200  # fewer take milliseconds per sample
_OF_LOSS_CURVES = 10.0  # of whose time is the algebra that a sequence takes
_UNCONVERGED = "fim_spectral_norm_unconverged"


class FisherSpectralNorm(ProbeMetric):
    """Spectral norm of the Fisher information with respect to the input; lower is more robust.

    **Logged metrics** (each under the monitor's prefix)

    - ``fim_spectral_norm``: mean over samples, with ``_stderr``, ``_lower``, ``_upper``
    - ``fim_spectral_norm_median``, ``_p95``, ``_max``: other statistics of the same values. The median of a confident
      network is near 0 however robust the network is. It is logged to show this, not as a measure of robustness.
    - ``fim_spectral_norm_calibrated``: mean at the fitted temperature, with ``_stderr``, ``_lower``, ``_upper``
    - ``fim_trace``: mean trace, with ``_stderr``, ``_lower``, ``_upper``
    - ``fim_spectral_norm_unconverged``: share of samples whose λ is only known to be at least the value that counts;
      logged with more than 32 outputs
    - ``temperature``: temperature that minimises the negative log-likelihood of the same samples
    - ``saturated``: share of samples with a probability above 0.999, whose λ says little. With likelihood
      ``"bernoulli"`` all labels must have one

    With likelihood ``"gaussian"``, λ is ‖J‖² at a standard deviation σ = 1 of the errors, the temperature is the root
    mean square residual σ, the calibrated λ is ‖J‖² / σ², and there is no ``saturated``.

    With more than 32 outputs λ is found in a Krylov subspace, to within 1 % for nearly all samples, and the trace is
    estimated (see :func:`~lightning_robust.functional.fim_spectral_norm_matrix_free`). The calibrated values are then
    those at the temperature of the probe; where another one fits all samples, they follow from values and derivatives
    there and at 1.

    With likelihood ``"token"`` a sample is a sequence, and its information is summed over the positions that count.
    Sequences without any are left out, and there is no ``saturated``.

    With queries, the bias that their noise gives λ is removed (see
    :func:`~lightning_robust.functional.fim_spectral_norm_by_queries`).

    Units: squared nats per squared input unit, un-normalised if the probe has ``input_std``.

    State: targets and outputs of each sample, because the temperature is fitted to all samples of all processes, and
    the upper triangle of its Gram matrix: ``1 + C + C(C + 1)/2`` numbers. With more than 32 outputs seven numbers take
    the place of the Gram matrix. With ``"bernoulli"`` and ``"gaussian"`` there is a target for each output. Of a
    sequence there are 61 numbers.

    Source: arXiv 2606.04767; the calibration is ours.
    """

    higher_is_better = False
    best_untrained = True
    linearizations = ("first",)
    krylov_passes = 32.0
    rows: list[Tensor]
    summaries: list[Tensor]
    num_classes: Tensor
    likelihood: Tensor
    gram_variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_float64_rows("rows")  # flat, because a process without samples does not know C
        self.add_float64_rows("summaries")  # flat, of samples without Gram matrices
        self.add_float64_state("num_classes", reduce="max")
        self.add_float64_state("likelihood", reduce="max")  # 1 + its place among the names; 0 without samples
        self.add_float64_state("gram_variance", reduce="max")  # of Gram matrices that were estimated by queries

    def _add(self, probe: Probe) -> None:
        linearization = probe.linearized_if_few
        if linearization is None:
            self.summaries.append(self._rows_of(probe, probe.information.logits, summaries(probe.information)))
        else:
            variance = torch.full_like(self.gram_variance, linearization.gram_variance)
            if self.num_classes and variance != self.gram_variance:
                raise ValueError("Expected as many queries for all samples, but probes with different numbers came.")
            self.rows.append(self._rows_of(probe, linearization.logits, upper_triangles(linearization.gram)))
            self.gram_variance = variance

    def _rows_of(self, probe: Probe, logits: Tensor | None, numbers: Tensor) -> Tensor:
        """Evidence of the temperature, and numbers (N, K) of samples, flat."""
        kind = probe.reading.likelihood
        evidence = probe.evidence if logits is None else kind.evidence(logits, probe.reading.beside(logits))
        c = evidence.shape[1] if logits is None else logits.shape[1]
        if self.num_classes not in (0, c):
            raise ValueError(f"Expected logits of {int(self.num_classes)} classes, as before, but got {c}.")
        number = 1 + NAMES.index(probe.likelihood)
        if self.likelihood not in (0, number):
            before = NAMES[int(self.likelihood) - 1]
            raise ValueError(f"Expected likelihood {before!r}, as before, but got {probe.likelihood!r}.")
        rows = torch.cat([part.to(self.num_classes) for part in (evidence, numbers)], dim=1)
        self.num_classes = torch.full_like(self.num_classes, c)
        self.likelihood = torch.full_like(self.likelihood, number)
        return rows.flatten()

    def direction(self, key: str) -> bool | None:
        """Lower values are better, but for the temperature and the shares of samples."""
        return None if key in ("temperature", "saturated", _UNCONVERGED) else super().direction(key)

    def caveats(self, values: Mapping[str, float]) -> dict[str, str]:
        """Warn if values are no more than lower bounds (see :meth:`ProbeMetric.caveats`)."""
        if not values.get(_UNCONVERGED, 0.0) > 0:
            return {}
        return {
            _UNCONVERGED: "is not 0: the λ of these samples is at least the value that counts, and the residuals in"
            ' their Krylov subspaces are too large to say more. `RobustnessMonitor(linearization="exact")` takes all'
            " gradients."
        }

    def seconds_per_sample(self, outputs: Tensor) -> float:
        """Time the eigenvalue problems of one sample, where they are large; or the algebra of a sequence."""
        if outputs.ndim > 2:
            start = time.perf_counter()
            loss_curves(outputs[:1], outputs[:1].argmax(dim=2)).sum().item()
            return _OF_LOSS_CURVES * (time.perf_counter() - start)
        c = outputs.shape[1]
        if c < _MANY_CLASSES:
            return 0.0
        rows = torch.rand(1, c, c, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        logits, gram = outputs[:1].detach().cpu().double().to(self.device), (rows @ rows.mT).to(self.device)

        def seconds() -> float:
            start = time.perf_counter()
            calibrated_fim_spectral_norm(logits, gram, logits.argmax(dim=1)).mean.item()
            (fim_spectral_norm(logits, gram) + fim_trace(logits, gram)).sum().item()
            return time.perf_counter() - start

        return min(seconds() for _ in range(2))  # the first call may load a library

    def bytes_per_sample(self, num_classes: int) -> float:
        """Upper triangle and full Gram matrix, in float64."""
        return 12.0 * num_classes**2

    def compute(self) -> dict[str, Tensor]:
        """Return the statistics over all samples that the class docstring lists."""
        c = int(self.num_classes)
        if c == 0:
            return {}
        likelihood = cast(LikelihoodName, NAMES[int(self.likelihood) - 1])
        evidence, numbers = self._parts(c, likelihood)
        if not len(evidence):
            return {}
        measured = self._measured(evidence, numbers, likelihood)
        calibrated = measured.calibrated
        self.per_sample = {"fim_spectral_norm": measured.norms, "fim_trace": measured.traces}
        values = {
            **error_bar_of_mean("fim_spectral_norm", measured.norms),
            "fim_spectral_norm_median": measured.norms.quantile(0.5),
            "fim_spectral_norm_p95": measured.norms.quantile(0.95),
            "fim_spectral_norm_max": measured.norms.max(),
            **error_bar("fim_spectral_norm_calibrated", calibrated.mean, calibrated.stderr),
            **error_bar_of_mean("fim_trace", measured.traces),
            "temperature": calibrated.temperature,
        }
        if measured.converged is not None:
            values[_UNCONVERGED] = 1 - measured.converged.double().mean()
        if likelihood in ("categorical", "bernoulli"):
            logits = column_likelihood_of(likelihood).apart(evidence)[0]
            values["saturated"] = saturated(logits, likelihood=likelihood).double().mean()
        return values

    def _parts(self, c: int, likelihood: LikelihoodName) -> tuple[Tensor, list[Tensor]]:
        """Evidence ``(N, E)`` of the temperature, and the other numbers of samples, in parts.

        Sequences without any position that counts are left out.
        """
        summed, kind = joined(self.summaries), likelihood_of(likelihood)
        if len(summed) and len(self.rows) and len(joined(self.rows)):
            raise ValueError("Expected one way to linearise for all samples, but got both 'exact' and 'krylov'.")
        held: list[Tensor] | Tensor = summed if len(summed) else self.rows  # a tensor, once torchmetrics has gathered
        size = kind.evidence_size(c)
        width = size + (NUM_SUMMARIES if len(summed) else c * (c + 1) // 2)
        parts = [part.view(-1, width) for part in ([held] if isinstance(held, Tensor) else held)]
        if kind.has_positions:
            parts = [part[num_positions(part[:, :size]) > 0] for part in parts]
        return torch.cat([part[:, :size] for part in parts]), [part[:, size:] for part in parts]

    def _measured(self, evidence: Tensor, numbers: list[Tensor], likelihood: LikelihoodName) -> Measured:
        if len(joined(self.summaries)):
            return from_summaries(evidence, torch.cat(numbers), likelihood)
        logits, targets = column_likelihood_of(likelihood).apart(evidence)
        triangles = chain.from_iterable(numbers)
        return from_triangles(logits, targets, triangles, likelihood, gram_variance=float(self.gram_variance))
