import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_robust.functional import fim_spectral_norm, hessian_trace, linearize
from lightning_robust.functional._isolation.kernels import replaced_kernels
from tests.helpers.recording import PeakMemory


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(cls: type, **options: bool | float | None) -> nn.Module:
    """In eval mode, with statistics and weights that are not those of a new one."""
    norm = cls(4, dtype=torch.float64, **options)
    for seed, tensor in enumerate((*norm.parameters(), *norm.buffers())):
        if tensor.is_floating_point():
            tensor.data.copy_(random(4, seed=seed).exp())
    return norm.eval()


LAYERS = [
    (nn.BatchNorm1d, (5, 4), {}),
    (nn.BatchNorm1d, (5, 4, 7), {}),
    (nn.BatchNorm2d, (5, 4, 3, 3), {}),
    (nn.BatchNorm2d, (5, 4, 3, 3), {"affine": False}),
    (nn.BatchNorm2d, (5, 4, 3, 3), {"momentum": None, "eps": 0.1}),
    (nn.BatchNorm2d, (5, 4, 3, 3), {"track_running_stats": False}),
    (nn.BatchNorm3d, (5, 4, 2, 3, 2), {}),
    (nn.SyncBatchNorm, (5, 4, 3, 3), {}),
]


@pytest.mark.parametrize(("cls", "shape", "options"), LAYERS)
def test_values_and_derivatives_of_every_order_are_those_of_torch(
    cls: type, shape: tuple[int, ...], options: dict[str, bool]
) -> None:
    norm = layer(cls, **options)
    variables = [random(*shape, seed=9).requires_grad_(), *norm.parameters()]

    def derivatives() -> list[Tensor]:
        out = norm(variables[0])
        first = torch.autograd.grad(out.pow(3).sum(), variables, create_graph=True)
        second = torch.autograd.grad(first[0].pow(2).sum(), variables)
        return [out, *first, *second]

    expected = derivatives()
    with replaced_kernels(norm.modules()):
        actual = derivatives()
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert "forward" not in vars(norm)


def test_statistics_of_the_batch_are_left_to_torch() -> None:
    norm = nn.BatchNorm1d(3, dtype=torch.float64)
    x = random(6, 3)
    with replaced_kernels([norm]):
        trained = norm(x)
    torch.testing.assert_close(trained, (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt())
    assert norm.num_batches_tracked == 1


def test_what_torch_refuses_is_refused() -> None:
    norm = layer(nn.BatchNorm2d)
    with replaced_kernels([norm]):
        for shape in ((5, 4), (5, 3, 2, 2)):
            with pytest.raises((ValueError, RuntimeError)):
                norm(random(*shape))


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
    class Doubled(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    norm, x = layer(Doubled), random(5, 4)
    expected = norm(x)
    with replaced_kernels([norm]):
        assert torch.equal(norm(x), expected)


class Checkpointed(nn.Module):
    """Recomputes its first half in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 3)
        self.recompute = True

    def forward(self, x: Tensor) -> Tensor:
        half = checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)
        return self.head(half.mean(dim=(2, 3)))


def test_activation_checkpointing_gives_the_same() -> None:
    model, inputs = Checkpointed(), random(5, 1, 8, 8).float()
    plain = copy.deepcopy(model)
    plain.recompute = False
    torch.testing.assert_close(linearize(model, inputs).gram, linearize(plain, inputs).gram)


def test_autocast_inside_the_forward_pass_keeps_its_types() -> None:
    class Mixed(nn.Module):
        types: ClassVar[set[torch.dtype]] = set()

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out = self.norm(self.conv(x))
                self.types.add(out.dtype)
                return self.head(F.relu(out).mean(dim=(2, 3))).float()

    model = Mixed()
    linearize(model, random(5, 1, 8, 8).float())
    assert model.types == {torch.bfloat16}


def test_less_memory_is_held_for_the_backward_pass() -> None:
    layers = [part for _ in range(6) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh())]
    model = nn.Sequential(nn.Conv2d(1, 8, 1), *layers, nn.Flatten(), nn.Linear(8 * 256, 3)).eval()
    with PeakMemory() as affine:
        linearize(model, random(40, 1, 16, 16).float())
    inputs = random(40, 1, 16, 16).float().requires_grad_()
    with PeakMemory() as plain:
        logits = model(inputs)
        for c in range(3):
            torch.autograd.grad(logits[:, c].sum(), inputs, retain_graph=True)
    assert affine.peak < 0.75 * plain.peak


# --- torch's kernel where strides do not tell the order of memory -----------------------------------------------------

MEAN, VAR = random(6, seed=1), random(6, seed=2).exp()
NORMALISATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "batch": lambda x, weight, bias: F.batch_norm(x, MEAN, VAR, weight, bias),
    "statistics of the batch": lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, training=True),
    "instance": lambda x, weight, bias: F.instance_norm(x, weight=weight, bias=bias),
    "instance, running": lambda x, weight, bias: F.instance_norm(x, MEAN, VAR, weight, bias, use_input_stats=False),
}


def by_definition(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    channels = (1, -1, *(1,) * (x.ndim - 2))
    dims = [d for d in range(x.ndim) if d > 1 or (d == 0 and name == "statistics of the batch")]
    mean, var = MEAN.view(channels), VAR.view(channels)
    if name in ("instance", "statistics of the batch"):
        mean, var = x.mean(dims, keepdim=True), x.var(dims, unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * weight.view(channels) + bias.view(channels)


ORDERS = [(0, 1, 2, 3), (0, 2, 3, 1), (0, 1, 3, 2), (2, 3, 1, 0)]  # of dimensions in memory, the slowest first


def in_every_order(tensor: Tensor, orders: Sequence[tuple[int, ...]] = ORDERS) -> Iterator[Tensor]:
    """In memory in these orders. The stride of a single sample may be anything, such as that of transposed tokens."""
    for order in orders:
        found = tensor.permute(order).contiguous().permute([order.index(d) for d in range(4)])
        yield found
        if len(tensor) == 1:
            yield found.as_strided(found.shape, (tensor.shape[1], *found.stride()[1:]))


def derivatives_of(f: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """With respect to inputs and weights, first and second; the layout of ``x`` is kept."""
    variables = [x.detach().requires_grad_(), *(random(6, seed=s).exp().requires_grad_() for s in (3, 4))]
    first = torch.autograd.grad(f(*variables), variables, cotangent, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), variables[:2], materialize_grads=True)
    return [*first, *second]


@pytest.mark.parametrize("shape", [(1, 6, 3, 4), (1, 6, 1, 4), (2, 6, 4, 1), (2, 6, 3, 4)], ids=str)
@pytest.mark.parametrize("name", NORMALISATIONS)
def test_gradients_do_not_depend_on_the_order_of_memory(name: str, shape: tuple[int, ...]) -> None:
    x, cotangent = random(*shape), random(*shape, seed=5)
    expected = derivatives_of(lambda *tensors: by_definition(name, *tensors), x, cotangent)
    with replaced_kernels([]):
        for laid_out, g in itertools.product(in_every_order(x, ORDERS[:2]), in_every_order(cotangent)):
            actual = derivatives_of(NORMALISATIONS[name], laid_out, g)
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("name", ["batch", "instance"])
def test_nor_do_those_of_single_samples_taken_together(name: str, num_samples: int) -> None:
    xs, weight, bias = random(num_samples, 6, 3, 4), random(6, seed=3).exp(), random(6, seed=4)

    def pulled_back(f: Callable[[Tensor, Tensor, Tensor], Tensor], cotangents: Tensor) -> tuple[Tensor, ...]:
        def of_one(x: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(lambda *tensors: f(*tensors)[0], x[None], weight, bias)[1](cotangent)

        return torch.func.vmap(of_one)(xs, cotangents)

    cotangents = random(num_samples, 6, 3, 4, seed=5)
    expected = pulled_back(lambda *tensors: by_definition(name, *tensors), cotangents)
    with replaced_kernels([]):
        for g in in_every_order(cotangents):
            torch.testing.assert_close(pulled_back(NORMALISATIONS[name], g), expected, rtol=1e-9, atol=1e-9)


class NormWithActivation(nn.BatchNorm2d):
    """Normalises and activates in a forward pass of its own, as in libraries of image networks."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias))


class Tokens(nn.Module):
    """A convolution, a normalisation and a head on the positions of the image as tokens."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3), norm
        self.layer_norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        return self.head(torch.relu(self.layer_norm(tokens)).mean(dim=1))


def tokens(cls: type, **options: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tokens(cls(6, affine=True, **options)).double()
        model(random(20, 2, 6, 6, seed=7))
    return model.eval()


NORMS = [
    (nn.BatchNorm2d, {}),
    (NormWithActivation, {}),
    (nn.InstanceNorm2d, {}),
    (nn.InstanceNorm2d, {"track_running_stats": True}),
]


@pytest.mark.parametrize(("cls", "options"), NORMS)
def test_the_curvature_of_a_network_of_tokens_is_that_from_pairs_of_samples(
    cls: type, options: dict[str, bool]
) -> None:
    model, x, targets = tokens(cls, **options), random(5, 2, 6, 6), torch.arange(5) % 3
    # as many probes as the loss has degrees of freedom are exact
    measured = hessian_trace(model, x, targets, estimator="gauss_newton", num_probes=2, rtol=None)
    exact = dict.fromkeys(measured.layers, 0.0)
    for sample in x:
        logits = model(torch.stack([sample, sample]))[0]
        p = logits.detach().softmax(dim=0)
        values, vectors = torch.linalg.eigh(p.diag() - p.outer(p))
        for root in (vectors * values.clamp_min(0).sqrt()).T:
            gradients = torch.autograd.grad(root @ logits, list(model.parameters()), retain_graph=True)
            for name, gradient in zip(exact, gradients, strict=True):
                exact[name] += float(gradient.square().sum()) / len(x)
    assert {name: float(trace) for name, trace in measured.layers.items()} == pytest.approx(exact, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("cls", "options"), NORMS)
def test_the_fisher_information_of_a_sample_does_not_depend_on_its_batch(cls: type, options: dict[str, bool]) -> None:
    model, x = tokens(cls, **options), random(4, 2, 6, 6)
    together, alone = linearize(model, x), linearize(model, x, chunk_size=1)
    torch.testing.assert_close(
        fim_spectral_norm(alone.logits, alone.gram), fim_spectral_norm(together.logits, together.gram)
    )


def test_functions_of_torch_are_put_back() -> None:
    before = torch.batch_norm, torch.instance_norm
    with replaced_kernels([]), replaced_kernels([]):
        assert torch.batch_norm is not before[0]
        assert F.batch_norm(random(1, 6, 3, 4), MEAN, VAR).is_contiguous()
    assert (torch.batch_norm, torch.instance_norm) == before
