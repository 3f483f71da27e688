"""Layers whose tile is read through converters: what is read, what is latched, and what the count of reads promises."""

from __future__ import annotations

import copy
import dataclasses

import lightning.pytorch as pl
import pytest
import torch
from helpers import randn, same_bits
from lightning_helpers import DIGITAL, PULSED, Net, loader, trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_lrtt import LRTT, IOConfig, LRTTConfig, convert_to_digital, convert_to_lrtt, devices
from lightning_lrtt.export import digital_state_dict
from lightning_lrtt.nn import LRTTConv1d, LRTTConv2d, LRTTLinear, LRTTTransposedLinear, find_tiles
from lightning_lrtt.nn.average import average_effective_weights
from lightning_lrtt.ops import reference_io

WIDE = IOConfig(inp_res=0.0, out_res=0.0, out_noise=0.0, out_bound=0.0)  # converters that do nothing
CHAIN = IOConfig(inp_noise=0.02, w_noise=0.01, inp_sto_round=True)
LAYERS = {
    "linear": (lambda c: LRTTLinear(6, 5, config=c, tile=0), (2, 7, 6)),
    "vector": (lambda c: LRTTLinear(6, 5, config=c, tile=0), (6,)),
    "transposed": (lambda c: LRTTTransposedLinear(6, 5, config=c, tile=0), (7, 6)),
    "conv1d": (lambda c: LRTTConv1d(2, 5, 3, padding="same", dilation=2, config=c, tile=0), (3, 2, 9)),
    "conv2d": (lambda c: LRTTConv2d(2, 5, (3, 2), padding=1, stride=2, config=c, tile=0), (3, 2, 7, 8)),
    "image": (lambda c: LRTTConv2d(2, 5, 3, bias=False, config=c, tile=0), (2, 7, 8)),
}
FAST = {"digital": None, "pulsed": devices.SoftBounds()}


def layer(kind="linear", io=CHAIN, **numbers):
    """A layer of fixed weights with a nonzero A, and its input."""
    make, shape = LAYERS[kind]
    torch.manual_seed(1)
    made = make(LRTTConfig(**{"rank": 2, "io": io, "reinit_gain": 1.0, "alpha": 0.5, "transfer_lr": 0.5} | numbers))
    with torch.no_grad():
        made.A.normal_(std=0.3)
    return made, randn(2, *shape)


def backward(tile, x):
    """Output and gradients of a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    y = tile(x)
    (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
    return y.detach(), x.grad, tile.A.grad, tile.B.grad


# ------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("io", [WIDE, IOConfig(is_perfect=True)], ids=["wide", "perfect"])
@pytest.mark.parametrize("kind", LAYERS)
def test_converters_that_do_nothing_give_the_exact_layer(kind, io, fast):
    """Outputs, gradients and latched operands, up to the rounding of sums in another order."""
    tiles, found = [], []
    for own in (None, io):
        tile, x = layer(kind, own, fast_device=FAST[fast])
        found.append(backward(tile, x))
        tiles.append(tile)
    for mine, exact in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=2e-5)
    assert tiles[1].latch.samples > 0
    for mine, exact in zip(tiles[1].latch.calls, tiles[0].latch.calls, strict=True):
        for name in ("x", "xb", "d", "da"):
            torch.testing.assert_close(getattr(mine, name), getattr(exact, name), rtol=1e-5, atol=2e-5)
    assert len(tiles[1].latch.calls) == (fast == "pulsed")


def test_reads_b_then_a_then_c_and_latches_what_it_read():
    """Each of the six reads is the chain of the plain PyTorch reference; gradients come from the latched operands.

    Forward A sees the converted output of B, backward B that of A; C sees x and D.
    """
    io = IOConfig(inp_noise=0.02, w_noise=0.01, out_bound=100.0)  # nothing clips: rounds would multiply other shapes
    tile, _ = layer(io=io, fast_device=devices.SoftBounds(), io_backward=dataclasses.replace(io, inp_bits=5))
    x = randn(2, 7, 6).requires_grad_()
    a, b = tile.factors()

    def read(rows, w, ticket, array, packed):
        return reference_io.read(rows, w, torch.tensor(ticket), tile.tile_state, packed, array, 0)

    y = tile(x)
    z = read(x.detach(), b, 0, 1, io.pack())
    exact = (
        read(x.detach(), tile.matrix, 0, 2, io.pack()).add_(read(z, a, 0, 0, io.pack()), alpha=0.5) + tile.bias.detach()
    )
    assert same_bits(y, exact)
    d = randn(3, 7, 5)
    y.backward(d)
    packed = tile.config.io_backward.pack(backward=True)
    da = read(d, a.t(), 2, 0, packed)
    dx = read(d, tile.matrix.t(), 2, 2, packed).add_(read(da, b.t(), 2, 1, packed), alpha=0.5)
    assert same_bits(x.grad, dx)
    (call,) = tile.latch.calls
    assert all(map(same_bits, (call.x, call.xb, call.d, call.da), (x, z, d, da)))
    torch.testing.assert_close(tile.A.grad, 0.5 * d.t() @ z)
    torch.testing.assert_close(tile.B.grad, 0.5 * da.t() @ x.detach())


def test_an_input_converter_without_noise_serves_both_arrays():
    """B and C share the operand then; the result is that of two conversions."""
    io = IOConfig(out_bound=100.0)
    tile, x = layer(io=io)
    rows, state = x.view(-1, 6), tile.tile_state
    z = reference_io.read(rows, tile.B.detach(), torch.tensor(0), state, io.pack(), 1, 0)
    mixed = reference_io.read(z, tile.A.detach(), torch.tensor(0), state, io.pack(), 0, 0)
    exact = reference_io.read(rows, tile.matrix, torch.tensor(0), state, io.pack(), 2, 0).add_(mixed, alpha=0.5)
    assert same_bits(tile(x).view(-1, 5), exact + tile.bias.detach())


def test_bound_management_reaches_the_layer():
    """Outputs beyond the converter's 12 come out right forward, and clipped at 12 times the scale backward."""
    io = IOConfig(out_noise=0.0, inp_bits=9, out_bits=12)
    tile = LRTTLinear(64, 64, bias=False, config=LRTTConfig(rank=1, io=io))
    with torch.no_grad():
        tile.weight.fill_(0.5)
    x = torch.ones(2, 64, requires_grad=True)
    y = tile(x)
    # Two doublings to alpha = 4 for 32 < 48: half a step of 4 * 24 / 4094, and half a step of 4 / 255 of 64 inputs.
    torch.testing.assert_close(
        y.detach(), torch.full((2, 64), 32.0), rtol=0, atol=0.5 * 4 * 24 / 4094 + 32 * 0.5 * 4 / 255
    )
    y.sum().backward()
    assert (x.grad == 12.0).all()


@pytest.mark.parametrize("kind", ["conv1d", "conv2d"])
def test_chunks_of_a_convolution_do_not_change_its_noise(kind, monkeypatch):
    """Samples keep their words; only sums may round differently in another product."""
    from lightning_lrtt.nn import conv

    io = IOConfig(inp_noise=0.1, out_res=0.0, inp_res=0.0)
    whole = backward(*layer(kind, io))
    monkeypatch.setattr(conv, "_CHUNK_ELEMENTS", 1)
    for one, other in zip(whole, backward(*layer(kind, io)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


def test_first_sample_splits_a_batch():
    """Two workers with half a batch each read what one reads, when told where their half starts."""
    tile, x = layer()
    other = copy.deepcopy(tile)
    rows = x.view(-1, 6)
    whole = tile(rows)
    first = copy.deepcopy(other)(rows[:6])
    other.first_sample = 6
    assert same_bits(torch.cat([first, other(rows[6:])]), whole)


# ------------------------------------------------------------------ precision


def test_autocast_keeps_the_chain_in_float32():
    """Under bf16 only the result is rounded: X_B and D_A have more steps than bf16 has digits."""
    tile, x = layer("linear", IOConfig(), fast_device=devices.SoftBounds())
    exact = copy.deepcopy(tile)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = tile(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=2**-7, atol=2**-9)  # result and bias, rounded to 8 digits
    y.sum().backward()
    (call,) = tile.latch.calls
    assert call.xb.dtype == call.da.dtype == torch.float32
    step = 24 / 510 * x.view(-1, 6).abs().amax(1, keepdim=True)
    ratio = call.xb.view(-1, 2) / step
    torch.testing.assert_close(ratio, ratio.round(), rtol=0, atol=1e-4)  # 255 steps of float32


def test_backward_within_autocast_is_the_same():
    """Some loops call backward inside the autocast region; its products must not run in bf16 for that."""
    found = []
    for within in (False, True):
        tile, x = layer("linear", IOConfig())
        y = tile(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
            y.sum().backward()
        found.append((tile.A.grad, tile.B.grad))
    assert all(map(same_bits, *found))


def test_float64_tiles_are_refused():
    with pytest.raises(TypeError, match=r"dtype must be float32 on devices and behind converters, got torch\.float64"):
        LRTTLinear(3, 3, config=LRTTConfig(rank=1, io=IOConfig()), dtype=torch.float64)


# ------------------------------------------------------------------ the count of reads


def steps(model, optimizer, first, last, watch=None):
    """Optimizer steps on fixed batches; ``watch(model)`` after each."""
    for step in range(first, last):
        optimizer.zero_grad()
        model(randn(step, 9, 6)).square().mean().backward()
        optimizer.step()
        if watch is not None:
            watch(model)


def network(seed=0, **numbers):
    """Two layers behind converters, on devices."""
    torch.manual_seed(seed)
    config = dataclasses.replace(PULSED, io=CHAIN, **numbers)
    return nn.Sequential(LRTTLinear(6, 8, config=config, tile=0), nn.Tanh(), LRTTLinear(8, 3, config=config, tile=1))


def same_state(one, other, but=()):
    """Equal state dicts but for the entries named."""
    return all(same_bits(v, other[k]) for k, v in one.items() if not k.endswith(tuple(but)))


def test_reads_are_fresh_and_counted():
    tile, x = layer()
    one, other = tile(x), tile(x)
    assert not same_bits(one, other)
    tile.eval()
    assert not same_bits(tile(x), tile(x))
    assert tile.tile_reads.tolist() == [2, 2]
    with torch.inference_mode():
        tile(x)
    assert tile.tile_reads.tolist() == [2, 3]


def test_evaluation_changes_nothing_of_training():
    def validate(model):
        model.eval()
        with torch.no_grad():
            model(randn(99, 5, 6))
        model.train()

    finals = []
    for watch in (None, validate):
        model = network()
        steps(model, LRTT(model.parameters(), lr=0.1), 0, 6, watch)
        finals.append(model.state_dict())
    assert same_state(*finals, but=("tile_reads",))
    assert finals[1]["0.tile_reads"].tolist() == [12, 6]


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resume_is_bit_identical(stop, tmp_path):
    """Stop, save, load into a model of another seed's draws, go on: as if never stopped."""
    through = network()
    steps(through, LRTT(through.parameters(), lr=0.1), 0, 7)
    model = network()
    steps(model, LRTT(model.parameters(), lr=0.1), 0, stop)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = network(seed=1)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(again, LRTT(again.parameters(), lr=0.1), stop, 7)
    assert same_state(through.state_dict(), again.state_dict())


def test_threads_are_not_part_of_a_read():
    io, finals = IOConfig(inp_sto_round=True, out_sto_round=True, out_bound=1.0), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            tile = LRTTLinear(6, 300, False, LRTTConfig(rank=2, io=io, reinit_gain=1.0), tile=0)
            with torch.no_grad():  # products of whole numbers are exact, whatever the order of their sums
                tile.weight.copy_(torch.arange(1800).view(300, 6) % 3)
                tile.B.copy_(torch.arange(12).view(2, 6) % 2)
            finals.append(tile(randn(1, 400, 6)))
        finally:
            torch.set_num_threads(1)
    assert same_bits(*finals)


def test_checkpoints_with_and_without_converters_load():
    """Converters are no part of what a checkpoint must agree with."""
    with_io, x = layer()
    with_io(x)
    without, _ = layer(io=None)
    without.load_state_dict(with_io.state_dict())
    again, _ = layer()
    again.load_state_dict(without.state_dict())
    assert "tile_reads" not in without.state_dict()
    assert again.tile_reads.tolist() == [0, 0]
    digital, _ = layer()
    digital.load_state_dict({"weight": torch.ones(5, 6), "bias": torch.zeros(5)})
    assert (digital.weight == 1).all()


def test_copies_and_resets():
    tile, x = layer()
    tile(x)
    twin = copy.deepcopy(tile)
    assert same_bits(tile(x), twin(x))
    twin.reset_parameters()
    assert twin.tile_reads.tolist() == [0, 0]


def test_export_conversion_and_averages_ignore_converters():
    """They concern reads; weights are weights."""
    tile, x = layer()
    tile(x)
    weight = tile.effective_weight()
    torch.testing.assert_close(weight, tile.matrix + 0.5 * tile.A.detach() @ tile.B.detach())
    assert set(digital_state_dict(nn.Sequential(tile).state_dict())) == {"0.weight", "0.bias"}
    assert same_bits(copy.deepcopy(nn.Sequential(tile)).pop(0).effective_weight(), weight)
    averaged = average_effective_weights(AveragedModel(tile))
    averaged.update_parameters(tile)
    torch.testing.assert_close(averaged.module.weight, weight)
    assert averaged.module.tile_reads.tolist() == [1, 0]
    plain = convert_to_digital(nn.Sequential(tile))
    assert type(plain[0]) is nn.Linear
    assert same_bits(plain[0].weight, weight)


def test_conversion_carries_the_converters():
    model = convert_to_lrtt(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), LRTTConfig(rank=2, io=IOConfig()))
    model(randn(1, 3, 6))
    assert [tile.tile_reads.tolist() for tile in find_tiles(model).values()] == [[1, 0], [1, 0]]


def test_compiled_models_read_through_the_chain():
    """The read is a graph break; the result is the eager one."""
    torch._dynamo.reset()
    model = network()
    twin = copy.deepcopy(model)
    x = randn(1, 9, 6)
    compiled = torch.compile(model, backend="aot_eager")
    one, other = compiled(x), twin(x)
    torch.testing.assert_close(one, other)
    one.sum().backward()
    other.sum().backward()
    torch.testing.assert_close(model[0].B.grad, twin[0].B.grad)


# ------------------------------------------------------------------ Lightning


@torch.no_grad()
def loss(model):
    """Mean squared error on the data of `loader`."""
    x, y = loader().dataset.tensors
    return float((model.net(x) - y).square().mean())


@pytest.mark.parametrize("base", [DIGITAL, PULSED], ids=["digital", "pulsed"])
def test_training_learns_through_the_chain(base, tmp_path):
    """The squared error of the digital run's task falls by half at least within five epochs of 20 steps."""
    torch.manual_seed(0)
    model = Net(lr=0.1)
    before = loss(model)
    trainer(tmp_path, [], dataclasses.replace(base, io=IOConfig()), max_epochs=5).fit(model, loader())
    model.eval()
    assert loss(model) < 0.5 * before
    assert next(iter(find_tiles(model).values())).tile_reads[0] == 200  # a forward and a backward pass a step


def test_lightning_resumes_to_the_bit(tmp_path):
    """A checkpoint in the middle of a run, validation between: the run that goes on equals the one that never stopped.
    Sanity checking, which every fit repeats, would advance the count of evaluation reads.
    """

    class Validated(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", (self.net(batch[0]) - batch[1]).square().mean())

    config = dataclasses.replace(PULSED, io=CHAIN)
    finals = []
    for resumed in (False, True):
        torch.manual_seed(0)
        model, path = Validated(), None
        if resumed:
            early = trainer(tmp_path / "early", [], config, max_epochs=2, num_sanity_val_steps=0)
            early.fit(model, loader(), loader(3))
            early.save_checkpoint(tmp_path / "early.ckpt")
            path, model = str(tmp_path / "early.ckpt"), Validated()
        late = trainer(tmp_path / str(resumed), [], config, max_epochs=4, num_sanity_val_steps=0)
        late.fit(model, loader(), loader(3), ckpt_path=path)
        finals.append(model.state_dict())
    assert same_state(*finals)


def test_yaml(tmp_path, monkeypatch):
    """`io` in a configuration file, with fields of both directions."""
    from lightning_lrtt.cli import main

    monkeypatch.chdir(tmp_path)  # where the run saves its configuration

    file = tmp_path / "fit.yaml"
    file.write_text(
        "trainer:\n  max_steps: 2\n  accelerator: cpu\n  logger: false\n  enable_checkpointing: false\n"
        "  enable_progress_bar: false\n"
        "  strategy:\n    class_path: lightning_lrtt.LRTTStrategy\n    init_args:\n      config:\n        rank: 1\n"
        "        reinit_gain: 1.0\n        io: {inp_bits: 5, bound_management: iterative_worst_case}\n"
        "        io_backward: {out_noise: 0.1}\n"
        "model: lightning.pytorch.demos.boring_classes.BoringModel\n"
    )
    seen = []
    monkeypatch.setattr(pl.Trainer, "save_checkpoint", lambda *a, **k: None)
    fit = pl.Trainer.fit

    def spy(self, model, **kwargs):
        fit(self, model, **kwargs)
        seen.extend(find_tiles(model).values())

    monkeypatch.setattr(pl.Trainer, "fit", spy)
    main(["fit", "--config", str(file)])
    (tile,) = seen
    assert tile.config.io == IOConfig(inp_bits=5, bound_management="iterative_worst_case")
    assert tile.config.io_backward == IOConfig(out_noise=0.1)
