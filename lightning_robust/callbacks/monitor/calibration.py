"""The temperature that fits all samples of all processes, where it must be known before they are measured.

With few outputs a Gram matrix holds a sample's spectral norm at any temperature, and nothing need be known. A Krylov
subspace is made for a temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_robust.functional.input_space.likelihoods import LikelihoodName, likelihood_of
from lightning_robust.probe import Probe


class CalibrationSamples(NamedTuple):
    """What of samples the temperature depends on, ``(N, E)``, on the CPU, for other processes."""

    evidence: Tensor
    likelihood: LikelihoodName

    @classmethod
    def of(cls, probe: Probe) -> CalibrationSamples:
        """Call the network on the samples of a probe."""
        return cls(probe.evidence.cpu(), probe.likelihood)


def temperature_of(parts: Sequence[CalibrationSamples]) -> float:
    """Fit the temperature to samples of one likelihood."""
    evidence = torch.cat([part.evidence for part in parts])
    return float(likelihood_of(parts[0].likelihood).fit_evidence(evidence).temperature)
