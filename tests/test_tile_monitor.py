"""TileMonitor: tags, steps, values, one device-to-host transfer, the trace, and undoing what it did."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_helpers import DIGITAL, PULSED, Net, loader, trainer
from lightning_lrtt.callbacks import TileMonitor, _tile_statistics
from lightning_lrtt.callbacks._cell_bounds import CellBounds
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lrtt import LRTTConfig, devices
from lightning_lrtt.nn import LRTTConv2d, LRTTLinear, find_tiles


def events(tmp_path: Path) -> EventAccumulator:
    """Everything that was written, nothing subsampled."""
    folder = tmp_path / "run" / "version_0"
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def scalars(tmp_path: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value; asserts finite values and strictly increasing steps."""
    read = events(tmp_path)
    out = {}
    for tag in read.Tags()["scalars"]:
        points = read.Scalars(tag)
        steps = [p.step for p in points]
        assert all(math.isfinite(p.value) for p in points), tag
        assert tag == "epoch" or all(a < b for a, b in itertools.pairwise(steps)), (tag, steps)
        out[tag] = {p.step: p.value for p in points}
    return out


TAGS = [
    "tile/{}/norm_A",
    "tile/{}/norm_B",
    "tile/{}/norm_C",
    "tile/{}/norm_AB",
    "tile/{}/effective_rank_AB",
    "tile/{}/min_C",
    "tile/{}/mean_C",
    "tile/{}/max_C",
    "tile/{}/nonfinite",
    "tile/{}/stability",
    "pulse/{}/A",
    "pulse/{}/B",
    "pulse/{}/C",
    "pulse/{}/per_cell_A",
    "pulse/{}/per_cell_B",
    "pulse/{}/per_cell_C",
    "transfer/{}/count",
    "transfer/{}/clip_fraction",
]
ON_DEVICES = ["tile/{}/at_bounds_A", "tile/{}/at_bounds_B", "tile/{}/at_bounds_C", "transfer/{}/size"]


@pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])
def test_tags_and_steps_are_lightnings_own(tmp_path: Path, config: LRTTConfig) -> None:
    torch.manual_seed(0)
    trainer(tmp_path, [TileMonitor()], config, max_epochs=2).fit(Net(), loader())
    read = scalars(tmp_path)
    steps = [4, 9, 14, 19, 24, 29, 34, 39]
    assert list(read["train/loss"]) == steps  # what Lightning does
    wanted = TAGS + (ON_DEVICES if config.is_pulsed else [])
    ours = {tag for tag in read if tag.startswith(("tile/", "pulse/", "transfer/"))}
    assert ours == {tag.format(name) for tag in wanted for name in ("net.0", "net.2")}
    for tag in ours:
        assert list(read[tag]) == steps, tag
    assert list(read["transfer/net.0/count"].values()) == [1, 2, 3, 5, 6, 7, 8, 10]  # T = 4


def test_every_n_steps_is_its_own(tmp_path: Path) -> None:
    trainer(tmp_path, [TileMonitor(every_n_steps=2)]).fit(Net(), loader())
    read = scalars(tmp_path)
    assert list(read["tile/net.0/norm_C"]) == list(range(1, 20, 2))
    assert list(read["train/loss"]) == [4, 9, 14, 19]


def test_steps_with_accumulation(tmp_path: Path) -> None:
    trainer(tmp_path, [TileMonitor(every_n_steps=2)], accumulate_grad_batches=2).fit(Net(), loader())
    assert list(scalars(tmp_path)["tile/net.0/norm_C"]) == [1, 3, 5, 7, 9]


def test_pulses_are_those_of_the_interval(tmp_path: Path) -> None:
    model = Net()
    trainer(tmp_path, [TileMonitor()], PULSED).fit(model, loader())
    read, tile = scalars(tmp_path), find_tiles(model)["net.0"]
    counts = tile.counts()
    assert counts["pulses_a"] > 0
    assert counts["pulses_c"] > 0
    for array in "ABC":
        assert sum(read[f"pulse/net.0/{array}"].values()) == counts[f"pulses_{array.lower()}"]


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    """The checkpoint lies between two logging steps: the interval's start is part of the callback's state."""
    torch.manual_seed(0)
    whole = Net()
    part = copy.deepcopy(whole)
    trainer(tmp_path / "whole", [TileMonitor()], PULSED, max_epochs=2).fit(whole, loader(7))
    first = trainer(tmp_path / "first", [TileMonitor()], PULSED, max_epochs=1)
    first.fit(part, loader(7))
    first.save_checkpoint(tmp_path / "half.ckpt")
    rest = trainer(tmp_path / "rest", [TileMonitor()], PULSED, max_epochs=2)
    rest.fit(Net(), loader(7), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    one, other = scalars(tmp_path / "whole"), scalars(tmp_path / "rest")
    for tag in one:
        if tag.startswith(("pulse/", "tile/", "transfer/")):
            assert list(one[tag]) == [4, 9]
            assert other[tag] == {9: one[tag][9]}, tag


def test_norms_and_bounds_of_a_known_tile() -> None:
    torch.manual_seed(0)
    device = devices.Ideal(w_max=0.5, w_min=-0.5)
    tile = LRTTLinear(7, 4, config=LRTTConfig(rank=2, reinit_gain=0.1, fast_device=device))
    tile.A.data.normal_()
    tile.B.data.uniform_(-0.4, 0.4)
    a, b = tile.factors()
    found = _tile_statistics.norms(tile)
    together = _tile_statistics.measure({"one": tile}, CellBounds())
    for name, matrix in {"A": a, "B": b, "C": tile.matrix, "AB": a @ b}.items():
        # float32 products against float64 ones
        torch.testing.assert_close(found[name], torch.linalg.matrix_norm(matrix.double()), rtol=1e-6, atol=0)
        torch.testing.assert_close(together[f"tile/one/norm_{name}"], found[name], rtol=1e-14, atol=0)
    tile.B.data[0, :3] = 0.5
    tile.A.data.clamp_(-0.4, 0.4)
    bounds = CellBounds().shares(tile)
    assert set(bounds) == {"A", "B"}  # C is digital
    assert float(bounds["A"]) == 0.0
    assert float(bounds["B"]) == pytest.approx(3 / 14)
    assert float(b[0, 0]) == 0.5  # nothing was written


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_is_that_of_the_singular_values(rank: int) -> None:
    """``(sum s^2)^2 / sum s^4`` by an SVD of the product; its ends are 1 and r."""
    torch.manual_seed(rank)
    tile = LRTTLinear(30, 20, config=LRTTConfig(rank=rank)).double()
    assert float(_tile_statistics.effective_rank(tile)) == 0.0  # A = 0
    tile.A.data.normal_()
    tile.B.data.normal_()
    a, b = tile.factors()
    squares = torch.linalg.svdvals(a @ b).square()
    expected = squares.sum().square() / squares.square().sum()
    # Both are sums of some hundred rounded products in float64.
    torch.testing.assert_close(_tile_statistics.effective_rank(tile), expected, rtol=1e-12, atol=0)
    measured = _tile_statistics.measure({"one": tile}, CellBounds())["tile/one/effective_rank_AB"]
    torch.testing.assert_close(measured, expected, rtol=1e-12, atol=0)
    tile.A.data.copy_(torch.eye(20, rank))
    tile.B.data.copy_(torch.eye(rank, 30))
    assert float(_tile_statistics.effective_rank(tile)) == pytest.approx(rank)


@pytest.mark.parametrize("kind", ["linear", "conv", "long"])
def test_curvature_is_that_of_the_input(kind: str) -> None:
    torch.manual_seed(0)
    config = LRTTConfig(rank=2)
    if kind == "linear":
        tile, x = LRTTLinear(10, 4, config=config), torch.randn(5, 3, 10)
        rows = x.reshape(-1, 10)
    elif kind == "long":  # beyond the size at which a Gram matrix is squared
        tile, x = LRTTLinear(300, 4, config=config), torch.randn(400, 300) + 0.5
        rows = x
    else:
        tile, x = LRTTConv2d(2, 4, 3, padding=1, config=config), torch.randn(3, 2, 5, 5)
        rows = torch.nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 18)
    h = (rows.t() @ rows / rows.shape[0]).double()
    exact = torch.linalg.eigvalsh(h)[-1] + h.trace() / 2
    # A few power iterations underestimate the largest eigenvalue by some percent.
    assert 0.9 * float(exact) < float(_tile_statistics.curvature(tile, x)) < 1.0001 * float(exact)
    if kind == "conv":  # without a batch dimension
        assert float(_tile_statistics.curvature(tile, x[0])) > 0


def test_gain_unit_moves_like_sgd() -> None:
    for config in (
        LRTTConfig(rank=2),
        LRTTConfig(rank=2, alpha=0.5),
        LRTTConfig(rank=4, grad_scale="rsqrt"),
        LRTTConfig(rank=4, fast_device=devices.SoftBounds(w_max=2.0, w_min=-2.0)),
    ):
        assert _tile_statistics.effective_gain(LRTTLinear(8, 8, config=config)) == pytest.approx(1.0, rel=1e-3)


class Reads(TorchDispatchMode):
    """Counts what brings numbers to the host: scalar reads, and copies into the host vector of the monitor."""

    def __init__(self) -> None:
        super().__init__()
        self.scalars, self.copies = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.scalars += func is torch.ops.aten._local_scalar_dense.default
        if func is torch.ops.aten.copy_.default and args[0].dtype == torch.float64 and args[0].dim() == 1:
            self.copies += 1
        return func(*args, **(kwargs or {}))


class Opening(pl.Callback):
    """Starts counting before all other callbacks."""

    def __init__(self, lists: list[int]) -> None:
        self.lists = lists
        self.reads: list[tuple[int, int, int]] = []
        self.mode: Reads | None = None

    def on_train_batch_start(self, *args: Any) -> None:
        self.lists.clear()
        self.mode = Reads()
        self.mode.__enter__()


class Closing(pl.Callback):
    """Stops counting after all other callbacks."""

    def __init__(self, opening: Opening) -> None:
        self.opening = opening

    def on_train_batch_end(self, *args: Any) -> None:
        mode = self.opening.mode
        assert mode is not None
        mode.__exit__(None, None, None)
        self.opening.reads.append((mode.scalars, mode.copies, len(self.opening.lists)))


@pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])
def test_one_transfer_per_logging_step_and_none_between(
    tmp_path: Path, config: LRTTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads of training step, optimizer, strategy and monitor together; ``tolist`` goes past the dispatcher."""
    lists: list[int] = []
    plain = torch.Tensor.tolist

    def tolist(self: torch.Tensor) -> Any:
        lists.append(self.numel())
        return plain(self)

    opening = Opening(lists)
    run = trainer(tmp_path, [opening, TileMonitor(), Closing(opening)], config, max_epochs=2, max_steps=24)
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    run.fit(Net(), loader())
    # At a logging step: the monitor's vector (copied, then listed on the host) and the strategy's look for non-finite
    # operands, which the first batch of a later epoch has too. At the last step of the epoch and of
    # the run one more vector: histograms and images.
    expected = [(0, 1, 2) if (step + 1) % 5 == 0 else (0, 0, int(step == 20)) for step in range(24)]
    expected[19], expected[23] = (0, 2, 3), (0, 1, 1)
    assert opening.reads == expected


def test_watching_does_not_change_training(tmp_path: Path) -> None:
    results = []
    for i, callbacks in enumerate(([], [TileMonitor(every_n_steps=1, trace=True)])):
        torch.manual_seed(0)
        model = Net()
        trainer(tmp_path / str(i), callbacks, PULSED).fit(model, loader())
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_stability_warning_once_per_tile(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"tile 'net.0' is .* As an estimate for a loss with unit curvature") as record:
        trainer(tmp_path, [TileMonitor(every_n_steps=1)], max_steps=3).fit(Net(lr=0.8), loader())
    assert sum("tile 'net.0'" in str(w.message) for w in record) == 1


@pytest.mark.filterwarnings("error:TileMonitor")
def test_no_stability_warning_at_the_losses_own_curvature(tmp_path: Path) -> None:
    trainer(tmp_path, [TileMonitor(every_n_steps=1, curvature=0.01)], max_steps=3).fit(Net(lr=0.8), loader())


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_trace_tells_the_order_of_a_cycle(
    tmp_path: Path, by: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "environment":
        monkeypatch.setenv("LRTT_LOG", "debug")
    with caplog.at_level(logging.INFO, logger="lightning_lrtt"):
        trainer(tmp_path, [TileMonitor(trace=by == "argument")], max_steps=10).fit(Net(), loader())
    lines = [r.getMessage() for r in caplog.records if "reinit" in r.getMessage()]
    assert [line.split(";")[0] for line in lines] == [
        f"{name} cycle {cycle}: reinit -> 4 updates -> transfer" for cycle in (0, 1) for name in ("net.0", "net.2")
    ]
    assert "|A| " in lines[0]
    assert lines[0].split("|A| ")[1].split(",")[0].endswith("-> 0")  # A = 0 after the transfer
    assert "transfer/net.0/trace/text_summary" in events(tmp_path).Tags()["tensors"]


def test_trace_counts_updates_when_samples_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = LRTTConfig(rank=2, transfer_every=12, transfer_unit="samples")
    with caplog.at_level(logging.INFO, logger="lightning_lrtt"):
        trainer(tmp_path, [TileMonitor(trace=True)], config, max_steps=6).fit(Net(), loader())
    assert sum("reinit -> 3 updates -> transfer" in r.getMessage() for r in caplog.records) == 4


def test_everything_is_undone(tmp_path: Path) -> None:
    """Hooks and observers go at the end of a run and after an exception in a logging step."""
    log = logging.getLogger("lightning_lrtt")
    before = (log.level, list(log.handlers))
    for fail_at in (-1, 4):
        monitor, model = TileMonitor(trace=True), Net(fail_at=fail_at)
        run = trainer(tmp_path, [monitor], max_epochs=1)
        if fail_at < 0:
            run.fit(model, loader())
        else:
            with pytest.raises(RuntimeError, match="on purpose"):
                run.fit(model, loader())
        assert all(not tile._forward_pre_hooks for tile in find_tiles(model).values())
        assert all(optimizer.observer is None for optimizer in run.optimizers)
        assert not monitor._hooks
        assert not monitor._observed
        assert (log.level, list(log.handlers)) == before


def test_an_observer_that_was_there_is_kept(tmp_path: Path) -> None:
    seen: list[str] = []

    class Own(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.optimizers[0].observer = lambda event, tiles: seen.append(event)

    run = trainer(tmp_path, [Own(), TileMonitor()], max_steps=2)
    run.fit(Net(), loader())
    assert seen == ["before_update", "before_transfer", "after_transfer"] * 2
    assert run.optimizers[0].observer is not None


def test_no_tiles_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="must have LR-TT tiles, got none in Net; use Trainer"):
        trainer(tmp_path, [TileMonitor()], None).fit(Net(), loader())


def test_layers_made_in_configure_model(tmp_path: Path) -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.net
            self.net: Any = None

        def configure_model(self) -> None:
            if self.net is None:
                self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    trainer(tmp_path, [TileMonitor()]).fit(Late(), loader())
    assert "tile/net.0/norm_C" in scalars(tmp_path)


def test_validation_and_test_do_not_need_it(tmp_path: Path) -> None:
    run = trainer(tmp_path, [TileMonitor()], None)

    class Tested(Net):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test/loss", self.net(batch[0]).sum())

    run.test(Tested(), loader(2), verbose=False)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"every_n_steps": 0}, "TileMonitor: every_n_steps must be >= 1, got 0"),
        ({"curvature": 0.0}, "TileMonitor: curvature must be finite and > 0, got 0.0"),
    ],
    ids=["every", "curvature"],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TileMonitor(**kwargs)


def test_state_key_tells_monitors_apart() -> None:
    assert TileMonitor(every_n_steps=3).state_key != TileMonitor().state_key
