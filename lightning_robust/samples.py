"""Labelled samples and the network that is measured on them: options, their checks, and plain passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal, Self, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.arguments import (
    check_choice,
    check_function,
    check_integer,
    check_kind,
    check_number,
    check_positive_integer,
    optional,
)
from lightning_robust.functional._validation.extras import SampleModel, check_extras
from lightning_robust.functional._validation.independence import check_place, places_known
from lightning_robust.functional._validation.samples import check_samples, completed
from lightning_robust.functional._validation.tensors import check_logits, outputs_of
from lightning_robust.functional.curvature.losses import LossFn, check_loss_fn
from lightning_robust.functional.input_space.likelihoods import (
    Likelihood,
    LikelihoodName,
    column_likelihood_of,
    likelihood_of,
)
from lightning_robust.functional.input_space.query_answers import answering_logits, as_tensor, given_tensors, is_array
from lightning_robust.functional.input_space.reading import Reading
from lightning_robust.functional.input_space.units import Units, check_units, check_valid_range

T = TypeVar("T")
LinearizationName = Literal["exact", "krylov"]
_FORWARD_ELEMENTS = 2**22  # of inputs that pass together without gradients: 16 MiB in float32


@dataclass(frozen=True, eq=False)
class Samples:
    """What a :class:`~lightning_robust.Probe` is given, and what passes without derivatives tell of it."""

    model: Callable[..., Tensor]
    inputs: Tensor
    targets: Tensor
    _: KW_ONLY
    extras: Mapping[str, Tensor] | None = None
    input_std: float | Sequence[float] | Tensor | None = None
    input_mean: float | Sequence[float] | Tensor | None = None
    valid_range: tuple[float, float] | None = None
    chunk_size: int | None = None
    loss_fn: LossFn | None = None
    module: nn.Module | None = None
    likelihood: LikelihoodName = "categorical"
    tolerance: float | None = None
    linearization: LinearizationName | None = None
    temperature: float | None = None
    queries: int | None = None
    _done: dict[object, object] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_function("model", self.model)
        check_loss_fn(self.loss_fn)
        optional(check_kind, "module", self.module, nn.Module)
        if optional(check_integer, "queries", self.queries, at_least=2) is not None:
            self._take_arrays()
        if self.chunk_size is not None:
            check_positive_integer("chunk_size", self.chunk_size)
        names = ("likelihood", "tolerance", "loss_fn", "input_std", "input_mean", "valid_range")
        options = completed({name: getattr(self, name) for name in names})
        kind = likelihood_of(options.pop("likelihood"), options.pop("tolerance"))
        if self.queries is not None and (kind.name != "categorical" or self.linearization == "krylov"):
            what = f"likelihood {kind.name!r}" if kind.name != "categorical" else "linearization 'krylov'"
            self._refuse_queries(what)
        if kind.has_positions and self.linearization == "exact":
            column_likelihood_of(kind.name)  # raises
        any_targets = options.pop("loss_fn") is not None or kind.name != "categorical"
        check_samples(self.inputs, self.targets, any_targets=any_targets)
        check_extras(self.extras, len(self.inputs))
        optional(check_choice, "linearization", self.linearization, get_args(LinearizationName))
        optional(check_number, "temperature", self.temperature, "a positive number or None", above=0)
        check_units(**options)
        object.__setattr__(self, "valid_range", check_valid_range(self.valid_range))  # from a list, tensor or array

    def _take_arrays(self) -> None:
        given = given_tensors(self.model, self.inputs, self.extras)
        for name, value in zip(("model", "inputs", "extras"), given, strict=True):
            object.__setattr__(self, name, value)
        if is_array(self.targets):
            object.__setattr__(self, "targets", as_tensor(self.targets))

    def __len__(self) -> int:
        return len(self.inputs)

    def check_place(self) -> None:
        """Raise a ``ValueError`` if the model is a function that gives a sample other outputs at other places."""
        if "place" not in self._done and self.queries is None:  # queries check it as they are made
            check_place(self.network, self.inputs, module=self.module)
            self._done["place"] = True

    def _refuse_queries(self, what: str) -> None:
        """Raise a ``ValueError`` if the model is only queried; ``what`` needs gradients."""
        if self.queries is not None:
            raise ValueError(
                f"Expected a model with gradients for {what}, but it is only queried (`queries={self.queries}`)."
                ' Of queried classifiers, `FisherSpectralNorm()` and `LinearizedAccuracy(norm="l2")` can be measured;'
                " for anything else give the network itself, without `queries`."
            )

    @property
    def own_outputs(self) -> Tensor:
        """Outputs ``(N, C)`` of these samples, in eval mode and without a graph."""
        return self._once(("outputs",), self._own_outputs)

    def _own_outputs(self) -> Tensor:
        size = self.chunk_size or max(1, _FORWARD_ELEMENTS // max(1, self.inputs[0].numel()))
        with differentiable(self.model, self.module), torch.no_grad():
            return torch.cat([self._outputs_of(rows) for rows in torch.split(torch.arange(len(self)), size)])

    def _outputs_of(self, rows: Tensor) -> Tensor:
        check = likelihood_of(self.likelihood, self.tolerance).check_outputs
        return outputs_of(self.network.on(rows), full_precision(self.inputs[rows]), check=check)

    @property
    def evidence(self) -> Tensor:
        """All that the temperature depends on, ``(N, E)`` (see :meth:`Likelihood.evidence`)."""
        return self._once(("evidence",), self._evidence)

    def _evidence(self) -> Tensor:
        kind = likelihood_of(self.likelihood, self.tolerance)
        if not kind.has_positions:
            return kind.evidence(self.own_outputs, self.reading.beside(self.own_outputs))
        with differentiable(self.model, self.module), torch.no_grad():
            return torch.cat(list(self._evidence_of_parts(kind)))

    def _evidence_of_parts(self, kind: Likelihood) -> Iterator[Tensor]:
        """The same where the outputs of all samples are too many to keep."""
        start, at_once = 0, 1  # until the number of outputs is known
        while start < len(self):
            rows = torch.arange(start, min(start + at_once, len(self)))
            outputs = self._outputs_of(rows)
            yield kind.evidence(outputs, self.reading._replace(targets=self.targets[rows]).beside(outputs))
            start += len(rows)
            at_once = self.chunk_size or max(1, _FORWARD_ELEMENTS // max(outputs[0].numel(), self.inputs[0].numel()))

    @property
    def network_extras(self) -> dict[str, Tensor]:
        """The extras of :attr:`classifier`: those of the samples, and what it needs to know of their targets."""
        return {**(self.extras or {}), **self.reading.own_extras}

    @property
    def _options(self) -> dict[str, Any]:
        """The options that all estimators on the inputs take."""
        options = {name: getattr(self, name) for name in ("input_std", "input_mean", "valid_range")}
        return {"extras": self.network_extras, **options}

    @property
    def _meaning(self) -> dict[str, Any]:
        return {"likelihood": self.likelihood, "tolerance": self.tolerance}

    @property
    def reading(self) -> Reading:
        """How outputs and targets are read together."""
        model = self.model if self.queries is None else answering_logits(self.model)
        return Reading(model, self.targets, likelihood_of(self.likelihood, self.tolerance), self.loss_fn)

    @property
    def is_binary(self) -> bool:
        """Whether this is a binary classifier with one logit: its loss is BCE with logits, with one target each."""
        return self.reading.is_binary

    @property
    def classifier(self) -> Callable[..., Tensor]:
        """The model, with one logit per class, or with outputs ``(N, C)`` that have a target each."""
        return self.reading.network

    @property
    def labels(self) -> Tensor:
        """Class indices ``(N,)``; raises a ``ValueError`` if the targets are no classes."""
        return self.reading.labels

    @property
    def network(self) -> SampleModel:
        """The classifier, with the extras of these samples."""
        return SampleModel(self.classifier, self.network_extras, num_samples=len(self))

    @property
    def unnormalised_inputs(self) -> Tensor:
        """``inputs · input_std + input_mean``."""
        x = full_precision(self.inputs)
        return Units.of(x, std=self.input_std, mean=self.input_mean).raw(x)

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits ``(N, C)`` of these samples at other inputs, in eval mode and without a graph."""
        logits = self.outputs(inputs)
        check_logits(logits, num_samples=len(inputs))
        return logits

    def outputs(self, inputs: Tensor) -> Tensor:
        """Outputs ``(N, ...)`` of these samples at other inputs, in eval mode and without a graph."""
        with differentiable(self.model, self.module), torch.no_grad():
            return outputs_of(self.network.on_all(), full_precision(inputs))

    def _once(self, key: tuple[object, ...], compute: Callable[[], T]) -> T:
        """Compute a result on first use, and keep it under a key."""
        if key not in self._done:
            self.check_place()
            with places_known(), nullcontext() if self.module is None else differentiable(self.module):
                self._done[key] = compute()
        return cast(T, self._done[key])

    def rows(self, rows: slice | Tensor) -> Self:
        """Return a probe of some of the samples, without copying them."""
        extras = None if self.extras is None else {name: extra[rows] for name, extra in self.extras.items()}
        return replace(self, inputs=self.inputs[rows], targets=self.targets[rows], extras=extras)
