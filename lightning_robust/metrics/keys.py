"""Names of logged metrics: how keys of accuracies are built, and which keys name an accuracy."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The word "acc…", by itself or in camel case, but not "accumulation", "accelerator", "acceptance" or "access".
_ACCURACY = r"(?:(?<![A-Za-z])a|A)(?i:cc(?!um|el|ept|ess))"
ACCURACY_PER_EPOCH = rf"(?!.*_(?:step|stderr|lower|upper)(?:/|$)).*{_ACCURACY}"
"""Matches keys of accuracies from their beginning, without per-step values and error bands.

TensorBoard gets this text and compiles it in JavaScript: use only syntax that Python and JavaScript share.
"""

_EPSILON = r"_accuracy_[^_]+_(?P<epsilon>[\d.e+-]+)"  # after the kind, as in `accuracy_key`
_VALIDATION_ACCURACY = re.compile(r"(?:^|[_/])val\w*[_/](?:\w*_)?acc(?:uracy)?(?:/dataloader_idx_0)?$", re.IGNORECASE)
_PERTURBED = re.compile(r"adv|attack|pgd|fgsm|robust|noise|corrupt", re.IGNORECASE)
_ERROR_BAR = re.compile(r"_(?:stderr|lower|upper|stderr_probes)$")


def accuracy_key(kind: str, norm: str, epsilon: float) -> str:
    """Build the key of an accuracy at one perturbation size, e.g. ``linearized_accuracy_linf_0.03137``."""
    return f"{kind}_accuracy_{norm}_{epsilon:.4g}"


def is_accuracy_at_epsilon(key: str, *, prefix: str) -> bool:
    """Tell whether :func:`accuracy_key` built this key; ``prefix`` is that of the monitor that logs it."""
    return re.fullmatch(rf"{re.escape(prefix)}\w+{_EPSILON}", key) is not None


def is_accuracy(key: str) -> bool:
    """Tell whether a key, from us or from the user, names an accuracy."""
    return re.search(_ACCURACY, key) is not None


def is_error_bar(key: str) -> bool:
    """Tell whether a key belongs to the error bar of another key."""
    return _ERROR_BAR.search(key) is not None


def clean_accuracy_key(keys: Iterable[str], *, prefixes: Iterable[str]) -> str | None:
    """Find the key of clean validation accuracy.

    Args:
        keys: Logged keys.
        prefixes: Prefixes of the monitors that log some of them.

    Returns:
        The accuracy that a monitor logs at ε = 0, on the samples that it measures. If there is none, the shortest of
        the user's keys that look like a validation accuracy without a perturbation. Otherwise None.
    """
    keys = list(keys)
    for prefix in prefixes:
        for key in keys:
            found = re.fullmatch(rf"{re.escape(prefix)}linearized{_EPSILON}", key)
            if found is not None and found["epsilon"] == "0":
                return key
    users = [key for key in keys if _VALIDATION_ACCURACY.search(key) and not _PERTURBED.search(key)]
    return min(users, key=len, default=None)
