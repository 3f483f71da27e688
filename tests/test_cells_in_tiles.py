"""Tiles on devices that hold more than the weight: state, loading, resume, averages, export, resets, training."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import quiet, randn, same_bits
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_lrtt import LRTT, LRTTConfig, convert_to_digital, convert_to_lrtt, devices, presets
from lightning_lrtt.export import digital_state_dict
from lightning_lrtt.nn import LRTTLinear, find_tiles
from lightning_lrtt.nn.average import average_effective_weights

NOISY = devices.SoftBounds(dw_min=0.002, w_max=1.0, w_min=-1.0, write_noise_std=5.0, lifetime=500.0)
PAIR = devices.OneSided(device=devices.SoftBounds(dw_min=0.002, w_max=1.0, w_min=-1.0), refresh_every=2)
CONFIGS = {
    "noisy": LRTTConfig(rank=2, transfer_every=3, reinit_gain=1.0, fast_device=NOISY, visible_device=NOISY),
    "pair": LRTTConfig(rank=2, transfer_every=3, reinit_gain=1.0, fast_device=PAIR, visible_device=PAIR),
    "visible_pair": LRTTConfig(rank=2, transfer_every=3, visible_device=PAIR),
    "noisy_digital_transfer": LRTTConfig(rank=2, transfer_every=3, visible_device=NOISY, transfer_mode="digital"),
    "residual": LRTTConfig(
        rank=2,
        transfer_every=3,
        reinit_gain=1.0,
        fast_device=NOISY,
        visible_device=PAIR,
        transfer_mode="pulsed_residual",
        transfer_max_words=1,
    ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def network(config):
    return convert_to_lrtt(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), config)


def train(model, first, last, lr=0.1):
    """Steps ``first`` to ``last`` of a run; its data are a function of the step."""
    optimizer, losses = LRTT(model.parameters(), lr=lr), []
    for step in range(first, last):
        optimizer.zero_grad()
        x = randn(step, 16, 6)
        loss = (model(x) - x[:, :3].sin()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert same_bits(one[name], other[name]), name


def test_only_what_is_needed_is_stored():
    """A plain tile has no buffer for its cells; a mixed one has those of its devices."""
    plain = LRTTLinear(6, 5, config=LRTTConfig(rank=2, visible_device=devices.SoftBounds()))
    assert not [name for name in plain.state_dict() if "cells" in name]
    mixed = LRTTLinear(6, 5, config=LRTTConfig(rank=2, fast_device=NOISY, visible_device=PAIR)).state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in mixed.items() if "cells" in name}
    assert shapes == {"A_cells": [1, 5, 2], "B_cells": [1, 2, 6], "C_cells": [2, 5, 6]}


@every_config
def test_resume_at_any_step_is_exact(config):
    """Through a file that torch.load reads with weights_only, into a model that was initialised otherwise."""
    torch.manual_seed(0)
    model = network(config)
    saved = {}
    for step in range(7):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        saved[step] = file.getvalue()
        train(model, step, step + 1)
    for step in (0, 2, 3, 5):
        other = network(config)
        other.load_state_dict(torch.load(io.BytesIO(saved[step]), weights_only=True))
        train(other, step, 7)
        assert_same_state(other.state_dict(), model.state_dict())


def test_the_persistent_weight_is_what_moves():
    """Loading a state restores it: what is read alone would not go on alike."""
    model = network(CONFIGS["noisy"])
    tile = model[0]
    train(model, 0, 1)
    assert float((tile.C_cells[0] - tile.matrix).abs().max()) > 0
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].C_cells.zero_()
    train(model, 1, 4)
    train(other, 1, 4)
    assert not same_bits(model[0].C_cells, other[0].C_cells)


def test_a_digital_checkpoint_is_written_to_the_cells():
    source = nn.Linear(6, 5)
    nn.init.uniform_(source.weight, -0.1, 0.1, generator=torch.Generator().manual_seed(0))
    configs = (LRTTConfig(rank=2, visible_device=device) for device in (NOISY, PAIR))
    noisy, pair = (LRTTLinear(6, 5, config=config, tile=0) for config in configs)
    for tile in (noisy, pair):
        # Each cell has bounds of its own, which the tile's number decides; the nearest of tile 0 is 0.134 away.
        assert tile.write_visible(source.weight) == 0, "a weight at or beyond the bound of its cell"
        tile.write_visible(torch.zeros(5, 6))
        tile.load_state_dict(source.state_dict())
    assert same_bits(noisy.C_cells[0], source.weight)
    assert not same_bits(noisy.weight, source.weight)
    assert same_bits(pair.C_cells[0] - pair.C_cells[1], source.weight)
    assert same_bits(pair.weight, source.weight)
    assert float(pair.C_cells.min()) == 0.0


def test_a_checkpoint_without_cells_is_refused():
    tile = LRTTLinear(6, 5, config=CONFIGS["pair"])
    state = tile.state_dict()
    del state["C_cells"]
    with pytest.raises(RuntimeError, match="C_cells"):
        LRTTLinear(6, 5, config=CONFIGS["pair"]).load_state_dict(state)


def test_a_checkpoint_of_another_device_is_refused():
    other = devices.OneSided(device=devices.SoftBounds(dw_min=0.002, w_max=1.0, w_min=-1.0), refresh_every=4)
    tile = LRTTLinear(6, 5, config=LRTTConfig(rank=2, visible_device=other))
    with pytest.raises(RuntimeError, match=r"visible_device.refresh_every is 2 in the checkpoint and 4 here"):
        tile.load_state_dict(LRTTLinear(6, 5, config=LRTTConfig(rank=2, visible_device=PAIR)).state_dict())


@every_config
def test_export_and_conversion_take_what_is_read(config):
    model = network(config)
    train(model, 0, 2)
    x = randn(9, 4, 6)
    expected = model(x)
    plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    plain.load_state_dict(digital_state_dict(model.state_dict()))
    digital = convert_to_digital(copy.deepcopy(model))
    assert not [name for name in digital.state_dict() if "cells" in name]
    for other in (plain, digital):
        # C + A B is rounded once more where it is summed before the product: 10 terms below 4 in float32
        assert float((other(x) - expected).abs().max()) < 40 * 2.0**-24 * 4


@every_config
def test_averages_hold_what_they_show(config):
    model = network(config)
    averaged = average_effective_weights(AveragedModel(model))
    train(model, 0, 2)
    averaged.update_parameters(model)
    for name, tile in find_tiles(averaged.module).items():
        assert float((tile.effective_weight() - find_tiles(model)[name].effective_weight()).abs().max()) < 1e-6
        held = tile.C_cells
        assert same_bits(held[0] if len(held) == 1 else held[0] - held[1], tile.matrix)
    train(averaged.module, 2, 4)  # it can be trained on


def test_reset_cells_of_a_tile():
    cell = quiet(devices.SoftBounds, reset=0.125)
    tile = LRTTLinear(6, 5, config=LRTTConfig(rank=2, fast_device=cell, visible_device=devices.OneSided(device=cell)))
    before = tile.weight.detach().clone()
    tile.reset_cells("C", slice(1, 3))
    assert tile.C_cells[:, :, 1:3].eq(0.125).all()
    assert tile.weight[:, 1:3].eq(0.0).all()
    assert same_bits(tile.weight[:, 3:], before[:, 3:])
    tile.reset_cells("A")
    assert tile.A.eq(0.125).all()
    tile.reset_cells("B", probability=0.0)
    assert not tile.B.eq(0.125).any()
    with pytest.raises(ValueError, match="columns must be a slice without a step"):
        tile.reset_cells("C", slice(0, 4, 2))
    with pytest.raises(ValueError, match="array must be one of 'A', 'B', 'C', got 'D'"):
        tile.reset_cells("D")
    with pytest.raises(ValueError, match=r"probability must be finite and >= 0 and <= 1, got 2.0"):
        tile.reset_cells("C", probability=2.0)
    with pytest.raises(ValueError, match="array 2 has no device"):
        LRTTLinear(6, 5, config=LRTTConfig(rank=2)).reset_cells("C")


@pytest.mark.parametrize("name", ["pair", "noisy"])
def test_training_learns(name):
    """The loss falls below a third; without learning it stays at about its start."""
    torch.manual_seed(0)
    losses = train(network(CONFIGS[name]), 0, 150, lr=0.2)
    assert sum(losses[-10:]) < sum(losses[:10]) / 3


@pytest.mark.parametrize("name", presets.DEVICES)
def test_every_preset_takes_a_step(name):
    model = network(getattr(presets, name)(rank=2, transfer_every=1, reinit_gain=0.3))
    before = [tile.matrix.clone() for tile in find_tiles(model).values()]
    train(model, 0, 3, lr=1.0)
    for tile, old in zip(find_tiles(model).values(), before, strict=True):
        assert torch.isfinite(tile.effective_weight()).all()
        assert not torch.equal(tile.matrix, old)


def test_a_pair_bounds_both_signs_alike():
    """``clipped_power`` of a pair: g+ and g- both end at w_max, whatever w_min. A std far beyond gives w_max^2."""
    inner = quiet(devices.SoftBounds, w_max=0.5, w_min=-0.1)
    assert devices.OneSided(device=inner).clipped_power(1e4) == pytest.approx(0.25, rel=1e-3)
    assert inner.clipped_power(1e4) == pytest.approx((0.25 + 0.01) / 2, rel=1e-3)
