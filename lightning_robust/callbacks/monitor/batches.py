"""Samples of a batch, and the options of a probe of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_robust.callbacks.monitor.probe_code import ProbeCode
from lightning_robust.functional._isolation.stand_ins import plain_tensor
from lightning_robust.functional._validation.arguments import as_number, as_numbers
from lightning_robust.probe import Probe


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples, and the other arguments of a probe of them.

    Attributes:
        inputs: ``(N, ...)``.
        targets: ``(N, ...)``.
        options: The other arguments of :class:`~lightning_robust.Probe`, ``model`` among them.
        extras: Further arguments of the model, tensors ``(N, ...)`` by name.
        code: How the batch was read, unless a function of the user did.
    """

    inputs: Tensor
    targets: Tensor
    options: Mapping[str, Any]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    code: ProbeCode | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: slice) -> Batch:
        """Some of the samples, without a copy."""
        return self._of(lambda tensor: tensor[rows])

    def copied(self, rows: Sequence[int]) -> Batch:
        """Copy some samples, so that later changes of the batch do not reach them."""

        def copy(tensor: Tensor) -> Tensor:
            return plain_tensor(tensor.detach())[torch.tensor(rows, dtype=torch.long, device=tensor.device)]

        return self._of(copy)

    def _of(self, part: Callable[[Tensor], Tensor]) -> Batch:
        extras = {name: part(extra) for name, extra in self.extras.items()}
        return Batch(part(self.inputs), part(self.targets), self.options, extras)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {"inputs": self.inputs, "targets": self.targets, **{f"extra {n}": e for n, e in self.extras.items()}}

    def matches(self, other: Batch) -> bool:
        """Whether the samples of both can pass through the network together."""
        mine, theirs = self._tensors, other._tensors
        return (
            self.options.keys() == other.options.keys()
            and mine.keys() == theirs.keys()
            and all(_same(key, value, other.options[key]) for key, value in self.options.items())
            and all(a.shape[1:] == theirs[n].shape[1:] and a.dtype == theirs[n].dtype for n, a in mine.items())
        )

    def probe(self) -> Probe:
        """A probe of all samples."""
        return Probe(inputs=self.inputs, targets=self.targets, extras=self.extras or None, **self.options)

    @staticmethod
    def joined(parts: Sequence[Batch]) -> Batch:
        """The samples of batches that match, in order."""
        first = parts[0]
        if len(parts) == 1:
            return first
        extras = {name: torch.cat([part.extras[name] for part in parts]) for name in first.extras}
        inputs, targets = (torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets"))
        return Batch(inputs, targets, first.options, extras)


def _same(name: str, a: object, b: object) -> bool:
    if a is None or b is None or name not in ("input_std", "input_mean"):
        return a is b or bool(a == b)
    one, other = (as_numbers(constant) or [as_number(constant)] for constant in (a, b))  # lists, tensors or numbers
    return one == other
