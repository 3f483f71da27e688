"""What TensorBoard is given beside scalars: layout, HParams, tables, histograms, images, estimates, speed."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_helpers import DIGITAL, PULSED, Net, loader, trainer
from lightning_lrtt.callbacks import TileMonitor, _cell_bounds, _pulse_counts, _step_clock, _tile_pictures
from lightning_lrtt.callbacks._cell_bounds import CellBounds
from lightning_lrtt.callbacks._tile_gradient import GradientWatch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from torch import nn

from lightning_lrtt import LRTT, LRTTConfig, PulseConfig, convert_to_lrtt, costs, devices, presets
from lightning_lrtt.free_nudged import FreeNudgedModule
from lightning_lrtt.nn import LRTTConv2d, LRTTLinear, find_tiles

_ALL = {"scalars": 0, "tensors": 0, "images": 0, "histograms": 0, "compressedHistograms": 0}


class Validated(Net):
    """Also validates and tests."""

    def __init__(self, save: bool = False, lr: float = 0.05, fail_at: int = -1) -> None:
        super().__init__(lr, fail_at)
        if save:
            self.save_hyperparameters()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", (self.net(batch[0]) - batch[1]).square().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", (self.net(batch[0]) - batch[1]).square().mean())


def read(folder: Path) -> EventAccumulator:
    """Everything that was written, nothing subsampled."""
    return EventAccumulator(str(folder / "run" / "version_0"), size_guidance=_ALL).Reload()


def plugin(events: EventAccumulator, tag: str) -> bytes:
    return events.summary_metadata[tag].plugin_data.content


def layout_of(events: EventAccumulator) -> layout_pb2.Layout:
    """The one layout of a run."""
    (tensor,) = events.Tensors("custom_scalars__config__")
    return layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])


# ------------------------------------------------------------------ layout and tables


def test_layout_has_charts_over_all_tiles_and_of_each(tmp_path: Path) -> None:
    """Multiline and Margin charts, whose tags match what was logged."""
    import re

    trainer(tmp_path, [TileMonitor()], PULSED).fit(Net(), loader())
    events = read(tmp_path)
    layout = layout_of(events)
    assert [category.title for category in layout.category] == ["tiles: overall", "tile net.0", "tile net.2"]
    logged = events.Tags()["scalars"]
    for category in layout.category:
        for chart in category.chart:
            if chart.HasField("margin"):
                (series,) = chart.margin.series
                assert {series.value, series.lower, series.upper} <= set(logged)
            else:
                for regex in chart.multiline.tag:
                    assert any(re.match(regex, tag) for tag in logged), (chart.title, regex)
    kinds = {chart.WhichOneof("content") for category in layout.category for chart in category.chart}
    assert kinds == {"multiline", "margin"}


def test_tables_are_markdown(tmp_path: Path) -> None:
    config = LRTTConfig(rank=2, fast_device=presets.device("ecram"), visible_device=presets.device("ecram"))
    trainer(tmp_path, [TileMonitor()], config, max_steps=2).fit(Net(), loader())
    events = read(tmp_path)
    text = {
        tag: events.Tensors(f"info/{tag}/text_summary")[0].tensor_proto.string_val[0].decode()
        for tag in ("tiles", "devices", "pulses", "costs", "build")
    }
    assert "| net.0 | LRTTLinear | 5 x 6 | 2 |" in text["tiles"]
    assert "| ecram | LinearStep | -0.8276 to 1.1724 | 0.002 | 1000 |" in text["devices"]
    assert "| desired_bl | 31 | 31 |" in text["pulses"]
    assert "| ecram | 1e-15 | unknown | Tang et al." in text["costs"]
    assert "| with_cuda |" in text["build"]
    for table in text.values():
        for block in table.split("\n\n"):
            lines = [line for line in block.splitlines() if line.startswith("|")]
            assert len({line.replace("\\|", "").count("|") for line in lines}) <= 1, block  # as many cells in every row


# ------------------------------------------------------------------ HParams


def hparams(events: EventAccumulator) -> tuple[dict[str, Any], list[str], int]:
    """Values, tags of metrics, status."""
    start = metadata.parse_session_start_info_plugin_data(plugin(events, metadata.SESSION_START_INFO_TAG))
    experiment = metadata.parse_experiment_plugin_data(plugin(events, metadata.EXPERIMENT_TAG))
    end = metadata.parse_session_end_info_plugin_data(plugin(events, metadata.SESSION_END_INFO_TAG))
    values = {name: getattr(v, v.WhichOneof("kind")) for name, v in start.hparams.items()}
    assert {info.name for info in experiment.hparam_infos} == set(values)
    return values, [info.name.tag for info in experiment.metric_infos], end.status


@pytest.mark.parametrize("save", [False, True], ids=["plain", "save_hyperparameters"])
def test_hparams_with_the_metrics_of_validation_and_test(tmp_path: Path, save: bool) -> None:
    """With a logger at its defaults: no ``hp_metric = -1``, one entry, values that TensorBoard shows as last ones."""
    run = trainer(tmp_path, [TileMonitor()], PULSED, max_epochs=2)
    assert isinstance(run.logger, TensorBoardLogger)
    assert run.logger._default_hp_metric
    model = Validated(save)
    run.fit(model, loader(), loader(3))
    tested = run.test(model, loader(2), verbose=False)[0]["test/loss"]
    events = read(tmp_path)
    values, metrics, status = hparams(events)
    assert metrics == ["hp/val_loss", "hp/test_loss"]
    assert status == 1  # success
    assert values["lrtt/rank"] == 2
    assert values["lrtt/transfer_every"] == 4
    assert values["lrtt/lr"] == 0.05
    assert values["lrtt/fast_device"] == "SoftBounds"
    assert values["lrtt/transfer_mode"] == "pulsed"
    assert ("fail_at" in values) == save
    assert "hp_metric" not in events.Tags()["scalars"]
    shown, logged = events.Scalars("hp/val_loss"), events.Scalars("val/loss")
    assert [(p.step, p.value) for p in shown] == [(p.step, p.value) for p in logged]
    assert [p.value for p in events.Scalars("hp/test_loss")] == [pytest.approx(tested, rel=1e-6)]
    written = (tmp_path / "run" / "version_0" / "hparams.yaml").read_text()
    assert ("fail_at: -1" in written) == save
    assert "log_hyperparams" not in vars(run.logger)


class WithTiles(Net):
    """Has tiles of its own; ``also``: a digital layer for the strategy, too. The learning rate warms up."""

    def __init__(self, configs: tuple[LRTTConfig, LRTTConfig], also: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = [LRTTLinear(6, 5, config=configs[0]), LRTTLinear(5, 3, config=configs[1])]
        self.net = nn.Sequential(*([nn.Linear(6, 6)] if also else []), *layers)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1)]


def test_hparams_are_those_of_the_tiles(tmp_path: Path) -> None:
    """Regression: the strategy's configuration was written though no tile had it, and a rate that a warm-up scaled."""
    pulsed = presets.ecram(rank=2, transfer_every=5, seed=7)
    low, other = LRTTConfig(rank=2, transfer_every=4), LRTTConfig(rank=1, transfer_every=5)
    six = LRTTConfig(rank=6, transfer_every=5)  # 5 and 3 are all that the layers allow

    def full(rank: int) -> LRTTConfig:
        return LRTTConfig(rank=rank, transfer_every=5)

    cases: list[tuple[Any, Any, bool, dict[str, Any]]] = [
        (None, (pulsed, pulsed), False, {"rank": 2, "transfer_every": 5, "fast_device": "ecram", "seed": 7}),
        (None, (low, other), False, {"rank": "mixed", "transfer_every": "mixed", "fast_device": "digital", "seed": 0}),
        (None, (full(5), full(3)), False, {"rank": 5, "transfer_every": 5}),
        (six, (full(5), full(3)), False, {"rank": 6, "transfer_every": 5}),
        (six, (full(5), full(1)), False, {"rank": "mixed", "transfer_every": 5}),
        (low, (pulsed, pulsed), True, {"rank": 2, "transfer_every": "mixed", "fast_device": "mixed", "alpha": 1.0}),
    ]
    for i, (given, own, also, expected) in enumerate(cases):
        folder = tmp_path / str(i)
        trainer(folder, [TileMonitor()], given or LRTTConfig(), max_steps=1).fit(WithTiles(own, also), loader(1))
        values, _, _ = hparams(read(folder))
        assert {name: values[f"lrtt/{name}"] for name in expected} == expected, i
        assert values["lrtt/lr"] == 0.05


def test_hparams_of_a_run_without_validation(tmp_path: Path) -> None:
    trainer(tmp_path, [TileMonitor()], DIGITAL).fit(Net(), loader())
    values, metrics, _ = hparams(read(tmp_path))
    assert metrics == ["hp/train_loss"]
    assert values["lrtt/fast_device"] == "digital"
    assert len(read(tmp_path).Scalars("hp/train_loss")) == 1


def test_hparams_of_a_run_that_failed(tmp_path: Path) -> None:
    """It is listed as failed, and its missing metrics do not become the columns of a sweep."""
    run = trainer(tmp_path, [TileMonitor()], DIGITAL)
    with pytest.raises(RuntimeError, match="on purpose"):
        run.fit(Validated(True, fail_at=7), loader(), loader(2))
    events = read(tmp_path)
    assert metadata.EXPERIMENT_TAG not in events.summary_metadata
    end = metadata.parse_session_end_info_plugin_data(plugin(events, metadata.SESSION_END_INFO_TAG))
    assert end.status == 2  # failure
    assert "log_hyperparams" not in vars(run.logger)
    assert "tile/net.0/norm_C" in events.Tags()["scalars"]  # the row before the failure


def test_hparams_of_chosen_metrics(tmp_path: Path) -> None:
    trainer(tmp_path, [TileMonitor(hparams_metrics=["val/loss"])], DIGITAL).fit(Validated(), loader(), loader(2))
    assert hparams(read(tmp_path))[1] == ["hp/val_loss"]


def test_a_sweep_is_one_table(tmp_path: Path) -> None:
    """TensorBoard's own reader: one experiment, a session a run, the last metrics in it."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    for rank in (1, 2, 3):
        config = LRTTConfig(rank=rank, transfer_every=4)
        trainer(tmp_path / str(rank), [TileMonitor()], config).fit(Validated(), loader(), loader(2))
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    columns = [
        api_pb2.ColParams(metric=api_pb2.MetricName(tag="hp/val_loss")),
        api_pb2.ColParams(hparam="lrtt/rank"),
    ]
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=10, allowed_statuses=[0, 1, 2, 3], col_params=columns, aggregation_type=1
    )
    found = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    assert sorted(group.hparams["lrtt/rank"].number_value for group in found) == [1, 2, 3]
    for group in found:
        values = {m.name.tag: m.value for m in group.metric_values}
        assert math.isfinite(values["hp/val_loss"])


# ------------------------------------------------------------------ histograms and images


def test_histograms_and_images_of_the_last_step_of_an_epoch(tmp_path: Path) -> None:
    """Of the state between update and transfer, at Lightning's step; T = 5 divides the epoch, A is seen all the same."""
    config = LRTTConfig(
        rank=2, transfer_every=5, reinit_gain=1.0, fast_device=PULSED.fast_device, visible_device=PULSED.fast_device
    )
    monitor = TileMonitor(every_n_steps=20, images_every_n_epochs=2)
    trainer(tmp_path, [monitor], config, max_epochs=2).fit(Net(), loader())
    events = read(tmp_path)
    arrays = ["A", "B", "C", "pulses_A", "pulses_B", "pulses_C"]
    assert set(events.Tags()["histograms"]) == {f"histogram/{n}/{a}" for n in ("net.0", "net.2") for a in arrays}
    scalars = {tag: [p.value for p in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in events.Tags()["histograms"]:
        points = events.Histograms(tag)
        assert [p.step for p in points] == [19, 39]
        for p in points:
            h = p.histogram_value
            assert h.num == sum(h.bucket) > 0
            assert all(math.isfinite(x) for x in (h.min, h.max, h.sum, h.sum_squares, *h.bucket_limit))
    for i, p in enumerate(events.Histograms("histogram/net.0/A")):
        assert math.sqrt(p.histogram_value.sum_squares) == pytest.approx(scalars["tile/net.0/norm_A"][i], rel=1e-5)
        assert scalars["tile/net.0/norm_A"][i] > 0
    names = ["C", "AB", "at_bounds_A", "at_bounds_B", "at_bounds_C"]
    assert set(events.Tags()["images"]) == {f"image/{n}/{w}" for n in ("net.0", "net.2") for w in names}
    (image,) = events.Images("image/net.0/C")
    assert image.step == 39
    assert (image.height, image.width) == (5 * 21, 6 * 21)  # 128 // 6 pixels a cell


@pytest.mark.parametrize("kwargs", [{"max_steps": 12}, {"max_epochs": 1}], ids=["within an epoch", "first epoch"])
def test_a_short_run_has_its_last_state(tmp_path: Path, kwargs: dict[str, int]) -> None:
    trainer(tmp_path, [TileMonitor()], PULSED, **kwargs).fit(Net(), loader())
    events = read(tmp_path)
    step = kwargs.get("max_steps", 20) - 1
    assert [p.step for p in events.Histograms("histogram/net.0/C")] == [step]
    assert [p.step for p in events.Images("image/net.0/AB")] == [step]
    assert events.Histograms("histogram/net.0/A")[0].histogram_value.sum_squares > 0  # T = 4: before the transfer


def test_none_are_written_where_none_are_asked_for(tmp_path: Path) -> None:
    monitor = TileMonitor(histograms_every_n_epochs=0, images_every_n_epochs=0)
    trainer(tmp_path, [monitor], PULSED).fit(Net(), loader())
    tags = read(tmp_path).Tags()
    assert tags["histograms"] == tags["images"] == []


def test_histogram_bins_are_those_of_numpy() -> None:
    values = torch.randn(501, generator=torch.Generator().manual_seed(0))
    row = _tile_pictures.histogram(values).numpy()
    counts, _ = np.histogram(values.double().numpy(), _tile_pictures.BINS)
    assert row[:2].tolist() == [float(values.min()), float(values.max())]
    # A value within one rounding of an edge may fall on its other side.
    assert np.abs(row[4:] - counts).sum() <= 2
    assert row[4:].sum() == 501
    constant = _tile_pictures.histogram(torch.full((7,), 3.0))
    assert constant[4] == 7 and constant[5:].sum() == 0


def test_pictures_of_large_arrays_are_means_of_blocks() -> None:
    torch.manual_seed(0)
    tile = LRTTLinear(300, 520, config=LRTTConfig(rank=3))
    tile.A.data.normal_()
    a, b = tile.factors()
    small = _tile_pictures.product(tile)
    assert max(small.shape) <= _tile_pictures.SIDE
    # The mean of a block of A B, in float32 sums of about 20 terms of magnitude 1.
    torch.testing.assert_close(small, _tile_pictures.shrink(a @ b), rtol=0, atol=1e-5)
    image = _tile_pictures.colours(small.numpy(), signed=True)
    assert image.shape == (*small.shape, 3)
    assert len(np.unique(image)) > 50


@pytest.mark.parametrize("device", ["soft", "write noise", "pair"])
def test_cells_at_bounds_are_those_that_are_counted(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {
        "soft": devices.SoftBounds(dw_min=0.01, w_max_dtod=0.3, w_min_dtod=0.3),
        "write noise": devices.SoftBounds(dw_min=0.01, w_max_dtod=0.3, write_noise_std=2.0),
        "pair": devices.OneSided(device=devices.SoftBounds(dw_min=0.01, w_max_dtod=0.3)),
    }
    torch.manual_seed(0)
    tile = LRTTLinear(20, 15, config=LRTTConfig(rank=2, reinit_gain=1.0, visible_device=kinds[device]))
    tile.write_visible(torch.randn(15, 20))
    bounds = CellBounds()
    mask = bounds.mask(tile, 2)
    count = torch.ops.lrtt.clip_(tile.matrix, tile.tile_state, tile.hyper, 2, False, tile.cells(2))
    assert mask is not None
    assert 0 < int(mask.sum()) == int(count) < mask.numel()
    assert float(bounds.shares(tile)["C"]) * mask.numel() == pytest.approx(int(count))
    assert bounds.mask(tile, 0) is None  # A is digital
    monkeypatch.setattr(_cell_bounds, "_KEPT", 10)
    assert float(CellBounds().shares(tile)["C"]) * mask.numel() == pytest.approx(int(count))


@pytest.mark.parametrize("kind", ["stochastic_compressed", "mean_count", "deterministic_implicit"])
@pytest.mark.parametrize("device", ["soft", "pair"])
def test_pulses_of_each_cell_add_up_to_the_counters(kind: Any, device: str) -> None:
    """The counters of the real step are the oracle, for A and B of several steps and for C of a transfer."""
    soft = devices.SoftBounds(dw_min=0.01)
    own = soft if device == "soft" else devices.OneSided(device=soft)
    pulse = PulseConfig(pulse_type=kind)
    config = LRTTConfig(
        rank=3,
        transfer_every=100,
        reinit_gain=1.0,
        fast_device=own,
        visible_device=own,
        pulse=pulse,
        transfer_pulse=pulse,
    )
    torch.manual_seed(0)
    layer = LRTTLinear(9, 7, config=config)
    optimizer = LRTT(layer.parameters(), lr=0.3)
    seen: dict[str, float] = {"A": 0.0, "B": 0.0}

    def watch(event: str, tiles: list[Any]) -> None:
        if event == "before_update":
            for array, counts in _pulse_counts.factor_pulses(optimizer, layer, 0).items():
                assert (counts >= 0).all() and (counts == counts.round()).all()
                seen[array] += float(counts.sum())

    optimizer.observer = watch
    for _ in range(4):
        optimizer.zero_grad()
        layer(torch.randn(5, 9)).square().mean().backward()
        optimizer.step()
    counts = layer.counts()
    assert 0 < seen["A"] == counts["pulses_a"]
    assert 0 < seen["B"] == counts["pulses_b"]
    before = [t.clone() for t in (layer.A, layer.B, layer.weight, layer.tile_state, layer.tile_counts)]
    expected = float(_pulse_counts.transfer_pulses(layer)["C"].sum())
    after = (layer.A, layer.B, layer.weight, layer.tile_state, layer.tile_counts)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))  # nothing happened
    layer.flush()
    assert 0 < expected == layer.counts()["pulses_c"]


# ------------------------------------------------------------------ gradient, costs, speed


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_cosine_is_that_of_the_dense_gradient(kind: str) -> None:
    """Against autograd's gradient of a dense weight with the same value, over two calls."""
    torch.manual_seed(0)
    config = LRTTConfig(rank=2, alpha=0.5)
    if kind == "linear":
        tile, xs = LRTTLinear(6, 4, config=config), [torch.randn(5, 6), torch.randn(2, 3, 6)]
        dense: nn.Module = nn.Linear(6, 4)
    else:
        tile, xs = LRTTConv2d(2, 4, 3, padding=1, config=config), [torch.randn(3, 2, 5, 5), torch.randn(2, 5, 5)]
        dense = nn.Conv2d(2, 4, 3, padding=1)
    tile.A.data.normal_()
    dense.load_state_dict({"weight": tile.effective_weight().detach(), "bias": tile.bias.detach()})
    watch = GradientWatch()
    watch.arm({"one": tile})
    for module in (tile, dense):
        sum(module(x).sin().sum() for x in xs).backward()
    with torch.no_grad():
        tile(xs[0])  # nothing to gather
    found = watch.cosines({"one": tile})["tile/one/cosine_gradient"]
    a, b = tile.factors()
    expected = torch.cosine_similarity(-(a @ b).flatten(), dense.weight.grad.flatten(), dim=0)
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-6)  # float32 sums of about 100 terms
    watch.disarm()
    assert not tile._forward_hooks
    assert watch.cosines({"one": tile}) == {}


def test_cosine_at_its_own_steps(tmp_path: Path) -> None:
    """Positive: A B descends. At steps of its own, with accumulation, beside the rows of the logging steps."""
    torch.manual_seed(0)
    monitor = TileMonitor(every_n_steps=5, gradient_every_n_steps=3)
    config = LRTTConfig(rank=3, transfer_every=100)
    trainer(tmp_path, [monitor], config, accumulate_grad_batches=2, max_epochs=2).fit(Net(), loader())
    events = read(tmp_path)
    points = events.Scalars("tile/net.0/cosine_gradient")
    assert [p.step for p in points] == [2, 5, 8, 11, 14, 17]
    assert all(0 < p.value <= 1 for p in points)
    assert [p.step for p in events.Scalars("tile/net.0/norm_A")] == [4, 9, 14, 19]


def test_cosine_needs_backpropagation(tmp_path: Path) -> None:
    run, module = trainer(tmp_path, [], DIGITAL), FreeNudgedModule.__new__(FreeNudgedModule)
    pl.LightningModule.__init__(module)
    with pytest.raises(MisconfigurationException, match="must be None with a FreeNudgedModule, got 5"):
        TileMonitor(gradient_every_n_steps=5).setup(run, module, "fit")


def test_every_preset_has_costs_or_says_that_they_are_unknown() -> None:
    assert set(costs.COSTS) == set(presets.DEVICES)
    for name, device in presets.DEVICES.items():
        found = costs.costs_of(device)
        assert found == costs.COSTS[name]
        assert (found.energy_per_pulse is None) == found.source.startswith("unknown")
    assert costs.costs_of(devices.SoftBounds(dw_min=0.123)) == costs.CellCosts()


@pytest.mark.parametrize("by", ["preset", "argument", "unknown"])
def test_energy_and_wear_follow_the_pulses(tmp_path: Path, by: str) -> None:
    own = costs.CellCosts(energy_per_pulse=2e-12, endurance=1e4, source="mine") if by == "argument" else None
    device = presets.device("reram_sb" if by == "unknown" else "ecram")
    config = LRTTConfig(rank=2, transfer_every=4, reinit_gain=1.0, fast_device=device, visible_device=device)
    model = Net()
    trainer(tmp_path, [TileMonitor(costs=own)], config).fit(model, loader())
    events = read(tmp_path)
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("cost/")]
    if by == "unknown":
        assert tags == []
        return
    each = 2e-12 if own else 1e-15
    total = 0.0
    for name, tile in find_tiles(model).items():
        counts = tile.counts()
        pulses = sum(counts[f"pulses_{a}"] for a in "abc")
        assert events.Scalars(f"cost/{name}/energy_pJ")[-1].value == pytest.approx(pulses * each * 1e12, rel=1e-6)
        total += pulses * each
        if own:
            wear = counts["pulses_a"] / tile.A.numel() / 1e4
            assert events.Scalars(f"cost/{name}/wear_A")[-1].value == pytest.approx(wear, rel=1e-6)
    assert events.Scalars("cost/energy_pJ")[-1].value == pytest.approx(total * 1e12, rel=1e-6)
    assert any("wear" in tag for tag in tags) == (by == "argument")


def test_transfer_size_is_that_of_the_transfers(tmp_path: Path) -> None:
    """One step a transfer and a log a step: mean |tau A B| of a cell, from the factors before each transfer."""
    device = devices.Ideal(dw_min=1e-4)
    config = LRTTConfig(
        rank=1, transfer_every=1, transfer_lr=0.5, reinit_gain=1.0, fast_device=device, visible_device=device
    )
    sizes: list[float] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            optimizer = trainer.optimizers[0]
            tile = find_tiles(pl_module)["net.0"]

            def watch(event: str, tiles: list[Any]) -> None:
                if event == "before_transfer":
                    a, b = tile.factors()
                    sizes.append(0.5 * float((a @ b).abs().mean()))

            optimizer.observer = watch

    trainer(tmp_path, [Look(), TileMonitor(every_n_steps=1)], config, max_steps=6).fit(Net(), loader())
    found = [p.value for p in read(tmp_path).Scalars("transfer/net.0/size")]
    # 30 cells in fixed point of 2^-24, as one sum per transfer.
    assert found == pytest.approx(sizes, rel=1e-5, abs=1e-8)


def test_speed_is_without_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes on only where the test says: 2 ms a step, and a second at each validation."""
    now = [100.0]

    class Slow(Validated):
        def training_step(self, *args: Any) -> Any:
            now[0] += 0.002
            return super().training_step(*args)

        def on_validation_epoch_start(self) -> None:
            now[0] += 1.0

    monkeypatch.setattr(_step_clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    kwargs: dict[str, Any] = {"max_epochs": 2, "num_sanity_val_steps": 0}
    trainer(tmp_path, [TileMonitor()], DIGITAL, **kwargs).fit(Slow(), loader(), loader(1))
    events = read(tmp_path)
    assert now[0] > 102.0  # it was validated twice
    # Rounding: 1e-14 s of the clock's sums in 2e-3, and the file's float32 (6e-8).
    assert [p.value for p in events.Scalars("perf/step_ms")] == pytest.approx([2.0] * 8, rel=1e-6)
    assert [p.value for p in events.Scalars("perf/samples_per_s")] == pytest.approx([2000.0] * 8, rel=1e-6)


def test_one_layout_for_several_monitors(tmp_path: Path) -> None:
    """TensorBoard reads one layout a run: the first monitor writes those of all."""

    class Other(pl.Callback):
        def custom_scalars(self) -> dict[str, Any]:
            return {"mine": {"loss": ["Multiline", ["train/loss"]]}}

    trainer(tmp_path, [TileMonitor(), Other()], DIGITAL, max_steps=1).fit(Net(), loader())
    layout = layout_of(read(tmp_path))
    assert [c.title for c in layout.category] == ["tiles: overall", "tile net.0", "tile net.2", "mine"]


def test_images_are_pngs_with_something_on_them(tmp_path: Path) -> None:
    trainer(tmp_path, [TileMonitor()], PULSED, max_steps=3).fit(Net(), loader())
    events = read(tmp_path)
    for tag in ("image/net.0/C", "image/net.0/AB"):
        (point,) = events.Images(tag)
        pixels = np.asarray(Image.open(io.BytesIO(point.encoded_image_string)))
        assert pixels.shape == (point.height, point.width, 3)
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 5


def test_other_loggers_get_the_scalars(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(str(tmp_path), name="run", version=0)
    trainer(tmp_path, [TileMonitor()], PULSED, logger=logger).fit(Validated(), loader(), loader(2))
    head = (tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"tile/net.0/norm_C", "perf/step_ms", "hp/val_loss"} <= set(head)


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        ({"gradient_every_n_steps": 0}, ValueError, "gradient_every_n_steps must be >= 1, got 0"),
        ({"histograms_every_n_epochs": -1}, ValueError, "histograms_every_n_epochs must be >= 0, got -1"),
        ({"images_every_n_epochs": -1}, ValueError, "images_every_n_epochs must be >= 0, got -1"),
        ({"costs": 1e-12}, TypeError, "costs must be a CellCosts or None, got 1e-12"),
    ],
    ids=["gradient", "histograms", "images", "costs"],
)
def test_bad_arguments(kwargs: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        TileMonitor(**kwargs)


def test_bad_costs() -> None:
    with pytest.raises(ValueError, match="CellCosts: endurance must be finite and > 0, got 0"):
        costs.CellCosts(endurance=0)


def test_convert_keeps_names() -> None:
    """Names with dots and brackets are escaped in the layout's regexes."""
    import re

    from lightning_lrtt.callbacks._layouts import tile_layout

    module = convert_to_lrtt(nn.Sequential(nn.Linear(2, 2)), LRTTConfig(rank=1))
    layout = tile_layout({"a.b+c": find_tiles(module)["0"]})
    (regex,) = layout["tile a.b+c"]["stability"][1]
    assert re.match(regex, "tile/a.b+c/stability")
    assert not re.match(regex, "tile/aXb+c/stability")
