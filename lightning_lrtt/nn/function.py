"""Reading a tile: ``y = x C^T + alpha (x B^T) A^T``, and what backward leaves behind for the update."""

from __future__ import annotations

from itertools import compress
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_lrtt.nn.latch import Operands
from lightning_lrtt.nn.multiplication import Kept

if TYPE_CHECKING:
    from lightning_lrtt.nn.tile import TileModule


def digital_read(tile: TileModule, x: Tensor) -> Tensor:
    """The tile's output by ordinary autograd; A and B get their exact gradients, C gets none."""
    return _formula(tile, x, tile.weight, tile.A, tile.B)


def _formula(tile: TileModule, x: Tensor, c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = tile.project(x, c.detach())  # whoever unfroze it: C moves by transfers only
    return tile.with_mix(y, tile.project(x, b), a, tile.config.alpha)


def is_latched(tile: TileModule, x: Tensor) -> bool:
    """Whether `latched_read` is what reads the tile, not `digital_read`.

    It must, where backward leaves something for the update. On digital tiles too it is the faster one where autocast copies
    C, and for small layers on a GPU, with and without gradients; unless a compiler, which fuses the read's operations, a
    tracer, a function transform or forward-mode differentiation looks at them.
    """
    config, kind, learns = tile.config, x.device.type, torch.is_grad_enabled()
    if config.io is not None or (learns and not tile.A.requires_grad):
        return False
    if learns and (config.is_pulsed or config.transfer_unit == "samples"):
        return True
    if _is_watched():
        return False
    copies = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != tile.weight.dtype
    return (copies and learns) or (not copies and tile.takes_one_launch(x))


def _is_watched() -> bool:
    """Whether something looks at the operations of a read themselves."""
    transforms = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or transforms


# A compiled graph would drop the latch, and with it every update.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves its options unannotated
def latched_read(tile: TileModule, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The tile's output; backward also counts the samples and, on a pulsed tile, latches x, X_B, D and D_A.

    Digital tiles outside of autocast can be differentiated twice.
    """
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
        ctx.again = x.dtype == dtype == c.dtype and not tile.config.is_pulsed  # nothing was narrowed
        ctx.save_for_backward(*found.kept, *((x, c, a, b) if ctx.again and found.merged else ()))
        return found.y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.again and torch.is_grad_enabled():
            return _backward_by_autograd(ctx, grad)
        found: tuple[Tensor | None, ...] = _backward_once(ctx, grad)
        return found


def _latch(ctx: Any, samples: int) -> bool:
    """Counts the samples of a backward pass that leaves gradients in A and B; says whether it does."""
    if not _accumulates(ctx.next_functions[2:4]):
        return False
    ctx.tile.latch.enter(torch._C._current_graph_task_id(), ctx.tile.A.grad is None)
    ctx.tile.latch.samples += samples
    return True


@torch.autograd.function.once_differentiable
def _backward_once(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tile: TileModule = ctx.tile
    kept = Kept(*ctx.saved_tensors[:5])
    grad = grad.to(kept.x.dtype)
    bias_dtype = tile.A.dtype if ctx.needs_input_grad[4] else None
    in_dtype = ctx.in_dtype if ctx.needs_input_grad[0] else None
    found = tile.gradients(grad, kept, ctx.merged, tile.config.alpha, bias_dtype, in_dtype)
    grad_a, grad_b = found.a.to(tile.A.dtype), found.b.to(tile.B.dtype)
    if _latch(ctx, kept.z.numel() // kept.a.shape[1]) and tile.config.is_pulsed:
        operands = Operands(kept.x, kept.z, grad, found.dz, kept.x._version, ctx.x_top, found.d_top)
        tile.latch.add(operands, grad_a, grad_b, found.copies)
    return found.x, None, grad_a, grad_b, found.bias, None


def _backward_by_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same for a digital tile's gradient that will be differentiated once more: through the formula itself."""
    kept = Kept(*ctx.saved_tensors[:5])
    x, c, a, b = ctx.saved_tensors[5:] if ctx.merged else (kept.x, kept.w, kept.a, kept.b)
    x, a, b = (t.view_as(t) for t in (x, a, b))  # hooks of the tensors themselves are for the pass outside
    _latch(ctx, kept.z.numel() // a.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        y = _formula(ctx.tile, x, c, a, b)
        needs = itemgetter(0, 2, 3)(ctx.needs_input_grad)
        found = iter(torch.autograd.grad(y, list(compress((x, a, b), needs)), grad, create_graph=True))
        by_x, by_a, by_b = (next(found) if needed else None for needed in needs)
        by_bias = ctx.tile.bias_gradient(grad, ctx.tile.A.dtype) if ctx.needs_input_grad[4] else None
    return by_x, None, by_a, by_b, by_bias, None
