"""Metric of the input Fisher information, always with several statistics: no single one can be trusted."""

from __future__ import annotations

import time
from itertools import chain

import torch
from torch import Tensor

from lightning_robust.functional.input_space.fisher_information import (
    calibrated_fim_spectral_norm,
    fim_spectral_norm,
    fim_trace,
    saturated,
)
from lightning_robust.metrics.base import ProbeMetric, error_bar, error_bar_of_mean
from lightning_robust.probe import Probe

_MANY_CLASSES = 200  # fewer take milliseconds per sample


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
    the temperature is fitted to all samples of all processes. With queries, the bias that
    their noise gives λ is removed (see :func:`~lightning_robust.functional.fim_spectral_norm_by_queries`).

    Source: arXiv 2606.04767; the calibration is ours.
    """

    higher_is_better = False
    best_untrained = True
    linearizations = ("first",)
    rows: list[Tensor]
    num_classes: Tensor
    gram_variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_float64_rows("rows")  # flat, because a process without samples does not know C
        self.add_float64_state("num_classes", reduce="max")
        self.add_float64_state("gram_variance", reduce="max")  # of Gram matrices that were estimated by queries

    def _add(self, probe: Probe) -> None:
        linearization = probe.linearization
        c = linearization.logits.shape[1]
        if self.num_classes not in (0, c):
            raise ValueError(f"Expected logits of {int(self.num_classes)} classes, as before, but got {c}.")
        variance = torch.full_like(self.gram_variance, linearization.gram_variance)
        if self.num_classes and variance != self.gram_variance:
            raise ValueError("Expected as many queries for all samples, but probes with different numbers came.")
        upper = torch.triu_indices(c, c, device=linearization.gram.device)
        targets = probe.labels
        row = torch.cat([targets[:, None], linearization.logits, linearization.gram[:, upper[0], upper[1]]], dim=1)
        self.rows.append(row.to(self.num_classes).flatten())
        self.num_classes, self.gram_variance = torch.full_like(self.num_classes, c), variance

    def direction(self, key: str) -> bool | None:
        """Lower values are better, but for the temperature and the share of saturated samples."""
        return None if key in ("temperature", "saturated") else super().direction(key)

    def seconds_per_sample(self, outputs: Tensor) -> float:
        """Time the eigenvalue problems of one sample, where they are large."""
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

    def _samples(self, c: int) -> tuple[Tensor, Tensor, Tensor]:
        """Targets (N,), logits (N, C) and Gram matrices (N, C, C) of all samples, in the memory of the last alone."""
        width = 1 + c + c * (c + 1) // 2
        held: list[Tensor] | Tensor = self.rows  # a tensor, once torchmetrics has gathered those of all processes
        parts = [part.view(-1, width) for part in ([held] if isinstance(held, Tensor) else held)]
        targets, logits = (torch.cat([part[:, columns] for part in parts]) for columns in (0, slice(1, 1 + c)))
        i, j = torch.triu_indices(c, c, device=logits.device)
        gram = logits.new_zeros(len(logits), c, c)
        for matrix, row in zip(gram, chain.from_iterable(parts), strict=True):
            matrix[i, j] = row[1 + c :]
            matrix[j, i] = row[1 + c :]
        return targets.long(), logits, gram

    def compute(self) -> dict[str, Tensor]:
        """Return the statistics over all samples that the class docstring lists."""
        c = int(self.num_classes)
        if c == 0:
            return {}
        targets, logits, gram = self._samples(c)
        variance = float(self.gram_variance)
        norms = fim_spectral_norm(logits, gram, gram_variance=variance)
        calibrated = calibrated_fim_spectral_norm(logits, gram, targets, gram_variance=variance)
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
