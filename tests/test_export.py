"""``lrtt export``: a checkpoint with tiles becomes a digital one with the effective weights."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from lightning_helpers import DIGITAL, PULSED, Net, loader, trainer
from torch import nn

from lightning_lrtt import LRTTConfig, convert_to_digital, convert_to_lrtt, devices
from lightning_lrtt.cli import main
from lightning_lrtt.export import digital_state_dict, export_checkpoint
from lightning_lrtt.nn import LRTTLinear, find_tiles
from lightning_lrtt.nn.identity import decode

needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="needs safetensors (pip install safetensors)"
)
both = pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])


class Mixed(nn.Module):
    """Every kind of tile, a layer of another kind, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.line = nn.Conv1d(3, 4, 2, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4 * 15, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.line(self.conv(x).flatten(2)))
        return self.out(y.flatten(1).relu())


@pytest.fixture
def lrtt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The command; undoes what it sets up."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    log = logging.getLogger("lightning_lrtt")
    level, handlers = log.level, list(log.handlers)
    yield lambda *words: main([str(word) for word in words])
    log.setLevel(level)
    log.handlers[:] = handlers


def moved(model: nn.Module) -> nn.Module:
    """With factors as in the middle of a cycle."""
    for tile in find_tiles(model).values():
        nn.init.normal_(tile.A, std=0.3)
        nn.init.normal_(tile.B, std=0.3)
    return model.eval()


def trained(tmp_path: Path, config: LRTTConfig) -> tuple[Net, Path]:
    """A module in the middle of a cycle (T = 4) and its checkpoint."""
    torch.manual_seed(0)
    model, run = Net(), trainer(tmp_path, [], config, max_steps=6)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "model.ckpt")
    assert float(find_tiles(model)["net.0"].A.detach().abs().max()) > 0
    return model, tmp_path / "model.ckpt"


def read(path: Path) -> dict[str, torch.Tensor]:
    """The exported state dict."""
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    from safetensors.torch import load_file

    return load_file(path)


# ------------------------------------------------------------------ round trip


@both
@pytest.mark.parametrize("suffix", ["pt", pytest.param("safetensors", marks=needs_safetensors)])
def test_the_command_exports_a_lightning_checkpoint(tmp_path: Path, lrtt: Any, config: LRTTConfig, suffix: str) -> None:
    """Strictly into the untouched module, whose outputs are the tiles' (float32 sums in another order)."""
    model, checkpoint = trained(tmp_path, config)
    lrtt("export", checkpoint, "--to", tmp_path / f"model.{suffix}")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == sorted(["model.ckpt", f"model.{suffix}"])
    digital = Net()
    digital.load_state_dict(read(tmp_path / f"model.{suffix}"), strict=True)
    x = loader().dataset.tensors[0]
    torch.testing.assert_close(digital.net(x), model.net(x), rtol=0, atol=1e-6)
    for name, value in convert_to_digital(model).state_dict().items():
        assert same_bits(value, digital.state_dict()[name]), name


@pytest.mark.parametrize("alpha", [1.0, 0.3, -2.0])
def test_every_kind_of_tile(alpha: float) -> None:
    torch.manual_seed(0)
    tiles = moved(convert_to_lrtt(Mixed(), LRTTConfig(rank=2, alpha=alpha)))
    digital = Mixed().eval()
    digital.load_state_dict(digital_state_dict(tiles.state_dict()), strict=True)
    x = torch.randn(7, 1, 6, 6)
    torch.testing.assert_close(digital(x), tiles(x), rtol=1e-5, atol=1e-5)  # sums of 60 terms of order 1
    live = convert_to_digital(tiles)
    assert all(same_bits(value, digital.state_dict()[name]) for name, value in live.state_dict().items())


def test_a_tile_by_itself() -> None:
    tile = moved(LRTTLinear(4, 3, config=DIGITAL))
    linear = nn.Linear(4, 3)
    linear.load_state_dict(digital_state_dict(tile.state_dict()))
    assert torch.equal(linear.weight, tile.effective_weight())


def test_torch_export_of_the_exported_module() -> None:
    torch.manual_seed(0)
    tiles = moved(convert_to_lrtt(Mixed(), DIGITAL))
    x = torch.randn(2, 1, 6, 6)
    expected = tiles(x).detach()
    program = torch.export.export(convert_to_digital(tiles), (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-5)


@both
def test_a_digital_checkpoint_returns_to_tiles(tmp_path: Path, config: LRTTConfig) -> None:
    """By name and strictly; where a device holds C, its bounds were wide enough for these weights."""
    _, checkpoint = trained(tmp_path, config)
    state = export_checkpoint(checkpoint, tmp_path / "model.pt")
    tiles = convert_to_lrtt(Net(), config)
    tiles.load_state_dict(state, strict=True)
    for name, tile in find_tiles(tiles).items():
        assert float(tile.A.detach().abs().max()) == 0
        # A cell's bound is drawn with a spread of 30%: a weight beyond it is clipped.
        clipped = tile.weight.detach() != state[f"{name}.weight"]
        assert clipped.float().mean() < (0.1 if config.is_pulsed else 1e-9)


def test_prefix_takes_a_submodule_out(tmp_path: Path) -> None:
    _, checkpoint = trained(tmp_path, DIGITAL)
    export_checkpoint(checkpoint, tmp_path / "net.pt", prefix="net.")
    Net().net.load_state_dict(read(tmp_path / "net.pt"), strict=True)


@needs_safetensors
def test_tied_weights_and_a_safetensors_source(tmp_path: Path) -> None:
    """A state dict with tiles goes through safetensors; tied tensors are written under each of their names."""
    from safetensors.torch import save_file

    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "hidden": nn.Linear(4, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    moved(convert_to_lrtt(model, DIGITAL))
    torch.save(model.state_dict(), tmp_path / "tiles.pt")
    state = export_checkpoint(tmp_path / "tiles.pt", tmp_path / "digital.safetensors")
    assert torch.equal(state["head.weight"], state["embed.weight"])
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "tiles.safetensors")
    again = export_checkpoint(tmp_path / "tiles.safetensors", tmp_path / "again.pt")
    assert all(torch.equal(state[name], again[name]) for name in state)


# ------------------------------------------------------------------ what a checkpoint says about itself


def test_a_checkpoint_describes_its_tiles() -> None:
    device = devices.PiecewiseStep(piecewise_up=(1.0, 0.5), piecewise_down=(1.0, 1.0))
    config = LRTTConfig(rank=2, alpha=0.1, visible_device=device)
    state = LRTTLinear(4, 3, config=config).state_dict()
    said = decode(state["_extra_state"])
    assert said["rank"] == 2
    assert said["alpha"] == 0.1
    assert said["fast_device"] is None
    assert said["visible_device"]["class_path"] == "lightning_lrtt.devices.PiecewiseStep"
    assert said["visible_device"]["init_args"]["piecewise_up"] == [1.0, 0.5]
    assert json.dumps(said)
    LRTTLinear(4, 3, config=config).load_state_dict(state)


SOFT = devices.SoftBounds(dw_min=0.002)
DISAGREE = {
    "rank": (LRTTConfig(rank=3), r"rank is 2 in the checkpoint and 3 here"),
    "alpha": (LRTTConfig(rank=2, alpha=0.5), r"alpha is 1.0 in the checkpoint and 0.5 here"),
    "no-device": (
        LRTTConfig(rank=2, visible_device=SOFT),
        r"fast_device is SoftBounds in the checkpoint and None here",
    ),
    "device": (
        LRTTConfig(rank=2, visible_device=SOFT, fast_device=devices.ConstantStep()),
        r"fast_device is SoftBounds in the checkpoint and ConstantStep here",
    ),
    "field": (
        LRTTConfig(rank=2, fast_device=SOFT, visible_device=devices.SoftBounds(dw_min=0.001)),
        r"visible_device\.dw_min is 0\.002 in the checkpoint and 0\.001 here",
    ),
}


@pytest.mark.parametrize("case", DISAGREE)
def test_a_checkpoint_of_another_tile_is_refused(case: str) -> None:
    """Before anything is copied, also without ``strict``."""
    config, message = DISAGREE[case]
    source = nn.Sequential(LRTTLinear(4, 3, config=LRTTConfig(rank=2, fast_device=SOFT, visible_device=SOFT)))
    model = nn.Sequential(LRTTLinear(4, 3, config=config))
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"LRTTLinear '0': the checkpoint's tile .*" + message + r".*lrtt export"):
        model.load_state_dict(source.state_dict(), strict=False)
    assert torch.equal(before, model[0].weight.detach())


def test_what_may_change_between_runs_loads() -> None:
    source = LRTTLinear(4, 3, config=LRTTConfig(rank=2))
    other = LRTTConfig(rank=2, transfer_every=7, seed=3, reinit="uniform")
    LRTTLinear(4, 3, config=other).load_state_dict(source.state_dict())


def test_a_checkpoint_from_before_descriptions_loads() -> None:
    state = LRTTLinear(4, 3, config=DIGITAL).state_dict()
    del state["_extra_state"]
    LRTTLinear(4, 3, config=DIGITAL).load_state_dict(state, strict=True)
    with pytest.raises(ValueError, match=r"_extra_state must be there, since alpha is in it.*save it again"):
        digital_state_dict(state)


# ------------------------------------------------------------------ errors


def test_the_commands_errors(tmp_path: Path, lrtt: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tiles, digital, junk = (tmp_path / name for name in ("tiles.pt", "digital.pt", "junk.pt"))
    torch.save(LRTTLinear(4, 3, config=DIGITAL).state_dict(), tiles)
    torch.save(nn.Linear(4, 3).state_dict(), digital)
    junk.write_bytes(b"no checkpoint at all")
    listed = tmp_path / "list.pt"
    torch.save([1, 2], listed)
    for source, target, message in (
        (tmp_path / "gone.ckpt", "x.pt", "source must be a checkpoint file, got"),
        (tmp_path, "x.pt", "which is a folder"),
        (tiles, "x.onnx", "target must be a file named *.safetensors or *.pt, got"),
        (tiles, "digital.pt", "--overwrite"),
        (digital, "x.pt", "state_dict must be that of a model with LR-TT tiles, got '2 entries without any'"),
        (junk, "x.pt", "source must"),
        (listed, "x.pt", "source must be a Lightning checkpoint or a state dict"),
    ):
        with pytest.raises(SystemExit) as stop:
            lrtt("export", source, "--to", tmp_path / target)
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("lrtt export: ")
        assert message in error
    assert not list(tmp_path.glob("x.*")) + list(tmp_path.glob(".*"))
    lrtt("export", tiles, "--to", digital, "--overwrite")
    assert torch.load(digital, weights_only=True).keys() == {"weight", "bias"}


class Secret:
    """An object that weights_only=True does not load."""


def test_objects_need_trust(tmp_path: Path, lrtt: Any, capsys: pytest.CaptureFixture[str]) -> None:
    state = LRTTLinear(4, 3, config=DIGITAL).state_dict()
    torch.save({"state_dict": state, "hyper_parameters": {"object": Secret()}}, tmp_path / "model.ckpt")
    with pytest.raises(SystemExit):
        lrtt("export", tmp_path / "model.ckpt", "--to", tmp_path / "model.pt")
    assert "--unsafe" in capsys.readouterr().err
    lrtt("export", tmp_path / "model.ckpt", "--to", tmp_path / "model.pt", "--unsafe")


def test_help_teaches(lrtt: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in ((["export", "--help"], "--to FILE"), (["--help"], "lrtt export")):
        with pytest.raises(SystemExit) as stop:
            lrtt(*words)
        assert stop.value.code == 0
        assert text in capsys.readouterr().out


def test_without_safetensors_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(LRTTLinear(4, 3, config=DIGITAL).state_dict(), tmp_path / "tiles.pt")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors, or export to"):
        export_checkpoint(tmp_path / "tiles.pt", tmp_path / "x.safetensors")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(LRTTLinear(4, 3, config=DIGITAL).state_dict(), tmp_path / "tiles.pt")
    (tmp_path / "old.pt").write_text("old")

    def fail(state: Any, path: Path) -> None:
        Path(path).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_checkpoint(tmp_path / "tiles.pt", tmp_path / "old.pt", overwrite=True)
    assert (tmp_path / "old.pt").read_text() == "old"
    assert not list(tmp_path.glob(".*"))
