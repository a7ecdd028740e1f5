"""Checks that a network treats each sample for itself: f(x)[i] = f(x[i:i+1]).

A module cannot know the batch. A function can close over tensors of it, and then every part of the samples meets the
rows that belong to others: a lambda, a partial application, a bound method that reads an attribute of its module.

Cost: two forward passes without gradients of plain functions; modules pay nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional._validation.outputs import unwrapped
from lightning_robust.functional._validation.scales import tolerances
from lightning_robust.functional._validation.tensors import check_inputs, outputs_of

_MOST_SAMPLES, _MOST_ELEMENTS = 1024, 2**23  # that pass together without gradients: 32 MiB of inputs in float32
_FEWEST = 16
_ERRORS = (RuntimeError, ValueError, IndexError, TypeError)  # of a network that is given other samples than it expects
_MIXES = (
    "The model mixes the samples of a batch (changing one sample changed the outputs of others), so no sample has a"
    " robustness of its own, and the numbers depend on the batch. Look for a normalisation over the batch in eval mode,"
    " such as `BatchNorm` with `track_running_stats=False`."
)
_DEPENDS = (
    "The model's outputs for a sample depend on its place in the batch, so samples would be measured with what belongs"
    " to others."
)
_AS_EXTRAS = (
    "Let it take that tensor as an argument, and pass `Probe(model, inputs, targets, extras={'mask': mask})`: extras"
    " are selected with the samples."
)
BOUND = f"{_DEPENDS} Does the model close over a tensor of the batch, such as a padding mask? {_AS_EXTRAS}"
_KEEPS = (
    f"{_DEPENDS} Does the module keep a tensor with a row per sample, such as the mask of the last batch? {_AS_EXTRAS}"
)
_ONE_SIZE = (
    "The model takes only some numbers of samples at once, but samples are measured one by one, and in groups of any"
    " size. Does the module keep a state for batches of one size? Let it make that state as large as the inputs are."
)


class BoundToBatchError(ValueError):
    """A function depends on the places of samples in a batch, because it closes over tensors of that batch."""


_KNOWN = ContextVar("places_known", default=False)


@contextmanager
def places_known() -> Iterator[None]:
    """Inside, :func:`check_place` returns at once: the samples have been checked."""
    token = _KNOWN.set(True)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def is_plain(model: object) -> bool:
    """Whether a model is anything but a module: a function, a method, a partial application."""
    return not isinstance(unwrapped(model), nn.Module)


def dependence(model: SampleModel, x: Tensor, outputs: Tensor) -> str | None:
    """Say so if the outputs of a sample depend on the other samples in its batch, or on its place there.

    One more forward pass where they do not. To be called inside :func:`differentiable`.

    Args:
        model: The network of the n samples ``x`` (n, ...).
        x: The samples.
        outputs: What it returns for them, ``(n, ...)``.

    Raises:
        ValueError: If the model can be called on all n samples, but not on one less.
    """
    if len(x) < 2:
        return None
    rest = torch.arange(1, len(x))  # every sample in the place of its neighbour, and one sample less
    with torch.no_grad():
        try:
            moved = _differ(outputs_of(model.on(rest), x[rest]), outputs, rest)
        except _ERRORS as error:
            told = BOUND if is_plain(model.model) else _ONE_SIZE
            raise ValueError(f"{told} (On {len(rest)} of {len(x)} samples it raised: {error})") from error
        if not moved:
            return None
        if _mixes(model, x, outputs):
            return _MIXES
    return BOUND if is_plain(model.model) else _KEEPS


def check_place(
    model: SampleModel, inputs: Tensor, rows: Sequence[int] | None = None, *, module: nn.Module | None = None
) -> None:
    """Raise a ``ValueError`` if a plain function returns other outputs for samples at other places of the batch.

    Networks that mix samples, and random ones, are not refused: they depend on more than the place.

    Args:
        model: The network of the samples.
        inputs: The samples ``(N, ...)``.
        rows: Numbers of those that will be called without the others. By default parts of all of them will, and the
            first are compared: 1,024, or fewer if they are large.
        module: A module that the function calls, to be shielded from these passes.
    """
    if _KNOWN.get() or not is_plain(model.model) or len(inputs) < 2:
        return
    check_inputs(inputs, with_derivative=False)
    with differentiable(model.model, module), torch.no_grad():
        x = full_precision(inputs)
        n = len(x)
        if rows is None:
            n = min(n, _MOST_SAMPLES, max(_FEWEST, _MOST_ELEMENTS // x[0].numel()))
        first = slice(n)
        try:
            outputs = outputs_of(model.on(first), x[first])
        except _ERRORS as error:
            if n < len(x):
                outputs_of(model.on_all(), x)  # if this raises, too, the place is not to blame
                raise _refusal(n, len(x), error) from error
            raise
        few = list(range(n) if rows is None else rows)
        # as they will be called, and each in the place of its neighbour
        for part in ([few] if len(few) < n else []) + ([few[1:]] if len(few) > 1 else []):
            some = torch.tensor(part)
            try:
                moved = _differ(outputs_of(model.on(some), x[some]), outputs, some)
            except _ERRORS as error:
                raise _refusal(len(part), len(x), error) from error
            if moved:
                known = SampleModel(model.model, _rows(model, first), num_samples=n)
                again = outputs_of(known.on_all(), x[first])
                if not _differ(again, outputs, torch.arange(n)) and not _mixes(known, x[first], outputs):
                    raise BoundToBatchError(BOUND)
                return


def _refusal(count: int, of: int, error: Exception) -> BoundToBatchError:
    return BoundToBatchError(f"{BOUND} (On {count} of {of} samples it raised: {error})")


def _rows(model: SampleModel, rows: slice) -> dict[str, Tensor]:
    return {name: extra[rows] for name, extra in model.extras.items()}


def _differ(others: Tensor, outputs: Tensor, rows: Tensor) -> bool:
    """Whether ``others`` are not the rows of the ``outputs`` of all samples."""
    expected, tolerance = outputs[rows], tolerances(outputs)[rows]
    return others.shape != expected.shape or bool(((others - expected).abs() > tolerance).any())


def _mixes(model: SampleModel, x: Tensor, outputs: Tensor) -> bool:
    """Whether other samples in half of the places change the outputs in the other half."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    changed, kept = order[: len(x) // 2], order[len(x) // 2 :]
    disturbed = x.clone()
    disturbed[changed] = x[kept[: len(changed)]]  # samples rather than noise: some networks refuse other values
    return _differ(outputs_of(model.on_all(), disturbed)[kept], outputs, kept)
