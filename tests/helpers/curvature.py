"""Networks small enough for dense Hessians, and assertions on how close to those an estimate must be."""

from collections.abc import Callable, Sequence
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from lightning_robust.functional import TraceEstimate
from lightning_robust.functional._isolation.weights import differentiable_weights
from lightning_robust.functional._validation.extras import SampleModel
from lightning_robust.functional.curvature import _hutchinson
from lightning_robust.functional.curvature._sample_gradients import SampleGradients
from lightning_robust.functional.curvature.losses import LossFn, SampleLoss
from lightning_robust.functional.curvature.plan import Plan
from lightning_robust.functional.curvature.problem import CurvatureProblem
from lightning_robust.functional.curvature.signs import ProbeSeeds


class Case(NamedTuple):
    """A network, inputs and class indices: the positional arguments of ``hessian_trace``."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor


def relu_cnn(num_classes: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


def relu_mlp(num_classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, num_classes))


def tanh_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 4))


class GeluAttention(nn.Module):
    """A transformer encoder with GELU and LayerNorm over (N, T, E), which torch runs in a fused kernel by default."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(
            8, nhead=2, dim_feedforward=12, dropout=0.3, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(dim=1))


class SelfAttention(nn.Module):
    """Attention that does not return its weights, followed by LayerNorm and GELU, over (N, T, E)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.norm(x + attended).mean(dim=1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu_mlp": (relu_mlp, (5,)),
    "relu_cnn": (relu_cnn, (1, 6, 6)),
    "relu_cnn of ten": (lambda: relu_cnn(num_classes=10), (1, 6, 6)),
    "tanh_mlp": (tanh_mlp, (5,)),
    "gelu_attention": (GeluAttention, (3, 8)),
    "self_attention": (SelfAttention, (3, 8)),
}
CURVED = ("tanh_mlp", "gelu_attention", "self_attention")


def small(name: str, *, num_samples: int = 12, dtype: torch.dtype = torch.float32) -> Case:
    """A network in train mode with running statistics, inputs, and targets that equal two thirds of its predictions."""
    factory, shape = NETWORKS[name]
    return seeded(factory, *shape, num_samples=num_samples, dtype=dtype)


def seeded(
    factory: Callable[[], nn.Module], *shape: int, num_samples: int = 12, dtype: torch.dtype = torch.float32
) -> Case:
    """A case like those of :func:`small` for any network, on inputs of a shape."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = factory()
        inputs = torch.randn(num_samples, *shape)
        model(1.5 * torch.randn(64, *shape) + 0.3)  # moves the running statistics away from their initial values
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape)).mul_(1.3)
            logits = model.eval()(inputs.clone())
        targets = logits.argmax(dim=1)
        targets[::3] = torch.randint(logits.shape[1], targets[::3].shape)
    return Case(model.train().to(dtype), inputs.to(dtype), targets)


def trained(*, num_samples: int) -> Case:
    """A ReLU network with ten classes, confident on most samples, so that few samples make most of the trace."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, centres = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 10)), 2 * torch.randn(10, 6)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
        for _ in range(300):
            targets = torch.randint(10, (128,))
            loss = nn.functional.cross_entropy(model(centres[targets] + 0.7 * torch.randn(128, 6)), targets)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        optimizer.zero_grad()
        targets = torch.randint(10, (num_samples,))
        return Case(model, centres[targets] + 0.7 * torch.randn(num_samples, 6), targets)


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def assert_within(estimate: TraceEstimate, expected: dict[str, float], *, num_stderr: float = 3.0) -> None:
    """Assert that every layer is within its error bar of the truth, up to rounding in float32."""
    assert list(estimate.layers) == list(expected)
    rounding = 1e-5 * max(map(abs, expected.values()))
    for name, trace in estimate.layers.items():
        allowed = num_stderr * estimate.stderr[name] + rounding
        assert abs(trace - expected[name]) <= allowed, f"{name}: {trace:.5f} for {expected[name]:.5f} ± {allowed:.5f}"
    total = sum(expected.values())
    assert abs(estimate.total - total) <= num_stderr * estimate.total_stderr + rounding


def assert_same(actual: TraceEstimate, expected: TraceEstimate, *, rtol: float = 1e-5) -> None:
    """Assert that all numbers of two estimates agree, error bars included; names may differ."""
    atol = rtol * float(max(value.abs() for value in expected.layers.values()))
    for field in ("layers", "stderr", "sample_stderr", "total", "total_stderr", "total_sample_stderr"):
        ours, theirs = getattr(actual, field), getattr(expected, field)
        pairs = zip(ours.values(), theirs.values(), strict=True) if isinstance(ours, dict) else [(ours, theirs)]
        for pair in pairs:
            torch.testing.assert_close(*pair, rtol=rtol, atol=atol, equal_nan=True)
    assert actual.num_probes == expected.num_probes
    assert list(actual.estimator.values()) == list(expected.estimator.values())
    assert list(actual.matrix.values()) == list(expected.matrix.values())


def enumerated(case: Case, loss_fn: LossFn | None = None) -> dict[str, float]:
    """Gauss–Newton traces without randomness, from the columns of the root in place of random signs."""
    loss = SampleLoss(loss_fn)
    assert loss.root is not None
    with differentiable_weights(case.model, loss_fn) as weights:
        model = SampleModel(case.model, None, num_samples=len(case.inputs))
        gradients = SampleGradients(model, weights, tuple(weights.tensors))
        with torch.no_grad():
            outputs = case.model(case.inputs.clone())
        columns = torch.eye(outputs[0].numel()).unsqueeze(1).expand(-1, len(outputs), -1)
        cotangents = loss.root.times(columns, outputs, case.targets)
        norms = gradients.squared_norms(case.inputs, torch.arange(len(case.inputs)), cotangents).sum(dim=0)  # (N, L)
        traces = norms.sum(dim=0) / loss.weights(outputs, case.targets).sum()
        return dict(zip(weights.tensors, traces.tolist(), strict=True))


def enumerated_products(case: Case, loss_fn: LossFn | None = None, *, residual: bool) -> dict[str, float]:
    """Traces of the Hessian, or of its residual, without randomness, from unit vectors in place of signs."""
    names = tuple(name for name, _ in case.model.named_parameters())
    size = sum(parameter.numel() for parameter in case.model.parameters())

    def unit_vectors(tensors: Sequence[Tensor], *keys: int) -> list[Tensor]:
        vector = torch.zeros(size, dtype=torch.float64)
        vector[keys[-1]] = 1  # the number of the probe
        pieces = vector.split([tensor.numel() for tensor in tensors])
        return [piece.view_as(tensor).to(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]

    problem = CurvatureProblem(*case, estimator="hutchinson", loss_fn=loss_fn)
    seeds = ProbeSeeds([0] * len(case.inputs), [0] * len(case.inputs))
    with mock.patch.object(_hutchinson, "weight_signs", unit_vectors), problem.examined() as examined:
        if residual:
            examined.plan = Plan(names, names)
        sums = examined.sums(seeds, (range(0), range(size)))
    return dict(zip(names, (size * sums.means()).tolist(), strict=True))


def enumerated_hessian(case: Case, loss_fn: LossFn | None = None) -> dict[str, float]:
    """Traces of the Hessian without randomness: Gauss–Newton matrix plus residual."""
    gauss_newton = enumerated(case, loss_fn)
    residual = enumerated_products(case, loss_fn, residual=True)
    return {name: trace + residual[name] for name, trace in gauss_newton.items()}
