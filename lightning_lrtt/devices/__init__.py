"""Models of the analog devices that hold a weight, one class each, with their spread and noise.

A model is a frozen description; what a cell *is* (its bounds and step sizes) is drawn by the compiled core from
``(tile key, array, cell)``, so nothing is stored per cell. Formulas follow aihwkit's pulsed devices. Written for one
pulse upwards with a fresh ``xi ~ N(0, 1)``; a pulse downwards mirrors it with the down step size. After each pulse a
weight is clipped to its cell's bounds.

Units: weights, bounds and step sizes are in units of the weight matrix, everything else is a ratio.
"""

from lightning_lrtt.devices.base import Device
from lightning_lrtt.devices.constant_step import ConstantStep
from lightning_lrtt.devices.exp_step import ExpStep
from lightning_lrtt.devices.ideal import Ideal
from lightning_lrtt.devices.linear_step import LinearStep
from lightning_lrtt.devices.one_sided import OneSided
from lightning_lrtt.devices.piecewise_step import PiecewiseStep
from lightning_lrtt.devices.pow_step import PowStep
from lightning_lrtt.devices.pow_step_reference import PowStepReference
from lightning_lrtt.devices.pulsed import PulsedDevice
from lightning_lrtt.devices.soft_bounds import SoftBounds
from lightning_lrtt.devices.soft_bounds_pmax import SoftBoundsPmax
from lightning_lrtt.devices.soft_bounds_reference import SoftBoundsReference

__all__ = [
    "ConstantStep",
    "Device",
    "ExpStep",
    "Ideal",
    "LinearStep",
    "OneSided",
    "PiecewiseStep",
    "PowStep",
    "PowStepReference",
    "PulsedDevice",
    "SoftBounds",
    "SoftBoundsPmax",
    "SoftBoundsReference",
]

for _name in __all__:  # configuration files and checkpoints name them so
    globals()[_name].__module__ = __name__
