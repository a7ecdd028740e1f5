"""Checks of labelled samples, and of options that they get later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lightning_robust.functional._validation.tensors import check_real, check_targets

# What probes get later for options that they leave open. With a loss, for example, targets need not be classes.
_DEFAULTS: ContextVar[Mapping[str, Any]] = ContextVar("defaults", default=MappingProxyType({}))


@contextmanager
def checked_with(defaults: Mapping[str, Any]) -> Iterator[None]:
    """Check new probes as if options that they leave open had these values, which they get later."""
    token = _DEFAULTS.set(defaults)
    try:
        yield
    finally:
        _DEFAULTS.reset(token)


def completed(options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of a probe, with ``defaults`` (by default those of :func:`checked_with`) for those that are left open.

    Those are None, or the likelihood that a probe has unless it names another. A tolerance belongs to its likelihood.
    """
    values = dict(_DEFAULTS.get() if defaults is None else defaults)
    is_open = {
        name: given is None or (name == "likelihood" and given == "categorical") for name, given in options.items()
    }
    if not is_open["likelihood"] and options["likelihood"] != values.get("likelihood"):
        values.pop("tolerance", None)
    return {name: values.get(name, given) if is_open[name] else given for name, given in options.items()}


def check_samples(inputs: Tensor, targets: Tensor, *, any_targets: bool) -> None:
    """Raise unless there is one class index (any target, with ``any_targets``) per input ``(N, ...)``."""
    check_real(inputs)
    if inputs.ndim == 0:
        raise ValueError("Expected argument `inputs` to be a tensor (N, ...), but got a single number.")
    if not any_targets:
        check_targets(targets, num_samples=len(inputs))
    elif not isinstance(targets, Tensor) or targets.shape[:1] != inputs.shape[:1]:
        got = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(
            f"Expected argument `targets` to hold one target per sample, a tensor of shape ({len(inputs)}, ...), but"
            f" got {got}."
        )
