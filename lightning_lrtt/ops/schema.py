"""Operator schemas and their fakes. Every list holds one entry per array or tile; one call serves a whole model.

Shapes, for a tile with d outputs, k inputs, rank r, and N samples in this step:

- C ``[d, k]``, A ``[d, r]``, B ``[r, k]``: float32 (float64 too where nothing is pulsed), contiguous, updated in place
- ``state`` int64 ``[4]``: key, step, counter, cycle; ``counts`` int64 ``[8]``: accumulators (`COUNTS`)
- ``hyper`` float64 ``[H]`` on the CPU: `LRTTConfig.pack`, constants of the tile
- ``lr`` float64 ``[]`` and ``eta`` float32 ``[]``: learning rates, on the tile's device, so that schedules reach a captured
  step
- ``cells``, float32 ``[planes, rows, columns]``: what the cells of an array hold where that is not the weight itself
  (`PLANES`): the persistent weight under write noise, or the two conductances of a pair. A list has one tensor for each
  array whose device needs one, in the order of the arrays (of transfer_: A, B, C of each tile); None: none does
- ``reads`` int64 ``[2]``: how often the tile was read in training and in evaluation; ``ticket`` int64 ``[]``: the number of
  one read; ``io`` float64 on the CPU: `IOConfig.pack`; ``per`` float32 ``[2, N]``: scale and noise of each sample;
  ``pending``, ``clipped`` int32 ``[N]``: samples to read again, samples with an output at its bound
- ``x`` ``[N, columns]`` and ``d`` ``[N, rows]``: operands of a pulsed update, any strides, any float dtype
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lrtt._compiled import LAYOUT

A, B, C = 0, 1, 2  # arrays of a tile, as the compiled core numbers them
MINUS = 4  # added to an array: the second cells of its pairs
KEY, STEP, COUNTER, CYCLE = range(4)  # entries of `state`
STATE_SIZE = 4
COUNTS: dict[str, int] = {name: i for i, name in enumerate(LAYOUT["counts"])}
# `hyper`: the tile's numbers, then those of the fast and of the visible device.
HYPER_SIZE = len(LAYOUT["tile"]) + 2 * len(LAYOUT["device"])
DEVICE_KINDS = tuple(len(LAYOUT["tile"]) + i * len(LAYOUT["device"]) + LAYOUT["device"].index("kind") for i in (0, 1))
_PAIRS = tuple(kind - LAYOUT["device"].index("kind") + LAYOUT["device"].index("pair") for kind in DEVICE_KINDS)
_WRITE_NOISE = tuple(
    kind - LAYOUT["device"].index("kind") + LAYOUT["device"].index("write_noise_std") for kind in DEVICE_KINDS
)
FIXED_POINT: float = LAYOUT["fixed_point"]  # units per weight unit of the sums in `counts`
BLOCK_SAMPLES: int = LAYOUT["block_samples"]  # `first_sample` must be a multiple of it
CELL_NUMBERS: int = LAYOUT["cell_numbers"]  # what `draw_cells` gives of a cell
IO_SIZE = len(LAYOUT["io"])
SEGMENT_DEPTH: int = LAYOUT["segment_depth"]  # of the stack on which segments are added (csrc/segments.h)

ABSENT = torch.empty(0, dtype=torch.int32)  # in a list of optional tensors

library = torch.library.Library("lrtt", "DEF")

# w -= eta d x^T for every sample in order, as pulses on each cell's device.
library.define(
    "pulsed_update_(Tensor(a!)[] w, Tensor[] x, Tensor[] d, Tensor[] eta, Tensor[] state, Tensor(b!)[] counts, "
    "Tensor[] hyper, int[] array, int[] first_sample, Tensor(c!)[]? cells=None, Tensor[]? x_top=None, "
    "Tensor[]? d_top=None) -> ()"
)
# Ends an optimizer step: counter += 1 or samples; where it is due (or forced) C += tau A B, A <- 0, B <- fresh.
library.define(
    "transfer_(Tensor(a!)[] A, Tensor(b!)[] B, Tensor(c!)[] C, Tensor(d!)[] state, Tensor(e!)[] counts, Tensor[] hyper, "
    "int[] samples, bool force, Tensor(f!)[]? cells=None) -> ()"
)
# A <- 0, B <- the draw of the present cycle.
library.define(
    "reinit_(Tensor(a!)[] A, Tensor(b!)[] B, Tensor[] state, Tensor[] hyper, Tensor(c!)[]? cells=None) -> ()"
)
# w -= lr scale grad, skipped and counted where grad is not finite.
library.define(
    "digital_update_(Tensor(a!)[] w, Tensor[] grad, Tensor[] lr, Tensor[] state, Tensor(b!)[] counts, float[] scale) -> ()"
)
# eta = lr scale <grad, first> / <first, first>: the pulse learning rate follows what was done to p.grad.
library.define("pulse_scale_(Tensor(a!)[] eta, Tensor[] grad, Tensor[] first, Tensor[] lr, float[] scale) -> ()")
# Decay and diffusion of every cell and the refresh of pairs, one optimizer step.
library.define("relax_(Tensor(a!)[] w, Tensor[] state, Tensor[] hyper, int[] array, Tensor(b!)[]? cells=None) -> ()")
# The drawn cells of an array: [7, rows, columns] = b_max, b_min, s_up, s_dn and the model's own three numbers. array + MINUS:
# the second cells of its pairs.
library.define("draw_cells(Tensor state, Tensor hyper, int array, int rows, int columns) -> Tensor")
# Returns how many cells stand at a bound, int64 []. `write`: programs the cells to w, as far as their bounds allow, and counts
# where w is at or beyond a bound.
library.define(
    "clip_(Tensor(a!) w, Tensor state, Tensor hyper, int array, bool write, Tensor(b!)[]? cells=None) -> Tensor"
)
# Resets the cells of columns [first, last) with probability `share`, each on its own. `number` tells the resets of one
# optimizer step apart.
library.define(
    "reset_cells_(Tensor(a!) w, Tensor state, Tensor hyper, int array, int first, int last, float share, int number, "
    "Tensor(b!)[]? cells=None) -> ()"
)
# The next read's number: ticket = 2 reads[evaluation] + evaluation, reads[evaluation] += 1.
library.define("io_ticket_(Tensor(a!) reads, bool evaluation) -> Tensor")
# x [N, k] through the input converter: the operand [N, k] of dtype, in units of the converter's step, and per.
library.define(
    "io_input(Tensor x, Tensor ticket, Tensor state, Tensor io, int array, int round, int first_sample, Tensor? pending, "
    "ScalarType dtype) -> (Tensor, Tensor)"
)
# u w^T [N, d] in float32 of the pending samples, zeros or products of the others; w [d, k] is rounded to u's type.
library.define("io_product(Tensor u, Tensor w, Tensor pending) -> Tensor")
# y [N, d] <- the products acc [N, d] through the output converter, where pending; returns clipped.
library.define(
    "io_output_(Tensor(a!) y, Tensor acc, Tensor per, Tensor ticket, Tensor state, Tensor io, int array, int round, "
    "int first_sample, Tensor? pending) -> Tensor"
)
# c + alpha a b, [d, k] + [d, r] [r, k], added up in c's type and rounded to dtype; a^T [r, d] and b in it.
library.define("merge(Tensor c, Tensor a, Tensor b, float alpha, ScalarType dtype) -> (Tensor, Tensor, Tensor)")
# z [n, r] <- x [n, k] w [r, k]^T in w's dtype, and x in it into `narrow`; returns int32 [n], the bits of the largest |x|
# of that dtype as float32: what `pulsed_update_` takes as x_top or d_top.
library.define("project_(Tensor(a!) z, Tensor x, Tensor w, Tensor(b!)? narrow) -> Tensor")
# x [..., k] times c + alpha a b, [d, k] + [d, r] [r, k], plus a bias [d]: y [..., d], z = x b^T [..., r], and the bits of
# each sample's largest |x| as `project_` returns them.
library.define(
    "small_forward(Tensor x, Tensor c, Tensor a, Tensor b, Tensor? bias, float alpha) -> (Tensor, Tensor, Tensor)"
)
# Of an output gradient [..., d] and what went through `small_forward`: dz = grad a, the gradients of a and b (factor alpha
# included), copies of both, the gradient of a bias, that of x (or [0]: not wanted), and the bits of each sample's largest
# |grad|.
library.define(
    "small_backward(Tensor grad, Tensor x, Tensor z, Tensor c, Tensor a, Tensor b, float alpha, bool input_gradient) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# Decodes GGML blocks: blocks uint8 [rows * bytes of a row], out [rows, columns] float32 or bfloat16 with unit stride in a
# row; row i goes to row rows[i] of out (int64 [rows], each of them once; None: row i).
library.define("dequantize_(Tensor(a!) out, Tensor blocks, int type, Tensor? rows) -> ()")
# Slots of P parameters in S segments are added along a tree: out[p M + m] = scale * node m of slots[p S ... p S + S - 1].
# `program` has one number a segment: 2 * additions after pushing it, + 1 if that completes a node (csrc/segments.h). A slot
# without elements stands for zeros; weights float64 [S] (0 leaves out even NaN); scale float64 [1]; stats float64 [S, 2]
# takes each segment's sum of squares and whether anything in it is not finite (or [0]: not wanted); redo: nothing happens
# if all weights are 1.
library.define(
    "segment_sum_(Tensor(a!)[] out, Tensor[] slots, Tensor weights, Tensor scale, Tensor(b!) stats, int[] program, bool redo) "
    "-> ()"
)
# A window of a layered Hopfield network (csrc/hopfield.h): M [odd, even], drives [N, odd] and [even], states [N, odd] and
# [N, even], target [N, outputs], beta [] or [N], all float32; returns the new states. Numbers of rho and nudge:
# `ops.hopfield_kernels`.
library.define(
    "hopfield_window(Tensor matrix, Tensor odd_drive, Tensor even_drive, Tensor odd, Tensor even, Tensor? target, "
    "Tensor? beta, int steps, bool in_turn, int outputs, bool outputs_are_odd, int rho, int output_rho, int nudge) "
    "-> (Tensor, Tensor)"
)


def planes(hyper: Tensor, array: int) -> int:
    """How many numbers a cell of ``array`` holds beside the weight that is read: 0, 1 (write noise) or 2 (a pair)."""
    visible = array == C
    return 2 if hyper[_PAIRS[visible]] else int(hyper[_WRITE_NOISE[visible]] > 0)


@torch.library.register_fake("lrtt::pulsed_update_", lib=library)
def _(w, x, d, eta, state, counts, hyper, array, first_sample, cells=None):  # type: ignore[no-untyped-def]
    for array_w, array_x, array_d, first in zip(w, x, d, first_sample, strict=True):
        torch._check(
            array_w.dtype == torch.float32, lambda t=array_w: f"pulsed_update_: w must be float32, got {t.dtype}"
        )
        torch._check(
            array_x.dim() == 2
            and array_d.dim() == 2
            and array_x.shape[0] == array_d.shape[0]
            and array_x.shape[1] == array_w.shape[1]
            and array_d.shape[1] == array_w.shape[0],
            lambda a=array_w, b=array_x, c=array_d: (
                "pulsed_update_: x must be [N, columns] and d [N, rows] of w "
                f"{list(a.shape)}, got x {list(b.shape)}, d {list(c.shape)}"
            ),
        )
        torch._check(
            first % BLOCK_SAMPLES == 0,
            lambda f=first: f"pulsed_update_: first_sample must be a multiple of {BLOCK_SAMPLES}, got {f}",
        )


@torch.library.register_fake("lrtt::transfer_", lib=library)
def _(A, B, C, state, counts, hyper, samples, force, cells=None):  # type: ignore[no-untyped-def]
    _check_tiles("transfer_", A, B, C)


@torch.library.register_fake("lrtt::reinit_", lib=library)
def _(A, B, state, hyper, cells=None):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("lrtt::digital_update_", lib=library)
def _(w, grad, lr, state, counts, scale):  # type: ignore[no-untyped-def]
    for array_w, array_g in zip(w, grad, strict=True):
        torch._check(
            array_w.shape == array_g.shape and array_w.dtype == array_g.dtype,
            lambda a=array_w, b=array_g: (
                f"digital_update_: grad must be {list(a.shape)} {a.dtype}, got {list(b.shape)} {b.dtype}"
            ),
        )


@torch.library.register_fake("lrtt::pulse_scale_", lib=library)
def _(eta, grad, first, lr, scale):  # type: ignore[no-untyped-def]
    for g, f in zip(grad, first, strict=True):
        torch._check(
            g.shape == f.shape, lambda a=g, b=f: f"pulse_scale_: grad {list(a.shape)} and first {list(b.shape)} differ"
        )


@torch.library.register_fake("lrtt::relax_", lib=library)
def _(w, state, hyper, array, cells=None):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("lrtt::draw_cells", lib=library)
def _(state, hyper, array, rows, columns):  # type: ignore[no-untyped-def]
    return state.new_empty((CELL_NUMBERS, rows, columns), dtype=torch.float32)


@torch.library.register_fake("lrtt::clip_", lib=library)
def _(w, state, hyper, array, write, cells=None):  # type: ignore[no-untyped-def]
    return state.new_empty((), dtype=torch.int64)


@torch.library.register_fake("lrtt::reset_cells_", lib=library)
def _(w, state, hyper, array, first, last, share, number, cells=None):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("lrtt::io_ticket_", lib=library)
def _(reads, evaluation):  # type: ignore[no-untyped-def]
    return reads.new_empty(())


@torch.library.register_fake("lrtt::io_input", lib=library)
def _(x, ticket, state, io, array, round, first_sample, pending, dtype):  # type: ignore[no-untyped-def]
    torch._check(x.dim() == 2, lambda: f"io_input: x must be [N, k], got {list(x.shape)}")
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((2, x.shape[0]), dtype=torch.float32)


@torch.library.register_fake("lrtt::io_product", lib=library)
def _(u, w, pending):  # type: ignore[no-untyped-def]
    torch._check(
        u.shape[1] == w.shape[1],
        lambda: f"io_product: u [N, k] and w [d, k] must agree, got {list(u.shape)}, {list(w.shape)}",
    )
    return w.new_empty((u.shape[0], w.shape[0]), dtype=torch.float32)


@torch.library.register_fake("lrtt::io_output_", lib=library)
def _(y, acc, per, ticket, state, io, array, round, first_sample, pending):  # type: ignore[no-untyped-def]
    torch._check(
        y.shape == acc.shape and acc.dim() == 2,
        lambda: f"io_output_: y and acc must be [N, d], got {list(y.shape)} and {list(acc.shape)}",
    )
    return acc.new_empty(acc.shape[0], dtype=torch.int32)


@torch.library.register_fake("lrtt::merge", lib=library)
def _(c, a, b, alpha, dtype):  # type: ignore[no-untyped-def]
    torch._check(
        c.dim() == a.dim() == 2 and tuple(b.shape) == (a.shape[1], c.shape[1]) and a.shape[0] == c.shape[0],
        lambda: f"merge: c [d, k], a [d, r], b [r, k] must agree, got {[list(t.shape) for t in (c, a, b)]}",
    )
    return tuple(c.new_empty(shape, dtype=dtype) for shape in (c.shape, (a.shape[1], a.shape[0]), b.shape))


def _agree(op: str, agree: bool, **tensors: Tensor | None) -> None:
    torch._check(
        agree,
        lambda: (
            f"{op}: shapes must agree, got { ({name: list(t.shape) for name, t in tensors.items() if t is not None}) }"
        ),
    )


def check_project(z: Tensor, x: Tensor, w: Tensor) -> None:
    """Of `project_`: z ``[n, r]``, x ``[n, k]``, w ``[r, k]``.

    Raises:
        RuntimeError: Shapes that disagree; so the checks below.
    """
    fits = x.dim() == w.dim() == 2 and x.shape[1] == w.shape[1] and tuple(z.shape) == (x.shape[0], w.shape[0])
    _agree("project_", fits, z=z, x=x, w=w)


def check_small_forward(x: Tensor, c: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """Of `small_forward`: x ``[..., k]``, c ``[d, k]``, a ``[d, r]``, b ``[r, k]``, bias ``[d]``."""
    fits = x.dim() > 0 and c.dim() == a.dim() == b.dim() == 2 and x.shape[-1] == c.shape[1]
    fits = fits and a.shape[0] == c.shape[0] and tuple(b.shape) == (a.shape[1], c.shape[1])
    fits = fits and (bias is None or tuple(bias.shape) == (c.shape[0],))
    _agree("small_forward", fits, x=x, c=c, a=a, b=b, bias=bias)


def check_small_backward(grad: Tensor, x: Tensor, z: Tensor, c: Tensor, a: Tensor, b: Tensor) -> None:
    """Of `small_backward`: grad ``[..., d]``, x ``[..., k]``, z ``[..., r]`` and the layer as in `check_small_forward`."""
    check_small_forward(x, c, a, b, None)
    rest = x.shape[:-1]
    fits = tuple(grad.shape) == (*rest, a.shape[0]) and tuple(z.shape) == (*rest, a.shape[1])
    _agree("small_backward", fits, grad=grad, x=x, z=z, a=a)


@torch.library.register_fake("lrtt::project_", lib=library)
def _(z, x, w, narrow):  # type: ignore[no-untyped-def]
    check_project(z, x, w)
    return x.new_empty(x.shape[0], dtype=torch.int32)


@torch.library.register_fake("lrtt::small_forward", lib=library)
def _(x, c, a, b, bias, alpha):  # type: ignore[no-untyped-def]
    check_small_forward(x, c, a, b, bias)
    y, z = (x.new_empty((*x.shape[:-1], width)) for width in a.shape)
    return y, z, x.new_empty(z.numel() // a.shape[1], dtype=torch.int32)


@torch.library.register_fake("lrtt::small_backward", lib=library)
def _(grad, x, z, c, a, b, alpha, input_gradient):  # type: ignore[no-untyped-def]
    check_small_backward(grad, x, z, c, a, b)
    shapes = (z.shape, a.shape, b.shape, a.shape, b.shape, a.shape[:1], x.shape if input_gradient else (0,))
    return *(grad.new_empty(shape) for shape in shapes), grad.new_empty(z.numel() // a.shape[1], dtype=torch.int32)


@torch.library.register_fake("lrtt::dequantize_", lib=library)
def _(out, blocks, type, rows):  # type: ignore[no-untyped-def]
    torch._check(out.dim() == 2, lambda: f"dequantize_: out must be [rows, columns], got {list(out.shape)}")


@torch.library.register_fake("lrtt::segment_sum_", lib=library)
def _(out, slots, weights, scale, stats, program, redo):  # type: ignore[no-untyped-def]
    nodes = sum(step & 1 for step in program)
    torch._check(
        nodes > 0 and len(out) % nodes == 0 and len(slots) * nodes == len(out) * len(program),
        lambda: (
            f"segment_sum_: out must hold {nodes} nodes and slots {len(program)} segments of each parameter, got "
            f"{len(out)} and {len(slots)}"
        ),
    )


@torch.library.register_fake("lrtt::hopfield_window", lib=library)
def _(matrix, odd_drive, even_drive, odd, even, target, beta, steps, *numbers):  # type: ignore[no-untyped-def]
    torch._check(
        odd.shape == odd_drive.shape and odd.shape[1] == matrix.shape[0] and even.shape[1] == matrix.shape[1],
        lambda: (
            f"hopfield_window: states [N, odd] and [N, even] must fit matrix [odd, even], got {list(odd.shape)}, "
            f"{list(even.shape)}, {list(matrix.shape)}"
        ),
    )
    return odd.new_empty(odd.shape), even.new_empty(even.shape)


def _check_tiles(op: str, a_list: list[Tensor], b_list: list[Tensor], c_list: list[Tensor]) -> None:
    for a, b, c in zip(a_list, b_list, c_list, strict=True):
        torch._check(
            a.shape[1] == b.shape[0] and tuple(c.shape) == (a.shape[0], b.shape[1]),
            lambda a=a, b=b, c=c: (
                f"{op}: A [d, r], B [r, k], C [d, k] must agree, got {list(a.shape)}, {list(b.shape)}, {list(c.shape)}"
            ),
        )
