"""Reading a tile through converters: B, then A, then C, each by its own chain; the sums are digital (docs/io.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lrtt.io_config import IOConfig
from lightning_lrtt.nn.function import _accumulates
from lightning_lrtt.nn.latch import Operands
from lightning_lrtt.ops import A, B, C
from lightning_lrtt.ops.kernels import MAX_SAMPLES

if TYPE_CHECKING:
    from lightning_lrtt.nn.tile import TileModule

# Integers up to these are exact in the type: operands of a converter with that many steps lose nothing.
_EXACT = {torch.bfloat16: 2**8, torch.float16: 2**11}


# As latched_read; and the rounds of bound management depend on data on the CPU.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves its options unannotated
def analog_read(tile: TileModule, x: Tensor) -> Tensor:
    """The tile's output through its converters; backward reads through those of the other direction.

    In training mode and in evaluation mode alike there is noise. The two count their reads apart, so that an evaluation
    pass changes nothing of the training that follows.
    """
    y: Tensor = _AnalogRead.apply(x, tile.weight, tile.A, tile.B, tile)  # type: ignore[no-untyped-call]  # torch's
    return y


def number_samples(tile: TileModule, part: int, parts: int) -> None:
    """Let the samples of a worker or segment have numbers of their own in the converters' noise.

    Args:
        tile: The tile.
        part: Which part of a batch it reads from now on.
        parts: Of so many.
    """
    tile.most_samples = MAX_SAMPLES // parts
    tile.first_sample = part * tile.most_samples


class _Reader:
    """The converters of one pass through a tile, forward or backward; one ticket serves its three arrays.

    Args:
        tile: The tile.
        backward: Which converters; those of the backward direction have no bound management.
        evaluation: Which count of reads the pass belongs to.
        dtype: The autocast dtype, or float32.
    """

    def __init__(self, tile: TileModule, backward: bool, evaluation: bool, dtype: torch.dtype) -> None:
        config = (tile.config.io_backward if backward else None) or tile.config.io
        assert config is not None and tile.tile_reads is not None
        self.io: IOConfig = config
        self.numbers = tile.io_numbers[backward]
        self.rounds = 0 if backward else config.bm_rounds
        self.state, self.first_sample, self.most_samples = tile.tile_state, tile.first_sample, tile.most_samples
        on_gpu = tile.tile_state.is_cuda
        self.dtype = (
            dtype if on_gpu and (config.is_perfect or 0 < config.levels <= _EXACT.get(dtype, 0)) else torch.float32
        )
        self.ticket = torch.ops.lrtt.io_ticket_(tile.tile_reads, evaluation)

    def operand(
        self, x: Tensor, array: int, first: int, round: int = 0, pending: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x ``[n, k]`` behind the input converter, and the samples' scales and noise ``[2, n]``.

        Raises:
            ValueError: If this worker's or segment's samples are more than have numbers of their own.
        """
        if first + x.shape[0] > self.most_samples:
            raise ValueError(
                f"{type(self.io).__name__}: a tile must read at most {self.most_samples} samples at once, got "
                f"{first + x.shape[0]}; use a smaller batch, or fewer segments"
            )
        return torch.ops.lrtt.io_input(  # type: ignore[no-any-return]  # operators carry no types
            x, self.ticket, self.state, self.numbers, array, round, self.first_sample + first, pending, self.dtype
        )

    def product(self, u: Tensor, w: Tensor) -> Tensor:
        """``u w^T`` in float32: the output converter has more steps than bf16 has digits."""
        if self.dtype == torch.float32:
            return u.float() @ w.t()
        return torch.mm(u.to(self.dtype), w.to(self.dtype).t(), out_dtype=torch.float32)

    def read(
        self, x: Tensor, w: Tensor, array: int, first: int, operand: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """``x w^T`` through the chain, float32 ``[n, d]``; w ``[d, k]`` is the array or its transpose.

        Args:
            x: Samples ``[n, k]``.
            w: What they are multiplied with.
            array: Number of the array, for the noise.
            first: Index of the first sample.
            operand: What `operand` gave for x, if that can be used again.
        """
        if self.io.is_perfect:
            return self.product(x, w)
        u, per = operand or self.operand(x, array, first)
        y = torch.empty(x.shape[0], w.shape[0], dtype=torch.float32, device=x.device)
        pending = self._output(y, self.product(u, w), per, array, 0, first, None)
        for round in range(1, self.rounds + 1):
            if not x.is_cuda and not pending.any():  # on a GPU nothing is read back: rounds without work return early
                break
            u, per = self.operand(x, array, first, round, pending)
            pending = self._output(y, torch.ops.lrtt.io_product(u, w, pending), per, array, round, first, pending)
        return y

    def _output(
        self, y: Tensor, products: Tensor, per: Tensor, array: int, round: int, first: int, pending: Tensor | None
    ) -> Tensor:
        return torch.ops.lrtt.io_output_(  # type: ignore[no-any-return]  # operators carry no types
            y, products, per, self.ticket, self.state, self.numbers, array, round, self.first_sample + first, pending
        )

    def shared(self, x: Tensor, array: int, first: int) -> tuple[Tensor, Tensor] | None:
        """An operand for the two arrays that read x, unless each read of it is another one."""
        return None if self.io.is_perfect or self.io.is_random_input else self.operand(x, array, first)


class _AnalogRead(torch.autograd.Function):
    """X_B is the analog read of B, D_A the backward analog read of A; x and D are digital.

    Gradients of A and B are formed from these four.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, a: Tensor, b: Tensor, tile: TileModule) -> Tensor:
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        ctx.dtype = torch.get_autocast_dtype(kind) if autocast else torch.float32
        ctx.tile, ctx.evaluation = tile, not tile.training
        c = c.view(tile.tile_shape)
        outputs, inner = [], []
        with torch.autocast(kind, enabled=False):
            reader = _Reader(tile, False, ctx.evaluation, ctx.dtype)
            for first, _, rows in tile.chunks(x):
                held = reader.shared(rows, B, first)
                z = reader.read(rows, b, B, first, held)
                mixed = reader.read(z, a, A, first)
                outputs.append(reader.read(rows, c, C, first, held).add_(mixed, alpha=tile.config.alpha))
                inner.append(z)
            y, z = (tile.unsamples(_joined(rows), x) for rows in (outputs, inner))
        ctx.save_for_backward(x, z, c, a, b)
        return y.to(ctx.dtype if autocast else x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tile: TileModule = ctx.tile
        alpha = tile.config.alpha
        x, z, c, a, b = ctx.saved_tensors
        d, need_x = tile.samples(grad), ctx.needs_input_grad[0]
        grad_b = torch.zeros_like(b)
        inner, grad_x = [], []
        with torch.autocast(x.device.type, enabled=False):  # some call backward within it
            reader = _Reader(tile, True, ctx.evaluation, ctx.dtype)
            for first, piece, rows in tile.chunks(x):
                d_rows = d[first : first + rows.shape[0]]
                held = reader.shared(d_rows, A, first)
                da = reader.read(d_rows, a.t(), A, first, held)
                inner.append(da)
                grad_b.addmm_(da.t(), rows.float(), alpha=alpha)
                if need_x:
                    by_x = reader.read(d_rows, c.t(), C, first, held)
                    grad_x.append(tile.fold(by_x.add_(reader.read(da, b.t(), B, first), alpha=alpha), piece))
            grad_a = alpha * (d.float().t() @ tile.samples(z))
        if _accumulates(ctx.next_functions[2:4]):
            tile.latch.enter(torch._C._current_graph_task_id(), tile.A.grad is None)
            tile.latch.samples += d.shape[0]
            if tile.config.is_pulsed:
                da = tile.unsamples(_joined(inner), x)
                tile.latch.add(Operands(x, z, grad, da, x._version), grad_a, grad_b)
        return _joined(grad_x).to(x.dtype) if need_x else None, None, grad_a, grad_b, None


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
