import copy
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_robust.functional import linearize
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
