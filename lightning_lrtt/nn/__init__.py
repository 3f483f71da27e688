"""Layers that hold their weight in an LR-TT tile, and conversion from and to digital layers."""

from lightning_lrtt.nn.conv import LRTTConv1d, LRTTConv2d
from lightning_lrtt.nn.convert import convert_to_digital, convert_to_lrtt
from lightning_lrtt.nn.linear import LRTTLinear
from lightning_lrtt.nn.tile import TileModule, find_tiles
from lightning_lrtt.nn.transposed import LRTTTransposedLinear

__all__ = [
    "LRTTConv1d",
    "LRTTConv2d",
    "LRTTLinear",
    "LRTTTransposedLinear",
    "TileModule",
    "convert_to_digital",
    "convert_to_lrtt",
    "find_tiles",
]
