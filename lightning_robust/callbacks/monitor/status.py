"""How a measurement went, over all processes, so that every process draws the same conclusion from a failure of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_robust.callbacks.monitor.overhead import Times
from lightning_robust.metrics.base import Float64Metric, code_points, joined, text_of

WHOLE = -1  # stands for the measurement as a whole, where metrics have their number


class Verdict(NamedTuple):
    """What all processes know of a measurement.

    Attributes:
        causes: What went wrong, by the number of the metric or ``WHOLE``, in the words of the first process in which it
            did.
        num_samples: Samples over all processes.
        seconds: Wall time of the slowest process.
        disagree: Whether the processes see other samples where their choice presumes the same ones.
        overhead: Share of the wall time of the run so far that was spent measuring; 0 outside ``fit``.
    """

    causes: dict[int, str]
    num_samples: int
    seconds: float
    disagree: bool
    overhead: float


class Outcome(Float64Metric):
    """Gathers a :class:`Verdict`."""

    num_samples: Tensor
    seconds: Tensor
    text: list[Tensor] | Tensor
    keys: list[Tensor] | Tensor
    times: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_float64_state("num_samples")
        self.add_float64_state("seconds", reduce="max")
        self.add_float64_rows("text")
        self.add_float64_rows("keys")
        self.add_float64_state("times", len(Times._fields), reduce="max")

    def update(
        self,
        *,
        errors: Mapping[int, str],
        num_samples: int = 0,
        seconds: float = 0.0,
        key: int | None = None,
        times: Times | None = None,
    ) -> None:
        """Report this process's part; ``key`` tells its samples from others where all processes should see the same."""
        self.num_samples = self.num_samples + num_samples
        self.seconds = torch.full_like(self.seconds, seconds)
        self.times = torch.tensor(times or Times(), dtype=torch.float64).to(self.times)
        assert isinstance(self.text, list)
        assert isinstance(self.keys, list)
        if key is not None:
            self.keys.append(torch.full_like(self.seconds, key).flatten())
        for number, error in errors.items():
            self.text.append(code_points(f"{number} {error}\n", like=self.seconds))

    def compute(self) -> Verdict:
        """Return what all processes reported."""
        num_samples = int(self.num_samples)
        causes: dict[int, str] = {}
        for line in text_of(joined(self.text)).splitlines():
            number, _, cause = line.partition(" ")
            causes.setdefault(int(number), cause)
        if not num_samples:
            causes.setdefault(WHOLE, "ValueError: Expected at least one validation sample, but the loop saw none.")
        keys = set(joined(self.keys).tolist())
        overhead = Times(*self.times.tolist()).share
        return Verdict(causes, num_samples, float(self.seconds), len(keys) > 1, overhead)
