"""TileCheck finds what is wrong and nothing else; RunProfile's times are those of the clock."""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.profilers import PyTorchProfiler
from lightning_helpers import DIGITAL, PULSED, Net, loader, trainer
from lightning_lrtt.callbacks import RunProfile, TileCheck, TileMonitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_lrtt import IOConfig, LRTTConfig, NonFiniteError, convert_to_lrtt
from lightning_lrtt.nn import find_tiles

both = pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])


def scalars(folder: Path, tag: str) -> Any:
    return EventAccumulator(str(folder / "run" / "version_0"), size_guidance={"scalars": 0}).Reload().Scalars(tag)


# ---------------------------------------------------------------- TileCheck


@both
def test_a_sound_run_passes_and_is_not_changed(tmp_path: Path, config: LRTTConfig) -> None:
    """The checks draw no random number and write nothing: the weights are those of a run without them."""
    states = []
    for callbacks in ([TileCheck(every_n_steps=2)], []):
        torch.manual_seed(0)
        model = Net()
        trainer(tmp_path, callbacks, config).fit(model, loader())
        states.append(model.state_dict())
        for check in callbacks:
            assert (check.checked, check.compared) == (10, 10 * len(find_tiles(model)))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@both
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(9, 5), (3, 9)), (nn.Linear(6, 6, bias=False), (2, 4, 6)), (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 8)),
     (nn.Conv2d(2, 5, 3, stride=2), (2, 2, 9, 9))],
    ids=["linear", "no-bias", "conv1d", "conv2d"],
)  # fmt: skip
def test_the_bound_holds_for_every_layer(layer: nn.Module, shape: tuple[int, ...], config: LRTTConfig) -> None:
    """With A far from 0; and a change of the output by ten times its rounding does not pass."""
    torch.manual_seed(0)
    tile = convert_to_lrtt(nn.Sequential(copy.deepcopy(layer)), config)[0]
    with torch.no_grad():
        tile.A.normal_()
    x = 100 * torch.randn(shape)
    check = TileCheck()
    output = tile(x)
    check._compare("tile", tile, (x,), {}, output)
    assert check.compared == 1
    largest = float(output.detach().abs().max())
    with pytest.raises(RuntimeError, match="tile 'tile' must be that of its effective weight"):
        check._compare("tile", tile, (x,), {}, output + 1e-3 * largest)


def test_transposed_layers_and_bf16(tmp_path: Path) -> None:
    """Hugging Face's Conv1D keeps its weight transposed; bf16 rounds more."""
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="Conv1D is transformers'").Conv1D
    torch.manual_seed(0)
    tile = convert_to_lrtt(nn.Sequential(conv1d(6, 6)), DIGITAL)[0]
    with torch.no_grad():
        tile.A.normal_()
    x = torch.randn(4, 6)
    check = TileCheck()
    check._compare("tile", tile, (x,), {}, tile(x))
    with pytest.raises(RuntimeError):  # a transposed weight would be found
        check._compare("tile", tile, (x,), {}, x @ tile.effective_weight() + tile.bias)
    model = Net()
    trainer(tmp_path, [check], DIGITAL, precision="bf16-mixed").fit(model, loader())
    assert check.compared == 1 + 20 * 2


def test_an_output_that_bypasses_the_factors(tmp_path: Path) -> None:
    class Bypass(Net):
        def on_train_start(self) -> None:
            tile = self.net[0]
            tile.register_forward_hook(lambda module, args, y: torch.nn.functional.linear(args[0], module.weight))

    model = Bypass()
    with pytest.raises(RuntimeError, match=r"'net.0' must be that of its effective weight"):
        trainer(tmp_path, [TileCheck()], DIGITAL).fit(model, loader())
    assert not model.net[2]._forward_hooks  # on_exception takes the hooks away


@pytest.mark.parametrize("what", ["loss", "parameter", "gradient"])
def test_what_is_not_finite_is_named(tmp_path: Path, what: str) -> None:
    """In the step in which it appears."""

    class Breaks(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 3 and what == "loss":
                return loss * float("nan")
            return loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_step == 3 and what == "gradient":
                self.net[2].bias.grad[1] = float("inf")

        def on_train_batch_end(self, *args: Any) -> None:
            pass

    class Corrupts(TileCheck):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if args[-1] == 3 and what == "parameter":
                with torch.no_grad():
                    pl_module.net[0].bias[0] = float("nan")
            super().on_train_batch_end(trainer, pl_module, *args)

    words = {"loss": "the loss must be finite, got nan", "parameter": "net.0.bias must be finite, got nan",
             "gradient": "net.2.bias must be finite, got"}[what]  # fmt: skip
    with pytest.raises(NonFiniteError, match=words + r".* after step 3"):
        trainer(tmp_path, [Corrupts()], DIGITAL).fit(Breaks(), loader())


def test_reads_through_converters_are_left_out(tmp_path: Path) -> None:
    check = TileCheck()
    trainer(tmp_path, [check], LRTTConfig(rank=2, io=IOConfig())).fit(Net(), loader())
    assert (check.checked, check.compared) == (20, 0)


def test_no_tiles(tmp_path: Path) -> None:
    check = TileCheck()
    trainer(tmp_path, [check], None).fit(Net(), loader())
    assert (check.checked, check.compared) == (20, 0)


def test_accumulated_steps_are_checked_once(tmp_path: Path) -> None:
    check = TileCheck()
    trainer(tmp_path, [check], DIGITAL, accumulate_grad_batches=4).fit(Net(), loader())
    assert (check.checked, check.compared) == (5, 20 * 2)


def test_trace_switches_the_monitor_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = TileMonitor()
    with caplog.at_level(logging.INFO, "lightning_lrtt"):
        trainer(tmp_path, [monitor, TileCheck(trace=True)], DIGITAL).fit(Net(), loader())
    assert "-> transfer;" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "lightning_lrtt"):
        trainer(tmp_path / "b", [TileMonitor(), TileCheck()], DIGITAL).fit(Net(), loader())
    assert "-> transfer;" not in caplog.text


def test_arguments() -> None:
    for kind in (TileCheck, RunProfile):
        with pytest.raises(ValueError, match=rf"{kind.__name__}: every_n_steps must be >= 1, got 0"):
            kind(every_n_steps=0)
    assert TileCheck().wants_eager_step()


# ---------------------------------------------------------------- RunProfile


def test_times_are_those_of_the_clock(tmp_path: Path) -> None:
    """A clock that only training steps and the loader move: 3 ms and 2 ms a batch, whatever validation takes."""
    now = [0.0]

    class Slow(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            now[0] += 0.003
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            now[0] += 100.0

    class SlowLoader:
        def __init__(self) -> None:
            self.inner = loader()

        def __len__(self) -> int:
            return len(self.inner)

        def __iter__(self) -> Any:
            for batch in self.inner:
                now[0] += 0.002
                yield batch

    profile = RunProfile(every_n_steps=5)
    profile._clock = lambda: now[0]
    kwargs = {"max_epochs": 2, "val_check_interval": 10, "num_sanity_val_steps": 1}
    trainer(tmp_path, [profile], DIGITAL, **kwargs).fit(Slow(), SlowLoader(), loader())
    steps, waits = scalars(tmp_path, "profile/step_ms"), scalars(tmp_path, "profile/data_ms")
    assert [event.step for event in steps] == [4, 9, 14, 19, 24, 29, 34, 39]
    # Lightning fetches one batch ahead, so a fetch may count before the epoch begins or in a step; 5 ms on average.
    assert sum(event.value for event in steps) / len(steps) == pytest.approx(5.0, abs=0.5)
    assert all(0 <= wait.value <= 2.5 < step.value <= 6 for step, wait in zip(steps, waits, strict=True))


def test_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    profile = RunProfile(every_n_steps=1)
    trainer(tmp_path, [profile], DIGITAL, accumulate_grad_batches=4).fit(Net(), loader())
    assert [event.step for event in scalars(tmp_path, "profile/step_ms")] == [0, 1, 2, 3, 4]


def test_a_real_clock(tmp_path: Path) -> None:
    class Sleeps(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            time.sleep(0.005)
            return super().training_step(batch, batch_idx)

    trainer(tmp_path, [RunProfile()], DIGITAL).fit(Sleeps(), loader())
    assert all(event.value >= 5.0 for event in scalars(tmp_path, "profile/step_ms"))


def test_the_trace_of_a_short_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fewer steps than the profiler's schedule: the trace is written after the callback, where it said."""
    profiler = PyTorchProfiler(filename="profile", export_to_chrome=True)
    folder = tmp_path / "run" / "version_0"
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, [RunProfile()], DIGITAL, profiler=profiler, limit_train_batches=2).fit(Net(), loader())
    assert f"the trace comes into {folder}" in caplog.text
    assert list(folder.glob("*.pt.trace.json"))
