"""Checks of tensors and units that several estimators share. Each says what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_robust.functional._arguments import as_number, as_numbers, check_floating, class_of, plain, refusal
from lightning_robust.functional._grad_mode import full_precision

_WRAP = "Wrap the model so that it does (in a callback, through `probe_fn`)."


def channelwise(
    value: float | Sequence[float] | Tensor | None, inputs: Tensor, *, name: str, positive: bool = True
) -> Tensor | None:
    """Shape a scalar or per-channel constant so that it broadcasts against ``inputs`` ``(N, channels, ...)``.

    Raises:
        ValueError: If the number of entries is neither 1 nor the number of channels, or an entry is not finite (not
            positive, where ``positive``).
    """
    if value is None:
        return None
    entries = as_numbers(value)
    shape = () if entries is None else tuple(getattr(value, "shape", (len(entries),)))
    channels = inputs.shape[1] if inputs.ndim > 1 else 1
    if len(shape) > 1 or shape not in ((), (1,), (channels,)):
        raise ValueError(
            f"Expected argument `{name}` to be one number or one per channel, {channels} for inputs of"
            f" shape {tuple(inputs.shape)} (channels are dimension 1), but got shape {shape}."
        )
    numbers = check_constant(name, value, positive=positive)
    constant = torch.tensor(numbers, dtype=full_precision(inputs[:0]).dtype)
    check_constant(name, constant, positive=positive)  # as it was rounded
    constant = constant.to(inputs.device)
    return constant.reshape(1, -1, *(1,) * (inputs.ndim - 2)) if inputs.ndim > 1 else constant


def check_constant(name: str, value: float | Sequence[float] | Tensor, *, positive: bool = True) -> list[float]:
    """Return the entries, or raise unless they are a finite (positive) number or a list of them."""
    entries = as_numbers(value)
    numbers = [as_number(plain(value))] if entries is None else entries
    finite = all(map(math.isfinite, numbers))
    if not numbers or not finite or (positive and min(numbers) <= 0):
        expected = f"a {'positive' if positive and finite else 'finite'} number, or a list of one per channel"
        raise ValueError(refusal(name, expected, value))
    return numbers


def unnormalised(inputs: Tensor, std: Tensor | None, mean: Tensor | None) -> Tensor:
    """``inputs · std + mean``, with the constants as :func:`channelwise` shapes them."""
    raw = inputs if std is None else inputs * std
    return raw if mean is None else raw + mean


def changes_within(raw: Tensor, valid_range: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """By how much un-normalised inputs may fall, ≤ 0, and rise, ≥ 0; one that is outside already may stay there."""
    return (valid_range[0] - raw).clamp_max(0), (valid_range[1] - raw).clamp_min(0)


def check_valid_range(valid_range: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return ``valid_range`` in floats, or raise unless it is None or two numbers in ascending order."""
    if valid_range is None:
        return None
    ends = as_numbers(valid_range) if isinstance(valid_range, tuple | list) else None
    if ends is None or len(ends) != 2 or not ends[0] < ends[1]:
        raise ValueError(refusal("valid_range", "(low, high) with low < high", valid_range))
    return ends[0], ends[1]


def check_units(
    *,
    input_std: float | Sequence[float] | Tensor | None,
    input_mean: float | Sequence[float] | Tensor | None,
    valid_range: tuple[float, float] | None,
) -> None:
    """Raise unless all are sound, and ``valid_range`` comes with the mean of inputs that are normalised."""
    if input_std is not None:
        check_constant("input_std", input_std)
    if input_mean is not None:
        check_constant("input_mean", input_mean, positive=False)
    check_valid_range(valid_range)
    if valid_range is not None and input_std is not None and input_mean is None:
        raise ValueError(
            "Expected argument `input_mean` beside `input_std` and `valid_range`, because the range is one of"
            " un-normalised inputs, but got None. Pass 0.0 if nothing was subtracted."
        )


def check_given_logits(logits: Tensor) -> None:
    """Raise unless logits that the caller gives are a finite tensor (N, C) with N ≥ 1 and C ≥ 2."""
    check_floating("logits", logits, "(N, C)")
    if logits.ndim != 2 or logits.shape[1] < 2 or len(logits) == 0:
        raise ValueError(
            "Expected argument `logits` to be of shape (N, C) with at least one sample and C ≥ 2 classes, but got"
            f" shape {tuple(logits.shape)}."
        )
    check_finite(logits, "logits")


def check_gram(logits: Tensor, gram: Tensor) -> None:
    """Raise unless ``gram`` is finite and of shape (N, C, C) beside logits (N, C)."""
    check_given_logits(logits)
    check_floating("gram", gram, "(N, C, C)")
    expected = (*logits.shape, logits.shape[1])
    if gram.shape != expected:
        raise ValueError(
            f"Expected argument `gram` of shape {expected} beside logits {tuple(logits.shape)}, but got"
            f" {tuple(gram.shape)}."
        )
    check_finite(gram, "entries of `gram`")


def check_inputs(inputs: Tensor) -> None:
    """Raise unless ``inputs`` are finite floating-point samples ``(N, ...)`` with N ≥ 1."""
    check_input_type(inputs)
    if inputs.ndim < 1 or inputs.numel() == 0:
        raise ValueError(
            "Expected argument `inputs` to hold at least one sample, and no empty ones, but got shape"
            f" {tuple(inputs.shape)}."
        )
    check_finite(inputs, "inputs")


def check_input_type(inputs: Tensor) -> None:
    """Raise a ``TypeError`` unless ``inputs`` are a tensor of floating-point numbers."""
    if isinstance(inputs, Tensor) and not inputs.is_floating_point():
        raise TypeError(
            f"Expected argument `inputs` to be floating point, but got {inputs.dtype}: integers, such as token ids or"
            " raw bytes, have no derivative. Scale bytes to floats; for token ids make the model start at its"
            " embeddings and pass those (in a callback, through `probe_fn`)."
        )
    check_floating("inputs", inputs, "(N, ...)")


def check_logits(logits: object, *, num_samples: int) -> None:
    """Raise unless ``logits`` is a finite tensor ``(num_samples, C)`` with C ≥ 2."""
    expected = "Expected the model to return logits of shape (N, C) with C ≥ 2 classes"
    came = f"but for {num_samples} inputs it returned"
    if num_samples == 0:
        raise ValueError("Expected at least one sample, but got none.")
    if not isinstance(logits, Tensor):
        raise TypeError(f"{expected}, {came} {type(logits).__name__}. {_WRAP}")
    if logits.ndim != 2 or len(logits) != num_samples:
        raise ValueError(f"{expected}, {came} shape {tuple(logits.shape)}. {_WRAP}")
    if logits.shape[1] < 2:
        raise ValueError(
            f"{expected}, {came} shape {tuple(logits.shape)}. A single output z of a binary classifier stands for the"
            " logits (0, z): wrap the model so that it returns both (in a callback, through `probe_fn`). Of a"
            " regression only curvature can be measured, with its `loss_fn`."
        )
    check_finite(logits, "logits")


def check_outputs(outputs: object, *, num_samples: int) -> None:
    """Raise unless ``outputs`` is a finite tensor ``(num_samples, ...)``."""
    expected = f"Expected the model to return outputs of shape (N, ...), but for {num_samples} inputs it returned"
    if not isinstance(outputs, Tensor):
        raise TypeError(f"{expected} {type(outputs).__name__}. {_WRAP}")
    if outputs.ndim == 0 or len(outputs) != num_samples:
        raise ValueError(f"{expected} shape {tuple(outputs.shape)}. {_WRAP}")
    check_finite(outputs, "outputs")


def outputs_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a network on samples ``(N, ...)``, on a copy that it may change, and check what it returns."""
    outputs = model(x.clone())
    if isinstance(outputs, Tensor) and len(x) == 1 and outputs.ndim > 0 and len(outputs) != 1:
        outputs = outputs[None]  # a network that squeezes its outputs loses the dimension of a single sample
    check_outputs(outputs, num_samples=len(x))
    return outputs


def check_targets(targets: Tensor, *, num_samples: int, num_classes: int | None = None) -> Tensor:
    """Return ``targets`` in int64; raise unless they are ``num_samples`` classes, below ``num_classes`` if given."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"Expected argument `targets` to be a tensor (N,), but got {class_of(targets)}.")
    integer = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if not integer or targets.shape != (num_samples,):
        raise ValueError(
            f"Expected argument `targets` to hold one class index per sample, an integer tensor of shape"
            f" ({num_samples},), but got {targets.dtype} of shape {tuple(targets.shape)}. Take `.squeeze(1)` of a"
            " column, `.argmax(dim=1)` of one-hot rows, `.long()` of classes in floating point. Where there are no"
            " classes, only curvature can be measured, with its `loss_fn`."
        )
    labels = full_precision(targets).long()
    if num_classes is not None and num_samples and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(
            f"Expected argument `targets` to lie between 0 and {num_classes - 1}, one of the {num_classes} classes of"
            f" the logits, but got values from {int(labels.min())} to {int(labels.max())}."
        )
    return labels


def check_finite(values: Tensor, what: str) -> None:
    """Raise, with the number of samples concerned, if any of ``values`` ``(N, ...)`` is NaN or infinite."""
    finite = values.detach().isfinite()
    if not finite.all():
        bad = (~finite.flatten(1).all(dim=1) if finite.ndim > 1 else ~finite).nonzero()[:, 0]
        raise ValueError(
            f"Expected finite {what}, but got NaN or infinity in {len(bad)} of {len(values)} samples"
            f" (first: sample {int(bad[0])})."
        )
