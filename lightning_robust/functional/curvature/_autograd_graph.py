"""Walks the graph that autograd records during a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_LEAF = "torch::autograd::AccumulateGrad"
Node = torch.autograd.graph.Node


def in_order_of_computation(start: Node | None) -> Iterator[Node]:
    """Yield every node that ``start`` depends on and ``start`` itself, each after its own dependencies."""
    stack, entered, done = [start], set[Node](), set[Node]()
    while stack:
        node = stack[-1]
        if node is None or node in done:
            stack.pop()
        elif node in entered:
            done.add(node)
            yield node
        else:
            entered.add(node)
            stack.extend(below for below, _ in node.next_functions if below not in entered)


def leaf_of(node: Node) -> Tensor | None:
    """The tensor whose gradient a leaf node accumulates; None for any other node."""
    variable: Tensor | None = getattr(node, "variable", None) if node.name() == _LEAF else None
    return variable


def is_custom(node: Node) -> bool:
    """Whether the node is a user-defined ``torch.autograd.Function``."""
    return hasattr(node, "_forward_cls")


def is_differentiable_once(node: Node) -> bool:
    """Whether the node is a function whose backward pass is marked with ``@once_differentiable``."""
    backward: Any = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return hasattr(backward, "__wrapped__") and backward.__code__.co_filename == torch.autograd.function.__file__


def kind_of(node: Node | None) -> str:
    """Name of the operation that a node differentiates; empty for user-defined functions, whatever their name."""
    if node is None or is_custom(node):
        return ""
    return node.name().rstrip("0123456789").removesuffix("Backward")
