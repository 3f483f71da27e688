"""Pulse trains that the tests of kernels on CPU and GPU share."""

from __future__ import annotations

from lightning_lrtt import PulseConfig

PULSES = {
    "stochastic": PulseConfig(pulse_type="stochastic"),
    "stochastic_32": PulseConfig(desired_bl=32, update_bl_management=False),
    "stochastic_100": PulseConfig(desired_bl=100),
    "stochastic_long": PulseConfig(desired_bl=1500, update_bl_management=False),
    "unfixed": PulseConfig(fixed_bl=False, update_bl_management=False, update_management=False),
    "unfixed_um": PulseConfig(fixed_bl=False, update_bl_management=False, max_bl=70, desired_bl=3),
    "unfixed_mean": PulseConfig(pulse_type="mean_count", fixed_bl=False, update_bl_management=False, desired_bl=5),
    "grid": PulseConfig(x_res=1 / 14, d_res=0.28),
    "grid_random": PulseConfig(x_res=0.1, d_res=1 / 7, sto_round=True),
    "grid_one_side": PulseConfig(d_res=0.25, sto_round=True, desired_bl=7, update_management=False),
    "grid_100": PulseConfig(x_res=0.01, sto_round=True, desired_bl=100),
    "early_cut": PulseConfig(um_grad_scale=0.3),
    "late_cut": PulseConfig(um_grad_scale=2.0, update_bl_management=False),
    "mean_count": PulseConfig(pulse_type="mean_count"),
    "mean_count_bl3": PulseConfig(pulse_type="mean_count", desired_bl=3, update_bl_management=False),
    "mean_count_grid": PulseConfig(pulse_type="mean_count", x_res=0.1, d_res=0.2, sto_round=True),
    "mean_count_long": PulseConfig(pulse_type="mean_count", desired_bl=5000, update_bl_management=False),
    "implicit": PulseConfig(pulse_type="deterministic_implicit"),
    "implicit_grid": PulseConfig(pulse_type="deterministic_implicit", x_res=1 / 31, d_res=1 / 15),
    "implicit_random": PulseConfig(pulse_type="deterministic_implicit", x_res=1 / 31, d_res=1 / 15, sto_round=True),
    "implicit_100": PulseConfig(pulse_type="deterministic_implicit", desired_bl=100, update_management=False),
}
