"""Squared norms of per-sample gradients from one forward and backward pass of all samples together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_robust.functional._isolation.side_effects import start_anew, watched
from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional.curvature._autograd_graph import Node
from lightning_robust.functional.curvature._use_norms import Slopes, takes_samples_last, use_norms
from lightning_robust.functional.curvature._weight_uses import Use, first_of, uses_of_weights


class DirectNorms:
    """Norms of those weights whose gradients follow from a single operation.

    Attributes:
        tensors: The weights in question, by name; those that several operations use are taken out.
        samples_last: Names of weights of operations that number the positions of samples first, the samples last.
        could_be_last: Names of weights of operations that may do so.
    """

    def __init__(self, model: SampleModel, tensors: dict[str, Tensor]) -> None:
        self._model = model
        self.tensors = dict(tensors)
        self.samples_last = set[str]()
        self.could_be_last = set[str]()

    def norms(self, inputs: Tensor, rows: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
        """``‖∂(wᵀz)/∂W_k‖²``, ``(M, N)``, float64, by name, for cotangents ``w``, ``(M, N, K)``.

        Weights for which there is no rule are missing.
        """
        start_anew()  # what earlier passes have kept may have no graph
        leaf = inputs.detach()
        if leaf.is_floating_point():
            leaf.requires_grad_()  # marks what depends on the samples; its gradient is never computed
        with watched():
            outputs = self._model.on(rows)(leaf.clone()).reshape(len(inputs), -1)
        uses = uses_of_weights(outputs, leaf, self.tensors)
        for name in [name for name, use in uses.items() if use is None]:
            del self.tensors[name]
        norms = {name: inputs.new_zeros(cotangents.shape[:2], dtype=torch.float64) for name in self.tensors}
        self.could_be_last = {name for name, use in uses.items() if use is not None and takes_samples_last(use)}
        by_node = dict[Node, list[Use]]()
        for use in uses.values():
            if use is not None:
                by_node.setdefault(use.node, []).append(use)
        ends = list(first_of(outputs, by_node))
        if not ends:
            return norms
        for m, cotangent in enumerate(cotangents):
            last = m + 1 == len(cotangents)

            def take(node: Node, slopes: Tensor | None, m: int = m) -> None:
                for use in by_node[node]:
                    if slopes is None:
                        continue
                    with torch.no_grad():
                        samples_last = use.name in self.samples_last
                        value = use_norms(use, Slopes(slopes, len(inputs), samples_last=samples_last))
                    if value is None:
                        norms.pop(use.name, None)
                    elif use.name in norms:
                        norms[use.name][m] = value

            def hook(node: Node) -> Callable[[tuple[Tensor | None, ...]], None]:
                return lambda gradients: take(node, gradients[0])

            # No gradient of a weight is computed. The pass ends at the first operations, whose slopes it returns, and
            # goes through the others.
            hooks = [node.register_prehook(hook(node)) for node in by_node.keys() - set(ends)]
            try:
                edges = [GradientEdge(node, 0) for node in ends]
                slopes = torch.autograd.grad(outputs, edges, cotangent, retain_graph=not last, allow_unused=True)
            finally:
                for handle in hooks:
                    handle.remove()
            for node, slope in zip(ends, slopes, strict=True):
                take(node, slope)
        return norms

    def leave_out(self, names: set[str]) -> None:
        """Leave weights to other ways."""
        for name in names:
            self.tensors.pop(name, None)
