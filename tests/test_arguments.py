"""Every argument of every public function and constructor refuses bad values by name and takes unusual good ones.

A refusal is a ``ValueError`` or ``TypeError``, in callbacks a ``MisconfigurationException``. It names the argument in
backticks, says what was expected and, after "but got", what was given: its ``repr``, or the type if that is too long;
the type where a tensor, function or object is needed; of tensors, and of lists of a wrong length, the shape.
"""

import inspect
import math
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_robust
from lightning_robust import (
    AdversarialAccuracy,
    FisherSpectralNorm,
    HessianTrace,
    LinearizedAccuracy,
    Probe,
    RobustnessDriftStopping,
    RobustnessMonitor,
    functional,
)
from lightning_robust.metrics import METRICS
from tests.helpers.networks import random, random_linear
from tests.helpers.training import classifier, loader, trainer

MODEL = random_linear(0, num_classes=3, num_features=3)
INPUTS, LOGITS = random(1, 4, 3), random(2, 4, 3)
TARGETS = torch.tensor([0, 1, 2, 0])
OWN = MODEL(INPUTS).argmax(dim=1)
GRAM = torch.eye(3, dtype=torch.float64).expand(4, 3, 3)
SINGLE = torch.ones(())
PROBS = LOGITS.softmax(dim=1)
NAN, INF = math.nan, math.inf
CALLBACKS = [RobustnessMonitor, RobustnessDriftStopping]
FUNCTIONS = [getattr(functional, name) for name in functional.__all__ if inspect.isfunction(getattr(functional, name))]
CALLEES: dict[str, Callable[..., Any]] = {
    callee.__name__: callee for callee in [*CALLBACKS, *METRICS.values(), Probe, *FUNCTIONS]
}
GOOD: list[tuple[str, Any]] = [  # for arguments without a default
    ("model predict", MODEL),
    ("predict_labels", lambda x: MODEL(x).argmax(dim=1)),
    ("num_directions", 2),
    ("inputs", INPUTS),
    ("targets source target", TARGETS),
    ("logits gap_l1", LOGITS),
    ("gram", GRAM),
    ("p q probs", PROBS),
    ("linearization", functional.linearize(MODEL, INPUTS)),
    ("paths", functional.trace_fisher_rao_paths(MODEL, INPUTS)),
    ("num_classes", 3),
    ("epsilon", 0.1),
    ("steps", 1),
    ("margins", torch.ones(2)),
    ("epsilons values weight_norms traces", [1.0, 2.0]),
    ("higher_is_better", True),
    ("drifts names", ()),
]
UNCHECKED = {("drifted_together", "drifts"), ("drifted_together", "names")}
ARGUMENTS = [
    (name, argument)
    for name, callee in CALLEES.items()
    for argument in inspect.signature(callee).parameters
    if (name, argument) not in UNCHECKED
]

LARGEST = 2**63 - 1
OF_OUTPUTS = "RobustnessMonitor Probe linearize relinearize linearized_margin linearized_margin_linf"
COUNTS = "max_products chunk_size max_probes max_steps num_probes num_targets patience steps"
NO_NUMBER = (True, "0.5", b"1", NAN, 1j, 10**400, {}, float, torch.tensor(True))
NO_SINGLE = (*NO_NUMBER, [], (0.5,), torch.ones(2), INPUTS)
NO_INTEGER = (True, 1.0, "1", NAN, [1], Fraction(1), int, torch.tensor(1), INPUTS)
NO_NUMBERS = (1.0, "1", {}, [NAN], [True], ["1"], [[1.0]], INPUTS)
NO_CONSTANT = (*NO_NUMBER, INF, [NAN], [INF], ["1"], [True])
NO_TENSOR = (1.0, "1", [[0.5, 0.5]], {}, Tensor, INPUTS.numpy())
NO_TENSOR_OR_ARRAY = NO_TENSOR[:-1]
NO_FLOATS = tuple(torch.ones(4, 3, dtype=dtype) for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64))
NO_INDICES = (TARGETS.double(), TARGETS > 0, TARGETS * 1j, TARGETS[:3], TARGETS[:, None], torch.eye(4).long())
NO_BOOLEAN = (0, 1, 1.0, "", "True", [], bool, torch.tensor(True))
NO_CHOICE = ("", "LINF", "Auto", b"l2", ["any"], 0, True, str)
NO_KEYS = ("", b"k", 1, [], {}, [""], [1], ["k", "k"], {"k": 0}, {"k": -1}, {"k": NAN}, {"k": "1"}, {"k"})
NO_RANGE = (*NO_NUMBER, [], [0], [0, 1, 2], (1, 0), (0, 0), (NAN, 1), (0, "1"), (False, 1), {0, 1}, torch.ones(2))
NO_VALUES = (1.0, "12", [None], [None, 1.0], [torch.ones(0)] * 2, [torch.ones(1, 1)] * 2, [torch.tensor([NAN])] * 2)

# Arguments, what is expected of them, and bad values. None is bad, too, unless it is the default. Rows for one callee
# (with a dot) replace those for the argument in general.
BAD: list[tuple[str, str, tuple[Any, ...]]] = [
    (
        "model predict predict_labels loss_fn probe_fn",
        "a function or a module",
        (1, "f", [], {}, nn.Linear, object(), torch.ones(2)),
    ),
    ("generator", "a Generator", (0, "0", torch.Generator, object())),
    ("num_directions queries", "an integer of at least 2", (*NO_INTEGER, 0, 1, -1)),
    ("num_directions", "at most 3, the number of input features", (4, 2**62)),
    ("decision_margin.num_directions", "a positive integer", (*NO_INTEGER, 0, -1)),
    ("directions", "of shape (N, K, ...) for inputs (4, 3)", (INPUTS, INPUTS[:2, None], torch.ones(4, 2, 2), SINGLE)),
    ("max_distance step", "a positive number", (*NO_SINGLE, 0, -1, INF)),
    ("gram_variance", "a number ≥ 0", (*NO_SINGLE, -0.1, INF)),
    ("Probe.linearization RobustnessMonitor.linearization", "one of ('exact', 'krylov')", NO_CHOICE),
    ("method", "one of ('krylov', 'power')", NO_CHOICE),
    ("Probe.temperature", "a positive number or None", (*NO_SINGLE, 0, -1, INF)),
    (
        "fim_spectral_norm_matrix_free.temperature",
        "positive and finite, as its square must be, or a list of such numbers",
        (*NO_SINGLE[:1], "1", 0, -1, INF, NAN, [], [0.0], [1.0, -1.0], [1.0, INF]),
    ),
    ("fim_spectral_norm_matrix_free.tolerance", "a positive number", (*NO_SINGLE, 0, -1, INF)),
    ("linearization", "a Linearization", (1, LOGITS, functional.Linearization)),
    ("module", "a Module", (1, "m", nn.Linear, object(), torch.ones(2), len)),
    ("paths", "FisherRaoPaths", (1, LOGITS, functional.FisherRaoPaths)),
    ("higher_is_better per_class per_layer prog_bar", "True or False", NO_BOOLEAN),
    ("restore_best_weights strict", "True or False", NO_BOOLEAN),
    (COUNTS, "a positive integer", (*NO_INTEGER, 0, -1)),
    (COUNTS, f"a positive integer and at most {LARGEST}", (2**63,)),
    ("every_n_epochs max_samples RobustnessMonitor.chunk_size", "an integer of at least 1", (*NO_INTEGER, 0, -(2**70))),
    ("dataloader_idx seed warmup", "an integer of at least 0", (*NO_INTEGER, -1)),
    ("every_n_epochs max_samples", f"an integer of at least 1 and at most {LARGEST}", (2**63,)),
    ("dataloader_idx seed warmup", f"an integer of at least 0 and at most {LARGEST}", (2**63,)),
    ("num_classes", "an integer of at least 2", (*NO_INTEGER, 1, -1)),
    ("num_classes", "3, like the paths", (2, 4, 2**62)),
    ("damping max_euclidean_step rtol step_length step_size", "a positive number or None", (*NO_SINGLE, 0, -1, INF)),
    ("epsilon tolerance z", "a finite number ≥ 0", (*NO_SINGLE, -0.1, INF)),
    (
        " ".join(f"{name}.tolerance" for name in OF_OUTPUTS.split()),
        "None with likelihood 'categorical', because only 'gaussian' has one",
        (0.5, 1, 0, "1"),
    ),
    ("fraction", "a number between 0 and 1", (*NO_SINGLE, -0.1, 1.1, INF)),
    ("order", "1 or 2", (*NO_SINGLE, 0, 3, 1.5)),
    ("overhead_budget", "a share of the wall time above 0 and at most 1, or None", (*NO_SINGLE, 0, -1, 1.1)),
    ("reference", "a finite number or None", (*NO_SINGLE, INF, -INF)),
    ("temperature", "positive and finite, as its square must be", (*NO_SINGLE, 0, -1, INF, 1e-200, 1e200)),
    ("action", "one of ('stop', 'warn')", NO_CHOICE),
    ("attack", "'pgd', 'fgsm' or None", NO_CHOICE),
    ("combine RobustnessDriftStopping.combine", "one of ('any', 'all')", NO_CHOICE),
    ("RobustnessDriftStopping.combine", "'any', since `monitor` is one key", ("all",)),
    ("estimator", "one of ('auto', 'hutchinson', 'gauss_newton')", NO_CHOICE),
    ("likelihood", "one of ('categorical', 'bernoulli', 'gaussian', 'token')", NO_CHOICE),
    ("loss", "one of ('cross_entropy', 'dlr')", NO_CHOICE),
    ("mode", "one of ('path', 'unit_steps')", NO_CHOICE),
    ("RobustnessDriftStopping.mode", "one of ('min', 'max')", NO_CHOICE),
    ("norm", "one of ('linf', 'l2')", NO_CHOICE),
    ("on_error", "one of ('warn', 'raise')", NO_CHOICE),
    ("schedule", "one of ('constant', 'cosine')", NO_CHOICE),
    ("solver", "one of ('gram', 'cg')", NO_CHOICE),
    ("log_key_prefix", "a non-empty string", ("", b"r/", 1, ["r/"], str)),
    ("metrics", "a non-empty list of metrics or their names", (1, b"h", [], {}, {"hessian_trace"})),
    (
        "metrics",
        "names among ['adversarial_accuracy'",
        ("", "nan", ["nan"], [None], [FisherSpectralNorm], [["hessian_trace"]]),
    ),
    ("monitor", "a key, a list of different keys, or a mapping of keys to positive numbers", NO_KEYS),
    ("valid_range", "(low, high) with low < high", NO_RANGE),
    ("epsilons", "a list of at least one finite number ≥ 0", (*NO_NUMBERS, [], (), [-0.1], [INF])),
    ("epsilons", "differ in their first four digits", ([0.1, 0.1], [0.0, -0.0], [1.00001, 1])),
    ("linearized_accuracy.epsilons", "a vector of numbers ≥ 0", (*NO_NUMBERS, [-0.1])),
    ("values", "a list of finite numbers", (*NO_NUMBERS, [INF])),
    ("stderrs", "a list of 2 finite numbers ≥ 0", (*NO_NUMBERS, [], [1.0], [1.0, -1.0], [1.0, NAN], [1.0, INF])),
    ("per_sample", "a list of 2 tensors (N,) of finite numbers, or None", NO_VALUES),
    ("traces", "one finite number per layer", (*NO_NUMBERS, [INF, 1.0])),
    ("weight_norms", "one finite number ≥ 0 per layer", (*NO_NUMBERS, [INF, 1.0], [-0.1, 1.0])),
    ("input_mean RobustnessMonitor.input_mean Probe.input_mean", "a finite number, or a list of one per", NO_CONSTANT),
    ("input_std RobustnessMonitor.input_std Probe.input_std", "a finite number, or a list of one per", NO_CONSTANT),
    ("input_std RobustnessMonitor.input_std Probe.input_std", "a positive number, or a list", (0, -1, [0.0], [-1.0])),
    ("input_mean input_std", "one per channel, 3 for inputs of shape (4, 3)", ([], [1.0, 1.0], torch.ones(1, 3))),
    ("inputs Probe.inputs", "a tensor (N, ...)", NO_TENSOR),
    ("linearize_by_queries.inputs decision_margin.inputs", "a tensor (N, ...)", NO_TENSOR_OR_ARRAY),
    ("linearize_by_queries.inputs decision_margin.inputs", "floating point", NO_FLOATS),
    ("inputs", "floating point", NO_FLOATS),
    ("Probe.inputs", "floating point or integer", NO_FLOATS[-1:]),
    ("inputs", "at least one sample", (SINGLE, torch.ones(0, 3), torch.ones(2, 0, 3))),
    ("Probe.inputs", "a tensor (N, ...)", (SINGLE,)),
    ("logits gap_l1", "a tensor (N, C)", NO_TENSOR),
    ("gram", "a tensor (N, C, C)", NO_TENSOR),
    ("margins", "a tensor (N,)", NO_TENSOR),
    ("p q probs", "a tensor (..., C)", NO_TENSOR),
    ("logits gap_l1 gram margins p q probs", "floating point", NO_FLOATS),
    ("logits", "(N, C) with at least one sample and C ≥ 2 classes", (LOGITS[0], LOGITS[:0], LOGITS[:, :1], GRAM)),
    ("gram", "of shape (4, 3, 3) beside logits (4, 3)", (GRAM[0], GRAM[:3], GRAM[:, :2])),
    ("gap_l1", "of shape (4, 3), like the logits", (LOGITS[:3], LOGITS[:, :2], GRAM)),
    ("margins", "a non-empty vector without NaN", (SINGLE, LOGITS[0, :0], torch.tensor([NAN]))),
    ("p q probs", "of shape (..., C) with C ≥ 2 classes", (SINGLE, torch.ones(3, 1), torch.ones(0, 3))),
    ("p q probs", "probabilities, not negative and with sum 1", (LOGITS, PROBS * 1.01, torch.tensor([1.5, -0.5]))),
    ("probs", "of shape (N, C)", (PROBS[0], PROBS[None])),
    ("labels source target targets Probe.targets", "a tensor (N,)", NO_TENSOR),
    ("labels source target targets Probe.targets", "one class index per sample, an integer tensor", NO_INDICES),
    ("labels source target targets", "lie between 0 and 2", (TARGETS + 1, TARGETS - 1)),
    ("decision_margin.targets", "a tensor (N,)", NO_TENSOR_OR_ARRAY),
    ("decision_margin.targets", "one class index per sample, an integer tensor", NO_INDICES),
    ("trace_fisher_rao_paths.targets", "a tensor (N, K) or (K,)", NO_TENSOR),
    (
        "trace_fisher_rao_paths.targets",
        "K ≥ 1 classes, of shape (4, K)",
        (SINGLE, TARGETS[:0], TARGETS[:3, None], GRAM),
    ),
    ("trace_fisher_rao_paths.targets", "class index per sample, an integer tensor", (torch.ones(4), torch.ones(2) > 0)),
    ("trace_fisher_rao_paths.targets", "other classes than the one to leave", (OWN[:, None], OWN[:1])),
    ("extras", "a mapping from names of arguments of the model to tensors (N, ...)", (1, "m", [INPUTS], INPUTS, dict)),
    ("hessian_trace.targets", "a Tensor", NO_TENSOR),
    ("hessian_trace.targets", "one target per sample", (SINGLE, TARGETS[:3])),
]


def find(rows: Sequence[tuple[Any, ...]], name: str) -> list[tuple[Any, ...]]:
    """What rows say about one of the names in their first column."""
    return [rest for names, *rest in rows if name in names.split()]


def shown(value: Any, *, by_type: bool) -> list[str]:
    """How an error may show what was given."""
    if by_type and isinstance(value, type):
        return [f"the class {value.__name__}."]
    if by_type:
        return [f"{type(value).__name__}.", *([str(value.dtype)] if isinstance(value, Tensor) else [])]
    text = f"{value!r}."
    ways = [text if len(text) <= 201 else f"{type(value).__name__} too long to show."]
    if isinstance(value, list | tuple):
        ways += [f"shape ({len(value)},)."]
    if isinstance(value, Tensor):
        ways += [f"{tuple(value.shape)}", *(["a single number."] if value.ndim == 0 else [])]
        ways += [f"values from {value.min()} to {value.max()}."] if value.numel() and not value.is_complex() else []
    return ways


def call(callee: Callable[..., Any], arguments: dict[str, Any]) -> None:
    result = callee(**arguments)
    if isinstance(result, AbstractContextManager):
        result.__enter__()


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_bad_values_are_refused_by_name(name: str, argument: str) -> None:
    callee = CALLEES[name]
    parameters = inspect.signature(callee).parameters
    required = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    good = {key: find(GOOD, key)[0][0] for key in required if key != argument}
    errors = (MisconfigurationException,) if callee in CALLBACKS else (ValueError, TypeError)
    rows = find(BAD, f"{name}.{argument}") or find(BAD, argument)
    none_is_bad = parameters[argument].default is not None and (name, argument) != ("hessian_trace", "rtol")
    assert rows
    for k, (expected, values) in enumerate(rows):
        for value in (*values, None) if none_is_bad and k == 0 else values:
            with pytest.raises(errors) as raised:
                call(callee, good | {argument: value})
            assert type(raised.value) in errors
            before, _, given = str(raised.value).rpartition("but got ")
            assert f"`{argument}`" in before
            assert expected in before
            by_type = isinstance(raised.value.__cause__ or raised.value, TypeError)
            wrong = value[0] if "names among" in expected and isinstance(value, list) else value  # an entry of it
            assert any(way in given for way in shown(wrong, by_type=by_type)), str(raised.value)


def test_everything_public_is_called_and_every_row_is_used() -> None:
    classes = {name for name in lightning_robust.__all__ if inspect.isclass(getattr(lightning_robust, name))}
    assert classes - {"ProbeMetric", "RobustnessWarning"} <= CALLEES.keys()
    known = {argument for _, argument in ARGUMENTS} | {f"{name}.{argument}" for name, argument in ARGUMENTS}
    assert {name for names, *_ in BAD for name in names.split()} <= known


def test_a_metric_cannot_be_measured_twice_at_once() -> None:
    metric = FisherSpectralNorm()
    with pytest.raises(MisconfigurationException, match="`metrics` to be a list that holds each metric once"):
        RobustnessMonitor([metric, metric])


# --- unusual values that are taken ------------------------------------------------------------------------------------


class Entries(Sequence[Any]):
    """A sequence that is neither a list nor a tuple, as configuration files bring them (Hydra's ListConfig)."""

    def __init__(self, *entries: Any) -> None:
        self.entries = entries

    def __getitem__(self, index: Any) -> Any:
        return self.entries[index]

    def __len__(self) -> int:
        return len(self.entries)


class Table(Mapping[str, Any]):
    """A mapping that is no dict (Hydra's DictConfig)."""

    def __init__(self, **entries: Any) -> None:
        self.entries = entries

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


SEQUENCES: list[Callable[..., Any]] = [
    lambda *entries: list(entries),
    lambda *entries: entries,
    Entries,
    lambda *entries: UserList(entries),
    lambda *entries: deque(entries),
    lambda *entries: np.array(entries),
]
every_sequence = pytest.mark.parametrize(
    "sequence", SEQUENCES, ids=["list", "tuple", "own", "UserList", "deque", "array"]
)


@every_sequence
def test_options_may_be_any_sequence(sequence: Callable[..., Any], tmp_path: Path) -> None:
    monitor = RobustnessMonitor(
        sequence("fisher_spectral_norm", LinearizedAccuracy(sequence(0.1, 0.2))),
        input_std=sequence(0.5),
        input_mean=sequence(0.25),
        valid_range=sequence(0, 1),
    )
    assert [type(metric) for metric in monitor.metrics] == [FisherSpectralNorm, LinearizedAccuracy]
    assert (monitor.input_std, monitor.input_mean, monitor.valid_range) == ([0.5], [0.25], (0.0, 1.0))
    assert AdversarialAccuracy(sequence(0.1, 0.2)).epsilons == (0.1, 0.2)
    assert RobustnessDriftStopping(sequence("a", "b"), mode="min").monitor_weights == {"a": 1, "b": 1}
    options = {"input_std": sequence(0.5), "input_mean": sequence(0.25), "valid_range": sequence(0, 1)}
    assert Probe(MODEL, INPUTS, TARGETS, **options).valid_range == (0.0, 1.0)
    found = functional.linearize(MODEL, INPUTS, **options).gap_l1
    assert found.equal(functional.linearize(MODEL, INPUTS, input_std=0.5, input_mean=0.25, valid_range=(0, 1)).gap_l1)
    assert functional.linearized_accuracy(torch.ones(2), sequence(0.5, 2.0)).tolist() == [1.0, 0.0]
    assert functional.drift(sequence(2.0, 1.0), sequence(0.1, 0.1), higher_is_better=True).length >= 0


def test_weights_of_keys_may_be_any_mapping() -> None:
    for mapping in (Table(a=2, b=1), UserDict(a=2, b=1), MappingProxyType({"a": 2, "b": 1})):
        assert RobustnessDriftStopping(mapping, mode="min").monitor_weights == {"a": 2.0, "b": 1.0}


@pytest.mark.parametrize("one", ["hessian_trace", HessianTrace()], ids=["name", "object"])
def test_one_metric_or_name_stands_for_a_list_of_one(one: Any) -> None:
    (metric,) = RobustnessMonitor(one).metrics
    assert isinstance(metric, HessianTrace)


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
    metric.update(Probe(MODEL, INPUTS, TARGETS))
    assert "linearized_accuracy_linf_0" in metric.compute()
    assert not any("-" in key for key in metric.compute())


def test_integers_of_numpy_are_integers() -> None:
    monitor = RobustnessMonitor(every_n_epochs=np.int64(2), max_samples=np.int32(8), chunk_size=np.uint8(4))
    kept = (monitor.every_n_epochs, monitor.max_samples, monitor.chunk_size)
    assert kept == (2, 8, 4)
    assert {type(number) for number in kept} == {int}
    for wrong in (np.float64(2.0), np.bool_(True), True):
        with pytest.raises(MisconfigurationException, match="every_n_epochs"):
            RobustnessMonitor(every_n_epochs=wrong)


@pytest.mark.parametrize("half", [Fraction(1, 2), torch.tensor(0.5), torch.tensor([0.5]).numpy()[0]])
def test_a_number_may_be_of_any_real_type(half: Any) -> None:
    def results(x: Any) -> list[Any]:
        paths = functional.trace_fisher_rao_paths(MODEL, INPUTS, step_length=x, damping=x, max_euclidean_step=x)
        return [
            functional.drift([2.0, 1.0], higher_is_better=True, reference=x, tolerance=x, z=x).limit,
            functional.fim_trace(LOGITS, GRAM, temperature=x).tolist(),
            functional.hessian_trace(MODEL, INPUTS, TARGETS, rtol=x).total.item(),
            functional.linearize(MODEL, INPUTS, input_std=x, input_mean=x, valid_range=(-5, 5 + x)).gap_l1.tolist(),
            functional.pgd(MODEL, INPUTS, TARGETS, epsilon=x, step_size=x, steps=2).tolist(),
            functional.relinearize(MODEL, INPUTS, functional.linearize(MODEL, INPUTS), fraction=x).gap_l1.tolist(),
            paths.margins.tolist(),
        ]

    assert results(half) == results(0.5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.uint64])
def test_class_indices_may_be_integers_of_any_type(dtype: torch.dtype) -> None:
    targets = TARGETS.to(dtype)
    for function in (functional.fit_temperature, lambda z, y: functional.linearized_margin(z, GRAM, y)):
        assert function(LOGITS, targets).equal(function(LOGITS, TARGETS))
    assert functional.trace_fisher_rao_paths(MODEL, INPUTS, labels=targets).source.equal(TARGETS)
