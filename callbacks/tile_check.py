"""TileCheck: everything is finite, and every tile gives what its effective weight gives."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning_lrtt.callbacks.tile_monitor import TileMonitor
from torch import Tensor
from typing_extensions import override

from lightning_lrtt import NonFiniteError, _check
from lightning_lrtt.nn import LRTTTransposedLinear, TileModule, find_tiles


class TileCheck(Callback):
    """For debugging: stop at the first step in which something is not as it must be.

    At a checked step each output of each tile is compared with that of the plain layer that has the tile's effective
    weight, in float64. They may differ by rounding: ``|y - W x| <= n eps (|C| + |alpha| |A| |B|) |x|`` with n = k + r + 3,
    whatever the order of the additions (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). Tiles whose
    reads go through converters (``io``) differ by design and are left out. After the step the loss, every parameter and
    every gradient must be finite.

    Every step runs eagerly, also with `CUDAGraph`. On a module without tiles only finiteness is checked.

    Args:
        every_n_steps: Optimizer steps between checks, at least 1.
        trace: Switch on the trace of the run's `TileMonitor` (one line per finished cycle). Without a monitor in the run
            there is no trace.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
        NonFiniteError: In training, if something is not finite; it says what, and after which step.
        RuntimeError: In training, if an output is not that of the effective weight.

    Example:
        >>> TileCheck(every_n_steps=10).state_key
        "TileCheck{'every_n_steps': 10}"
    """

    def __init__(self, every_n_steps: int = 1, trace: bool = False) -> None:
        _check.integer("TileCheck", "every_n_steps", every_n_steps, low=1)
        self.every_n_steps, self.trace = every_n_steps, trace
        self.compared = 0  # outputs so far
        self.checked = 0  # steps so far
        self._hooks: list[Any] = []

    @cached_property  # Lightning asks for it at every hook
    @override
    def state_key(self) -> str:
        return self._generate_state_key(every_n_steps=self.every_n_steps)

    def wants_eager_step(self) -> bool:
        """For `CUDAGraph`: in a replay no hook would run."""
        return True

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.trace and stage == "fit":
            for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
                if isinstance(callback, TileMonitor):
                    callback.trace = True

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._release()  # of a step that was broken off
        if (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % self.every_n_steps == 0:
            for name, tile in find_tiles(pl_module).items():
                if tile.config.io is None:
                    self._hooks.append(tile.register_forward_hook(partial(self._compare, name), with_kwargs=True))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._release()
        done = trainer.fit_loop.epoch_loop._batches_that_stepped
        if trainer.fit_loop._should_accumulate() or (done + 1) % self.every_n_steps:
            return
        values = {"the loss": outputs["loss"]} if isinstance(outputs, dict) and "loss" in outputs else {}
        for name, parameter in pl_module.named_parameters():
            values[name] = parameter.detach()
            if parameter.grad is not None:
                values[f"the gradient of {name}"] = parameter.grad
        values = {name: value for name, value in values.items() if value.numel()}
        finite = torch.stack([value.isfinite().all() for value in values.values()]).tolist()
        for (name, value), good in zip(values.items(), finite, strict=True):
            if not good:
                raise NonFiniteError(
                    f"TileCheck: {name} must be finite, got {_first(value)} after step {done}; lower lr or tile_lr_scale, "
                    "or look at the batch; detect_anomaly names the operation of a backward pass"
                )
        self.checked += 1

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @torch.no_grad()
    def _compare(self, name: str, tile: TileModule, args: Any, kwargs: Any, output: Tensor) -> None:
        x = args[0] if args else kwargs["x"]
        if not tile.training or not bool(x.isfinite().all()):
            return
        with torch.autocast(x.device.type, enabled=False):
            plain: Any = tile.to_digital().double()
            exact = plain(x.double())
            a, b = tile.factors()
            sizes = (tile.matrix.abs() + abs(tile.config.alpha) * a.abs() @ b.abs()).view(tile.weight.shape).double()
            plain.weight.copy_(sizes.t() if isinstance(tile, LRTTTransposedLinear) else sizes)
            if plain.bias is not None:
                plain.bias.abs_()
            bound = (b.shape[1] + b.shape[0] + 3) * _precision(x, output) * plain(x.abs().double())
        worst = float(((output.double() - exact).abs() - bound).max()) if output.numel() else 0.0
        if not worst <= 0.0:
            raise RuntimeError(
                f"TileCheck: the output of tile {name!r} must be that of its effective weight up to rounding, got "
                f"{worst:.3g} more than that; something between them changes the output (a hook, another forward), or "
                "this is a bug of lightning-lrtt"
            )
        self.compared += 1


def _precision(x: Tensor, output: Tensor) -> float:
    """2u of the coarsest arithmetic that the layer may have used."""
    cuda = torch.backends.cuda.matmul, torch.backends.cudnn
    if x.is_cuda and any(backend.allow_tf32 for backend in cuda):
        return max(2.0**-10, torch.finfo(output.dtype).eps)
    return max(torch.finfo(x.dtype).eps, torch.finfo(output.dtype).eps)


def _first(value: Tensor) -> float:
    return float(value[~value.isfinite()].flatten()[0])
