"""CUDA graphs of training steps: recording, static inputs, what can be recorded and what cannot. No Lightning here."""

from lightning_lrtt.graphs.batches import StaticBatch, Unsupported, describe
from lightning_lrtt.graphs.cache import Entry, GraphCache
from lightning_lrtt.graphs.finder import Finder, Finding
from lightning_lrtt.graphs.host_state import FrozenValues, HostState, tensor_slots
from lightning_lrtt.graphs.optimizers import DeviceForm
from lightning_lrtt.graphs.parity import StateCopy, max_difference
from lightning_lrtt.graphs.recorder import CudaRecorder, GraphCaptureError, Recorder, Recording
from lightning_lrtt.graphs.tiles import TileGraphs
from lightning_lrtt.graphs.timing import PhaseTimer

__all__ = [
    "CudaRecorder",
    "DeviceForm",
    "Entry",
    "Finder",
    "Finding",
    "FrozenValues",
    "GraphCache",
    "GraphCaptureError",
    "HostState",
    "PhaseTimer",
    "Recorder",
    "Recording",
    "StateCopy",
    "StaticBatch",
    "TileGraphs",
    "Unsupported",
    "describe",
    "max_difference",
    "tensor_slots",
]
