"""Pretrained weights from GGUF and safetensors files, decoded in place when they are needed."""

from lightning_lrtt.weights._transforms import Transform
from lightning_lrtt.weights.checkpoint import LazyCheckpoint
from lightning_lrtt.weights.dequantize import dequantize_into
from lightning_lrtt.weights.errors import CheckpointChangedError, CheckpointFormatError, CheckpointMismatchError
from lightning_lrtt.weights.load import load_pretrained
from lightning_lrtt.weights.pretrained import Pretrained
from lightning_lrtt.weights.report import LoadReport
from lightning_lrtt.weights.single_flight import SingleFlight
from lightning_lrtt.weights.tensor import LazyTensor

__all__ = [
    "CheckpointChangedError",
    "CheckpointFormatError",
    "CheckpointMismatchError",
    "LazyCheckpoint",
    "LazyTensor",
    "LoadReport",
    "Pretrained",
    "SingleFlight",
    "Transform",
    "dequantize_into",
    "load_pretrained",
]
