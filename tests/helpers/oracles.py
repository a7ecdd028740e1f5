"""Dense float64 oracles that share no code with the package: one sample at a time, with D × D matrices."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[Tensor, Tensor], Tensor]


def score_jacobian(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (C,) and scores ∇_x log p_c (C, D) of one sample, in float64, eval mode."""
    model = copy.deepcopy(model).double().eval()

    def log_probs(flat: Tensor) -> Tensor:
        return model(flat.view(1, *x.shape).clone())[0].log_softmax(0)

    flat = x.double().flatten()
    return log_probs(flat).exp().detach(), jacobian(log_probs, flat)


def dense_fisher(model: nn.Module, x: Tensor, *, scale: float = 1.0) -> Tensor:
    """Full D × D input Fisher information of one sample, Σ_c p_c g_c g_cᵀ, for logits × scale."""
    probs, scores = score_jacobian(_scaled(model, scale), x)
    return torch.einsum("c,cd,ce->de", probs, scores, scores)


def dense_spectral_norms(model: nn.Module, inputs: Tensor, *, scale: float = 1.0) -> Tensor:
    return torch.stack([torch.linalg.eigvalsh(dense_fisher(model, x, scale=scale))[-1] for x in inputs])


def dense_traces(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.stack([dense_fisher(model, x).trace() for x in inputs])


def dense_margins(model: nn.Module, inputs: Tensor, targets: Tensor, *, dual: float) -> Tensor:
    """Linearised margins from one gradient per pair of classes, each with its own backward pass."""
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


def dense_hessian_traces(model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: Loss) -> dict[str, float]:
    """Trace of the full Hessian of the loss of the whole batch, for each trained parameter tensor."""
    model, x, y, loss_fn = _double(model, inputs, targets, loss_fn)

    def trace(name: str, tensor: Tensor) -> float:
        def loss(values: Tensor) -> Tensor:
            return loss_fn(functional_call(model, {name: values}, (x.clone(),)), y)

        with _forward_over_reverse():
            return float(hessian(loss)(tensor).detach().reshape(tensor.numel(), -1).trace())

    return {name: trace(name, tensor) for name, tensor in _trained(model).items()}


def dense_gauss_newton_traces(model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: Loss) -> dict[str, float]:
    """Mean over samples of ``tr JᵀAJ`` for each trained parameter tensor, from whole Jacobians and matrices ``A``."""
    model, xs, ys, loss_fn = _double(model, inputs, targets, loss_fn)
    traces = dict.fromkeys(_trained(model), 0.0)
    for x, y in zip(xs.split(1), ys.split(1), strict=True):
        with torch.no_grad():
            z = model(x.clone())
        with _forward_over_reverse():
            curvature = hessian(lambda z, y=y: loss_fn(z, y))(z).reshape(z.numel(), z.numel())
        for name, tensor in _trained(model).items():
            with _forward_over_reverse():
                slopes = jacrev(lambda t, name=name, x=x: functional_call(model, {name: t}, (x.clone(),)))(tensor)
            slopes = slopes.reshape(z.numel(), -1)
            traces[name] += float((slopes * (curvature @ slopes)).detach().sum()) / len(xs)
    return traces


def hessian_traces_by_differences(
    model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: Loss, *, step: float = 1e-5
) -> dict[str, float]:
    """Hessian traces from central differences of first derivatives, for networks without second derivatives."""
    model, x, y, loss_fn = _double(model, inputs, targets, loss_fn)
    traces = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            flat, trace = parameter.data.view(-1), 0.0
            for i in range(len(flat)):
                middle, slopes = float(flat[i]), []
                for sign in (1, -1):
                    flat[i] = middle + sign * step
                    (slope,) = torch.autograd.grad(loss_fn(model(x.clone()), y), parameter, materialize_grads=True)
                    slopes.append(float(slope.view(-1)[i]))
                flat[i] = middle
                trace += (slopes[0] - slopes[1]) / (2 * step)
            traces[name] = trace
    return traces


@contextmanager
def _forward_over_reverse() -> Iterator[None]:
    """Compute attention by its definition, because the fast kernels support neither derivative."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # called by torch at its first jvp
        yield


def _double(model: nn.Module, inputs: Tensor, targets: Tensor, loss_fn: Loss) -> tuple[nn.Module, Tensor, Tensor, Loss]:
    model = copy.deepcopy(model).double().eval()
    if isinstance(loss_fn, nn.Module):
        loss_fn = copy.deepcopy(loss_fn).double()
    return model, inputs.double(), targets.double() if targets.is_floating_point() else targets, loss_fn


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}


class Scaled(nn.Module):
    """A network with its logits multiplied by a constant: the same decisions at a different confidence."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.scale


def _scaled(model: nn.Module, scale: float) -> nn.Module:
    return model if scale == 1.0 else Scaled(model, scale)
