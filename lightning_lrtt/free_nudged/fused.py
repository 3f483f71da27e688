"""Windows of `HopfieldMLP` as one compiled kernel (``torch.ops.lrtt.hopfield_window``), and when that is possible."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lrtt.ops.hopfield_kernels import NUDGE, RHO, hopfield_fits

if TYPE_CHECKING:
    from lightning_lrtt.free_nudged.hopfield import HopfieldMLP

_log = logging.getLogger("lightning_lrtt")


def serves(matrix: Tensor, *tensors: Tensor) -> bool:
    """Whether the kernel relaxes these couplings and states; if not, torch's products do, and a DEBUG line says why.

    It takes float32 states through whose window no gradients are recorded, on a CPU with fused multiply-add (AVX2 and
    later), and on a CUDA device whose shared memory holds the couplings (about 1100 states in a group on an H100 or
    H200, 800 on an A100).
    """
    reason = ""
    if torch.is_grad_enabled():
        reason = "gradients are recorded through the window"
    elif any(t.dtype != torch.float32 for t in (matrix, *tensors)):
        reason = f"states are {tensors[-1].dtype}, not float32"
    elif not hopfield_fits(matrix):
        reason = f"no kernel for couplings {list(matrix.shape)} on {matrix.device}"
    if reason:
        _log.debug("HopfieldMLP: window by torch's products: %s", reason)
    return not reason


def window(
    system: HopfieldMLP,
    context: Any,
    odd: Tensor,
    even: Tensor,
    target: Tensor | None,
    beta: Tensor | None,
    clamped: Tensor | None,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """As `HopfieldMLP.window`, in float32: with sums in the fixed order of csrc/hopfield.h."""
    outputs, n = system.sizes[-1], len(odd)
    nudge = "free"
    if clamped is not None:
        nudge, target, beta = "hold", clamped, None
    elif beta is None:
        target = None
    else:
        nudge = "solve" if system.solves else system.cost_function.name
    if target is not None:
        target = target.to(torch.float32).expand(n, outputs).contiguous()
    new: tuple[Tensor, Tensor] = torch.ops.lrtt.hopfield_window(
        context.matrix,
        context.odd,
        context.even,
        odd.contiguous(),
        even.contiguous(),
        target,
        beta if beta is None else beta.to(torch.float32).contiguous(),
        steps,
        system.order == "even_odd",
        outputs,
        len(system.layers) % 2 == 1,
        RHO[system.hidden.name],
        RHO[system.out.name],
        NUDGE[nudge],
    )
    return new
