"""Reading the graph that autograd records of a computation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_LEAF = "torch::autograd::AccumulateGrad"
Node = torch.autograd.graph.Node


def in_order_of_computation(start: Node | None) -> Iterator[Node]:
    """All nodes below, each after those that it depends on."""
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
    """The tensor whose gradient a node accumulates, if it is such a one."""
    variable: Tensor | None = getattr(node, "variable", None) if node.name() == _LEAF else None
    return variable


def is_custom(node: Node) -> bool:
    """Whether it is a ``torch.autograd.Function``, whose backward pass somebody wrote."""
    return hasattr(node, "_forward_cls")


def is_differentiable_once(node: Node) -> bool:
    """Whether a function is marked with ``once_differentiable``."""
    backward: Any = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return hasattr(backward, "__wrapped__") and backward.__code__.co_filename == torch.autograd.function.__file__


def kind_of(node: Node | None) -> str:
    """What a node differentiates; nothing for a function of somebody's own, whatever its name."""
    if node is None or is_custom(node):
        return ""
    return node.name().rstrip("0123456789").removesuffix("Backward")
