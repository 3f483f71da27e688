"""Callbacks of lightning_lrtt; the folder is installed as ``lightning_lrtt.callbacks``."""

if __name__ != "lightning_lrtt.callbacks":
    raise ImportError(
        f"callbacks: import it as lightning_lrtt.callbacks, got {__name__!r}; a second copy of the classes would not "
        "be recognised by the Trainer"
    )

from lightning_lrtt.callbacks.cuda_graph import CUDAGraph
from lightning_lrtt.callbacks.factory import default_callbacks
from lightning_lrtt.callbacks.free_nudged_monitor import FreeNudgedMonitor
from lightning_lrtt.callbacks.memory_cleanup import MemoryCleanup
from lightning_lrtt.callbacks.pretrained_init import PretrainedInit
from lightning_lrtt.callbacks.run_profile import RunProfile
from lightning_lrtt.callbacks.tile_check import TileCheck
from lightning_lrtt.callbacks.tile_monitor import TileMonitor

__all__ = [
    "CUDAGraph",
    "FreeNudgedMonitor",
    "MemoryCleanup",
    "PretrainedInit",
    "RunProfile",
    "TileCheck",
    "TileMonitor",
    "default_callbacks",
]
