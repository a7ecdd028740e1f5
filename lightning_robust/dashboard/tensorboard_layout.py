"""A Custom Scalars page for TensorBoard that shows accuracy and robustness on one chart without any set-up."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lightning.pytorch.loggers import TensorBoardLogger

from lightning_robust.metrics.keys import ACCURACY_PER_EPOCH, is_accuracy_at_epsilon

Charts = dict[str, tuple[str, list[str]]]


def layout(keys: Mapping[str, Sequence[str]]) -> dict[str, Charts]:
    """Arrange logged keys into charts.

    Args:
        keys: For each prefix the keys logged under it, prefix included, the most informative first.

    Returns:
        A layout for ``SummaryWriter.add_custom_scalars`` with one category per prefix. Each category has one chart with
        all accuracies, the user's and ours, and for every key with an error band a chart with ± 2 standard errors.
    """
    title = "Robustness beside accuracy"
    # TensorBoard joins the tags of a multi-line chart into one regular expression and matches it from the start of each
    # key. A pattern therefore also finds accuracies that the user logs only after the layout was written.
    users = rf"^(?!{'|'.join(map(re.escape, keys))}){ACCURACY_PER_EPOCH}"
    return {
        title if len(keys) == 1 else f"{title}: {prefix}": _charts(prefix, list(logged), users)
        for prefix, logged in keys.items()
    }


def _charts(prefix: str, keys: list[str], users: str) -> Charts:
    accuracies = [key for key in keys if is_accuracy_at_epsilon(key, prefix=prefix)]
    charts: Charts = {
        "accuracy: clean, and predicted under perturbation": (
            "Multiline",
            [users, *(f"^{re.escape(key)}$" for key in accuracies)],
        )
    }
    for key in reversed(keys):  # TensorBoard shows margin charts in reverse order
        band = [key, f"{key}_lower", f"{key}_upper"]
        if all(edge in keys for edge in band):
            charts[f"{key.removeprefix(prefix)} ± 2 standard errors"] = ("Margin", band)
    return charts


def write_layout(logger: TensorBoardLogger, keys: Mapping[str, Sequence[str]]) -> None:
    """Write the layout of these keys. Call it on rank zero, once per run: TensorBoard reads only one layout."""
    logger.experiment.add_custom_scalars(layout(keys))
