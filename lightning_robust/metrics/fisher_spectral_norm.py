"""Metric of the input Fisher information, always with several statistics: no single one can be trusted."""

from __future__ import annotations

import torch
from torch import Tensor

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
      network is near 0 however robust the network is. It is logged to show this, not as a measure of robustness.
    - ``fim_spectral_norm_calibrated``: mean at the fitted temperature, with ``_stderr``, ``_lower``, ``_upper``
    - ``fim_trace``: mean trace
    - ``temperature``: temperature that minimises the negative log-likelihood of the same samples
    - ``saturated``: share of samples with a probability above 0.999, whose λ says little

    Units: squared nats per squared input unit, un-normalised if the probe has ``input_std``.

    State: target, logits and upper triangle of the Gram matrix of each sample, ``1 + C + C(C + 1)/2`` numbers, because
    the temperature is fitted to all samples of all processes.

    Source: arXiv 2606.04767; the calibration is ours.
    """

    higher_is_better = False
    best_untrained = True
    rows: list[Tensor]
    num_classes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_float64_rows("rows")  # flat, because a process without samples does not know C
        self.add_float64_state("num_classes", reduce="max")

    def _add(self, probe: Probe) -> None:
        linearization = probe.linearization
        c = linearization.logits.shape[1]
        if self.num_classes not in (0, c):
            raise ValueError(f"Expected logits of {int(self.num_classes)} classes, as before, but got {c}.")
        upper = torch.triu_indices(c, c, device=linearization.gram.device)
        targets = probe.labels
        row = torch.cat([targets[:, None], linearization.logits, linearization.gram[:, upper[0], upper[1]]], dim=1)
        self.rows.append(row.to(self.num_classes).flatten())
        self.num_classes = torch.full_like(self.num_classes, c)

    def compute(self) -> dict[str, Tensor]:
        """Return the statistics over all samples that the class docstring lists."""
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
