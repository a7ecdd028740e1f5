"""Dense float64 oracles, by paths that share nothing with the package: one sample at a time, D × D matrices."""

import copy

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian


def score_jacobian(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (C,) and scores ∇_x log p_c (C, D) of one sample, in float64, eval mode."""
    model = copy.deepcopy(model).double().eval()

    def log_probs(flat: Tensor) -> Tensor:
        return model(flat.view(1, *x.shape).clone())[0].log_softmax(0)

    flat = x.double().flatten()
    return log_probs(flat).exp().detach(), jacobian(log_probs, flat)


def dense_fisher(model: nn.Module, x: Tensor, *, scale: float = 1.0) -> Tensor:
    """The full D × D input Fisher information of one sample, Σ_c p_c g_c g_cᵀ, of the model with logits × scale."""
    probs, scores = score_jacobian(_scaled(model, scale), x)
    return torch.einsum("c,cd,ce->de", probs, scores, scores)


def dense_spectral_norms(model: nn.Module, inputs: Tensor, *, scale: float = 1.0) -> Tensor:
    return torch.stack([torch.linalg.eigvalsh(dense_fisher(model, x, scale=scale))[-1] for x in inputs])


def dense_traces(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.stack([dense_fisher(model, x).trace() for x in inputs])


def dense_margins(model: nn.Module, inputs: Tensor, targets: Tensor, *, dual: float) -> Tensor:
    """Linearised margins from one gradient per pair of classes, each of its own backward pass."""
    model = copy.deepcopy(model).double().eval()
    margins = []
    for x, y in zip(inputs.double(), targets.tolist(), strict=True):
        logits = model(x[None].clone())[0]
        if logits.argmax() != y:
            margins.append(0.0)
            continue
        candidates = []
        for k in range(len(logits)):
            if k == y:
                continue
            leaf = x[None].clone().requires_grad_()
            out = model(leaf.clone())[0]
            gap = out[y] - out[k]
            (gradient,) = torch.autograd.grad(gap, leaf)
            candidates.append(float(gap.detach() / torch.linalg.vector_norm(gradient, ord=dual)))
        margins.append(min(candidates))
    return torch.tensor(margins, dtype=torch.float64)


def jacobian_by_differences(model: nn.Module, inputs: Tensor, *, step: float = 1e-6) -> Tensor:
    """``∂z/∂x`` (N, C, D) in float64 by central differences: two forward passes per feature, no autograd."""
    model = copy.deepcopy(model).double().eval()
    columns = []
    with torch.no_grad():
        for d in range(inputs[0].numel()):
            shift = torch.zeros(inputs[0].numel(), dtype=torch.float64)
            shift[d] = step
            up, down = (model(inputs.double() + sign * shift.view(inputs.shape[1:])) for sign in (1, -1))
            columns.append((up - down) / (2 * step))
    return torch.stack(columns, dim=2)


class Scaled(nn.Module):
    """A network whose logits are multiplied by a constant: the same decisions, another confidence."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.scale


def _scaled(model: nn.Module, scale: float) -> nn.Module:
    return model if scale == 1.0 else Scaled(model, scale)
