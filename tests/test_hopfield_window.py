"""The compiled window of a Hopfield network: against torch's products, and the order of its sums.

Tolerance: a step rounds sums of K products of size about 1, K eps / 2 relative in the worst case and sqrt(K) eps in
practice, differently in the two orders; relaxation contracts here, so steps do not add up more than a few of them.
K <= 70 in float32: 70 * 6e-8 * 1 = 4e-6; 1e-5 leaves room for tanh and exp (2e-7 each).
"""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from torch import Tensor

from lightning_lrtt import build_info
from lightning_lrtt.free_nudged import Estimator, HopfieldMLP, States, TwoPhase, fused

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


def test_samples_do_not_see_each_other() -> None:
    """A sample's bits do not depend on the batch it is in, so stacked windows are those run one by one."""
    system = network(SIZES["deep"])
    x, y = torch.rand(N, 12), torch.arange(N) % 5
    results = []
    for system.stackable in (True, False):
        outcome = TwoPhase(system, Estimator(beta=0.2), 8, 4).run(x, y)
        results.append([phase.states[name] for phase in outcome.phases for name in ("odd", "even")])
    for one, other in zip(*results, strict=True):
        if build_info()["cpu_instructions"] != "base":
            assert torch.equal(one, other)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_matter(threads: int) -> None:
    """The same bits for any number of threads, of the same drives (those are products of torch)."""
    system = network(SIZES["deep"])
    odd, even = torch.rand(N, 73), torch.rand(N, 75)
    with torch.no_grad():
        context = system.prepare(x=torch.rand(N, 12), differentiable=False)
    before, results = torch.get_num_threads(), []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            results.append(fused.window(system, context, odd, even, None, None, None, 5))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_falls_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Float64, complex states and recorded gradients go by torch's products."""
    matrix = torch.zeros(3, 4)
    with caplog.at_level(logging.DEBUG, "lightning_lrtt"):
        assert not fused.serves(matrix, matrix)
        with torch.no_grad():
            assert not fused.serves(matrix.double(), matrix.double())
            assert not fused.serves(matrix.to(torch.complex64), matrix.to(torch.complex64))
            assert not fused.serves(matrix.to("meta"), matrix.to("meta"))
            assert fused.serves(matrix, matrix) == (build_info()["cpu_instructions"] != "base")
    said = ("gradients are recorded", "float64, not float32", "complex64, not float32", "no kernel")
    assert all(word in text for word, text in zip(said, caplog.messages, strict=False))
    assert len(caplog.messages) >= len(said)


def test_opcheck() -> None:
    """Schema, fake and kernel agree."""
    arguments = (torch.rand(3, 4), torch.rand(5, 3), torch.rand(4), torch.rand(5, 3), torch.rand(5, 4))
    numbers = (2, False, 2, True, 0, 3)
    op = torch.ops.lrtt.hopfield_window.default
    torch.library.opcheck(op, (*arguments, None, None, *numbers, 0))
    torch.library.opcheck(op, (*arguments, torch.rand(5, 2), torch.full((), 0.1), *numbers, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.rand(5, 4)}, r"odd_drive must be \[5, 3\], got \[5, 4\]"),
        ({0: torch.rand(3, 4).double()}, "matrix must be float32, got torch.float64"),
        ({3: torch.rand(3, 5).t()}, "odd must be contiguous"),
        ({5: torch.rand(5, 2)}, "target and beta must be given as nudge 0 needs them"),
        ({7: -1}, "steps must be at least 0, got -1"),
        ({9: 9}, "outputs must be some of their group's states, got 9"),
        ({11: 7}, "rho, output_rho and nudge must be of RHO and NUDGE"),
    ],
)
def test_bad_arguments(change: dict[int, object], message: str) -> None:
    arguments: list[object] = [torch.rand(3, 4), torch.rand(5, 3), torch.rand(4), torch.rand(5, 3), torch.rand(5, 4)]
    arguments += [None, None, 2, False, 2, True, 0, 3, 0]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.lrtt.hopfield_window(*arguments)
