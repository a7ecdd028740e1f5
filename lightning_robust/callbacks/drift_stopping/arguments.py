"""The `monitor` argument, which Python code and configuration files write."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_robust.functional._validation.arguments import as_number, expected_but_got


def as_monitor_weights(monitor: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Return a weight for each key, 1 by default, or raise a ``ValueError``."""
    expected = "a key, a list of different keys, or a mapping of keys to positive numbers"
    keys = [monitor] if isinstance(monitor, str) else monitor
    if not isinstance(keys, Mapping | Sequence) or not keys:
        raise ValueError(expected_but_got("monitor", expected, monitor))
    if not all(isinstance(key, str) and key for key in keys) or len(set(keys)) < len(keys):
        raise ValueError(expected_but_got("monitor", expected, monitor))
    weights = {key: as_number(keys[key]) if isinstance(keys, Mapping) else 1.0 for key in keys}
    if not all(0 < weight < math.inf for weight in weights.values()):
        raise ValueError(expected_but_got("monitor", expected, monitor))
    return weights
