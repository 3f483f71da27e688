"""Settings of all tests."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# The tensors are small: waking other threads costs more than they save. Tests of threads set their own number. The
# variable is for processes that tests start, and keeps Lightning's launchers from setting a number of theirs, at which
# two workers of xdist wait for one another's threads (a test of 6 s took over 300 s).
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Workers that tests start are on this host; gloo would otherwise look the host's name up, which takes long where nobody
# answers.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave slow tests out unless they are asked for."""
    if os.environ.get("LRTT_SLOW") != "1":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: set LRTT_SLOW=1"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws without a seed of its own does not depend on the tests that ran before it in this process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    """A run of `lrtt_ddp` in this process leaves its group initialised, which changes what Lightning does in later tests."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)


@pytest.fixture
def llama(tmp_path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """A GGUF file of a small Llama and its weights."""
    from weights_helpers import write_llama

    expected = write_llama(tmp_path / "llama.gguf")
    return str(tmp_path / "llama.gguf"), expected
