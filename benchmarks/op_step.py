"""One training step of a square linear layer: LR-TT beside dense AdamW, LoRA and LR-TT in plain PyTorch."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import contenders as c
import torch
from measure import Options, Row, Step, Times, captured, cycle, in_turn, relate, say, syncs_forbidden
from pulse_expectation import ARRAYS, PulseExpectation
from torch import Tensor, nn

from lightning_lrtt import LRTT, devices
from lightning_lrtt.nn import LRTTLinear
from lightning_lrtt.ops import COUNTS

LR, LIGHT, HEAVY = 0.1, 1e-4, 0.1  # standard deviations of the output gradient


class Watched:
    """A pulsed tile, what it counted in the timed windows, and what it should have counted."""

    def __init__(self, training: c.Training, steps: list[Step]) -> None:
        tile: Any = training[0]
        self.tile, self.optimizer, self.steps = tile, training[1], steps
        self.state = [tile.A.detach(), tile.B.detach(), tile.matrix, tile.tile_state, tile.tile_counts]

    def start(self) -> None:
        """The timed windows begin here."""
        self.before = [t.clone() for t in self.state]

    def report(self, row: Row, windows: int) -> None:
        """Take the timed steps again, eagerly and from the same state, and compare pulses with their expectation.

        The random numbers are functions of key and step, so the same steps give the same counts if replays and eager
        steps have the same bits.
        """
        timed, after = self.tile.tile_counts.clone(), [t.clone() for t in self.state]
        for tensor, was in zip(self.state, self.before, strict=True):
            tensor.copy_(was)
        watch = PulseExpectation(self.tile, LR)
        watch.attach(self.optimizer)
        for _ in range(windows):
            for step in self.steps:
                step()
        self.optimizer.observer = None
        row.more["same pulses eagerly"] = torch.equal(self.tile.tile_counts, timed)
        for tensor, was in zip(self.state, after, strict=True):
            tensor.copy_(was)
        count = windows * len(self.steps)
        row.more["mean BL"] = " / ".join(f"{slots / watch.samples:.2f}" for slots in watch.slots[:2].tolist())
        for i, array in enumerate(ARRAYS):
            name = f"pulses_{array.lower()}"
            pulses = int(timed[COUNTS[name]] - self.before[-1][COUNTS[name]])
            mean, error = float(watch.mean[i]), float(watch.variance[i].sqrt())
            z = (pulses - mean) / error if error else 0.0
            row.more[f"pulses of {array}"] = f"{pulses / count:.4g} a step, expected {mean / count:.4g} (z {z:+.2f})"
            row.checks[f"{array} within 4 s.e."] = error > 0 and abs(z) < 4
        transfers = int(timed[COUNTS["transfers"]] - self.before[-1][COUNTS["transfers"]])
        row.checks["one transfer every T steps"] = transfers * self.tile.config.transfer_every == count


def step(o: Options) -> Iterator[Row]:
    """Forward, backward and update of one layer under bf16 autocast, captured; pulses light and heavy."""
    size, n, rank, every, ring = o.size, o.samples, o.rank, o.transfer_every, o.ring
    torch.manual_seed(0)
    x = 2 * torch.rand(n, size, device=o.device) - 1

    def linear() -> nn.Linear:
        return nn.Linear(size, size, bias=False, device=o.device)

    def pulsed(device: devices.Device | None) -> c.Training:
        tile = LRTTLinear(size, size, bias=False, config=c.config(device, rank, every), device=o.device)
        return tile, LRTT(tile.parameters(), lr=LR)

    gradients = {s: [(s * torch.randn_like(x)).bfloat16() for _ in range(ring)] for s in (LIGHT, HEAVY)}
    backend, of_it = c.backend(o.quick)
    rows: dict[str, tuple[Callable[[], c.Training], float]] = {
        "dense, fused AdamW": (lambda: c.adamw(linear()), LIGHT),
        "LoRA (peft), fused AdamW": (lambda: c.peft_lora(linear(), rank), LIGHT),
        "LoRA (PyTorch), fused AdamW": (lambda: c.lora(linear(), rank), LIGHT),
        "LR-TT digital": (lambda: pulsed(None), LIGHT),
        "LR-TT pulsed, light": (lambda: pulsed(c.SOFT), LIGHT),
        "LR-TT pulsed, light, no cycle-to-cycle noise": (lambda: pulsed(c.QUIET), LIGHT),
        "LR-TT pulsed, heavy": (lambda: pulsed(c.SOFT), HEAVY),
        "LR-TT pulsed, heavy, no cycle-to-cycle noise": (lambda: pulsed(c.QUIET), HEAVY),
        "eager PyTorch LR-TT, digital": (lambda: c.reference(linear(), rank, every, LR), LIGHT),
        of_it: (lambda: c.compiled(c.reference(linear(), rank, every, LR), backend), LIGHT),
    }
    found: dict[str, Row] = {}
    runs: dict[str, list[Step]] = {}
    watched: dict[str, Watched] = {}
    for name, (build, scale) in rows.items():
        found[name] = Row(name)
        try:
            training = build()
            eager = c.steps_with_gradients(training, x, gradients[scale], o.autocast)
            if isinstance(training[1], c.ReferenceOptimizer):
                for one in eager[:3]:
                    one()
                runs[name] = cycle(eager, every)
            else:
                runs[name] = cycle(captured(eager, o.device, isinstance(training[1], LRTT)), every)
        except c.Missing as why:
            found[name].missing = str(why)
            continue
        if "pulsed" in name:
            watched[name] = Watched(training, cycle(eager, every))
        say(f"step: {name} is ready")
    ours = [name for name in runs if name.startswith("LR-TT")]

    def start() -> None:
        for one in watched.values():
            one.start()

    times = in_turn(runs, o.rounds, o.device, ours, start)
    say("step: timed; now the pulses")
    for name, row in found.items():
        if name in times:
            _fill(row, times[name], o)
        if name in watched:
            watched[name].report(row, o.rounds)
        if name in ours and o.device == "cuda":
            row.checks["no host synchronisation"] = True  # one would have raised
    relate(list(found.values()), "dense, fused AdamW", "/ dense")
    for name, build in (
        ("dense, fused AdamW", rows["dense, fused AdamW"][0]),
        ("LR-TT pulsed, light", lambda: pulsed(c.SOFT)),
    ):
        if o.device == "cuda":
            found[name].more |= _memory(build, linear, x, o)
    yield from found.values()


def _fill(row: Row, times: Times, o: Options) -> None:
    """Time, and what a step must move and multiply at least.

    Bytes: x and D read, y and dx written (x and dx float32, y and D bf16), W read; dense AdamW also writes W and reads and
    writes two moments. Operations: y and dx, for dense training the gradient of W too, the products of rank r otherwise.
    """
    row.ms, row.worst = times.median, times.worst
    size, n, rank = o.size, o.samples, o.rank
    activations, square = 12 * n * size, 4 * size * size
    dense = row.name.startswith("dense")
    row.bytes = activations + (6 if dense else 1) * square
    low_rank = 4 + 4 + 4  # y and dx through the factors, and their gradients: two products of 2 N k r each
    row.flops = (6 if dense else 4) * n * size**2 + (0 if dense else low_rank * n * size * rank)


def _memory(build: Callable[[], c.Training], linear: Callable[[], nn.Linear], x: Tensor, o: Options) -> dict[str, str]:
    """Peak device memory of a training step over that of forward and backward with a frozen weight.

    The frozen layer has weight and activations of the same sizes, so what is on top is what training takes: factors, the
    latched D, scratch memory of the kernels, moments.
    """

    def peak(training: c.Training | None) -> int:
        model = linear().requires_grad_(False) if training is None else training[0]
        inside = x.detach().clone().requires_grad_()

        def once() -> None:
            if training is not None:
                training[1].zero_grad()
            inside.grad = None
            with o.autocast():
                y = model(inside)
            y.backward(torch.ones_like(y))
            if training is not None:
                training[1].step()

        once()
        torch.cuda.reset_peak_memory_stats()
        with syncs_forbidden(o.device):
            for _ in range(o.transfer_every):  # a transfer is among them
                once()
        return torch.cuda.max_memory_allocated() - before

    gc.collect()
    before = torch.cuda.memory_allocated()
    frozen = peak(None)
    gc.collect()
    before = torch.cuda.memory_allocated()
    training = peak(build())
    return {
        "peak, MiB": f"{training / 2**20:.0f} (frozen {frozen / 2**20:.0f})",
        "extra memory": f"{100 * (training / frozen - 1):.1f}%",
    }
