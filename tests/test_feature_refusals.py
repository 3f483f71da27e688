"""What tiles cannot do is refused at setup, with a sentence that says what to do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from features import both, feature
from helpers import clean_environment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_helpers import DIGITAL, PULSED, Net, loader, trainer
from lightning_lrtt.callbacks import TileMonitor
from torch import distributed, nn
from torch.utils.data import DataLoader

from lightning_lrtt import LRTT, LRTTConfig, LRTTStrategy, convert_to_lrtt
from lightning_lrtt.nn import find_tiles
from lightning_lrtt.optim import reduced


def refuses(tmp_path: Path, message: str, config: LRTTConfig, model: Net | None = None, **kwargs: Any) -> None:
    """`fit` raises before the first step."""
    model = Net() if model is None else model
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, [], config, **kwargs).fit(model, loader())
    assert not any(tile.tile_state[1] for tile in find_tiles(model).values())


@feature("Precision", "64-true", tiles="pulsed", refused=True)
def test_double_on_devices(tmp_path: Path) -> None:
    """Devices hold float32 weights; use 32-true or mixed."""
    refuses(tmp_path, r"precision must be '32-true' or mixed .* got '64-true'", PULSED, precision="64-true")


@feature("Precision", "16-true, bf16-true", refused=True)
@both
@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_half_parameters(tmp_path: Path, config: LRTTConfig, precision: Any) -> None:
    """A tile needs float32 weights; use 16-mixed or bf16-mixed."""
    refuses(tmp_path, f"got '{precision}'; use 'bf16-mixed' or '16-mixed'", config, precision=precision)


@feature("Step", "gradient clipping by value", tiles="pulsed", refused=True)
def test_value_clipping_pulsed(tmp_path: Path) -> None:
    """Single elements have no counterpart in a pulse train; clip by norm."""
    refuses(
        tmp_path,
        "must be 'norm' with pulsed tiles, got 'value'",
        PULSED,
        gradient_clip_val=1.0,
        gradient_clip_algorithm="value",
    )


@feature("Step", "gradient clipping by value", tiles="digital")
def test_value_clipping_digital(tmp_path: Path) -> None:
    """Bounds every element of the first step."""
    model = Net()
    trainer(tmp_path, [], gradient_clip_val=1e-9, gradient_clip_algorithm="value", max_steps=1).fit(model, loader())
    assert 0 < float(model.net[0].A.detach().abs().max()) <= 0.05 * 1e-9 * (1 + 1e-6)


class ByLBFGS(Net):
    """Its second layer may be left to another optimizer."""

    def __init__(self, layers: slice = slice(None)) -> None:
        super().__init__()
        self.layers = layers

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.net[self.layers].parameters(), lr=1.0)


@feature("Optimizers", "LBFGS", refused=True)
@both
def test_lbfgs(tmp_path: Path, config: LRTTConfig) -> None:
    """It evaluates the loss several times a step, and pulses cannot be taken back; use SGD or Adam, or leave its layers
    digital with ``exclude``.
    """
    refuses(tmp_path, r"must step without a closure, got LBFGS.*exclude=", config, ByLBFGS())
    model = ByLBFGS(slice(2, 3))
    x, y = loader().dataset.tensors
    before = float((model.net(x) - y).square().mean().detach())
    whole = DataLoader(loader().dataset, 80)
    trainer(tmp_path, [], strategy=LRTTStrategy(config, exclude=["net.2"]), max_epochs=5).fit(model, whole)
    assert list(find_tiles(model)) == ["net.0"]
    assert float((model.net(x) - y).square().mean().detach()) < before


@both
def test_lbfgs_in_a_loop(config: LRTTConfig) -> None:
    net = convert_to_lrtt(nn.Linear(6, 3), config)
    with pytest.raises(ValueError, match=r"digital must be an optimizer that steps without a closure, got 'LBFGS'"):
        LRTT(digital=torch.optim.LBFGS(net.parameters()))


@feature("Distributed", "lrtt on several devices", refused=True)
@both
def test_several_devices(tmp_path: Path, config: LRTTConfig) -> None:
    """The strategy lrtt is for one."""
    with pytest.raises(MisconfigurationException, match="devices must be one device, got 2"):
        trainer(tmp_path, [], config, devices=2)


class Own(Net):
    """With tiles of its own, for a strategy that is not ours."""

    def __init__(self, config: LRTTConfig) -> None:
        super().__init__()
        convert_to_lrtt(self, config)

    def configure_optimizers(self) -> Any:
        return LRTT(self.parameters(), lr=0.05)

    def on_train_end(self) -> None:
        mine = torch.cat([tile.effective_weight().flatten() for tile in find_tiles(self).values()])
        every = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
        distributed.all_gather(every, mine)
        assert torch.equal(*every)
        if distributed.get_rank() == 0:
            Path(self.trainer.default_root_dir, "agreed").touch()


def ddp(tmp_path: Path, tiles: str) -> subprocess.CompletedProcess[str]:
    """Two workers, forked by a process of their own: one in which gloo has run already must not fork."""
    return subprocess.run(
        [sys.executable, __file__, tiles, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
        env=clean_environment(),
    )


@feature("Distributed", "plain ddp with a module's own tiles", tiles="pulsed", refused=True)
def test_plain_ddp_pulsed(tmp_path: Path) -> None:
    """It averages gradients, not pulses, so tiles would drift apart."""
    done = ddp(tmp_path, "pulsed")
    assert done.returncode != 0
    message = r"pulsed tiles must have one worker, .* got 2 workers; .* Use Trainer\("
    assert re.search(message, done.stderr.replace("\n", " ")), done.stderr[-2000:]


@feature("Distributed", "plain ddp with a module's own tiles", tiles="digital")
def test_plain_ddp_digital(tmp_path: Path) -> None:
    """Gradients are averaged, transfers and reinits are the same everywhere: the workers agree to the bit."""
    done = ddp(tmp_path, "digital")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "agreed").exists()


def test_a_strategy_that_reduces_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also an optimizer that LightningCLI built before there were workers is checked, at its first step."""
    net = convert_to_lrtt(nn.Linear(6, 3), PULSED)
    early = LRTT(net.parameters(), lr=0.05)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 4)
    with pytest.raises(MisconfigurationException, match="got 4 workers"):
        LRTT(net.parameters(), lr=0.05)
    with pytest.raises(MisconfigurationException, match="got 4 workers"):
        early.step()
    with reduced():
        inside = LRTT(net.parameters(), lr=0.05)
    inside.step()


@feature("Distributed", "FSDP, tensor parallelism", refused=True)
@both
def test_sharded_parameters(tmp_path: Path, config: LRTTConfig) -> None:
    """Tiles are matrices with counters, which sharding takes apart. The stock strategies need GPUs, so the test shards
    a module as they do, with one worker.
    """
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        net = convert_to_lrtt(nn.Sequential(nn.Linear(6, 5)), config)
        fully_shard(net, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(MisconfigurationException, match="parameters must be whole tensors, got sharded ones"):
            LRTT(net.parameters(), lr=0.05)
    finally:
        distributed.destroy_process_group()


@feature("Distributed", "DeepSpeed", refused=True)
@both
def test_replaced_parameters(tmp_path: Path, config: LRTTConfig) -> None:
    """It puts flat copies into the optimizer's groups: the first step says that the tiles are gone."""
    net = convert_to_lrtt(nn.Linear(6, 5), config)
    optimizer = LRTT(net.parameters(), lr=0.05)
    flat = torch.cat([p.detach().flatten() for p in net.parameters()]).requires_grad_()
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"1 tiles must stay in its groups, got none; .*DeepSpeed.* use Trainer\("):
        optimizer.step()


@pytest.mark.parametrize(
    ("strategy", "config"),
    [
        (FSDPStrategy, DIGITAL),
        (ModelParallelStrategy, PULSED),
        (DDPStrategy, PULSED),
    ],
)
def test_the_monitor_refuses_strategies_by_name(tmp_path: Path, strategy: Any, config: LRTTConfig) -> None:
    run = trainer(tmp_path, [], None)
    run._accelerator_connector.strategy = type("Two", (strategy,), {"world_size": 2})()
    with pytest.raises(MisconfigurationException, match=r"strategy: .* got Two; use\s+Trainer\(strategy='lrtt'"):
        TileMonitor().setup(run, Own(config), "fit")


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    trainer(folder, [], strategy="ddp_fork", devices=2, logger=False, default_root_dir=folder).fit(
        Own({"pulsed": PULSED, "digital": DIGITAL}[sys.argv[1]]), loader()
    )
