"""HopfieldConvNet and ResistiveMLP against autograd, Kirchhoff's laws and backpropagation through time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from free_nudged_helpers import DOUBLE, data
from torch import Tensor

from lightning_lrtt import LRTTConfig, convert_to_lrtt
from lightning_lrtt.free_nudged import (
    Estimator,
    FreeNudgedModule,
    HopfieldConvNet,
    HopfieldMLP,
    ResistiveLayer,
    ResistiveMLP,
    System,
    TwoPhase,
    agreement,
    bptt,
    energy_trace,
    estimate,
)
from lightning_lrtt.nn import find_tiles

IMAGES = torch.randn(
    6, 2, 9, 8, generator=torch.Generator().manual_seed(1), dtype=DOUBLE
)  # an odd height: pooling drops a row
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def convnet(**kwargs: Any) -> HopfieldConvNet:
    torch.manual_seed(0)
    return HopfieldConvNet((2, 9, 8), [4, 5], 3, **({"activation": "tanh"} | kwargs)).double()


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("hidden", [(), (7,)], ids=["no-hidden", "hidden"])
@pytest.mark.parametrize("cost", ["mse", "cross_entropy"])
def test_convnet_estimates_the_gradient_of_bptt(cost: str, hidden: tuple[int, ...], pool: str) -> None:
    """Centered; from beta .04 to .02 the error quarters. Max pooling is not smooth: its routes must not switch between
    the phases, so only the limit is compared; and with states of both signs they may switch for ever.
    """
    system = convnet(pool=pool, hidden=hidden, cost=cost, activation="tanh" if pool == "avg" else "hard_sigmoid")
    reference = bptt(system, IMAGES, LABELS, 150)
    errors = [
        float(agreement(estimate(TwoPhase(system, Estimator(beta=b), 150, 100), IMAGES, LABELS), reference).error)
        for b in ((0.04, 0.02) if pool == "avg" else (1e-5, 1e-6))
    ]
    assert errors[0] < (0.01 if pool == "avg" else 1e-4)
    assert pool == "max" or 3.5 < errors[0] / errors[1] < 4.5


@pytest.mark.parametrize("form", ["difference", "direct"])
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("tiles", [False, True], ids=["dense", "tiles"])
def test_convnet_surrogate_is_the_difference_of_energies(tiles: bool, pool: str, form: str) -> None:
    """Its gradient is autograd's for `energy`, on plain layers and on tiles (factors and biases)."""
    system = convnet(pool=pool, hidden=(7,))
    if tiles:
        convert_to_lrtt(system, LRTTConfig(rank=2, alpha=0.5))
        assert len(find_tiles(system)) == 4
        for tile in find_tiles(system).values():
            torch.nn.init.normal_(tile.A, std=0.2)
    engine = TwoPhase(system, Estimator(), 20, 8, form=form)  # type: ignore[arg-type]
    outcome = engine.run(IMAGES, LABELS)
    parameters = [p for p in system.parameters() if p.requires_grad]
    found = torch.autograd.grad(engine.surrogate(IMAGES, outcome), parameters)
    by_energy = System.contrast(system, x=IMAGES, target=outcome.target, phases=outcome.phases, form=form) / 0.1
    expected = torch.autograd.grad(by_energy, parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


def test_convnet_bad_input() -> None:
    with pytest.raises(ValueError, match="kernel must be odd, got 2"):
        HopfieldConvNet((1, 8, 8), [4], 2, kernel=2)
    with pytest.raises(ValueError, match="few enough for 4 poolings by 2 of 8x8"):
        HopfieldConvNet((1, 8, 8), [4, 4, 4, 4], 2)
    with pytest.raises(ValueError, match=r"lies in \(-1, 1\)"):
        FreeNudgedModule(HopfieldConvNet((1, 8, 8), [4], 2), Estimator(beta=1.0))
    with pytest.raises(ValueError, match="kind must be other than 'holomorphic'"):
        FreeNudgedModule(HopfieldConvNet((1, 8, 8), [4], 2), Estimator(kind="holomorphic", points=4))


# ------------------------------------------------------------------ resistors


def resistive(sizes: tuple[int, ...] = (12, 10, 8, 4), **kwargs: Any) -> ResistiveMLP:
    torch.manual_seed(0)
    return ResistiveMLP(sizes, **kwargs).double()


def settled(system: ResistiveMLP, x: Tensor, steps: int = 400) -> dict[str, Tensor]:
    return TwoPhase(system, Estimator(), 1, 1).free(x, steps)


def test_kirchhoff_without_diodes() -> None:
    """No hidden layer: each output node is the mean of the inputs, weighted by its conductances."""
    system = resistive((12, 4), gain=2.0)
    x, _ = data()
    g = system.layers[0].conductance.detach()
    voltages = system.nodes(settled(system, x))
    torch.testing.assert_close(voltages, 2.0 * torch.cat([x, -x], 1) @ g.t() / g.sum(1), rtol=1e-12, atol=1e-13)


def test_diodes_and_currents_balance() -> None:
    """At each hidden node the net current is 0, or the diode holds 0 V against a current that would push through it."""
    system = resistive()
    x, _ = data()
    states = {name: v.requires_grad_() for name, v in settled(system, x).items()}
    context = system.prepare(x=x, differentiable=False)
    energy = system.energy(x=x, context=context, states=states).sum()
    currents = torch.autograd.grad(energy, list(states.values()))  # dE/dv: the current that leaves the node
    for index, (v, current) in enumerate(zip(states.values(), currents, strict=True)):
        held = v == 0
        assert float(current[~held].abs().max()) < 1e-9
        if index < 2:
            half = v.shape[1] // 2
            assert bool((v[:, :half] >= 0).all()) and bool((v[:, half:] <= 0).all())
            assert bool((current[:, :half][held[:, :half]] >= 0).all())
            assert bool((current[:, half:][held[:, half:]] <= 0).all())
            assert 0.05 < float(held.float().mean()) < 0.95  # the diodes do something


def test_power_never_rises() -> None:
    trace = energy_trace(resistive(), data()[0], 40)
    assert bool((trace.diff() <= 1e-12).all())


@pytest.mark.parametrize("cost", ["mse", "cross_entropy"])
def test_resistive_estimates_the_gradient_of_bptt(cost: str) -> None:
    system = resistive(cost=cost)
    x, y = data()
    reference = bptt(system, x, y, 300)
    # Small nudges: diodes that switch between the phases break the order.
    found = agreement(estimate(TwoPhase(system, Estimator(beta=1e-4), 300, 300), x, y), reference)
    assert float(found.error) < 1e-4 and float(found.cosine) > 0.999999


def test_resistive_learns_with_conductances_above_zero() -> None:
    """200 steps of SGD with projection: the cost falls below 60% of its start."""
    system = resistive((12, 16, 4))
    module = FreeNudgedModule(system, Estimator(beta=0.05), 30, 10)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    x, y = data()
    costs = []
    for _ in range(200):
        optimizer.zero_grad()
        outcome = module.engine.run(x, y)
        module.engine.surrogate(x, outcome).backward()
        module.optimizer_step(0, 0, optimizer)
        costs.append(float(outcome.cost))
        assert all(float(layer.conductance.min()) >= 0 for layer in system.layers)
    assert costs[-1] < 0.6 * costs[0]


def test_a_node_without_conductance_stays_at_zero() -> None:
    """A dead hidden node and a dead output: finite states in all phases and finite gradients of both kinds; the rest of
    the network relaxes as a network that never had the hidden node.
    """
    system = resistive((12, 10, 4))
    x, y = data()
    with torch.no_grad():
        system.layers[0].conductance[3] = system.layers[1].conductance[:, 3] = -0.1
    system.project()
    smaller = resistive((12, 10, 4))
    left = [i for i in range(10) if i != 3]
    with torch.no_grad():
        smaller.layers[0].conductance = torch.nn.Parameter(system.layers[0].conductance[left])
        smaller.layers[1].conductance = torch.nn.Parameter(system.layers[1].conductance[:, left])
    context = smaller.prepare(x=x, differentiable=False)
    assert all(bool(load.isfinite().all()) for load in context.loads)
    hidden, outputs = settled(system, x).values()
    assert bool((hidden[:, 3] == 0).all())
    torch.testing.assert_close(outputs, _outputs_of(smaller, x), rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        system.layers[1].conductance[0] = 0.0  # an output node too: a nudge would push a current into nothing
    outcome = (engine := TwoPhase(system, Estimator(), 30, 10)).run(x, y)
    assert all(bool(v.isfinite().all()) for phase in outcome.phases for v in phase.states.values())
    for found in (estimate(engine, x, y), bptt(system, x, y, 30)):
        assert all(bool(g.isfinite().all()) for g in found.values())


def _outputs_of(system: ResistiveMLP, x: Tensor) -> Tensor:
    """Of a network with 4 nodes >= 0 and 5 nodes <= 0: sweeps by hand."""
    g0, g1 = (layer.conductance.detach() for layer in system.layers)
    inputs = system.gain * torch.cat([x, -x], 1)
    out = torch.zeros(len(x), len(g1), dtype=x.dtype)
    for _ in range(400):
        hidden = (inputs @ g0.t() + out @ g1) / (g0.sum(1) + g1.sum(0))
        hidden = torch.cat([hidden[:, :4].clamp(min=0.0), hidden[:, 4:].clamp(max=0.0)], 1)
        out = hidden @ g1.t() / g1.sum(1)
    return out


def test_resistive_bad_input() -> None:
    with pytest.raises(ValueError, match="sizes must be even for hidden layers"):
        ResistiveMLP([4, 5, 2])
    with pytest.raises(ValueError, match="gain must be finite and > 0"):
        ResistiveMLP([4, 2], gain=0.0)
    with pytest.raises(ValueError, match="kind must be one that nudges for this system, got 'contrastive'"):
        FreeNudgedModule(resistive(), Estimator(kind="contrastive"))
    with pytest.raises(ValueError, match="outputs must be >= 1, got 0"):
        ResistiveLayer(3, 0)


# ------------------------------------------------------------------ mixed precision


class ByEnergy(System):
    """Two linear layers whose surrogate is the default one."""

    def __init__(self) -> None:
        super().__init__(rate=0.3)
        self.a, self.b = torch.nn.Linear(12, 16), torch.nn.Linear(16, 4)

    def start(self, *, x: Tensor, context: Any) -> dict[str, Tensor]:
        return {"h": x.new_zeros(len(x), 16), "o": x.new_zeros(len(x), 4)}

    def energy(self, *, x: Tensor, context: Any, states: dict[str, Tensor]) -> Tensor:
        h, o = states["h"], states["o"]
        coupled = (h.tanh() * self.a(x)).sum(1) + (o * self.b(h.tanh())).sum(1)
        return 0.5 * (h.square().sum(1) + o.square().sum(1)) - coupled

    def cost(self, *, states: dict[str, Tensor], target: Tensor) -> Tensor:
        return 0.5 * (states["o"] - target).square().sum(1)

    def output(self, *, states: dict[str, Tensor]) -> Tensor:
        return states["o"]

    def encode(self, *, target: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(target, 4).float()


@pytest.mark.parametrize("beta", [0.1, 0.02])
@pytest.mark.parametrize(
    ("make", "bound"),
    [
        (lambda: ResistiveMLP([12, 16, 4]), 1e-5),
        (ByEnergy, 1e-5),
        (lambda: HopfieldMLP([12, 16, 4]), 0.005),
        (lambda: HopfieldConvNet((1, 4, 3), [8], 4, pool="max"), 0.005),
    ],
    ids=["resistive", "by_energy", "hopfield", "max_pool"],
)
def test_mixed_precision_rounds_no_whole_states(make: Any, bound: float, beta: float) -> None:
    """The gradient under autocast against that without: energies that are subtracted are not rounded to 8 bits."""
    torch.manual_seed(0)
    system = make()
    x, y = data(32, dtype=torch.float32)
    x = x.view(32, 1, 4, 3) if isinstance(system, HopfieldConvNet) else x
    engine = TwoPhase(system, Estimator(beta=beta), 60, 20)

    def gradients(mixed: bool) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            surrogate = engine.surrogate(x, engine.run(x, y))
        return dict(zip(names, torch.autograd.grad(surrogate, list(system.parameters())), strict=True))

    names = [name for name, _ in system.named_parameters()]
    assert float(agreement(gradients(True), gradients(False)).error) < bound


def test_max_pooling_takes_the_routes_of_relaxation() -> None:
    """Products rounded to 8 bits have ties and other maxima: the surrogate would send states to other pixels."""
    system = HopfieldConvNet((2, 32, 32), [4], 3, pool="max")
    lower, s = torch.rand(4, 2, 32, 32), torch.rand(4, 4, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = system._unpool(0, s, lower)
    assert torch.equal(found, system._unpool(0, s, lower))


def test_diagnostics_do_not_follow_autocast() -> None:
    """Estimate, reference and energies of a resistive network, asked for under autocast."""
    torch.manual_seed(0)
    system = ResistiveMLP([12, 16, 4])
    x, y = data(32, dtype=torch.float32)
    engine = TwoPhase(system, Estimator(beta=0.02), 60, 20)
    with torch.autocast("cpu", torch.bfloat16):
        found, reference, trace = estimate(engine, x, y), bptt(system, x, y, 60), energy_trace(system, x, 10)
    assert float(agreement(found, estimate(engine, x, y)).error) < 1e-5
    assert float(agreement(reference, bptt(system, x, y, 60)).error) < 1e-5
    torch.testing.assert_close(trace, energy_trace(system, x, 10))
