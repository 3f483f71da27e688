"""Published device parameters as ready configurations.

Each function gives an `LRTTConfig` whose A, B and C are that device; keyword arguments go to `LRTTConfig`, so
``ecram_mo(rank=16)`` and ``reram_sb(visible_device=None)`` compose. `device` gives the model alone. Numbers are aihwkit's.

Example:
    >>> from lightning_lrtt import presets
    >>> config = presets.reram_sb(rank=4, visible_device=None)
    >>> config.rank, type(config.fast_device).__name__
    (4, 'SoftBoundsReference')
"""

from __future__ import annotations

from typing import Any

from lightning_lrtt import _check
from lightning_lrtt.config import LRTTConfig
from lightning_lrtt.devices import ConstantStep, Device, ExpStep, Ideal, LinearStep, SoftBoundsReference

__all__ = [
    "DEVICES",
    "capacitor",
    "device",
    "ecram",
    "ecram_mo",
    "gokmen_vlasov",
    "ideal",
    "idealized",
    "name_of",
    "reram_array_hfo2",
    "reram_array_om",
    "reram_es",
    "reram_sb",
]

DEVICES: dict[str, Device] = {
    # Li et al. 2018, capacitor-based cross-point array
    "capacitor": LinearStep(
        dw_min=0.005,
        w_max=1.0,
        w_min=-1.0,
        mult_noise=False,
        gamma_up=0.05,
        gamma_down=0.05,
        dw_min_dtod=0.1,
        up_down_dtod=0.06,
        w_max_dtod=0.07,
        w_min_dtod=0.07,
        gamma_up_dtod=0.01,
        gamma_down_dtod=0.01,
        dw_min_std=0.3,
        lifetime=1e6,
        lifetime_dtod=0.3,
    ),
    # Tang et al. 2018, lithium electro-chemical RAM
    "ecram": LinearStep(
        dw_min=0.002,
        w_max=1.1724,
        w_min=-0.8276,
        mult_noise=True,
        gamma_up=0.1153,
        gamma_down=0.5085,
        dw_min_dtod=0.1,
        up_down_dtod=0.01,
        w_max_dtod=0.05,
        w_min_dtod=0.05,
        gamma_up_dtod=0.05,
        gamma_down_dtod=0.05,
        dw_min_std=0.3,
    ),
    # Kim et al. 2019, metal-oxide ECRAM
    "ecram_mo": LinearStep(
        dw_min=0.00028214,
        w_max=1.1714,
        w_min=-0.8286,
        mult_noise=True,
        gamma_up=0.4152,
        gamma_down=0.7342,
        dw_min_dtod=0.1,
        up_down_dtod=0.01,
        w_max_dtod=0.05,
        w_min_dtod=0.05,
        gamma_up_dtod=0.05,
        gamma_down_dtod=0.05,
        dw_min_std=2.0,
    ),
    # Gokmen & Vlasov 2016, many states
    "idealized": ConstantStep(
        dw_min=0.0002,
        dw_min_dtod=0.3,
        dw_min_std=0.3,
        up_down_dtod=0.0,
        w_max=1.0,
        w_min=-1.0,
        w_max_dtod=0.3,
        w_min_dtod=0.3,
    ),
    # Gokmen & Vlasov 2016
    "gokmen_vlasov": ConstantStep(
        dw_min=0.0016,
        dw_min_dtod=0.3,
        dw_min_std=0.3,
        up_down_dtod=0.01,
        w_max=1.0,
        w_min=-1.0,
        w_max_dtod=0.3,
        w_min_dtod=0.3,
    ),
    "ideal": Ideal(),
    # Gong et al. 2018, ReRAM, with its exponential saturation
    "reram_es": ExpStep(
        dw_min=0.00135,
        up_down=0.259359,
        w_max=1.0,
        w_min=-1.0,
        a=-0.5,
        b=-0.5,
        gamma_up=5.0,
        gamma_down=5.0,
        A_up=-1.18445,
        A_down=-0.081404,
        dw_min_dtod=0.2,
        up_down_dtod=0.05,
        w_max_dtod=0.3,
        w_min_dtod=0.3,
        dw_min_std=5.0,
        write_noise_std=75.0,
    ),
    # Gong et al. 2018, ReRAM, a looser fit of soft bounds around the symmetry point
    "reram_sb": SoftBoundsReference(
        dw_min=0.002,
        up_down=0.0,
        w_max=1.25,
        w_min=-0.75,
        mult_noise=False,
        dw_min_dtod=0.3,
        up_down_dtod=0.01,
        w_max_dtod=0.24,
        w_min_dtod=0.4,
        dw_min_std=3.75,
        write_noise_std=56.0,
    ),
    # Gong et al. 2022, ReRAM arrays: optimised material, and HfO2
    "reram_array_om": SoftBoundsReference(
        dw_min=0.0949,
        dw_min_dtod_log_normal=True,
        up_down=0.0,
        w_max=1.0,
        w_min=-1.0,
        mult_noise=False,
        dw_min_dtod=0.7829,
        up_down_dtod=0.01,
        w_max_dtod=0.3499,
        w_min_dtod=0.5695,
        dw_min_std=0.4158,
        write_noise_std=1.4113,
        corrupt_devices_range=0.01,
        subtract_symmetry_point=True,
        reference_std=0.05,
    ),
    "reram_array_hfo2": SoftBoundsReference(
        dw_min=0.4622,
        dw_min_dtod_log_normal=True,
        up_down=0.0,
        w_max=1.0,
        w_min=-1.0,
        mult_noise=False,
        dw_min_dtod=0.7125,
        up_down_dtod=0.01,
        w_max_dtod=0.4295,
        w_min_dtod=0.599,
        dw_min_std=0.2174,
        write_noise_std=0.5841,
        corrupt_devices_range=0.01,
        subtract_symmetry_point=True,
        reference_std=0.05,
    ),
}


def device(name: str) -> Device:
    """The device model of a preset.

    Args:
        name: A key of `DEVICES`.

    Raises:
        ValueError: If there is no such preset.

    Example:
        >>> device("ecram").w_max
        1.1724
    """
    _check.choice("presets.device", "name", name, DEVICES)
    return DEVICES[name]


def name_of(device: Device) -> str | None:
    """The preset that ``device`` equals; None if there is none.

    Args:
        device: Any device model; all its numbers are compared.

    Example:
        >>> name_of(DEVICES["ecram"])
        'ecram'
    """
    return next((name for name, known in DEVICES.items() if known == device), None)


def _config(name: str, options: dict[str, Any]) -> LRTTConfig:
    return LRTTConfig(**{"fast_device": DEVICES[name], "visible_device": DEVICES[name], **options})


def capacitor(**options: Any) -> LRTTConfig:
    """A, B and C on leaking capacitor cells. ``options`` go to `LRTTConfig`."""
    return _config("capacitor", options)


def ecram(**options: Any) -> LRTTConfig:
    """A, B and C on lithium ECRAM. ``options`` go to `LRTTConfig`."""
    return _config("ecram", options)


def ecram_mo(**options: Any) -> LRTTConfig:
    """A, B and C on metal-oxide ECRAM. ``options`` go to `LRTTConfig`.

    Example:
        >>> ecram_mo(rank=16).rank
        16
    """
    return _config("ecram_mo", options)


def idealized(**options: Any) -> LRTTConfig:
    """A, B and C on Gokmen & Vlasov's idealized device. ``options`` go to `LRTTConfig`."""
    return _config("idealized", options)


def gokmen_vlasov(**options: Any) -> LRTTConfig:
    """A, B and C on Gokmen & Vlasov's device. ``options`` go to `LRTTConfig`."""
    return _config("gokmen_vlasov", options)


def ideal(**options: Any) -> LRTTConfig:
    """A, B and C on exact ConstantStep cells. ``options`` go to `LRTTConfig`."""
    return _config("ideal", options)


def reram_es(**options: Any) -> LRTTConfig:
    """A, B and C on ReRAM with exponential saturation and write noise. ``options`` go to `LRTTConfig`."""
    return _config("reram_es", options)


def reram_sb(**options: Any) -> LRTTConfig:
    """A, B and C on ReRAM as soft bounds with write noise. ``options`` go to `LRTTConfig`."""
    return _config("reram_sb", options)


def reram_array_om(**options: Any) -> LRTTConfig:
    """A, B and C on a ReRAM array of optimised material. ``options`` go to `LRTTConfig`."""
    return _config("reram_array_om", options)


def reram_array_hfo2(**options: Any) -> LRTTConfig:
    """A, B and C on a ReRAM array of HfO2. ``options`` go to `LRTTConfig`."""
    return _config("reram_array_hfo2", options)
