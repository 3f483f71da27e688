"""The compiled window of a Hopfield network: against torch's products, and the order of its sums.

Tolerance: a step rounds sums of K products of size about 1, K eps / 2 relative in the worst case and sqrt(K) eps in
practice, differently in the two orders; relaxation contracts here, so steps do not add up more than a few of them.
K <= 70 in float32: 70 * 6e-8 * 1 = 4e-6; 1e-5 leaves room for tanh and exp (2e-7 each).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightning_lrtt.free_nudged import HopfieldMLP, States, fused

SIZES = {"deep": (12, 40, 70, 33, 5), "odd_outputs": (12, 16, 9, 4), "one_layer": (7, 3), "two_layers": (9, 33, 65)}
CASES = [
    (activation, output, cost)
    for activation, output, cost in itertools.product(
        ("tanh", "sigmoid", "hard_sigmoid", "linear"), ("linear", "tanh", "hard_sigmoid"), ("mse", "cross_entropy")
    )
    if (activation, output) in {(activation, "linear"), ("tanh", "tanh"), ("hard_sigmoid", "hard_sigmoid")}
]
N = 37  # no multiple of a tile


def network(sizes: tuple[int, ...], **kwargs: object) -> HopfieldMLP:
    torch.manual_seed(0)
    return HopfieldMLP(sizes, gain=0.3, **kwargs)  # type: ignore[arg-type]


@torch.no_grad()
def relaxed(system: HopfieldMLP, compiled: bool, device: str = "cpu", hold: bool = False) -> list[Tensor]:
    """States after a free window of 6 and a nudged one of 3 steps, beta from -0.5 to 0.5, on ``device``."""
    system = system.to(device)
    x = torch.rand(N, system.sizes[0], generator=torch.Generator().manual_seed(1)).to(device)
    y = system.encode(target=torch.arange(N, device=device) % system.sizes[-1])
    beta = torch.linspace(-0.5, 0.5, N, device=device)
    context = system.prepare(x=x, differentiable=False)
    states: States = system.start(x=x, context=context)
    found = []
    for steps, target, strength, clamped in (
        (6, None, None, None),
        (3, y, None if hold else beta, y if hold else None),
    ):
        odd, even = states["odd"], states["even"]
        if compiled:
            if clamped is not None:
                held = system.hold(states, clamped)
                odd, even = held["odd"], held["even"]
            odd, even = fused.window(system, context, odd, even, target, strength, clamped, steps)
            states = {"odd": odd, "even": even}
        else:
            system.fused = False
            states = system.window(
                x=x, context=context, states=states, steps=steps, target=target, beta=strength, clamped=clamped
            )
        found += [states["odd"].cpu(), states["even"].cpu()]
    return found


def assert_near(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["synchronous", "even_odd"])
@pytest.mark.parametrize(("activation", "output", "cost"), CASES)
def test_as_torch(activation: str, output: str, cost: str, order: str) -> None:
    """Every nonlinearity, cost and order."""
    system = network(SIZES["deep"], activation=activation, output=output, cost=cost, order=order)
    assert_near(relaxed(system, True), relaxed(system, False))


@pytest.mark.parametrize("name", SIZES)
def test_shapes(name: str) -> None:
    """Outputs among the odd or the even layers, groups without states, sizes that fit no tile."""
    system = network(SIZES[name])
    assert_near(relaxed(system, True), relaxed(system, False))


def test_held_outputs() -> None:
    """Clamped outputs stay exactly where they are held."""
    system = network(SIZES["deep"])
    compiled = relaxed(system, True, hold=True)
    assert_near(compiled, relaxed(system, False, hold=True))
    y = system.encode(target=torch.arange(N) % 5)
    assert torch.equal(compiled[3][:, -5:], y)


def test_zero_steps_and_untouched_arguments() -> None:
    """A window changes nothing that it is given."""
    system = network(SIZES["deep"])
    with torch.no_grad():
        x = torch.rand(4, 12)
        context = system.prepare(x=x, differentiable=False)
        odd, even = torch.rand(4, 73), torch.rand(4, 75)
        copies = odd.clone(), even.clone()
        assert torch.equal(fused.window(system, context, odd, even, None, None, None, 0)[0], odd)
        fused.window(system, context, odd, even, None, None, None, 3)
    assert torch.equal(odd, copies[0]) and torch.equal(even, copies[1])
