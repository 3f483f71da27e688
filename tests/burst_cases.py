"""Devices that take bursts in every way, or do not."""

from __future__ import annotations

from helpers import quiet

from lightning_lrtt import devices

DEVICES = {
    "soft": devices.SoftBounds(dw_min=0.002),
    "quiet": quiet(devices.SoftBounds, dw_min=0.002),
    "coarse": devices.SoftBounds(dw_min=0.02, w_max_dtod=1.0),  # of some cells every burst is large, of others none
    "additive": devices.LinearStep(dw_min=0.002, mult_noise=False),
    "constant": devices.ConstantStep(dw_min=0.002, w_max=0.1, w_min=-0.1),  # bounds cut bursts
    "reference": devices.SoftBoundsReference(dw_min=0.002),
    "shaky": devices.SoftBounds(dw_min=0.002, dw_min_std=1.5),  # too noisy for bursts
    "pair": devices.OneSided(device=devices.SoftBounds(dw_min=0.002)),
    "written": devices.SoftBounds(dw_min=0.002, write_noise_std=3.0),
}
