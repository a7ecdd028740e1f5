"""Hard sigmoid by its definition, because torch's kernel has no second derivative."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def plain_hard_sigmoid(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let hard sigmoids among ``modules`` be computed by a kernel that can be differentiated twice."""
    changed = [module for module in modules if type(module) is nn.Hardsigmoid and "forward" not in vars(module)]
    for module in changed:
        vars(module)["forward"] = _forward
    try:
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def _forward(x: Tensor) -> Tensor:
    return F.relu6(x + 3) / 6
