"""Errors about bad input name the argument, what was expected and what was given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_robust.functional import (
    calibrated_fim_spectral_norm,
    fim_spectral_norm,
    fim_trace,
    fit_temperature,
    linearize,
    linearized_margin,
    linearized_margin_linf,
    pgd,
    saturated,
)
from tests.helpers.networks import Linear

MODEL = Linear(torch.eye(3))
INPUTS = torch.ones(4, 3)
LOGITS = torch.eye(4)[:, :3]
GRAM = torch.eye(3).expand(4, 3, 3)
TARGETS = torch.tensor([0, 1, 2, 0])
NAN = float("nan")


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[1, 0] = NAN
    return tensor


# Both passes through the network, called as (model, inputs).
PASSES: dict[str, Callable[..., object]] = {
    "linearize": linearize,
    "pgd": lambda model, inputs: pgd(model, inputs, TARGETS, epsilon=0.1, steps=1),
}
# All algebra on logits, called as (logits).
OF_LOGITS: dict[str, Callable[..., object]] = {
    "saturated": saturated,
    "spectral_norm": lambda logits: fim_spectral_norm(logits, GRAM),
    "trace": lambda logits: fim_trace(logits, GRAM),
    "calibrated": lambda logits: calibrated_fim_spectral_norm(logits, GRAM, TARGETS),
    "temperature": lambda logits: fit_temperature(logits, TARGETS),
    "margin": lambda logits: linearized_margin(logits, GRAM, TARGETS),
    "margin_linf": lambda logits: linearized_margin_linf(logits, LOGITS, TARGETS),
}
# All that takes labels, called as (targets).
OF_TARGETS: dict[str, Callable[..., object]] = {
    "calibrated": lambda targets: calibrated_fim_spectral_norm(LOGITS, GRAM, targets),
    "temperature": lambda targets: fit_temperature(LOGITS, targets),
    "margin": lambda targets: linearized_margin(LOGITS, GRAM, targets),
    "margin_linf": lambda targets: linearized_margin_linf(LOGITS, LOGITS, targets),
    "pgd": lambda targets: pgd(MODEL, INPUTS, targets, epsilon=0.1, steps=1),
}
OF_GRAM: dict[str, Callable[..., object]] = {
    "spectral_norm": lambda gram: fim_spectral_norm(LOGITS, gram),
    "trace": lambda gram: fim_trace(LOGITS, gram),
    "calibrated": lambda gram: calibrated_fim_spectral_norm(LOGITS, gram, TARGETS),
    "margin": lambda gram: linearized_margin(LOGITS, gram, TARGETS),
}


def each(functions: dict[str, Callable[..., object]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("function", functions.values(), ids=functions)


@each(PASSES)
@pytest.mark.parametrize(
    ("inputs", "error", "sentence"),
    [
        (torch.ones(4, 3, dtype=torch.long), TypeError, r"floating point.*embeddings.*`probe_fn`"),
        (torch.ones(4, 3, dtype=torch.uint8), TypeError, r"torch\.uint8.*Scale bytes to floats"),
        (torch.ones(4, 3, dtype=torch.cfloat), TypeError, r"floating point.*complex64"),
        ([[1.0, 2.0, 3.0]], TypeError, r"`inputs` to be a tensor.*list"),
        (torch.ones(0, 3), ValueError, r"at least one sample.*\(0, 3\)"),
        (torch.tensor(1.0), ValueError, "at least one sample"),
        (with_nan(INPUTS), ValueError, r"finite inputs.*1 of 4 samples \(first: sample 1\)\. Where NaN .*probe_fn="),
        (INPUTS / 0, ValueError, r"finite inputs.*4 of 4 samples \(first: sample 0\)\.$"),
    ],
    ids=["integers", "bytes", "complex", "list", "empty", "scalar", "nan", "infinite"],
)
def test_inputs_without_a_derivative_or_a_value_are_refused(
    function: Any, inputs: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        function(MODEL, inputs)


@each(PASSES)
@pytest.mark.parametrize(
    ("model", "error", "sentence"),
    [
        (lambda x: [x.sum()], TypeError, r"logits of shape \(N, C\).*returned list.*`probe_fn`"),
        (lambda x: {"loss": 1.0}, TypeError, "returned dict"),
        (lambda x: (x, x), ValueError, r"returned tuple with several .*\[0\] of shape .* and \[1\].*module\(x\)\[0\]"),
        (lambda x: {"a": x, "b": 2 * x}, ValueError, r"returned dict with several .* and \['b'\].*module\(x\)\['a'\]"),
        (lambda x: x[:, 0], ValueError, r"returned shape \(\d,\).*binary classifier.*BCEWithLogitsLoss"),
        (lambda x: x[:, :, None].expand(-1, 3, 2), ValueError, r"returned shape \(\d, 3, 2\)"),
        (lambda x: x[:1], ValueError, r"returned shape \(1, 3\)"),
        (lambda x: x[:, :1], ValueError, r"single output z of a binary classifier.*\(0, z\)"),
        (lambda x: x * NAN, ValueError, "finite logits"),
        (Linear(with_nan(torch.eye(3))), ValueError, "finite logits"),
    ],
    ids=["list", "dict", "two of a tuple", "two of a dict", "1-D", "3-D", "reduced", "C=1", "nan", "nan weights"],
)
def test_outputs_that_are_no_finite_logits_are_refused(
    function: Any, model: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        function(model, INPUTS)


def test_gradients_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match=r"finite gradients.*4 of 4 samples"):
        linearize(lambda x: (x - 1).sqrt(), INPUTS)


@each(OF_LOGITS)
@pytest.mark.parametrize(
    ("logits", "error", "sentence"),
    [
        ((LOGITS, LOGITS), TypeError, "logits.*tuple"),
        (LOGITS[:, 0], ValueError, r"shape \(4,\)"),
        (LOGITS[:, :, None], ValueError, r"shape \(4, 3, 1\)"),
        (LOGITS[:, :1], ValueError, r"C ≥ 2 classes.*shape \(4, 1\)"),
        (with_nan(LOGITS), ValueError, "finite logits.*1 of 4"),
    ],
    ids=["tuple", "1-D", "3-D", "C=1", "nan"],
)
def test_what_is_no_finite_matrix_of_logits_is_refused(
    function: Any, logits: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        function(logits)


@each(OF_TARGETS)
@pytest.mark.parametrize(
    ("targets", "error", "sentence"),
    [
        ([0, 1, 2, 0], TypeError, "`targets` to be a tensor.*list"),
        (TARGETS.float(), ValueError, r"`targets`.*integer.*float32"),
        (TARGETS == 0, ValueError, r"`targets`.*integer.*bool"),
        (TARGETS[:3], ValueError, r"`targets`.*\(4,\).*\(3,\)"),
        (nn.functional.one_hot(TARGETS), ValueError, r"`targets`.*\(4,\).*\(4, 3\)"),
        (TARGETS + 1, ValueError, "`targets` to lie between 0 and 2.*from 1 to 3"),
        (TARGETS - 1, ValueError, "`targets` to lie between 0 and 2.*from -1 to 1"),
    ],
    ids=["list", "float", "bool", "too few", "one-hot", "too large", "negative"],
)
def test_targets_that_are_no_class_indices_are_refused(
    function: Any, targets: Any, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        function(targets)


@pytest.mark.parametrize(
    "function",
    [lambda z, _, y: fit_temperature(z, y), calibrated_fim_spectral_norm],
    ids=["temperature", "calibrated"],
)
def test_a_temperature_cannot_be_fitted_to_no_samples(function: Any) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        function(LOGITS[:0], GRAM[:0], TARGETS[:0])


@each(OF_GRAM)
@pytest.mark.parametrize("gram", [GRAM[:3], GRAM[:, :2], GRAM[0], LOGITS], ids=lambda gram: str(tuple(gram.shape)))
def test_a_gram_matrix_that_does_not_fit_the_logits_is_refused(function: Any, gram: Tensor) -> None:
    with pytest.raises(ValueError, match="`gram` of shape"):
        function(gram)


@pytest.mark.parametrize("gap_l1", [LOGITS[:3], LOGITS[:, :2], GRAM], ids=lambda gap: str(tuple(gap.shape)))
def test_gaps_that_do_not_fit_the_logits_are_refused(gap_l1: Tensor) -> None:
    with pytest.raises(ValueError, match=r"`gap_l1` of shape \(4, 3\)"):
        linearized_margin_linf(LOGITS, gap_l1, TARGETS)


@pytest.mark.parametrize("temperature", [0, -1.0, NAN, float("inf"), torch.tensor(0.0)])
@pytest.mark.parametrize("quantity", [fim_spectral_norm, fim_trace])
def test_a_temperature_that_is_not_positive_is_refused(quantity: Any, temperature: Any) -> None:
    with pytest.raises(ValueError, match="`temperature` to be positive"):
        quantity(LOGITS, GRAM, temperature=temperature)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_a_chunk_size_that_is_not_positive_is_refused(chunk_size: int) -> None:
    with pytest.raises(ValueError, match=f"`chunk_size` to be a positive integer, but got {chunk_size}"):
        linearize(MODEL, INPUTS, chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("input_std", "sentence"),
    [
        ([1.0, 1.0], r"3 for inputs of shape \(4, 3\).*got shape \(2,\)"),
        (torch.ones(1, 3), r"got shape \(1, 3\)"),
        ([], r"got shape \(0,\)"),
        (0.0, "positive.*0.0"),
        ([1.0, -1.0, 1.0], "positive.*-1.0"),
        ([1.0, NAN, 1.0], "finite.*nan"),
        (float("inf"), "finite.*inf"),
    ],
    ids=["too few", "2-D", "none", "zero", "negative", "nan", "infinite"],
)
def test_an_input_std_of_wrong_length_or_value_is_refused(input_std: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"`input_std`.*{sentence}"):
        linearize(MODEL, INPUTS, input_std=input_std)
