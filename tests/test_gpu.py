"""I7 and capture: the CUDA kernels against the CPU kernels, bit for bit, for the same operands."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from gpu_helpers import NEEDS_GPU, assert_same, on_both, state_and_counts
from helpers import DEVICES
from pulse_cases import PULSES
from torch import nn

from lightning_lrtt import LRTT, LRTTConfig, PulseConfig, convert_to_lrtt, devices, presets
from lightning_lrtt.nn import LRTTConv2d, LRTTLinear, find_tiles
from lightning_lrtt.ops import COUNTS

pytestmark = NEEDS_GPU

SHAPES = {"tiny": (3, 2, 1), "wide": (20, 70, 5), "tall": (300, 33, 8), "square": (65, 64, 6)}


@pytest.mark.parametrize(
    "pulse",
    [
        PulseConfig(),
        PulseConfig(desired_bl=7, update_management=False),
        PulseConfig(desired_bl=3, update_bl_management=False),
    ],
    ids=["default", "bl7", "bl3"],
)
@pytest.mark.parametrize("scale", [1e-3, 0.3], ids=["light", "heavy"])
@pytest.mark.parametrize("samples", [1, 300, 700])
@pytest.mark.parametrize("device", DEVICES)
def test_pulsed_update_bits(device, samples, scale, pulse):
    """A pulsed update of a wide and a tall array gives the same weights and counts on both devices."""
    config = LRTTConfig(
        rank=1, reinit_gain=1.0, fast_device=DEVICES[device], visible_device=DEVICES[device], pulse=pulse
    )
    for array, (rows, columns) in enumerate([(90, 5), (6, 130), (40, 70)]):
        generator = torch.Generator().manual_seed(rows + samples)
        w = 0.1 * torch.randn(rows, columns, generator=generator)
        x = torch.randn(samples, columns, generator=generator)
        d = scale * torch.randn(samples, rows, generator=generator)
        if samples > 1:
            x[0] = 0.0
        hyper = config.pack(columns)
        state, counts = state_and_counts()

        def run(w, counts, x, d, eta, state, hyper=hyper, array=array):
            torch.ops.lrtt.pulsed_update_([w], [x], [d], [eta], [state], [counts], [hyper], [array], [0])

        results = on_both(run, w, counts, x, d, torch.tensor(0.05), state)
        if samples > 1:
            assert results[0][1][array] > 0, "no pulses: the test would compare nothing"
        assert_same(results, ("w", "counts", "x", "d", "eta", "state"))


@pytest.mark.parametrize("case", PULSES)
@pytest.mark.parametrize("device", ["ideal", "soft", "exp"])
def test_pulse_type_bits(case, device):
    """Every pulse type, length and grid: several blocks, both orientations, rows shorter and longer than a warp."""
    samples = 1100 if PULSES[case].longest <= 100 else 70
    for array, (rows, columns) in enumerate([(90, 5), (6, 130), (40, 70)]):
        config = LRTTConfig(
            rank=1, reinit_gain=1.0, fast_device=DEVICES[device], visible_device=DEVICES[device], pulse=PULSES[case]
        )
        generator = torch.Generator().manual_seed(rows)
        w = 0.1 * torch.randn(rows, columns, generator=generator)
        x, d = (torch.randn(samples, n, generator=generator) for n in (columns, rows))
        x[3] = 0.0
        d[5, 1] = float("nan")
        state, counts = state_and_counts()
        hyper = config.pack(columns)

        def run(w, counts, x, d, eta, state, hyper=hyper, array=array):
            torch.ops.lrtt.pulsed_update_([w], [x], [d], [eta], [state], [counts], [hyper], [array], [1024])

        results = on_both(run, w, counts, x, d.nan_to_num(0.3) if array else d, torch.tensor(-0.03), state)
        assert results[0][1][array] > 0, "no pulses: the test would compare nothing"
        for index, name in ((0, "w"), (1, "counts")):
            assert torch.equal(results[0][index], results[1][index]), name


@pytest.mark.parametrize("case", ["stochastic_100", "grid_random", "mean_count", "mean_count_long", "implicit_random"])
@pytest.mark.parametrize(
    "device",
    [devices.SoftBounds(write_noise_std=3.0), devices.OneSided(device=devices.SoftBounds())],
    ids=["noisy", "pair"],
)
def test_pulse_type_bits_on_cells_that_hold_more(device, case):
    """Write noise and pairs under long and counted trains."""
    for rows, columns in [(90, 5), (6, 130)]:
        hyper = LRTTConfig(rank=1, reinit_gain=1.0, visible_device=device, pulse=PULSES[case]).pack(columns)
        generator = torch.Generator().manual_seed(rows)
        x, d = (torch.randn(150, n, generator=generator) for n in (columns, rows))
        cells = 0.2 * torch.rand(device.planes, rows, columns, generator=generator)
        state, counts = state_and_counts()

        def run(w, counts, cells, x, d, eta, state, hyper=hyper):
            torch.ops.lrtt.pulsed_update_([w], [x], [d], [eta], [state], [counts], [hyper], [2], [0], [cells])

        results = on_both(run, torch.zeros(rows, columns), counts, cells, x, d, torch.tensor(-0.01), state)
        assert results[0][1][2] > 0, "no pulses: the test would compare nothing"
        assert_same(results, ("w", "counts", "cells", "x", "d", "eta", "state"))


@pytest.mark.parametrize("mode", ["pulsed", "pulsed_residual"])
@pytest.mark.parametrize("case", [name for name, p in PULSES.items() if p.fixed_bl and p.um_grad_scale == 1.0])
def test_transfer_pulse_type_bits(case, mode):
    """Transfers by every pulse type; the counters too."""
    if mode == "pulsed_residual" and not PULSES[case].update_management:
        pytest.skip("pulsed_residual needs update_management")
    for d, k, r in SHAPES.values():
        config = LRTTConfig(
            rank=r,
            transfer_every=1,
            reinit_gain=1.0,
            visible_device=devices.SoftBounds(),
            transfer_mode=mode,
            transfer_pulse=PULSES[case],
            transfer_max_words=90,
        )
        generator = torch.Generator().manual_seed(d)
        a, b, c = (torch.randn(*shape, generator=generator) for shape in ((d, r), (r, k), (d, k)))
        state, counts = state_and_counts()
        packed = config.pack(k)

        def run(a, b, c, state, counts, hyper=packed):
            torch.ops.lrtt.transfer_([a], [b], [c], [state], [counts], [hyper], [1], False)

        results = on_both(run, a, b, 0.1 * c, state, counts)
        assert results[0][4][COUNTS["pulses_c"]] > 0
        assert_same(results, ("A", "B", "C", "state", "counts"))


def test_pulse_types_side_by_side():
    """One call with tiles of every form: each gets what it gets alone."""
    generator = torch.Generator().manual_seed(0)
    hypers = [
        LRTTConfig(rank=1, reinit_gain=1.0, fast_device=devices.SoftBounds(), pulse=p).pack(9) for p in PULSES.values()
    ]
    n = len(hypers)
    x, d = ([torch.randn(40, m, generator=generator) for _ in range(n)] for m in (9, 33))

    def run(*w):
        where = w[0].device
        rows = [pair for pair in (state_and_counts(key=i) for i in range(n))]
        torch.ops.lrtt.pulsed_update_(
            list(w),
            [t.to(where) for t in x],
            [t.to(where) for t in d],
            [torch.tensor(0.05, device=where)] * n,
            [s.to(where) for s, _ in rows],
            [c.to(where) for _, c in rows],
            hypers,
            [0] * n,
            [0] * n,
        )

    assert_same(on_both(run, *(torch.zeros(33, 9) for _ in range(n))), list(PULSES))


@pytest.mark.parametrize(("case", "columns"), [("default", 9000), ("stochastic_100", 9000), ("mean_count", 18000)])
def test_rounds_of_jobs_of_different_length(case, columns):
    """The streams of the long job take several rounds, in which a short job of the same call has nothing left to do."""
    pulse = PULSES.get(case, PulseConfig())
    generator = torch.Generator().manual_seed(0)
    shapes = [(33, 9, 40), (4, columns, 1100)]
    hypers = [
        LRTTConfig(rank=1, reinit_gain=1.0, fast_device=devices.SoftBounds(), pulse=pulse).pack(n) for _, n, _ in shapes
    ]
    x = [torch.randn(samples, n, generator=generator) for _, n, samples in shapes]
    d = [torch.randn(samples, m, generator=generator) for m, _, samples in shapes]

    def run(*w):
        where = w[0].device
        rows = [state_and_counts(key=i) for i in range(2)]
        if where.type == "cuda":  # scratch memory that was never written must not be taken for block numbers
            torch.cuda.empty_cache()
            torch.arange(2**26, dtype=torch.int32, device=where)
        torch.ops.lrtt.pulsed_update_(
            list(w),
            [t.to(where) for t in x],
            [t.to(where) for t in d],
            [torch.tensor(0.02, device=where)] * 2,
            [s.to(where) for s, _ in rows],
            [c.to(where) for _, c in rows],
            hypers,
            [0] * 2,
            [0] * 2,
        )

    results = on_both(run, *(torch.zeros(m, n) for m, n, _ in shapes))
    assert all(w.any() for w in results[0]), "no pulses: the test would compare nothing"
    assert_same(results, ("short", "long"))


def test_pulsed_update_bits_nonfinite_and_negative_rate():
    """Samples with NaN or infinity are skipped and counted alike; a negative rate flips the direction alike."""
    config = LRTTConfig(rank=1, reinit_gain=1.0, fast_device=devices.SoftBounds())
    x, d = torch.randn(40, 9), torch.randn(40, 30)
    x[3, 2], d[5, 7] = float("nan"), float("inf")
    state, counts = state_and_counts()

    def run(w, counts, x, d, eta, state):
        torch.ops.lrtt.pulsed_update_([w], [x], [d], [eta], [state], [counts], [config.pack(9)], [0], [0])

    results = on_both(run, torch.zeros(30, 9), counts, x, d, torch.tensor(-0.1), state)
    assert results[0][1][COUNTS["nonfinite"]] == 2
    for index in (0, 1):
        assert torch.equal(results[0][index], results[1][index])


TRANSFERS = {
    "digital": {},
    "digital-bounded": {"visible_device": devices.SoftBounds(), "transfer_mode": "digital"},
    "pulsed": {"visible_device": devices.SoftBounds()},
    "pulsed-fast": {
        "visible_device": devices.LinearStep(gamma_up=0.2),
        "fast_device": devices.SoftBounds(corrupt_devices_prob=0.1),
    },
    "pulsed-capped": {"visible_device": devices.Ideal(), "transfer_max_words": 2},
    "residual": {
        "visible_device": devices.SoftBounds(),
        "transfer_mode": "pulsed_residual",
        "transfer_max_words": 2,
        "fast_device": devices.SoftBounds(),
    },
    "uniform": {"reinit": "uniform"},
    "orthogonal": {"reinit": "orthogonal", "fast_device": devices.ConstantStep(), "reinit_gain": 0.5},
}


DIGITAL = [kind for kind, options in TRANSFERS.items() if not any("device" in name for name in options)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in TRANSFERS), *((kind, torch.float64) for kind in DIGITAL)]
)
def test_transfer_bits(kind, dtype, shape):
    """Steps through two cycles: transfer, reinit, counters and clip counts agree, whether due or not."""
    options = TRANSFERS[kind]
    d, k, r = SHAPES[shape]
    config = LRTTConfig(**{"rank": r, "transfer_every": 2, "reinit_gain": 1.0, **options})
    generator = torch.Generator().manual_seed(d)
    a = torch.randn(d, r, generator=generator, dtype=dtype)
    b = torch.randn(r, k, generator=generator, dtype=dtype)
    c = 0.1 * torch.randn(d, k, generator=generator, dtype=dtype)
    state, counts = state_and_counts()

    def run(a, b, c, state, counts):
        torch.ops.lrtt.reinit_([a.clone()], [b.clone()], [state], [config.pack(k)])
        for step in range(5):
            if step % 2:
                a.add_(0.7)
            torch.ops.lrtt.transfer_([a], [b], [c], [state], [counts], [config.pack(k)], [1], step == 4)

    results = on_both(run, a, b, c, state, counts)
    assert results[0][4][COUNTS["transfers"]] == 3
    assert_same(results, ("A", "B", "C", "state", "counts"))


def test_many_tiles_in_one_call():
    """More tiles than one page of the job table holds, of mixed shapes and modes, in single calls."""
    configs = [
        LRTTConfig(
            rank=2,
            reinit_gain=1.0,
            fast_device=devices.SoftBounds(),
            transfer_every=1,
            visible_device=devices.SoftBounds() if i % 2 else None,
        )
        for i in range(150)
    ]
    shapes = [(5 + i % 7, 3 + i % 11) for i in range(150)]
    generator = torch.Generator().manual_seed(0)
    start = [(torch.zeros(d, 2), torch.randn(2, k, generator=generator), torch.zeros(d, k)) for d, k in shapes]
    operands = [(torch.randn(4, 2, generator=generator), torch.randn(4, d, generator=generator)) for d, _ in shapes]
    finals = []
    for target in ("cpu", "cuda"):
        a, b, c = ([t[i].clone().to(target) for t in start] for i in range(3))
        xs, ds = ([t[i].to(target) for t in operands] for i in range(2))
        pairs = [state_and_counts(key=i) for i in range(150)]
        states, counts = [p[0].to(target) for p in pairs], [p[1].to(target) for p in pairs]
        hyper = [cfg.pack(k) for cfg, (_, k) in zip(configs, shapes, strict=True)]
        eta = [torch.tensor(0.05, device=target)] * 150
        torch.ops.lrtt.pulsed_update_(a, xs, ds, eta, states, counts, hyper, [0] * 150, [0] * 150)
        torch.ops.lrtt.transfer_(a, b, c, states, counts, hyper, [1] * 150, False)
        finals.append([t.cpu() for t in (*a, *b, *c, *states, *counts)])
    for cpu, gpu in zip(*finals, strict=True):
        assert torch.equal(cpu, gpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_digital_update_and_pulse_scale_bits(dtype):
    """Digital descent (with one array skipped for a NaN) and the pulse rate agree."""
    w, g = torch.randn(300, 77, dtype=dtype), torch.randn(300, 77, dtype=dtype)
    bad = g.clone()
    bad[200, 3] = float("inf")
    state, counts = state_and_counts()

    def run(w, other, g, bad, lr, state, counts):
        torch.ops.lrtt.digital_update_([w, other], [g, bad], [lr, lr], [state, state], [counts, counts], [1.0, 0.3])

    results = on_both(run, w, w.clone(), g, bad, torch.tensor(0.1, dtype=torch.float64), state, counts)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], w)
    assert torch.equal(results[0][6], results[1][6]) and results[0][6][COUNTS["nonfinite"]] == 1

    def scale(eta, g, first, lr):
        torch.ops.lrtt.pulse_scale_([eta], [g], [first], [lr], [2.0])

    first = torch.randn(300, 77)
    results = on_both(scale, torch.zeros(()), 0.3 * first + 1e-3, first, torch.tensor(0.1, dtype=torch.float64))
    assert torch.equal(results[0][0], results[1][0]) and results[0][0] != 0


@pytest.mark.parametrize("device", DEVICES)
def test_drawn_cells_and_clip_bits(device):
    """Device-to-device draws and clipping agree."""
    config = LRTTConfig(rank=1, reinit_gain=1.0, fast_device=DEVICES[device])
    state, _ = state_and_counts()
    cpu = torch.ops.lrtt.draw_cells(state, config.pack(9), 1, 37, 53)
    gpu = torch.ops.lrtt.draw_cells(state.cuda(), config.pack(9), 1, 37, 53).cpu()
    assert torch.equal(cpu, gpu)

    def clip(w, count, state):
        count += torch.ops.lrtt.clip_(w, state, config.pack(9), 1, True)

    results = on_both(clip, torch.randn(37, 53), torch.zeros((), dtype=torch.int64), state)
    assert_same(results, ("w", "count", "state"))


def test_relax_bits():
    """Decay and diffusion agree."""
    leaky = {"lifetime": 10.0, "lifetime_dtod": 0.3, "reset_dtod": 0.1, "diffusion": 0.01, "diffusion_dtod": 0.3}
    hyper = LRTTConfig(rank=2, fast_device=devices.ExpStep(**leaky), visible_device=devices.SoftBounds(**leaky)).pack(
        53
    )
    state, _ = state_and_counts()

    def relax(a, c, state):
        torch.ops.lrtt.relax_([a, c], [state, state], [hyper, hyper], [0, 2])

    results = on_both(relax, torch.randn(37, 2), torch.randn(37, 53), state)
    assert_same(results, ("A", "C", "state"))


HELD = {
    "noisy": devices.SoftBounds(
        dw_min=0.01, write_noise_std=3.0, corrupt_devices_prob=0.1, lifetime=9.0, diffusion=0.01
    ),
    "noisy-exp": presets.device("reram_es"),
    "noisy-array": presets.device("reram_array_om"),
    "pair": devices.OneSided(
        device=devices.LinearStep(dw_min=0.01, gamma_up=0.4, lifetime=9.0),
        refresh_every=1,
        refresh_upper_thres=0.3,
        refresh_lower_thres=0.1,
    ),
    "pair-exp": devices.OneSided(device=devices.ExpStep(dw_min=0.005)),
}


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        (None, torch.float32),
        (None, torch.float64),
        (devices.SoftBounds(), torch.float32),
        (HELD["noisy"], torch.float32),
        (HELD["pair"], torch.float32),
    ],
    ids=["float32", "float64", "bounded", "noisy", "pair"],
)
@pytest.mark.parametrize(("d", "k", "r"), [(150, 530, 37), (1, 300, 1), (64, 256, 16), (257, 5, 5)])
def test_digital_transfer_bits(device, dtype, d, k, r):
    """C in several rectangles of a thread block, ranks below and above what lies in shared memory together."""
    config = LRTTConfig(rank=r, reinit_gain=1.0, visible_device=device, transfer_mode="digital")
    layer = LRTTLinear(k, d, bias=False, config=config, dtype=dtype, tile=0)
    torch.nn.init.normal_(layer.A, std=0.05)
    twin = copy.deepcopy(layer).cuda()
    results = []
    for tile in (layer, twin):
        for _ in range(2):
            tile.flush()
            tile.A.detach().copy_(tile.B.detach()[:, :1].t().expand(d, r) * 0.1)
        results.append(
            [t.cpu() for t in (tile.matrix, *tile.factors(), tile.tile_state, tile.tile_counts, *tile.cells(2))]
        )
    assert_same(results, ("C", "A", "B", "state", "counts", "cells")[: len(results[0])])
    assert bool((results[0][0] != 0).any())


@pytest.mark.parametrize("device", HELD)
@pytest.mark.parametrize("shape", [(90, 5), (6, 130), (40, 70)], ids=str)
def test_cells_bits(device, shape):
    """Write noise and pairs: an update across a block of samples, relaxation, reset, writing."""
    model, (rows, columns) = HELD[device], shape
    hyper = LRTTConfig(rank=1, reinit_gain=1.0, visible_device=model).pack(columns)
    generator = torch.Generator().manual_seed(rows)
    w, x = (0.3 * torch.randn(n, columns, generator=generator) for n in (rows, 700))
    d = 0.1 * torch.randn(700, rows, generator=generator)
    x *= torch.rand(700, columns, generator=generator) > 0.98  # so that the last block leaves many cells alone
    cells = 0.3 * torch.randn(model.planes, rows, columns, generator=generator).abs()
    state, counts = state_and_counts()

    def run(w, cells, counts, x, d, eta, state):
        torch.ops.lrtt.pulsed_update_([w], [x], [d], [eta], [state], [counts], [hyper], [2], [0], [cells])
        torch.ops.lrtt.relax_([w], [state], [hyper], [2], [cells])
        counts += torch.ops.lrtt.clip_(w, state, hyper, 2, False, [cells])
        torch.ops.lrtt.reset_cells_(w, state, hyper, 2, 1, columns // 2, 0.7, 3, [cells])
        half = w.clone(), cells.clone()
        counts += torch.ops.lrtt.clip_(w, state, hyper, 2, True, [cells])
        w += half[0]
        cells += half[1]

    results = on_both(run, w, cells, counts, x, d, torch.tensor(0.05), state)
    assert results[0][2][COUNTS["pulses_c"]] > 0, "no pulses: the test would compare nothing"
    assert_same(results, ("w", "cells", "counts", "x", "d", "eta", "state"))


@pytest.mark.parametrize("mode", ["digital", "pulsed", "pulsed_residual"])
@pytest.mark.parametrize("fast", HELD)
@pytest.mark.parametrize("visible", HELD)
def test_transfer_of_cells_bits(visible, fast, mode):
    """Reinit and two transfers, plain tiles in the same launch."""
    held = LRTTConfig(
        rank=3,
        transfer_every=1,
        reinit_gain=1.0,
        visible_device=HELD[visible],
        fast_device=HELD[fast],
        transfer_mode=mode,
        transfer_max_words=2,
    )
    plain = dataclasses.replace(held, visible_device=devices.SoftBounds(), fast_device=None)
    generator = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(*size, generator=generator) for size in ((20, 3), (3, 70), (20, 70)))
    cells = [
        0.3 * torch.randn(model.planes, *size, generator=generator).abs()
        for model, size in ((HELD[fast], (20, 3)), (HELD[fast], (3, 70)), (HELD[visible], (20, 70)))
    ]
    state, counts = state_and_counts()
    hyper = [held.pack(70), plain.pack(70)]

    def run(a, b, c, a2, b2, c2, state, counts, state2, counts2, *cells):
        torch.ops.lrtt.reinit_([b.new_zeros(20, 3)], [b], [state], [hyper[0]], [cells[0].clone(), cells[1]])
        for _ in range(2):
            a.add_(0.7)
            torch.ops.lrtt.transfer_(
                [a, a2], [b, b2], [c, c2], [state, state2], [counts, counts2], hyper, [1, 1], False, list(cells)
            )

    tensors = (a, b, c, a.clone(), b.clone(), c.clone(), state, counts, state.clone(), counts.clone(), *cells)
    assert_same(on_both(run, *tensors), [f"tensor {i}" for i in range(len(tensors))])


def pulsed_model() -> nn.Module:
    """A ConvNet with every layer on noisy SoftBounds."""
    soft = devices.SoftBounds()
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10))
    return convert_to_lrtt(model, LRTTConfig(rank=4, transfer_every=3, fast_device=soft, visible_device=soft))


def train(model: nn.Module, optimizer: LRTT, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    """Plain eager steps."""
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_moves_between_devices():
    """A state saved on a GPU resumes on a CPU; device draws stay (they are a function of the key)."""
    torch.manual_seed(0)
    model = pulsed_model().cuda()
    optimizer = LRTT(model.parameters(), lr=0.05)
    x, y = torch.rand(64, 1, 8, 8, device="cuda"), torch.randint(10, (64,), device="cuda")
    losses = train(model, optimizer, [(x, y)] * 40)
    assert losses[-1] < losses[0]
    assert optimizer.tiles()[0][0].counts()["transfers"] == 13
    twin = pulsed_model()
    twin.load_state_dict(model.cpu().state_dict())
    for mine, theirs in zip(find_tiles(model).values(), find_tiles(twin).values(), strict=True):
        assert torch.equal(mine.effective_weight(), theirs.effective_weight())
        assert torch.equal(mine.tile_state, theirs.tile_state)
    assert train(twin, LRTT(twin.parameters(), lr=0.05), [(x.cpu(), y.cpu())])[0] < losses[0]


@pytest.mark.parametrize(
    "fast", [None, devices.SoftBounds(), HELD["noisy"], HELD["pair"]], ids=["digital", "pulsed", "noisy", "pair"]
)
def test_captured_step_equals_eager(fast):
    """A whole step in a CUDA graph, transfers included, gives the bits of eager steps, without a host synchronisation."""
    config = LRTTConfig(rank=4, transfer_every=3, fast_device=fast, visible_device=fast)
    finals = []
    for captured in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(LRTTLinear(32, 48, config=config), nn.Tanh(), LRTTLinear(48, 10, config=config)).cuda()
        optimizer = LRTT(model.parameters(), lr=0.1)
        batches = [torch.randn(16, 32, generator=torch.Generator().manual_seed(i)).cuda() for i in range(12)]
        static = batches[0].clone()

        def step(model=model, optimizer=optimizer, static=static):
            optimizer.zero_grad()
            model(static).square().mean().backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for batch in batches[:3]:
                static.copy_(batch)
                step()
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches[3:]:
                static.copy_(batch)
                graph.replay() if captured else step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        finals.append({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    for name, eager in finals[0].items():
        assert torch.equal(eager, finals[1][name]), name
    assert finals[0]["0.tile_counts"][COUNTS["transfers"]] == 4


def test_conv_chunks_do_not_change_bits(monkeypatch):
    """The unfolded chunk size of a pulsed convolution is not part of the numbers."""
    from lightning_lrtt.nn import conv

    config = LRTTConfig(rank=3, fast_device=devices.SoftBounds())
    finals = []
    for chunk in (2**22, 512 * 18):
        monkeypatch.setattr(conv, "_CHUNK_ELEMENTS", chunk)
        torch.manual_seed(2)
        layer = LRTTConv2d(2, 5, 3, config=dataclasses.replace(config, seed=3)).cuda()
        optimizer = LRTT(layer.parameters(), lr=0.1)
        layer(torch.randn(40, 2, 8, 8, generator=torch.Generator().manual_seed(0)).cuda()).square().sum().backward()
        optimizer.step()
        finals.append(layer.B.detach().cpu())
    assert torch.equal(*finals)


def test_strategy_uses_the_gpu():
    """``Trainer(strategy='lrtt', accelerator='gpu')`` trains on the GPU, bf16-mixed too."""
    import lightning.pytorch as pl
    from lightning.pytorch.demos.boring_classes import BoringModel

    for precision in ("32-true", "bf16-mixed"):
        model = BoringModel()
        trainer = pl.Trainer(
            strategy="lrtt",
            accelerator="gpu",
            devices=1,
            fast_dev_run=3,
            precision=precision,
            enable_progress_bar=False,
        )
        trainer.strategy.config = LRTTConfig(rank=2, reinit_gain=1.0, fast_device=devices.SoftBounds())
        trainer.fit(model)
        (tile,) = find_tiles(model).values()
        assert tile.counts()["pulses_a"] > 0
