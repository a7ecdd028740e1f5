"""The linearisation of a model that only answers: no gradients, no weights, predictions alone.

Along m random orthonormal directions ``V`` (D × m), scaled by ``√(D/m)``, slopes of the logits are central differences:

    J V ≈ [f(x + hV) − f(x − hV)] / 2h,        (J V)(J V)ᵀ is unbiased for K = J Jᵀ

because ``E[V Vᵀ]`` is the identity; with m = D it is K itself. Logits and K are all that λ, trace and L2 margins need.
The largest slope along random directions, by contrast, says nothing: a unit vector in D dimensions hardly meets the
direction that matters, and with 200 of 3,072 the maximum is a few thousandths of λ.

The slope along the direction that matters is known up to a relative variance ``ν = 2 (D − m) / (m (D + 2))``: 10 % for
200 directions, in any dimension. λ has that relative standard error, and a bias, which
:func:`fim_spectral_norm_by_queries` removes.

Source: ours; unbiased estimates from random directions as in Nesterov & Spokoiny 2017.
Cost: 2m + 20 queries per sample, or a few more where the first step does not suit a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.arguments import (
    check_function,
    check_integer,
    check_kind,
    check_number,
    check_positive_integer,
    optional,
)
from lightning_robust.functional._validation.independence import BOUND
from lightning_robust.functional._validation.scales import tolerances
from lightning_robust.functional._validation.tensors import check_finite, check_inputs
from lightning_robust.functional.input_space.fisher_information import fim_spectral_norm
from lightning_robust.functional.input_space.float64 import float64_dtype
from lightning_robust.functional.input_space.jacobian import largest_chunk
from lightning_robust.functional.input_space.linearization import Linearization
from lightning_robust.functional.input_space.query_answers import (
    Answers,
    are_probabilities,
    given_tensors,
    refuse_unnormalised,
)
from lightning_robust.functional.input_space.query_bias import relative_variance
from lightning_robust.functional.input_space.query_directions import direction_keys, orthonormal_directions
from lightning_robust.functional.input_space.query_reading import QueryReading
from lightning_robust.functional.input_space.query_steps import Queries, read, steps
from lightning_robust.functional.input_space.units import Units

QUERIES_BESIDE = 20  # that it takes per sample beside two for each direction, where the first step will do
_DIRECTION_ELEMENTS = 2**24  # of the directions of samples that are queried together: 64 MiB in float32


@dataclass(frozen=True)
class QueriedSpectralNorm:
    """Spectral norms that were estimated from queries.

    Attributes:
        value: ``(N,)``, with its bias removed, in squared nats per squared input unit.
        stderr: ``(N,)``, standard error of each; 0 if there were as many directions as input features. With fewer than
            about 30 directions the error is skewed, and ± 2 standard errors cover the truth in less than 90 % of cases.
    """

    value: Tensor
    stderr: Tensor


def linearize_by_queries(
    predict: Callable[..., Any],
    inputs: Tensor,
    *,
    num_directions: int,
    step: float | None = None,
    generator: torch.Generator | None = None,
    extras: Mapping[str, Tensor] | None = None,
    input_std: float | Sequence[float] | Tensor | None = None,
    chunk_size: int | None = None,
) -> Linearization:
    """Linearise a model around each of ``inputs`` by calling it, without any gradient.

    Args:
        predict: Maps inputs ``(n, ...)`` to logits, log-probabilities or probabilities ``(n, C)``, sample by sample and
            for any n: scikit-learn's ``model.predict_proba``, ``lambda x: session.run(None, {"x": x})[0]`` of ONNX
            Runtime, a function that asks a server, a module. It gets NumPy arrays if ``inputs`` are an array, else
            tensors, and may return either. Answers that are non-negative in rows that sum to one are probabilities.
            Modules run in eval mode.
        inputs: ``(N, ...)``, floating point, any shape; a tensor or a NumPy array.
        num_directions: m, from 2 to the number of input features D. With D the result is exact up to differences.
        step: How far to go along a direction, in units of the un-normalised input. By default chosen for each sample
            from its size and from the rounding of its answers, and adapted until differences over twice the step agree.
        generator: Chooses the directions. They are a function of one number that it draws and of the contents of a
            sample; without a generator, of the contents alone. So a sample has the same value in any batch.
        extras: Further arguments of the function, passed on by keyword: tensors or arrays ``(N, ...)``.
        input_std: Standard deviation by which the inputs were divided, one number or one per channel (dimension 1).
            If given, all results are in units of the un-normalised input.
        chunk_size: Largest number of rows in a call; 1 for models that take samples one by one.

    Returns:
        A :class:`~lightning_robust.functional.Linearization` without ``gap_l1``: L∞ margins need gradients. Of
        probabilities, ``logits`` are logarithms. Its ``gram_variance`` tells how well λ is known (see
        :func:`fim_spectral_norm_by_queries`).

    Raises:
        TypeError: If the inputs are not floating point, or the function does not return scores.
        ValueError: If an argument has a wrong value; if answers are not ``(n, C)`` with C ≥ 2, not finite, or other in
            shape, type or value when the same query is made again; or if they have no slope that differences could
            measure: piecewise constant models, answers that are rounded too coarsely, probabilities of exactly 1.

    Source: ours; see the module's docstring.
    """
    check_function("predict", predict)
    optional(check_positive_integer, "chunk_size", chunk_size)
    step = optional(check_number, "step", step, "a positive number", above=0)
    optional(check_kind, "generator", generator, torch.Generator)
    model, inputs, extras = given_tensors(predict, inputs, extras)
    check_inputs(inputs)
    num_features = inputs[0].numel()
    count = check_integer("num_directions", num_directions, at_least=2)
    if count > num_features:
        raise ValueError(
            f"Expected argument `num_directions` to be at most {num_features}, the number of input features, but got"
            f" {count}. As many make the result exact."
        )
    units = Units.of(inputs, std=input_std, mean=None)
    with differentiable(predict), torch.no_grad():
        x = full_precision(inputs)
        keys, everyone = direction_keys(x, generator), torch.arange(len(x))
        at_once = largest_chunk(x, chunk_size, num_rows=1)
        answers = Answers(model, extras, num_samples=len(x), rows_at_once=at_once)
        first = answers(x, everyone)
        _refuse_memory(answers, x, first)
        from_probabilities = are_probabilities(first)
        if not from_probabilities:
            refuse_unnormalised(first)
        together = max(1, min(at_once // (2 * count), _DIRECTION_ELEMENTS // (count * num_features)))
        logits, gram = [], []
        for rows in torch.split(everyone, together):
            directions = orthonormal_directions([keys[row] for row in rows], count, x[rows])
            some = Queries(answers, x[rows], rows, _moved(units), _sizes(x[rows], units), directions)
            reading, slopes = _slopes(some, first[rows], step, from_probabilities=from_probabilities)
            logits.append(reading.logits)
            gram.append(slopes.mT @ slopes * (num_features / count))
        _refuse_memory(answers, x, first)
    check_finite(torch.cat(gram), "differences of the outputs")
    return Linearization(
        logits=torch.cat(logits).to(full_precision(first[:0]).dtype).to(x.device),
        gram=torch.cat(gram).to(float64_dtype(x)).to(x.device),
        gap_l1=None,
        gram_variance=relative_variance(count, num_features),
    )


def fim_spectral_norm_by_queries(
    linearization: Linearization, *, temperature: float | Tensor = 1.0
) -> QueriedSpectralNorm:
    """Largest eigenvalue of each sample's input Fisher information, with its bias removed and a standard error.

    Args:
        linearization: Result of :func:`linearize_by_queries`.
        temperature: Divides the logits.

    Returns:
        A :class:`QueriedSpectralNorm`.

    Raises:
        TypeError: If ``linearization`` is none.
        ValueError: As :func:`~lightning_robust.functional.fim_spectral_norm`.

    Source: see :mod:`~lightning_robust.functional.input_space.query_bias`.
    """
    check_kind("linearization", linearization, Linearization)
    parts = (linearization.logits, linearization.gram)
    value = fim_spectral_norm(*parts, temperature=temperature, gram_variance=linearization.gram_variance)
    return QueriedSpectralNorm(value, value * linearization.gram_variance**0.5)


def _slopes(
    queries: Queries, first: Tensor, step: float | None, *, from_probabilities: bool
) -> tuple[QueryReading, Tensor]:
    """Slopes of the logits along all directions, (n, m, C), and what the answers for the samples themselves say."""
    reading = read(queries, first, from_probabilities=from_probabilities)
    h = steps(queries, reading, first, step)
    for wrong, what in (
        (reading.saturated, "have a probability of 1 for one class and of 0 for all others"),
        (reading.lost, "have too few digits in the probabilities beside the largest"),
    ):
        if wrong.any():
            where = int(queries.rows[wrong.nonzero()[0, 0]])
            raise ValueError(
                f"{int(wrong.sum())} of {len(first)} samples (first: sample {where}) {what}, so nothing tells how far"
                " other classes are. Let the predict function return logits, log-probabilities (`predict_log_proba`)"
                " or probabilities that are not rounded."
            )
    return reading, reading.slopes(*queries.around(h, queries.directions.shape[1]), h)


def _refuse_memory(answers: Answers, x: Tensor, first: Tensor) -> None:
    """Make the first query again, one half before the other, and refuse other answers."""
    half, everyone = len(x) // 2, torch.arange(len(x))
    halves = [rows for rows in (everyone[half:], everyone[:half]) if len(rows)]
    if not any(_differ(answers(x[rows], rows), first[rows], first) for rows in halves):
        return
    if _differ(answers(x, everyone), first, first):
        raise ValueError(
            "The predict function answers the same query differently when it is made again, so differences of its"
            " answers are no slopes. Is it random, does it add noise, or does it remember calls?"
        )
    raise ValueError(BOUND)


def _differ(again: Tensor, before: Tensor, first: Tensor) -> bool:
    """Whether answers (n, C) are not those before, up to the rounding of answers of the size of the first."""
    slack = tolerances(first).amin(dim=0)
    return not bool(((again == before) | ((again - before).abs() <= slack)).all())


def _sizes(x: Tensor, units: Units) -> Tensor:
    """Typical length of the un-normalised inputs, (n,), float64; that of a constant 1 where all are zero."""
    flat = units.raw_change(x).flatten(1).double()
    lengths = torch.linalg.vector_norm(flat, dim=1)
    ones = torch.linalg.vector_norm(units.raw_change(torch.ones_like(x)).flatten(1).double(), dim=1)
    return torch.where(lengths > 0, lengths, ones).cpu()


def _moved(units: Units) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, change: x + units.change(change.reshape(x.shape))
