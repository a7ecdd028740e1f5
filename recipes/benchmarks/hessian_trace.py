"""How long does the Hessian trace take, to a standard error of 5 %, in this package, PyHessian and curvlinops?

    python -m recipes.benchmarks.hessian_trace

Measures CPU time of one thread. The matrix is the Hessian of a batch's mean loss with respect to the weights of a
ResNet-20. It is trained on CIFAR-10 if the folder ``LIGHTNING_ROBUST_DATA`` has its weights, and otherwise briefly on
digits. Each round runs all estimators in turn.

This package decides by itself when to stop. The others are told how many matrix-vector products they need. That follows
from the eigenvalues of the Gauss–Newton matrix (GGN): ``2 Σλ² / (rtol Σλ)²`` for Hutchinson's estimator, and for
Hutch++ and XTrace the number at which the root mean square error of 200 runs on the diagonal matrix of eigenvalues
falls below ``rtol``. The Hessian has the same trace and a larger norm, but is granted the same numbers.

BackPACK is left out: its exact diagonal takes three to four times as long as this package, and needs a network of
modules it knows.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import fmean, median
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F

from lightning_robust.functional import hessian_trace
from recipes.benchmarks.timing import timed
from recipes.common.cifar import DATA
from recipes.common.command_line import parser
from recipes.common.networks import CifarResNet, initialised
from recipes.common.zoo import cifar_classifier

PEERS = {name: importlib.import_module(name) for name in ("pyhessian", "curvlinops") if find_spec(name)}
TURNS = {"hutchinson_trace": 1, "hutchpp_trace": 3, "xtrace": 2}  # curvlinops' estimators multiply in so many turns
SOME = 8  # probes of Hutchinson's estimator in a round; their time is extrapolated to all that it needs
Run = tuple[float, float, float]  # seconds to the standard error, trace, products


def trained_network() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a trained network in eval mode, images and labels."""
    if (DATA / "models" / "cifar10_resnet20.pth").is_file():
        network, images, labels = cifar_classifier("resnet20", DATA / "models", num_samples=1000)
        return network.eval(), images, labels
    print(f"No CIFAR-10 weights in {DATA}: training on digits for 3 epochs.")
    network = initialised(CifarResNet(20), seed=0)
    pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = F.interpolate(pixels.float().view(-1, 1, 8, 8) / 16, scale_factor=4).expand(-1, 3, -1, -1)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for rows in torch.split(torch.cat([torch.randperm(len(x)) for _ in range(3)]), 64):
        network.zero_grad()
        torch.autograd.backward(F.cross_entropy(network(x[rows]), labels[rows]))
        optimizer.step()
    network.zero_grad()
    return network.eval(), x, labels


def gauss_newton_eigenvalues(network: nn.Module, x: Tensor) -> Tensor:
    """Return the eigenvalues of the Gauss–Newton matrix of the mean cross-entropy that its rank leaves, (N · C,)."""

    def root(image: Tensor) -> Tensor:
        parts = jacrev(lambda w: functional_call(network, w, (image[None],))[0])(dict(network.named_parameters()))
        jacobian = torch.cat([part.flatten(1) for part in parts.values()], dim=1)
        p = network(image[None]).softmax(dim=1)
        return torch.mul(p.sqrt().T, jacobian - p @ jacobian)

    with torch.no_grad():
        rows = vmap(root, chunk_size=8)(x).flatten(0, 1)
        return torch.clamp_min(torch.linalg.eigvalsh((rows @ rows.T).double() / len(x)).float(), 0)


def products_needed(name: str, turns: int, spectrum: Tensor, rtol: float, budget: int) -> int:
    """Return the products that curvlinops' Hutch++ or XTrace needs for an error below ``rtol``; 0 beyond the budget."""
    for products in range(2 * turns, min(budget, len(spectrum) - 1) + 1, turns):
        traces = [getattr(PEERS["curvlinops"], name)(spectrum.diag(), products, "normal") for _ in range(200)]
        if (torch.stack(traces) / spectrum.sum() - 1).square().mean().sqrt() < rtol:
            return products
    print(f"curvlinops, {name}: needs more than {budget} products, and is left out.")
    return 0


def estimators(
    network: nn.Module, x: Tensor, y: Tensor, spectrum: Tensor, rtol: float, budget: int
) -> dict[str, Callable[[], Run]]:
    """Return the estimator of this package and those of the peers that are installed."""
    loss, weights = nn.CrossEntropyLoss(), list(network.parameters())
    probes = math.ceil(2 * float(spectrum.square().sum()) / (rtol * float(spectrum.sum())) ** 2)

    def ours(**arguments: Any) -> Run:
        seconds, estimate = timed(lambda: hessian_trace(network, x, y, rtol=rtol, **arguments))
        return seconds, float(estimate.total), estimate.num_probes

    def pyhessian() -> Run:
        set_up, hessian = timed(lambda: PEERS["pyhessian"].hessian(network, loss, data=(x, y), cuda=False))
        seconds, values = timed(lambda: hessian.trace(maxIter=SOME, tol=0.0))
        network.zero_grad()  # gradients hold the graph
        return set_up + seconds * probes / len(values), fmean(values), probes

    def curvlinops(kind: str, name: str, products: int, columns: int, needed: int) -> Run:
        size = max(1, 128 // columns)  # images in one pass; the fastest size on a CPU
        chunks = list(zip(torch.split(x, size), torch.split(y, size), strict=True))
        operator = getattr(PEERS["curvlinops"], kind)(network, loss, weights, chunks, check_deterministic=False)
        seconds, value = timed(lambda: getattr(PEERS["curvlinops"], name)(operator, products))
        return seconds * needed / products, float(value), needed

    other = partial(ours, generator=torch.Generator().manual_seed(0))
    runs: dict[str, Callable[[], Run]] = {"ours": ours, "ours, other signs": other}
    if "pyhessian" in PEERS:
        runs["PyHessian"] = pyhessian
    for name, turns in TURNS.items() if "curvlinops" in PEERS else ():
        needed = probes if turns == 1 else products_needed(name, turns, spectrum, rtol, budget)
        taken = SOME if turns == 1 else needed
        for kind in ("Hessian", "GGN") if needed else ():
            plan = partial(curvlinops, f"{kind}LinearOperator", name, taken, taken // turns, needed)
            runs[f"curvlinops, {kind}, {name}"] = plan
    return runs


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--batch-size", type=int, default=128, help="images in the batch")
    arguments.add_argument("--rounds", type=int, default=3, help="rounds of measurements")
    arguments.add_argument("--rtol", type=float, default=0.05, help="standard error, as a share of the trace")
    arguments.add_argument("--budget", type=int, default=120, help="most products that Hutch++ and XTrace may take")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # PyHessian warns about its own second derivatives
    if len(PEERS) < 2:
        found = " and ".join(PEERS) or "neither peer"
        print(f"Found {found}. To install the others: `pip install --no-deps -r requirements-peers.txt`.")
    network, images, labels = trained_network()
    x, y = images[: options.batch_size], labels[: options.batch_size]
    spectrum = gauss_newton_eigenvalues(network, x)
    runs = estimators(network, x, y, spectrum, options.rtol, options.budget)
    runs["ours"]()  # warm up
    rounds, forwards = [], []
    for _ in range(options.rounds):
        forwards.append(timed(partial(torch.no_grad()(network), x))[0])
        rounds.append({name: run() for name, run in runs.items()})
    trace, forward = float(spectrum.sum()), median(forwards)
    print(f"{len(x)} images, standard error {options.rtol:.0%}, trace {trace:.5g}, forward pass {forward:.3f} s")
    print(f"{'':36}products   seconds   forward passes   times ours         trace, mean of rounds")
    ratios = {}
    for name in runs:
        seconds, traces, products = torch.tensor([row[name] for row in rounds]).T
        each = seconds / torch.tensor([row["ours"][0] for row in rounds])
        ratios[name] = float(each.median())
        text = f"{products.mean():8.3g}{seconds.median():10.1f}{seconds.median() / forward:17.0f}{ratios[name]:13.1f}"
        mean = f"{traces.mean():.0f} ± {traces.std() / len(rounds) ** 0.5:.0f}"
        print(f"{name:36}{text} ({each.min():.1f} to {each.max():.1f})   {mean}")
    draws = torch.tensor([runs["ours, other signs"]() for _ in range(12)])
    error = (draws[:, 1] / trace - 1).square().mean().sqrt()
    seconds, _, probes = draws.mean(dim=0)
    print(
        f"ours: error {rounds[0]['ours'][1] / trace - 1:+.1%}; root mean square of 12 draws of other signs {error:.1%},"
    )
    print(f"  which took {probes:.2g} probes and {seconds / forward:.0f} forward passes on average")
    if best := min((name for name in runs if not name.startswith("ours")), key=ratios.__getitem__, default=""):
        print(f"ours is {ratios[best]:.1f} times as fast as the fastest peer ({best})")


if __name__ == "__main__":
    main()
