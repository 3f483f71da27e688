"""Reads of small layers as one operator forward and one backward, which GPUs run in a launch each.

On a CPU the operators are formulas, and a layer never asks for them; here it is made to.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_lrtt import LRTT, LRTTConfig, devices
from lightning_lrtt.nn import LRTTLinear, linear

WIDE = devices.Ideal(w_max=10.0, w_min=-10.0)
CONFIGS = {
    "digital": LRTTConfig(rank=2, alpha=0.7),
    "samples": LRTTConfig(rank=2, alpha=0.7, transfer_unit="samples"),
    "pulsed": LRTTConfig(rank=2, alpha=0.7, fast_device=WIDE, visible_device=WIDE),
}
SHAPES = [(5, 6), (2, 3, 6), (6,)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every layer is small; the passes that took the operators."""
    found: list[str] = []

    def is_small(rows: Tensor, c: Tensor, r: int) -> bool:
        found.append("asked")
        return True

    monkeypatch.setattr(linear, "is_small", is_small)
    return found


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
def test_outputs_and_gradients(calls, name, shape, bias):
    """Those of the formula; tolerance: sums of at most 30 float32 products of numbers of size 1.

    What the latch keeps of the gradients is a copy, equal to ``p.grad`` to the bit.
    """
    own, generator = layer(CONFIGS[name], bias), torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator).requires_grad_()
    grad = torch.randn((*shape[:-1], 4), generator=generator)
    y = own(x)
    y.backward(grad)
    other = x.detach().clone().requires_grad_()
    expected, leaves = dense(own, other)
    expected.backward(grad)
    found = [y, x.grad, own.A.grad, own.B.grad, *([own.bias.grad] if bias else [])]
    for ours, theirs in zip(found, [expected, other.grad, *(leaf.grad for leaf in leaves)], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert calls
    assert own.latch.samples == x[..., 0].numel()
    if name == "pulsed":
        assert own.latch.grad_a is not own.A.grad
        assert torch.equal(own.latch.grad_a, own.A.grad) and torch.equal(own.latch.grad_b, own.B.grad)


def test_gradients_of_several_passes_add_up(calls):
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


def test_a_first_layer_asks_for_no_gradient_of_its_input(calls):
    own, x = layer(CONFIGS["digital"]), torch.randn(5, 6)
    own(x).sum().backward()
    assert x.grad is None and own.A.grad is not None


@pytest.mark.parametrize("name", ["digital", "samples"])
def test_second_derivatives_of_digital_tiles(calls, name):
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
    assert calls
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_second_derivatives_of_pulsed_tiles_are_refused(calls):
    own, x = layer(CONFIGS["pulsed"]), torch.randn(5, 6).requires_grad_()
    (slope,) = torch.autograd.grad(own(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def test_function_transforms_read_digital_tiles_by_their_operations(calls):
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
