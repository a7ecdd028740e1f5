"""Dense float64 references, which no chunking, eval-mode cache or kernel of a single sample can mislead."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_robust import RobustnessMonitor
from lightning_robust.functional import hessian_trace
from tests.helpers.training import trainer

NUM_CLASSES = 4
_PROBES = 24  # of the reference's own Hutchinson estimate


def double(network: nn.Module) -> nn.Module:
    """A copy in float64, with nothing that an earlier pass may have left in it."""
    return copy.deepcopy(network).double().eval()


def spectral_norms(logits: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """λ of each sample (N,) from its whole Jacobian, in a batch of two of the same."""

    def of(row: Tensor) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(lambda v: logits(v[None].repeat(2, *(1,) * v.ndim))[0], row)
        jacobian = jacobian.reshape(len(jacobian), -1)
        p = logits(row[None].repeat(2, *(1,) * row.ndim))[0].detach().softmax(dim=0)
        factor = p.sqrt()[:, None] * (torch.eye(len(p), dtype=p.dtype) - p)
        return torch.linalg.eigvalsh(factor @ jacobian @ jacobian.T @ factor.T)[-1]

    return torch.stack([of(row) for row in x])


def gauss_newton_traces(network: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Exact trace of the Gauss–Newton matrix of the mean cross-entropy, for each parameter that the logits reach."""
    weights = dict(network.named_parameters())
    probs = logits.detach().softmax(dim=1)
    traces = {name: torch.zeros((), dtype=torch.float64) for name in weights}
    reached = set()
    for z, p in zip(logits, probs, strict=True):
        mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for c in range(len(z)):
            gradients = torch.autograd.grad(z[c], list(weights.values()), retain_graph=True, allow_unused=True)
            for (name, _), gradient in zip(weights.items(), gradients, strict=True):
                if gradient is not None:
                    reached.add(name)
                    traces[name] += p[c] * gradient.square().sum()
                    mean[name] += p[c] * gradient
        for name in weights:
            traces[name] -= mean[name].square().sum()
    return {name: traces[name] / len(logits) for name in weights if name in reached}


def hessian_total(network: nn.Module, logits: Tensor, y: Tensor) -> tuple[float, float]:
    """Trace of the Hessian of the mean cross-entropy by random signs, with its standard error."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    loss, generator = nn.functional.cross_entropy(logits, y), torch.Generator().manual_seed(1)
    slopes = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
    forms = []
    for _ in range(_PROBES):
        signs = [torch.randint(2, w.shape, generator=generator).to(w) * 2 - 1 for w in weights]
        product = torch.stack([(s * v).sum() for s, v in zip(slopes, signs, strict=True) if s.requires_grad]).sum()
        products = torch.autograd.grad(product, weights, retain_graph=True, materialize_grads=True)
        forms.append(sum((p * v).sum() for p, v in zip(products, signs, strict=True)))
    values = torch.stack([torch.as_tensor(form) for form in forms])
    return float(values.mean()), float(values.std() / _PROBES**0.5)


class Validated(LightningModule):
    """An ordinary module around somebody else's network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor, **batch: Tensor) -> Any:
        """Whatever the network returns."""
        return self.network(*inputs, **batch)

    def logits_of(self, batch: Any) -> Tensor:
        """Logits in the validation step."""
        z: Tensor = self(batch[0])
        return z

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the accuracy."""
        labels = batch["labels"] if isinstance(batch, dict) else batch[1]
        self.log("val_acc", (self.logits_of(batch).argmax(dim=1) == labels).float().mean())


def monitored(module: Validated, rows: list[Any], root: Any, **loader: Any) -> RobustnessMonitor:
    """Validate a module with the monitor in one line."""
    monitor = RobustnessMonitor(on_error="raise")
    run = trainer(monitor, root=root)
    run.validate(module, DataLoader(rows, **{"batch_size": 3} | loader), verbose=False)
    assert run.callback_metrics["robust/num_samples"] == len(rows)
    return monitor


def check_traces(network: nn.Module, call: Callable[[nn.Module], Tensor], x: Tensor, y: Tensor, **options: Any) -> None:
    """Compare exact Gauss–Newton traces of all layers, and the total of the Hessian, with the references.

    ``call`` maps the float64 copy to the logits of all samples, on a graph.
    """
    reference = double(network)
    exact = gauss_newton_traces(reference, call(reference))
    total = float(sum(exact.values()))
    every = hessian_trace(network, x, y, estimator="gauss_newton", num_probes=NUM_CLASSES - 1, rtol=None, **options)
    assert every.layers.keys() == exact.keys()
    for name, trace in exact.items():  # as many probes as columns leave nothing to chance
        assert float(every.layers[name]) == pytest.approx(float(trace), rel=1e-4, abs=1e-6 * total), name
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        total, own = hessian_total(reference, call(reference), y)
    hessian = hessian_trace(network, x, y, num_probes=8, rtol=None, **options)
    error = float((hessian.total_stderr.square() + own**2).sqrt())
    assert abs(float(hessian.total) - total) <= 3 * error + 1e-4 * abs(total)
