"""The input of all metrics: a network, labelled samples, and expensive results that the metrics share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_robust.functional._validation.arguments import (
    expected_but_got,
)
from lightning_robust.functional._validation.outputs import as_restricted
from lightning_robust.functional._validation.tensors import check_targets
from lightning_robust.functional.curvature.plan import Estimator
from lightning_robust.functional.curvature.problem import CurvatureProblem
from lightning_robust.functional.curvature.signs import ProbeSeeds
from lightning_robust.functional.curvature.sums import CurvatureSums
from lightning_robust.functional.fisher_rao.geometry import other_classes
from lightning_robust.functional.fisher_rao.path_options import PathOptions
from lightning_robust.functional.fisher_rao.paths import FisherRaoPaths, trace_fisher_rao_paths
from lightning_robust.functional.input_space.attacks import Norm, pgd
from lightning_robust.functional.input_space.input_information import InputInformation, input_information
from lightning_robust.functional.input_space.likelihoods import likelihood_of
from lightning_robust.functional.input_space.linearization import Linearization, linearize_up_to
from lightning_robust.functional.input_space.queries import linearize_by_queries
from lightning_robust.functional.input_space.relinearization import relinearize
from lightning_robust.samples import Samples

_MOST_OUTPUTS = 32  # of which all gradients are taken, unless a probe says otherwise
_NUM_OTHERS = 10  # classes to which boundaries are sought where there are more outputs


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


class Probe(Samples):
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
            has a target. With ``"token"`` they are logits ``(N, T, V)`` of words at T positions, such as those of a
            language model, and targets ``(N, T)`` are the words at those positions. A position does not count where the
            target is −100, or the ``ignore_index`` of ``loss_fn``.
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

    @property
    def linearized(self) -> Linearization:
        """Logits, Gram matrices and L1 gaps of all samples (see :func:`~lightning_robust.functional.linearize`)."""
        found = self._linearized(None)
        assert found is not None
        return found

    @property
    def linearized_if_few(self) -> Linearization | None:
        """The same; None if there are more than 32 outputs, unless :attr:`linearization` says otherwise."""
        if self.linearization == "krylov" or self.reading.likelihood.has_positions:
            return None
        return self._linearized(_MOST_OUTPUTS if self.linearization is None else None)

    def takes_krylov(self, num_outputs: int) -> bool:
        """Whether spectral norms of so many outputs are found in Krylov subspaces."""
        alone = self.linearization == "krylov" or self.reading.likelihood.has_positions
        return alone or (self.linearization is None and num_outputs > _MOST_OUTPUTS)

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
        kind = likelihood_of(self.likelihood, self.tolerance)
        temperature = self.temperature
        if temperature is None:
            temperature = float(kind.fit_evidence(self.evidence).temperature)
        return input_information(
            self.classifier,
            self.inputs,
            temperatures=[temperature, 1.0],
            likelihood=kind,
            extras=self.network_extras,
            input_std=self.input_std,
            chunk_size=self.chunk_size,
        )

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

    def at_temperature(self, temperature: float) -> Probe:
        """Return a probe of the same samples that knows the temperature of all samples."""
        probe = replace(self, temperature=temperature)
        probe._done.update({key: done for key, done in self._done.items() if key != ("information",)})
        return probe
