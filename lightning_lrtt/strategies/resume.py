"""What Lightning leaves out of exact resume: the global random generators, and checkpoint files that are never half."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from typing_extensions import override

from lightning_lrtt._files import replacing


def collect_rng(device: torch.device) -> dict[str, Any]:
    """The states of torch's, Python's and NumPy's global generators in tensors and builtins.

    Args:
        device: On CUDA its generator is added.
    """
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what `collect_rng` saw; one that was not saved stays as it is."""
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Local checkpoints are written beside their place and renamed.

    Lightning's own goes through fsspec, which writes to the system's temporary folder and moves: a copy, with a moment
    at which the checkpoint is incomplete, where that folder is on another file system. Remote paths are left to it.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)
