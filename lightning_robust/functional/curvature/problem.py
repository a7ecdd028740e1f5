"""The measurement behind ``hessian_trace`` and ``Probe.curvature``: examine the samples once, then take probes.

Cost: one forward pass of every sample to examine it. A Gauss–Newton probe takes another forward pass of every sample,
shared by all probes taken together, and a backward pass; a Hutchinson probe a Hessian-vector product. Plain functions
take two more forward passes without gradients, which show whether they close over tensors of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn

from lightning_robust.functional._isolation.caches import caches_made_anew
from lightning_robust.functional._isolation.convolutions import TwiceDifferentiable
from lightning_robust.functional._isolation.side_effects import start_anew
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._isolation.weights import Weights, differentiable_weights
from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional._validation.independence import check_place
from lightning_robust.functional._validation.tensors import check_finite, check_inputs, outputs_of
from lightning_robust.functional.curvature._hutchinson import quadratic_forms, refuse_missing_derivatives
from lightning_robust.functional.curvature._piecewise_linear import CurvedLayers
from lightning_robust.functional.curvature._sample_gradients import SampleGradients
from lightning_robust.functional.curvature.losses import LossFn, SampleLoss
from lightning_robust.functional.curvature.plan import Estimator, Plan
from lightning_robust.functional.curvature.signs import ProbeSeeds, sample_signs
from lightning_robust.functional.curvature.sums import NUM_BLOCKS, CurvatureSums

_FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


@dataclass(frozen=True, eq=False)
class CurvatureProblem:
    """A network, samples and a loss whose Hessian is wanted; the arguments are those of :func:`hessian_trace`."""

    model: Callable[..., Tensor]
    inputs: Tensor
    targets: Tensor | None
    _: KW_ONLY
    extras: Mapping[str, Tensor] | None = None
    estimator: Estimator = "auto"
    loss_fn: LossFn | None = None
    module: nn.Module | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_inputs(self.inputs, with_derivative=False)

    @contextmanager
    def examined(self) -> Iterator[ExaminedProblem]:
        """Examine all samples, and shield the network for as long as probes are taken."""
        loss = SampleLoss(self.loss_fn)
        if self.estimator == "gauss_newton" and loss.root is None:
            given = getattr(self.loss_fn, "__name__", type(self.loss_fn).__name__)
            raise ValueError(
                "Expected argument `loss_fn` to be torch's cross-entropy, MSE or BCE with logits for"
                f" estimator='gauss_newton', but got {given}. Use estimator='hutchinson'."
            )
        model = SampleModel(self.model, self.extras, num_samples=len(self.inputs))
        check_place(model, self.inputs, module=self.module)
        with (
            differentiable_weights(self.model, self.loss_fn, module=self.module) as weights,
            caches_made_anew(weights, model.on(slice(2)), full_precision(self.inputs[:2])),
        ):
            yield ExaminedProblem(self, model, loss, weights)


class ExaminedProblem:
    """A problem all of whose samples have passed through the network once; any number of probes can follow.

    Attributes:
        plan: Which estimator measures each layer.
    """

    def __init__(self, problem: CurvatureProblem, model: SampleModel, loss: SampleLoss, weights: Weights) -> None:
        self._problem = problem
        self._model = model
        self._loss = loss
        self._weights = weights
        self._inputs = x = full_precision(problem.inputs)
        given = problem.targets
        self._targets = None if given is None else loss.prepared(full_precision(given), num_samples=len(x))
        names = tuple(weights.tensors)
        gauss_newton = names if loss.root is not None and problem.estimator != "hutchinson" else ()
        self._gradients = SampleGradients(self._model, weights, gauss_newton)
        self._chunks = torch.split(torch.arange(len(x)), problem.chunk_size or self._gradients.samples_at_once(x))
        # torch's attention runs in a fused kernel without a graph, which rounds otherwise: every estimator takes its
        # outputs from there, so that they agree to the last bit in layers where they measure the same
        self._is_fused = any(isinstance(module, _FUSED) for module in weights.modules)
        curved = CurvedLayers(weights, up_to_a_constant=loss.is_cross_entropy)
        self._outputs = [self._examined(rows, curved) for rows in self._chunks]
        self._reached = curved.reached()
        if gauss_newton and problem.estimator == "auto":
            self.plan = Plan(gauss_newton, curved.names())
        else:
            self.plan = Plan(gauss_newton, () if gauss_newton else names, is_hessian=not gauss_newton)
        self._check_loss()
        root = loss.root  # samples may mask different classes
        self._columns = 0 if root is None else max(root.num_columns(outputs) for outputs in self._outputs)

    def _examined(self, rows: Tensor, curved: CurvedLayers) -> Tensor:
        """Outputs of some samples, and on the way the layers that they depend on and those in which they are curved."""
        outputs = outputs_of(self._model.on(rows), self._inputs[rows])
        curved.read(outputs)
        if self._is_fused:
            with torch.no_grad():
                outputs = outputs_of(self._model.on(rows), self._inputs[rows])
        outputs = outputs.detach().clone()  # a network may write every batch of outputs to the same memory
        self._loss.check(outputs, self._targets_of(rows))
        return outputs

    def _check_loss(self) -> None:
        root = self._loss.root
        if self._targets is None and (self.plan.hutchinson or (root is not None and root.needs_targets)):
            raise ValueError(
                f"Expected argument `targets` to be a tensor, because estimator={self._problem.estimator!r} needs the"
                " loss of this model, but got None."
            )
        if self._loss.is_custom and self._targets is not None:
            self._loss.examine(torch.cat(self._outputs), self._targets)
        counts = [
            self._loss.weights(outputs, self._targets_of(rows))
            for rows, outputs in zip(self._chunks, self._outputs, strict=True)
        ]
        self._counts = torch.cat(counts).cpu()

    def _targets_of(self, rows: Tensor) -> Tensor | None:
        return None if self._targets is None else self._targets[rows]

    def sums(self, seeds: ProbeSeeds, probes: tuple[range, range]) -> CurvatureSums:
        """Take probes of all samples: the part of :func:`hessian_trace` that adds up over batches and processes.

        ``probes`` are numbers of Gauss–Newton and of Hutchinson probes, as from :meth:`Plan.probes`.
        """
        names, blocks = self.plan.names, torch.tensor(seeds.blocks)
        parts = tuple(torch.zeros(len(part), NUM_BLOCKS, len(names), dtype=torch.float64) for part in probes)
        exact = False
        if probes[0]:
            for rows, outputs in zip(self._chunks, self._outputs, strict=True):
                forms, exact = self._gauss_newton_forms(rows, outputs, seeds, probes[0])
                parts[0].index_add_(1, blocks[rows], forms.cpu())
        places = [names.index(name) for name in self.plan.hutchinson]
        for block in sorted(set(seeds.blocks)) if probes[1] else ():
            keys = [(seeds.seed, block, probe) for probe in probes[1]]
            most = self._problem.chunk_size or -(-len(self._inputs) // 4)
            for rows in torch.split((blocks == block).nonzero()[:, 0], most):
                with TwiceDifferentiable():
                    parts[1][:, block, places] += self._hutchinson_forms(rows, keys)
        for part in parts:
            check_finite(part.flatten(1), "curvature")
        counts = torch.zeros(NUM_BLOCKS, dtype=torch.float64).index_add_(0, blocks, self._counts)
        return CurvatureSums(names, parts, counts, exact, self._reached)

    def _gauss_newton_forms(
        self, rows: Tensor, outputs: Tensor, seeds: ProbeSeeds, probes: range
    ) -> tuple[Tensor, bool]:
        """``‖∂(wᵀz)/∂W_k‖²`` for each probe, sample and layer, ``(M, N, L)``, and whether these are the exact traces.

        With as many probes as the root has columns, the columns themselves take the place of random signs.
        """
        root = self._loss.root
        assert root is not None
        size = outputs[0].numel()
        exact = self._columns <= probes.stop
        if exact:
            signs = torch.eye(self._columns, size, dtype=torch.int8).unsqueeze(1).expand(-1, len(rows), -1)
        else:
            signs = sample_signs([seeds.keys[row] for row in rows], probes, root.num_signs(outputs), width=size)
        cotangents = root.times(signs.to(outputs.device), outputs, self._targets_of(rows))
        forms = self._gradients.squared_norms(self._inputs[rows], rows, cotangents)
        return (forms.sum(dim=0).expand(len(probes), -1, -1) if exact else forms), exact

    def _hutchinson_forms(self, rows: Tensor, keys: Sequence[tuple[int, ...]]) -> Tensor:
        """``v_kᵀ(Hv)_k`` summed over samples, or with ``R`` in place of ``H``, for each key and layer, ``(M, L)``."""
        assert self._targets is not None
        start_anew()  # what earlier passes have kept may have no graph, or one that is used up
        targets = self._targets[rows]
        outputs = outputs_of(self._model.on(rows), self._inputs[rows])
        refuse_missing_derivatives(outputs, self._weights)
        if self.plan.gauss_newton:
            objective = (self._loss.gradients(outputs, targets) * outputs).sum()
        else:
            losses = self._loss.values(outputs, targets)
            check_finite(losses, "losses")
            objective = losses.sum()
        return quadratic_forms(objective, {name: self._weights.tensors[name] for name in self.plan.hutchinson}, keys)
