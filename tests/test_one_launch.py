"""Reads of small layers as one operator forward and one backward, which GPUs run in a launch each.

On a CPU the operators are formulas, and a layer never asks for them; here it is made to.

Tolerances: an entry is a sum of at most 30 float32 products of numbers up to 4 in another order, 30 roundings of 2^-24 of
their magnitudes, which add up to less than 5: 1e-5. Second derivatives and squares multiply two or three such sums: 1e-4.
"""

from __future__ import annotations

import pytest
import torch
from helpers import Operators
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from lightning_lrtt import LRTT, LRTTConfig, devices
from lightning_lrtt.nn import LRTTLinear, linear
from lightning_lrtt.ops import product_kernels

WIDE = devices.Ideal(w_max=10.0, w_min=-10.0)
CONFIGS = {
    "digital": LRTTConfig(rank=2, alpha=0.7),
    "samples": LRTTConfig(rank=2, alpha=0.7, transfer_unit="samples"),
    "pulsed": LRTTConfig(rank=2, alpha=0.7, fast_device=WIDE, visible_device=WIDE),
}
SHAPES = [(5, 6), (2, 3, 6), (6,)]


@pytest.fixture(autouse=True)
def _every_layer_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "is_small", lambda x, c, r: True)


def layer(config: LRTTConfig, bias: bool = True) -> LRTTLinear:
    own = LRTTLinear(6, 4, bias, config, tile=0)
    nn.init.normal_(own.A, std=0.5, generator=torch.Generator().manual_seed(1))
    return own


def dense(own: LRTTLinear, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The layer's formula by ordinary autograd, and its leaves: A, B and the bias."""
    leaves = [p.detach().clone().requires_grad_() for p in (own.A, own.B)]
    if own.bias is not None:
        leaves.append(own.bias.detach().clone().requires_grad_())
    weight = own.weight.detach() + own.config.alpha * leaves[0] @ leaves[1]
    return nn.functional.linear(x, weight, leaves[2] if own.bias is not None else None), leaves


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients(name, shape, bias):
    """Those of the formula.

    What the latch keeps of the gradients is a copy, equal to ``p.grad`` to the bit.
    """
    own, generator = layer(CONFIGS[name], bias), torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator).requires_grad_()
    grad = torch.randn((*shape[:-1], 4), generator=generator)
    with Operators() as operators:
        y = own(x)
        y.backward(grad)
    assert operators.names == ["small_forward", "small_backward"]
    other = x.detach().clone().requires_grad_()
    expected, leaves = dense(own, other)
    expected.backward(grad)
    found = [y, x.grad, own.A.grad, own.B.grad, *([own.bias.grad] if bias else [])]
    for ours, theirs in zip(found, [expected, other.grad, *(leaf.grad for leaf in leaves)], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert own.latch.samples == x[..., 0].numel()
    if name == "pulsed":
        assert own.latch.grad_a is not own.A.grad
        assert torch.equal(own.latch.grad_a, own.A.grad) and torch.equal(own.latch.grad_b, own.B.grad)


def test_gradients_of_several_passes_add_up():
    """As p.grad does, to the bit, and clipping p.grad leaves what backward made."""
    own = layer(CONFIGS["pulsed"])
    optimizer = LRTT(own.parameters(), lr=0.1)
    for seed in range(3):
        own(torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    assert torch.equal(own.latch.grad_a, own.A.grad) and torch.equal(own.latch.grad_b, own.B.grad)
    before = own.latch.grad_a.clone()
    nn.utils.clip_grad_norm_(own.parameters(), 1e-3)
    assert torch.equal(own.latch.grad_a, before) and not torch.equal(own.A.grad, before)
    optimizer.step()
    assert not own.latch.calls


@pytest.mark.parametrize("wanted", [False, True])
def test_a_first_layer_asks_for_no_gradient_of_its_input(wanted):
    own, x = layer(CONFIGS["digital"]), torch.randn(5, 6, requires_grad=wanted)
    with Operators() as operators:
        own(x).sum().backward()
    ((name, args),) = operators.calls[1:]
    assert name == "small_backward" and args[-1] is wanted
    assert (x.grad is not None) == wanted


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_may_be_changed_in_place(name, shape):
    """As those of torch's layers: ReLU(inplace=True), residuals."""
    own, x = layer(CONFIGS[name]), torch.randn(shape, generator=torch.Generator().manual_seed(5))
    y = own(x)
    y += 1.0
    nn.functional.relu(y, inplace=True).sum().backward()
    expected, leaves = dense(own, x)
    nn.functional.relu(expected + 1.0).sum().backward()
    torch.testing.assert_close(own.A.grad, leaves[0].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_reads_the_same_bits(name, context):
    own, x = layer(CONFIGS[name]), torch.randn(5, 6, generator=torch.Generator().manual_seed(6))
    with context(), Operators() as operators:
        y = own(x)
    assert operators.names == ["small_forward"] and not y.requires_grad
    assert torch.equal(y, own(x).detach())


def test_frozen_factors_read_by_ordinary_autograd():
    own = layer(CONFIGS["pulsed"])
    own.A.requires_grad_(False), own.B.requires_grad_(False)
    x = torch.randn(5, 6, requires_grad=True)
    with Operators() as operators:
        own(x).sum().backward()
    assert operators.names == [] and not own.latch.calls
    torch.testing.assert_close(x.grad, own.effective_weight().sum(0).expand(5, 6), rtol=1e-5, atol=1e-5)


def test_any_bias():
    """One of another dtype, or that lies apart in memory."""
    own, x = layer(CONFIGS["digital"]), torch.randn(5, 6, generator=torch.Generator().manual_seed(7))
    for bias in (torch.arange(8.0)[::2], torch.arange(4.0).half()):
        own.bias = nn.Parameter(bias)
        y = own(x)
        y.sum().backward()
        torch.testing.assert_close(y, x @ own.effective_weight().t() + bias.float(), rtol=1e-5, atol=1e-5)
        assert own.bias.grad.dtype == bias.dtype and bool((own.bias.grad == 5.0).all())


def test_shapes_that_disagree_are_refused_by_name():
    """On every device: kernels would read and write beyond their operands."""
    own, operators = layer(CONFIGS["digital"]), torch.ops.lrtt
    x, z, grad = torch.randn(5, 6), torch.randn(5, 2), torch.randn(5, 4)
    layers = (own.matrix, *own.factors())
    with pytest.raises(RuntimeError, match=r"small_forward: shapes must agree, got .*'x': \[5, 5\]"):
        operators.small_forward(x[:, :5], *layers, None, 1.0)
    with pytest.raises(RuntimeError, match=r"small_forward: shapes must agree, got .*'bias': \[3\]"):
        operators.small_forward(x, *layers, torch.zeros(3), 1.0)
    with pytest.raises(RuntimeError, match=r"small_backward: shapes must agree, got .*'grad': \[4, 4\]"):
        operators.small_backward(grad[:4], x, z, *layers, 1.0, True)
    with pytest.raises(RuntimeError, match=r"project_: shapes must agree, got .*'x': \[5, 5\]"):
        operators.project_(z, x[:, :5], own.B.detach(), None)


@pytest.mark.parametrize(
    ("device", "n", "d", "k", "r", "small"),
    [
        ("cuda", (256,), 512, 512, 8, True),
        ("cuda", (8, 32), 512, 512, 8, True),
        ("cuda", (), 1024, 1024, 16, True),
        ("cpu", (64,), 8, 8, 2, False),
        ("cuda", (257,), 8, 8, 2, False),
        ("cuda", (0,), 8, 8, 2, False),
        ("cuda", (1,), 1025, 8, 2, False),
        ("cuda", (1,), 8, 1025, 2, False),
        ("cuda", (1,), 32, 32, 17, False),
        ("cuda", (256,), 512, 512, 9, False),
    ],
)
def test_what_is_small(device, n, d, k, r, small):
    """Inputs and output gradients alike, on a GPU in float32, within the limits of docs/performance.md."""
    with FakeTensorMode():
        c = torch.empty(d, k, device=device)
        for width in (d, k):
            x = torch.empty(*n, width, device=device)
            assert product_kernels.is_small(x, c, r) == small
            assert not product_kernels.is_small(x.bfloat16(), c, r)
        assert not product_kernels.is_small(torch.empty((), device=device), c, r)
        assert not product_kernels.is_small(torch.empty(5, 0, device=device), c, r)


def test_second_derivatives_under_autocast_are_refused(monkeypatch):
    """Also of an input that comes in the autocast dtype, as those of all layers but the first do; none of them is small."""
    monkeypatch.setattr(linear, "is_small", lambda x, c, r: False)
    own, x = layer(CONFIGS["digital"]), torch.randn(5, 6).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (slope,) = torch.autograd.grad(own(x).float().square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.square().sum().backward()


@pytest.mark.parametrize("name", ["digital", "samples"])
@pytest.mark.parametrize("small", [True, False])
def test_hooks_run_once_where_a_gradient_is_differentiated_again(monkeypatch, name, small):
    """Hooks of A, B and the input, and a gradient that an inner tensor retains."""
    monkeypatch.setattr(linear, "is_small", lambda x, c, r: small)
    own, seen = layer(CONFIGS[name]), []
    base = torch.randn(5, 6, generator=torch.Generator().manual_seed(8)).requires_grad_()
    x = base * 1.0
    x.retain_grad()
    for tensor in (own.A, own.B, x):
        tensor.register_hook(lambda g: seen.append(1) or 2 * g)
    own(x).square().sum().backward(create_graph=True)
    assert len(seen) == 3
    other = base.detach().clone().requires_grad_()
    expected, leaves = dense(own, other)
    expected.square().sum().backward()
    for ours, theirs in ((own.A.grad, leaves[0]), (own.B.grad, leaves[1]), (x.grad, other), (base.grad, other)):
        torch.testing.assert_close(ours, 2 * theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["digital", "samples"])
def test_second_derivatives_of_digital_tiles(name):
    """A gradient penalty trains A and B and reaches the input, as through the formula; samples are counted once a pass."""
    own = layer(CONFIGS[name])
    grads = []
    for read in (own, lambda x: dense(own, x)):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()
        y, leaves = read(x), [own.A, own.B, own.bias]
        if isinstance(y, tuple):
            y, leaves = y
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        slope.square().mean().backward()
        grads.append([x.grad, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_second_derivatives_of_pulsed_tiles_are_refused():
    own, x = layer(CONFIGS["pulsed"]), torch.randn(5, 6).requires_grad_()
    (slope,) = torch.autograd.grad(own(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def test_function_transforms_read_digital_tiles_by_their_operations():
    """torch.func, forward-mode differentiation and compilers see through `digital_read`, not through an autograd function."""
    own, x = layer(CONFIGS["digital"]), torch.randn(5, 6, generator=torch.Generator().manual_seed(4))
    weight = own.effective_weight()
    rows = torch.func.vmap(torch.func.grad(lambda one: own(one).square().sum()))(x)
    exact = 2 * (nn.functional.linear(x, weight, own.bias)) @ weight
    torch.testing.assert_close(rows, exact, rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(own(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(tangent, torch.ones_like(x) @ weight.t(), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(own, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), own(x), rtol=1e-5, atol=1e-5)
