"""Lines of code to paste, made of the batch at hand: what a user's ``probe_fn`` would have to be."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass

from torch import Tensor


@dataclass(frozen=True)
class ProbeCode:
    """How a batch was read, as code.

    Attributes:
        inputs: The inputs, such as ``batch['image']``.
        targets: The targets.
        extras: What else the network gets, by name.
        others: Other tensors with a row per sample.
        by_name: The name of the inputs, if the network takes them by keyword.
        as_dictionary: Whether the network takes a dictionary of its arguments.
        network: Attribute of the module that holds the network.
        embedding: Attribute that embeds token ids, if the inputs may be some and nothing else tells.
    """

    inputs: str = "inputs"
    targets: str = "targets"
    extras: Mapping[str, str] = field(default_factory=dict)
    others: Sequence[str] = ()
    by_name: str | None = None
    as_dictionary: bool = False
    network: str = "network"
    embedding: str | None = None

    def with_names(self, names: Sequence[str]) -> ProbeCode:
        """The code with further arguments of the network, taken from other tensors where they are as many."""
        entries = self.others if len(self.others) == len(names) else names
        return ProbeCode(self.inputs, self.targets, {**self.extras, **dict(zip(names, entries, strict=True))})

    def line(
        self,
        *,
        network: str | None = None,
        around: str = "{}",
        inputs: str = "{}",
        targets: str = "{}",
        without: Collection[str] = (),
        more: str = "",
    ) -> str:
        """An argument of the monitor.

        Args:
            network: What is called instead of the module.
            around: Code around what the module returns, ``{}``.
            inputs: Code around the inputs, ``{}``.
            targets: Code around the targets, ``{}``.
            without: Extras that are left out.
            more: Further arguments of the probe.
        """
        plain = around == "{}" and not self.by_name and not self.as_dictionary
        model = network or ("module" if plain else self._function("module", around))
        extras = ", ".join(f"{name!r}: {code}" for name, code in self.extras.items() if name not in without)
        arguments = [model, inputs.format(self.inputs), targets.format(self.targets)]
        arguments += [f"extras={{{extras}}}"] if extras and "extras=" not in more else []
        arguments += [more] if more else []
        return f"`probe_fn=lambda module, batch: Probe({', '.join(arguments)})`"

    def _function(self, module: str, around: str) -> str:
        x = self.by_name or "x"
        if self.as_dictionary:
            given = "{" + ", ".join(f"{name!r}: {name}" for name in (x, *self.extras)) + "}"
        else:
            given = ", ".join([f"{x}={x}" if self.by_name else x, *(f"{name}={name}" for name in self.extras)])
        return f"lambda {', '.join((x, *self.extras))}: {around.format(f'{module}({given})')}"


def code_of_unread(batch: object, *, names: Sequence[str], target_keys: Sequence[str]) -> ProbeCode | None:
    """Guess what the inputs, targets and extras of a batch are that cannot be read by customary rules.

    Args:
        batch: What the loader yields.
        names: Arguments of the network that can be given by position, without those that have defaults of their own.
        target_keys: Customary names of targets.
    """
    if isinstance(batch, list | tuple) and all(isinstance(item, Mapping) for item in batch):
        return None  # samples that are not collated
    entries = [(name, code, value) for name, code, value in _tensors(batch, "batch") if value.ndim]
    entries = [entry for entry in entries if len(entry[2]) == len(entries[0][2])]
    if len(entries) < 2:
        return None
    if isinstance(batch, Mapping) or is_dataclass(batch):
        return _of_names(entries, names, target_keys)
    codes = [code for _, code, _ in entries]
    if len(names) > 1 and len(codes) == len(names) + 1:
        return ProbeCode(codes[0], codes[-1], dict(zip(names[1:], codes[1:-1], strict=True)))
    return ProbeCode(codes[0], next((code for _, code, value in entries[1:] if _are_classes(value)), codes[1]))


def _of_names(
    entries: list[tuple[str, str, Tensor]], names: Sequence[str], target_keys: Sequence[str]
) -> ProbeCode | None:
    numbers = sorted((e for e in entries if e[2].is_floating_point()), key=lambda e: e[0] not in names)
    if not numbers:
        return None
    first = numbers[0]
    rest = [entry for entry in entries if entry is not first]
    extras = {name: code for name, code, _ in rest if name in names and name not in target_keys}
    others = [entry for entry in rest if entry[0] not in extras and not entry[2].is_floating_point()]
    others.sort(key=lambda entry: (entry[0] not in target_keys, not _are_classes(entry[2])))
    return ProbeCode(first[1], others[0][1], extras) if others else None


def _are_classes(values: Tensor) -> bool:
    return values.ndim == 1 and not values.is_floating_point()


def _tensors(batch: object, code: str) -> Iterator[tuple[str, str, Tensor]]:
    """Names, code and values of the tensors inside."""
    items: list[tuple[str, str, object]] = []
    if isinstance(batch, Mapping):
        items = [(str(key), f"{code}[{key!r}]", value) for key, value in batch.items()]
    elif isinstance(batch, tuple | list):
        items = [(str(number), f"{code}[{number}]", value) for number, value in enumerate(batch)]
    elif is_dataclass(batch) and not isinstance(batch, type):
        items = [(f.name, f"{code}.{f.name}", getattr(batch, f.name)) for f in fields(batch)]
    for name, inner, value in items:
        if isinstance(value, Tensor):
            yield name, inner, value
        else:
            yield from _tensors(value, inner)
