"""One measurement, from the first batch to values that all processes agree on."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import ExitStack
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.memory import is_oom_error
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_robust.callbacks.monitor.calibration import CalibrationSamples, temperature_of
from lightning_robust.callbacks.monitor.muted_logging import muted_logging
from lightning_robust.callbacks.monitor.overhead import Times
from lightning_robust.callbacks.monitor.sample_collection import SampleCollector
from lightning_robust.callbacks.monitor.status import WHOLE, Failure, JointStatus, Status, in_words, synchronised
from lightning_robust.functional import gathered_weights
from lightning_robust.functional._isolation.context import differentiable
from lightning_robust.functional._validation.arguments import class_of
from lightning_robust.metrics import ProbeMetric
from lightning_robust.metrics.keys import leaves_and_folders
from lightning_robust.probe import Probe

Values = dict[int, dict[str, Tensor]]  # of each metric, by its index
OWN_KEYS = frozenset({"num_samples", "seconds", "overhead"})  # that the monitor logs itself
# messages that Lightning does not know
_SHORTAGE = re.compile(
    r"out of memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|could not create a (?:primitive|memory object)$"  # oneDNN; a primitive *descriptor* is missing for other reasons
)


class Measurement:
    """Collects samples, shows them to the metrics, and gathers the values.

    Everything that may fail goes through :meth:`attempt`, which keeps the failure and skips later attempts. A failure
    in one metric does not stop the others. :meth:`update` and :meth:`conclude` issue the same collectives on every
    process, whatever fails on any of them.

    Args:
        metrics: What to measure.
        examine: Sees the samples before the metrics do, with the number of samples that this process measures.
        takes_krylov: Tells of samples that have been examined whether their temperature must be known beforehand.
        on_error: ``"raise"`` raises failures.
        samples_at_once: Bound on the samples that pass through the network together, if one is known.

    Attributes:
        samples_at_once: The bound, lower if memory ran out.
        per_sample: The per-sample values of each metric, by its index, after :meth:`conclude`: copies, float32 on the
            CPU.
        collector: The samples, once their choice is known.
        last_batch: Index of the loader's last batch, where it is known.
    """

    def __init__(
        self,
        metrics: Sequence[ProbeMetric],
        examine: Callable[..., None],
        takes_krylov: Callable[[Probe], bool],
        *,
        on_error: Literal["warn", "raise"],
        samples_at_once: int | None = None,
    ) -> None:
        self._metrics, self._examine, self._on_error = metrics, examine, on_error
        self._takes_krylov = takes_krylov
        self._failures: dict[int, Failure] = {}
        self._seconds = 0.0
        self._updated = False
        self._key: int | None = None  # of this process's samples, where all processes should see the same ones
        self.samples_at_once = samples_at_once
        self.per_sample = Values()
        self.collector: SampleCollector | None = None
        self.last_batch: int | None = None
        self.attempt(self._reset)

    def attempt(self, step: Callable[[], object], *, in_any_case: bool = False) -> None:
        """Take a step on the clock, without a trace in the global random states, unless an earlier one has failed."""
        if WHOLE in self._failures and not in_any_case:
            return
        start = time.perf_counter()
        passing: BaseException | None = None
        with isolate_rng():  # restores nothing if an exception passes through it
            try:
                self._try(WHOLE, step)
            except BaseException as error:
                passing = error
        if passing is not None:
            raise passing
        self._seconds += time.perf_counter() - start

    def _try(self, origin: int, step: Callable[[], object]) -> None:
        try:
            step()
        except Exception as error:
            self._fail(origin, error)

    def _fail(self, origin: int, error: Exception) -> None:
        """Keep the first failure of a metric, by its index, or of the measurement (``WHOLE``)."""
        if self._on_error == "raise":
            raise error
        self._failures.setdefault(origin, Failure.of(error))

    def update(self, pl_module: LightningModule) -> None:
        """Show the collected samples to the metrics, once.

        All processes gather sharded weights, even those on which something has failed.
        """
        if self._updated:
            return
        self._updated = True
        probes: list[Probe] = []
        with ExitStack() as gathered, ExitStack() as shield:
            self.attempt(lambda: gathered.enter_context(gathered_weights(pl_module)), in_any_case=True)
            self.attempt(lambda: self._enter(pl_module, shield))
            self.attempt(lambda: probes.extend(self._examined()))
            self.attempt(self._calibration(probes))
            self.attempt(lambda: self._update(pl_module, probes))
            self.attempt(shield.close, in_any_case=True)

    def _enter(self, pl_module: LightningModule, stack: ExitStack) -> None:
        """Shield the module from what follows."""
        if self.collector is not None:
            for context in (muted_logging(pl_module), differentiable(pl_module, *self.collector.callables())):
                stack.enter_context(context)

    def _examined(self) -> list[Probe]:
        """Probes of the collected samples, after the first look at them."""
        if self.collector is None:
            return []
        if self.collector.presumes:
            self._key = self.collector.key()
        probes = [group.probe() for group in self.collector.groups()]
        examine = functools.partial(self._examine, num_samples=len(self.collector))
        for probe in probes:
            self._show(probe, {WHOLE: examine})
        return probes

    def _calibration(self, probes: list[Probe]) -> Callable[[], None]:
        """Gather what the temperature of all samples depends on, where metrics need it; return the step that fits it.

        A collective, if metrics can need it.
        """
        own: list[CalibrationSamples] = []
        concerned = [number for number, metric in enumerate(self._metrics) if metric.krylov_passes]
        if not concerned:
            return lambda: None

        def call() -> None:
            try:
                own.extend(map(CalibrationSamples.of, filter(self._takes_krylov, probes)))
            except Exception as error:  # other metrics may do without
                for number in concerned:
                    self._fail(number, error)

        self.attempt(call)
        everyone = [samples for part in synchronised(own) for samples in part]

        def fit() -> None:
            if own:
                temperature = temperature_of(everyone)
                probes[:] = [probe.at_temperature(temperature) for probe in probes]

        return fit

    def _update(self, pl_module: LightningModule, probes: list[Probe]) -> None:
        if self.collector is None:
            return
        for metric in self._metrics:  # Metal has no float64 (and does not run several processes)
            metric.to("cpu" if pl_module.device.type == "mps" else pl_module.device)
        viewers = {number: metric.update for number, metric in enumerate(self._metrics)}
        if not probes:  # torchmetrics complains about a metric that is computed without an update
            for metric in self._metrics:
                metric.update(Probe(pl_module, torch.empty(0), torch.empty(0, dtype=torch.long)))
        while probes:  # each keeps what has been computed of it
            self._show(probes.pop(0), viewers)

    def _show(self, probe: Probe, viewers: Mapping[int, Callable[[Probe], object]]) -> None:
        """Show a probe, in parts small enough for the memory, to those viewers that have not failed."""
        if self.samples_at_once is None or len(probe) <= self.samples_at_once:
            self._show_at_once(probe, viewers)
            return
        start = 0
        while start < len(probe):
            stop = start + self.samples_at_once  # memory may run out again on the way
            self._show_at_once(probe.rows(slice(start, stop)), viewers)
            start = stop

    def _show_at_once(self, probe: Probe, viewers: Mapping[int, Callable[[Probe], object]]) -> None:
        """Show a probe as a whole, or in smaller parts from the viewer for which memory runs out."""
        remaining = dict(viewers)
        for number, view in viewers.items():
            if WHOLE in self._failures:
                return
            if number not in self._failures and not self._fits(probe, number, view):
                self.samples_at_once = -(-len(probe) // 2)
                self._show(probe, remaining)
                return
            del remaining[number]

    def _fits(self, probe: Probe, number: int, view: Callable[[Probe], object]) -> bool:
        """Show a probe; False if memory ran out and may last for half of the samples.

        The metric is then unchanged: metrics change their states at the end of an update.
        """
        try:
            view(probe)
        except Exception as error:
            if len(probe) > 1 and ran_out_of_memory(error):
                return False
            self._fail(number, error)
        return True

    def conclude(self, *, times: Callable[[], Times]) -> tuple[JointStatus, Values]:
        """Agree with the other processes, and return the values of those metrics that failed on none of them.

        The metrics are empty afterwards, because some hold much memory.
        """
        status, values = self._agree(times()), Values()
        if WHOLE not in status.failures:
            start = time.perf_counter()
            for number, metric in enumerate(self._metrics):
                if number not in status.failures:  # the same ones on every process, because computing is a collective
                    self._try(number, functools.partial(self._compute, number, metric, values))
            self._seconds += time.perf_counter() - start
            status = self._agree(times())
        self._try(WHOLE, self._reset)
        return status, {number: value for number, value in values.items() if number not in status.failures}

    def _compute(self, number: int, metric: ProbeMetric, values: Values) -> None:
        computed = metric.compute()
        check_keys(computed, {*OWN_KEYS, *(key for earlier in values.values() for key in earlier)})
        self.per_sample[number] = _kept(metric.per_sample)
        values[number] = computed

    def _agree(self, times: Times) -> JointStatus:
        num_samples = 0 if self.collector is None else len(self.collector)
        status = Status(dict(self._failures), num_samples, self._seconds, self._key, times)
        return JointStatus.of(synchronised(status))

    def _reset(self) -> None:
        for metric in self._metrics:
            metric.reset()


def check_keys(keys: Iterable[str], earlier: Set[str]) -> None:
    """Raise unless a metric's keys can be logged beside each other and beside those of earlier metrics."""
    if twice := earlier & set(keys):
        raise ValueError(
            f"Expected each metric to log its own keys, but two log {sorted(twice)[:3]}."
            " Another RobustnessMonitor with another `log_key_prefix` can measure the second."
        )
    if pair := next(leaves_and_folders({*earlier, *keys}), None):
        raise ValueError(
            f"Expected no key to be the folder of another, but got {pair[0]!r} and {pair[1]!r}: loggers that make"
            f" folders of '/' end the training. Rename the second, e.g. to {_beside(*pair)!r}."
        )


def _beside(key: str, below: str) -> str:
    return f"{key}_of{below.removeprefix(key)}"


def _kept(per_sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors: metrics may go on writing to theirs, and a view keeps all memory behind it."""
    for key, found in per_sample.items():
        if not isinstance(found, Tensor) or found.ndim != 1 or not len(found):
            got = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else class_of(found)
            raise ValueError(f"Expected `per_sample` of a metric to hold tensors (N,), but {key!r} is {got}.")
    return {key: found.detach().to("cpu", torch.float32, copy=True) for key, found in per_sample.items()}


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, so that fewer samples at once may fit."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError) or is_oom_error(error)
    return known or _SHORTAGE.search(in_words(error)) is not None
