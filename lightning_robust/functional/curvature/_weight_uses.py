"""Where a forward pass uses each weight, from the graph that autograd records.

If a single operation uses a weight, the squared norm of its gradient for each sample follows from that operation's
other operand and the gradient with respect to its outputs, which one backward pass of a whole batch yields. Weights
that are used several times, or by way of other operations on weights, have no such use.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_robust.functional.curvature._autograd_graph import Node, in_order_of_computation, kind_of, leaf_of

# They keep the elements of a weight, and with them the norm of its gradient.
_SAME_ELEMENTS = {"T", "View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "Squeeze", "Unsqueeze", "Clone"}
_ELEMENTWISE = {"Add", "Sub", "Mul"}


class Use(NamedTuple):
    """An operation that takes a weight."""

    name: str  # of the weight
    node: Node
    kind: str
    operand: int  # the weight's place among those of the operation
    shape: torch.Size  # in which the operation takes it


def uses_of_weights(outputs: Tensor, inputs: Tensor, weights: dict[str, Tensor]) -> dict[str, Use | None]:
    """The only use of each weight that has one, and None for other weights on which the outputs depend.

    ``inputs`` is the leaf from which ``outputs`` were computed. Operations behind those that pick samples or positions
    by their contents (routing, packing of sequences) are left out: their rows follow no order of the samples.
    """
    names = {id(weight): name for name, weight in weights.items()}
    behind = dict[Node, str | None]()  # the weight whose elements a node returns
    from_inputs, picked = set[Node](), set[Node]()
    uses = dict[str, list[Use | None]]()
    for node in in_order_of_computation(outputs.grad_fn):
        leaf, kind = leaf_of(node), kind_of(node)
        if leaf is not None:
            behind[node] = names.get(id(leaf))
            if leaf is inputs:
                from_inputs.add(node)
            continue
        below = [edge for edge, _ in node.next_functions]
        if kind == "Embedding" or any(edge in from_inputs for edge in below):
            from_inputs.add(node)
        if any(edge in picked for edge in below) or (node in from_inputs and _picks_rows(node, kind)):
            picked.add(node)
        held = [None if edge is None else behind.get(edge) for edge in below]
        if len(below) == 1 and kind in _SAME_ELEMENTS:
            behind[node] = held[0]
            continue
        for operand, name in enumerate(held):
            if name is not None:
                others = [edge for place, edge in enumerate(below) if place != operand]
                known = kind not in _ELEMENTWISE or others[0] in from_inputs
                use = Use(name, node, kind, operand, _shape_of(node, operand))
                uses.setdefault(name, []).append(use if known and node not in picked else None)
    return {name: found[0] if len(found) == 1 else None for name, found in uses.items()}


def _picks_rows(node: Node, kind: str) -> bool:
    if kind == "Index":
        return node._saved_indices[0] is not None  # type: ignore[attr-defined]
    if kind in ("IndexSelect", "Gather"):
        return bool(node._saved_dim == 0)  # type: ignore[attr-defined]
    return kind in ("MaskedSelect", "Take")


def _shape_of(node: Node, operand: int) -> torch.Size:
    below, output = node.next_functions[operand]
    return torch.Size(below._input_metadata[output].shape)  # type: ignore[union-attr]


def first_of(outputs: Tensor, nodes: Collection[Node]) -> Iterator[Node]:
    """Those of the nodes that depend on no other."""
    above = set[Node]()  # nodes that depend on one of them
    for node in in_order_of_computation(outputs.grad_fn):
        depends = any(below in above for below, _ in node.next_functions)
        if node in nodes and not depends:
            yield node
        if depends or node in nodes:
            above.add(node)
