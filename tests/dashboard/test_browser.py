"""What a user sees: TensorBoard's page in a browser."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard.chromium import EXECUTABLE, Page, browse
from tests.dashboard.digits import Run, train
from tests.dashboard.server import Server, serve

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(EXECUTABLE is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
]

_PATH = "/#custom_scalars&_smoothingWeight=0"

# The page is a tree of shadow roots. A line or band counts as drawn if it has a size on the screen and a colour.
_LIBRARY = """
function* elements(root) {
  for (const element of root.querySelectorAll("*")) {
    yield element;
    if (element.shadowRoot) yield* elements(element.shadowRoot);
  }
}
const find = (selector, root = document) => [...elements(root)].filter((element) => element.matches(selector));
const text = (element) => element.textContent.replace(/\\s+/g, " ").trim();
const drawn = (path, paint, opacity) => {
  const box = path.getBoundingClientRect(), style = getComputedStyle(path);
  return box.width > 10 && box.height > 0 && style[paint] !== "none" && Number(style[opacity]) > 0;
};
const cards = () => find("tf-custom-scalar-multi-line-chart-card, tf-custom-scalar-margin-chart-card");
const charts = () => cards().map((card) => ({
  title: card.title,
  series: find(".match-list-entry", card.shadowRoot).map((entry) => text(entry).split(" ")[1]),  // symbol, name, run
  errors: find(".error-content", card.shadowRoot).map(text),
  lines: find("path.line", card.shadowRoot).filter((path) => drawn(path, "stroke", "strokeOpacity")).length,
  bands: find("path.area", card.shadowRoot).filter((path) => drawn(path, "fill", "fillOpacity")).length,
}));
"""


def with_library(expression: str) -> str:
    return f"(() => {{ {_LIBRARY} return {expression}; }})()"


async def read_charts(page: Page, *, when: str) -> list[dict[str, Any]]:
    """Charts on the page, as soon as a condition holds."""
    try:
        await page.wait_for(with_library(when))
    except TimeoutError as error:
        error.add_note(f"The page has the charts {await page.evaluate(with_library('charts()'))}.")
        raise
    charts: list[dict[str, Any]] = await page.evaluate(with_library("charts()"))
    return charts


async def save_screenshot(page: Page, path: Path) -> None:
    """Save a picture of the page, with the series in the first chart named and every point in the frame."""
    await page.evaluate(with_library("find('.toggle-matches-button')[0].click()"))
    await page.evaluate(with_library("find('paper-checkbox').find((box) => text(box).includes('outliers')).click()"))
    await page.wait_for(
        with_library("find('iron-collapse', cards()[0].shadowRoot).every((list) => list.opened && !list.transitioning)")
    )
    await page.screenshot(path)


def test_accuracy_and_robustness_share_one_chart(server: Server, run: Run, tmp_path: Path) -> None:
    async def look() -> list[dict[str, Any]]:
        async with browse(server.url + _PATH, tmp_path / "profile") as page:
            drawn = "charts().length && charts().every((chart) => chart.lines || chart.errors.length)"
            charts = await read_charts(page, when=drawn)
            await save_screenshot(page, Path(os.environ.get("LIGHTNING_ROBUST_SCREENSHOT", tmp_path / "page.png")))
            return charts

    charts = asyncio.run(look())
    epsilons = ("0.003922", "0.007843", "0.01569", "0.03137", "0")
    tags = ["val_acc", *(f"robust/linearized_accuracy_linf_{epsilon}" for epsilon in epsilons)]
    (accuracy,) = (chart for chart in charts if "val_acc" in chart["series"])
    assert sorted(accuracy["series"]) == sorted(tags)  # TensorBoard draws them in the order in which they arrive
    assert (accuracy["lines"], accuracy["bands"], accuracy["errors"]) == (len(tags), 0, [])

    margins = [chart for chart in charts if chart is not accuracy]
    assert len(margins) == sum(key.endswith("_upper") for key in run.robust_keys)
    for margin in margins:
        assert (margin["lines"], margin["bands"], margin["errors"]) == (1, 1, []), margin["title"]


def test_page_is_empty_without_the_monitor(tmp_path: Path) -> None:
    async def look(url: str) -> list[dict[str, Any]]:
        async with browse(url, tmp_path / "profile") as page:
            return await read_charts(page, when="find('tf-custom-scalar-dashboard').some((board) => board._layout)")

    with serve(train(tmp_path / "logs", max_epochs=1), tmp_path / "log") as server:
        assert asyncio.run(look(server.url + _PATH)) == []
