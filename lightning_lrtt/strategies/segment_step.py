"""One worker's part of a step: forward and backward of its segments, one after the other, each from the same state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torchmetrics import Metric

from lightning_lrtt.nn import TileModule, find_tiles
from lightning_lrtt.nn.analog import number_samples
from lightning_lrtt.nn.latch import Operands
from lightning_lrtt.strategies.segment_layout import Contents
from lightning_lrtt.strategies.segment_rng import seed_all

_REDUCTIONS = {
    "mean": "mean",
    "sum": "sum",
    "min": "min",
    "max": "max",
    "avg": "mean",
    torch.mean: "mean",
    torch.sum: "sum",
    torch.min: "min",
    torch.max: "max",
}


@dataclass
class Result:
    """What one segment left behind. Tensors are the segment's own."""

    gradients: dict[int, Tensor]
    buffers: dict[int, Tensor]
    loss: Tensor
    logs: dict[str, Tensor]
    operands: list[list[Operands]]
    contents: Contents
    extra: dict[str, Any] = field(default_factory=dict)


class Recorder:
    """Stands in for ``LightningModule.log`` while segments run."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.options: dict[str, dict[str, Any]] = {}

    def __call__(self, name: str, value: Any, prog_bar: bool = False, *args: Any, **options: Any) -> None:
        """Keep the last value of a name.

        Raises:
            MisconfigurationException: For what cannot be reduced by segment.
        """
        if isinstance(value, Metric | Mapping):
            raise MisconfigurationException(
                f"LRTTDDPStrategy: self.log({name!r}) in training_step must get a number, got {type(value).__name__}; compute "
                "the value of the segment (it is averaged over segments), and keep metric objects for validation"
            )
        if args:
            raise TypeError(
                f"LRTTDDPStrategy: self.log({name!r}) must get its options by name, got {len(args)} by position"
            )
        reduction = options.get("reduce_fx", "mean")
        if isinstance(reduction, str):
            reduction = reduction.lower()
        if reduction not in _REDUCTIONS:
            raise MisconfigurationException(
                f"LRTTDDPStrategy: reduce_fx of self.log({name!r}) must be mean, sum, min or max in "
                f"training_step, got {reduction!r}"
            )
        self.values[name] = value.detach() if isinstance(value, Tensor) else value
        self.options[name] = {**options, "prog_bar": prog_bar}

    def clear(self) -> None:
        """Before a segment."""
        self.values = {}

    def reduction(self, name: str) -> str:
        """mean, sum, min or max."""
        chosen = self.options[name].get("reduce_fx", "mean")
        return _REDUCTIONS[chosen.lower() if isinstance(chosen, str) else chosen]


class Buffers:
    """The buffers as a step found them: every segment starts from there. Tiles' own counters are not touched.

    Changes are found by the tensors' version counters. Batch normalisation writes its running statistics without counting:
    those of normalisation layers in training always count as changed, and others are found by comparing values in the
    first step.
    """

    def __init__(self, module: nn.Module) -> None:
        self.slots = [
            (owner, name)
            for owner in module.modules()
            if not isinstance(owner, TileModule)
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        of = {id(owner): path for path, owner in module.named_modules()}
        self.names = [f"{of[id(owner)]}.{name}".lstrip(".") for owner, name in self.slots]
        self.tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._versions: list[int] = []
        self._silent: set[int] = set()
        self._compared = False

    def _writes(self, index: int) -> bool:
        """Whether a buffer is written without a new version."""
        owner = self.slots[index][0]
        return index in self._silent or (isinstance(owner, _NormBase) and owner.training)

    def snapshot(self) -> None:
        """Copy what changed since the last snapshot, in place or by assignment."""
        for i, (owner, name) in enumerate(self.slots):
            now = owner._buffers[name]
            assert now is not None
            if i == len(self.tensors):
                self.tensors.append(now)
                self._copies.append(now.detach().clone())
                self._versions.append(now._version)
            elif now is not self.tensors[i] or now._version != self._versions[i] or self._writes(i):
                self.tensors[i], self._copies[i], self._versions[i] = now, now.detach().clone(), now._version

    @torch.no_grad()
    def take(self) -> dict[int, Tensor]:
        """Copies of the buffers that a segment changed, which are set back."""
        changed = {}
        for i, (owner, name) in enumerate(self.slots):
            now, before = owner._buffers[name], self.tensors[i]
            if now is before and before._version == self._versions[i] and not self._writes(i):
                if self._compared or torch.equal(before, self._copies[i]):
                    continue
                self._silent.add(i)
            if now is None or now.shape != before.shape or now.dtype != before.dtype:
                raise MisconfigurationException(
                    f"LRTTDDPStrategy: buffer {self.names[i]} must keep shape and dtype in training_step, got "
                    f"{None if now is None else (tuple(now.shape), now.dtype)} after {(tuple(before.shape), before.dtype)}"
                )
            changed[i] = now.detach().clone()
            before.copy_(self._copies[i])
            owner._buffers[name] = before
            self._versions[i] = before._version
        return changed

    def compared(self) -> None:
        """From now on trust the versions: values are compared in the first step only, which reads from the device."""
        self._compared = True

    @torch.no_grad()
    def write(self, index: int, value: Tensor) -> None:
        """The buffer after the step."""
        self.tensors[index].copy_(value)


class Runner:
    """Runs segments of a module.

    Args:
        module: The LightningModule.
        forward: ``training_step`` in the precision's context.
        backward: Backward of a loss, without Lightning's hooks.
        device: Whose generators are seeded.
        segments: Of a batch.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        forward: Callable[..., Any],
        backward: Callable[[Tensor], None],
        device: torch.device,
        segments: int,
    ) -> None:
        self.module, self.forward, self.backward, self.device = module, forward, backward, device
        self.segments = segments
        self.recorder = Recorder()
        self.buffers = Buffers(module)
        self.tiles = [
            tile
            for tile in find_tiles(module).values()
            if tile.config.is_pulsed or tile.config.transfer_unit == "samples"
        ]
        self.readers = [tile for tile in find_tiles(module).values() if tile.tile_reads is not None]
        self._reads: list[Tensor] = []  # theirs, as the step found them
        self.metrics = {name: m for name, m in module.named_modules() if isinstance(m, Metric)}
        self.parameters: list[tuple[str, nn.Parameter]] = []

    def start(self) -> None:
        """Before the segments of a step: nothing of the last step may leak into this one."""
        self.parameters = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        self._clear()
        self.buffers.snapshot()
        self._reads = [tile.tile_reads.clone() for tile in self.readers if tile.tile_reads is not None]

    def finish(self) -> None:
        """After the segments of a step: validation, which every worker runs whole, numbers its samples from 0."""
        for tile in self.readers:
            number_samples(tile, 0, 1)

    def run(self, segment: int, seed: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result:
        """Forward and backward of one segment.

        Converters draw noise by (step's read, sample), so every segment takes the same tickets and other samples.

        Raises:
            MisconfigurationException: If the loss or what was logged cannot be reduced.
        """
        self.recorder.clear()
        updates = {name: metric._update_count for name, metric in self.metrics.items()}
        seed_all(seed, self.device)
        for tile, reads in zip(self.readers, self._reads, strict=True):
            number_samples(tile, segment, self.segments)
            assert tile.tile_reads is not None
            tile.tile_reads.copy_(reads)
        self.module.log = self.recorder  # type: ignore[method-assign]  # put back after the step
        try:
            output = self.forward(*args, **kwargs)
        finally:
            del self.module.log
        loss, extra = _loss_of(output)
        self.backward(loss)
        for name, metric in self.metrics.items():
            if metric._update_count != updates[name]:
                raise MisconfigurationException(
                    f"LRTTDDPStrategy: metric {name} must not be updated in training_step, whose segments are spread over "
                    "workers; log the segment's value, and keep metric objects for validation"
                )
        gradients = {i: self._gradient(name, p) for i, (name, p) in enumerate(self.parameters) if p.grad is not None}
        buffers = self.buffers.take()
        operands = [list(tile.latch.calls) for tile in self.tiles]
        samples = tuple(tile.latch.samples for tile in self.tiles)
        logs = {name: _number(name, value, self.device) for name, value in sorted(self.recorder.values.items())}
        floating = tuple(i for i, value in buffers.items() if value.is_floating_point())
        contents = Contents(
            tuple(gradients),
            floating,
            tuple((name, self.recorder.reduction(name)) for name in logs),
            tuple(
                (t, *((tuple(v.shape), str(v.dtype)) for v in (c.x, c.xb, c.d, c.da)))
                for t, calls in enumerate(operands)
                for c in calls
            ),
            samples,
        )
        self._clear()
        return Result(gradients, buffers, loss.detach(), logs, operands, contents, extra)

    def _gradient(self, name: str, parameter: nn.Parameter) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout != torch.strided:
            raise MisconfigurationException(
                f"LRTTDDPStrategy: the gradient of {name} must be dense, got {gradient.layout}; use sparse=False"
            )
        return gradient.contiguous()

    def _clear(self) -> None:
        for _, parameter in self.parameters:
            parameter.grad = None
        for tile in self.tiles:
            tile.latch.clear()


def _loss_of(output: Any) -> tuple[Tensor, dict[str, Any]]:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        value = type(loss).__name__ if not isinstance(loss, Tensor) else f"a tensor {tuple(loss.shape)}"
        if isinstance(loss, Tensor) and loss.numel() == 1:
            value = "a loss without gradient"
        raise MisconfigurationException(
            f"LRTTDDPStrategy: training_step must return a loss for every segment, got {value}; return 0 * a prediction's sum "
            "where there is nothing to learn"
        )
    extra = {k: _detached(v) for k, v in output.items() if k != "loss"} if isinstance(output, Mapping) else {}
    return loss, extra


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _number(name: str, value: Any, device: torch.device) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if tensor.numel() != 1:
        raise MisconfigurationException(
            f"LRTTDDPStrategy: self.log({name!r}) must get one number, got shape {tuple(tensor.shape)}"
        )
    return tensor.reshape(()).to(device, non_blocking=True)
