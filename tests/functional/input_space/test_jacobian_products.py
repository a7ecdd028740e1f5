"""Products with Jacobians against float64 Jacobians, and layers that cannot be differentiated twice."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_robust.functional import fim_spectral_norm, fim_spectral_norm_matrix_free, linearize
from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.convolutions import TwiceDifferentiable
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional.input_space.jacobian_products import JacobianProducts
from tests.helpers.networks import NETWORKS, build, random, random_linear
from tests.helpers.oracles import jacobian_by_differences
from tests.helpers.recording import PeakMemory, state_of


class FusedAttention(nn.Module):
    """Calls the attention kernel itself, which has neither forward mode nor a double backward."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(6, 18), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(dim=1))


class Checkpointed(nn.Module):
    """Computes its convolutions again in every backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 2, groups=4), nn.SiLU(inplace=True))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False).flatten(1))


def convolutions() -> nn.Module:
    """Strided, dilated, depthwise with two outputs per channel, and grouped, with a batch norm without weights."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.Hardswish(),
        nn.Conv2d(6, 12, 3, padding="same", groups=6),
        nn.BatchNorm2d(12, affine=False),
        nn.GELU(),
        nn.Conv2d(12, 8, 2, dilation=2, groups=4, bias=False),
        nn.GroupNorm(2, 8),
        nn.MaxPool2d(2, stride=1),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Hardsigmoid(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 7),
    )


def weight_norm() -> nn.Module:
    layers = [nn.Conv1d(2, 4, 3), nn.ELU(), nn.Flatten(), nn.Linear(16, 5)]
    return nn.Sequential(*(parametrizations.weight_norm(m) if hasattr(m, "weight") else m for m in layers))


MORE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (convolutions, (3, 8, 8)),
    "weight_norm": (weight_norm, (2, 6)),
    "gru": (lambda: nn.Sequential(nn.GRU(3, 4, batch_first=True), Last(), nn.Linear(4, 3)), (4, 3)),
    "fused attention": (FusedAttention, (4, 6)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.Softplus(), nn.Linear(9, 4)), (6,)),
    "checkpointed": (Checkpointed, (2, 4, 4)),
}


class Last(nn.Module):
    def forward(self, outputs: tuple[Tensor, Tensor]) -> Tensor:
        return outputs[0][:, -1]


def built(name: str, *, num_samples: int = 3) -> tuple[nn.Module, Tensor]:
    if name in NETWORKS:
        return build(name, num_samples=num_samples)[:2]
    factory, shape = MORE[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return factory(), torch.randn(num_samples, *shape)


@contextmanager
def products(
    model: Callable[..., Tensor], inputs: Tensor, *, std: Tensor | None = None, seed: int = 7
) -> Iterator[JacobianProducts]:
    network = SampleModel(model, None, num_samples=len(inputs)).on_all()
    with differentiable(model, twice=True), TwiceDifferentiable():
        yield JacobianProducts(network, full_precision(inputs), std, first=lambda z: random(seed, *z.shape))


def check(jacobian: Tensor, of: JacobianProducts, *, rtol: float) -> None:
    """Compare the first product and two of either kind; errors are relative to the largest possible product."""
    n, c, d = jacobian.shape
    sizes = torch.linalg.matrix_norm(jacobian, ord=2)[:, None]
    for seed in (1, 2):
        u, v = random(seed, n, c), random(seed + 2, n, d)
        for actual, matrix, vector in ((of.transposed(u), jacobian.mT, u), (of.times(v.to(of.gradient)), jacobian, v)):
            expected = (matrix @ vector[:, :, None])[:, :, 0]
            errors = (actual.double() - expected).abs() / (sizes * torch.linalg.vector_norm(vector, dim=1)[:, None])
            assert float(errors.max()) <= rtol
    first = (jacobian.mT @ random(7, n, c)[:, :, None])[:, :, 0]
    assert float((of.gradient.double() - first).abs().max() / first.abs().max()) <= 10 * rtol


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*NETWORKS, *MORE])
def test_products_are_those_of_the_jacobian_and_of_the_type_of_the_network(name: str, dtype: torch.dtype) -> None:
    model, inputs = built(name)
    jacobian = jacobian_by_differences(model, inputs)
    with products(model.to(dtype), inputs.to(dtype)) as of:
        assert of.outputs.dtype == of.gradient.dtype == of.times(of.gradient).dtype == dtype
        check(jacobian, of, rtol=1e-6 if dtype == torch.float64 else 1e-5)
        assert of.is_exact


def test_products_are_in_units_of_the_unnormalised_input() -> None:
    model, inputs = built("cnn_batchnorm")
    std = torch.tensor([0.2, 0.5, 2.0]).view(1, 3, 1, 1)
    jacobian = jacobian_by_differences(model, inputs).view(3, 10, 3, 49) / std.double().view(3, 1)
    with products(model, inputs, std=std) as of:
        check(jacobian.flatten(2), of, rtol=1e-5)
        assert of.is_exact


@pytest.mark.parametrize(
    "mask",
    [
        lambda z, masked: z.masked_fill(masked, -torch.inf),
        lambda z, masked: torch.where(masked, -torch.inf, z),
        lambda z, masked: z.masked_fill(masked, -torch.inf).log_softmax(dim=1),
    ],
    ids=["filled", "chosen", "log-probabilities"],
)
def test_masked_logits_have_no_derivative_and_spoil_no_other(mask: Callable[[Tensor, Tensor], Tensor]) -> None:
    body, inputs = random_linear(0, num_classes=5, num_features=4), random(1, 3, 4)
    masked = torch.tensor([False, True, False, False, True])

    def few(x: Tensor) -> Tensor:
        return mask(body(x), masked)[:, ~masked]

    left = torch.stack([torch.autograd.functional.jacobian(lambda v: few(v[None])[0], x) for x in inputs])
    with products(lambda x: mask(body(x), masked), inputs) as of:
        u, v = random(2, 3, 5).masked_fill(masked, 0.0), random(3, 3, 4)
        torch.testing.assert_close(of.transposed(u), torch.einsum("ncd,nc->nd", left, u[:, ~masked]))
        product = of.times(v)
        torch.testing.assert_close(product[:, ~masked], torch.einsum("ncd,nd->nc", left, v))
        assert product.isfinite().all()  # and of no matter: these classes have a probability of 0


@pytest.mark.parametrize("constant", [torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])], ids=["zero", "constant"])
@pytest.mark.parametrize("graph", [True, False], ids=["with a graph", "without"])
def test_a_network_that_ignores_its_input_has_products_of_zero(constant: Tensor, graph: bool) -> None:
    def network(x: Tensor) -> Tensor:
        return constant + (0 * x.sum(dim=1, keepdim=True) if graph else torch.zeros(len(x), 1))

    with products(network, torch.ones(4, 2)) as of:
        for found, shape in ((of.gradient, (4, 2)), (of.transposed(torch.ones(4, 3)), (4, 2))):
            assert torch.equal(found, torch.zeros(shape))
        assert torch.equal(of.times(torch.ones(4, 2)), torch.zeros(4, 3))


def test_a_network_that_squeezes_its_outputs_may_see_a_single_sample() -> None:
    linear, inputs = random_linear(0, num_classes=5, num_features=4), random(1, 1, 4)
    with products(lambda x: linear(x).squeeze(), inputs) as of:
        check(linear.weight.detach()[None], of, rtol=1e-12)


# --- layers that cannot be differentiated twice -----------------------------------------------------------------------


class Tanh(torch.autograd.Function):
    """A layer with a backward pass of its own; those that follow differ in how they take it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()


class Once(Tanh):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.saved_tensors[0].tanh().square())


class Detached(Tanh):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.detach() * (1 - ctx.saved_tensors[0].tanh().square())


class Halved(Tanh):
    """Its second derivative is there, and half of what it should be."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient + gradient.detach()) / 2 * (1 - ctx.saved_tensors[0].tanh().square())


class DetachedNumPy(Tanh):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x = ctx.saved_tensors[0].detach().numpy()
        return torch.from_numpy(gradient.detach().numpy() * (1 - np.tanh(x) ** 2))


class NumPy(Tanh):
    """With ``create_graph=True`` even its first derivative fails."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x = ctx.saved_tensors[0].detach().numpy()
        return torch.from_numpy(gradient.numpy() * (1 - np.tanh(x) ** 2))


class InPlace(Tanh):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        slope = 1 - ctx.saved_tensors[0].tanh().square()
        squared = gradient.square()
        return gradient.mul_(slope) + 0 * squared


ONCE = {layer.__name__: layer for layer in (Once, Detached, Halved, DetachedNumPy, NumPy, InPlace)}


class WithLayer(nn.Module):
    def __init__(self, layer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.body = layer, built("mlp")[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.layer(x))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("name", ONCE)
def test_layers_that_cannot_be_differentiated_twice_are_measured_by_differences(name: str, scale: float) -> None:
    """Also where inputs are in such small units that a step of a fixed size would leave them far behind."""
    model, inputs = WithLayer(lambda x: ONCE[name].apply(x / scale)), built("mlp", num_samples=8)[1]
    exact = linearize(WithLayer(torch.tanh), inputs)
    expected = fim_spectral_norm(exact.logits, exact.gram) / scale**2
    with products(model, scale * inputs) as of:
        of.times(of.gradient)
        assert not of.is_exact
    found = fim_spectral_norm_matrix_free(model, scale * inputs, tolerance=1e-3)
    torch.testing.assert_close(found.value, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("could not create a primitive"),
        MemoryError(),
        ZeroDivisionError("division by zero"),
    ],
    ids=str,
)
@pytest.mark.parametrize("times", [1, 2, 3], ids=["first derivative", "second", "a later one"])
def test_errors_that_say_nothing_of_derivatives_are_not_swallowed(error: Exception, times: int) -> None:
    calls = 0

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls >= times:
                raise error
            return Failing.apply(gradient)

    model, inputs = WithLayer(Failing.apply), built("mlp")[1]
    with pytest.raises(type(error)) as raised:
        fim_spectral_norm_matrix_free(model, inputs)
    assert str(raised.value) == str(error)
    assert calls >= times


# --- what is left behind ----------------------------------------------------------------------------------------------


def attributes_of(model: nn.Module) -> list[tuple[str, object]]:
    """Names and identities of all attributes, and the hooks among them."""
    items = [item for module in model.modules() for item in vars(module).items()]
    return [(key, list(value) if key.endswith("_hooks") else id(value)) for key, value in items]


@pytest.mark.parametrize("name", [*NETWORKS, "checkpointed", "weight_norm"])
def test_nothing_is_left_on_the_network(name: str) -> None:
    model, inputs = built(name)
    before, attributes, given = state_of(model), attributes_of(model), inputs.clone()
    random_state = torch.get_rng_state()
    fim_spectral_norm_matrix_free(model, inputs)
    assert state_of(model) == before
    assert attributes_of(model) == attributes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(inputs, given)
    assert inputs.grad is None
    assert not inputs.requires_grad


@pytest.mark.parametrize("layer", [torch.tanh, Once.apply], ids=["derivatives", "differences"])
def test_no_graph_survives(layer: Callable[[Tensor], Tensor]) -> None:
    model, inputs = WithLayer(layer), built("mlp")[1]
    with PeakMemory() as memory:
        found = fim_spectral_norm_matrix_free(model, inputs)
        gc.collect()
        kept = sum(part.nbytes for part in vars(found).values())
        assert memory.live <= kept + 3 * 6 * 8  # what the values are views of
    with products(model, inputs) as of:
        graph = weakref.ref(of._gradient)
        of.times(of.gradient)
    del of
    gc.collect()
    assert graph() is None
