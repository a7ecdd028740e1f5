"""Settings that hold for every test."""

import pytest
import torch

# With small tensors on few cores, threads spend more time waiting for each other than they save.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the tests with the longest time limits first, so that no worker is left with one at the end."""

    def limit(item: pytest.Item) -> float:
        marker = item.get_closest_marker("timeout")
        return float(marker.args[0]) if marker else 0.0

    items.sort(key=limit, reverse=True)
