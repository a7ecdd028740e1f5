"""The trained parameters of an isolated network as leaves of the graph, for its curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_robust.functional._isolation.context import differentiable, owner_of
from lightning_robust.functional._isolation.stand_ins import as_stand_in, original


class Weights:
    """The trained parameters of a network inside :func:`differentiable_weights`.

    Attributes:
        tensors: Leaves that stand in for them, by name; tied ones once, under their first name. They require grad.
        modules: The network and all modules inside.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(module.modules())
        self.tensors: dict[str, Tensor] = {}
        self._places: dict[str, list[tuple[dict[str, Any], str]]] = {}
        self._shielded: dict[str, Tensor] = {}  # what stands there otherwise
        self._originals: set[int] = set()
        self._renewals: list[Callable[[], object]] = []
        names: dict[int, str] = {}
        for prefix, owner in module.named_modules():
            for key, tensor in owner._parameters.items():
                if tensor is None or not original(tensor).requires_grad:
                    continue
                self._originals.add(id(original(tensor)))
                name = names.setdefault(id(tensor), _without_wrappers(f"{prefix}.{key}"))
                self._places.setdefault(name, []).append((owner._parameters, key))
                self._shielded[name] = tensor
        for name, tensor in self._shielded.items():
            self.tensors[name] = as_stand_in(tensor.detach().requires_grad_(), tensor)

    def is_original(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of the user's own, which nothing here should compute with."""
        return id(tensor) in self._originals

    @contextmanager
    def as_leaves(self) -> Iterator[None]:
        """Let the network compute with the leaves."""
        try:
            self._put(self.tensors)
            yield
        finally:
            self._put(self._shielded)

    @contextmanager
    def replaced(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the network compute with these tensors instead of the leaves."""
        try:
            self._put(tensors)
            for renew in self._renewals:
                renew()
            yield
        finally:
            self._put({name: self.tensors[name] for name in tensors})

    @contextmanager
    def renewing(self, renew: Callable[[], object]) -> Iterator[None]:
        """Take a step whenever other tensors take the places of the leaves."""
        self._renewals.append(renew)
        try:
            yield
        finally:
            self._renewals.remove(renew)

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            for parameters, key in self._places[name]:
                parameters[key] = tensor


@contextmanager
def differentiable_weights(
    model: Callable[..., object], *others: object, module: nn.Module | None = None
) -> Iterator[Weights]:
    """Make the outputs of ``model`` twice differentiable with respect to its weights, which stay shielded.

    Args:
        model: Module, bound method of a module, partial application of either, or a plain function.
        others: Further callables that take part, such as a loss with class weights.
        module: The module whose weights are meant, by default the one that ``model`` is or belongs to.

    Raises:
        ValueError: If no module is known, or it has no trained parameter.
    """
    module = owner_of(model) if module is None else module
    if module is None:
        raise ValueError(
            "Expected a model whose weights are known, a torch.nn.Module or a method of one, but got a plain function"
            f" {getattr(model, '__name__', model)!r}. Pass the network that it calls as `module`."
        )
    with differentiable(model, module, *others, twice=True):
        weights = Weights(module)
        if any(tensor.is_complex() for tensor in weights.tensors.values()):
            raise ValueError(f"Expected a model with real weights, but {type(module).__name__} has complex ones.")
        if not weights.tensors:
            raise ValueError(
                f"Expected a model with weights that are trained, but {type(module).__name__} has none with"
                " `requires_grad=True`."
            )
        with weights.as_leaves():
            yield weights


def _without_wrappers(name: str) -> str:
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):  # of compiled and checkpointed modules
        name = name.replace(wrapper, "")
    return name.lstrip(".")
