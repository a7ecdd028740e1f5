from collections.abc import Iterator

import pytest

from lightning_robust import RobustnessMonitor
from tests.dashboard.digits import Run, train
from tests.dashboard.server import Server, serve


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with the monitor as users add it: without an argument."""
    return train(tmp_path_factory.mktemp("monitored") / "runs", callbacks=[RobustnessMonitor()])


@pytest.fixture(scope="session")
def server(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """TensorBoard, as a user would start it on that run."""
    with serve(run, tmp_path_factory.mktemp("server") / "log") as server:
        yield server
