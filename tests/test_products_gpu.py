"""CUDA kernels around a layer's matrix product, against float64: the merged weight, projections, gradients of factors."""

from __future__ import annotations

import pytest
import torch
from gpu_helpers import NEEDS_GPU, state_and_counts

from lightning_lrtt import LRTTConfig, devices
from lightning_lrtt.nn import LRTTLinear
from lightning_lrtt.ops.product_kernels import is_small

pytestmark = NEEDS_GPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("d", "k", "r"), [(33, 260, 3), (70, 1028, 16), (5, 4, 8), (64, 132, 17), (40, 64, 32), (9, 63, 4), (8, 16, 40)]
)
def test_merge(dtype, d, k, r):
    """C + alpha A B in float64 from the same float32 numbers, rounded to dtype.

    Tolerance: half an ulp of the result, and r + 3 roundings in float32 (alpha, alpha a, a sum for each term) of sums no larger
    than the sum of magnitudes.
    """
    generator = torch.Generator().manual_seed(d)
    c, a, b = (torch.randn(shape, generator=generator) for shape in ((d, k), (d, r), (r, k)))
    out, a_t, b_out = torch.ops.lrtt.merge(c.cuda(), a.cuda(), b.cuda(), 0.7, dtype)
    assert torch.equal(a_t.cpu(), a.t().to(dtype)) and torch.equal(b_out.cpu(), b.to(dtype))
    exact = c.double() + 0.7 * a.double() @ b.double()
    scale = c.double().abs() + 0.7 * a.double().abs() @ b.double().abs()
    assert out.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + (r + 3) * 2.0**-24 * scale
    assert bool(((out.cpu().double() - exact).abs() <= 1.001 * bound).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factor_gradients_are_summed_and_kept_in_float32(dtype):
    """Those of A and B under autocast, against float64 from the halves that the layer multiplies.

    Tolerance: N products of halves (exact in float32), added up in float32 in any order: N 2^-24 of the sum of magnitudes.
    A bfloat16 result would be off by up to 2^-9 of itself, a float16 one by 2^-12, which only the largest entries show.
    """
    config = LRTTConfig(rank=8, reinit_gain=1.0, fast_device=devices.SoftBounds(dw_min=0.01))
    layer = LRTTLinear(64, 40, bias=False, config=config, device="cuda")
    torch.nn.init.normal_(layer.A, std=0.1)
    x, d = torch.randn(300, 64, device="cuda"), torch.randn(300, 40, device="cuda").to(dtype)
    with torch.autocast("cuda", dtype):
        layer(x).backward(d)
    (call,) = layer.latch.calls
    for found, left, right in ((layer.A.grad, call.d, call.xb), (layer.B.grad, call.da, call.x)):
        left, right = left.double(), right.double()
        bound = 300 * 2.0**-24 * (left.abs().t() @ right.abs())
        assert bool(((found.double() - left.t() @ right).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [True, False], ids=["float32", "half"])
@pytest.mark.parametrize(("n", "k", "r"), [(4096, 4096, 16), (33, 264, 8), (1, 32, 16), (700, 1056, 3), (17, 96, 16)])
def test_project(dtype, wide, n, k, r):
    """x w^T in float64 from the halves, x in half precision to the bit, and its largest magnitudes.

    Tolerance: k products (exact in float32) added up in float32 in any order, k 2^-24 of the sum of magnitudes, and the
    result in half precision, half an ulp.
    """
    generator = torch.Generator().manual_seed(n + r)
    x, w = torch.randn((n, k), generator=generator), torch.randn((r, k), generator=generator).to(dtype)
    half = x.to(dtype)
    rows = torch.full((n, k + r + 8), 5.0, dtype=dtype, device="cuda")
    z, narrow = rows[:, k : k + r], rows[:, :k]
    if not wide:
        narrow.copy_(half)
    given = x.cuda() if wide else narrow
    top = torch.ops.lrtt.project_(z, given, w.cuda(), narrow if wide else None)
    exact, bound = half.double() @ w.double().t(), half.double().abs() @ w.double().abs().t()
    ulp = torch.finfo(dtype).eps / 2
    assert bool(((z.cpu().double() - exact).abs() <= (k * 2.0**-24 + ulp) * bound).all())
    assert torch.equal(narrow.cpu().view(torch.int16), half.view(torch.int16))
    assert torch.equal(top.cpu(), half.float().abs().amax(1).view(torch.int32))
    assert bool((rows[:, k + r :] == 5.0).all())


def test_given_maxima_are_those_that_the_update_finds():
    """The same update with and without x_top and d_top, to the bit; a wrong one is refused."""
    model, (state, counts) = devices.SoftBounds(dw_min=0.002), state_and_counts()
    hyper = LRTTConfig(rank=1, reinit_gain=1.0, fast_device=model, visible_device=model).pack(40)
    x, d = torch.randn(300, 40).bfloat16().cuda(), torch.randn(300, 24).bfloat16().cuda()
    tops = [v.float().abs().amax(1).view(torch.int32) for v in (x, d)]
    found = []
    for given in ((None, None), ([tops[0]], [tops[1]]), ([tops[0]], None)):
        w, own = torch.zeros(24, 40, device="cuda"), counts.clone().cuda()
        args = ([w], [x], [d], [torch.tensor(0.05, device="cuda")], [state.cuda()], [own], [hyper], [2], [0])
        torch.ops.lrtt.pulsed_update_(*args, None, *given)
        found.append((w, own))
    assert found[0][1][2] > 0
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    with pytest.raises(ValueError, match="x_top and d_top must be int32"):
        torch.ops.lrtt.pulsed_update_(*args, None, [tops[0][:5].clone()], None)


def _within(found, exact, magnitudes, terms):
    """A float32 sum of ``terms`` products in any order: one rounding each."""
    return bool(((found.double().cpu() - exact).abs() <= (terms + 1) * 2.0**-24 * magnitudes).all())


SMALL = [
    (64, 512, 512, 8),
    (33, 31, 130, 16),
    (1, 5, 3, 1),
    (256, 1024, 128, 16),  # all the shared memory there is
    (130, 1020, 4, 12),
    (64, 8, 1024, 16),
    (70, 256, 72, 11),
]


@pytest.mark.parametrize(("n", "d", "k", "r"), SMALL)
def test_small_float32_layers(n, d, k, r):
    """`small_forward` and `small_backward`, their rows within longer ones, against float64; maxima and copies to the bit.

    Tolerance: a sum of products has a rounding for each, in any order, and C + alpha A B r + 2 more in each of its cells.
    """
    generator = torch.Generator().manual_seed(n)
    shapes = ((n, d + 4), (n, k + 4), (d, k), (d, r), (r, k), (d,))
    grad, x, c, a, b, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    on_gpu = [t.cuda() for t in (grad, x, c, a, b, bias)]
    grad, x, (g_own, x_own) = grad[:, :d], x[:, :k], (on_gpu[0][:, :d], on_gpu[1][:, :k])
    assert is_small(x_own, on_gpu[2], r) and is_small(g_own, on_gpu[2], r)
    y, z, x_top = torch.ops.lrtt.small_forward(x_own, *on_gpu[2:], 0.7)
    layer, doubles = on_gpu[2:5], [t.double() for t in (grad, x, c, a, b, bias)]
    dz, *found, d_top = torch.ops.lrtt.small_backward(g_own, x_own, z, *layer, 0.7, True)

    def exact(grad, x, c, a, b, bias, z, dz, alpha=0.7):
        matrix, by_a, by_b = c + alpha * a @ b, alpha * grad.t() @ z, alpha * dz.t() @ x
        return x @ matrix.t() + bias, x @ b.t(), grad @ a, by_a, by_b, by_a, by_b, grad.sum(0), grad @ matrix

    given = [*doubles, z.double().cpu(), dz.double().cpu()]
    terms = (k + r + 3, k, d, n + 1, n + 1, n + 1, n + 1, n, d + r + 3)
    rows = zip((y, z, dz, *found), exact(*given), exact(*(t.abs() for t in given)), terms, strict=True)
    assert all(_within(*row) for row in rows)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert torch.equal(x_top.cpu(), x.abs().amax(1).view(torch.int32))
    assert torch.equal(d_top.cpu(), grad.abs().amax(1).view(torch.int32))
    *same, none, _ = torch.ops.lrtt.small_backward(g_own, x_own, z, *layer, 0.7, False)
    assert none.shape == (0,) and all(torch.equal(p, q) for p, q in zip(same, (dz, *found[:-1]), strict=True))
    without, _, _ = torch.ops.lrtt.small_forward(x_own, *layer, None, 0.7)
    assert torch.equal(without + on_gpu[5], y)


@pytest.mark.parametrize("fast", [None, devices.SoftBounds(dw_min=0.01)], ids=["digital", "pulsed"])
@pytest.mark.parametrize("shape", [(40, 96), (2, 20, 96), (300, 96)], ids=["rows", "sequences", "many"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_small_layer_on_a_gpu_is_the_one_on_a_cpu(shape, fast, transposed):
    """y and all gradients in float32, the operands of the update among them; also of activations that lie by columns.

    Tolerance: sums of at most 96 products of numbers of size 1, in another order.
    """
    config = LRTTConfig(rank=8, alpha=0.5, reinit_gain=1.0, fast_device=fast)
    layer = LRTTLinear(96, 64, config=config, tile=0)
    torch.nn.init.normal_(layer.A, std=0.1)
    found = []
    for device in ("cpu", "cuda"):
        own = LRTTLinear(96, 64, config=config, tile=0, device=device)
        own.load_state_dict(layer.state_dict())
        generator = torch.Generator().manual_seed(1)
        x, grad = (torch.randn((*shape[:-1], size), generator=generator).to(device) for size in (96, 64))
        if transposed:
            x, grad = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, grad))
        x.requires_grad_()
        assert own.takes_one_launch(x) == (device == "cuda" and shape[0] < 300)
        y = own(x)
        y.backward(grad)
        latched = [t for call in own.latch.calls for t in (call.x, call.xb, call.d, call.da)]
        found.append([y, x.grad, own.A.grad, own.B.grad, own.bias.grad, *latched])
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("fast", [None, devices.SoftBounds(dw_min=0.01)], ids=["digital", "pulsed"])
@pytest.mark.parametrize("width", [95, 97])
def test_an_input_of_the_wrong_width_is_refused(width, fast):
    """Not read or written beyond its end; with and without autocast."""
    layer = LRTTLinear(96, 64, config=LRTTConfig(rank=8, reinit_gain=1.0, fast_device=fast), device="cuda")
    for half in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=half), pytest.raises(RuntimeError, match="shape"):
            layer(torch.zeros(5, width, device="cuda"))
