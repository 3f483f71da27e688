"""From the segments of all workers to one gradient: finite flags, clipping, the tree, and what is logged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_lrtt.nn.latch import Operands
from lightning_lrtt.strategies.exchange import ALIGNMENT, Exchange
from lightning_lrtt.strategies.segment_layout import Agreement, Contents, Layout, Place
from lightning_lrtt.strategies.segment_step import Result, Runner
from lightning_lrtt.strategies.tree import maximal_nodes, sum_program, tree

SQUARE, BAD, LOSS, LOGS = 0, 1, 2, 3  # columns of a segment's row


class NonFiniteSegmentError(RuntimeError):
    """The loss or a gradient of a segment was NaN or infinite."""


@dataclass
class Reduced:
    """The step's results, alike on every worker.

    Args:
        gradients: By parameter number; views of one buffer that belongs to this worker.
        loss: Mean over the segments that count, float32 ``[]``.
        logs: Reduced values, float32 ``[]``.
        rows: float64 ``[segments, 3 + logged values]``: square of the gradient's norm, whether it is not finite, loss, ...
        good: How many segments count, float64 ``[1]``.
        operands: Of each tile, all calls in the order of segments.
        samples: Of each tile.
    """

    gradients: dict[int, Tensor]
    loss: Tensor
    logs: dict[str, Tensor]
    rows: Tensor
    good: Tensor
    operands: list[list[Operands]]
    samples: list[int]


class Reducer:
    """Reduces steps over an exchange.

    Args:
        exchange: Between the workers.
        nonfinite: ``raise``, ``skip`` or ``report``.
        clip: Largest norm of a segment's gradient; None: any.

    Attributes:
        gradient_bytes: Bytes of one slot in the last step.
        operand_bytes: Bytes of the pulse operands of all segments in the last step.
    """

    def __init__(self, exchange: Exchange, nonfinite: Literal["raise", "skip", "report"], clip: float | None) -> None:
        self.exchange, self.nonfinite, self.clip = exchange, nonfinite, clip
        self.agreement = Agreement()
        self.gradient_bytes = self.operand_bytes = 0
        nodes = maximal_nodes(exchange.segments, exchange.own)
        self._program = sum_program(nodes)
        self._all = sum_program((tree(exchange.segments),))
        options = {"dtype": torch.float64, "device": exchange.device}
        self._one = torch.ones(1, **options)  # type: ignore[call-overload]  # dtype and device
        self._ones = torch.ones(len(exchange.own), **options)  # type: ignore[call-overload]  # dtype and device
        self._nothing = torch.zeros(0, **options)  # type: ignore[call-overload]  # dtype and device
        self._layouts: dict[Contents, Layout] = {}
        self._pending: list[tuple[int, Tensor, torch.cuda.Event]] = []

    def reduce(self, results: list[Result], runner: Runner, step: int) -> Reduced:
        """Collective: every worker calls it once a step with its own segments, in order.

        Raises:
            NonFiniteSegmentError: By the policy; on a GPU one step later (`check`), since a step reads nothing back.
            WorkerLostError: If a worker does not come.
        """
        exchange = self.exchange
        contents = results[0].contents
        for result in results[1:]:
            contents = contents.joined(result.contents)
        contents = self.agreement.agree(exchange, contents, step)
        layout = self._layout(contents, runner)
        pieces, operand_bytes = _operand_places(contents)
        self.gradient_bytes = sum(p.last - p.first for p in layout.places[: len(contents.gradients)])
        self.operand_bytes = operand_bytes * exchange.segments
        nodes = exchange.begin(layout.split, layout.size, LOGS + len(contents.logs), operand_bytes)
        rows, weights = self._presum(results, contents, layout, nodes)
        packed = None
        if operand_bytes:
            packed = torch.stack(
                [_pack(r.operands, w, operand_bytes, self._weighs) for r, w in zip(results, weights, strict=True)]
            )
        rows, packed = exchange.share(rows, packed)
        keep = 1.0 - rows[:, BAD] if self.nonfinite == "skip" else torch.ones_like(rows[:, BAD])
        good = keep.sum().view(1)
        self._judge(rows, step)
        scale = 1.0 / good.clamp_min(1.0)
        flat = exchange.total(scale)
        loss, logs = self._numbers(rows, keep.contiguous(), scale, contents)
        gradients = {i: layout.places[n].of(flat) for n, i in enumerate(contents.gradients)}
        for n, i in enumerate(contents.buffers):
            runner.buffers.write(i, layout.places[len(contents.gradients) + n].of(flat))
        for i, value in results[0].buffers.items():  # counters: every segment counted from the same state
            if not value.is_floating_point():
                runner.buffers.write(i, value)
        return Reduced(
            gradients,
            loss,
            logs,
            rows,
            good,
            _unpack(packed, pieces, len(runner.tiles)),
            [n * exchange.segments for n in contents.samples],
        )

    @property
    def _weighs(self) -> bool:
        """Whether a segment may count with another weight than 1."""
        return self.nonfinite == "skip" or self.clip is not None

    def _layout(self, contents: Contents, runner: Runner) -> Layout:
        if contents not in self._layouts:
            tensors = [runner.parameters[i] for i in contents.gradients]
            buffers = [(runner.buffers.names[i], runner.buffers.tensors[i]) for i in contents.buffers]
            both: list[tuple[str, Tensor]] = [*tensors, *buffers]
            self._layouts[contents] = Layout([t for _, t in both], [name for name, _ in both])
        return self._layouts[contents]

    def _presum(
        self, results: list[Result], contents: Contents, layout: Layout, nodes: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Write this worker's nodes; return its rows and the weights of its segments."""
        device = self.exchange.device
        empty = torch.empty(0, device=device)
        stats = torch.zeros(2, len(results), 2, dtype=torch.float64, device=device)  # of gradients, of buffers
        count = len(contents.gradients)
        halves = (
            (contents.gradients, [r.gradients for r in results], layout.places[:count], stats[0]),
            (contents.buffers, [r.buffers for r in results], layout.places[count:], stats[1]),
        )
        sums = []
        for numbers, values, places, own_stats in halves:
            out = [place.of(node) for place in places for node in nodes]
            slots = [value.get(i, empty) for i in numbers for value in values]
            torch.ops.lrtt.segment_sum_(out, slots, self._ones, self._one, own_stats, self._program, False)
            sums.append((out, slots))
        loss = torch.stack([r.loss.double().reshape(()) for r in results])
        bad = ((stats[0, :, 1] + stats[1, :, 1] > 0) | ~loss.isfinite()).double()
        weights = self._ones
        if self._weighs:
            keep = 1.0 - bad if self.nonfinite == "skip" else self._ones
            weights = keep
            if self.clip is not None:
                norm = stats[0, :, 0].sqrt()
                weights = torch.where(norm > self.clip, keep * (self.clip / norm), keep)
                weights = torch.where(norm.isfinite(), weights, keep)  # a NaN is for the policy, not for clipping
            for (out, slots), weight in zip(sums, (weights, keep), strict=True):
                torch.ops.lrtt.segment_sum_(out, slots, weight, self._one, self._nothing, self._program, True)
        rows = torch.stack(
            [stats[0, :, 0], bad, loss, *(torch.stack([r.logs[name] for r in results]) for name, _ in contents.logs)], 1
        )
        return rows, weights

    def _numbers(
        self, rows: Tensor, keep: Tensor, scale: Tensor, contents: Contents
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total = torch.empty(rows.shape[1], dtype=torch.float64, device=rows.device)
        torch.ops.lrtt.segment_sum_([total], list(rows.contiguous()), keep, self._one, self._nothing, self._all, False)
        mean = total * scale
        logs = {}
        for column, (name, reduction) in enumerate(contents.logs, LOGS):
            if reduction in ("min", "max"):
                least = float("inf") if reduction == "min" else float("-inf")
                value = getattr(torch.where(keep > 0, rows[:, column], least), "a" + reduction)()
            else:
                value = (mean if reduction == "mean" else total)[column]
            logs[name] = value.float()
        return mean[LOSS].float(), logs

    # -------------------------------------------------------------- policy

    def _judge(self, rows: Tensor, step: int) -> None:
        if self.nonfinite == "report":
            return
        if rows.is_cuda:
            host = torch.empty(len(rows), dtype=torch.float64, pin_memory=True)
            host.copy_(rows[:, BAD], non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((step, host, event))
        else:
            self._decide(step, rows[:, BAD])

    def check(self) -> None:
        """Judge the steps whose flags have arrived from the GPU since.

        Raises:
            NonFiniteSegmentError: By the policy.
        """
        while self._pending:
            step, flags, event = self._pending.pop(0)
            event.synchronize()
            self._decide(step, flags)

    def _decide(self, step: int, flags: Tensor) -> None:
        bad = [s for s, flag in enumerate(flags.tolist()) if flag]
        if not bad or (self.nonfinite == "skip" and len(bad) < len(flags)):
            return
        workers = [w for w, own in enumerate(self.exchange.owners) if any(s in own for s in bad)]
        raise NonFiniteSegmentError(
            f"LRTTDDPStrategy: loss and gradients must be finite, got NaN or infinity at optimizer step {step} in "
            f"{'all segments' if len(bad) == len(flags) else 'segment ' + ', '.join(map(str, bad))} (worker "
            f"{', '.join(map(str, workers))}); lower lr, clip with segment_clip, or leave such segments out "
            "with nonfinite='skip'"
        )


# -------------------------------------------------------------- pulse operands


def _operand_places(contents: Contents) -> tuple[list[tuple[int, list[Place]]], int]:
    """(tile, places of x, X_B, D, D_A) of every call of a segment, and the bytes of all."""
    pieces, at = [], 0
    for tile, *tensors in contents.operands:
        places = []
        for shape, name in tensors:
            dtype = getattr(torch, name.removeprefix("torch."))
            size = torch.Size(shape).numel() * dtype.itemsize
            places.append(Place(at, at + size, dtype, torch.Size(shape)))
            at = -(-(at + size) // ALIGNMENT) * ALIGNMENT
        pieces.append((tile, places))
    return pieces, at


def _pack(operands: list[list[Operands]], weight: Tensor, size: int, weighs: bool) -> Tensor:
    """A segment's operands, uint8 ``[size]``. A weight scales D and D_A; a segment that is left out issues no pulse."""
    pieces = []
    for call in (call for calls in operands for call in calls):
        for tensor, scaled in ((call.x, False), (call.xb, False), (call.d, True), (call.da, True)):
            if weighs:
                factor = weight.to(tensor.dtype)
                tensor = torch.where(weight == 0, torch.zeros_like(tensor), tensor * factor if scaled else tensor)
            bytes_ = tensor.detach().contiguous().view(-1).view(torch.uint8)
            pieces.append(bytes_)
            if rest := -bytes_.numel() % ALIGNMENT:
                pieces.append(bytes_.new_zeros(rest))
    return torch.cat(pieces)


def _unpack(packed: Tensor | None, pieces: list[tuple[int, list[Place]]], tiles: int) -> list[list[Operands]]:
    calls: list[list[Operands]] = [[] for _ in range(tiles)]
    for row in packed if packed is not None else ():
        for tile, places in pieces:
            x, xb, d, da = (place.of(row) for place in places)
            calls[tile].append(Operands(x, xb, d, da, x._version))
    return calls
