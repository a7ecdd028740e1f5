"""A real TensorBoard server, and requests to it."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import ProxyHandler, build_opener

from tests.dashboard.digits import Run

_OPENER = build_opener(ProxyHandler({}))  # the server is on this machine, whatever proxies the environment names


class Server:
    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, route: str, **query: str) -> Any:
        with _OPENER.open(f"{self.url}/data/{route}?{urlencode(query)}", timeout=20) as response:
            return json.load(response)

    def layout(self) -> dict[str, Any]:
        """The Custom Scalars layout, merged over all runs; empty if there is none."""
        layout: dict[str, Any] = self.get("plugin/custom_scalars/layout")
        return layout

    def charts(self, kind: str) -> list[dict[str, Any]]:
        """Charts of the layout that are of a kind, ``multiline`` or ``margin``."""
        return [chart for category in self.layout()["category"] for chart in category["chart"] if kind in chart]

    def series(self, run: str, tag: str) -> dict[str, dict[int, float]]:
        """Value by step of every tag that the regular expression ``tag`` matches."""
        answer = self.get("plugin/custom_scalars/scalars", run=run, tag=tag)
        assert answer["regex_valid"], f"not a regular expression: {tag}"
        return {name: {step: value for _, step, value in events} for name, events in answer["tag_to_events"].items()}


@contextmanager
def serve(run: Run, log: Path, *, timeout: float = 60) -> Iterator[Server]:
    """Start TensorBoard on a free port, with its output in ``log``, and wait until it has read the whole run."""
    command = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1", "--port", "0", "--load_fast", "false"]
    deadline = time.monotonic() + timeout
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, "--logdir", run.logdir.name], cwd=run.logdir.parent, stdout=output, stderr=output
        ) as process,
    ):
        try:
            while not (found := re.search(r"at (http://[\d.]+:\d+)/", log.read_text())) or not _has_read(found[1], run):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"TensorBoard does not serve the run:\n{log.read_text()}")
                time.sleep(0.1)
            yield Server(found[1])
        finally:
            process.kill()


def _has_read(url: str, run: Run) -> bool:
    """Whether the last series that is written in each epoch is complete."""
    try:
        return len(Server(url).series(run.name, "^epoch$").get("epoch", ())) == run.epochs
    except OSError:  # not listening yet, or has not seen the run
        return False


def page_filter(tags: Sequence[str], *, escape: bool = False) -> str:
    """The one regular expression into which TensorBoard's page merges the tags of a chart, before it asks for them."""
    if escape:
        tags = [re.escape(tag) for tag in tags]
    return tags[0] if len(tags) == 1 else "|".join(f"({tag})" for tag in tags)
