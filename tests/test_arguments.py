"""Whatever is passed as an argument is either taken, and can be measured with, or refused by name.

A refusal is a ``ValueError`` or ``TypeError``, of the callback a ``MisconfigurationException``. It names the argument
in backticks, and after "but got" shows what came: its ``repr``; of a ``repr`` beyond 200 characters the type; of
tensors, and of lists of a wrong length, the shape; of what is no tensor, function or module where one is needed, the
type; of a list of metrics the entry that is none.
"""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_robust import (
    AdversarialAccuracy,
    FisherRaoMargin,
    FisherSpectralNorm,
    HessianTrace,
    LinearizedAccuracy,
    Probe,
    RobustnessDriftStopping,
    RobustnessMonitor,
    WeightCurvatureIndex,
    functional,
)
from lightning_robust.metrics import METRICS, ProbeMetric
from tests.helpers.networks import random, random_linear
from tests.helpers.training import classifier, loader, trainer

CHANNELS = 3
MODEL = random_linear(0, num_classes=CHANNELS, num_features=CHANNELS)
INPUTS = random(1, 4, CHANNELS)
TARGETS = torch.tensor([0, 1, 2, 0])
LOGITS = random(2, 4, CHANNELS)
PROBS = LOGITS.softmax(dim=1)
TRACED = functional.trace_fisher_rao_paths(MODEL, INPUTS)
GRAM = torch.eye(CHANNELS, dtype=torch.float64).expand(4, CHANNELS, CHANNELS)
PROBE = Probe(MODEL, INPUTS, TARGETS)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --- what may come --------------------------------------------------------------------------------------------------


def function(*values: Any) -> Any:
    """Something that can be called."""
    return values[0]


class Sized:
    def __len__(self) -> int:
        return 2

    def __repr__(self) -> str:
        return "Sized()"


NUMBERS: list[Any] = [
    *(True, False, -1, 0, 1, 2, 3, 2**31, 2**63 - 1, 2**63, -(2**70), 10**400, -(10**400), Fraction(1, 3)),
    *(-0.0, 0.0, 0.5, 1.0, 2.5, -0.1, math.nan, math.inf, -math.inf, 1j, 0.5 + 0j),
]
TENSORS: list[Tensor] = [
    make(shape, dtype=dtype)
    for make in (torch.ones, torch.zeros)
    for shape in ((), (0,), (1,), (3,), (4,), (1, 3), (4, 3), (4, 3, 3), (2, 0, 3))
    for dtype in (*FLOATING, torch.float8_e5m2, torch.int64, torch.uint64, torch.uint8, torch.bool, torch.complex64)
]
OTHERS: list[Any] = [
    *(None, "", "0.5", "1", "auto", "linf", "l2", "LINF", "warn", "fisher_spectral_norm", "nan", b"", b"pgd", b"l2"),
    *([], (), {}, set(), [[]], [None], [[0.1], [0.2]], [[0.0, 1.0]], {"0": 1}, {0.1, 0.2}, frozenset({1}), range(2)),
    *([0, 1], (0, 1), [1, 0], [0.1, 0.2, 0.3], (0.5,), [0.5, 0.5], [0.0, -0.0], [True, 2], [math.nan, 1.0], ["0", "1"]),
    *(
        [0.1] * 100,
        [0, 1, 2],
        ["hessian_trace"],
        ("hessian_trace", []),
        ["hessian_trace", {}],
        [HessianTrace],
        [1, None],
    ),
    *(
        object(),
        object,
        int,
        nn.Linear,
        torch.Tensor,
        Sized(),
        function,
        len,
        nn.Identity(),
        torch.float32,
        slice(2),
        ...,
    ),
    *(functools.partial(function, 1), torch.Generator(), torch.device("cpu"), INPUTS.numpy(), INPUTS.numpy()[0, 0]),
]
scalars = (
    st.sampled_from(NUMBERS)
    | st.integers(-5, 5)
    | st.floats(1e-3, 1e3)  # what overflows within the network is no question of arguments
    | st.floats(-1e3, -1e-3)
    | st.text(max_size=4)
    | st.binary(max_size=4)
)
arbitrary = st.recursive(
    scalars | st.sampled_from(TENSORS) | st.sampled_from(OTHERS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)


# --- what should be taken -------------------------------------------------------------------------------------------

Rule = Callable[[Any], bool]


def is_real(value: Any) -> bool:
    """A real number or infinity; NumPy's numbers are real numbers, too, and tensors of a single real number."""
    value = plain(value)
    known = isinstance(value, float | Fraction) or (isinstance(value, int) and not isinstance(value, bool))
    return known and (value in (math.inf, -math.inf) or abs(value) <= sys.float_info.max)


def is_number(value: Any) -> bool:
    return is_real(value) and abs(plain(value)) < math.inf


def plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value


def entries(value: Any) -> Sequence[Any] | None:
    """Of a list, tuple, or vector of numbers."""
    if isinstance(value, Tensor):
        real = not value.is_complex() and value.dtype != torch.bool
        return value.tolist() if real and value.ndim == 1 else None
    return value if isinstance(value, list | tuple) else None


def integer(at_least: int) -> Rule:
    return lambda value: type(value) is int and at_least <= value < 2**63


def number(accepts: Rule) -> Rule:
    return lambda value: is_number(value) and accepts(plain(value))


def optional(rule: Rule) -> Rule:
    return lambda value: value is None or rule(value)


def one_of(*choices: str) -> Rule:
    return lambda value: isinstance(value, str) and value in choices


def constant(accepts: Rule, *, count: tuple[int, ...] | None = None) -> Rule:
    def rule(value: Any) -> bool:
        given = entries(value)
        given = [value] if given is None else given
        fits = len(given) > 0 if count is None else len(given) in count
        return fits and all(is_number(entry) and accepts(plain(entry)) for entry in given)

    return rule


def valid_range(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(map(is_real, value))
        and plain(value[0]) < plain(value[1])
    )


def epsilons(value: Any) -> bool:
    given = entries(value)
    if not given or not all(is_number(entry) and plain(entry) >= 0 for entry in given):
        return False
    return len({f"{abs(float(entry)):.4g}" for entry in given}) == len(given)


def non_negative_vector(value: Any) -> bool:
    given = entries(value)
    return given is not None and all(is_real(entry) and plain(entry) >= 0 for entry in given)


def vector(accepts: Rule, *, count: int | None = None) -> Rule:
    def rule(value: Any) -> bool:
        given = entries(value)
        if given is None or count not in (None, len(given)):
            return False
        return all(is_number(entry) and accepts(plain(entry)) for entry in given)

    return rule


def is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def metrics(value: Any) -> bool:
    known = isinstance(value, list | tuple) and len(value) > 0
    return known and all(isinstance(m, ProbeMetric) or (isinstance(m, str) and m in METRICS) for m in value)


def tensor(*shape: int | None, dtypes: Sequence[torch.dtype] = FLOATING) -> Rule:
    """A tensor of that shape, None for any size."""

    def rule(value: Any) -> bool:
        if not isinstance(value, Tensor) or value.dtype not in dtypes or value.ndim != len(shape):
            return False
        return all(wanted in (None, size) for wanted, size in zip(shape, value.shape, strict=True))

    return rule


def instance(kind: type) -> Rule:
    return lambda value: isinstance(value, kind)


def positive(value: Any) -> bool:
    return value > 0


def not_negative(value: Any) -> bool:
    return value >= 0


def anything(_: Any) -> bool:
    return True


def sums(x: Tensor) -> Tensor:
    """A network that takes samples of any shape and type."""
    total = x.reshape(len(x), x[0].numel()).sum(dim=1)
    return torch.stack([total, -total], dim=1)


def is_prediction(value: Any) -> bool:
    """A tensor of which each row of three is made of probabilities."""
    if not samples(value) or value.shape[-1] != CHANNELS:
        return False
    return bool((value >= 0).all()) and bool((value.sum(dim=-1) == 1).all())


def aims(value: Any) -> bool:
    """Classes (4, K) or (K,), none of them the one that a sample is to leave."""
    given = isinstance(value, Tensor) and value.dtype in integers and value.ndim in (1, 2) and value.numel() > 0
    if not given or (value.ndim == 2 and len(value) != len(INPUTS)):
        return False
    rows = value.long().expand(len(INPUTS), -1)
    in_range = bool((rows >= 0).all()) and bool((rows < CHANNELS).all())
    return in_range and not bool((rows == MODEL(INPUTS).argmax(dim=1, keepdim=True)).any())


def samples(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in FLOATING and value.ndim > 0 and value.numel() > 0


def keys(value: Any) -> bool:
    """A key, several, or several with weights."""
    given = [value] if isinstance(value, str) else value
    if (
        not isinstance(given, list | tuple | dict)
        or len(given) == 0
        or not all(isinstance(k, str) and k for k in given)
    ):
        return False
    weights = given.values() if isinstance(given, dict) else []
    return len(set(given)) == len(given) and all(is_number(weight) and plain(weight) > 0 for weight in weights)


is_boolean = instance(bool)
integers = (torch.int64, torch.uint64, torch.uint8)
labels = tensor(4, dtypes=integers)
of_some_channels, of_each_channel = constant(anything), constant(anything, count=(1, CHANNELS))
some_std, each_std = constant(positive), constant(positive, count=(1, CHANNELS))


@dataclass(frozen=True)
class Callee:
    """A public function or constructor, and what is valid for each of its arguments.

    Attributes:
        call: Takes any argument by keyword, and has good values for the others.
        rules: By argument.
        use: What is done with the result of a constructor.
        errors: How it refuses.
    """

    call: Callable[..., Any]
    rules: dict[str, Rule]
    use: Callable[[Any], object] = function
    errors: tuple[type[Exception], ...] = (ValueError, TypeError)


def measure(metric: Any) -> None:
    metric.update(PROBE)
    assert metric.compute()


def use_probe(probe: Any) -> None:
    for constant in (probe.input_std, probe.input_mean):
        if not optional(constant_of_three)(constant):
            return
    for metric in (FisherSpectralNorm(), LinearizedAccuracy(), AdversarialAccuracy(steps=1), HessianTrace()):
        metric.update(probe)
        assert metric.compute()


constant_of_three = constant(anything, count=(1, CHANNELS))
CURVATURE: dict[str, Rule] = {
    "estimator": one_of("auto", "gauss_newton", "hutchinson"),
    "num_probes": integer(1),
    "per_layer": is_boolean,
}
PATHS: dict[str, Rule] = {
    "damping": optional(number(positive)),
    "step_length": optional(number(positive)),
    "max_euclidean_step": optional(number(positive)),
    "max_steps": integer(1),
    "solver": one_of("gram", "cg"),
}
UNITS: dict[str, Rule] = {
    "input_std": optional(each_std),
    "input_mean": optional(of_each_channel),
    "valid_range": optional(valid_range),
}
CALLEES: dict[str, Callee] = {
    "RobustnessMonitor": Callee(
        lambda **given: RobustnessMonitor(**({"metrics": ["fisher_spectral_norm"]} | given)),
        {
            "metrics": optional(metrics),
            "every_n_epochs": integer(1),
            "max_samples": integer(1),
            "overhead_budget": optional(number(lambda value: 0 < value <= 1)),
            "log_key_prefix": lambda value: isinstance(value, str) and value != "",
            "input_std": optional(some_std),
            "input_mean": optional(of_some_channels),
            "valid_range": optional(valid_range),
            "probe_fn": optional(is_function),
            "loss_fn": optional(is_function),
            "chunk_size": optional(integer(1)),
            "dataloader_idx": integer(0),
            "prog_bar": is_boolean,
            "on_error": one_of("warn", "raise"),
            "seed": integer(0),
        },
        errors=(MisconfigurationException,),
    ),
    "RobustnessDriftStopping": Callee(
        RobustnessDriftStopping,
        {
            "monitor": keys,
            "mode": optional(one_of("min", "max")),
            "tolerance": number(not_negative),
            "z": number(not_negative),
            "patience": integer(1),
            "warmup": integer(0),
            "reference": optional(number(anything)),
            "combine": one_of("any"),  # with one key
            "action": one_of("stop", "warn"),
            "restore_best_weights": is_boolean,
            "strict": is_boolean,
        },
        errors=(MisconfigurationException,),
    ),
    "LinearizedAccuracy": Callee(
        LinearizedAccuracy,
        {"epsilons": epsilons, "norm": one_of("linf", "l2"), "order": number(lambda value: value in (1, 2))},
        measure,
    ),
    "AdversarialAccuracy": Callee(
        AdversarialAccuracy,
        {"epsilons": epsilons, "norm": one_of("linf", "l2"), "steps": integer(1)},
        measure,
    ),
    "FisherRaoMargin": Callee(
        lambda **given: FisherRaoMargin(**({"max_steps": 2} | given)),
        {"num_targets": optional(integer(1)), **PATHS, "per_class": is_boolean},
        measure,
    ),
    "HessianTrace": Callee(HessianTrace, CURVATURE, measure),
    "WeightCurvatureIndex": Callee(
        WeightCurvatureIndex,
        {
            **CURVATURE,
            "attack": optional(one_of("pgd", "fgsm")),
            "epsilon": number(not_negative),
            "norm": one_of("linf", "l2"),
            "steps": integer(1),
        },
        measure,
    ),
    "WeightCurvatureIndex under attack": Callee(
        functools.partial(WeightCurvatureIndex, attack="pgd"),
        {"epsilon": number(not_negative), "norm": one_of("linf", "l2"), "steps": integer(1)},
        measure,
    ),
    "Probe": Callee(
        lambda **given: Probe(**({"model": MODEL, "inputs": INPUTS, "targets": TARGETS} | given)),
        {
            "model": is_function,
            "targets": labels,
            "input_std": optional(some_std),
            "input_mean": optional(of_some_channels),
            "valid_range": optional(valid_range),
            "chunk_size": optional(integer(1)),
            "loss_fn": optional(is_function),
            "module": optional(instance(nn.Module)),
        },
        use_probe,
    ),
    "linearize": Callee(
        lambda **given: functional.linearize(**({"model": sums, "inputs": INPUTS} | given)),
        {"model": is_function, "inputs": samples, **UNITS, "chunk_size": optional(integer(1))},
    ),
    "relinearize": Callee(
        lambda **given: functional.relinearize(
            **({"model": sums, "inputs": INPUTS, "linearization": functional.linearize(sums, INPUTS)} | given)
        ),
        {
            "model": is_function,
            "linearization": instance(functional.Linearization),
            "norm": one_of("linf", "l2"),
            "fraction": number(lambda value: 0 <= value <= 1),
            **UNITS,
            "chunk_size": optional(integer(1)),
        },
    ),
    "drift": Callee(
        lambda **given: functional.drift(**({"values": [1.0, 2.0], "higher_is_better": True} | given)),
        {
            "values": vector(anything),
            "stderrs": optional(vector(not_negative, count=2)),
            "higher_is_better": is_boolean,
            "patience": integer(1),
            "warmup": integer(0),
            "reference": optional(number(anything)),
            "tolerance": number(not_negative),
            "z": number(not_negative),
        },
    ),
    "pgd": Callee(
        lambda **given: functional.pgd(
            **({"model": MODEL, "inputs": INPUTS, "targets": TARGETS, "epsilon": 0.1, "steps": 2} | given)
        ),
        {
            "model": is_function,
            "targets": labels,
            "epsilon": number(not_negative),
            "steps": integer(1),
            "norm": one_of("linf", "l2"),
            "loss": one_of("cross_entropy", "dlr"),
            "step_size": optional(number(positive)),
            "schedule": one_of("constant", "cosine"),
            **UNITS,
            "generator": optional(instance(torch.Generator)),
        },
    ),
    "trace_fisher_rao_paths": Callee(
        lambda **given: functional.trace_fisher_rao_paths(
            **({"model": MODEL, "inputs": INPUTS, "max_steps": 2} | given)
        ),
        {
            "model": is_function,
            "targets": optional(aims),
            "labels": optional(labels),
            **PATHS,
            "mode": one_of("path", "unit_steps"),
            **UNITS,
            "chunk_size": optional(integer(1)),
        },
    ),
    "fisher_rao_distance": Callee(
        lambda **given: functional.fisher_rao_distance(**({"p": PROBS, "q": PROBS} | given)),
        {name: lambda value: is_prediction(value) and value.ndim < 3 for name in ("p", "q")},
    ),
    "fisher_rao_margin_bound": Callee(
        lambda **given: functional.fisher_rao_margin_bound(
            **({"probs": PROBS, "source": TARGETS, "target": TARGETS} | given)
        ),
        {
            "probs": lambda value: is_prediction(value) and value.shape == PROBS.shape,
            "source": labels,
            "target": labels,
        },
    ),
    "class_shielding": Callee(
        lambda **given: functional.class_shielding(**({"paths": TRACED, "num_classes": CHANNELS} | given)),
        {"paths": instance(functional.FisherRaoPaths), "num_classes": lambda value: type(value) is int and value == 3},
    ),
    "hessian_trace": Callee(
        lambda **given: functional.hessian_trace(
            **({"model": MODEL, "inputs": INPUTS, "targets": TARGETS, "max_probes": 2} | given)
        ),
        {
            "model": is_function,
            "estimator": CURVATURE["estimator"],
            "num_probes": optional(integer(1)),
            "rtol": optional(number(positive)),
            "max_probes": integer(1),
            "loss_fn": optional(is_function),
            "module": optional(instance(nn.Module)),
            "chunk_size": optional(integer(1)),
            "generator": optional(instance(torch.Generator)),
        },
    ),
    **{
        name: Callee(
            lambda quantity=quantity, **given: quantity(**({"logits": LOGITS, "gram": GRAM} | given)),
            {
                "logits": tensor(4, 3),
                "gram": tensor(4, 3, 3),
                "temperature": lambda value: (
                    constant(positive, count=(1,))(value) and not isinstance(value, list | tuple)
                ),
            },
        )
        for name, quantity in {
            "fim_spectral_norm": functional.fim_spectral_norm,
            "fim_trace": functional.fim_trace,
        }.items()
    },
    **{
        name: Callee(
            lambda quantity=quantity, **given: quantity(
                **({"logits": LOGITS, "gram": GRAM, "targets": TARGETS} | given)
            ),
            {"logits": tensor(4, 3), "gram": tensor(4, 3, 3), "targets": labels},
        )
        for name, quantity in {
            "calibrated_fim_spectral_norm": functional.calibrated_fim_spectral_norm,
            "linearized_margin": functional.linearized_margin,
        }.items()
    },
    "linearized_margin_linf": Callee(
        lambda **given: functional.linearized_margin_linf(
            **({"logits": LOGITS, "gap_l1": LOGITS.abs(), "targets": TARGETS} | given)
        ),
        {"logits": tensor(4, 3), "gap_l1": tensor(4, 3), "targets": labels},
    ),
    "fit_temperature": Callee(
        lambda **given: functional.fit_temperature(**({"logits": LOGITS, "targets": TARGETS} | given)),
        {"logits": tensor(4, 3), "targets": labels},
    ),
    "saturated": Callee(functional.saturated, {"logits": lambda value: any(tensor(n, 3)(value) for n in (1, 4))}),
    "linearized_accuracy": Callee(
        lambda **given: functional.linearized_accuracy(**({"margins": torch.ones(2), "epsilons": [0.5]} | given)),
        {
            "margins": lambda value: tensor(None)(value) and len(value) > 0,
            "epsilons": non_negative_vector,
        },
    ),
    "weight_curvature_index": Callee(
        lambda **given: functional.weight_curvature_index(
            **({"weight_norms": [1.0, 2.0, 3.0], "traces": [0.5, -0.5, 1.0]} | given)
        ),
        {"weight_norms": vector(not_negative, count=3), "traces": vector(anything, count=3)},
    ),
}
# Counts of passes: whether there is time for so many is no question of arguments.
COUNTS = ("steps", "max_steps", "num_probes", "max_probes")
# Where a tensor, function or module is needed, the type of what came says enough.
OBJECTS = (
    "model",
    "module",
    "generator",
    "loss_fn",
    "probe_fn",
    "inputs",
    "targets",
    "logits",
    "gram",
    "gap_l1",
    "margins",
    "linearization",
    "labels",
    "paths",
    "p",
    "q",
    "probs",
    "source",
    "target",
)

every_argument = pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, callee in CALLEES.items() for argument in callee.rules]
)


def check(name: str, argument: str, value: Any) -> None:
    callee = CALLEES[name]
    try:
        valid = callee.rules[argument](value)
    except TypeError:
        valid = False
    constructor = callee.use is not function or name == "RobustnessMonitor"
    if argument == "logits" and tensor(None, None)(value) and value.numel() and value.shape != LOGITS.shape:
        return  # the other arguments do not fit them
    affordable = argument not in COUNTS or value is None or not valid or value < 10
    if valid and not constructor and (callable(value) or not affordable):
        return  # what a function returns is checked where it is called
    if valid:
        result = callee.call(**{argument: value})
        if affordable and not (callable(value) or isinstance(value, nn.Module)):
            callee.use(result)
        return
    with pytest.raises(callee.errors) as raised:
        callee.call(**{argument: value})
    message = str(raised.value)
    assert type(raised.value) in callee.errors
    assert f"`{argument}`" in message
    came = message.rpartition("but got")[2]
    assert any(text in came for text in descriptions(argument, value)), message


def descriptions(argument: str, value: Any) -> list[str]:
    """How a value may be shown: one of these stands in the message."""
    text = repr(value)
    ways = [text] if len(text) <= 200 else [f" {type(value).__name__} too long to show", text]
    if argument in OBJECTS:
        ways.append(f" the class {value.__name__}." if isinstance(value, type) else f" {type(value).__name__}.")
    if isinstance(value, Tensor):
        ways += [str(tuple(value.shape)), str(value.dtype)]
    if isinstance(value, list | tuple):
        ways += [str((len(value),))]
    if hasattr(value, "__array__") and not isinstance(value, type):
        ways += [str(tuple(value.shape))]
    if isinstance(value, list | tuple | range) and argument == "metrics":
        ways += [way for entry in value if not metrics([entry]) for way in descriptions(argument, entry)]
    return ways


# --- properties -----------------------------------------------------------------------------------------------------


@every_argument
def test_odd_values_are_taken_and_measured_with_or_refused_by_name(name: str, argument: str) -> None:
    for value in (*NUMBERS, *TENSORS, *OTHERS):
        check(name, argument, value)


@every_argument
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(value=arbitrary)
def test_arbitrary_values_are_taken_and_measured_with_or_refused_by_name(name: str, argument: str, value: Any) -> None:
    check(name, argument, value)


@pytest.mark.parametrize(
    "options",
    [
        {"metrics": ("fisher_spectral_norm", LinearizedAccuracy(torch.linspace(0, 0.5, 3)))},
        {"metrics": [LinearizedAccuracy([0, 1, Fraction(1, 3)], norm="l2"), AdversarialAccuracy((-0.0,), steps=1)]},
        {"metrics": [AdversarialAccuracy([1], steps=1)], "input_std": [1], "input_mean": (0,), "valid_range": [0, 1]},
        {"metrics": ["linearized_accuracy"], "input_std": torch.tensor(0.5), "input_mean": torch.tensor([1])},
        {
            "metrics": ["linearized_accuracy"],
            "input_std": Fraction(1, 3),
            "input_mean": Fraction(1, 2),
            "valid_range": (-math.inf, math.inf),
        },
        {"max_samples": 2**63 - 1, "seed": 2**63 - 1, "every_n_epochs": 2**63 - 1, "chunk_size": 2**63 - 1},
        {"log_key_prefix": " ", "chunk_size": 1, "max_samples": 1},
    ],
    ids=["tuple", "integers", "lists", "tensors", "fraction", "huge", "tiny"],
)
def test_the_monitor_measures_with_unusual_values_that_it_takes(options: dict[str, Any], tmp_path: Path) -> None:
    monitor = RobustnessMonitor(**options, on_error="raise")
    run = trainer(monitor, root=tmp_path)
    run.validate(classifier(), loader(), verbose=False)
    assert f"{monitor.log_key_prefix}seconds" in run.callback_metrics


def test_zero_has_one_name() -> None:
    metric = LinearizedAccuracy([-0.0])
    measure(metric)
    assert "linearized_accuracy_linf_0" in metric.compute()
    assert not any("-" in key for key in metric.compute())


def test_a_metric_cannot_be_measured_twice_at_once() -> None:
    metric = FisherSpectralNorm()
    with pytest.raises(MisconfigurationException, match="`metrics` to be a list that holds each metric once"):
        RobustnessMonitor([metric, metric])


@pytest.mark.parametrize("quantity", [functional.fim_spectral_norm, functional.fim_trace])
@pytest.mark.parametrize("temperature", [1e-200, 1e200])
def test_temperatures_whose_squares_are_no_numbers_are_refused(quantity: Any, temperature: float) -> None:
    with pytest.raises(ValueError, match="`temperature`"):
        quantity(LOGITS, GRAM, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
@pytest.mark.parametrize("quantity", [functional.fim_spectral_norm, functional.fim_trace])
def test_what_has_no_place_for_fractions_is_refused_instead_of_rounded(quantity: Any, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="`logits` to be floating point"):
        quantity(torch.ones(4, 3, dtype=dtype), GRAM)
