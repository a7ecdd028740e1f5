"""How a measurement went, over all processes, so that every process draws the same conclusion from a failure of one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_robust.metrics._base import Float64Metric


class Verdict(NamedTuple):
    """What all processes know of a measurement.

    Attributes:
        cause: What went wrong, in the words of the first process that failed; empty if nothing did.
        num_samples: Samples over all processes.
        seconds: Wall time of the slowest process.
    """

    cause: str
    num_samples: int
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether every process did its part."""
        return not self.cause


class Outcome(Float64Metric):
    """Gathers a :class:`Verdict`. A cause travels as the code points of its text, because only metric states travel."""

    failures: Tensor
    num_samples: Tensor
    seconds: Tensor
    text: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_float64_state("failures")
        self.add_float64_state("num_samples")
        self.add_float64_state("seconds", reduce="max")
        self.add_float64_rows("text")

    def update(self, *, error: Exception | None, num_samples: int = 0, seconds: float = 0.0) -> None:
        """Report this process's part."""
        self.num_samples = self.num_samples + num_samples
        self.seconds = torch.full_like(self.seconds, seconds)
        if error is not None:
            self.failures = self.failures + 1
            line = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}\n"
            assert isinstance(self.text, list)
            self.text.append(torch.tensor([ord(char) for char in line], dtype=torch.float64, device=self.device))

    def compute(self) -> Verdict:
        """Return what all processes reported."""
        num_samples = int(self.num_samples)
        if self.failures:
            cause = "".join(chr(int(code)) for code in dim_zero_cat(self.text)).split("\n", 1)[0]
        else:
            cause = "" if num_samples else "The validation loop saw no samples."
        return Verdict(cause=cause, num_samples=num_samples, seconds=float(self.seconds))
