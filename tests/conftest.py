"""Settings of every test."""

import pytest
import torch

# Small tensors on few cores: threads that wait for each other cost more than they save.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with the longest limits begin first, lest one process end with ten minutes that no other can share."""

    def limit(item: pytest.Item) -> float:
        marker = item.get_closest_marker("timeout")
        return float(marker.args[0]) if marker else 0.0

    items.sort(key=limit, reverse=True)
