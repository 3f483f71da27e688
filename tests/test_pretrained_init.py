"""Pretrained weights in Lightning: the strategy's pretrained=, PretrainedInit, resume, DDP, inspect."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from gguf import GGMLQuantizationType as Kind
from helpers import clean_environment, same_bits
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_lrtt.callbacks import PretrainedInit
from rerun_recorder import RehearsedGraph
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from weights_helpers import VOCAB, Llama, write_gguf, write_llama

from lightning_lrtt import LRTTConfig, LRTTStrategy, ResumableLoader, devices
from lightning_lrtt.cli import main
from lightning_lrtt.nn import find_tiles
from lightning_lrtt.weights import (
    CheckpointFormatError,
    CheckpointMismatchError,
    LazyCheckpoint,
    Pretrained,
)

SOFT = devices.SoftBounds(dw_min=0.002, w_max=1.0, w_min=-1.0)
CONFIGS = {
    "digital": LRTTConfig(rank=2, transfer_every=4),
    "pulsed": LRTTConfig(rank=2, transfer_every=4, reinit_gain=1.0, fast_device=SOFT, visible_device=SOFT),
}
MODES = ["progressive", "lazy", "prefetch"]
modes = pytest.mark.parametrize("mode", MODES)


class Net(pl.LightningModule):
    """A small Llama; ``where``: built at once, on meta, or in configure_model, with or without memory."""

    def __init__(self, where: str = "init") -> None:
        super().__init__()
        self.where = where
        if not where.startswith("configure"):
            with torch.device("meta" if where == "meta" else "cpu"):
                self.net = Llama(tied=False)

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            with torch.device("meta" if self.where == "configure-meta" else "cpu"):
                self.net = Llama(tied=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02)


def dataset(batches: int = 6) -> TensorDataset:
    """Random tokens."""
    tokens = torch.randint(VOCAB, (2 * batches, 9), generator=torch.Generator().manual_seed(1))
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


def loader(batches: int = 6) -> DataLoader:
    """In order."""
    return DataLoader(dataset(batches), batch_size=2)


class Seen(Callback):
    """The weights at the start of training, and how many parameters were pending then."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.pending = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy: Any = trainer.strategy
        self.pending = len(strategy.pretrained.pending)
        if not self.pending:
            self.weights = {name: tile.effective_weight().clone() for name, tile in find_tiles(pl_module).items()}


def trainer(folder: Path, strategy: Any, callbacks: list[Any] | None = None, **kwargs: Any) -> pl.Trainer:
    """A quiet one."""
    defaults = {
        "max_epochs": 1,
        "enable_progress_bar": False,
        "enable_checkpointing": bool(callbacks),
        "logger": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": folder,
    }
    return pl.Trainer(strategy=strategy, callbacks=callbacks, **(defaults | kwargs))


def assert_starts(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert len(weights) == 11
    for name, value in weights.items():
        assert torch.equal(value, expected[name.removeprefix("net.") + ".weight"]), name


# ------------------------------------------------------------------ where and when


@pytest.mark.parametrize("where", ["init", "meta", "configure", "configure-meta"])
@modes
def test_the_strategy_fills_every_kind_of_module(where: str, mode: Any, tmp_path: Path, llama: Any) -> None:
    path, expected = llama
    seen, module = Seen(), Net(where)
    strategy = LRTTStrategy(CONFIGS["digital"], pretrained=Pretrained(path, mode))
    torch.manual_seed(0)
    trainer(tmp_path, strategy, [seen]).fit(module, loader())
    if mode == "progressive":
        assert_starts(seen.weights, expected)
    elif mode == "lazy":
        assert seen.pending == len(expected)
    assert not strategy.pretrained.pending
    assert strategy.pretrained.report is not None
    assert set(strategy.pretrained.report.loaded) == {"net." + name for name in expected}
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize("config", CONFIGS)
def test_modes_and_ways_end_alike(config: str, tmp_path: Path, llama: Any) -> None:
    """Six steps: progressive, lazy, prefetch, the callback and a path in the strategy give the same bits."""
    ways: list[tuple[Any, list[Any]]] = [(Pretrained(llama[0], mode), []) for mode in MODES]
    ways += [(llama[0], []), (None, [PretrainedInit(llama[0])]), (None, [PretrainedInit(llama[0], "lazy")])]
    states = []
    for pretrained, callbacks in ways:
        torch.manual_seed(0)
        module = Net()
        trainer(
            tmp_path, LRTTStrategy(CONFIGS[config], pretrained=pretrained), callbacks, enable_checkpointing=False
        ).fit(module, loader())
        states.append(module.state_dict())
    for state in states[1:]:
        assert all(same_bits(value, states[0][name]) for name, value in state.items())


@modes
@pytest.mark.parametrize("config", CONFIGS)
def test_resume_is_exact_and_does_not_refill(config: str, mode: Any, tmp_path: Path, llama: Any) -> None:
    """Two epochs, against one, its checkpoint and another; the file is gone when the run goes on."""

    def run(folder: Path, epochs: int, ckpt_path: Any = None) -> dict[str, Any]:
        torch.manual_seed(0 if ckpt_path is None else 99)
        strategy = LRTTStrategy(CONFIGS[config], pretrained=Pretrained(llama[0], mode))
        fit = trainer(folder, strategy, max_epochs=epochs)
        where = "configure-meta" if ckpt_path is not None else "init"  # a resumed module may be without memory
        fit.fit(Net(where), ResumableLoader(dataset(), batch_size=2, seed=5), ckpt_path=ckpt_path, weights_only=True)
        if ckpt_path is not None:
            assert strategy.pretrained is not None
            assert strategy.pretrained.report is None
        fit.save_checkpoint(folder / "end.ckpt")
        return torch.load(folder / "end.ckpt", weights_only=True)

    whole = run(tmp_path / "whole", 2)
    run(tmp_path / "half", 1)
    os.rename(llama[0], llama[0] + ".gone")
    rest = run(tmp_path / "rest", 2, tmp_path / "half" / "end.ckpt")
    assert whole["global_step"] == rest["global_step"] == 12
    for name, value in whole["state_dict"].items():
        assert same_bits(value, rest["state_dict"][name]), name


class WithExpert(Net):
    """One layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 3)


@pytest.mark.parametrize("mode", ["lazy", "prefetch"])
def test_saving_fills_what_is_pending(mode: Any, tmp_path: Path) -> None:
    """The layer that is never called is loaded by the save, not before; nothing is meta, garbage or NaN."""
    state = {name: value + 1 for name, value in WithExpert().state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    for meta in (False, True):
        with torch.device("meta" if meta else "cpu"):
            module = WithExpert()
        strategy = LRTTStrategy(CONFIGS["digital"], pretrained=Pretrained(str(tmp_path / "a.safetensors"), mode))
        fit = trainer(tmp_path, strategy)
        fit.fit(module, loader())
        if mode == "lazy":
            assert strategy.pretrained.pending == ["unused.weight", "unused.bias"]
        fit.save_checkpoint(tmp_path / "end.ckpt")
        assert not strategy.pretrained.pending
        saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
        assert not any(value.is_meta for value in saved.values())
        assert torch.equal(saved["unused.weight"], state["unused.weight"])
        assert torch.equal(saved["unused.bias"], state["unused.bias"])
        assert all(value.isfinite().all() for value in saved.values())


def test_it_is_filled_once_however_often_the_trainer_sets_up(tmp_path: Path, llama: Any) -> None:
    module = Net()
    fit = trainer(tmp_path, LRTTStrategy(CONFIGS["digital"], pretrained=llama[0]), max_epochs=1)
    before = fit.validate(module, loader(), verbose=False)[0]["val/loss"]
    fit.fit(module, loader())
    after = fit.validate(module, loader(), verbose=False)[0]["val/loss"]
    assert after != before  # a refill would undo the training
    trained = copy.deepcopy(module.state_dict())
    fit.test(module, loader(), verbose=False)
    assert all(same_bits(value, trained[name]) for name, value in module.state_dict().items())


def test_nothing_is_read_within_a_recording(tmp_path: Path) -> None:
    """What a lazy mode has left, be it of a layer that is never called, is read before steps are recorded."""
    save_file(WithExpert().state_dict(), tmp_path / "a.safetensors")
    strategy = LRTTStrategy(CONFIGS["digital"], pretrained=Pretrained(str(tmp_path / "a.safetensors"), "lazy"))
    graph = RehearsedGraph(warmup=1)
    trainer(tmp_path, strategy, [graph]).fit(WithExpert(), loader())
    assert graph.replays > 0
    assert not strategy.pretrained.pending


@modes
def test_a_tested_checkpoint_is_not_overwritten(mode: Any, tmp_path: Path, llama: Any) -> None:
    fit = trainer(tmp_path, LRTTStrategy(CONFIGS["digital"], pretrained=Pretrained(llama[0], mode)))
    module = Net()
    fit.fit(module, loader())
    loss = fit.validate(module, loader(), verbose=False)[0]["val/loss"]
    fit.save_checkpoint(tmp_path / "end.ckpt")
    other = trainer(tmp_path, LRTTStrategy(CONFIGS["digital"], pretrained=Pretrained(llama[0], mode)))
    assert (
        other.validate(Net(), loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=True, verbose=False)[0][
            "val/loss"
        ]
        == loss
    )


def test_bounded_tiles_get_a_scale_and_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_llama(tmp_path / "a.gguf", scale=1.0)
    config = LRTTConfig(rank=2, reinit_gain=1.0, visible_device=devices.SoftBounds(w_max=0.6, w_min=-0.6))
    strategy = LRTTStrategy(config, pretrained=str(tmp_path / "a.gguf"))
    with caplog.at_level(logging.INFO, "lightning_lrtt"):
        trainer(tmp_path, strategy).fit(Net(), loader(1))
    report = strategy.pretrained.report
    assert report is not None
    assert len(report.output_scales) == 11
    assert set(report.output_scales.values()) <= {4.0, 8.0}
    assert len(report.clipped) == 11
    # Bounds vary by 30%: a weight at 3 sigma of 8 (0.375 of 0.6) is clipped in a tenth of the cells, most are small.
    assert all(0 < share < 0.1 for share in report.clipped.values())
    assert "at or beyond their devices' bounds in 11 tiles" in caplog.text


def test_averages_start_from_the_pretrained_weights(tmp_path: Path, llama: Any) -> None:
    """EMA copies the model before the strategy's setup, from which the weights come."""
    path, expected = llama
    fit = trainer(
        tmp_path,
        LRTTStrategy(CONFIGS["digital"], pretrained=path),
        [EMAWeightAveraging(decay=0.5), ModelCheckpoint(tmp_path, save_last=True)],
    )
    module = Net()
    fit.fit(module, loader())
    averaged = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(averaged["net.lm_head.weight"], module.net.lm_head.weight)
    # Weights have a standard deviation of 0.1, those of the random start 0.07; six small steps move them by less.
    distance = (averaged["net.lm_head.weight"] - expected["lm_head.weight"]).abs().mean()
    assert 0 < distance < 0.02


# ------------------------------------------------------------------ the callback


@modes
def test_the_callback_under_a_stock_strategy(mode: Any, tmp_path: Path, llama: Any) -> None:
    """On plain layers, and not over a checkpoint."""
    path, expected = llama
    callback, module = PretrainedInit(path, mode), Net()
    fit = trainer(tmp_path, "auto", [callback])
    fit.validate(module, loader(), verbose=False)
    assert callback.report is not None
    assert len(callback.report.loaded) == len(expected)
    assert all(torch.equal(value, expected[name]) for name, value in module.net.state_dict().items())
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "end.ckpt")
    resumed, again = PretrainedInit(path, mode), Net()
    trainer(tmp_path, "auto", [resumed], max_epochs=2).fit(again, loader(), ckpt_path=tmp_path / "end.ckpt")
    assert resumed.report is None


@modes
def test_a_checkpoint_of_weights_alone_is_not_overwritten(mode: Any, tmp_path: Path, llama: Any) -> None:
    """Regression: such a file has no states of callbacks, so on_load_checkpoint is not called."""
    saver = ModelCheckpoint(tmp_path, filename="end", save_weights_only=True)
    fit, module = trainer(tmp_path, "auto", [saver, PretrainedInit(llama[0], mode)]), Net()
    fit.fit(module, loader())
    trained = copy.deepcopy(module.state_dict())
    fit.test(module, loader(), ckpt_path="best", verbose=False)
    assert all(same_bits(value, trained[name]) for name, value in module.state_dict().items())
    assert "callbacks" not in torch.load(saver.best_model_path, weights_only=True)
    for stage in ("validate", "test", "predict", "fit"):
        callback, other = PretrainedInit(llama[0], mode), Net()
        run = trainer(tmp_path, "auto", [callback])
        if stage == "fit":  # Lightning goes on from no such file, after on_fit_start
            with pytest.raises(KeyError, match="checkpoint contains only the model"):
                run.fit(other, loader(), ckpt_path=saver.best_model_path)
        elif stage == "predict":
            run.predict(other, loader(), ckpt_path=saver.best_model_path)
        else:
            getattr(run, stage)(other, loader(), ckpt_path=saver.best_model_path, verbose=False)
        assert callback.report is None
        assert all(same_bits(value, trained[name]) for name, value in other.state_dict().items())
        run.validate(other, loader(), verbose=False)  # nor later
        assert all(same_bits(value, trained[name]) for name, value in other.state_dict().items())


def test_callback_refusals(tmp_path: Path, llama: Any) -> None:
    path, _ = llama
    with pytest.raises(ValueError, match="mode must be one of 'progressive', 'lazy', 'prefetch', got 'eager'"):
        PretrainedInit(path, mode="eager")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LRTTStrategy: pretrained must be a path or a Pretrained, got int"):
        LRTTStrategy(pretrained=3)  # type: ignore[arg-type]
    assert LRTTStrategy(pretrained=Path(path)).pretrained.path == path  # type: ignore[arg-type, union-attr]
    with pytest.raises(MisconfigurationException, match="must have no `pretrained` beside this callback"):
        trainer(tmp_path, LRTTStrategy(pretrained=path), [PretrainedInit(path)]).fit(Net(), loader())
    with pytest.raises(MisconfigurationException, match="meta device need the strategy lrtt, got SingleDeviceStrategy"):
        PretrainedInit(path).setup(trainer(tmp_path, "auto"), Net("meta"), "fit")


@pytest.mark.parametrize("where", ["init", "meta"])
@pytest.mark.parametrize(("content", "error"), [(b"GGUF", CheckpointFormatError), (None, FileNotFoundError)])
def test_a_bad_file_is_refused_at_setup(content: bytes | None, error: Any, where: str, tmp_path: Path) -> None:
    """Regression: for a module on meta Lightning's teardown raised something else instead."""
    if content is not None:
        (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(error):
        trainer(tmp_path, LRTTStrategy(pretrained=str(tmp_path / "a.gguf"))).fit(Net(where), loader())


def test_a_file_of_another_model_changes_nothing(tmp_path: Path) -> None:
    write_llama(tmp_path / "a.gguf", layers=1)
    module = Net()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CheckpointMismatchError, match=r"missing in the file \(6\): net.model.layers.1"):
        trainer(tmp_path, LRTTStrategy(exclude=["*"], pretrained=str(tmp_path / "a.gguf"))).fit(module, loader())
    assert all(same_bits(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar, None])
def test_the_bar_is_the_trainers_and_counts_bytes(
    bar: Any, tmp_path: Path, llama: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if bar is RichProgressBar:
        pytest.importorskip("rich", reason="an optional dependency of Lightning")
    from lightning_lrtt.weights import pretrained as module_of_bar

    seen: list[Any] = []
    original = module_of_bar.byte_bar

    def spy(kind: str | None, total: int, text: str) -> Any:
        seen.append((kind, total, text))
        return original(kind, total, text)

    monkeypatch.setattr(module_of_bar, "byte_bar", spy)
    strategy = LRTTStrategy(CONFIGS["digital"], pretrained=llama[0])
    trainer(tmp_path, strategy, [bar()] if bar else None, enable_progress_bar=bar is not None).fit(Net(), loader(1))
    kind = {RichProgressBar: "rich", TQDMProgressBar: "tqdm", None: None}[bar]
    assert seen == [(kind, strategy.pretrained.report.bytes, "Loading llama.gguf")]
    printed = capsys.readouterr()
    assert ("Loading llama.gguf" in printed.out + printed.err) == (bar is not None)


# ------------------------------------------------------------------ DDP


DDP = """
import json, logging, sys
import lightning.pytorch as pl, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from test_pretrained_init import Net, dataset, loader
from lightning_lrtt import LRTTConfig, convert_to_lrtt
from lightning_lrtt.callbacks import PretrainedInit
from lightning_lrtt.nn import find_tiles
from lightning_lrtt.weights import plan

class Own(Net):
    def __init__(self):
        super().__init__()
        convert_to_lrtt(self, LRTTConfig(rank=2, transfer_every=4))

loads, sent = [], []
fill = plan.LoadPlan.fill
def counted(self, entry):
    loads.append(entry.name)
    fill(self, entry)
plan.LoadPlan.fill = counted
broadcast = dist._broadcast_coalesced
def watched(group, tensors, *args, **kwargs):
    sent.extend(t.data_ptr() for t in tensors)
    return broadcast(group, tensors, *args, **kwargs)
dist._broadcast_coalesced = watched

if __name__ == "__main__":
    torch.manual_seed(0)
    module = Own()
    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.c = {{name: tile.effective_weight().clone() for name, tile in find_tiles(pl_module).items()}}
    look = Look()
    trainer = pl.Trainer(strategy="ddp", devices=2, accelerator="cpu", max_steps=5, logger=False,
                         enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False,
                         callbacks=[PretrainedInit({path!r}, {mode!r}), look])
    trainer.fit(module, loader())
    c = {{tile.weight.data_ptr() for tile in find_tiles(module).values()}}
    torch.save({{"loads": loads, "sent_c": len(c & set(sent)), "sent": len(sent), "start": look.c,
                "end": module.state_dict()}}, f"{folder}/rank{{trainer.global_rank}}.pt")
"""


@modes
def test_two_processes_load_once_each_and_send_no_c(mode: str, tmp_path: Path, llama: Any) -> None:
    """DDP's first broadcast leaves C out; every rank decodes the file into its own."""
    path, expected = llama
    script = tmp_path / "run.py"
    script.write_text(DDP.format(tests=str(Path(__file__).parent), path=path, mode=mode, folder=str(tmp_path)))
    env = clean_environment()
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in (0, 1)]
    for rank in ranks:
        assert sorted(rank["loads"]) == sorted("net." + name for name in expected)
        assert rank["sent"] > 0
        assert rank["sent_c"] == 0
        assert_starts(rank["start"], expected)  # lazy modes too: DDP sends buffers before each forward pass
    for name, value in ranks[0]["end"].items():
        assert same_bits(value, ranks[1]["end"][name]), name


# ------------------------------------------------------------------ YAML and inspect


@pytest.fixture
def quiet_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, given in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lrtt"])
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    monkeypatch.setattr(logging.getLogger("lightning_lrtt"), "handlers", [logging.NullHandler()])


@pytest.mark.parametrize("form", ["path", "pretrained", "callback"])
def test_yaml(form: str, tmp_path: Path, llama: Any, quiet_cli: None) -> None:
    strategy: dict[str, Any] = {"class_path": "lightning_lrtt.LRTTStrategy", "init_args": {"config": {"rank": 2}}}
    callbacks: list[Any] = []
    options = {"path": llama[0], "mode": "lazy", "names": "auto"}
    if form == "path":
        strategy["init_args"]["pretrained"] = llama[0]
    elif form == "pretrained":
        strategy["init_args"]["pretrained"] = {"class_path": "lightning_lrtt.weights.Pretrained", "init_args": options}
    else:
        callbacks = [{"class_path": "PretrainedInit", "init_args": options}]
    config = {
        "model": {"class_path": "test_pretrained_init.Net"},
        "data": {"class_path": "test_pretrained_init.Data"},
        "trainer": {
            "strategy": strategy,
            "callbacks": callbacks,
            "accelerator": "cpu",
            "max_steps": 2,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}},
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "fit.yaml"])
    (saved,) = tmp_path.glob("lightning_logs/version_0/config.yaml")
    assert llama[0] in saved.read_text()
    main(["fit", "--config", str(saved), "--trainer.logger.init_args.name=again"])  # what was saved runs again
    one, other = (
        torch.load(next(tmp_path.glob(f"{name}/version_0/checkpoints/*.ckpt")), weights_only=True)["state_dict"]
        for name in ("lightning_logs", "again")
    )
    assert all(
        same_bits(value, other[name]) for name, value in one.items() if "tile_state" not in name and name[-2:] != ".B"
    )


class Data(pl.LightningDataModule):
    """For the YAML."""

    def train_dataloader(self) -> DataLoader:
        return loader()


def test_inspect(llama: Any, capsys: pytest.CaptureFixture[str], quiet_cli: None) -> None:
    path, expected = llama
    main(["inspect", path])
    page = capsys.readouterr().out
    assert page.startswith("problems: none\n")
    assert f"gguf, {os.path.getsize(path)} bytes, {len(expected)} tensors of" in page
    assert "bytes: 12 Q8_0, 3 F32" in page  # 5 of each layer, embedding and head; norms
    assert "general.architecture = 'llama'" in page
    (line,) = [line for line in page.splitlines() if line.startswith("blk.1.attn_k.weight")]
    assert line.split() == ["blk.1.attn_k.weight", "32x64", "Q8_0", "2176", "model.layers.1.self_attn.k_proj.weight"]


def test_inspect_lists_values_and_tensors_that_nobody_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet_cli: None
) -> None:
    tensors = {"blk.0.attn_q.weight": Kind.F32, "blk.0.attn_k.weight": Kind.F32, "extra": Kind.F32}
    numbers = np.ones((4, 32), np.float32)
    path = str(write_gguf(tmp_path / "a.gguf", {n: (numbers, k) for n, k in tensors.items()}, llama__block_count=1))
    with LazyCheckpoint.open(path) as checkpoint:
        position = checkpoint["blk.0.attn_k.weight"].position + 40
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(np.float32(np.inf).tobytes())
    main(["inspect", path])
    assert capsys.readouterr().out.startswith(
        "problems: 1\n  extra: not in the table of llama, no layer takes it by mapped names\n"
    )
    main(["inspect", path, "--verify-values"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "problems: 2",
        f"  blk.0.attn_k.weight: byte {position}: the scale of a F32 block must be finite, but is not",
    ]
    assert any(line.startswith("blk.0.attn_q.weight") for line in lines)  # and the rest of the page


def test_inspect_with_a_module_shows_problems_first(
    llama: Any, capsys: pytest.CaptureFixture[str], quiet_cli: None
) -> None:
    path, _ = llama
    main(["inspect", path, "--module", "weights_helpers.Llama", "--init-args", json.dumps({"layers": 3})])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "problems: 6"
    assert lines[1] == "  model.layers.2.self_attn.q_proj.weight: missing in the file"
    assert any(line.endswith("model.layers.0.self_attn.q_proj.weight (rows of 4 heads unpermuted)") for line in lines)
    main(["inspect", path, "--module", "weights_helpers.Llama"])
    assert capsys.readouterr().out.startswith("problems: none\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nothing.gguf"], "No such file"),
        (["bad.gguf"], "problem: .*bad.gguf: header"),
        (["good.gguf", "--module", "weights_helpers.Nothing"], "--module must be a class"),
        (["good.gguf", "--module", "weights_helpers.Llama", "--init-args", "{"], "--module must be a class"),
    ],
)
def test_inspect_refusals(
    args: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet_cli: None
) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF123")
    write_llama(tmp_path / "good.gguf", kind=Kind.Q4_0)
    with pytest.raises(SystemExit) as caught:
        main(["inspect", *args])
    assert caught.value.code == 1
    import re

    assert re.search(said, capsys.readouterr().err)
