"""How long a measurement will take, told before it takes long.

A linearisation takes a backward pass for each class. The time of a few, on as many samples as pass through the network
together, tells the time of all. With many classes the algebra on C × C matrices counts as well; it is timed on as
many samples and classes as take a moment. Ordinary networks pay nothing for this: the passes that look for flaws give
a bound, and only where that is long is anything timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._isolation.stand_ins import full_precision
from lightning_robust.functional.input_space.jacobian import (
    BoxConstraint,
    gram_and_gaps,
    gram_matrix,
    leaf_and_logits,
    samples_at_once,
)
from lightning_robust.functional.input_space.likelihoods import column_likelihood_of
from lightning_robust.functional.input_space.queries import QUERIES_BESIDE
from lightning_robust.functional.input_space.units import Units
from lightning_robust.metrics import ProbeMetric
from lightning_robust.probe import Probe

_LONG = 10.0  # seconds
_MUCH = 2**30  # bytes
_FEWEST = 16  # samples that are worth measuring
_PASSES_OF_TEN_CLASSES = 16  # forward passes that the gradients of eleven classes take, with that which chooses them
_PASSES_OF_POSITIONS = 1.5  # times those of other samples, because sequences take more products
_MANY_LOGITS = 2**23  # of all sequences: the algebra of fewer takes a few seconds
_OF_THREE = 4  # forward passes that those three take that find flaws, with about a backward pass
_FEW_CLASSES = 4  # whose gradients are timed
# Multiplications in the inner products that are timed, and entries of these: as many classes and samples as take a
# moment. A call with few of them takes the time of the call itself, which would be scaled up.
_PRODUCTS, _ENTRIES = 2**31, 2**25
_RUNS, _LONG_ENOUGH = 3, 1.0  # how often each is timed, and after how many seconds no more


def on_cost(
    metrics: Sequence[ProbeMetric], probe: Probe, outputs: Tensor, *, num_samples: int, seconds: float
) -> list[str]:
    """Tell time and memory of a measurement if it takes long or much.

    Args:
        metrics: What will be measured.
        probe: The first samples.
        outputs: Outputs of the network for some of them.
        num_samples: Samples that this process will measure.
        seconds: How long three forward passes of these samples took, and with them about a backward pass.
    """
    num_classes = outputs.shape[1] if outputs.ndim == 2 else 0
    linearizations = len({name for metric in metrics for name in metric.linearizations})
    if probe.queries is not None:
        return _of_queries(probe, num_samples, seconds / 3 / len(outputs)) if linearizations else []
    if probe.takes_krylov(num_classes):
        return _by_krylov(metrics, probe, outputs, num_samples=num_samples, seconds=seconds / len(outputs))
    fewest = column_likelihood_of(probe.likelihood, probe.tolerance).fewest_outputs
    if not linearizations or num_classes < fewest or not probe.inputs.is_floating_point():
        return []
    each = sum(metric.seconds_per_sample(outputs) for metric in metrics)
    at_most = each + linearizations * num_classes * seconds / len(outputs)
    expected = 0.0
    if at_most * num_samples > _LONG:
        expected = (each + linearizations * _seconds_of_classes(probe, num_classes)) * num_samples
    memory = sum(metric.bytes_per_sample(num_classes) for metric in metrics) * num_samples
    if expected <= _LONG and memory <= _MUCH:
        return []
    one, many = ("class", "classes") if fewest > 1 else ("output", "outputs")
    what = f"{num_samples} samples × {num_classes} {many}, with a backward pass for each {one}"
    return [_sentence(expected, memory, num_samples, what, f"leaves the {many} out")]


def _by_krylov(
    metrics: Sequence[ProbeMetric], probe: Probe, outputs: Tensor, *, num_samples: int, seconds: float
) -> list[str]:
    """Tell the time of a measurement that finds λ in Krylov subspaces if it takes long."""
    at_positions, passes = probe.reading.likelihood.has_positions, sum(metric.krylov_passes for metric in metrics)
    names = {name for metric in metrics if not metric.krylov_passes for name in metric.linearizations}
    if at_positions:
        passes *= _PASSES_OF_POSITIONS
    else:  # margins of labels and numbers look at all of them
        passes += (_PASSES_OF_TEN_CLASSES if probe.reading.has_classes else outputs.shape[1]) * len(names)
    are_many = at_positions and outputs[0].numel() * num_samples > _MANY_LOGITS
    algebra = sum(metric.seconds_per_sample(outputs) for metric in metrics) if are_many else 0.0
    if (passes * seconds + algebra) * num_samples <= _LONG:
        return []
    of_pass = seconds / _OF_THREE if at_positions else _seconds_of_classes(probe, _FEW_CLASSES) / _FEW_CLASSES
    expected = (passes * of_pass + algebra) * num_samples
    what = f"{num_samples} samples, with about {passes:.0f} forward passes for each"
    what += ", and the algebra of its logits" if are_many else ""
    without = "measures no gradients of the inputs"
    return [_sentence(expected, 0.0, num_samples, what, without)] if expected > _LONG else []


def _of_queries(probe: Probe, num_samples: int, seconds: float) -> list[str]:
    """Tell the time of a measurement by queries if it takes long; ``seconds`` is that of one."""
    assert probe.queries is not None
    count = 2 * min(probe.queries, probe.inputs[0].numel()) + QUERIES_BESIDE
    expected = count * num_samples * seconds
    if expected <= _LONG:
        return []
    fewer = max(_FEWEST, 2 ** math.floor(math.log2(num_samples * _LONG / expected)))
    return [
        f"The first measurement takes about {_rounded(expected)} s: {num_samples} samples × {count} queries."
        f" `RobustnessMonitor(max_samples={fewer})` takes about {_rounded(expected * fewer / num_samples)} s,"
        " `every_n_epochs=5` measures less often, and a probe with fewer `queries` is less certain."
    ]


def _seconds_of_classes(probe: Probe, num_classes: int) -> float:
    """Time that the gradients of all classes, and what a linearisation makes of them, take for one sample."""
    few = min(num_classes, _FEW_CLASSES)
    with differentiable(probe.model):
        x = full_precision(probe.inputs)
        rows = slice(samples_at_once(x, probe.chunk_size, num_classes=num_classes))
        units = Units.of(x, std=probe.input_std, mean=probe.input_mean, valid_range=probe.valid_range)
        box = BoxConstraint.of(x[rows], units)
        kind = column_likelihood_of(probe.likelihood, probe.tolerance)
        leaf, logits = leaf_and_logits(probe.network.on(rows), x[rows], check=kind.check_outputs)

        def gradients_of_few() -> Tensor:
            _, gram, gap_l1 = gram_and_gaps(logits[:, :few], leaf, units.std, box, likelihood=kind)
            return gram if gap_l1 is None else gap_l1

        of_few = _best(gradients_of_few)
    size = max(1, x[0].numel())
    some = max(few, min(num_classes, math.isqrt(_PRODUCTS // size)))
    together = min(len(leaf), max(1, _PRODUCTS // (size * some**2)), max(1, _ENTRIES // some**2))
    gradients = x[:together].reshape(-1, 1, size).expand(-1, some, size).contiguous()

    def products() -> Tensor:
        gram = gram_matrix(gradients)
        return torch.cat([gram]).isfinite()  # large matrices take as long to copy and to check as to multiply

    of_products = _best(products) / len(gradients)
    return of_few / len(leaf) * num_classes / few + of_products * (num_classes / some) ** 2


def _best(step: Callable[[], Tensor]) -> float:
    """The shortest of a few runs, because the first loads libraries and touches new memory; one, if it takes long."""
    times: list[float] = []
    while len(times) < _RUNS and sum(times) < _LONG_ENOUGH:
        start = time.perf_counter()
        float(step().flatten()[0])  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times)


def _sentence(seconds: float, memory: float, num_samples: int, what: str, without: str) -> str:
    takes = [f"about {_rounded(seconds)} s"] if seconds > _LONG else []
    takes += [f"about {_rounded(memory / 1e9)} GB of memory"] if memory > _MUCH else []
    share = max(seconds / _LONG, memory / _MUCH)
    fewer = max(_FEWEST, 2 ** math.floor(math.log2(num_samples / share)))
    less = [f"{_rounded(seconds * fewer / num_samples)} s"] if seconds > _LONG else []
    less += [f"{_rounded(memory * fewer / num_samples / 1e9)} GB"] if memory > _MUCH else []
    lower = f"`RobustnessMonitor(max_samples={fewer})` takes about {' and '.join(less)}, "
    return (
        f"The first measurement takes {' and '.join(takes)}: {what}. {lower if fewer < num_samples else ''}"
        "`every_n_epochs=5` measures less often, and"
        f' `RobustnessMonitor(["hessian_trace", "weight_curvature_index"])` {without}.'
    )


def _rounded(number: float) -> str:
    """Two significant digits, without an exponent."""
    digits = 1 - math.floor(math.log10(number)) if number > 0 else 0
    return f"{round(number, digits):.{max(0, digits)}f}" if digits > 0 else f"{round(number, digits):.0f}"
