"""Layers on tiles against plain torch layers, conversion to and from digital, loading of checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
from helpers import randn, same_bits
from torch import nn
from torch.nn import functional as F

from lightning_lrtt import LRTT, LRTTConfig, PulseConfig, convert_to_digital, convert_to_lrtt, devices
from lightning_lrtt.nn import LRTTConv1d, LRTTConv2d, LRTTLinear, find_tiles
from lightning_lrtt.nn import conv as conv_module
from lightning_lrtt.ops import CYCLE, KEY
from lightning_lrtt.ops.schema import BLOCK_SAMPLES

WIDE = devices.Ideal(w_max=10.0, w_min=-10.0)
DIGITAL = LRTTConfig(rank=2, alpha=0.7)
PULSED = LRTTConfig(rank=2, alpha=0.7, fast_device=WIDE, visible_device=WIDE)
VARIANTS = {
    "digital": (DIGITAL, torch.float64),
    "digital32": (DIGITAL, torch.float32),
    "pulsed": (PULSED, torch.float32),
    "samples": (LRTTConfig(rank=2, alpha=0.7, transfer_unit="samples"), torch.float64),
}
LAYERS = {
    "linear": (LRTTLinear, nn.Linear, (6, 5), {}, (3, 6)),
    "linear_no_bias": (LRTTLinear, nn.Linear, (6, 5), {"bias": False}, (3, 6)),
    "linear_3d": (LRTTLinear, nn.Linear, (6, 5), {}, (3, 4, 6)),
    "linear_1d": (LRTTLinear, nn.Linear, (6, 5), {}, (6,)),
    "conv1d": (LRTTConv1d, nn.Conv1d, (3, 4, 3), {"padding": 1}, (2, 3, 9)),
    "conv1d_strided": (LRTTConv1d, nn.Conv1d, (3, 4, 4), {"stride": 2, "dilation": 2, "padding": 3}, (2, 3, 17)),
    "conv1d_unbatched": (LRTTConv1d, nn.Conv1d, (3, 4, 3), {"padding": "same"}, (3, 9)),
    "conv2d": (LRTTConv2d, nn.Conv2d, (3, 4, 3), {}, (2, 3, 7, 8)),
    "conv2d_odd": (
        LRTTConv2d,
        nn.Conv2d,
        (3, 4, (2, 3)),
        {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
        (2, 3, 7, 8),
    ),
    "conv2d_same": (LRTTConv2d, nn.Conv2d, (3, 4, 3), {"padding": "same", "bias": False}, (2, 3, 5, 6)),
    "conv2d_valid": (LRTTConv2d, nn.Conv2d, (3, 4, 3), {"padding": "valid"}, (3, 6, 6)),
}


def fill(layer, scale=0.3):
    """Nonzero A, so that every term of forward and backward counts."""
    with torch.no_grad():
        layer.A.copy_(scale * randn(3, *layer.A.shape, dtype=layer.A.dtype))
    return layer


# ------------------------------------------------------------------ forward and gradients


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_gradients_equal_the_effective_layer(name, variant):
    """y, dL/dx and dL/dbias are those of a plain layer with W = C + alpha A B; dL/dA = alpha G B^T and dL/dB = alpha
    A^T G with its weight gradient G; C gets none. At most 60 products of numbers below 30 are summed in three orders:
    60 * 30 roundings.
    """
    (config, dtype), (tiled, plain, args, kwargs, shape) = VARIANTS[variant], LAYERS[name]
    layer = fill(tiled(*args, **kwargs, config=config, dtype=dtype, tile=0))
    reference = plain(*args, **kwargs, dtype=dtype)
    with torch.no_grad():
        reference.weight.copy_(layer.effective_weight())
        if layer.bias is not None:
            reference.bias.copy_(layer.bias)
    atol = 60 * 30 * torch.finfo(dtype).eps / 2
    x, expected_x = (randn(4, *shape, dtype=dtype).requires_grad_() for _ in range(2))
    y, expected = layer(x), reference(expected_x)
    torch.testing.assert_close(y, expected, rtol=0, atol=atol)
    d = randn(5, *y.shape, dtype=dtype)
    (y * d).sum().backward()
    (expected * d).sum().backward()
    torch.testing.assert_close(x.grad, expected_x.grad, rtol=0, atol=atol)
    g = reference.weight.grad.flatten(1)
    a, b = layer.factors()
    torch.testing.assert_close(layer.A.grad, 0.7 * g @ b.t(), rtol=0, atol=atol)
    torch.testing.assert_close(layer.B.grad, 0.7 * a.t() @ g, rtol=0, atol=atol)
    assert layer.weight.grad is None
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, reference.bias.grad, rtol=0, atol=atol)


@pytest.mark.parametrize("name", LAYERS)
def test_pulsed_tile_latches_the_exact_operands(name):
    """Sum over samples of d x^T of what is latched is the weight gradient: N counts output positions, in order."""
    tiled, plain, args, kwargs, shape = LAYERS[name]
    layer = fill(tiled(*args, **kwargs, config=PULSED, tile=0))
    reference = plain(*args, **kwargs)
    with torch.no_grad():
        reference.weight.copy_(layer.effective_weight())
    x = randn(4, *shape)
    y = layer(x)
    d = randn(5, *y.shape)
    (y * d).sum().backward()
    (reference(x) * d).sum().backward()
    (call,) = layer.latch.calls
    rows = torch.cat([part for _, part in layer.patches(call.x)])
    assert layer.latch.samples == len(rows) == y.numel() // layer.tile_shape[0]
    atol = 60 * 30 * 2.0**-24
    torch.testing.assert_close(layer.samples(call.d).t() @ rows, reference.weight.grad.flatten(1), rtol=0, atol=atol)
    torch.testing.assert_close(layer.samples(call.xb), rows @ layer.B.detach().t(), rtol=0, atol=atol)
    torch.testing.assert_close(layer.samples(call.da), layer.samples(call.d) @ layer.A.detach(), rtol=0, atol=atol)


@pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith("conv2d")])
def test_patches_equal_unfold(name):
    """All chunks together are F.unfold's columns as rows, batch by batch."""
    tiled, plain, args, kwargs, shape = LAYERS[name]
    layer, reference = tiled(*args, **kwargs, config=PULSED, tile=0), plain(*args, **kwargs)
    x = randn(4, *(shape if len(shape) == 4 else (1, *shape)))
    padding = {"same": 1, "valid": 0}.get(reference.padding, reference.padding)
    expected = (
        F.unfold(x, reference.kernel_size, reference.dilation, padding, reference.stride).transpose(1, 2).flatten(0, 1)
    )
    assert torch.equal(torch.cat([rows for _, rows in layer.patches(x)]), expected)


def test_chunks_of_patches_do_not_change_bits(monkeypatch):
    """The bound on memory is not part of the numbers: chunks of one block and one chunk give the same tile."""

    def run(elements):
        monkeypatch.setattr(conv_module, "_CHUNK_ELEMENTS", elements)
        torch.manual_seed(0)
        layer = fill(
            LRTTConv2d(
                2, 3, 3, padding=1, config=LRTTConfig(rank=2, fast_device=devices.SoftBounds(), reinit_gain=1.0), tile=0
            )
        )
        x = randn(1, 5, 2, 16, 16)
        assert len(list(layer.patches(x))) == (1 if elements > 1 else -(-5 * 256 // BLOCK_SAMPLES))
        optimizer = LRTT(layer.parameters(), lr=0.01)
        layer(x).square().mean().backward()
        optimizer.step()
        return layer.state_dict()

    whole, chunked = run(2**22), run(1)
    assert whole["tile_counts"][1] > 0
    assert all(same_bits(whole[name], chunked[name]) for name in ("A", "B", "weight", "tile_counts"))


def test_pulsed_convolution_equals_the_linear_layer_of_its_patches():
    """One sample per output position: the same pulses as a linear tile with the same key on the unfolded input."""
    config = LRTTConfig(rank=2, fast_device=devices.SoftBounds(), reinit_gain=1.0)
    conv, linear = LRTTConv2d(2, 3, 2, bias=False, config=config, tile=0), LRTTLinear(8, 3, False, config, tile=0)
    with torch.no_grad():  # whole numbers: matrix products are exact in any order
        x, d = (
            torch.randint(-2, 3, s, generator=torch.Generator().manual_seed(1)).float()
            for s in ((2, 2, 4, 4), (2, 3, 3, 3))
        )
        a, b, c = (
            torch.randint(-1, 2, s, generator=torch.Generator().manual_seed(2)).float()
            for s in ((3, 2), (2, 8), (3, 8))
        )
        for layer in (conv, linear):
            layer.A.copy_(a), layer.B.copy_(b), layer.write_visible(c)
    rows = F.unfold(x, 2).transpose(1, 2).flatten(0, 1)
    for layer, inputs, grad in ((conv, x, d), (linear, rows, d.flatten(2).transpose(1, 2).flatten(0, 1))):
        optimizer = LRTT(layer.parameters(), lr=1e-3)
        (layer(inputs) * grad).sum().backward()
        optimizer.step()
    assert linear.counts()["pulses_a"] > 0
    assert same_bits(conv.A, linear.A) and same_bits(conv.B, linear.B)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
@pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])
def test_every_mode_reads_the_whole_tile(mode, config):
    layer = fill(LRTTLinear(6, 5, config=config, tile=0)).train(mode == "train")
    x = randn(0, 3, 6)
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    with context():
        y = layer(x)
    torch.testing.assert_close(
        y.detach().clone(), F.linear(x, layer.effective_weight(), layer.bias.detach()), rtol=0, atol=1e-5
    )
    assert not layer.latch.calls


@pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])
@pytest.mark.parametrize("tiled", [LRTTLinear, LRTTConv1d], ids=["linear", "conv"])
def test_autocast_output_has_the_autocast_dtype(tiled, config):
    """Regression: adding a float32 bias turned the output of a bf16 layer into float32."""
    layer = tiled(4, 4, *((1,) if tiled is LRTTConv1d else ()), config=config, tile=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(randn(0, 2, 4, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(2, 3, 12), (2, 3, 9)], ids=["linear", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32 input", "bf16 input"])
def test_autocast_reads_the_effective_weight_rounded_once(shape, dtype):
    """y and x.grad against C + alpha A B in float64; the operands of the update are x, x B^T, d and d A as ever.

    Tolerance: x (or d), the weight and the result are rounded to bf16 once each, 2^-9 of the sum of magnitudes; what float32
    sums add is below a tenth of that.
    """
    soft = devices.SoftBounds(dw_min=0.01)
    config = LRTTConfig(rank=4, alpha=0.3, reinit_gain=1.0, fast_device=soft, visible_device=soft)
    linear = shape[-1] == 12
    layer = LRTTLinear(12, 5, bias=False, config=config) if linear else LRTTConv1d(3, 5, 4, bias=False, config=config)
    with torch.no_grad():
        layer.A.copy_(0.3 * randn(1, 5, 4))
        layer.weight.copy_(0.3 * randn(2, *layer.weight.shape))
    digital = layer.to_digital().double()
    magnitudes = layer.to_digital().double()
    with torch.no_grad():
        magnitudes.weight.copy_((layer.matrix.abs() + 0.3 * layer.A.abs() @ layer.B.abs()).view(layer.weight.shape))
    x = randn(3, *shape).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    d = randn(4, *y.shape).bfloat16()
    y.backward(d)
    exact, large = (v.detach().double().requires_grad_() for v in (x, x.abs()))
    exact_y, large_y = digital(exact), magnitudes(large)
    exact_y.backward(d.double())
    large_y.backward(d.double().abs())
    bound = 3.3 * 2.0**-9
    assert y.dtype == torch.bfloat16 and x.grad.dtype == dtype
    assert ((y.double() - exact_y).abs() <= bound * large_y).all()
    assert ((x.grad.double() - exact.grad).abs() <= bound * large.grad).all()
    (call,) = layer.latch.calls
    bf16 = [t.bfloat16() for t in (x, layer.B, layer.A)]
    assert torch.equal(call.x, bf16[0]) and torch.equal(call.d, d)
    torch.testing.assert_close(call.xb, layer.project(bf16[0], bf16[1]))
    torch.testing.assert_close(call.da, layer.mix_backward(d, call.xb, bf16[2])[0])


@pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_bias_and_its_gradient(kind, dtype, config):
    """Against the digital layer of the effective weight in float64.

    Tolerance: of sums of magnitudes, as of the read above, or in float32 one rounding for each of at most 18 + 4 terms and
    two for the weight. The gradient of the bias is a float32 sum of d.
    """
    sizes = {"linear": (LRTTLinear, (6, 4), (3, 2, 6)), "conv1d": (LRTTConv1d, (6, 4, 3), (2, 6, 8))}
    tiled, arguments, shape = sizes.get(kind, (LRTTConv2d, (2, 4, 3), (2, 2, 5, 6)))
    layer = tiled(*arguments, config=config, tile=0)
    torch.nn.init.normal_(layer.A, std=0.1)
    x = randn(1, *shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        y = layer(x)
    d = randn(2, *y.shape).to(y.dtype)
    y.backward(d)
    digital = layer.to_digital().double()
    exact = digital(x.double())
    magnitudes = copy.deepcopy(digital)
    with torch.no_grad():
        magnitudes.weight.abs_()
        magnitudes.weight.add_(2 * (layer.A.abs() @ layer.B.abs()).view(layer.weight.shape))
        magnitudes.bias.abs_()
    bound = 3.3 * 2.0**-9 if dtype else 24 * 2.0**-24
    assert ((y.double() - exact).abs() <= bound * magnitudes(x.double().abs())).all()
    exact.backward(d.double())
    torch.testing.assert_close(layer.bias.grad.double(), digital.bias.grad, rtol=1e-5, atol=1e-5)
    assert layer.bias.grad.dtype == torch.float32
    layer.bias.requires_grad_(False)
    layer.bias.grad = None
    layer(x).sum().backward()
    assert layer.bias.grad is None


# ------------------------------------------------------------------ conversion


class Net(nn.Module):
    """Layers of every kind that conversion has to tell apart."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.head(self.grouped(self.conv(x).relu()))


def images(n=2):
    return randn(0, n, 1, 4, 4)


def test_conversion_keeps_parameters_and_outputs():
    """weight and bias stay the same Parameters (an optimizer built before keeps working); A = 0, so the output is the
    same.
    """
    torch.manual_seed(0)
    model = Net()
    before, parameters = model(images()), dict(model.named_parameters())
    assert convert_to_lrtt(model, DIGITAL) is model
    assert list(find_tiles(model)) == ["conv", "head.1", "head.3"]
    for name, parameter in parameters.items():
        assert dict(model.named_parameters())[name] is parameter
    torch.testing.assert_close(model(images()), before)
    assert not model.conv.weight.requires_grad and model.conv.A.requires_grad


def test_conversion_is_idempotent():
    model = convert_to_lrtt(Net(), DIGITAL)
    tiles, state = find_tiles(model), {k: v.clone() for k, v in model.state_dict().items()}
    convert_to_lrtt(model, DIGITAL)
    assert all(a is b for a, b in zip(tiles.values(), find_tiles(model).values(), strict=True))
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])
def test_round_trip_to_digital(config):
    """Plain torch modules with the effective weights; outputs agree up to float32 rounding of sums of 64 products below
    10.
    """
    torch.manual_seed(0)
    model = convert_to_lrtt(Net(), config)
    for tile in find_tiles(model).values():
        fill(tile)
    before = model(images()).detach()
    assert convert_to_digital(model) is model
    assert [type(m) for m in (model.conv, model.head[1], model.head[3])] == [nn.Conv2d, nn.Linear, nn.Linear]
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(images()).detach(), before, rtol=0, atol=64 * 10 * 2.0**-24)


def test_globs():
    assert list(find_tiles(convert_to_lrtt(Net(), DIGITAL, include=["head.*"]))) == ["head.1", "head.3"]
    assert list(find_tiles(convert_to_lrtt(Net(), DIGITAL, exclude=["head.?"]))) == ["conv"]
    assert list(find_tiles(convert_to_lrtt(Net(), DIGITAL, include=["*"], exclude=["conv", "*.3"]))) == ["head.1"]
    with pytest.raises(
        ValueError, match=r"include must match layers, but 'haed\.\*' matches none of \['conv', 'grouped', 'head.1'"
    ):
        convert_to_lrtt(Net(), DIGITAL, include=["haed.*"])


def test_rank_is_lowered_where_needed(caplog):
    with caplog.at_level(logging.WARNING):
        model = convert_to_lrtt(Net(), LRTTConfig(rank=6))
    assert [tile.config.rank for tile in find_tiles(model).values()] == [4, 6, 3]
    assert "rank 6 lowered to min(d, k) in conv (4), head.3 (3)" in caplog.text


def test_single_layer_is_replaced():
    linear = nn.Linear(4, 3)
    tile = convert_to_lrtt(linear, DIGITAL)
    assert isinstance(tile, LRTTLinear) and tile.weight is linear.weight
    assert isinstance(convert_to_digital(tile), nn.Linear)


def test_a_layer_used_twice_stays_one_layer():
    """Regression: a module registered twice below one parent was replaced in one place only."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    convert_to_lrtt(model, DIGITAL)
    assert isinstance(model[0], LRTTLinear) and model[0] is model[2]
    convert_to_digital(model)
    assert type(model[0]) is nn.Linear and model[0] is model[2]


def test_frozen_layers_stay_frozen():
    """Regression: the factors of a layer with requires_grad=False were trained."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    convert_to_lrtt(model, DIGITAL)
    before = {n: p.clone() for n, p in model[0].named_parameters()}
    optimizer = LRTT(model.parameters(), lr=0.5)
    model(randn(0, 5, 4)).sum().backward()
    optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in model[0].named_parameters())
    assert not convert_to_digital(model)[0].weight.requires_grad


def test_tiles_of_two_conversions_have_keys_of_their_own():
    """Regression: converting in two steps around layers that stay digital could number two tiles alike, which then
    shared their device draws and pulses.
    """
    both = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    both[1].weight = both[0].weight  # tied: stays digital
    convert_to_lrtt(both, DIGITAL, include=["0", "1", "2"])
    convert_to_lrtt(both, DIGITAL)
    keys = {int(tile.tile_state[KEY]) for tile in find_tiles(both).values()}
    assert len(keys) == len(find_tiles(both)) == 2
    at_once = convert_to_lrtt(nn.Sequential(*(nn.Linear(4, 4) for _ in range(2))), DIGITAL)
    stepwise = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)))
    for name in ("1", "0"):
        convert_to_lrtt(stepwise, DIGITAL, include=[name])
    for a, b in zip(at_once, stepwise, strict=True):
        assert a.tile_state[KEY] == b.tile_state[KEY]


class Special(nn.Linear):
    """A subclass with a multiplication of its own."""


def odd_layers():
    """name -> (module, the layer that must stay digital, part of the reason)."""
    tied = nn.ModuleDict({"embed": nn.Embedding(5, 4), "odd": nn.Linear(4, 5, bias=False), "fine": nn.Linear(4, 4)})
    tied["odd"].weight = tied["embed"].weight
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    old_norm = nn.Linear(4, 4)
    old_norm.weight = nn.Parameter(torch.ones(4, 4))
    del old_norm._parameters["weight"]
    old_norm.weight = torch.ones(4, 4)  # as torch.nn.utils.weight_norm leaves it
    return {
        "tied": (tied, "odd", "its weight is shared with another layer"),
        "parametrized": (nn.ModuleDict({"odd": parametrized, "fine": nn.Linear(4, 4)}), "odd", "parametrized"),
        "no_parameter": (
            nn.ModuleDict({"odd": old_norm, "fine": nn.Linear(4, 4)}),
            "odd",
            "its weight is not a parameter",
        ),
        "attention": (
            nn.ModuleDict({"mha": nn.MultiheadAttention(4, 2), "fine": nn.Linear(4, 4)}),
            "mha.out_proj",
            "MultiheadAttention reads its weight directly",
        ),
        "grouped": (
            nn.ModuleDict({"odd": nn.Conv1d(4, 4, 3, groups=2), "fine": nn.Linear(4, 4)}),
            "odd",
            "grouped convolution",
        ),
        "padding": (
            nn.ModuleDict({"odd": nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), "fine": nn.Linear(4, 4)}),
            "odd",
            "padding mode circular",
        ),
        "dtype": (
            nn.ModuleDict({"odd": nn.Linear(4, 4, dtype=torch.bfloat16), "fine": nn.Linear(4, 4)}),
            "odd",
            "dtype torch.bfloat16",
        ),
        "subclass": (nn.ModuleDict({"odd": Special(4, 4), "fine": nn.Linear(4, 4)}), "odd", "a Special"),
    }


@pytest.mark.parametrize("case", odd_layers())
def test_layers_that_stay_digital_are_named(case, caplog):
    """Regression for attention, parametrized layers and subclasses: they stayed digital, but nothing said so."""
    model, name, reason = odd_layers()[case]
    layer = model.get_submodule(name)
    with caplog.at_level(logging.WARNING):
        convert_to_lrtt(model, DIGITAL)
    assert list(find_tiles(model)) == ["fine"]
    assert model.get_submodule(name) is layer
    assert f"kept digital: {name} ({reason}" in caplog.text


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "padding_mask"])
@pytest.mark.parametrize("nested", [False, True], ids=["layer", "encoder"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformer_encoder_reads_its_factors(mode, masked, nested):
    """Perturb A: the output changes in every mode, with and without the fast path's padding mask. Regression: an
    encoder built for nested tensors still packed its input and bypassed or refused the tiles.
    """
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2) if nested else layer
    convert_to_lrtt(model, DIGITAL)
    model.train(mode == "train")
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None

    def run():
        with context():
            return model(randn(0, 2, 5, 8), src_key_padding_mask=mask).detach().clone()

    before = run()
    for tile in find_tiles(model).values():
        fill(tile, 1.0)
    after = run()
    assert (after - before).abs().max() > 0.1
    convert_to_digital(model)
    valid = ~mask if masked else torch.ones(2, 5, dtype=torch.bool)  # the fast path leaves zeros elsewhere
    torch.testing.assert_close(run()[valid], after[valid], rtol=0, atol=1e-5)  # layer norms: values below 5, sums of 16


def test_fast_path_comes_back_with_digital_layers():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    before = model.layers[0].activation_relu_or_gelu, model.use_nested_tensor
    assert all(before)
    convert_to_lrtt(model, DIGITAL)
    assert not model.layers[0].activation_relu_or_gelu and not model.use_nested_tensor
    convert_to_digital(model)
    assert (model.layers[0].activation_relu_or_gelu, model.use_nested_tensor) == before


def test_bounded_devices_clip_what_they_take_over():
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight.fill_(2.0)
    tile = LRTTLinear.from_digital(linear, LRTTConfig(rank=2, visible_device=devices.Ideal(w_max=0.5)))
    assert torch.equal(tile.weight.detach(), torch.full((3, 4), 0.5))


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])
def test_digital_checkpoint_loads_by_name(config):
    """Strictly, with fresh factors: A = 0 and a B that was not used before."""
    torch.manual_seed(0)
    source, model = Net(), convert_to_lrtt(Net(), config)
    fill(model.head[1])
    old_b = model.head[1].B.detach().clone()
    model.load_state_dict(source.state_dict())
    torch.testing.assert_close(model(images()), source(images()), rtol=0, atol=64 * 10 * 2.0**-24)
    assert model.head[1].A.count_nonzero() == 0
    assert not torch.equal(model.head[1].B, old_b)


def test_digital_checkpoint_is_clipped_to_the_device():
    model = convert_to_lrtt(
        nn.Sequential(nn.Linear(4, 4)), LRTTConfig(rank=2, visible_device=devices.Ideal(w_max=0.5, w_min=-0.5))
    )
    model.load_state_dict({"0.weight": torch.full((4, 4), 3.0), "0.bias": torch.zeros(4)})
    assert torch.equal(model[0].weight.detach(), torch.full((4, 4), 0.5))


def test_lrtt_checkpoint_restores_everything():
    """Parameters, counters and key, with their dtypes; a missing buffer is an error, not a fresh start."""
    source, model = (convert_to_lrtt(Net(), LRTTConfig(rank=2, seed=seed)) for seed in (0, 1))
    source.head[1].tile_state[CYCLE] = 5
    fill(source.head[1])
    model.load_state_dict(source.state_dict())
    for name, tensor in source.state_dict().items():
        assert same_bits(tensor, model.state_dict()[name]), name
    state = source.state_dict()
    del state["head.1.tile_state"]
    with pytest.raises(RuntimeError, match=r"head\.1\.tile_state"):
        model.load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_links_survive_loading(assign):
    source, model = (LRTTLinear(4, 3, config=DIGITAL) for _ in range(2))
    model.load_state_dict(source.state_dict(), assign=assign)
    assert all(p.tile.module is model for p in (model.weight, model.A, model.B))


# ------------------------------------------------------------------ arguments and dtypes

ERRORS = {
    "rank": (
        lambda: LRTTLinear(4, 3, config=LRTTConfig(rank=4)),
        "LRTTLinear: config.rank must be at most min(d, k) = 3, got 4",
    ),
    "conv_rank": (
        lambda: LRTTConv2d(1, 9, 2, config=LRTTConfig(rank=5)),
        "LRTTConv2d: config.rank must be at most min(d, k) = 4, got 5",
    ),
    "inputs": (lambda: LRTTLinear(0, 3, config=DIGITAL), "LRTTLinear: inputs must be >= 1, got 0"),
    "groups": (
        lambda: LRTTConv1d(4, 4, 3, groups=2, config=DIGITAL),
        "LRTTConv1d: groups must be 1, got 2; keep a grouped convolution digital",
    ),
    "padding_mode": (
        lambda: LRTTConv1d(4, 4, 3, padding_mode="circular", config=DIGITAL),
        "LRTTConv1d: padding_mode must be 'zeros', got 'circular'; pad before the layer with F.pad",
    ),
    "same": (lambda: LRTTConv1d(4, 4, 2, padding="same", config=DIGITAL), "an even kernel pads one side more"),
    "config_rank": (lambda: LRTTConfig(rank=0), "LRTTConfig: rank must be >= 1, got 0"),
    "alpha": (
        lambda: LRTTConfig(alpha=0.0),
        "LRTTConfig: alpha must be nonzero, got 0.0; with alpha = 0 the factors never",
    ),
    "gain": (
        lambda: LRTTConfig(reinit_gain=0.0),
        "LRTTConfig: reinit_gain must be finite and > 0, got 0.0; A = B = 0 is a fixed point",
    ),
    "tau": (lambda: LRTTConfig(transfer_lr=0.0), "LRTTConfig: transfer_lr must be nonzero, got 0.0"),
    "uphill": (
        lambda: LRTTConfig(transfer_lr=-1.0),
        "LRTTConfig: transfer_lr must be of the sign of alpha = 1.0, got -1.0",
    ),
    "every": (lambda: LRTTConfig(transfer_every=0), "LRTTConfig: transfer_every must be >= 1, got 0"),
    "unit": (
        lambda: LRTTConfig(transfer_unit="epochs"),
        "transfer_unit must be one of 'steps', 'samples', got 'epochs'",
    ),
    "mode": (lambda: LRTTConfig(transfer_mode="pulsed"), "give C a device"),
    "residual": (
        lambda: LRTTConfig(visible_device=WIDE, transfer_mode="pulsed_residual", reinit="orthogonal"),
        "rows of B that keep a residual cannot be made orthogonal",
    ),
    "residual_um": (
        lambda: LRTTConfig(
            visible_device=WIDE, transfer_mode="pulsed_residual", transfer_pulse=PulseConfig(update_management=False)
        ),
        "without it B saturates too",
    ),
    "bl": (lambda: PulseConfig(desired_bl=15873), "PulseConfig: desired_bl must be between 1 and 15872, got 15873"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_argument_errors(case):
    make, message = ERRORS[case]
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_device_must_be_a_device():
    with pytest.raises(
        TypeError, match=r"fast_device must be a device of lightning_lrtt\.devices or None, got 'SoftBounds'"
    ):
        LRTTConfig(fast_device="SoftBounds")


@pytest.mark.parametrize(
    ("config", "dtype"), [(DIGITAL, torch.float16), (PULSED, torch.float64)], ids=["half", "pulsed_double"]
)
def test_dtypes_are_checked_on_construction(config, dtype):
    with pytest.raises(TypeError, match="LRTTLinear: dtype must be float32"):
        LRTTLinear(4, 3, config=config, dtype=dtype)


def test_refused_cast_changes_nothing():
    """Regression: .bfloat16() raised after the weights had been rounded."""
    layer = LRTTLinear(4, 3, config=DIGITAL)
    before = layer.weight.detach().clone()
    with pytest.raises(TypeError, match="keep the tile in float32 and use autocast"):
        layer.bfloat16()
    assert same_bits(layer.weight.detach(), before) and layer.A.dtype == torch.float32
    layer.double()
    assert layer.B.dtype == torch.float64 and layer.tile_state.dtype == torch.int64


@pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])
def test_construction_under_a_device_context(config):
    """Regression: `with torch.device(...)`, which Trainer.init_module and configure_model use, put the packed numbers
    on that device and failed to draw a key on meta.
    """
    with torch.device("meta"):
        layer = LRTTLinear(4, 3, config=config)
    assert layer.weight.is_meta and layer.hyper.is_cpu
    layer.to_empty(device="cpu").reset_parameters()
    layer(randn(0, 2, 4)).sum().backward()
    LRTT(layer.parameters(), lr=0.1).step()
    assert layer.A.isfinite().all() and layer.tile_state[KEY] != 0


@pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_channels_last(config, when):
    """Regression: channels_last, asked for before or after the conversion, made C unreadable for the kernels."""
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 6, 3))
        if when == "before":
            model = model.to(memory_format=memory_format)
        model = convert_to_lrtt(model, dataclasses.replace(config, alpha=1.0))
        if when == "after":
            model = model.to(memory_format=memory_format)
        optimizer = LRTT(model.parameters(), lr=0.1)
        x = torch.randint(-2, 3, (2, 4, 5, 5), generator=torch.Generator().manual_seed(1)).float()
        with torch.no_grad():  # whole numbers: sums are exact in any order
            model[0].B.copy_(torch.randint(-1, 2, model[0].B.shape, generator=torch.Generator().manual_seed(2)))
        model(x.to(memory_format=memory_format)).sum().backward()
        optimizer.step()
        model[0].flush()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
