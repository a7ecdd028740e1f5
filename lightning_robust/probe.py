"""The input of all metrics: a network, labelled samples, and expensive results that the metrics share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar, cast, get_args

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
    expected_but_got,
    optional,
)
from lightning_robust.functional._validation.extras import SampleModel, check_extras
from lightning_robust.functional._validation.independence import check_place, places_known
from lightning_robust.functional._validation.outputs import as_restricted
from lightning_robust.functional._validation.samples import check_samples, completed
from lightning_robust.functional._validation.tensors import check_logits, check_targets, outputs_of
from lightning_robust.functional.curvature.losses import LossFn, check_loss_fn
from lightning_robust.functional.curvature.plan import Estimator
from lightning_robust.functional.curvature.problem import CurvatureProblem
from lightning_robust.functional.curvature.signs import ProbeSeeds
from lightning_robust.functional.curvature.sums import CurvatureSums
from lightning_robust.functional.fisher_rao.geometry import other_classes
from lightning_robust.functional.fisher_rao.path_options import PathOptions
from lightning_robust.functional.fisher_rao.paths import FisherRaoPaths, trace_fisher_rao_paths
from lightning_robust.functional.input_space.attacks import Norm, pgd
from lightning_robust.functional.input_space.input_information import InputInformation, input_information
from lightning_robust.functional.input_space.likelihoods import LikelihoodName, likelihood_of
from lightning_robust.functional.input_space.linearization import Linearization, linearize_up_to, relinearize
from lightning_robust.functional.input_space.queries import linearize_by_queries
from lightning_robust.functional.input_space.query_answers import answering_logits, as_tensor, given_tensors, is_array
from lightning_robust.functional.input_space.reading import Reading
from lightning_robust.functional.input_space.units import Units, check_units, check_valid_range

T = TypeVar("T")
LinearizationName = Literal["exact", "krylov"]
_MOST_OUTPUTS = 32  # of which all gradients are taken, unless a probe says otherwise
_NUM_OTHERS = 10  # classes to which boundaries are sought where there are more outputs
_FORWARD_ELEMENTS = 2**22  # of inputs that pass together without gradients: 16 MiB in float32


@dataclass(frozen=True)
class Attack:
    """Projected gradient descent from the sample itself (see :func:`~lightning_robust.functional.pgd`).

    Attributes:
        epsilon: Radius of the ball, in units of the un-normalised input.
        norm: ``"linf"`` or ``"l2"``.
        steps: Number of gradient steps.
    """

    epsilon: float
    norm: Norm
    steps: int


@dataclass(frozen=True, eq=False)
class Probe:
    """A network and the labelled samples on which it is measured.

    Everything expensive is computed on first use and shared by all metrics that read the probe.

    Args:
        model: Maps inputs ``(N, ...)``, and ``extras`` by keyword, to logits ``(N, C)``, sample by sample. They may lie
            in a tuple, dictionary or object where it is evident which they are (``logits``, or the only candidate).
        inputs: ``(N, ...)``, floating point; or integers, such as token ids, of which metrics of the weights alone
            (:class:`~lightning_robust.HessianTrace`) can be measured, as integers have no derivative.
        targets: ``(N,)``, class indices, or what another ``likelihood`` says; with a ``loss_fn``, any targets
            ``(N, ...)`` that it takes. Metrics that need other ones raise an error.
        extras: Further arguments of the model, tensors ``(N, ...)`` whose rows belong to the samples, by name: padding
            masks, categories, lengths. They are passed on by keyword and never perturbed. What a function closes over
            instead stays as it is when samples are selected or pass in parts, and so meets other samples.
        input_std: Standard deviation by which the inputs were divided, one number or one per channel (dimension 1).
            With it every input-space number is in units of the un-normalised input.
        input_mean: Mean that was subtracted from the inputs before the division, one number or one per channel;
            ``valid_range`` needs it.
        valid_range: Smallest and largest value of an un-normalised input, e.g. ``(0, 1)``. Perturbations stay within
            it. L∞ margins and attacks respect it; L2 margins ignore it.
        chunk_size: Largest number of samples that pass through the network together, a bound on memory; see
            :func:`~lightning_robust.functional.linearize`.
        loss_fn: Maps logits and targets to the loss whose curvature is measured; by default that of the likelihood:
            cross-entropy, BCE with logits or MSE. See :func:`~lightning_robust.functional.hessian_trace`. With
            ``nn.BCEWithLogitsLoss()`` and one target per sample, a ``"categorical"`` model is a binary classifier whose
            single output z stands for the logits (0, z).
        module: The network that ``model`` calls, if that is a plain function: it is then measured in eval mode, and
            curvature is about its weights.
        likelihood: What the outputs mean: logits of classes, ``"categorical"``; logits of several labels per sample
            with targets 0 or 1, ``"bernoulli"``; or numbers, ``"gaussian"``. Of the last two, every output ``(N, ...)``
            has a target.
        linearization: ``"exact"`` takes the gradients of all outputs; ``"krylov"`` finds spectral norms in a Krylov
            subspace, and margins among the most probable classes. By default the number of outputs decides: up to 32,
            all gradients are taken.
        temperature: At which ``"krylov"`` measures calibrated values, where it is known already; by default the one
            that fits these samples.
        tolerance: How far a number may move, in its own units, before that counts as a change: for margins with
            ``"gaussian"``.
        queries: Number of random directions along which the model is queried, twice along each (all directions, if the
            inputs have no more features). Then nothing but its predictions is needed, and it may be any function that
            :func:`~lightning_robust.functional.linearize_by_queries` takes, of NumPy arrays if ``inputs`` are an array.
            Metrics that need more than a linearisation in L2 refuse such a probe.

    Raises:
        TypeError: If ``inputs``, ``targets`` or extras are not tensors, the inputs are complex, ``model`` or
            ``loss_fn`` cannot be called, or ``module`` is not a module.
        ValueError: If an option has a wrong value, there is not one class index (one target, with a ``loss_fn``) or
            one row of each of the ``extras`` per input, or a valid range of normalised inputs comes without their mean.
    """

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

    @property
    def linearized(self) -> Linearization:
        """Logits, Gram matrices and L1 gaps of all samples (see :func:`~lightning_robust.functional.linearize`)."""
        found = self._linearized(None)
        assert found is not None
        return found

    @property
    def linearized_if_few(self) -> Linearization | None:
        """The same; None if there are more than 32 outputs, unless :attr:`linearization` says otherwise."""
        if self.linearization == "krylov":
            return None
        return self._linearized(_MOST_OUTPUTS if self.linearization is None else None)

    def takes_krylov(self, num_outputs: int) -> bool:
        """Whether spectral norms of so many outputs are found in Krylov subspaces."""
        return self.linearization == "krylov" or (self.linearization is None and num_outputs > _MOST_OUTPUTS)

    def _linearized(self, most_outputs: int | None) -> Linearization | None:
        if self.queries is not None:
            return self._once(("linearized",), self._linearized_by_queries)
        if most_outputs is not None and ("too many",) in self._done:
            return None
        options = {"chunk_size": self.chunk_size, **self._options, **self._meaning}
        key = ("linearized",)
        found = self._once(key, lambda: linearize_up_to(most_outputs, self.classifier, self.inputs, **options))
        if found is None:
            self._done[("too many",)] = self._done.pop(key)
        return found

    def _linearized_by_queries(self) -> Linearization:
        assert self.queries is not None
        return linearize_by_queries(
            self.model,
            self.inputs,
            num_directions=min(self.queries, self.inputs[0].numel()),
            extras=self.extras,
            input_std=self.input_std,
            chunk_size=self.chunk_size,
        )

    def _refuse_queries(self, what: str) -> None:
        """Raise a ``ValueError`` if the model is only queried; ``what`` needs gradients."""
        if self.queries is not None:
            raise ValueError(
                f"Expected a model with gradients for {what}, but it is only queried (`queries={self.queries}`):"
                ' measure `FisherSpectralNorm()` and `LinearizedAccuracy(norm="l2")`, or give the network itself'
                " without `queries`."
            )

    def relinearized(self, norm: Norm) -> Linearization:
        """Gradients taken near the boundary (see :func:`~lightning_robust.functional.relinearize`)."""
        self._refuse_queries("a second linearisation")
        options = {"norm": norm, "chunk_size": self.chunk_size, **self._options, **self._meaning}
        key = ("relinearized", norm)
        return self._once(key, lambda: relinearize(self.classifier, self.inputs, self.linearized, **options))

    def among_probable_classes(self, num_others: int | None) -> Probe:
        """These samples, for margins: the nearest boundary of a sample leads to a class that is probable already.

        Args:
            num_others: To how many of the most probable other classes of each sample boundaries are sought. None: to
                all, or to 10 where linearising all is not the way to measure.

        Returns:
            A probe of the classifier with only these classes of each sample, and labels among them; this probe itself
            if they are all.
        """
        if not self.reading.has_classes or (num_others is None and self.linearized_if_few is not None):
            return self
        self._refuse_queries("margins of a few classes")
        return self._once(("among", num_others), lambda: self._among_probable_classes(num_others))

    def _among_probable_classes(self, num_others: int | None) -> Probe:
        logits = self.own_outputs
        most = logits.shape[1] - 1
        if num_others is not None and num_others > most:
            expected = f"at most the {most} other classes of the model"
            raise ValueError(expected_but_got("num_targets", expected, num_others))
        classes = logits.topk(1 + min(num_others or _NUM_OTHERS, most), dim=1).indices
        labels = self.reading.beside(logits).to(classes.device)
        places = (classes == labels[:, None]).int().argmax(dim=1)
        among = classes.gather(1, places[:, None])[:, 0] == labels
        extras = {**(self.extras or {}), "classes_of_samples": classes}
        changes: dict[str, Any] = {
            "model": as_restricted(self.classifier),
            "targets": torch.where(among, places, 1),
            "extras": extras,
        }
        probe = replace(self, **changes, loss_fn=None, linearization="exact")
        probe._done["place"] = True
        return probe

    @property
    def information(self) -> InputInformation:
        """Spectral norms at the temperature that is given or fits these samples, and at 1, without all gradients."""
        return self._once(("information",), self._information)

    def _information(self) -> InputInformation:
        kind, outputs = likelihood_of(self.likelihood, self.tolerance), self.own_outputs
        temperature = self.temperature
        if temperature is None:
            temperature = float(kind.fit(outputs, self.reading.beside(outputs)).temperature)
        options: dict[str, Any] = {"extras": self.extras, "input_std": self.input_std, "chunk_size": self.chunk_size}
        return input_information(
            self.classifier, self.inputs, temperatures=[temperature, 1.0], likelihood=kind, **options
        )

    @property
    def own_outputs(self) -> Tensor:
        """Outputs ``(N, C)`` of these samples, in eval mode and without a graph."""
        return self._once(("outputs",), self._own_outputs)

    def _own_outputs(self) -> Tensor:
        kind, x = likelihood_of(self.likelihood, self.tolerance), full_precision(self.inputs)
        size = self.chunk_size or max(1, _FORWARD_ELEMENTS // max(1, x[0].numel()))
        chunks = torch.split(torch.arange(len(x)), size)
        with differentiable(self.model, self.module), torch.no_grad():
            parts = [outputs_of(self.network.on(rows), x[rows], check=kind.check_outputs) for rows in chunks]
        return torch.cat(parts)

    @property
    def _options(self) -> dict[str, Any]:
        """The options that all estimators on the inputs take."""
        return {name: getattr(self, name) for name in ("extras", "input_std", "input_mean", "valid_range")}

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
        return SampleModel(self.classifier, self.extras, num_samples=len(self))

    @property
    def unnormalised_inputs(self) -> Tensor:
        """``inputs · input_std + input_mean``."""
        x = full_precision(self.inputs)
        return Units.of(x, std=self.input_std, mean=self.input_mean).raw(x)

    def attacked(self, attack: Attack) -> Tensor:
        """The inputs under an attack, ``(N, ...)``."""
        self._refuse_queries("attacks")
        options = asdict(attack) | self._options
        return self._once(("attacked", attack), lambda: pgd(self.classifier, self.inputs, self.labels, **options))

    def curvature(
        self, *, estimator: Estimator = "auto", num_probes: int = 2, attack: Attack | None = None
    ) -> CurvatureSums:
        """Traces of the Hessian as sums over samples (see :func:`~lightning_robust.functional.hessian_trace`).

        Args:
            estimator: ``"auto"``, ``"gauss_newton"`` or ``"hutchinson"``.
            num_probes: Number of probes. Their signs depend on the clean samples, also under an attack.
            attack: Measures the loss on attacked inputs.
        """
        self._refuse_queries("curvature")
        key = ("curvature", estimator, num_probes, attack)
        return self._once(key, lambda: self._curvature(estimator, num_probes, attack))

    def _curvature(self, estimator: Estimator, num_probes: int, attack: Attack | None) -> CurvatureSums:
        model, targets, loss_fn = self.reading.of_loss()
        problem = CurvatureProblem(
            model,
            self.inputs if attack is None else self.attacked(attack),
            targets,
            extras=self.extras,
            estimator=estimator,
            loss_fn=loss_fn,
            module=self.module,
            chunk_size=self.chunk_size,
        )
        with problem.examined() as examined:
            return examined.sums(ProbeSeeds.from_contents(self.inputs), examined.plan.probes(0, num_probes))

    def fisher_rao_paths(self, *, num_targets: int | None, options: PathOptions) -> FisherRaoPaths:
        """Paths to other classes (see :func:`~lightning_robust.functional.trace_fisher_rao_paths`).

        Args:
            num_targets: How many of the most probable other classes of each sample to aim at; None for all.
            options: How to trace them.
        """
        self._refuse_queries("Fisher–Rao paths")
        return self._once(
            ("fisher_rao_paths", num_targets, options),
            lambda: trace_fisher_rao_paths(
                self.classifier,
                self.inputs,
                targets=None if num_targets is None else self._most_probable_others(num_targets),
                labels=self.labels,
                chunk_size=self.chunk_size,
                **options._asdict(),
                **self._options,
            ),
        )

    def _most_probable_others(self, count: int) -> Tensor:
        """Classes (N, count), or all others if there are fewer, in the order of the predictions."""
        logits = self.own_outputs
        labels = check_targets(self.labels, num_samples=len(logits), num_classes=logits.shape[1])
        others = other_classes(labels.to(logits.device), logits.shape[1])
        most_probable = logits.gather(1, others).topk(min(count, others.shape[1]), dim=1).indices
        return others.gather(1, most_probable)

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

    def at_temperature(self, temperature: float) -> Probe:
        """Return a probe of the same samples that knows the temperature of all samples."""
        probe = replace(self, temperature=temperature)
        probe._done.update({key: done for key, done in self._done.items() if key != ("information",)})
        return probe

    def rows(self, rows: slice) -> Probe:
        """Return a probe of some of the samples, without copying them."""
        extras = None if self.extras is None else {name: extra[rows] for name, extra in self.extras.items()}
        return replace(self, inputs=self.inputs[rows], targets=self.targets[rows], extras=extras)
