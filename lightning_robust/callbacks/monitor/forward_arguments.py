"""What the forward pass of a network takes, and how it is called: by position, by keyword, with a dictionary."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_robust.callbacks.monitor.token_embeddings import MASK

_TEXT_KEYS = (MASK, "token_type_ids", "position_ids")  # what transformers take beside token ids
_BATCH_NAMES = ("batch", "sample", "samples")  # of an argument that takes the whole dictionary
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


@dataclass(frozen=True)
class ByKeyword:
    """Calls a module with its inputs by name, or with a dictionary of all its arguments.

    Attributes:
        module: The network.
        key: Name of its inputs.
        as_dictionary: Whether it takes one dictionary.
        names: Arguments that it names itself. Others go through ``**kwargs`` to a network inside, which may refuse
            them: they are left out from then on, as a user would, who calls it with fewer.
    """

    module: nn.Module
    key: str
    as_dictionary: bool = False
    names: Collection[str] = ()
    _refused: set[str] = field(default_factory=set, compare=False, repr=False)

    @property
    def __self__(self) -> nn.Module:
        """The module, as of a bound method."""
        return self.module

    def __call__(self, x: Tensor, **extras: Tensor) -> Any:
        """Outputs of the module."""
        if self.as_dictionary:
            return self.module({self.key: x, **extras})
        while True:
            taken = {name: extra for name, extra in extras.items() if name not in self._refused}
            try:
                return self.module(**{self.key: x}, **taken)
            except TypeError as error:
                found = _UNEXPECTED.search(str(error))
                if found is None or found[1] not in taken or found[1] in self.names:
                    raise
                self._refused.add(found[1])


class Arguments(NamedTuple):
    """What the forward pass of a module takes."""

    first: str | None  # the first argument that can be given without its name
    positional: tuple[str, ...]  # those that can be, and have no default but None
    required: frozenset[str]
    names: frozenset[str]
    any_name: bool  # **kwargs
    as_dictionary: bool  # the first argument is the whole batch

    @classmethod
    def of(cls, network: nn.Module) -> Arguments:
        """The arguments of a network."""
        try:
            parameters = list(inspect.signature(network.forward).parameters.values())
        except (TypeError, ValueError):  # compiled or scripted by means that leave no signature
            return cls("", (), frozenset(), frozenset(), any_name=False, as_dictionary=False)
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        by_position = [p for p in named if p.kind != p.KEYWORD_ONLY]
        first = by_position[0] if by_position else None
        hint = "" if first is None or first.annotation is first.empty else str(first.annotation).lower()
        return cls(
            first=None if first is None else first.name,
            positional=tuple(p.name for p in by_position if p.default in (p.empty, None)),
            required=frozenset(p.name for p in named if p.default is p.empty),
            names=frozenset(p.name for p in named),
            any_name=any(p.kind == p.VAR_KEYWORD for p in parameters),
            as_dictionary=first is not None and (first.name in _BATCH_NAMES or "dict" in hint or "mapping" in hint),
        )

    def take(self, name: str) -> bool:
        """Whether an entry of this name is passed on beside the inputs."""
        return (
            self.as_dictionary or name in self.names or (self.any_name and (self.first is None or name in _TEXT_KEYS))
        )

    def by_name(self, key: str) -> bool:
        """Whether inputs of this name are given by it."""
        return bool(key) and ((key in self.names and self.first != key) or (self.first is None and self.any_name))

    def call(self, network: nn.Module, key: str) -> Callable[..., Any]:
        """The network as a function of its inputs, and of extras by keyword."""
        if key and self.as_dictionary:
            return ByKeyword(network, key, as_dictionary=True)
        passes_on = key in self.names and self.any_name  # what an inner network may refuse
        return ByKeyword(network, key, names=self.names) if self.by_name(key) or passes_on else network
