"""What cells hold beside the weight that is read: write noise, pairs, resets. The kernels equal the plain PyTorch
reference bit for bit, and both do what the models say.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import fresh_counts, fresh_state, pack, quiet, randn, same_bits

from lightning_lrtt import devices, presets
from lightning_lrtt.ops import COUNTS, CYCLE, STEP, kernels, reference, schema

OPS = torch.ops.lrtt
A, B, C, MINUS = 0, 1, 2, schema.MINUS
DEVICES: dict[str, devices.Device] = {
    "noisy-exp": presets.device("reram_es"),
    "noisy-reference": presets.device("reram_sb"),
    "noisy-array": presets.device("reram_array_om"),
    "noisy-soft": devices.SoftBounds(
        dw_min=0.01, write_noise_std=3.0, corrupt_devices_prob=0.1, reset=0.1, reset_dtod=0.1
    ),
    "noisy-not-on-set": devices.ConstantStep(
        dw_min=0.01, write_noise_std=3.0, apply_write_noise_on_set=False, reset_std=0.2
    ),
    "noisy-leaky": devices.LinearStep(dw_min=0.01, write_noise_std=2.0, lifetime=5.0, reset=0.1, diffusion=0.01),
    "pair": devices.OneSided(
        device=devices.SoftBounds(dw_min=0.01, corrupt_devices_prob=0.1, reset=0.05, reset_dtod=0.05)
    ),
    "pair-refresh": devices.OneSided(
        device=devices.LinearStep(dw_min=0.01, gamma_up=0.4, lifetime=9.0, diffusion=0.005),
        refresh_every=2,
        refresh_upper_thres=0.3,
        refresh_lower_thres=0.1,
    ),
    "pair-exp": devices.OneSided(
        device=devices.ExpStep(dw_min=0.005),
        refresh_every=1,
        refresh_max_pulses=3,
        refresh_upper_thres=0.2,
        refresh_lower_thres=0.1,
    ),
}
SHAPES = {"square": (16, 16), "wide": (3, 70), "tall": (67, 5)}
PLAIN = devices.SoftBounds(dw_min=0.01)


def held(device, *shape, seed=3):
    """Some ``cells`` of an array; zeros leave pairs without room for a refresh, so g+ and g- are spread."""
    return [0.3 * randn(seed + i, device.planes, *shape).abs() for i in range(1) if device.planes]


def assert_same(compiled, plain):
    for i, (a, b) in enumerate(zip(compiled, plain, strict=True)):
        assert same_bits(a, b), f"argument {i}: {(a != b).sum()} of {a.numel()} elements differ"


def both(run, *tensors):
    """``run(ops, tensors)`` by the kernels and by the reference on copies; compares and returns them."""
    results = []
    for ops in (OPS, reference):
        own = [t.clone() for t in tensors]
        extra = run(ops, *own)
        results.append(own + ([] if extra is None else [extra]))
    assert_same(*results)
    return results[0]


# ------------------------------------------------------------------ the reference


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_update_equals_reference(device, shape):
    """On the wide shape 530 samples cross a block: what is shown is the noise of the last one that touched the cell."""
    m, n = SHAPES[shape]
    model = DEVICES[device]
    hyper = pack(visible_device=model, fast_device=model)
    samples = 530 if shape == "wide" else 20
    x, d = randn(1, samples, n) * (randn(5, samples, n) > 1.5), randn(2, samples, m)

    def run(ops, w, cells, counts):
        ops.pulsed_update_(
            [w],
            [x],
            [d],
            [torch.tensor(0.05 * model.granularity)],
            [fresh_state(1, 7)],
            [counts],
            [hyper],
            [1],
            [0],
            [cells],
        )

    _w, _cells, counts = both(run, 0.3 * randn(0, m, n), *held(model, m, n), fresh_counts())
    assert counts[COUNTS["pulses_b"]] > 0


def test_update_in_chunks_of_whole_blocks_equals_one_call():
    """Chunk sizes are not part of the numbers, write noise included."""
    model = DEVICES["noisy-soft"]
    hyper, x, d = pack(visible_device=model), randn(1, 1100, 12), randn(2, 1100, 9)
    x[600:] = 0.0  # nothing in the last block
    results = []
    for chunks in ([(0, 1100)], [(0, 512), (512, 1024), (1024, 1100)]):
        w, cells, counts = torch.zeros(9, 12), torch.zeros(1, 9, 12), fresh_counts()
        for s, e in chunks:
            OPS.pulsed_update_(
                [w], [x[s:e]], [d[s:e]], [torch.tensor(0.001)], [fresh_state()], [counts], [hyper], [2], [s], [cells]
            )
        results.append([w, cells, counts])
    assert_same(*results)


@pytest.mark.parametrize("mode", ["digital", "pulsed", "pulsed_residual"])
@pytest.mark.parametrize("visible", DEVICES)
def test_transfer_equals_reference(visible, mode):
    """With a plain and with such a device under A and B, within and beyond the cap."""
    for fast, scale in ((PLAIN, 0.05), (DEVICES["noisy-soft"], 3.0), (DEVICES["pair"], 3.0)):
        model = DEVICES[visible]
        hyper = pack(
            21,
            rank=3,
            visible_device=model,
            fast_device=fast,
            transfer_mode=mode,
            transfer_every=1,
            transfer_max_words=2,
        )
        state = fresh_state(5, 11)
        state[CYCLE] = 3
        cells = [
            c for device, shape in ((fast, (18, 3)), (fast, (3, 21)), (model, (18, 21))) for c in held(device, *shape)
        ]

        def run(ops, a, b, c, state, counts, *cells, hyper=hyper):
            ops.transfer_([a], [b], [c], [state], [counts], [hyper], [1], False, list(cells))

        both(run, scale * randn(0, 18, 3), randn(1, 3, 21), 0.1 * randn(2, 18, 21), state, fresh_counts(), *cells)


@pytest.mark.parametrize("reinit", ["normal", "uniform", "orthogonal"])
@pytest.mark.parametrize("device", DEVICES)
def test_reinit_equals_reference(device, reinit):
    model = DEVICES[device]
    hyper = pack(37, rank=5, reinit=reinit, fast_device=model)

    def run(ops, a, b, *cells):
        ops.reinit_([a], [b], [fresh_state(2)], [hyper], list(cells))

    both(run, randn(0, 9, 5), randn(1, 5, 37), *held(model, 9, 5), *held(model, 5, 37))


@pytest.mark.parametrize("device", DEVICES)
def test_single_cell_operators_equal_reference(device):
    """Clip with and without writing, relax, reset of some columns with a probability, draws of both cells of a pair."""
    model = DEVICES[device]
    hyper, state = pack(visible_device=model), fresh_state(3, 5)
    start = randn(0, 13, 29), *held(model, 13, 29)
    for write in (True, False):
        both(lambda ops, w, c, write=write: ops.clip_(w, state, hyper, C, write, [c]), *start)
    both(lambda ops, w, c: ops.relax_([w], [state], [hyper], [C], [c]), *start)
    w, _ = both(lambda ops, w, c: ops.reset_cells_(w, state, hyper, C, 4, 20, 0.7, 2, [c]), *start)
    assert same_bits(w[:, :4], start[0][:, :4])
    assert same_bits(w[:, 20:], start[0][:, 20:])
    for array in (C, C + MINUS):
        assert same_bits(OPS.draw_cells(state, hyper, array, 5, 7), reference.draw_cells(state, hyper, array, 5, 7))


def test_reset_of_plain_cells_equals_reference():
    hyper, state = pack(visible_device=devices.SoftBounds(reset=0.2, reset_dtod=0.1, reset_std=0.05)), fresh_state(3, 5)
    both(lambda ops, w: ops.reset_cells_(w, state, hyper, C, 0, 29, 0.5, 0), randn(0, 13, 29))


def test_results_do_not_depend_on_the_number_of_threads():
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for name in ("noisy-leaky", "pair-refresh"):
                model = DEVICES[name]
                hyper, state = pack(300, visible_device=model), fresh_state(1, 1)
                w, cells = 0.3 * randn(0, 120, 300), held(model, 120, 300)
                OPS.pulsed_update_(
                    [w],
                    [randn(1, 40, 300)],
                    [randn(2, 40, 120)],
                    [torch.tensor(0.01)],
                    [state],
                    [fresh_counts()],
                    [hyper],
                    [2],
                    [0],
                    cells,
                )
                OPS.relax_([w], [state], [hyper], [2], cells)
                OPS.reset_cells_(w, state, hyper, C, 3, 200, 0.5, 0, cells)
                OPS.clip_(w, state, hyper, C, True, cells)
                results.append([w, *cells])
    finally:
        torch.set_num_threads(before)
    for one, three in zip(results[:2], results[2:], strict=True):
        assert_same(one, three)


def test_opcheck():
    """Schema, fake and functionalisation of the optional list."""
    model = DEVICES["noisy-soft"]
    hyper, w, cells = pack(12, rank=2, visible_device=model), torch.zeros(9, 12), [torch.zeros(1, 9, 12)]
    calls = {
        OPS.pulsed_update_.default: (
            [w],
            [randn(3, 5, 12)],
            [randn(4, 5, 9)],
            [torch.tensor(0.1)],
            [fresh_state()],
            [fresh_counts()],
            [hyper],
            [2],
            [0],
            cells,
        ),
        OPS.relax_.default: ([w], [fresh_state()], [hyper], [2], cells),
        OPS.clip_.default: (w, fresh_state(), hyper, 2, True, cells),
        OPS.reset_cells_.default: (w, fresh_state(), hyper, 2, 0, 12, 1.0, 0, cells),
        OPS.transfer_.default: (
            [randn(1, 9, 2)],
            [randn(2, 2, 12)],
            [w],
            [fresh_state()],
            [fresh_counts()],
            [hyper],
            [1],
            True,
            cells,
        ),
    }
    for op, arguments in calls.items():
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (None, r"cells must have a tensor \[1, 9, 12\] for array 2, whose device has write noise, got 0 tensors"),
        ([torch.zeros(2, 9, 12)], r"cells must be \[1, 9, 12\], got \[2, 9, 12\]"),
        ([torch.zeros(1, 9, 12), torch.zeros(1, 9, 12)], "cells must be as many as arrays that need them, 1, got 2"),
    ],
    ids=["missing", "shape", "too_many"],
)
def test_wrong_cells_are_refused(cells, message):
    hyper = pack(12, visible_device=DEVICES["noisy-soft"])
    with pytest.raises(ValueError, match=message):
        kernels.clip_(torch.zeros(9, 12), fresh_state(), hyper, 2, False, cells)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 2, 1.0, 0), "first and last must be columns"),
        ((0, 13, 1.0, 0), "first and last must be columns"),
        ((0, 12, 1.5, 0), "share must be >= 0 and <= 1, got 1.5"),
        ((0, 12, 1.0, -1), "number must be >= 0"),
    ],
)
def test_wrong_resets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        kernels.reset_cells_(torch.zeros(9, 12), fresh_state(), pack(12, visible_device=PLAIN), 2, *arguments)


# ------------------------------------------------------------------ write noise


def pulses(w, cells, device, n, direction=1, step=0, columns=None):
    """``n`` pulses on every cell of some columns (all): kappa = 1 makes one slot that always fires."""
    x = torch.zeros(n, w.shape[1])
    x[:, columns if columns is not None else slice(None)] = 1.0
    OPS.pulsed_update_(
        [w],
        [x],
        [torch.full((n, w.shape[0]), -float(direction))],
        [torch.tensor(device.granularity)],
        [fresh_state(0, step)],
        [fresh_counts()],
        [pack(visible_device=device)],
        [2],
        [0],
        cells,
    )


def test_write_noise_does_not_act_on_the_persistent_weight():
    """The persistent weight moves as the weight of the same device without write noise, bit for bit."""
    numbers = {"dw_min": 0.01, "dw_min_std": 0.5}
    plain, noisy = devices.SoftBounds(**numbers), devices.SoftBounds(**numbers, write_noise_std=2.0)
    w, seen, cells = torch.zeros(20, 30), torch.zeros(20, 30), [torch.zeros(1, 20, 30)]
    for step in range(3):
        pulses(w, None, plain, 5, step=step)
        pulses(seen, cells, noisy, 5, step=step)
    assert same_bits(cells[0][0], w)
    assert not torch.equal(seen, w)


def test_write_noise_is_drawn_when_the_cell_is_written():
    """std write_noise_std * dw_min within 5 / sqrt(2 n); anew at every write of the cell, left alone between."""
    device = quiet(devices.ConstantStep, dw_min=0.01, write_noise_std=3.0, w_max=9.0, w_min=-9.0)
    w, cells = torch.zeros(200, 200), [torch.zeros(1, 200, 200)]
    pulses(w, cells, device, 2)
    first = w.double() - cells[0][0].double()
    assert first.std() == pytest.approx(0.03, rel=5 / math.sqrt(2 * 200**2))
    assert abs(float(first.mean())) < 5 * 0.03 / 200
    before = w.clone()
    pulses(w, cells, device, 2, step=1, columns=slice(0, 100))
    assert same_bits(w[:, 100:], before[:, 100:])
    second = (w.double() - cells[0][0].double())[:, :100]
    assert second.std() == pytest.approx(0.03, rel=5 / math.sqrt(2 * 200 * 100))
    correlation = torch.corrcoef(torch.stack([first[:, :100].flatten(), second.flatten()]))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(200 * 100)


@pytest.mark.parametrize("on_set", [True, False])
def test_write_noise_of_a_set(on_set):
    """Programming cells draws write noise, unless the device says otherwise."""
    device = quiet(
        devices.ConstantStep, dw_min=0.01, write_noise_std=3.0, w_max=9.0, w_min=-9.0, apply_write_noise_on_set=on_set
    )
    w, cells = torch.full((200, 200), 0.5), [torch.zeros(1, 200, 200)]
    OPS.clip_(w, fresh_state(), pack(visible_device=device), C, True, cells)
    assert same_bits(cells[0][0], torch.full((200, 200), 0.5))
    expected = 0.03 if on_set else 0.0
    assert (w.double() - 0.5).std() == pytest.approx(expected, rel=5 / math.sqrt(2 * 200**2))


def test_digital_transfer_adds_to_the_persistent_weight():
    """Transfers of 0 leave it as it is; adding to what is read would make it walk."""
    device = quiet(devices.ConstantStep, dw_min=0.01, write_noise_std=3.0, apply_write_noise_on_set=True)
    hyper = pack(6, rank=2, visible_device=device, transfer_mode="digital", transfer_every=1)
    c, cells, state = torch.zeros(5, 6), [0.1 * torch.ones(1, 5, 6)], fresh_state()
    for _ in range(3):
        OPS.transfer_(
            [torch.zeros(5, 2)], [torch.ones(2, 6)], [c], [state], [fresh_counts()], [hyper], [1], False, cells
        )
    assert same_bits(cells[0], 0.1 * torch.ones(1, 5, 6))
    assert float((c - 0.1).abs().min()) > 0


# ------------------------------------------------------------------ pairs


def test_pair_takes_pulses_upwards_only():
    """3 up and 2 down pulses are 3 on g+ and 2 on g-; exact steps of dw_min = 1/128."""
    device = devices.OneSided(device=devices.Ideal(dw_min=2.0**-7))
    w, cells = torch.zeros(4, 6), [torch.zeros(2, 4, 6)]
    pulses(w, cells, device, 3)
    pulses(w, cells, device, 2, direction=-1, step=1)
    assert same_bits(cells[0][0], torch.full((4, 6), 3 / 128))
    assert same_bits(cells[0][1], torch.full((4, 6), 2 / 128))
    assert same_bits(w, torch.full((4, 6), 1 / 128))


def test_cells_of_a_pair_are_drawn_apart():
    """Bounds and steps of g+ and g-: correlation within 5 / sqrt(n)."""
    hyper = pack(visible_device=devices.OneSided())
    plus, minus = (OPS.draw_cells(fresh_state(), hyper, array, 200, 200)[[0, 2]].flatten(1) for array in (C, C + MINUS))
    for one, other in zip(plus, minus, strict=True):
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 5 / 200


def test_a_full_pair_is_refreshed():
    """g+ = .5, g- = .2 of w_max = .6 is beyond .75 and .25: reset to 0, then 0.3 in steps of 1/128 on g+, verified."""
    device = devices.OneSided(
        device=devices.Ideal(dw_min=2.0**-7, w_max=0.6, w_min=-0.6, reset_std=0.0), refresh_every=3
    )
    hyper, state = pack(visible_device=device), fresh_state()
    cells = torch.tensor([[[0.5, 0.5, 0.1]], [[0.2, 0.1, 0.05]]])
    w = cells[0] - cells[1]
    for step in range(3):
        state[STEP] = step
        assert cells[0, 0, 0] == 0.5
        OPS.relax_([w], [state], [hyper], [C], [cells])
    assert cells[:, 0, 0].tolist() == [39 / 128, 0.0]  # the first multiple of 1/128 that reaches 0.3
    assert w[0, 0] == 39 / 128
    assert torch.equal(cells[:, 0, 1:], torch.tensor([[0.5, 0.1], [0.1, 0.05]]))


def test_an_unfinished_refresh_ends_after_its_pulses():
    device = devices.OneSided(
        device=devices.Ideal(dw_min=2.0**-7, reset_std=0.0), refresh_every=1, refresh_max_pulses=5
    )
    cells = torch.tensor([[[0.4]], [[0.9]]])
    w = cells[0] - cells[1]
    OPS.relax_([w], [fresh_state()], [pack(visible_device=device)], [C], [cells])
    assert cells.flatten().tolist() == [0.0, 5 / 128]
    assert w.item() == -5 / 128


def test_set_puts_the_weight_into_one_cell():
    device = devices.OneSided(device=devices.Ideal(w_max=0.5, w_min=-0.5))
    w, cells = torch.tensor([[0.25, -0.125, 0.0, 7.0, -7.0]]), torch.zeros(2, 1, 5)
    assert OPS.clip_(w, fresh_state(), pack(visible_device=device), C, True, [cells]) == 2
    assert cells[0].flatten().tolist() == [0.25, 0.0, 0.0, 0.5, 0.0]
    assert cells[1].flatten().tolist() == [0.0, 0.125, 0.0, 0.0, 0.5]
    assert w.flatten().tolist() == [0.25, -0.125, 0.0, 0.5, -0.5]


# ------------------------------------------------------------------ reset


def test_reset_goes_to_the_reset_value():
    """reset + reset_dtod xi_cell + reset_std xi: mean and spread from cell to cell and from reset to reset, 5 sigma."""
    device = quiet(devices.ConstantStep, reset=0.2, reset_dtod=0.05, reset_std=0.02)
    hyper, n = pack(visible_device=device), 200 * 200
    first, second = torch.zeros(200, 200), torch.zeros(200, 200)
    OPS.reset_cells_(first, fresh_state(), hyper, C, 0, 200, 1.0, 0)
    OPS.reset_cells_(second, fresh_state(), hyper, C, 0, 200, 1.0, 1)
    spread = math.hypot(0.05, 0.02)
    assert first.double().mean() == pytest.approx(0.2, abs=5 * spread / 200)
    assert first.double().std() == pytest.approx(spread, rel=5 / math.sqrt(2 * n))
    assert (first.double() - second.double()).std() == pytest.approx(0.02 * math.sqrt(2), rel=5 / math.sqrt(2 * n))


def test_reset_with_a_probability():
    """A share of 0.3 within 5 standard errors."""
    w = torch.full((200, 200), 0.5)
    device = quiet(devices.ConstantStep)
    OPS.reset_cells_(w, fresh_state(), pack(visible_device=device), C, 0, 200, 0.3, 0)
    assert float((w == 0).double().mean()) == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7) / 200)


# ------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: devices.SoftBounds(write_noise_std=-1.0),
            ValueError,
            "SoftBounds: write_noise_std must be finite and >= 0, got -1.0",
        ),
        (
            lambda: devices.SoftBounds(reset_std=-0.1),
            ValueError,
            "SoftBounds: reset_std must be finite and >= 0, got -0.1",
        ),
        (
            lambda: devices.OneSided(device=devices.SoftBounds(write_noise_std=1.0)),
            ValueError,
            "OneSided: device.write_noise_std must be 0, got 1.0",
        ),
        (lambda: devices.OneSided(device=devices.OneSided()), TypeError, "OneSided: device must be a single device"),
        (
            lambda: devices.OneSided(device=devices.SoftBounds(w_max=0.0)),
            ValueError,
            "OneSided: device.w_max must be > 0, got 0.0",
        ),
        (
            lambda: devices.OneSided(refresh_every=-1),
            ValueError,
            "OneSided: refresh_every must be between 0 and 16777216, got -1",
        ),
        (
            lambda: devices.OneSided(refresh_upper_thres=1.5),
            ValueError,
            "OneSided: refresh_upper_thres must be finite and >= 0 and <= 1, got 1.5",
        ),
        (lambda: devices.OneSided(refresh_max_pulses=0), ValueError, "OneSided: refresh_max_pulses must be between 1"),
    ],
)
def test_refused_numbers(make, error, message):
    with pytest.raises(error, match=message):
        make()
