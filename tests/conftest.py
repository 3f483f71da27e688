"""Settings of all tests."""

import os

import pytest
import torch

# The tensors are small: waking other threads costs more than they save. Tests of threads set their own number.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave slow tests out unless they are asked for."""
    if os.environ.get("LRTT_SLOW") != "1":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: set LRTT_SLOW=1"))
