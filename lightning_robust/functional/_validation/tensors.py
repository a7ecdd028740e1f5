"""Checks of tensors that several estimators share. Each says what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_robust.functional._isolation.side_effects import call
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.arguments import check_floating, class_of

_WRAP = "Wrap the model so that it does (in a callback, through `probe_fn`)."


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


def outputs_of(
    model: Callable[[Tensor], Tensor], x: Tensor, *, check: Callable[..., None] | None = check_outputs
) -> Tensor:
    """Call a network on samples ``(N, ...)``, on a copy that it may change, and check what it returns.

    Args:
        model: Maps inputs to outputs.
        x: ``(N, ...)``.
        check: :func:`check_outputs` or :func:`check_logits`; None skips the check, which waits for the device.
    """
    outputs = call(model, x.clone())
    if isinstance(outputs, Tensor) and len(x) == 1 and outputs.ndim > 0 and len(outputs) != 1:
        outputs = outputs[None]  # a network that squeezes its outputs loses the dimension of a single sample
    if check is not None:
        check(outputs, num_samples=len(x))
    return outputs


def check_targets(
    targets: Tensor, *, num_samples: int, num_classes: int | None = None, name: str = "targets"
) -> Tensor:
    """Return ``targets`` in int64; raise unless they are ``num_samples`` classes, below ``num_classes`` if given.

    ``name`` is that of the argument.
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"Expected argument `{name}` to be a tensor (N,), but got {class_of(targets)}.")
    integer = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if not integer or targets.shape != (num_samples,):
        raise ValueError(
            f"Expected argument `{name}` to hold one class index per sample, an integer tensor of shape"
            f" ({num_samples},), but got {targets.dtype} of shape {tuple(targets.shape)}. Take `.squeeze(1)` of a"
            " column, `.argmax(dim=1)` of one-hot rows, `.long()` of classes in floating point. Where there are no"
            " classes, only curvature can be measured, with its `loss_fn`."
        )
    labels = full_precision(targets).long()
    if num_classes is not None and num_samples and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(
            f"Expected argument `{name}` to lie between 0 and {num_classes - 1}, one of the {num_classes} classes of"
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
