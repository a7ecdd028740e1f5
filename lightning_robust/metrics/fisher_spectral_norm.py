"""Metric of the input Fisher information, always with several statistics: no single one can be trusted."""

from __future__ import annotations

import time
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
from lightning_robust.functional.input_space.likelihoods import NAMES, LikelihoodName
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
    - ``saturated``: share of samples with a probability above 0.999, whose λ says little. With likelihood
      ``"bernoulli"`` all labels must have one

    With likelihood ``"gaussian"``, λ is ‖J‖² at a standard deviation σ = 1 of the errors, the temperature is the root
    mean square residual σ, the calibrated λ is ‖J‖² / σ², and there is no ``saturated``.

    Units: squared nats per squared input unit, un-normalised if the probe has ``input_std``.

    State: targets, logits and upper triangle of the Gram matrix of each sample, ``1 + C + C(C + 1)/2`` numbers (with
    other likelihoods than ``"categorical"`` a target for each output), because the temperature is fitted to all samples
    of all processes.

    Source: arXiv 2606.04767; the calibration is ours.
    """

    higher_is_better = False
    best_untrained = True
    linearizations = ("first",)
    rows: list[Tensor]
    num_classes: Tensor
    likelihood: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_float64_rows("rows")  # flat, because a process without samples does not know C
        self.add_float64_state("num_classes", reduce="max")
        self.add_float64_state("likelihood", reduce="max")  # 1 + its place among the names; 0 without samples

    def _add(self, probe: Probe) -> None:
        linearization = probe.linearization
        c = linearization.logits.shape[1]
        if self.num_classes not in (0, c):
            raise ValueError(f"Expected logits of {int(self.num_classes)} classes, as before, but got {c}.")
        kind = 1 + NAMES.index(probe.likelihood)
        if self.likelihood not in (0, kind):
            before = NAMES[int(self.likelihood) - 1]
            raise ValueError(f"Expected likelihood {before!r}, as before, but got {probe.likelihood!r}.")
        upper = torch.triu_indices(c, c, device=linearization.gram.device)
        targets = probe.reading.beside(linearization.logits).reshape(len(probe), -1).to(linearization.gram)
        row = torch.cat([targets, linearization.logits, linearization.gram[:, upper[0], upper[1]]], dim=1)
        self.rows.append(row.to(self.num_classes).flatten())
        self.num_classes = torch.full_like(self.num_classes, c)
        self.likelihood = torch.full_like(self.likelihood, kind)

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

    def _samples(self, c: int, *, num_targets: int) -> tuple[Tensor, Tensor, Tensor]:
        """Targets (N, T), logits (N, C) and Gram matrices (N, C, C) of all samples, in the memory of the last alone."""
        width = num_targets + c + c * (c + 1) // 2
        held: list[Tensor] | Tensor = self.rows  # a tensor, once torchmetrics has gathered those of all processes
        parts = [part.view(-1, width) for part in ([held] if isinstance(held, Tensor) else held)]
        ends = (slice(num_targets), slice(num_targets, num_targets + c))
        targets, logits = (torch.cat([part[:, columns] for part in parts]) for columns in ends)
        i, j = torch.triu_indices(c, c, device=logits.device)
        gram = logits.new_zeros(len(logits), c, c)
        for matrix, row in zip(gram, chain.from_iterable(parts), strict=True):
            matrix[i, j] = row[num_targets + c :]
            matrix[j, i] = row[num_targets + c :]
        return targets, logits, gram

    def compute(self) -> dict[str, Tensor]:
        """Return the statistics over all samples that the class docstring lists."""
        c = int(self.num_classes)
        if c == 0:
            return {}
        likelihood: LikelihoodName = cast(LikelihoodName, NAMES[int(self.likelihood) - 1])
        has_classes = likelihood == "categorical"
        targets, logits, gram = self._samples(c, num_targets=1 if has_classes else c)
        targets = targets[:, 0].long() if has_classes else targets
        norms = fim_spectral_norm(logits, gram, likelihood=likelihood)
        calibrated = calibrated_fim_spectral_norm(logits, gram, targets, likelihood=likelihood)
        share = (
            {} if likelihood == "gaussian" else {"saturated": saturated(logits, likelihood=likelihood).to(norms).mean()}
        )
        self.per_sample = {"fim_spectral_norm": norms}
        return {
            **error_bar_of_mean("fim_spectral_norm", norms),
            "fim_spectral_norm_median": norms.quantile(0.5),
            "fim_spectral_norm_p95": norms.quantile(0.95),
            "fim_spectral_norm_max": norms.max(),
            **error_bar("fim_spectral_norm_calibrated", calibrated.mean, calibrated.stderr),
            "fim_trace": fim_trace(logits, gram, likelihood=likelihood).mean(),
            "temperature": calibrated.temperature,
            **share,
        }
