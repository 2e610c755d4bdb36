"""For all tests: one torch thread, and tests marked cuda are skipped where there is no GPU."""

import pytest
import torch


def pytest_configure(config):
    torch.set_num_threads(1)  # many tiny operations, faster without a second one
    config.addinivalue_line("markers", "cuda: needs a GPU that torch can use")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no GPU that torch can use"))
