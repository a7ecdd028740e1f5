"""Checks that a network treats each sample for itself: f(x)[i] = f(x[i:i+1])."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.functional._isolation.context import differentiable, owner_of
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional._validation.scales import tolerances
from lightning_robust.functional._validation.tensors import check_inputs, outputs_of

_FEW = 8  # samples
_MIXES = (
    "The model mixes the samples of a batch (changing one sample changed the outputs of others), so no sample has a"
    " robustness of its own, and the numbers depend on the batch. Look for a normalisation over the batch in eval mode,"
    " such as `BatchNorm` with `track_running_stats=False`."
)
BOUND = (
    "The model's outputs for a sample depend on its place in the batch, so samples would be measured with what belongs"
    " to others. Does the model close over a tensor of the batch, such as a padding mask? Let it take that tensor as an"
    " argument, and pass `Probe(model, inputs, targets, extras={'mask': mask})`: extras are selected with the samples."
)


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
    tolerance = tolerances(outputs)

    def moved(others: Tensor) -> bool:
        expected = outputs[rest]
        return others.shape != expected.shape or bool(((others - expected).abs() > tolerance[rest]).any())

    if len(x) < 2:
        return None
    rest = slice(1, None)  # every sample in the place of its neighbour, and one sample less
    with torch.no_grad():
        try:
            elsewhere = outputs_of(model.on(rest), x[rest])
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ValueError(f"{BOUND} (On {len(x) - 1} of {len(x)} samples it raised: {error})") from error
        if not moved(elsewhere):
            return None
        disturbed = x.clone()
        disturbed[0] = x[-1]  # another sample rather than noise: some networks refuse inputs that are out of range
        return _MIXES if moved(outputs_of(model.on_all(), disturbed)[rest]) else BOUND


def check_place(model: SampleModel, inputs: Tensor) -> None:
    """Raise a ``ValueError`` if a plain function returns other outputs for a sample at another place of the batch.

    A module cannot know the batch. A function can close over tensors of it, and then every chunk of samples meets the
    rows that belong to others.
    """
    if owner_of(model.model) is not None or len(inputs) < 2:
        return
    check_inputs(inputs, with_derivative=False)
    with differentiable(model.model), torch.no_grad():
        x = full_precision(inputs)
        few = slice(None, _FEW)
        try:
            outputs = outputs_of(model.on(few), x[few])
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            outputs_of(model.on_all(), x)  # if this raises, too, the place is not to blame
            raise ValueError(f"{BOUND} (On {_FEW} of {len(x)} samples it raised: {error})") from error
        part = SampleModel(
            model.model, {name: extra[few] for name, extra in model.extras.items()}, num_samples=len(outputs)
        )
        if dependence(part, x[few], outputs) != BOUND:
            return
        moved = (outputs_of(part.on_all(), x[few]) - outputs).abs() > tolerances(outputs)
        if not moved.any():  # the outputs are not random
            raise ValueError(BOUND)
