"""Agreement with other libraries: curvlinops and BackPACK to rounding, PyHessian within its noise."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from lightning_robust.functional import hessian_trace
from tests.helpers.curvature import Case, assert_within, enumerated, enumerated_products, seed, seeded, small

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # linear_operator calls it when imported
    import backpack
    import curvlinops
    import pyhessian
    from backpack import extensions

pytestmark = [
    # torch also calls it at its first forward-mode derivative
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    # BackPACK hooks into modules whose inputs need no gradient
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]


def plain_cnn() -> nn.Module:
    """A CNN of layers that BackPACK supports, none of them in place."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 4),
    )  # fmt: skip


def smooth_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 4))


CASES = {
    "plain_cnn": lambda: seeded(plain_cnn, 1, 6, 6, dtype=torch.float64),
    "smooth_mlp": lambda: seeded(smooth_mlp, 5, dtype=torch.float64),
    "relu_cnn": lambda: small("relu_cnn", dtype=torch.float64),
    "tanh_mlp": lambda: small("tanh_mlp", dtype=torch.float64),
}
every_case = pytest.mark.parametrize("name", CASES)
known_to_backpack = pytest.mark.parametrize("name", ["plain_cnn", "smooth_mlp"])


def traces_of_operator(kind: type, case: Case) -> dict[str, float]:
    """Traces of the blocks of an operator, from its products with all unit vectors."""
    model = copy.deepcopy(case.model).eval()
    names, parameters = zip(*model.named_parameters(), strict=True)
    operator = kind(model, nn.CrossEntropyLoss(), list(parameters), [(case.inputs, case.targets)])
    diagonal = (operator @ torch.eye(operator.shape[1], dtype=torch.float64)).diagonal()
    blocks = diagonal.split([parameter.numel() for parameter in parameters])
    return {name: float(block.sum()) for name, block in zip(names, blocks, strict=True)}


def traces_by_backpack(extension: type, field: str, case: Case) -> dict[str, float]:
    model = backpack.extend(copy.deepcopy(case.model).eval())
    loss_fn = backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extension()):
        loss_fn(model(case.inputs), case.targets).backward()
    return {name: float(getattr(parameter, field).sum()) for name, parameter in model.named_parameters()}


@every_case
def test_the_gauss_newton_matrix_agrees_with_curvlinops(name: str) -> None:
    case = CASES[name]()
    expected = traces_of_operator(curvlinops.GGNLinearOperator, case)
    assert enumerated(case) == pytest.approx(expected, rel=1e-9)
    assert_within(hessian_trace(*case, estimator="gauss_newton", num_probes=16, rtol=None, generator=seed(0)), expected)


@every_case
def test_the_hessian_agrees_with_curvlinops(name: str) -> None:
    case = CASES[name]()
    expected = traces_of_operator(curvlinops.HessianLinearOperator, case)
    assert enumerated_products(case, residual=False) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert_within(hessian_trace(*case, num_probes=24, rtol=None, generator=seed(0)), expected)


@known_to_backpack
def test_the_gauss_newton_matrix_agrees_with_backpack(name: str) -> None:
    case = CASES[name]()
    expected = traces_by_backpack(extensions.DiagGGNExact, "diag_ggn_exact", case)
    assert enumerated(case) == pytest.approx(expected, rel=1e-9)


@known_to_backpack
def test_the_hessian_agrees_with_backpack(name: str) -> None:
    case = CASES[name]()
    expected = traces_by_backpack(extensions.DiagHessian, "diag_h", case)
    assert enumerated_products(case, residual=False) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@every_case
def test_the_total_agrees_with_pyhessian(name: str) -> None:
    case = CASES[name]()
    model = copy.deepcopy(case.model).eval()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
        torch.manual_seed(0)
        peer = pyhessian.hessian(model, nn.CrossEntropyLoss(), data=(case.inputs, case.targets), cuda=False)
        probes = torch.tensor(peer.trace(maxIter=200, tol=-math.inf))
    ours = hessian_trace(*case, num_probes=24, rtol=None, generator=seed(0))
    noise = float(probes.var() / len(probes) + ours.total_stderr**2) ** 0.5
    assert len(probes) == 200
    assert abs(float(ours.total) - float(probes.mean())) <= 3 * noise
