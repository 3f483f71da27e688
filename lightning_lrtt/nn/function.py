"""Reading a tile: ``y = x C^T + alpha (x B^T) A^T``, and what backward leaves behind for the update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lrtt.nn.latch import Operands
from lightning_lrtt.nn.multiplication import Factors

if TYPE_CHECKING:
    from lightning_lrtt.nn.tile import TileModule


def digital_read(tile: TileModule, x: Tensor) -> Tensor:
    """The tile's output by ordinary autograd; A and B get their exact gradients, C gets none."""
    y = tile.project(x, tile.weight.detach())  # whoever unfroze it: C moves by transfers only
    return tile.with_mix(y, tile.project(x, tile.B), tile.A, tile.config.alpha)


def is_latched(tile: TileModule, x: Tensor) -> bool:
    """Whether `latched_read` is what reads the tile, not `digital_read`.

    It must, where backward leaves something for the update. Where autocast copies C it is the faster one on digital tiles
    too, unless a compiler fuses the read, whose graph it would break.
    """
    config, kind = tile.config, x.device.type
    if not (torch.is_grad_enabled() and tile.A.requires_grad and config.io is None):
        return False
    copies = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != tile.weight.dtype
    return config.is_pulsed or config.transfer_unit == "samples" or (copies and not torch.compiler.is_compiling())


# A compiled graph would drop the latch, and with it every update.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves its options unannotated
def latched_read(tile: TileModule, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The tile's output; backward also counts the samples and, on a pulsed tile, latches x, X_B, D and D_A."""
    y: Tensor = _LatchedRead.apply(x, tile.weight, tile.A, tile.B, bias, tile)  # type: ignore[no-untyped-call]  # torch's
    return y


def _accumulates(leaves: tuple[tuple[Any, int], ...]) -> bool:
    """Whether this backward pass ends in the ``.grad`` of A or B, whose nodes ``leaves`` are.

    `torch.autograd.grad` by the input, or by A and B themselves, leaves no ``.grad`` and must latch nothing.
    """
    try:
        return any(torch._C._will_engine_execute_node(node) for node, _ in leaves if node is not None)
    except RuntimeError:  # the engine captures the leaf's gradient for autograd.grad
        return False


class _LatchedRead(torch.autograd.Function):
    """Under autocast all products run in the autocast dtype, and gradients return in the dtype of their parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, tile: TileModule) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.tile, ctx.in_dtype = tile, x.dtype
        with torch.autocast(kind, enabled=False):
            found = tile.products(x, c, a, b, bias, tile.config.alpha, dtype)
        ctx.merged, ctx.x_top = found.merged, found.x_top
        ctx.save_for_backward(*found.kept)
        return found.y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tile: TileModule = ctx.tile
        kept = Factors(*ctx.saved_tensors)
        grad = grad.to(kept.x.dtype)
        bias_dtype = tile.A.dtype if ctx.needs_input_grad[4] else None
        in_dtype = ctx.in_dtype if ctx.needs_input_grad[0] else None
        found = tile.gradients(grad, kept, ctx.merged, tile.config.alpha, bias_dtype, in_dtype)
        grad_a, grad_b = found.a.to(tile.A.dtype), found.b.to(tile.B.dtype)
        if _accumulates(ctx.next_functions[2:4]):
            tile.latch.enter(torch._C._current_graph_task_id(), tile.A.grad is None)
            tile.latch.samples += kept.z.numel() // kept.a.shape[1]
            if tile.config.is_pulsed:
                operands = Operands(kept.x, kept.z, grad, found.dz, kept.x._version, ctx.x_top, found.d_top)
                tile.latch.add(operands, grad_a, grad_b, found.copies)
        return found.x, None, grad_a, grad_b, found.bias, None
