"""The optimizer LRTT: latch, gradient processing, micro-batches, parameter groups, copies of modules, bad operands."""

from __future__ import annotations

import copy
import functools
import io
import weakref

import pytest
import torch
from helpers import quiet, randn, same_bits
from torch import nn

from lightning_lrtt import LRTT, LRTTConfig, NonFiniteError, devices
from lightning_lrtt.nn import LRTTConv2d, LRTTLinear
from lightning_lrtt.nn import conv as conv_module
from lightning_lrtt.ops import COUNTER, STEP
from lightning_lrtt.ops.schema import BLOCK_SAMPLES

SOFT = devices.SoftBounds(dw_min=0.001)
PULSED = LRTTConfig(rank=2, transfer_every=5, reinit_gain=1.0, fast_device=SOFT, visible_device=SOFT)
DIGITAL = LRTTConfig(rank=2, transfer_every=5)
pytestmark = pytest.mark.filterwarnings("ignore:.*reinit_gain='unit' needs")  # rank 2 on bounds of .6
CONFIGS = {"digital": DIGITAL, "pulsed": PULSED}


def make(config=PULSED, bias=True, tile=0):
    """A layer 10 -> 6 with nonzero A, so that B moves on the first step."""
    torch.manual_seed(0)
    layer = LRTTLinear(10, 6, bias, config, tile=tile)
    with torch.no_grad():
        layer.A.copy_(0.1 * randn(5, 6, 2))
    return layer


def whole_numbers(seed, *shape):
    """Operands whose matrix products are exact, so that batching does not change a bit."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def backward(layer, seed=0, n=8):
    """A gradient of whole numbers."""
    (layer(whole_numbers(seed, n, 10)) * whole_numbers(seed + 1, n, 6)).sum().backward()


def bits(layer):
    """Copies of everything that a step may change."""
    return {name: t.clone() for name, t in layer.state_dict().items()}


def assert_same_state(a, b):
    for name in a:
        assert same_bits(a[name], b[name]), name


def stepped(prepare, config=PULSED, lr=0.01, **options):
    """State after ``prepare(layer, optimizer)`` and one step."""
    layer = make(config)
    optimizer = LRTT(layer.parameters(), lr=lr, **options)
    prepare(layer, optimizer)
    optimizer.step()
    return bits(layer)


# ------------------------------------------------------------------ what becomes of the gradient


def test_gradient_of_factors_is_exact():
    """p.grad of a pulsed tile is the digital one, so that logging and clipping keep their meaning; integers are exact."""
    pulsed, digital = make(PULSED), make(DIGITAL)
    state = pulsed.state_dict()
    del state["_extra_state"]  # which says that these are arrays on devices
    digital.load_state_dict(state)
    with torch.no_grad():
        for layer in (pulsed, digital):
            (
                layer.A.copy_(whole_numbers(7, 6, 2)),
                layer.B.copy_(whole_numbers(8, 2, 10)),
                layer.weight.copy_(whole_numbers(9, 6, 10)),
            )
    for layer in (pulsed, digital):
        backward(layer)
    for a, b in zip(pulsed.parameters(), digital.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("factor", [0.5, 0.25, 2.0])
def test_scaled_gradient_scales_the_pulse_rate(factor):
    """Powers of two are exact: scaling p.grad after backward equals scaling lr, bit for bit."""

    def scale(layer, _):
        backward(layer)
        layer.A.grad.mul_(factor), layer.B.grad.mul_(factor)

    scaled = stepped(scale)
    plain = stepped(lambda layer, _: backward(layer), lr=0.01 * factor)
    assert_same_state({n: scaled[n] for n in ("A", "B", "weight", "tile_state")}, plain)


def test_clipping_by_norm_lowers_the_number_of_pulses():
    """Clipped to a tenth of its norm, the gradient sends a tenth of the pulses: 5 standard errors of a Poisson count."""

    def clip(layer, _):
        backward(layer, n=64)
        norm = nn.utils.clip_grad_norm_(layer.parameters(), 1e9)
        nn.utils.clip_grad_norm_(layer.parameters(), float(norm) / 10)

    counts = [
        stepped(prepare, lr=1e-3)["tile_counts"][0].item() for prepare in (lambda la, _: backward(la, n=64), clip)
    ]
    assert counts[0] > 1000
    assert counts[1] == pytest.approx(counts[0] / 10, abs=5 * (counts[0] / 10 + counts[0] / 100) ** 0.5)


def test_zeroed_gradient_sends_no_pulse():
    def zero(layer, _):
        backward(layer)
        layer.A.grad.zero_(), layer.B.grad.zero_()

    after = stepped(zero)
    assert after["tile_counts"][:3].sum() == 0
    assert torch.equal(after["A"], make().A)


def test_loss_scale_cancels():
    """fp16's scaler multiplies the loss by 2^16 and p.grad by 2^-16: the same bits as without it."""

    def scaled(layer, _):
        (2.0**16 * layer(whole_numbers(0, 8, 10)) * whole_numbers(1, 8, 6)).sum().backward()
        for p in (layer.A, layer.B, layer.bias):
            p.grad.mul_(2.0**-16)

    assert_same_state(stepped(scaled), stepped(lambda layer, _: backward(layer)))


# ------------------------------------------------------------------ micro-batches and the latch


def test_micro_batches_equal_one_batch():
    """Two backward passes before a step are one batch in their order, bit for bit."""

    def halves(layer, _):
        x, d = whole_numbers(0, 8, 10), whole_numbers(1, 8, 6)
        for part in (slice(0, 3), slice(3, 8)):
            (layer(x[part]) * d[part]).sum().backward()

    assert_same_state(stepped(halves), stepped(lambda layer, _: backward(layer)))


def test_calls_of_different_shapes_are_applied_one_after_the_other():
    """A layer used on [N, k] and [B, T, k] in one step: all samples count, each call from a fresh block."""

    def two(layer, _):
        (layer(whole_numbers(0, 4, 10)).sum() + layer(whole_numbers(1, 2, 3, 10)).sum()).backward()
        assert layer.latch.samples == 10

    after = stepped(two)
    assert after["tile_counts"][0] > 0 and after["tile_state"][STEP] == 1


@pytest.mark.parametrize("clear", ["optimizer", "optimizer_in_place", "model"])
def test_zero_grad_forgets_the_pass_before(clear):
    """Whichever zero_grad is called, a dropped pass sends no pulse.

    `model.zero_grad()` cannot reach the latch: the next backward finds p.grad gone.
    """

    def dropped(layer, optimizer):
        backward(layer, seed=50)
        if clear == "model":
            layer.zero_grad()
        else:
            optimizer.zero_grad(set_to_none=clear == "optimizer")
            assert not layer.latch.calls and layer.latch.samples == 0
        backward(layer)

    assert_same_state(stepped(dropped), stepped(lambda layer, _: backward(layer)))


def test_step_clears_the_latch():
    layer = make()
    optimizer = LRTT(layer.parameters(), lr=0.01)
    backward(layer)
    optimizer.step()
    assert not layer.latch.calls and layer.latch.samples == 0 and layer.latch.grad_a is None


def test_step_without_backward_does_nothing():
    layer = make()
    before = bits(layer)
    LRTT(layer.parameters(), lr=0.01).step()
    assert_same_state(bits(layer), before)


@pytest.mark.parametrize("unit", ["steps", "samples"])
def test_autograd_grad_of_the_input_latches_nothing(unit):
    """Regression: a gradient penalty or saliency map (`autograd.grad` by x) left operands behind that were pulsed
    later.
    """
    layer = LRTTLinear(10, 6, config=LRTTConfig(rank=2, transfer_unit=unit, fast_device=SOFT), tile=0)
    x = whole_numbers(0, 4, 10).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(grad, layer.effective_weight().sum(0).expand(4, 10))
    assert not layer.latch.calls and layer.latch.samples == 0


def test_input_modified_after_backward_is_refused():
    """Regression: a loader that refills its buffer between backward and step changed the operands silently."""
    layer = make()
    optimizer, x = LRTT(layer.parameters(), lr=0.01), whole_numbers(0, 4, 10)
    layer(x).sum().backward()
    x.zero_()
    with pytest.raises(RuntimeError, match=r"modified in place after backward; pass a copy \(x.clone\(\)\)"):
        optimizer.step()


def test_patches_of_a_convolution_live_one_round(monkeypatch):
    """Regression: all chunks of unfolded patches were made before the first was used."""
    monkeypatch.setattr(conv_module, "_CHUNK_ELEMENTS", 1)  # chunks of one block of samples
    layer = LRTTConv2d(2, 3, 3, config=LRTTConfig(rank=2, fast_device=SOFT), tile=0)
    optimizer, alive, most = LRTT(layer.parameters(), lr=0.01), [], []
    unfold = layer.patches

    def watched(x):
        for first, rows in unfold(x):
            alive.append(weakref.ref(rows))
            most.append(sum(r() is not None for r in alive))
            yield first, rows

    monkeypatch.setattr(layer, "patches", watched)
    layer(randn(0, 8, 2, 20, 20)).square().sum().backward()
    optimizer.step()
    assert len(alive) == -(-8 * 18 * 18 // BLOCK_SAMPLES) == 6
    assert max(most) <= 2


def test_checkpointed_layer_latches_once():
    """torch.utils.checkpoint runs forward twice; the update is that of one pass."""

    def checkpointed(layer, _):
        x = whole_numbers(0, 8, 10)
        (torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) * whole_numbers(1, 8, 6)).sum().backward()

    assert_same_state(stepped(checkpointed), stepped(lambda layer, _: backward(layer)))


@pytest.mark.parametrize(
    "config",
    [*CONFIGS.values(), LRTTConfig(rank=2, transfer_unit="samples", transfer_every=8)],
    ids=[*CONFIGS, "samples"],
)
def test_compiled_model_trains_like_the_eager_one(config):
    """Regression: torch.compile traced the latch away, so pulsed tiles never moved and sample counters never advanced."""

    def compiled(layer, _):
        torch._dynamo.reset()
        model = torch.compile(nn.Sequential(layer), backend="aot_eager")
        (model(whole_numbers(0, 8, 10)) * whole_numbers(1, 8, 6)).sum().backward()

    after = stepped(compiled, config)
    assert after["tile_state"][STEP] == 1
    assert_same_state(after, stepped(lambda layer, _: backward(layer), config))


# ------------------------------------------------------------------ groups and the digital optimizer


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_digital_optimizer_moves_the_rest_only(config):
    """Momentum and weight decay act on the bias alone: A, B, C are the same whatever they are."""
    plain = stepped(lambda layer, _: backward(layer), config)
    heavy = functools.partial(torch.optim.AdamW, weight_decay=0.5)
    other = stepped(lambda layer, _: backward(layer), config, digital=heavy)
    assert not same_bits(plain.pop("bias"), other.pop("bias"))
    assert_same_state(plain, other)


def test_digital_instance_is_shared():
    """A scheduler built on the instance moves the tiles' lr; factors join the group of their C."""
    model = nn.Sequential(make(DIGITAL), nn.Linear(6, 2))
    inner = torch.optim.SGD(
        [{"params": [model[0].weight], "lr": 0.5}, {"params": [model[0].bias, *model[1].parameters()]}], lr=0.1
    )
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
    optimizer = LRTT(digital=inner)
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    assert {id(p) for p in inner.param_groups[0]["params"]} == {
        id(p) for p in (model[0].weight, model[0].A, model[0].B)
    }
    before = model[0].A.detach().clone()
    model(whole_numbers(0, 4, 10)).sum().backward()
    inner.step(), scheduler.step()
    model[0].A.data.copy_(before)
    optimizer.step()
    torch.testing.assert_close(model[0].A.detach(), before - 0.25 * model[0].A.grad)


@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["float", "tensor"])
def test_lr_scale_and_tensor_lr(lr):
    """tile_lr_scale multiplies the group's lr for tiles; a tensor lr (capturable schedules) is read on the device."""
    scaled = stepped(lambda layer, _: backward(layer), lr=lr, tile_lr_scale=0.5)
    plain = stepped(lambda layer, _: backward(layer), lr=0.01)
    if isinstance(lr, float):
        assert_same_state({n: scaled[n] for n in ("A", "B", "weight")}, plain)
    else:  # float32 0.02 is not float64 0.02: the same pulses but for that
        torch.testing.assert_close(scaled["A"], plain["A"], rtol=0, atol=0.02)


def test_added_group_and_state_dict_round_trip():
    model = nn.ModuleList([make(DIGITAL), make(DIGITAL, tile=1)])
    optimizer = LRTT(model[0].parameters(), lr=0.1, digital=functools.partial(torch.optim.SGD, momentum=0.9))
    optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.3})
    assert [index for _, index in optimizer.tiles()] == [0, 1]
    for layer in model:
        backward(layer)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    assert len(state["state"]) == 2  # momentum of two biases, none of a tile
    other = LRTT(
        [{"params": list(layer.parameters())} for layer in model],
        lr=0.7,
        digital=functools.partial(torch.optim.SGD, momentum=0.9),
    )
    other.load_state_dict(state)
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.3]
    assert other.param_groups is other.digital.param_groups and other.state is other.digital.state


def test_factors_alone_are_enough():
    """A user who filters by requires_grad passes A and B but not C: the tile is found and transferred."""
    layer = make(LRTTConfig(rank=2, transfer_every=1))
    optimizer = LRTT([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    before = layer.weight.clone()
    backward(layer)
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_closure():
    layer = make(DIGITAL)
    optimizer = LRTT(layer.parameters(), lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = layer(whole_numbers(0, 4, 10)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)
    assert layer.tile_state[COUNTER] == 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -1.0}, "LRTT: lr must be finite and >= 0, got -1.0"),
        ({"lr": float("nan")}, "LRTT: lr must be finite and >= 0, got nan"),
        ({"tile_lr_scale": 0.0}, "LRTT: tile_lr_scale must be finite and > 0, got 0.0"),
        ({"on_nonfinite": "ignore"}, "LRTT: on_nonfinite must be one of 'raise', 'skip', got 'ignore'"),
        ({"params": None}, "LRTT: params must be given unless digital is an optimizer instance, got None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_argument_errors(kwargs, message):
    layer = make(DIGITAL)
    with pytest.raises(ValueError) as error:
        LRTT(**{"params": layer.parameters(), "lr": 0.1} | kwargs)
    assert str(error.value) == message


def test_params_beside_an_instance_are_refused():
    layer = make(DIGITAL)
    with pytest.raises(ValueError, match="params must be None with a digital optimizer instance"):
        LRTT(layer.parameters(), digital=torch.optim.SGD(layer.parameters(), lr=0.1))


# ------------------------------------------------------------------ copies of modules


def roundtrip(model):
    """Save and load as a whole module."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, roundtrip], ids=["deepcopy", "torch_save"])
def test_copies_train_on_their_own(duplicate, config):
    """The copy's parameters lead to the copy, it has no latch of the original, and both go on alike without touching
    each other.
    """
    model = nn.Sequential(make(config))
    backward(model)  # operands of an unfinished step
    twin = duplicate(model)
    assert not twin[0].latch.calls and twin[0].latch.samples == 0
    for name in ("weight", "A", "B"):
        assert getattr(twin[0], name).tile.module is twin[0]
        assert getattr(model[0], name).tile.module is model[0]
    before = bits(model[0])
    optimizer = LRTT(twin.parameters(), lr=0.01)
    optimizer.zero_grad()
    backward(twin)
    optimizer.step()
    assert_same_state(bits(model[0]), before)
    optimizer = LRTT(model.parameters(), lr=0.01)
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    assert_same_state(bits(model[0]), bits(twin[0]))


def test_shallow_copy_leaves_the_link():
    """Regression: copy.copy moved `.tile` of the shared parameters to the copy; when it died, training stopped
    silently.
    """
    layer = make()
    copy.copy(layer)
    assert layer.weight.tile.module is layer


def test_copy_of_a_parameter_does_not_drag_its_module():
    layer = make()
    twin = copy.deepcopy(layer.weight)
    link = getattr(twin, "tile", None)
    assert not hasattr(link, "module") or link.module is None


# ------------------------------------------------------------------ bad operands


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_operands_change_no_weight(config, bad):
    """No pulse, no step; counted; `check_finite` raises once and names step and count, then only for news."""
    layer = make(config, bias=False)
    optimizer = LRTT(layer.parameters(), lr=0.01)
    backward(layer)
    optimizer.step()
    optimizer.check_finite()
    optimizer.zero_grad()
    before = bits(layer)
    x = whole_numbers(0, 4, 10)
    x[1, 2] = bad
    layer(x).sum().backward()
    optimizer.step()
    after = bits(layer)
    for name in ("A", "B", "weight"):
        assert same_bits(after[name], before[name])
    with pytest.raises(NonFiniteError, match=r"in a tile \[6, 10\], first at optimizer step 1 \(now 2\)"):
        optimizer.check_finite()
    optimizer.check_finite()


def test_resuming_does_not_report_again():
    """Regression: a checkpoint that had counted a non-finite operand raised at the first check of every resumed run."""
    layer, resumed = make(bias=False), make(bias=False)
    optimizer = LRTT(layer.parameters(), lr=0.01)
    layer(torch.full((2, 10), float("nan"))).sum().backward()
    optimizer.step()
    resumed.load_state_dict(layer.state_dict())
    other = LRTT(resumed.parameters(), lr=0.01)
    other.load_state_dict(optimizer.state_dict())
    other.check_finite()


def test_nonfinite_can_be_accepted():
    layer = make(bias=False)
    optimizer = LRTT(layer.parameters(), lr=0.01, on_nonfinite="skip")
    layer(torch.full((2, 10), float("nan"))).sum().backward()
    optimizer.step()
    optimizer.check_finite()
    assert layer.counts()["nonfinite"] > 0


def test_half_precision_autocast_reaches_the_tile():
    """Under bf16 autocast the operands are bf16, the tile float32, gradients float32; the step is a float32 step."""
    layer = make(LRTTConfig(rank=2, fast_device=quiet(devices.SoftBounds)))
    optimizer = LRTT(layer.parameters(), lr=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(whole_numbers(0, 4, 10))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.latch.calls[0].x.dtype == torch.bfloat16
    assert layer.A.grad.dtype == torch.float32
    before = layer.A.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.A, before)
