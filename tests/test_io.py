"""Converters of analog reads: the kernels against the plain PyTorch reference, and both against closed forms."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers import fresh_state, randn, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lrtt import IOConfig, LRTTConfig
from lightning_lrtt.ops import io_kernels, reference_io

OPS = torch.ops.lrtt
PERFECT = {"inp_res": 0.0, "out_res": 0.0, "out_noise": 0.0, "out_bound": 0.0, "bound_management": "none"}
CONFIGS = {
    "default": IOConfig(),
    "worst_case": IOConfig(bound_management="iterative_worst_case", out_bound=2.0),
    "bits": IOConfig(inp_bits=4, out_bits=5, out_bound=3.0),
    "noisy": IOConfig(inp_noise=0.1, w_noise=0.05, out_bound=3.0),
    "stochastic": IOConfig(inp_sto_round=True, out_sto_round=True, out_bound=3.0),
    "all": IOConfig(inp_sto_round=True, out_sto_round=True, inp_noise=0.1, w_noise=0.05, nm_thres=1.5, out_bound=2.0),
    "unmanaged": IOConfig(noise_management="none", inp_bound=2.0, bound_management="none"),
    "constant": IOConfig(noise_management="constant", nm_thres=3.0),
    "continuous": IOConfig(inp_res=0.0, out_res=0.0, w_noise=0.1, inp_noise=0.1),
    "quiet": IOConfig(out_noise=0.0, out_bound=1.0),
}


def ticket(number: int = 6) -> torch.Tensor:
    """The number of a read."""
    return torch.tensor(number)


def operand(x, io, round=0, first=0, number=6, array=2, seed=0, pending=None):
    """`io_input` of the kernels: (operand in steps, alpha and sigma)."""
    return OPS.io_input(x, ticket(number), fresh_state(seed), io.pack(), array, round, first, pending, torch.float32)


def read(x, w, io, number=6, array=2, seed=0, first=0, backward=False):
    """A whole read by the kernels, as `lightning_lrtt.nn` does it."""
    packed, state = io.pack(backward), fresh_state(seed)
    y, pending = torch.zeros(x.shape[0], w.shape[0]), None
    for round in range(1 + (0 if backward else io.bm_rounds)):
        u, per = OPS.io_input(x, ticket(number), state, packed, array, round, first, pending, torch.float32)
        pending = OPS.io_output_(y, u @ w.t(), per, ticket(number), state, packed, array, round, first, pending)
    return y


# ------------------------------------------------------------------ kernels and reference


def compare(x, acc, io, round, first, pending):
    """Both halves by both; returns what the kernels gave."""
    state, packed = fresh_state(3), io.pack()
    found = []
    for ops in (OPS, reference_io):
        u, per = ops.io_input(x, ticket(), state, packed, 1, round, first, pending, torch.float32)
        y = torch.full_like(acc, 7.0)
        clipped = ops.io_output_(y, acc, per, ticket(), state, packed, 1, round, first, pending)
        found.append((u, per, y, clipped))
    for name, a, b in zip(("operand", "per", "y", "clipped"), *found, strict=True):
        # Only which NaN comes out of an operation with NaN is the processor's choice.
        a, b = (
            t.nan_to_num(nan=-77.0, posinf=math.inf, neginf=-math.inf) if t.is_floating_point() else t for t in (a, b)
        )
        assert same_bits(a, b), f"{name}: {(a != b).sum()} of {a.numel()} differ"
    return found[0]


@pytest.mark.parametrize("round", [0, 1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (4, 64), (2, 200)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_equal_reference(name, shape, round):
    """Every option, on widths around the 64 elements of a group and the 128 lanes of a sum; one sample is fine."""
    x, acc = randn(1, *shape), 50.0 * randn(2, *shape)
    x[-1] *= 1e-3
    pending = torch.ones(shape[0], dtype=torch.int32) if round else None
    if round and shape[0] > 1:
        pending[0] = 0
    y = compare(x, acc, CONFIGS[name], round, 5, pending)[2]
    if round and shape[0] > 1:
        assert (y[0] == 7.0).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 3),
    k=st.integers(1, 150),
    round=st.integers(0, 4),
    name=st.sampled_from(sorted(CONFIGS)),
    log=st.integers(-44, 37),
    first=st.integers(0, 2**26 - 3),
    seed=st.integers(0, 2**31),
    special=st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan]),
)
def test_kernels_equal_reference_anywhere(n, k, round, name, log, first, seed, special):
    """Scales from denormals to overflow, zeros, infinities and NaN."""
    x, acc = randn(seed, n, k) * 10.0**log, randn(seed + 1, n, k) * 10.0**log
    x[0, -1], acc[-1, 0] = special, special
    compare(x, acc, CONFIGS[name], round, first, None)


@pytest.mark.parametrize("name", ["all", "worst_case"])
def test_threads_and_chunks_are_not_part_of_the_numbers(name):
    """One call on one thread, on three, and two calls that split the samples."""
    x, w = randn(1, 300, 90), randn(2, 80, 90)
    finals = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            u, per = operand(x, CONFIGS[name], round=1)
            y = torch.empty(300, 80)
            flags = OPS.io_output_(
                y, 0.1 * u @ w.t(), per, ticket(), fresh_state(), CONFIGS[name].pack(), 2, 1, 0, None
            )
        finally:
            torch.set_num_threads(1)
        finals.append((u, per, y, flags))
    assert all(map(same_bits, *finals))
    halves = [operand(part, CONFIGS[name], round=1, first=first)[0] for first, part in ((0, x[:130]), (130, x[130:]))]
    assert same_bits(torch.cat(halves), finals[0][0])


@pytest.mark.parametrize("kind", ["rows_apart", "transposed", "bfloat16", "float16", "float64"])
def test_input_takes_any_strides_and_float_dtypes(kind):
    x = {
        "rows_apart": lambda: randn(1, 6, 40)[:, :30],
        "transposed": lambda: randn(1, 30, 6).t(),
        "bfloat16": lambda: randn(1, 6, 30).bfloat16(),
        "float16": lambda: randn(1, 6, 30).half(),
        "float64": lambda: randn(1, 6, 30).double(),
    }[kind]()
    mine, plain = operand(x, CONFIGS["all"]), operand(x.float().contiguous(), CONFIGS["all"])
    assert all(map(same_bits, mine, plain))


# ------------------------------------------------------------------ closed forms


def test_input_levels():
    """4 bits: 14 steps of 1/7 over [-1, 1], ties to even, of the sample's largest input."""
    x = torch.tensor([[2.0, 1.0, 0.1, -0.15, 1 / 7, 3 / 7, -2.0]])
    u, per = operand(x, IOConfig(inp_bits=4))
    assert per[0, 0] == 2.0
    assert u.tolist() == [[7.0, 4.0, 0.0, -1.0, 0.0, 2.0, -7.0]]  # 3.5 -> 4, 0.35 -> 0, 0.525 -> 1, 0.5 -> 0, 1.5 -> 2


@pytest.mark.parametrize("bits", [2, 3, 7, 9])
def test_bits_are_resolutions(bits):
    assert torch.equal(
        IOConfig(inp_bits=bits, out_bits=bits).pack(),
        IOConfig(inp_res=1 / (2**bits - 2), out_res=1 / (2**bits - 2)).pack(),
    )
    x = torch.linspace(-1, 1, 5001)[None]
    assert len(operand(x, IOConfig(inp_bits=bits))[0].unique()) == 2**bits - 1


def test_defaults_are_seven_and_nine_bits():
    assert torch.equal(IOConfig().pack(), IOConfig(inp_bits=7, out_bits=9).pack())


def test_output_levels_and_clipping():
    """Steps of 24/510; beyond 12 the bound; scaled back by the sample's largest input."""
    io = IOConfig(out_noise=0.0, bound_management="none")
    w = torch.tensor([[0.03], [1.0], [13.0], [-40.0]])
    y = read(torch.tensor([[0.5], [2.0]]), w, io)
    step = 24 / 510
    expected = torch.tensor([round(0.03 / step) * step, round(1.0 / step) * step, 12.0, -12.0])
    torch.testing.assert_close(
        y, torch.stack([0.5 * expected, 2.0 * expected]), rtol=3e-7, atol=0
    )  # a few float32 roundings


def test_zero_input_gives_zero_output_under_abs_max():
    """Whatever the noise; without noise management there is noise."""
    x, w = torch.zeros(2, 5), randn(1, 3, 5)
    assert read(x, w, CONFIGS["all"]).count_nonzero() == 0
    assert read(x, w, dataclasses.replace(CONFIGS["unmanaged"], out_res=0.0)).count_nonzero() == 6


def test_a_chain_without_limits_is_the_product():
    x, w = randn(1, 9, 40), randn(2, 20, 40)
    torch.testing.assert_close(read(x, w, IOConfig(**PERFECT)), x @ w.t(), rtol=1e-5, atol=1e-5)


def moments(samples, mean, variance, what):
    """Mean and variance within 5 standard errors: of the mean sqrt(v / n), of a normal's variance v sqrt(2 / n)."""
    n = samples.numel()
    assert abs(samples.mean() - mean) < 5 * math.sqrt(variance / n), f"{what}: mean"
    assert abs(samples.var() - variance) < 5 * variance * math.sqrt(2 / n), f"{what}: variance"


def test_noise_has_the_variance_of_the_formula():
    """v = alpha^2 (inp_noise^2 |w|^2 + out_noise^2 + w_noise^2 E|u|^2), u = x / alpha + inp_noise xi."""
    k, n = 50, 40_000
    x, w = randn(1, 1, k), 0.3 * randn(2, 1, k)
    alpha = float(x.abs().max())
    square = float((x / alpha).square().sum())
    for inp, out, weight in ((0.1, 0.0, 0.0), (0.0, 0.06, 0.0), (0.0, 0.0, 0.02), (0.1, 0.06, 0.02)):
        io = IOConfig(**PERFECT | {"inp_noise": inp, "out_noise": out, "w_noise": weight})
        y = read(x.expand(n, k), w, io).double()
        variance = alpha**2 * (inp**2 * float(w.square().sum()) + out**2 + weight**2 * (square + k * inp**2))
        moments(y, float(x @ w.t()), variance, f"{inp}, {out}, {weight}")


def test_noise_of_samples_elements_reads_arrays_and_rounds_is_independent():
    """Words that two of them shared would correlate them fully; 5 standard errors of a correlation of n pairs."""
    io = IOConfig(**PERFECT | {"out_noise": 1.0})
    x, acc = torch.ones(200, 4), torch.zeros(200, 100)

    def noise(number=6, array=2, round=0, seed=0, first=0):
        _, per = operand(x, io)
        y = torch.empty_like(acc)
        OPS.io_output_(y, acc, per, ticket(number), fresh_state(seed), io.pack(), array, round, first, None)
        return y

    base = noise()
    moments(base.double(), 0.0, 1.0, "noise")
    others = [
        noise(number=7),
        noise(array=1),
        noise(round=1),
        noise(seed=1),
        noise(first=200),
        base.roll(1, 0),
        base.roll(1, 1),
    ]
    limit = 5 / math.sqrt(base.numel())
    assert all(abs(torch.corrcoef(torch.stack([base.flatten(), o.flatten()]))[0, 1]) < limit for o in others)
    assert same_bits(noise(first=100)[:100], base[100:]), "the words belong to the sample, not to its place in the call"


def test_stochastic_rounding_is_right_on_average():
    """A value at 0.3 of a step is rounded up 3 times of 10: variance p (1 - p) of a step."""
    io = IOConfig(inp_bits=4, inp_sto_round=True)
    x = torch.full((40_000, 2), 2.3 / 7)
    x[:, 0] = 1.0
    u, _ = operand(x, io)
    assert u[:, 1].unique().tolist() == [2.0, 3.0]
    assert abs(u[:, 1].mean() - 2.3) < 5 * math.sqrt(0.21 / 40_000)


# ------------------------------------------------------------------ bound management


@pytest.mark.parametrize("kind", ["iterative", "iterative_worst_case"])
def test_bound_management_reads_what_would_clip(kind):
    """Outputs of 30 and 200 with a bound of 12: right to the converters' steps; without management they are 12."""
    io = IOConfig(out_noise=0.0, bound_management=kind, inp_bits=9, out_bits=12)
    w = torch.full((1, 200), 0.5)
    x = torch.zeros(3, 200)
    x[0, :60], x[1], x[2, :3] = 1.0, 2.0, 1.0
    exact = (x @ w.t()).flatten()
    assert exact.tolist() == [30.0, 200.0, 1.5]
    y = read(x, w, io).flatten()
    # Scaled by alpha 2^n <= 32: half an output step of 24 / 4094; inputs are whole steps or off by half of 2 / 510.
    error = torch.tensor([4, 2 * 16, 1]) * 0.5 * 24 / 4094 + 0.5 * x.abs().sum(1) / 510 * torch.tensor([4, 16, 0])
    assert ((y - exact).abs() <= error).all(), (y - exact, error)
    assert read(x, w, dataclasses.replace(io, bound_management="none")).flatten()[:2].tolist() == [12.0, 24.0]
    assert read(x, w, io, backward=True).flatten()[:2].tolist() == [12.0, 24.0]


def test_worst_case_takes_the_scale_of_the_sums():
    """Round 1: max(alpha, 0.6 max(sum of positives, of negatives) / 12), at most alpha 0.25 126 / 2; then doubled."""
    io = IOConfig(bound_management="iterative_worst_case")
    x = torch.cat(
        [torch.full((1, 300), 2.0), torch.full((1, 300), -1.0), torch.full((1, 300), 0.5), torch.full((1, 300), 1.0)]
    )
    x[2, 1:] = 0.001
    x = torch.cat([x, torch.ones(1, 300)], dim=0)
    scales = [operand(x, io, round=r)[1][0] for r in range(3)]
    wide = torch.full((1, 9000), 1.0)
    assert scales[0].tolist() == [2.0, 1.0, 0.5, 1.0, 1.0]
    torch.testing.assert_close(scales[1], torch.tensor([30.0, 15.0, 0.5, 15.0, 15.0]), rtol=1e-6, atol=0)
    assert torch.equal(scales[2], 2.0 * scales[1])
    assert operand(wide, io, round=1)[1][0] == 15.75


def test_no_output_clips_after_the_worst_case_round():
    """Weights of at most 0.6: one repetition is enough."""
    io = IOConfig(out_noise=0.0, bound_management="iterative_worst_case", max_bm_rounds=1)
    x, w = torch.rand(20, 150), 0.6 * torch.rand(7, 150)
    y, pending = torch.zeros(20, 7), None
    flags = []
    for round in range(2):
        u, per = operand(x, io, round=round, pending=pending)
        pending = OPS.io_output_(y, u @ w.t(), per, ticket(), fresh_state(), io.pack(), 2, round, 0, pending)
        flags.append(int(pending.sum()))
    assert flags[0] > 0
    assert flags[1] == 0


def test_samples_that_do_not_clip_are_read_once():
    """Their output is that of the first round, to the bit."""
    io = dataclasses.replace(CONFIGS["all"], out_bound=1.0)
    x, w = randn(1, 40, 60), 0.3 * randn(2, 9, 60)
    x[::2] *= torch.tensor([1.0] + [0.01] * 59)  # small products
    once = read(x, w, dataclasses.replace(io, bound_management="none"))
    managed = read(x, w, io)
    _, per = operand(x, io)
    fine = once.abs().amax(1) < 0.9 * per[0]
    assert 0 < fine.sum() < 40
    assert same_bits(managed[fine], once[fine])
    assert not same_bits(managed, once)


# ------------------------------------------------------------------ operators


def op_calls():
    """Arguments of each operator."""
    io, x = CONFIGS["all"].pack(), randn(1, 5, 20)
    pending = torch.tensor([1, 0, 1, 1, 0], dtype=torch.int32)
    per = randn(2, 2, 5).abs()
    return {
        "io_ticket_": (torch.tensor([4, 9]), True),
        "io_input": (x, ticket(), fresh_state(), io, 1, 1, 3, pending, torch.float32),
        "io_product": (x, randn(4, 7, 20), pending),
        "io_output_": (torch.zeros(5, 20), x, per, ticket(), fresh_state(), io, 1, 1, 3, pending),
    }


@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, name).default, op_calls()[name])


@pytest.mark.parametrize("name", op_calls())
def test_compiles_without_graph_break(name):
    op = getattr(OPS, name)
    eager, compiled = op_calls()[name], op_calls()[name]
    torch._dynamo.reset()
    expected = op(*eager)
    result = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")(*compiled)
    leaves = [torch.utils._pytree.tree_leaves(tree) for tree in ((eager, expected), (compiled, result))]
    tensors = [[t for t in flat if isinstance(t, torch.Tensor)] for flat in leaves]
    assert all(map(same_bits, *tensors))


def test_products_of_pending_samples():
    u, w, pending = op_calls()["io_product"]
    products = OPS.io_product(u, w, pending)
    torch.testing.assert_close(products, reference_io.io_product(u, w, pending), rtol=1e-5, atol=1e-5)
    assert products[pending == 0].count_nonzero() == 0


def test_tickets_count_training_and_evaluation_apart():
    reads = torch.tensor([3, 0])
    assert [int(OPS.io_ticket_(reads, evaluation)) for evaluation in (False, True, True, False)] == [6, 1, 3, 8]
    assert reads.tolist() == [5, 2]


OP_ERRORS = {
    "x_shape": ("io_input", 0, lambda: torch.zeros(5), ValueError, r"x must be \[N, k\]"),
    "ticket": ("io_input", 1, lambda: torch.zeros(()), TypeError, "ticket must be int64"),
    "state": ("io_input", 2, lambda: fresh_state()[:3], ValueError, "state must have 4"),
    "io_size": ("io_input", 3, lambda: torch.zeros(3, dtype=torch.float64), ValueError, "io must have"),
    "io_dtype": ("io_input", 3, lambda: CONFIGS["all"].pack().float(), TypeError, "io must be float64"),
    "array": ("io_input", 4, lambda: 3, ValueError, "array must be"),
    "round": ("io_input", 5, lambda: 31, ValueError, "round must be"),
    "first": ("io_input", 6, lambda: 2**26, ValueError, "first_sample must be"),
    "pending": ("io_input", 7, lambda: torch.zeros(4, dtype=torch.int32), ValueError, "pending must have 5"),
    "dtype": ("io_input", 8, lambda: torch.bfloat16, TypeError, "dtype must be float32 on the CPU"),
    "y_shape": ("io_output_", 0, lambda: torch.zeros(5, 19), ValueError, r"y and acc must be \[N, d\]"),
    "acc_dtype": ("io_output_", 1, lambda: torch.zeros(5, 20).double(), TypeError, "acc must be float32"),
    "acc_strides": ("io_output_", 1, lambda: torch.zeros(20, 5).t(), ValueError, "acc must be contiguous"),
    "per": ("io_output_", 2, lambda: torch.zeros(5), ValueError, "per must have 10"),
    "device": (
        "io_output_",
        1,
        lambda: torch.zeros(5, 20, device="meta"),
        ValueError,
        "acc must be on the tile's device",
    ),
    "product": ("io_product", 1, lambda: torch.zeros(7, 19), ValueError, "must agree"),
    "reads": ("io_ticket_", 0, lambda: torch.zeros(3, dtype=torch.int64), ValueError, "reads must have 2"),
}


@pytest.mark.parametrize("case", OP_ERRORS)
def test_operators_refuse(case):
    op, index, value, error, message = OP_ERRORS[case]
    arguments = list(op_calls()[op])
    arguments[index] = value()
    with pytest.raises(error, match=message):
        getattr(io_kernels, op)(*arguments)


# ------------------------------------------------------------------ configuration

CONFIG_ERRORS = {
    "negative_noise": ({"out_noise": -0.1}, ValueError, "out_noise must be finite and >= 0"),
    "resolution": ({"inp_res": 126}, ValueError, "for n steps write 1 / n"),
    "bits": ({"inp_bits": 1}, ValueError, "inp_bits must be between 2 and 16"),
    "bits_and_res": ({"out_bits": 8, "out_res": 0.1}, ValueError, "left alone with out_bits = 8"),
    "no_bound": ({"inp_bound": 0.0}, ValueError, "inp_bound must be positive with a resolution"),
    "inp_bound": ({"inp_bound": 0.5}, ValueError, "inp_bound must be 1 with noise_management='abs_max'"),
    "thres": ({"noise_management": "none", "nm_thres": 1.0}, ValueError, "nm_thres must be 0"),
    "worst_case": (
        {"noise_management": "none", "bound_management": "iterative_worst_case"},
        ValueError,
        "use 'iterative'",
    ),
    "worst_bound": (
        {"out_bound": 0.0, "out_res": 0.0, "bound_management": "iterative_worst_case"},
        ValueError,
        "nothing clips",
    ),
    "sto_round": ({"inp_res": 0.0, "inp_sto_round": True}, ValueError, "there is nothing to round"),
    "management": ({"noise_management": "max"}, ValueError, "noise_management must be one of"),
    "rounds": ({"max_bm_rounds": 0}, ValueError, "max_bm_rounds must be"),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS)
def test_config_refuses(case):
    numbers, error, message = CONFIG_ERRORS[case]
    with pytest.raises(error, match=message):
        IOConfig(**numbers)


def test_tile_config_refuses():
    with pytest.raises(ValueError, match="io_backward must be None with io=None"):
        LRTTConfig(io_backward=IOConfig())
    with pytest.raises(TypeError, match="io must be an IOConfig or None, got 7"):
        LRTTConfig(io=7)


def test_rounds_are_aihwkits():
    """It stops after the first factor above 0.25 / (2 / 126) = 15.75, or above 1000; worst case: one round more."""
    assert IOConfig().bm_rounds == 4
    assert IOConfig(bound_management="iterative_worst_case").bm_rounds == 5
    assert IOConfig(inp_res=0.0).bm_rounds == 10
    assert IOConfig(inp_bits=2, bound_management="iterative_worst_case").bm_rounds == 0  # 0.25 / (2 / 2) < 1
    assert IOConfig(bound_management="none").bm_rounds == 0
    assert IOConfig(max_bm_rounds=2).bm_rounds == 2
