"""Metric of the input Fisher information: never one statistic alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.functional._validation.tensors import check_targets
from lightning_robust.functional.input_space.fisher_information import (
    calibrated_fim_spectral_norm,
    fim_spectral_norm,
    fim_trace,
    saturated,
)
from lightning_robust.metrics.base import ProbeMetric, error_bar, error_bar_of_mean, joined
from lightning_robust.probe import Probe


class FisherSpectralNorm(ProbeMetric):
    """Spectral norm of the Fisher information with respect to the input; lower is more robust.

    **Logged metrics** (each under the monitor's prefix)

    - ``fim_spectral_norm``: mean over samples, with ``_stderr``, ``_lower``, ``_upper``
    - ``fim_spectral_norm_median``, ``_p95``, ``_max``: other statistics of the same values. The median of a confident
      network is near 0 whatever its robustness; it is here to show that, not to be trusted.
    - ``fim_spectral_norm_calibrated``: mean at the fitted temperature, with ``_stderr``, ``_lower``, ``_upper``
    - ``fim_trace``: mean trace
    - ``temperature``: fitted on the same samples by minimising their negative log-likelihood
    - ``saturated``: share of samples with a probability above 0.999, on which λ says little

    Units: squared nats per squared input unit. ``input_std`` of the probe makes that the un-normalised input.

    State: target, logits and upper half of the Gram matrix of each sample, because the temperature is fitted on all
    samples of all processes: ``1 + C + C(C + 1)/2`` numbers per sample.

    Source: arXiv 2606.04767; the calibration is ours.
    """

    higher_is_better = False
    best_untrained = True
    rows: list[Tensor] | Tensor
    num_classes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_float64_rows("rows")  # flat: a process without samples knows no number of classes
        self.add_float64_state("num_classes", reduce="max")

    def _add(self, probe: Probe) -> None:
        linearization = probe.linearization
        c = linearization.logits.shape[1]
        if self.num_classes not in (0, c):
            raise ValueError(f"Expected logits of {int(self.num_classes)} classes, as before, but got {c}.")
        upper = torch.triu_indices(c, c, device=linearization.gram.device)
        targets = check_targets(probe.targets, num_samples=len(probe))
        row = torch.cat([targets[:, None], linearization.logits, linearization.gram[:, upper[0], upper[1]]], dim=1)
        assert isinstance(self.rows, list)
        self.rows.append(row.to(self.num_classes).flatten())
        self.num_classes = torch.full_like(self.num_classes, c)

    def compute(self) -> dict[str, Tensor]:
        """Return the statistics over all samples, as the class docstring lists them."""
        c = int(self.num_classes)
        if c == 0:
            return {}
        rows = joined(self.rows).view(-1, 1 + c + c * (c + 1) // 2)
        targets, logits, upper = rows[:, 0].long(), rows[:, 1 : 1 + c], rows[:, 1 + c :]
        i, j = torch.triu_indices(c, c, device=upper.device)
        gram = upper.new_zeros(len(upper), c, c)
        gram[:, i, j] = upper
        gram[:, j, i] = upper

        norms = fim_spectral_norm(logits, gram)
        calibrated = calibrated_fim_spectral_norm(logits, gram, targets)
        self.per_sample = {"fim_spectral_norm": norms}
        return {
            **error_bar_of_mean("fim_spectral_norm", norms),
            "fim_spectral_norm_median": norms.quantile(0.5),
            "fim_spectral_norm_p95": norms.quantile(0.95),
            "fim_spectral_norm_max": norms.max(),
            **error_bar("fim_spectral_norm_calibrated", calibrated.mean, calibrated.stderr),
            "fim_trace": fim_trace(logits, gram).mean(),
            "temperature": calibrated.temperature,
            "saturated": saturated(logits).to(norms).mean(),
        }
