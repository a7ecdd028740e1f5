"""Names of logged metrics: how keys are built, which keys name an accuracy, and which keys can be logged together.

Many loggers make a folder of every "/" in a key (MLflow's file store, DVCLive), so a key that is also the folder of
another one ends the training. Others rename or refuse characters such as "(". Keys of this package therefore consist of
letters, digits, "_", "-", "." and "/", and no key is a path prefix of another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

# The word "acc…", by itself or in camel case, but not "accumulation", "accelerator", "acceptance" or "access".
_ACCURACY = r"(?:(?<![A-Za-z])a|A)(?i:cc(?!um|el|ept|ess))"
ACCURACY_PER_EPOCH = rf"(?!.*_(?:step|stderr|lower|upper)(?:/|$)).*{_ACCURACY}"
"""Matches keys of accuracies from their beginning, without per-step values and error bands.

TensorBoard gets this text and compiles it in JavaScript: use only syntax that Python and JavaScript share.
"""

_EPSILON = r"_accuracy_[^_]+_(?P<epsilon>[\d.e+-]+)"  # after the kind, as in `accuracy_key`
_VALIDATION_ACCURACY = re.compile(r"(?:^|[_/])val\w*[_/](?:\w*_)?acc(?:uracy)?(?:/dataloader_idx_0)?$", re.IGNORECASE)
_NOT_PLAIN = re.compile(r"adv|attack|pgd|fgsm|robust|noise|corrupt|top[_-]?(?!1(?!\d))\d", re.IGNORECASE)
_LOADER = re.compile(r"/dataloader_idx_(\d+)$")  # which Lightning appends where there are several
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# Words that say no more than "accuracy of the validation": every other one may name another kind of accuracy.
_VALIDATION_WORDS = {
    *("val", "valid", "validation", "test", "testing", "eval", "evaluation", "dev", "epoch", "acc", "accuracy"),
    *("top", "1", "micro", "multiclass", "binary", "mean", "avg", "average", "total", "overall", "metric", "metrics"),
    *("clean", "classification", "classifier", "image"),
}
_RENAMED = re.compile(r"[^\w./-]")  # characters that some loggers rename or refuse
_ERROR_BAR = re.compile(r"_(?:stderr|lower|upper|stderr_probes)$")


def accuracy_key(kind: str, norm: str, epsilon: float) -> str:
    """Build the key of an accuracy at one perturbation size, e.g. ``linearized_accuracy_linf_0.03137``."""
    return f"{kind}_accuracy_{norm}_{epsilon:.4g}"


def parameter_names_in_keys(names: Iterable[str]) -> list[str]:
    """Parameter names that can end a key: without "/" or characters that loggers rename, and all different."""
    found: list[str] = []
    for name in names:
        plain = once = _RENAMED.sub("_", name).replace("/", "_")
        count = 1
        while plain in found:
            count += 1
            plain = f"{once}_{count}"
        found.append(plain)
    return found


def per_layer(key: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of single parameter tensors, by name, under keys that stand beside ``key``, not below it."""
    return {f"{key}_per_layer/{name}": value for name, value in values.items()}


def per_class(key: str, values: Iterable[Tensor]) -> dict[str, Tensor]:
    """Values of single classes, under keys that stand beside ``key``, not below it."""
    return {f"{key}_per_class/{label}": value for label, value in enumerate(values)}


def leaves_and_folders(keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each key that is a path prefix of another, with the other, e.g. ``a`` and ``a/b``."""
    known = set(keys)
    for key in sorted(known):
        parts = key.split("/")
        folders = ("/".join(parts[:end]) for end in range(1, len(parts)))
        yield from ((folder, key) for folder in folders if folder in known)


def has_renamed_characters(key: str) -> bool:
    """Whether some loggers rename or refuse this key."""
    return _RENAMED.search(key) is not None


def is_accuracy_at_epsilon(key: str, *, prefix: str) -> bool:
    """Whether :func:`accuracy_key` built this key; ``prefix`` is that of the monitor that logs it."""
    return re.fullmatch(rf"{re.escape(prefix)}\w+{_EPSILON}", key) is not None


def is_accuracy_at_zero(key: str) -> bool:
    """Whether :func:`accuracy_key` built this key for ε = 0, the samples as they are."""
    found = re.search(rf"{_EPSILON}$", key)
    return found is not None and found["epsilon"] == "0"


def is_accuracy(key: str) -> bool:
    """Whether a key, from us or from the user, names an accuracy."""
    return re.search(_ACCURACY, key) is not None


def is_plain_accuracy(key: str) -> bool:
    """Whether a key names an accuracy, and says nothing of perturbations or of several guesses."""
    return is_accuracy(key) and _NOT_PLAIN.search(key) is None


def is_validation_accuracy(key: str) -> bool:
    """Whether a key names an accuracy, and says no more of it than that it is one of a validation or test."""
    words = {word.lower() for word in _WORDS.findall(_LOADER.sub("", key))}
    return is_plain_accuracy(key) and words <= _VALIDATION_WORDS


def loader_of(key: str) -> int | None:
    """The loader, by its index, whose values Lightning logs under a key; None if the key names none."""
    found = _LOADER.search(key)
    return None if found is None else int(found[1])


def is_error_bar(key: str) -> bool:
    """Whether a key belongs to the error bar of another key."""
    return _ERROR_BAR.search(key) is not None


def is_standard_error(key: str) -> bool:
    """Whether a key names the size of an error, which is neither good nor bad."""
    return re.search(r"_stderr(?:_probes)?$", key) is not None


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
            if key.startswith(f"{prefix}linearized_accuracy_") and is_accuracy_at_zero(key):
                return key
    users = [key for key in keys if _VALIDATION_ACCURACY.search(key) and is_plain_accuracy(key)]
    return min(users, key=len, default=None)
