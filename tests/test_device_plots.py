"""Measured characteristics of devices against closed forms; figures, ``lrtt device``, and figures in TensorBoard."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers import quiet
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_helpers import Net, loader, trainer
from lightning_lrtt.callbacks import TileMonitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lrtt import LRTTConfig, device_command, device_plots, devices, presets
from lightning_lrtt.cli import main


def test_response_of_soft_bounds_is_geometric():
    """b - w shrinks by 1 - s/b a pulse up, w + b likewise down; rounding 3 * 2^-24 a pulse, at most 60 of them."""
    device = quiet(devices.SoftBounds, dw_min=0.01)
    trace = device_plots.response(device, pulses=50, cells=2, every=10)
    assert trace.shape == (11, 2)
    number = torch.arange(0, 51, 10, dtype=torch.float64)
    up = 0.6 - 1.2 * (1 - 0.01 / 0.6) ** number
    down = -0.6 + (up[-1] + 0.6) * (1 - 0.01 / 0.6) ** number[1:]
    assert float((trace[:, 0].double() - torch.cat([up, down])).abs().max()) < 60 * 3 * 2.0**-24


def test_a_pair_starts_at_zero_and_fills_up():
    """2 pulses up and 2 down leave w = 0 and both cells at 2 steps, so that a second cycle starts from less room."""
    device = devices.OneSided(device=quiet(devices.SoftBounds, dw_min=0.1))
    trace = device_plots.response(device, pulses=2, cells=1, cycles=2).flatten()
    assert trace[4] == 0.0
    assert trace[5] < trace[1]


def test_steps_are_without_noise_and_of_the_same_cells():
    device = devices.LinearStep(
        dw_min=0.01, dw_min_std=2.0, write_noise_std=3.0, gamma_up=0.5, gamma_up_dtod=0.0, w_max_dtod=0.0
    )
    up, down = device_plots.steps(device, [0.0, 0.3], cells=50)
    # at 0.3 of w_max 0.6 the up step is 1 - 0.5 * 0.5 of that at 0; at 0.3 a step of 0.01 is rounded by 3e-6 of it
    assert torch.allclose(up[1] / up[0], torch.full((50,), 0.75), rtol=1e-4)
    assert float(up[0].std()) > 0.001  # dw_min_dtod
    assert (down < 0).all()


def test_number_of_states_and_symmetry_point():
    """ConstantStep: the width of the range by the step. SoftBounds of unequal steps: up = down where
    s_up (1 - w / b) = s_dn (1 + w / b), at w = b (s_up - s_dn) / (s_up + s_dn); the grid interpolates a line exactly.
    """
    constant = device_plots.characteristics(
        quiet(devices.ConstantStep, dw_min=0.0078125, w_max=0.5, w_min=-0.5), cells=3
    )
    assert constant.states.tolist() == [128.0] * 3
    assert constant.symmetry_point.isnan().all()
    assert str(constant) == "number of states 128 (128 to 128); symmetry point none"
    soft = device_plots.characteristics(quiet(devices.SoftBounds, dw_min=0.01, up_down=0.5), cells=2)
    expected = 0.6 * (1 - 0.5) / (1 + 0.5)
    assert soft.symmetry_point.tolist() == pytest.approx([expected] * 2, abs=1e-4)  # differences of 0.01 rounded at 0.6


def test_the_reference_moves_the_symmetry_point_to_zero():
    """Calibrated arrays: points spread by reference_std = 0.05 around 0. 5 standard errors of a median."""
    device = presets.device("reram_array_om")
    points = device_plots.characteristics(device, cells=1000).symmetry_point
    points = points[points.isfinite()]
    assert float(points.median()) == pytest.approx(0.0, abs=5 * 1.25 * 0.05 / 1000**0.5)
    inner = (points.quantile(0.84) - points.quantile(0.16)) / 2
    assert float(inner) == pytest.approx(0.05, rel=0.2)  # the grid is 0.05 wide


@pytest.mark.parametrize(
    "device", [devices.ExpStep(), devices.OneSided(), presets.device("reram_sb")], ids=["exp", "pair", "noisy"]
)
def test_figures(device):
    """Four panels whose curves are the measured ones."""
    pytest.importorskip("matplotlib", reason="figures need it")
    figure = device_plots.plot_response(device, "a name", pulses=20, cells=30)
    assert figure.get_suptitle() == "a name"
    panels = figure.axes
    assert [panel.get_xlabel() for panel in panels] == [
        "pulse: 20 up, 20 down",
        "weight",
        "number of states",
        "symmetry point",
    ]
    single = torch.from_numpy(panels[0].lines[0].get_ydata())
    assert torch.equal(single, device_plots.response(device, 20, 30)[:, 0])
    assert panels[0].lines[0].get_xdata()[-1] == 40


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_command_writes_the_figure(tmp_path, caplog, suffix):
    pytest.importorskip("matplotlib", reason="figures need it")
    target = tmp_path / f"out.{suffix}"
    caplog.set_level(logging.INFO)
    main(
        [
            "device",
            "OneSided",
            "--set",
            "device=ecram",
            "--set",
            "refresh_every=10",
            "--plot",
            str(target),
            "--cells",
            "20",
            "--pulses",
            "30",
        ]
    )
    assert target.read_bytes()[:4] in (b"\x89PNG", b"<?xm")
    assert [file.name for file in tmp_path.iterdir()] == [target.name]
    assert "number of states" in caplog.text
    assert "refresh_every=10" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["flash"], "lrtt device: NAME must be one of 'capacitor'"),
        (["ecram", "--set", "dw=1"], "--set must be field=value with a field of LinearStep, got 'dw=1'"),
        (["ecram", "--set", "dw_min=-1"], "LinearStep: dw_min must be finite and > 0, got -1"),
        (["ecram", "--set", "dw_min=x"], "--set dw_min must be a number, True, False or a tuple of numbers, got 'x'"),
        (["ecram", "--cells", "1"], "--cells must be between 2 and 1000000, got 1"),
        (["ecram", "--pulses", "0"], "--pulses must be >= 1, got 0"),
        (
            ["ecram", "--plot", "x.bmp", "--cells", "2"],
            "save_plot: path must be a file named *.png, *.pdf, *.svg, got 'x.bmp'",
        ),
    ],
)
def test_command_refuses(capsys, words, message):
    with pytest.raises(SystemExit) as end:
        main(["device", *words])
    assert end.value.code == 1
    assert message in capsys.readouterr().err


def test_find_device_takes_tuples_and_booleans():
    found = device_command.find_device(
        "PiecewiseStep", ["piecewise_up=(1.0, 0.5)", "piecewise_down=(0.5, 1.0)", "enforce_consistency=False"]
    )
    assert found == devices.PiecewiseStep(piecewise_up=(1.0, 0.5), piecewise_down=(0.5, 1.0), enforce_consistency=False)


def test_monitor_draws_each_device_once(tmp_path: Path):
    """Two tiles with two devices: two images, before the first step."""
    pytest.importorskip("matplotlib", reason="figures need it")
    config = LRTTConfig(
        rank=2, reinit_gain=1.0, fast_device=devices.SoftBounds(dw_min=0.01), visible_device=presets.device("ecram")
    )
    trainer(tmp_path, [TileMonitor(device_plots=True)], config, limit_train_batches=1).fit(Net(), loader(2))
    read = EventAccumulator(str(tmp_path / "run" / "version_0"), size_guidance={"images": 0}).Reload()
    assert sorted(tag for tag in read.Tags()["images"] if tag.startswith("device/")) == [
        "device/SoftBounds",
        "device/ecram",
    ]
    assert [image.step for image in read.Images("device/ecram")] == [0]


def test_monitor_without_tensorboard_is_refused(tmp_path: Path):
    config = LRTTConfig(rank=2, visible_device=devices.SoftBounds())
    run = trainer(tmp_path, [TileMonitor(device_plots=True)], config, logger=CSVLogger(tmp_path))
    with pytest.raises(MisconfigurationException, match="device_plots=True needs a TensorBoardLogger"):
        run.fit(Net(), loader(2))
