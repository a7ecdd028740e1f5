"""Checks of tensors that several estimators share. Each error says what was expected and what was given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightning_robust.functional._isolation.context import passed
from lightning_robust.functional._isolation.side_effects import watched
from lightning_robust.functional._isolation.stand_ins import full_precision, plain_tensor
from lightning_robust.functional._validation.arguments import (
    check_floating,
    check_function,
    check_kind,
    check_positive_integer,
    optional,
)

# Elements checked at once: the check takes memory of their size, and some tensors are the largest that there are.
# Smaller blocks would stay on the heap of glibc.
_CHECKED_ELEMENTS = 2**24
_WRAP = "Wrap the model so that it does (in a callback, through `probe_fn`)."
_FILL = (
    " Where NaN stands for missing values that the network fills in, let it see them beside inputs that have a"
    " derivative (in a callback): `probe_fn=lambda module, batch: Probe(lambda x, missing:"
    " module(x.masked_fill(missing, float('nan'))), batch[0].nan_to_num(0.0), batch[1], extras={'missing':"
    " batch[0].isnan()}, module=module)`. Curvature alone is measured as it is."
)


def check_given_logits(logits: Tensor, *, fewest: int = 2) -> None:
    """Raise unless logits that the caller gives are a tensor (N, C), N ≥ 1, C ≥ 2, finite but for masks of −∞.

    With ``fewest=1`` they are outputs without classes: one is enough, and there are no masks.
    """
    check_floating("logits", logits, "(N, C)")
    if logits.ndim != 2 or logits.shape[1] < fewest or len(logits) == 0:
        what = "C ≥ 2 classes" if fewest > 1 else "C ≥ 1 outputs"
        raise ValueError(
            f"Expected argument `logits` to be of shape (N, C) with at least one sample and {what}, but got"
            f" shape {tuple(logits.shape)}."
        )
    (check_finite_or_masked if fewest > 1 else check_finite)(logits, "logits")


def check_gram(logits: Tensor, gram: Tensor, *, fewest: int = 2) -> None:
    """Raise unless logits are as in :func:`check_given_logits`, and ``gram`` is finite and (N, C, C)."""
    check_given_logits(logits, fewest=fewest)
    shape = (*logits.shape, logits.shape[1])
    _check_beside_logits("gram", gram, "(N, C, C)", shape, f" beside logits {tuple(logits.shape)}")


def check_gap_l1(logits: Tensor, gap_l1: Tensor, *, fewest: int = 2) -> None:
    """Raise unless logits are as in :func:`check_given_logits`, and ``gap_l1`` is finite and of their shape."""
    check_given_logits(logits, fewest=fewest)
    _check_beside_logits("gap_l1", gap_l1, "(N, C)", tuple(logits.shape), ", like the logits")


def _check_beside_logits(name: str, value: Tensor, letters: str, shape: tuple[int, ...], relation: str) -> None:
    check_floating(name, value, letters)
    if value.shape != shape:
        raise ValueError(f"Expected argument `{name}` of shape {shape}{relation}, but got {tuple(value.shape)}.")
    check_finite(value, f"entries of `{name}`")


def check_pass(model: object, inputs: Tensor, *, chunk_size: int | None = None) -> None:
    """Raise unless ``model`` can be called on finite samples, at most ``chunk_size`` together."""
    optional(check_positive_integer, "chunk_size", chunk_size)
    check_function("model", model)
    check_inputs(inputs)


def check_inputs(inputs: Tensor, *, with_derivative: bool = True) -> None:
    """Raise unless ``inputs`` are samples ``(N, ...)`` with N ≥ 1; finite and of floating point ``with_derivative``.

    Without a derivative they need not be finite, because the network may fill in missing values.
    """
    (check_input_type if with_derivative else check_real)(inputs)
    if inputs.ndim < 1 or inputs.numel() == 0:
        raise ValueError(
            "Expected argument `inputs` to hold at least one sample, and no empty ones, but got shape"
            f" {tuple(inputs.shape)}."
        )
    if with_derivative:
        check_finite(inputs, "inputs", remedy=_FILL if inputs.isnan().any() else "")


def check_input_type(inputs: Tensor) -> None:
    """Raise a ``TypeError`` unless ``inputs`` are a tensor of floating-point numbers."""
    if isinstance(inputs, Tensor) and not inputs.is_floating_point():
        raise TypeError(_integers(inputs, ": integers, such as token ids or raw bytes, have no derivative"))
    check_floating("inputs", inputs, "(N, ...)")


def check_real(inputs: Tensor) -> None:
    """Raise a ``TypeError`` unless ``inputs`` are a tensor of real numbers, integers or booleans."""
    check_kind("inputs", inputs, Tensor, "a tensor (N, ...)")
    if inputs.is_complex():
        raise TypeError(f"Expected argument `inputs` to be floating point or integer, but got {inputs.dtype}.")


def check_outputs(outputs: object, *, num_samples: int, are_logits: bool = False, inputs: Tensor | None = None) -> None:
    """Raise unless ``outputs`` is a finite tensor ``(num_samples, ...)``; for logits ``(num_samples, C)`` and C ≥ 2.

    Outputs that may be logits may have masks of −∞. If outputs are not finite, ``inputs`` that are not are to blame.
    """
    if are_logits and num_samples == 0:
        raise ValueError("Expected at least one sample, but got none.")
    expected = "logits of shape (N, C) with C ≥ 2 classes" if are_logits else "outputs of shape (N, ...)"
    error = f"Expected the model to return {expected}, but for {num_samples} inputs it returned"
    if not isinstance(outputs, Tensor):
        raise TypeError(f"{error} {type(outputs).__name__}. {_WRAP}")
    error += f" shape {tuple(outputs.shape)}."
    if are_logits and outputs.ndim > 2 and len(outputs) == num_samples:
        raise ValueError(
            f"{error} {_WRAP} Where every pixel or token has a class of its own, only curvature can be measured, with"
            " `loss_fn=nn.CrossEntropyLoss()` and targets (N, ...) for outputs (N, C, ...)."
        )
    if are_logits and outputs.shape in ((num_samples,), (num_samples, 1)):
        raise ValueError(
            f"{error} A single output z of a binary classifier stands for the logits (0, z): pass"
            " `loss_fn=nn.BCEWithLogitsLoss()` to the monitor or the probe. For a regression, pass"
            " `likelihood='gaussian'`."
        )
    if outputs.ndim == 0 or len(outputs) != num_samples or (are_logits and outputs.ndim != 2):
        raise ValueError(f"{error} {_WRAP}")
    may_be_logits = outputs.ndim > 1 and max(outputs.shape[1], outputs.shape[-1]) > 1
    # classes come first, as in (N, C, L), unless all positions mask the same ones: then they come last, as in (N, T, V)
    last = outputs.ndim == 3 and bool(outputs.detach().isneginf().all(dim=1).any())
    by_class = outputs.movedim(2, 1) if last else outputs
    try:
        (check_finite_or_masked if may_be_logits else check_finite)(by_class, "logits" if are_logits else "outputs")
    except ValueError:
        if inputs is not None:
            check_finite(inputs, "inputs")
        raise


check_logits = partial(check_outputs, are_logits=True)


def check_columns(outputs: object, *, num_samples: int, inputs: Tensor | None = None) -> None:
    """Raise unless ``outputs`` is a finite tensor ``(num_samples, C)`` with C ≥ 1, without masks."""
    check_outputs(outputs, num_samples=num_samples, inputs=inputs)
    assert isinstance(outputs, Tensor)
    if outputs.ndim != 2 or not outputs.shape[1]:
        raise ValueError(
            f"Expected the model to return outputs of shape (N, C), but for {num_samples} inputs it returned shape"
            f" {tuple(outputs.shape)}. {_WRAP}"
        )
    check_finite(outputs, "outputs")


def outputs_of(
    model: Callable[[Tensor], Tensor], x: Tensor, *, check: Callable[..., None] | None = check_outputs
) -> Tensor:
    """Call a network on a copy of samples ``(N, ...)``. ``check=None`` skips the check, which waits for the device."""
    with watched():
        try:
            outputs = passed(model, x)
        except (RuntimeError, TypeError) as error:
            _blame_integers(x, error)
            raise
    if isinstance(outputs, Tensor):
        outputs = plain_tensor(outputs)
    if isinstance(outputs, Tensor) and len(x) == 1 and outputs.ndim > 0 and len(outputs) != 1:
        outputs = outputs[None]  # a network that squeezes its outputs loses the dimension of a single sample
    if check is not None:
        check(outputs, num_samples=len(x), inputs=x)
    return outputs


def _blame_integers(x: Tensor, error: Exception) -> None:
    """Raise a ``TypeError`` with a remedy if a network fails because its inputs are integers."""
    if not x.is_floating_point() and ("type" in str(error) or "implemented for" in str(error)):
        raise TypeError(_integers(x, ", which the model does not take"))


def _integers(inputs: Tensor, why: str) -> str:
    return (
        f"Expected argument `inputs` to be floating point, but got {inputs.dtype}{why}. Scale bytes to floats; for"
        " token ids make the model start at its embeddings and pass those (in a callback, through `probe_fn`)."
    )


def check_targets(
    targets: Tensor, *, num_samples: int, num_classes: int | None = None, name: str = "targets"
) -> Tensor:
    """Return ``targets`` in int64; raise unless they are ``num_samples`` classes, below ``num_classes`` if given."""
    check_kind(name, targets, Tensor, "a tensor (N,)")
    integer = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if not integer or targets.shape != (num_samples,):
        raise ValueError(
            f"Expected argument `{name}` to hold one class index per sample, an integer tensor of shape"
            f" ({num_samples},), but got {targets.dtype} of shape {tuple(targets.shape)}. Take `.squeeze(1)` of a"
            " column, `.argmax(dim=1)` of one-hot rows, `.long()` of classes in floating point. For a binary classifier"
            " with one logit pass `loss_fn=nn.BCEWithLogitsLoss()`. For several labels per sample pass"
            " `likelihood='bernoulli'`, for a regression `likelihood='gaussian'`. Elsewhere only curvature can be"
            " measured, with its `loss_fn`."
        )
    labels = full_precision(targets).long()
    if num_classes is not None and num_samples and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(
            f"Expected argument `{name}` to lie between 0 and {num_classes - 1}, one of the {num_classes} classes of"
            f" the logits, but got values from {int(labels.min())} to {int(labels.max())}."
        )
    return labels


def check_finite(values: Tensor, what: str, *, remedy: str = "") -> None:
    """Raise, with the number of samples concerned, if any of ``values`` ``(N, ...)`` is NaN or infinite."""
    size = max(1, _CHECKED_ELEMENTS // max(1, values.shape[1:].numel()))
    parts = (part.isfinite() for part in torch.split(plain_tensor(values.detach()), size))
    finite = torch.cat([part.flatten(1).all(dim=1) if part.ndim > 1 else part for part in parts])
    _refuse(~finite, f"Expected finite {what}, but got NaN or infinity", remedy)


def check_finite_or_masked(logits: Tensor, what: str) -> None:
    """Raise if any of ``logits`` ``(N, C, ...)`` is NaN or +∞, or if −∞ masks all classes of a sample."""
    finite = logits.detach().isfinite()
    if finite.all():
        return
    masked = logits.detach().isneginf()
    _refuse(~finite & ~masked, f"Expected finite {what}, but got NaN or infinity")
    expected = f"Expected {what} with at least one class that is not masked by −∞"
    _refuse(masked.all(dim=1, keepdim=True), f"{expected}, but got none")


def _refuse(wrong: Tensor, sentence: str, remedy: str = "") -> None:
    """Raise, with the number of samples concerned, if anything is ``wrong`` ``(N, ...)``."""
    if wrong.any():
        bad = (wrong.flatten(1).any(dim=1) if wrong.ndim > 1 else wrong).nonzero()[:, 0]
        raise ValueError(f"{sentence} in {len(bad)} of {len(wrong)} samples (first: sample {int(bad[0])}).{remedy}")
