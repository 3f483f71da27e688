"""The compiled CPU kernels: equal to the plain PyTorch reference bit for bit, on any number of threads, and usable
from ``torch.compile``.
"""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICES, fresh_counts, fresh_state, pack, randn, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lrtt import PulseConfig
from lightning_lrtt.ops import COUNTS, CYCLE, kernels, reference

OPS = torch.ops.lrtt
SHAPES = {"square": (16, 16), "wide": (3, 70), "tall": (67, 5), "row": (1, 33), "column": (19, 1), "cell": (1, 1)}


def assert_same(compiled, plain):
    """Every tensor of two argument lists has the same bits."""
    for i, (a, b) in enumerate(zip(compiled, plain, strict=True)):
        assert same_bits(a, b), f"argument {i}: {(a != b).sum()} of {a.numel()} elements differ"


def compare_update(w, x, d, lr, hyper, array=2, first=0, seed=1, step=7):
    """Run one pulsed update by both, compare, and return (w, counts)."""
    results = []
    for op in (OPS.pulsed_update_, reference.pulsed_update_):
        own, counts = w.clone(), fresh_counts()
        op([own], [x], [d], [torch.tensor(lr)], [fresh_state(seed, step)], [counts], [hyper], [array], [first])
        results.append((own, counts))
    assert_same(*results)
    return results[0]


# ------------------------------------------------------------------ pulsed update


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", ["square", "wide", "tall"])
def test_update_equals_reference_on_every_device(device, shape):
    """Every device with its variations, all weights in and out of bounds, on shapes along either loop order."""
    m, n = SHAPES[shape]
    hyper = pack(visible_device=DEVICES[device], fast_device=DEVICES[device])
    _w, counts = compare_update(0.5 * randn(0, m, n), randn(1, 5, n), randn(2, 5, m), 0.1, hyper, array=1)
    assert counts[COUNTS["pulses_b"]] > 0


@pytest.mark.parametrize("samples", [1, 5, 530])
@pytest.mark.parametrize("shape", SHAPES)
def test_update_equals_reference_on_every_shape(shape, samples):
    """530 samples cross a block of 512 and, with 31 slots, several segments; 67 and 70 cross a chunk of 64 elements and
    a group of 16 lanes.
    """
    m, n = SHAPES[shape]
    hyper = pack(visible_device=DEVICES["soft"])
    compare_update(0.1 * randn(0, m, n), randn(1, samples, n), 0.3 * randn(2, samples, m), 0.02, hyper)


@pytest.mark.parametrize("lr", [1e-4, 0.05, 30.0, -0.05], ids=["light", "medium", "saturated", "negative"])
@pytest.mark.parametrize("um", [True, False], ids=["um", "no_um"])
@pytest.mark.parametrize("ublm", [True, False], ids=["ublm", "no_ublm"])
def test_update_equals_reference_for_every_management(lr, um, ublm):
    """Light pulses take the direct path (up to 5 slots), heavy ones the bit-sliced one and p >= 1."""
    hyper = pack(visible_device=DEVICES["linear"], pulse=PulseConfig(update_management=um, update_bl_management=ublm))
    compare_update(0.1 * randn(0, 9, 21), randn(1, 12, 21), randn(2, 12, 9), lr, hyper)


@pytest.mark.parametrize("bl", [1, 2, 5, 6, 13, 30, 31])
def test_update_equals_reference_for_every_train_length(bl):
    """Trains that straddle word boundaries at every offset, on both sides of the direct path's 5 slots."""
    hyper = pack(visible_device=DEVICES["constant"], pulse=PulseConfig(desired_bl=bl, update_bl_management=False))
    compare_update(torch.zeros(6, 18), randn(1, 40, 18), randn(2, 40, 6), 0.2, hyper)


@pytest.mark.parametrize("kind", ["transposed", "every_other", "expanded", "bfloat16", "float16", "float64"])
def test_update_takes_any_strides_and_float_dtypes(kind):
    """Operands that no kernel copies: views, broadcasts (the gradient of a sum) and other float types."""
    make = {
        "transposed": lambda s, n: randn(s, n, 6).t(),
        "every_other": lambda s, n: randn(s, 12, 2 * n)[::2, ::2],
        "expanded": lambda s, n: randn(s, 1, 1).expand(6, n),
        "bfloat16": lambda s, n: randn(s, 6, n).bfloat16(),
        "float16": lambda s, n: randn(s, 6, n).half(),
        "float64": lambda s, n: randn(s, 6, n).double(),
    }[kind]
    compare_update(torch.zeros(7, 20), make(1, 20), make(2, 7), 0.1, pack(visible_device=DEVICES["soft"]))


def test_update_equals_reference_at_a_later_chunk():
    """A chunk that starts at sample 512 uses the words of sample 512, whatever came before it."""
    hyper = pack(visible_device=DEVICES["soft"])
    compare_update(torch.zeros(4, 20), randn(1, 10, 20), randn(2, 10, 4), 0.1, hyper, first=512)


def test_update_in_chunks_of_whole_blocks_equals_one_call():
    """Chunk sizes are not part of the numbers."""
    hyper, x, d = pack(visible_device=DEVICES["soft"]), randn(1, 1100, 12), randn(2, 1100, 9)
    whole, parts, counts = torch.zeros(9, 12), torch.zeros(9, 12), [fresh_counts(), fresh_counts()]
    common = [torch.tensor(0.05)], [fresh_state()]
    OPS.pulsed_update_([whole], [x], [d], *common, [counts[0]], [hyper], [2], [0])
    for s in (0, 512, 1024):
        OPS.pulsed_update_([parts], [x[s : s + 512]], [d[s : s + 512]], *common, [counts[1]], [hyper], [2], [s])
    assert_same([whole, counts[0]], [parts, counts[1]])


def test_zero_never_fires_where_the_scale_overflows():
    """x = 1e-42 with d = 3e37 wants S_x = 5e40; as an infinity it made 0 * S_x a NaN, which fired in every slot."""
    x, d = torch.tensor([[1e-42, 0.0]]).repeat(100, 1), torch.tensor([[3e37, 0.0]]).repeat(100, 1)
    w, _ = compare_update(torch.zeros(2, 2), x, d, 1.0, pack(visible_device=DEVICES["ideal"]))
    assert w.flatten()[1:].count_nonzero() == 0
    compare_update(torch.zeros(2, 2), d, x, 1.0, pack(visible_device=DEVICES["ideal"]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 40),
    samples=st.integers(0, 9),
    bl=st.integers(1, 31),
    lr=st.floats(-3, 3, width=32),
    log_x=st.integers(-44, 37),
    log_d=st.integers(-44, 37),
    device=st.sampled_from(sorted(DEVICES)),
    um=st.booleans(),
    ublm=st.booleans(),
    zeros=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_update_equals_reference_anywhere(m, n, samples, bl, lr, log_x, log_d, device, um, ublm, zeros, seed):
    """Shapes, scales down to denormals and up to overflow, zero entries; a zero entry never fires."""
    x, d = randn(seed, samples, n) * 10.0**log_x, randn(seed + 1, samples, m) * 10.0**log_d
    if zeros:
        x[:, ::3], d[:, ::2] = 0.0, 0.0
    hyper = pack(
        visible_device=DEVICES[device],
        pulse=PulseConfig(desired_bl=bl, update_management=um, update_bl_management=ublm),
    )
    before = torch.zeros(m, n)
    w, _ = compare_update(before, x, d, lr, hyper, seed=seed % 1000)
    if zeros:
        assert same_bits(w[::2], before[::2])
        assert same_bits(w[:, ::3], before[:, ::3])


# ------------------------------------------------------------------ cells


@pytest.mark.parametrize("array", [0, 1, 2], ids="ABC")
@pytest.mark.parametrize("device", DEVICES)
def test_cells_equal_reference(device, array):
    hyper, state = pack(visible_device=DEVICES[device], fast_device=DEVICES[device]), fresh_state(3)
    drawn = OPS.draw_cells(state, hyper, array, 13, 29)
    assert same_bits(drawn, reference.draw_cells(state, hyper, array, 13, 29))


@pytest.mark.parametrize("write", [True, False])
def test_clip_equals_reference(write):
    hyper, state = pack(visible_device=DEVICES["constant-loose"]), fresh_state(3)
    a, b = randn(0, 13, 29), randn(0, 13, 29)
    assert OPS.clip_(a, state, hyper, 2, write) == reference.clip_(b, state, hyper, 2, write)
    assert same_bits(a, b)


# ------------------------------------------------------------------ transfer and reinit


def tile(d, k, r, dtype=torch.float32, scale=0.3, seed=5, counter=0):
    """A, B, C, state, counts of a tile in the middle of its life."""
    state = fresh_state(seed, 11)
    state[2], state[CYCLE] = counter, 3
    return [
        scale * randn(0, d, r, dtype=dtype),
        randn(1, r, k, dtype=dtype),
        0.1 * randn(2, d, k, dtype=dtype),
        state,
        fresh_counts(),
    ]


def compare_transfer(tensors, hyper, samples=1, force=False):
    """Run one transfer by both, compare, and return (A, B, C, state, counts)."""
    results = []
    for op in (OPS.transfer_, reference.transfer_):
        own = [t.clone() for t in tensors]
        op(*([t] for t in own), [hyper], [samples], force)
        results.append(own)
    assert_same(*results)
    return results[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("reinit", ["normal", "uniform", "orthogonal"])
@pytest.mark.parametrize("shape", ["square", "wide", "tall"])
def test_digital_transfer_equals_reference(dtype, reinit, shape):
    d, k = SHAPES[shape]
    hyper = pack(k, rank=3, reinit=reinit, transfer_every=2, alpha=0.7)
    before = tile(d, k, 3, dtype, counter=1)
    after = compare_transfer(before, hyper)
    assert after[0].count_nonzero() == 0
    compare_transfer(tile(d, k, 3, dtype, counter=0), hyper)  # not due


@pytest.mark.parametrize("mode", ["digital", "pulsed", "pulsed_residual"])
@pytest.mark.parametrize("device", ["ideal", "constant-corrupt", "linear-additive", "soft"])
@pytest.mark.parametrize("scale", [0.003, 0.3, 30.0], ids=["light", "heavy", "beyond_cap"])
def test_device_transfer_equals_reference(mode, device, scale):
    """With no, some and all of the term inside the cap of 4 words; the residual stays in A on the last."""
    hyper = pack(
        21,
        rank=3,
        visible_device=DEVICES[device],
        fast_device=DEVICES["soft"],
        transfer_mode=mode,
        transfer_every=1,
        transfer_max_words=4,
    )
    compare_transfer(tile(18, 21, 3, scale=scale), hyper)


@pytest.mark.parametrize("um", [True, False], ids=["um", "no_um"])
@pytest.mark.parametrize("bl", [3, 31])
@pytest.mark.parametrize("tau", [1.0, -0.5], ids=["up", "down"])
def test_transfer_train_settings_equal_reference(um, bl, tau):
    pulse = PulseConfig(desired_bl=bl, update_management=um, update_bl_management=um)
    hyper = pack(21, rank=3, visible_device=DEVICES["soft"], transfer_pulse=pulse, alpha=tau, transfer_every=1)
    compare_transfer(tile(18, 21, 3), hyper)


def test_transfer_over_several_blocks_of_words_equals_reference():
    """3 terms of 400 words each: the second crosses into the second block of 512, the third into the third."""
    hyper = pack(
        5,
        rank=3,
        visible_device=DEVICES["constant"],
        transfer_every=1,
        transfer_max_words=400,
        transfer_pulse=PulseConfig(desired_bl=5),
    )
    compare_transfer(tile(4, 5, 3, scale=80.0), hyper)


@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_forced_transfer_equals_reference(shape):
    """A flush leaves no residual, whatever the counter."""
    d, k = SHAPES[shape]
    hyper = pack(k, rank=2, visible_device=DEVICES["soft"], transfer_mode="pulsed_residual", transfer_max_words=1)
    after = compare_transfer(tile(d, k, 2, scale=5.0), hyper, samples=0, force=True)
    assert after[0].count_nonzero() == 0


@pytest.mark.parametrize("reinit", ["normal", "uniform", "orthogonal"])
@pytest.mark.parametrize("device", [None, "soft", "constant-corrupt"])
def test_reinit_equals_reference(reinit, device):
    hyper = pack(37, rank=5, reinit=reinit, fast_device=DEVICES.get(device))
    results = []
    for op in (OPS.reinit_, reference.reinit_):
        a, b, _, state, _ = tile(9, 37, 5)
        op([a], [b], [state], [hyper])
        results.append([a, b, state])
    assert_same(*results)


# ------------------------------------------------------------------ digital update, pulse rate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_digital_update_equals_reference(dtype, bad):
    grad = randn(1, 6, 9, dtype=dtype)
    if bad is not None:
        grad[3, 4] = bad
    results = []
    for op in (OPS.digital_update_, reference.digital_update_):
        w, counts = randn(0, 6, 9, dtype=dtype), fresh_counts()
        op([w], [grad], [torch.tensor(0.3, dtype=torch.float64)], [fresh_state(0, 4)], [counts], [0.7])
        results.append([w, counts])
    assert_same(*results)
    assert same_bits(results[0][0], randn(0, 6, 9, dtype=dtype)) == (bad is not None)


@pytest.mark.parametrize("size", [1, 1000, 3001])
def test_pulse_scale_equals_reference(size):
    results = []
    for op in (OPS.pulse_scale_, reference.pulse_scale_):
        eta = [torch.empty(()) for _ in range(3)]
        g = randn(0, size)
        op(eta, [g, 0.25 * g, g], [g, g, torch.zeros(size)], [torch.tensor(0.1, dtype=torch.float64)] * 3, [0.5] * 3)
        results.append(eta)
    assert_same(*results)
    full, quarter, none = results[0]
    assert full == torch.tensor(0.1 * 0.5)  # an untouched gradient leaves lr as it is, exactly
    assert quarter == full / 4  # powers of two scale exactly
    assert none == 0


# ------------------------------------------------------------------ threads


@pytest.fixture
def threads():
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def big_run():
    """Every kernel on sizes that are spread over threads; returns what they wrote."""
    device = DEVICES["soft"]
    hyper = pack(512, rank=4, visible_device=device, fast_device=device, transfer_every=1, reinit="orthogonal")
    out = tile(160, 512, 4)
    lr = [torch.tensor(0.01)] * 2
    state, counts = [out[3]] * 2, [out[4]] * 2
    OPS.pulsed_update_(
        [out[0], out[1]],
        [randn(3, 300, 4), randn(4, 300, 512)],
        [randn(5, 300, 160), randn(6, 300, 4)],
        lr,
        state,
        counts,
        [hyper] * 2,
        [0, 1],
        [0, 0],
    )
    OPS.transfer_(*([t] for t in out), [hyper], [1], False)
    wide = pack(70_000, rank=1, reinit="uniform")
    a, b = torch.ones(8, 1), torch.empty(1, 70_000)
    OPS.reinit_([a], [b], [out[3]], [wide])
    w = randn(7, 300, 300)
    OPS.digital_update_([w], [randn(8, 300, 300)], [torch.tensor(0.1, dtype=torch.float64)], [out[3]], [out[4]], [1.0])
    eta = [torch.empty(()), torch.empty(())]
    OPS.pulse_scale_(eta, [w, w], [w, w + 1], [torch.tensor(0.1, dtype=torch.float64)] * 2, [1.0] * 2)
    c = randn(9, 160, 512)
    bound = OPS.clip_(c, out[3], hyper, 2, True)
    exact = tile(300, 300, 4)
    OPS.transfer_(*([t] for t in exact), [pack(300, rank=4, transfer_every=1)], [1], False)
    return [*out, b, w, *eta, c, bound, OPS.draw_cells(out[3], hyper, 2, 160, 512), *exact]


def test_results_do_not_depend_on_the_number_of_threads(threads):
    threads(1)
    expected = big_run()
    for n in (2, 4):
        threads(n)
        assert_same(big_run(), expected)


# ------------------------------------------------------------------ torch.library and torch.compile


def op_calls():
    """(op, arguments) of every operator, on small tiles."""
    hyper = pack(12, rank=2, visible_device=DEVICES["soft"], fast_device=DEVICES["soft"], transfer_every=1)
    exact = pack(12, rank=2, transfer_every=1)
    a, b, c, state, counts = tile(9, 12, 2)
    double = [t.double() for t in (a, b, c)]
    lr = torch.tensor(0.1, dtype=torch.float64)
    return {
        "pulsed_update_": (
            [c],
            [randn(3, 5, 12)],
            [randn(4, 5, 9)],
            [torch.tensor(0.1)],
            [state],
            [counts],
            [hyper],
            [2],
            [0],
        ),
        "transfer_": ([a], [b], [c], [state], [counts], [hyper], [1], False),
        "transfer_digital": (*([t] for t in double), [state], [counts], [exact], [1], True),
        "reinit_": ([a], [b], [state], [hyper]),
        "digital_update_": (
            [a, b],
            [a.clone(), b.clone()],
            [lr, lr],
            [state, state],
            [counts, counts.clone()],
            [1.0, 1.0],
        ),
        "pulse_scale_": ([torch.empty(())], [a], [a.clone()], [lr], [1.0]),
        "relax_": ([c], [state], [pack(12, rank=2, visible_device=DEVICES["leaky"])], [2]),
        "draw_cells": (state, hyper, 2, 9, 12),
        "clip_": (c, state, hyper, 2, True),
        "merge": (c, a, b, 0.5, torch.bfloat16),
        "project_": (torch.empty(5, 2).bfloat16(), randn(5, 5, 12), b.bfloat16(), torch.empty(5, 12).bfloat16()),
        "project_same": (torch.empty(5, 2), randn(5, 5, 12), b, None),
        "small_forward": (randn(5, 5, 12), c, a, b, randn(8, 9), 0.5),
        "small_backward": (randn(6, 5, 9), randn(5, 5, 12), randn(7, 5, 2), c, a, b, 0.5, True),
    }


def op_of(name):
    return getattr(OPS, {"transfer_digital": "transfer_", "project_same": "project_"}.get(name, name)).default


def test_products_around_a_layer():
    """Operators that have kernels on a GPU only, on a CPU: the formulas of ops/schema.py in float64.

    Tolerance: at most 13 float32 roundings of sums of magnitudes below 60; results in bfloat16 are those of float32 rounded.
    """
    c, a, b, alpha, dtype = op_calls()["merge"]
    w, a_t, own_b = OPS.merge(c, a, b, alpha, dtype)
    assert same_bits(w, torch.addmm(c, a, b, alpha=alpha).bfloat16())
    assert same_bits(a_t, a.t().contiguous().bfloat16()) and same_bits(own_b, b.bfloat16())
    z, x, half, narrow = op_calls()["project_"]
    top = OPS.project_(z, x, half, narrow)
    assert same_bits(narrow, x.bfloat16()) and same_bits(z, narrow @ half.t())
    assert torch.equal(top.view(torch.float32), narrow.float().abs().amax(1))
    x, c, a, b, bias, alpha = op_calls()["small_forward"]
    x64, c64, a64, b64, bias64 = (t.double() for t in (x, c, a, b, bias))
    matrix = c64 + alpha * a64 @ b64
    *found, top = OPS.small_forward(x, c, a, b, bias, alpha)
    expected = [(x64 @ matrix.t() + bias64, x64 @ b64.t())]
    assert torch.equal(top.view(torch.float32), x.abs().amax(1))
    grad, x, z, *_ = op_calls()["small_backward"]
    g64, z64 = grad.double(), z.double()
    by_a, by_b = alpha * g64.t() @ z64, alpha * (g64 @ a64).t() @ x64
    expected.append((g64 @ a64, by_a, by_b, by_a, by_b, g64.sum(0), g64 @ matrix))
    *gradients, top = OPS.small_backward(grad, x, z, c, a, b, alpha, True)
    for ours, theirs in zip((*found, *gradients), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=13 * 2.0**-24 * 60)
    assert torch.equal(top.view(torch.float32), grad.abs().amax(1))
    assert OPS.small_backward(grad, x, z, c, a, b, alpha, False)[6].shape == (0,)


@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name):
    """Schema, fake and functionalisation agree with what the kernel does."""
    torch.library.opcheck(op_of(name), op_calls()[name])


@pytest.mark.parametrize("name", op_calls())
def test_compiles_without_graph_break(name):
    """A compiled function writes the same bits as the eager call."""
    op = op_of(name)
    eager, compiled = op_calls()[name], op_calls()[name]
    torch._dynamo.reset()
    expected = op(*eager)
    result = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")(*compiled)
    leaves = [torch.utils._pytree.tree_leaves(tree) for tree in ((eager, expected), (compiled, result))]
    tensors = [[t for t in flat if isinstance(t, torch.Tensor)] for flat in leaves]
    assert_same(tensors[1], tensors[0])


def test_compiles_with_inductor():
    """The default backend too; no arithmetic around the operator, so that no C++ toolchain is needed."""
    arguments = op_calls()["draw_cells"]
    torch._dynamo.reset()
    compiled = torch.compile(lambda state, hyper: OPS.draw_cells(state, hyper, *arguments[2:]), fullgraph=True)
    assert same_bits(compiled(*arguments[:2]), OPS.draw_cells(*arguments))


# ------------------------------------------------------------------ errors


def update_arguments(**changes):
    """Arguments of a valid pulsed update of a [9, 12] array, changed."""
    good = {
        "w": torch.zeros(9, 12),
        "x": randn(1, 5, 12),
        "d": randn(2, 5, 9),
        "eta": torch.tensor(0.1),
        "state": fresh_state(),
        "counts": fresh_counts(),
        "hyper": pack(visible_device=DEVICES["ideal"]),
        "array": 2,
        "first_sample": 0,
    }
    return [[value] for value in (good | changes).values()]


UPDATE_ERRORS = {
    "w_dtype": (lambda: {"w": torch.zeros(9, 12).double()}, TypeError, "w must be float32, got torch.float64"),
    "w_strides": (lambda: {"w": torch.zeros(12, 9).t()}, ValueError, "w must be contiguous"),
    "x_device": (
        lambda: {"x": torch.zeros(5, 12, device="meta")},
        ValueError,
        "x must be on the tile's device cpu, got meta",
    ),
    "hyper_device": (lambda: {"hyper": pack().to("meta")}, ValueError, "hyper must be on the CPU"),
    "x_shape": (lambda: {"x": randn(1, 5, 11)}, ValueError, r"x must be \[N, 12\] and d \[N, 9\]"),
    "samples": (lambda: {"d": randn(1, 4, 9)}, ValueError, r"x must be \[N, 12\] and d \[N, 9\]"),
    "dimensions": (lambda: {"x": randn(1, 12)[0]}, ValueError, r"x must be \[N, 12\]"),
    "eta_dtype": (lambda: {"eta": torch.tensor(0.1, dtype=torch.float64)}, TypeError, "eta must be float32"),
    "state_dtype": (lambda: {"state": fresh_state().int()}, TypeError, "state must be int64"),
    "state_size": (lambda: {"state": fresh_state()[:3]}, ValueError, "state must have 4 elements, got 3"),
    "counts_dtype": (lambda: {"counts": fresh_counts().float()}, TypeError, "counts must be int64"),
    "counts_size": (lambda: {"counts": fresh_counts()[:3]}, ValueError, "counts must have 8 elements, got 3"),
    "hyper_dtype": (lambda: {"hyper": pack().float()}, TypeError, "hyper must be float64"),
    "hyper_size": (lambda: {"hyper": pack()[:9]}, ValueError, "hyper must have"),
    "first_sample": (lambda: {"first_sample": 100}, ValueError, "first_sample must be a multiple of 512"),
    "first_sample_negative": (lambda: {"first_sample": -512}, ValueError, "first_sample must be a multiple of 512"),
    "too_many_samples": (lambda: {"first_sample": 2**26}, ValueError, "at most 67108864 samples"),
}


@pytest.mark.parametrize("case", UPDATE_ERRORS)
def test_update_refuses(case):
    """A wrong argument is named with its value and the rule, and nothing is written."""
    change, error, message = UPDATE_ERRORS[case]
    with pytest.raises(error, match=message):
        kernels.pulsed_update_(*update_arguments(**change()))  # the dispatcher would send a meta tensor to the fake


def test_update_refuses_tiles_on_two_devices():
    """One launch serves one device; a pointer of another one must not reach it."""
    elsewhere = update_arguments(**{n: t.to("meta") for n, t in (("w", torch.zeros(9, 12)), ("x", randn(1, 5, 12)))})
    arguments = [first + second for first, second in zip(update_arguments(), elsewhere, strict=True)]
    with pytest.raises(ValueError, match="w must be on the tile's device cpu, got meta"):
        kernels.pulsed_update_(*arguments)


TRANSFER_ERRORS = {
    "mixed_dtype": (lambda t: [*t[0:1], t[1].double(), *t[2:]], {}, ValueError, "B must be"),
    "c_shape": (lambda t: [*t[:2], t[2][:, :-1].contiguous(), *t[3:]], {}, ValueError, r"C must be \[9, 12\]"),
    "c_strides": (lambda t: [*t[:2], t[2].t().contiguous().t(), *t[3:]], {}, ValueError, "C must be contiguous"),
    "half": (lambda t: [x.half() for x in t[:3]] + t[3:], {}, TypeError, "A must be float32 or float64"),
    "double_on_device": (
        lambda t: [x.double() for x in t[:3]] + t[3:],
        {"visible_device": DEVICES["soft"]},
        TypeError,
        "A must be float32 on devices",
    ),
    "double_on_fast_device": (
        lambda t: [x.double() for x in t[:3]] + t[3:],
        {"fast_device": DEVICES["soft"]},
        TypeError,
        "A must be float32 on devices",
    ),
}


@pytest.mark.parametrize("case", TRANSFER_ERRORS)
def test_transfer_refuses(case):
    change, numbers, error, message = TRANSFER_ERRORS[case]
    with pytest.raises(error, match=message):
        OPS.transfer_(*([t] for t in change(tile(9, 12, 2))), [pack(12, rank=2, **numbers)], [1], False)


def test_cells_of_a_digital_array_are_refused():
    """Floating-point arrays have no cells; uninitialised memory is no answer."""
    with pytest.raises(ValueError, match="array 2 has no device"):
        OPS.draw_cells(fresh_state(), pack(), 2, 3, 3)


def test_digital_update_refuses_another_shape():
    lr = torch.tensor(0.1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"grad must be \[3, 4\]"):
        OPS.digital_update_([torch.zeros(3, 4)], [torch.zeros(4, 3)], [lr], [fresh_state()], [fresh_counts()], [1.0])


def test_pulse_scale_refuses_another_shape():
    lr = torch.tensor(0.1, dtype=torch.float64)
    with pytest.raises(ValueError, match="one shape"):
        OPS.pulse_scale_([torch.zeros(())], [torch.zeros(3)], [torch.zeros(4)], [lr], [1.0])
