"""A Custom Scalars page for TensorBoard, so that accuracy and robustness stand on one chart without set-up."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lightning.pytorch.loggers import TensorBoardLogger

Charts = dict[str, tuple[str, list[str]]]

# A word that begins with "acc", by itself or in camel case, other than "accumulation" and the like; not the edge of an
# error band, and not logged at every step.
_ACCURACY = r"(?!.*_(?:step|stderr|lower|upper)(?:/|$)).*(?:(?<![A-Za-z])a|A)(?i:cc(?!um|el|ept|ess))"


def layout(keys: Mapping[str, Sequence[str]]) -> dict[str, Charts]:
    """Arrange logged keys into charts.

    Args:
        keys: For each prefix the keys that are logged under it, prefix included, the most telling first.

    Returns:
        A layout for ``SummaryWriter.add_custom_scalars``, one category for each prefix: a chart with everything that
        looks like an accuracy, the user's own and ours, and a chart with its band of ± 2 standard errors for every key
        that has one.
    """
    title = "Robustness beside accuracy"
    # TensorBoard joins the tags of a multi-line chart into one regular expression, matched from the start. So the
    # user's accuracy is found by its name, also one that is logged for the first time after the layout was written.
    theirs = rf"^(?!{'|'.join(map(re.escape, keys))}){_ACCURACY}"
    return {
        title if len(keys) == 1 else f"{title}: {prefix}": _charts(prefix, list(logged), theirs)
        for prefix, logged in keys.items()
    }


def _charts(prefix: str, keys: list[str], theirs: str) -> Charts:
    accuracies = [key for key in keys if re.fullmatch(rf"{re.escape(prefix)}\w+_accuracy_[^_]+_[\d.e-]+", key)]
    charts: Charts = {
        "accuracy: clean, and predicted under perturbation": (
            "Multiline",
            [theirs, *(f"^{re.escape(key)}$" for key in accuracies)],
        )
    }
    for key in reversed(keys):  # TensorBoard shows margin charts in the opposite order
        band = [key, f"{key}_lower", f"{key}_upper"]
        if all(edge in keys for edge in band):
            charts[f"{key.removeprefix(prefix)} ± 2 standard errors"] = ("Margin", band)
    return charts


def write_layout(logger: TensorBoardLogger, keys: Mapping[str, Sequence[str]]) -> None:
    """Write the layout of these keys; call on rank zero, once per run: TensorBoard reads only one."""
    logger.experiment.add_custom_scalars(layout(keys))
