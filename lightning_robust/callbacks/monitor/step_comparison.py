"""Compares what is measured with what the user's validation step computes and logs, once per run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_robust.callbacks.monitor.batches import Batch
from lightning_robust.callbacks.monitor.logged_accuracy import CleanAccuracy, agreement, comparable, other_accuracy
from lightning_robust.callbacks.monitor.probe_code import ProbeCode
from lightning_robust.callbacks.monitor.validation_witness import LeftOut, ValidationWitness


class StepComparison:
    """Listens to the step during one validation, and keeps what the later comparisons need."""

    def __init__(self) -> None:
        self._witness: ValidationWitness | None = None
        self._code = ProbeCode()
        self._left_out: LeftOut | None = None  # until accuracies can be compared
        self._clean: CleanAccuracy | None = None
        self._known: set[str] = set()

    def begin(self, logged: Iterable[str]) -> None:
        """Start with a new validation; these keys were logged earlier."""
        self._known, self._clean, self._left_out = set(logged), None, None

    def listen(self, pl_module: LightningModule, samples: Batch) -> None:
        """Listen to the step while it sees the batch of these samples."""
        self._witness, self._code = ValidationWitness(pl_module, samples), samples.code or ProbeCode()

    def stop(self) -> None:
        """Stop listening."""
        if self._witness is not None:
            self._witness.stop()

    def abandon(self) -> None:
        """Stop listening, and compare nothing."""
        self.stop()
        self._witness = None

    def without_classes(self) -> None:
        """Compare no accuracies, because samples have no classes."""
        self._clean = self._left_out = None

    def of_samples(self) -> str | None:
        """Run the measured network on samples that the step has seen; return a warning if the two differ."""
        witness, self._witness = self._witness, None
        found = None if witness is None else witness.compare()
        if isinstance(found, LeftOut):
            self._left_out, found = found, None
        return found

    def note(
        self, values: Mapping[str, float], per_sample: Mapping[str, Tensor], targets: Sequence[object], num_samples: int
    ) -> None:
        """Keep the accuracy of a measurement (see :meth:`CleanAccuracy.of`)."""
        self._clean = CleanAccuracy.of(values, per_sample, targets, num_samples=num_samples)
        if self._left_out is not None and not self._left_out.may_classify(targets):
            self._left_out = self._left_out._replace(plausible=False)

    def of_accuracies(self, logged: Mapping[str, float], *, loader: int, num_loaders: int) -> str | None:
        """Compare the measured accuracy with those logged since :meth:`begin`; return a warning if they disagree."""
        new = {key: value for key, value in logged.items() if key not in self._known}
        shares = comparable(new, loader=loader, num_loaders=num_loaders)
        agrees = agreement(shares, self._clean)
        if self._left_out is not None and (agrees is False or (agrees is None and self._left_out.plausible)):
            return self._left_out.sentence()
        if self._clean is not None and agrees is False:
            return other_accuracy(shares, self._clean, self._code)
        return None
