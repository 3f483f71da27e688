"""Train Lightning modules on simulated analog memory with low-rank Tiki-Taka (LR-TT)."""

from lightning_lrtt import devices, presets
from lightning_lrtt._compiled import build_info
from lightning_lrtt.config import IOConfig, LRTTConfig, PulseConfig
from lightning_lrtt.data import ResumableLoader
from lightning_lrtt.nn import convert_to_digital, convert_to_lrtt
from lightning_lrtt.optim import LRTT, NonFiniteError
from lightning_lrtt.strategies import LRTTDDPStrategy, LRTTStrategy

__all__ = [
    "LRTT",
    "IOConfig",
    "LRTTConfig",
    "LRTTDDPStrategy",
    "LRTTStrategy",
    "NonFiniteError",
    "PulseConfig",
    "ResumableLoader",
    "build_info",
    "convert_to_digital",
    "convert_to_lrtt",
    "devices",
    "presets",
]
__version__ = "0.1.0"
