"""The device models of csrc/devices.h in plain PyTorch: drawn cells and the change of a weight by one pulse.

Everything is float32 in the order of the header, so the numbers are the compiled core's, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lrtt._compiled import LAYOUT
from lightning_lrtt.ops.reference_random import (
    DIFFUSION,
    DRAW,
    counter3,
    element_words,
    exp,
    f32,
    fma,
    less,
    more,
    normal,
    philox,
    power,
    uniform,
)

CONSTANT, LINEAR, SOFT, SOFT_REFERENCE, EXP, POW, POW_REFERENCE, PIECEWISE = range(1, 9)  # DeviceKind
Params = dict[str, Tensor]
_ZERO, _ONE = f32(0.0), f32(1.0)


class Cells(NamedTuple):
    """Drawn cells: bounds, step sizes, and the model's own numbers, in one shape."""

    b_max: Tensor
    b_min: Tensor
    s_up: Tensor
    s_dn: Tensor
    e0: Tensor
    e1: Tensor
    e2: Tensor


def device_params(hyper: Tensor, visible: bool) -> Params:
    """The device numbers of the fast or the visible array by name, float32."""
    start = len(LAYOUT["tile"]) + (len(LAYOUT["device"]) if visible else 0)
    return dict(zip(LAYOUT["device"], hyper[start:].float(), strict=False))


def cells(p: Params, key: int, array: int, index: Tensor) -> Cells:
    """The drawn devices of the cells ``index``, in the shape of ``index``."""
    n0, n1, n2 = (philox(key, index, block, 0, counter3(DRAW, array)) for block in range(3))
    b_max = p["w_max"] * fma(p["w_max_dtod"], normal(n0[0]), _ONE)
    b_min = p["w_min"] * fma(p["w_min_dtod"], normal(n0[1]), _ONE)
    xi = normal(n0[2])
    if p["dw_min_dtod_log_normal"]:
        gain = exp(less(more(p["dw_min_dtod"] * xi, f32(-60.0)), f32(60.0)))
    else:
        gain = fma(p["dw_min_dtod"], xi, _ONE)
    rho = p["up_down_dtod"] * normal(n0[3])
    s_up = ((less(p["up_down"], _ZERO) + gain) + rho) * p["dw_min"]
    s_dn = ((gain - more(p["up_down"], _ZERO)) - rho) * p["dw_min"]
    if p["enforce_consistency"]:
        s_up, s_dn = s_up.abs(), s_dn.abs()
        b_max, b_min = more(b_max, b_min).abs(), -less(b_max, b_min).abs()
    else:
        middle = b_max + (b_min - b_max) * 0.5
        empty = b_min > b_max
        b_max, b_min = torch.where(empty, middle, b_max), torch.where(empty, middle, b_min)
    if p["corrupt_devices_prob"] > 0:
        stuck = uniform(n1[2]) < p["corrupt_devices_prob"]
        low, high = more(b_min, -p["corrupt_devices_range"]), less(b_max, p["corrupt_devices_range"])
        value = fma(high - low, uniform(n1[3]), low)
        b_max, b_min = torch.where(stuck, value, b_max), torch.where(stuck, value, b_min)
        s_up, s_dn = torch.where(stuck, _ZERO, s_up), torch.where(stuck, _ZERO, s_dn)
    zero = torch.zeros_like(b_max)
    return _derive(p, n1, n2, Cells(b_max, b_min, s_up, s_dn, zero, zero, zero))


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, 0 where the denominator is."""
    return torch.where(denominator != 0, numerator / denominator, _ZERO)


def _derive(p: Params, n1: Tensor, n2: Tensor, c: Cells) -> Cells:
    """The model's own numbers."""
    kind = int(p["kind"])
    spread = c.b_max - c.b_min
    if kind == LINEAR:
        up = fma(p["gamma_up_dtod"], normal(n1[0]), p["gamma_up"])
        down = fma(p["gamma_down_dtod"], normal(n1[1]), p["gamma_down"])
        if not p["allow_increasing_slope"]:
            up, down = up.abs(), down.abs()
        up_ref, down_ref = (p["w_max"], p["w_min"]) if p["mean_bound_reference"] else (c.b_max, c.b_min)
        return c._replace(e0=_over(up, up_ref), e1=_over(down, down_ref))
    if kind == SOFT:
        return c._replace(e0=_over(_ONE, c.b_max), e1=_over(_ONE, c.b_min))
    if kind == SOFT_REFERENCE:
        consistent = (c.b_max > 0) & (c.b_min < 0)
        up = fma(p["slope_up_dtod"], normal(n1[0]), _ONE).abs()
        down = fma(p["slope_down_dtod"], normal(n1[1]), _ONE).abs()
        b_max = torch.where(consistent & (up > 0), c.b_max / up, c.b_max)
        b_min = torch.where(consistent & (down > 0), c.b_min / down, c.b_min)
        e0, e1 = more(_over(_ONE, b_max), _ZERO), less(_over(_ONE, b_min), _ZERO)
        slopes = fma(c.s_up, e0, -(c.s_dn * e1))
        centred = consistent & (slopes > 0) & bool(p["subtract_symmetry_point"])
        point = torch.where(centred, (c.s_up - c.s_dn) / slopes, _ZERO)
        shift = fma(p["reference_std"], normal(n2[0]), p["reference_mean"]) + point
        return c._replace(b_max=b_max - shift, b_min=b_min - shift, e0=e0, e1=e1, e2=shift)
    if kind == EXP:
        open_ = spread > 0
        return c._replace(
            e0=torch.where(open_, 2.0 * p["a"] / spread, _ZERO),
            s_up=torch.where(open_, c.s_up, _ZERO),
            s_dn=torch.where(open_, c.s_dn, _ZERO),
        )
    if kind in (POW, POW_REFERENCE):
        gain, rho = fma(p["pow_gamma_dtod"], normal(n1[0]), _ONE), p["pow_up_down_dtod"] * normal(n1[1])
        e0 = ((less(p["pow_up_down"], _ZERO) + gain) + rho) * p["pow_gamma"]
        e1 = ((gain - more(p["pow_up_down"], _ZERO)) - rho) * p["pow_gamma"]
        if p["enforce_consistency"]:
            e0, e1 = e0.abs(), e1.abs()
        c = c._replace(e0=e0, e1=e1)
        if kind == POW:
            return c
        shift = fma(p["reference_std"], normal(n2[0]), p["reference_mean"])
        return c._replace(b_max=c.b_max - shift, b_min=c.b_min - shift, e2=shift)
    if kind == PIECEWISE:
        return c._replace(e0=torch.where(spread > 0, p["sections"] / spread, _ZERO))
    return c


def moved(p: Params, c: Cells, w: Tensor, up: Tensor, noise: Tensor) -> Tensor:
    """w after one pulse, before clipping."""
    return fma(torch.where(up, c.s_up, -c.s_dn), _strength(p, c, w, up, noise), w)


class Burst(NamedTuple):
    """One direction of cells: csrc/bursts.h."""

    s: Tensor
    h: Tensor
    mean: Tensor
    shake: Tensor
    most: Tensor  # pulses that may act at once


FEW_SLOTS = 4  # of the longest train of a block: its pulses act one by one


def takes_bursts(p: Params) -> bool:
    """Whether the pulses of a sample act at once: the strength is linear in the weight, and noise below one step."""
    return int(p["kind"]) in (CONSTANT, LINEAR, SOFT, SOFT_REFERENCE) and bool(p["dw_min_std"] <= 1)


def burst_of(p: Params, c: Cells, up: Tensor) -> Burst:
    """The numbers of bursts upwards or downwards."""
    s = torch.where(up, c.s_up, -c.s_dn)
    h = s * torch.where(up, c.e0, c.e1)
    small = h.abs() <= 0.0625
    series = fma(h, f32(0.16666667), f32(0.2))
    for coefficient in (0.25, 0.33333334, 0.5, 1.0):
        series = fma(h, series, f32(coefficient))
    sigma = p["mult_noise"] * p["dw_min_std"]
    shake = torch.where(small, 1.0 / (1.0 - h), _ONE)
    mean = torch.where(small, fma(0.5 * h * (shake * shake), sigma * sigma, series), _ONE)
    return Burst(s, h, mean, shake, torch.where(small, 0.25 / more(h.abs(), f32(1e-9)), _ZERO))


def burst(p: Params, c: Cells, b: Burst, w: Tensor, n: Tensor, eta: Tensor) -> Tensor:
    """w after n pulses with the noise eta = sigma sqrt(n) xi, before clipping."""
    t = fma(n, b.mean, b.shake * eta if p["mult_noise"] else _ZERO)
    y = b.h * t
    e = fma(y, f32(-0.0013888889), f32(0.0083333338))
    for coefficient in (-0.041666668, 0.16666667, -0.5, 1.0):
        e = fma(y, e, f32(coefficient))
    state = w + c.e2 if int(p["kind"]) == SOFT_REFERENCE else w
    moved = fma(fma(-b.h, state, b.s), e * t, w)
    return moved if p["mult_noise"] else fma(b.s * eta, fma(-0.5 * b.h, n - 1.0, _ONE), moved)


def _strength(p: Params, c: Cells, w: Tensor, up: Tensor, noise: Tensor) -> Tensor:
    """The change of w by one pulse in units of the cell's step."""
    kind = int(p["kind"])
    if kind == CONSTANT:
        return 1.0 + noise
    if kind in (LINEAR, SOFT, SOFT_REFERENCE):
        state = w + c.e2 if kind == SOFT_REFERENCE else w
        slope = fma(torch.where(up, c.e0, c.e1), -state, _ONE)
        return fma(slope if p["mult_noise"] else _ONE, noise, slope)
    if kind == EXP:
        z = fma(c.e0, w, p["b"])
        exponent = torch.where(up, p["gamma_up"] * z, -(p["gamma_down"] * z))
        amplitude = torch.where(up, p["A_up"], p["A_down"])
        y = more(1.0 - amplitude * exp(less(more(exponent, f32(-80.0)), f32(80.0))), _ZERO)
        return y * (1.0 + noise)
    if kind in (POW, POW_REFERENCE):
        spread = c.b_max - c.b_min
        share = torch.where(spread > 0, torch.where(up, c.b_max - w, w - c.b_min) / spread, _ZERO)
        return power(share, torch.where(up, c.e0, c.e1)) * (1.0 + noise)
    return _height(p, c, w, up) * (1.0 + noise)


def _height(p: Params, c: Cells, w: Tensor, up: Tensor) -> Tensor:
    """PiecewiseStep: the nodes of the direction, interpolated at w."""
    place = more((w - c.b_min) * c.e0, _ZERO)
    left = less(place, more(p["sections"] - 1.0, _ZERO)).trunc()
    t = less(place - left, _ONE)
    heights = []
    for direction in ("up", "down"):
        nodes = torch.stack([p[f"piecewise_{direction}_{i}"] for i in range(16)])
        low, high = nodes[left.long()], nodes[left.long() + 1]
        heights.append(fma(t, high - low, low))
    return torch.where(up, heights[0], heights[1])


def relax(p: Params, key: int, array: int, index: Tensor, w: Tensor, step: int) -> Tensor:
    """w after one step of decay and diffusion."""
    c = cells(p, key, array, index)
    n3 = philox(key, index, 3, 0, counter3(DRAW, array))
    if p["lifetime"] > 0:
        lifetime = p["lifetime"] * fma(p["lifetime_dtod"], normal(n3[0]), _ONE)
        keep = torch.where(lifetime > 1, 1.0 - 1.0 / lifetime, _ZERO)
        target = fma(p["reset_dtod"], normal(n3[1]), p["reset"])
        w = more(less(fma(w - target, keep, target), c.b_max), c.b_min)
    if p["diffusion"] > 0:
        rate = (p["diffusion"] * fma(p["diffusion_dtod"], normal(n3[2]), _ONE)).abs()
        word = element_words(key, index.flatten(), 0, step, counter3(DIFFUSION, array)).view(index.shape)
        w = more(less(fma(rate, normal(word), w), c.b_max), c.b_min)
    return w
