"""Small builders shared by the tests."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lrtt import LRTTConfig, devices
from lightning_lrtt.nn.tile import tile_key
from lightning_lrtt.ops import COUNTS, KEY, STATE_SIZE, STEP

DEVICES: dict[str, devices.Device] = {
    "ideal": devices.Ideal(dw_min=0.01),
    "constant": devices.ConstantStep(dw_min=0.01),
    "constant-lognormal": devices.ConstantStep(dw_min=0.01, dw_min_dtod_log_normal=True, up_down=0.2, up_down_dtod=0.3),
    "constant-loose": devices.ConstantStep(dw_min=0.01, enforce_consistency=False, w_max_dtod=1.5, w_min_dtod=1.5),
    "constant-corrupt": devices.ConstantStep(dw_min=0.01, corrupt_devices_prob=0.2, corrupt_devices_range=0.3),
    "linear": devices.LinearStep(dw_min=0.01, gamma_up=0.3, gamma_down=0.5),
    "linear-additive": devices.LinearStep(dw_min=0.01, gamma_up=0.3, mult_noise=False, mean_bound_reference=False),
    "linear-increasing": devices.LinearStep(dw_min=0.01, gamma_up_dtod=0.5, allow_increasing_slope=True, up_down=-0.3),
    "soft": devices.SoftBounds(dw_min=0.01),
    "soft-additive": devices.SoftBounds(dw_min=0.01, mult_noise=False, dw_min_std=2.0, corrupt_devices_prob=0.1),
    "soft-quiet": devices.SoftBounds(dw_min=0.01, dw_min_std=0.0, dw_min_dtod=0.0, w_max_dtod=0.0, w_min_dtod=0.0),
    "leaky": devices.LinearStep(dw_min=0.01, lifetime=5.0, lifetime_dtod=0.3, reset=0.1, diffusion=0.01),
    "pmax": devices.SoftBoundsPmax(corrupt_devices_prob=0.1),
    "soft-reference": devices.SoftBoundsReference(
        dw_min_dtod=0.5,
        up_down_dtod=0.2,
        slope_up_dtod=0.2,
        slope_down_dtod=0.4,
        reference_mean=0.05,
        reference_std=0.1,
        subtract_symmetry_point=True,
        corrupt_devices_prob=0.1,
    ),
    "soft-reference-mult": devices.SoftBoundsReference(mult_noise=True, enforce_consistency=False, w_max_dtod=1.0),
    "exp": devices.ExpStep(dw_min=0.005, corrupt_devices_prob=0.1),
    "exp-reram": devices.ExpStep(
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
        dw_min_std=5.0,
    ),
    "pow": devices.PowStep(
        dw_min=0.005, pow_gamma=1.7, pow_up_down=0.2, pow_up_down_dtod=0.1, corrupt_devices_prob=0.1
    ),
    "pow-reference": devices.PowStepReference(
        dw_min=0.005, reference_mean=-0.1, reference_std=0.1, enforce_consistency=False
    ),
    "piecewise": devices.PiecewiseStep(
        dw_min=0.005, piecewise_up=(1.0, 0.7, 0.2, 0.0), piecewise_down=(0.1, 0.5, 1.2, 0.9)
    ),
    "piecewise-one": devices.PiecewiseStep(piecewise_up=(0.5,), piecewise_down=(1.5,), corrupt_devices_prob=0.1),
}

WIDE = devices.Ideal(dw_min=1.0, w_max=1e6, w_min=-1e6)  # counts pulses: one pulse is a step of 1, nothing clips


def quiet(kind: type[devices.Device], **numbers: Any) -> Any:
    """A device of this kind without any variation or noise, but for what ``numbers`` say."""
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{n: 0.0 for n in names if n.endswith(("_dtod", "_std"))} | numbers)


def fresh_state(seed: int = 0, step: int = 0) -> Tensor:
    """Counters of a tile with the key of ``seed``."""
    state = torch.zeros(STATE_SIZE, dtype=torch.int64)
    state[KEY], state[STEP] = tile_key(seed, 0), step
    return state


def fresh_counts() -> Tensor:
    """Accumulators of a tile."""
    counts = torch.zeros(len(COUNTS), dtype=torch.int64)
    counts[COUNTS["first_bad_step"]] = -1
    return counts


def pack(k: int = 8, **numbers: Any) -> Tensor:
    """The packed numbers of ``LRTTConfig(**numbers)``."""
    return LRTTConfig(**{"reinit_gain": 1.0, "rank": 1} | numbers).pack(k)


def pulse(
    w: Tensor,
    x: Tensor,
    d: Tensor,
    lr: float,
    hyper: Tensor,
    *,
    seed: int = 0,
    step: int = 0,
    array: int = 2,
    first: int = 0,
) -> Tensor:
    """``pulsed_update_`` of one array in place; returns its counts."""
    counts = fresh_counts()
    torch.ops.lrtt.pulsed_update_(
        [w],
        [x],
        [d],
        [torch.tensor(lr, dtype=torch.float32)],
        [fresh_state(seed, step)],
        [counts],
        [hyper],
        [array],
        [first],
    )
    return counts


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of bit patterns: stricter than ``torch.equal`` on the sign of zero, and true for equal NaNs."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.numel() == 0:
        return True
    a, b = (t.detach().reshape(-1).clone(memory_format=torch.contiguous_format) for t in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reproducible normals."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def clean_environment(**more: str) -> dict[str, str]:
    """The environment of a fresh process: without what an earlier group of workers left in ours."""
    left = {
        "MASTER_ADDR",
        "MASTER_PORT",
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "NODE_RANK",
        "LOCAL_WORLD_SIZE",
    }
    return {name: value for name, value in os.environ.items() if name not in left} | more


class Operators(TorchDispatchMode):
    """The calls of our operators, by name, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lrtt":
            self.calls.append((func._schema.name.removeprefix("lrtt::"), args))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]
