"""What docs/algorithm.md and docs/performance.md say of their figures, on the functions that draw them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lrtt import LRTTConfig, devices

DOCS = Path(__file__).resolve().parent.parent / "docs"


def load(name: str) -> Any:
    """The script docs/``name``.py as a module, `figures` of which lies beside it."""
    pytest.importorskip("matplotlib", reason="figures need the extra plot")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(DOCS))
        spec = importlib.util.spec_from_file_location(f"{name}_figures", DOCS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    sys.modules.pop("figures", None)
    return module


@pytest.fixture(scope="module")
def script() -> Any:
    return load("algorithm")


def test_a_transfer_moves_the_product_into_c_and_the_weight_does_not_jump(script: Any) -> None:
    run = script.regression(LRTTConfig(rank=4, transfer_every=25), 50, 0.05)
    before, after = slice(0, None, 2), slice(1, None, 2)  # each step's transfer
    torch.testing.assert_close(run["w"][after], run["w"][before], rtol=0, atol=1e-6)  # sums of a few float32
    moved = run["AB"][before] - run["AB"][after] > 1e-3
    assert moved.nonzero().flatten().tolist() == [24, 49]
    assert run["C"][48] == 0  # before the first transfer
    torch.testing.assert_close(run["C"][49], run["AB"][48])
    assert run["error"][-1] < 0.8 * run["error"][0]


def test_random_pulses_lead_to_the_symmetry_point_and_noise_keeps_sgd_from_its_target(script: Any) -> None:
    quiet = {name: 0.0 for name in ("dw_min_dtod", "up_down_dtod", "w_max_dtod", "w_min_dtod")}
    device = devices.SoftBounds(dw_min=0.02, up_down=0.3, w_max=1.0, w_min=-1.0, **quiet)
    generator = torch.Generator().manual_seed(0)
    ends = []
    for start in (-0.8, 0.8):
        cells = script.Cells(device, 256, 1, start)
        for _ in range(400):
            sign = torch.randint(0, 2, (1, 256), generator=generator) * 2.0 - 1.0
            cells.update(torch.ones(1, 1), sign, device.granularity)
        ends.append(cells.w.mean().item())
    # A cell forgets its start by 1.7 dw / 2 a pulse and keeps a spread of about sqrt(dw) / 2 = 0.07: 0.005 of 256.
    assert ends == pytest.approx([0.3 / 1.7] * 2, abs=0.03)
    means = []
    for noise in (0.1, 2.0):
        cells = script.Cells(device, 256, 1)
        for _ in range(300):
            gradient = (cells.w.t() - 0.6) + noise * torch.randn(1, 256, generator=generator)
            cells.update(torch.ones(1, 1), gradient, 0.05)
        means.append(cells.w.mean().item())
    assert 0.3 / 1.7 < means[1] < means[0] - 0.1 < 0.6


def test_the_figures_are_drawn(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[str] = []
    monkeypatch.setattr(script, "save", lambda figure, name, dpi: saved.append(name))
    script.trains()
    assert saved == ["algorithm_pulses.png"]
    assert {path.name for path in DOCS.glob("algorithm_*.png")} == {
        f"algorithm_{name}.png" for name in ("cycles", "pulses", "symmetry", "update")
    }


def test_the_parts_of_a_step_add_up_to_the_step() -> None:
    """The tables of docs/performance.md, which the figure is drawn from: kernels, and at most 2 us between two of 25."""
    table = load("performance").table
    step, parts = 1e3 * table("training")["LR-TT pulsed, light"][0], table("part of a step")
    kernels = sum(found[0] for found in parts.values())
    assert kernels < step < kernels + 50
    with pytest.raises(ValueError, match="must have a table that begins with 'nothing'"):
        table("nothing")
