"""Lines to paste that say what is to be measured, with the entries of the user's own batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_robust.callbacks.monitor.batches import Batch


@dataclass(frozen=True)
class Entries:
    """How a batch is indexed, e.g. ``batch['image']``.

    Attributes:
        inputs: The inputs.
        targets: The targets.
        extras: Further arguments of the module, by name.
    """

    inputs: str = "batch[0]"
    targets: str = "batch[1]"
    extras: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: object, samples: Batch) -> Entries:
        """Find what was read from a batch in it."""
        extras = {name: _place(extra, batch) or f"batch[{name!r}]" for name, extra in samples.extras.items()}
        inputs, targets = (_place(found, batch) for found in (samples.inputs, samples.targets))
        return cls(inputs or cls.inputs, targets or cls.targets, extras)

    def probe_fn(self, model: str, inputs: str = "{}", *, without: frozenset[str] = frozenset(), more: str = "") -> str:
        """The line that measures ``model``.

        Args:
            model: What is called.
            inputs: With ``{}`` where the entry of the batch belongs.
            without: Extras that are left out.
            more: Further arguments of the probe.
        """
        given = [model, inputs.format(self.inputs), self.targets]
        extras = ", ".join(f"{name!r}: {entry}" for name, entry in self.extras.items() if name not in without)
        given += [f"extras={{{extras}}}"] if extras and "extras=" not in more else []
        given += [more] if more else []
        return f"`probe_fn=lambda module, batch: Probe({', '.join(given)})`"


def _place(wanted: Tensor, value: object, path: str = "batch") -> str | None:
    if value is wanted:
        return path
    items = value.items() if isinstance(value, Mapping) else enumerate(value if isinstance(value, tuple | list) else ())
    return next(filter(None, (_place(wanted, item, f"{path}[{key!r}]") for key, item in items)), None)
