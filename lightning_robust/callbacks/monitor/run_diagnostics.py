"""Warnings of the monitor about a run as a whole: before it begins, and at its end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeGuard

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_robust.callbacks.monitor.overhead import Overhead
from lightning_robust.callbacks.monitor.run_record import Failures, RunRecord

_PLATEAU = (
    '{{"scheduler": ReduceLROnPlateau(optimizer, mode={mode!r}), "monitor": {key!r}}}'  # from `configure_optimizers`
)
_FEW_POINTS = 5  # measurements; fewer hardly make a curve


def obstacle(trainer: Trainer) -> str | None:
    """The reason why a run cannot be measured, if there is one."""
    if trainer.barebones:
        return "`Trainer(barebones=True)` logs nothing, so RobustnessMonitor measures nothing. Drop `barebones=True`."
    strategy, spread = trainer.strategy, None
    if isinstance(strategy, DeepSpeedStrategy | FSDPStrategy):
        spread = type(strategy).__name__
    elif isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
        spread = "tensor parallelism"
    if spread is None:
        return None
    return (
        f"RobustnessMonitor measures nothing under {spread}, which spreads the weights over processes in a way that it"
        " cannot undo. Use `DDPStrategy`, or `ModelParallelStrategy(tensor_parallel_size=1)` with"
        " `torch.distributed.fsdp.fully_shard` in `configure_model`."
    )


def no_such_loader(dataloader_idx: int, *, num_loaders: int) -> str:
    """The loader to measure on does not exist."""
    return (
        f"RobustnessMonitor was told to measure on `dataloader_idx={dataloader_idx}`, but there are {num_loaders}"
        f" loaders, so nothing is measured. Pass an index below {num_loaders}."
    )


def no_measurement(trainer: Trainer) -> str | None:
    """The reason why nothing will be measured in a ``fit``, if that is known."""
    if trainer.enable_validation:
        return obstacle(trainer)
    return obstacle(trainer) or (
        "RobustnessMonitor measures inside the validation loop, but this run has none, so nothing will be measured."
        " Define `validation_step` and a validation dataloader, with `limit_val_batches` above 0."
    )


def before_fit(
    trainer: Trainer, *, prefix: str, other_prefixes: Iterable[str], every_n_epochs: int, budget: float | None
) -> list[str]:
    """Nothing will ever be measured, or others will take old values for new ones."""
    if sentence := no_measurement(trainer):
        return [sentence]
    between = trainer.check_val_every_n_epoch or 1  # epochs from one validation to the next
    measured = -(-every_n_epochs // between) * between  # from one measurement to the next
    if measured == between and budget is None:
        return []
    # the keys of another monitor may begin with this prefix, too
    longer = tuple(other for other in other_prefixes if len(other) > len(prefix))

    def follows(key: str | None) -> bool:
        return key is not None and key.startswith(prefix) and not key.startswith(longer)

    return list(_misled(trainer, follows, every=None if budget is not None else measured))


def _misled(trainer: Trainer, follows: Callable[[str | None], bool], *, every: int | None) -> Iterator[str]:
    """Callbacks and schedulers that read values between measurements, which come every so many epochs (None: a budget).

    Lightning keeps the last value for them. Without it, each of them would end the run.
    """
    when = "as often as the budget allows" if every is None else f"every {every} epochs"
    regular = "" if every is not None else " and no `overhead_budget`"
    epochs = every or 5
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if _is_early_stopping(callback) and follows(callback.monitor):
            yield (
                f"EarlyStopping follows `{callback.monitor}`, which is measured {when}. Its `patience` counts"
                " validations, and a validation without a measurement counts as no improvement. Use"
                f" `RobustnessDriftStopping({callback.monitor!r})` instead, which counts measurements."
            )
        if isinstance(callback, ModelCheckpoint) and follows(callback.monitor) and _ranks_old_values(callback):
            yield (
                f"ModelCheckpoint follows `{callback.monitor}`, which is measured {when}. It ranks the weights of the"
                " epochs in between by the last measured value. To keep measured weights alone, pass"
                f" `ModelCheckpoint(monitor={callback.monitor!r}, mode={callback.mode!r}, save_top_k=1)`, or measure in"
                f" every validation: `Trainer(check_val_every_n_epoch={epochs})` with"
                f" `RobustnessMonitor(every_n_epochs=1)`{regular}."
            )
    for config in trainer.lr_scheduler_configs:
        regularly = every is not None and config.interval == "epoch" and config.frequency % every == 0
        if config.reduce_on_plateau and follows(config.monitor) and not regularly:
            how = f" with `RobustnessMonitor(every_n_epochs={epochs})`{regular}" if every is None else ""
            yield (
                f"ReduceLROnPlateau follows `{config.monitor}`, which is measured {when}. Its `patience` counts the"
                " epochs in between as no improvement. Return"
                f' `{{"scheduler": scheduler, "monitor": "{config.monitor}", "frequency": {epochs}}}` from'
                f" `configure_optimizers`{how}, so that it counts measurements."
            )


def on_directions(
    trainer: Trainer, directions: Mapping[str, bool | None], best_untrained: Collection[str]
) -> Iterator[str]:
    """Callbacks and schedulers that take the worst values of a key for the best, or those of an untrained network.

    Args:
        trainer: Has the callbacks.
        directions: Whether higher values are better, by logged key; None if neither direction is.
        best_untrained: Keys whose values are best at initialisation.
    """
    better = [key for key, direction in directions.items() if direction and key not in best_untrained]
    instead = next((key for key in better if key.endswith("_clipped")), next(iter(better), None))
    also = "" if instead else "Measure `linearized_accuracy`, too, and f"
    for consumer in _consumers(trainer):
        known = directions.get(consumer.key)
        mode = "max" if known else "min"
        if known is None:
            continue
        if consumer.key in best_untrained:
            line = consumer.line.format(key=instead or "robust/linearized_margin_linf_clipped", mode="max")
            yield (
                f"{consumer.name} follows `{consumer.key}`, which is best at initialisation and gets worse while the"
                f" network learns, so {consumer.untrained}. {also or 'F'}ollow a key that training improves: `{line}`."
            )
        elif consumer.mode != mode:
            yield (
                f"{consumer.name} follows `{consumer.key}` with `mode={consumer.mode!r}`, but"
                f" {'higher' if known else 'lower'} values are better, so {consumer.wrong}. Pass"
                f" `{consumer.line.format(key=consumer.key, mode=mode)}`."
            )


class _Consumer(NamedTuple):
    """A callback or scheduler that follows a key, with the code that creates it and the consequences of misusing it."""

    name: str
    key: str
    mode: str
    line: str
    untrained: str
    wrong: str


def _consumers(trainer: Trainer) -> Iterator[_Consumer]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None and callback.save_top_k != 0:
            line = "ModelCheckpoint(monitor={key!r}, mode={mode!r})"
            kept = "it keeps the weights of the first epochs", "it keeps the least robust weights"
            yield _Consumer("ModelCheckpoint", callback.monitor, callback.mode, line, *kept)
        elif _is_early_stopping(callback):
            line = "EarlyStopping({key!r}, mode={mode!r})"
            stops = "it stops the run too early", "it stops the run while robustness improves"
            yield _Consumer("EarlyStopping", callback.monitor, callback.mode, line, *stops)
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.monitor is not None:
            mode, line = getattr(config.scheduler, "mode", ""), _PLATEAU
            lowers = "it lowers the learning rate too early", "it lowers the learning rate while robustness improves"
            yield _Consumer("ReduceLROnPlateau", config.monitor, mode, line, *lowers)


def _is_early_stopping(callback: Callback) -> TypeGuard[EarlyStopping]:
    """Whether a callback counts as EarlyStopping does; subclasses may count otherwise."""
    rule = "_evaluate_stopping_criteria"
    return isinstance(callback, EarlyStopping) and getattr(type(callback), rule) is getattr(EarlyStopping, rule)


def _ranks_old_values(callback: ModelCheckpoint) -> bool:
    """Whether weights can be kept for a value that was measured earlier.

    After every validation, the single best is not replaced by later weights with the same value. Of several, those with
    old values fill the places.
    """
    every_validation = getattr(callback, "_every_n_epochs", 1) == 1
    return callback.save_top_k > 1 or (callback.save_top_k != 0 and not every_validation)


def after_fit(trainer: Trainer, record: RunRecord, overhead: Overhead, *, budget: float | None) -> list[str]:
    """Nothing was measured, or less than it seems."""
    if record.failures and not record.measured:
        first = min(failures.first_epoch for failures in record.failures.values())
        return [all_failed(record.begun, first_epoch=first)] if record.begun > 1 else []  # one was explained just now
    sentences = repeated(record.failures.values())
    if overhead.left_out and budget is not None:
        return [*sentences, *hardly_a_curve(overhead, budget=budget)]
    trained = trainer.current_epoch > record.first_epoch or trainer.global_step > record.first_step
    if trained and not (record.validations or record.impossible):
        return [nothing_measured(trainer, first_epoch=record.first_epoch)]
    return sentences


def nothing_measured(trainer: Trainer, *, first_epoch: int) -> str:
    """Training went on without a single validation; gives the likely cause."""
    every: int | None = trainer.check_val_every_n_epoch
    epochs = range(first_epoch, trainer.current_epoch)
    if every is not None and not any((epoch + 1) % every == 0 for epoch in epochs):
        cause = (
            f"validation runs every {every} epochs, and training ended after {len(epochs)}. Pass"
            f" `Trainer(check_val_every_n_epoch={max(1, len(epochs))})` or less"
        )
    elif not sum(trainer.num_val_batches):
        cause = "there are no validation batches. Pass a validation dataloader that yields some"
    else:
        steps = trainer.global_step
        cause = (
            f"training ended after {steps} step{'s' if steps != 1 else ''}, before the first validation. Train longer,"
            " or pass a smaller `Trainer(val_check_interval=…)`"
        )
    return f"RobustnessMonitor measured nothing in this run: {cause}."


def all_failed(count: int, *, first_epoch: int) -> str:
    """No measurement of a run succeeded."""
    return (
        f"RobustnessMonitor measured nothing in this run: all {count} measurements were skipped, as explained in epoch"
        f" {first_epoch}."
    )


def repeated(failures: Iterable[Failures]) -> list[str]:
    """Failures that were explained came again."""
    metrics: dict[tuple[int, int], list[str]] = {}  # None for all of them
    for found in failures:
        if found.again:
            names = metrics.setdefault((found.again, found.first_epoch), [])
            names.extend([] if found.what is None else [found.what])
    return [
        f"RobustnessMonitor skipped {' and '.join(names)}{' in ' if names else ''}{again} more"
        f" measurement{'s' if again > 1 else ''}, for the reason given in epoch {first_epoch}."
        for (again, first_epoch), names in metrics.items()
    ]


def hardly_a_curve(overhead: Overhead, *, budget: float) -> list[str]:
    """A budget of time has left few measurements."""
    made, due = overhead.made, overhead.made + overhead.left_out
    if made >= _FEW_POINTS:
        return []
    return [
        f"RobustnessMonitor made {made} of {due} measurements within `overhead_budget={budget:g}`; the last one took"
        f" {overhead.times.cost:.2g} s. So few points hardly make a curve: lower `max_samples`, measure fewer `metrics`"
        " or raise the budget."
    ]
