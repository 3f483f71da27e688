"""The two-phase engine against closed forms, autograd and backpropagation through time."""

from __future__ import annotations

import doctest
import importlib
import itertools
from typing import Any

import pytest
import torch
from free_nudged_helpers import DOUBLE, LinearOracle, Noisy, SyncCounter, data, network
from torch import Tensor
from torch.nn import functional as F

from lightning_lrtt.free_nudged import (
    Estimator,
    FreeNudgedModule,
    HopfieldMLP,
    System,
    TwoPhase,
    UnregisteredStateError,
    agreement,
    bptt,
    energy_trace,
    estimate,
)
from lightning_lrtt.free_nudged.estimator import KINDS

X, Y = data()
ONE_HOT = F.one_hot(Y, 4).to(DOUBLE)


def estimator(kind: str, beta: float = 0.1) -> Estimator:
    numbers: dict[str, Any] = {} if kind == "contrastive" else {"beta": beta}
    return Estimator(kind=kind, points=6 if kind == "holomorphic" else None, **numbers)  # type: ignore[arg-type]


def gradient(
    system: System, kind: str, beta: float = 0.1, t1: int = 300, t2: int = 300, **kwargs: Any
) -> dict[str, Tensor]:
    return estimate(TwoPhase(system, estimator(kind, beta), t1, t2, **kwargs), X, Y)


def error(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(agreement(one, other).error)


def closed_form(system: HopfieldMLP) -> dict[str, Tensor]:
    """The gradient by differentiating the solved fixed point."""
    names, parameters = zip(*system.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(LinearOracle(system, X, ONE_HOT).cost(), parameters), strict=True))


# ------------------------------------------------------------------ fixed points


@pytest.mark.parametrize("order", ["synchronous", "even_odd"])
@pytest.mark.parametrize(
    "sizes", [(12, 4), (12, 9, 4), (12, 9, 7, 4), (12, 9, 7, 5, 4)], ids=lambda s: f"{len(s) - 2}-hidden"
)
def test_relaxation_reaches_the_closed_form(sizes: tuple[int, ...], order: str) -> None:
    """Free, nudged both ways, with gradients and without: the solution of the linear system, to float64 rounding."""
    system = network(sizes, activation="linear", order=order)
    oracle = LinearOracle(system, X, ONE_HOT)
    for grads, beta in itertools.product((False, True), (0.0, 0.5, -0.3)):
        with torch.set_grad_enabled(grads):
            context = system.prepare(x=X, differentiable=False)
            states = system.window(
                x=X,
                context=context,
                states=system.start(x=X, context=context),
                steps=400,
                target=ONE_HOT,
                beta=torch.tensor(beta, dtype=DOUBLE) if beta else None,
                clamped=None,
            )
        torch.testing.assert_close(torch.cat(system.split(states), 1), oracle.states(beta), rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "hard_sigmoid"])
@pytest.mark.parametrize("output", ["linear", "tanh", "sigmoid", "hard_sigmoid"])
@pytest.mark.parametrize("cost", ["mse", "cross_entropy"])
def test_fixed_points_minimise_the_nudged_energy(activation: str, output: str, cost: str) -> None:
    """There the gradient of E + beta cost by the states vanishes, or points out of the box (hard_sigmoid)."""
    system = network(activation=activation, output=output, cost=cost)
    beta = torch.tensor(0.3, dtype=DOUBLE)
    context = system.prepare(x=X, differentiable=False)
    with torch.no_grad():
        states = system.window(
            x=X,
            context=context,
            states=system.start(x=X, context=context),
            steps=500,
            target=ONE_HOT,
            beta=beta,
            clamped=None,
        )
    leaves = {name: s.clone().requires_grad_() for name, s in states.items()}
    total = system.energy(x=X, context=context, states=leaves) + beta * system.cost(states=leaves, target=ONE_HOT)
    for s, g in zip(leaves.values(), torch.autograd.grad(total.sum(), list(leaves.values())), strict=True):
        hard = (s == 0) & (g > 0) | (s == 1) & (g < 0)
        assert float(g[~hard].abs().max()) < 1e-10


def test_even_odd_relaxation_descends() -> None:
    """Each half-sweep minimises the energy exactly over its layers, so the trace never rises."""
    trace = energy_trace(network(order="even_odd", gain=2.0), X, 50)
    assert bool((trace.diff() <= 1e-12).all()) and float(trace[0] - trace[-1]) > 0.1


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("kind", ["positive", "negative", "centered", "random_sign", "holomorphic"])
def test_gradient_in_the_limit(kind: str) -> None:
    """Beta to 0 gives the gradient of the solved fixed point. The error at 1e-4 is O(beta), rounding 1e-16 / beta."""
    system = network(activation="linear")
    assert error(gradient(system, kind, 1e-4), closed_form(system)) < 1e-3


# From beta = .1 to .05 an error O(beta) halves and an error O(beta^2) quarters, up to the next order in beta.
@pytest.mark.parametrize(
    ("kind", "low", "high"), [("positive", 1.8, 2.2), ("negative", 1.8, 2.2), ("centered", 3.5, 4.5)]
)
@pytest.mark.parametrize("activation", ["linear", "tanh"])
def test_order_of_convergence(activation: str, kind: str, low: float, high: float) -> None:
    system = network(activation=activation)
    reference = closed_form(system) if activation == "linear" else bptt(system, X, Y, 300)
    errors = [error(gradient(system, kind, beta), reference) for beta in (0.1, 0.05)]
    assert low < errors[0] / errors[1] < high


def test_random_sign_is_centered_in_the_mean() -> None:
    """Its two values are `positive` and `negative`, whose mean is `centered` exactly; both signs are drawn."""
    system = network()
    engine = TwoPhase(system, estimator("random_sign"), 100, 50)
    both = [estimate(engine, X, Y, torch.tensor(b, dtype=DOUBLE)) for b in (0.1, -0.1)]
    mean = {name: (both[0][name] + both[1][name]) / 2 for name in both[0]}
    assert error(mean, gradient(system, "centered", 0.1, 100, 50)) < 1e-12
    module = FreeNudgedModule(network(), estimator("random_sign"))
    signs = []
    for step in range(64):
        module.set_step(step)
        signs.append(float(module.beta.sign()))
    assert 16 < signs.count(1.0) < 48  # 4 standard deviations of a fair coin
    assert signs.count(1.0) + signs.count(-1.0) == 64


def test_holomorphic_points() -> None:
    """N = 2 is `centered`; at a beta of .2 the error falls geometrically with the number of points, odd ones too."""
    system = network()
    reference = bptt(system, X, Y, 400)
    found = []
    for points in (2, 3, 4, 8):
        engine = TwoPhase(system, Estimator(kind="holomorphic", beta=0.2, points=points), 400, 400)
        found.append(estimate(engine, X, Y))
    assert error(found[0], gradient(system, "centered", 0.2, 400, 400)) < 1e-12
    two, three, four, eight = (error(g, reference) for g in found)
    # The error is c rho^N for a beta within a radius of convergence R, rho = .2 / R < .3.
    assert three < 0.3 * two and four < 0.3 * three and eight < 0.3**4 * four


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=["float32", "float64"])
def test_acceptance_of_the_large_network(dtype: torch.dtype) -> None:
    """784-512-512-10, T 60/15: centered at .1 within .05 of truncated BPTT, cosine .9995; at .01 in float64 within
    1e-3.
    """
    system = network((784, 512, 512, 10), dtype)
    x, y = data(16, 784, 10, dtype)
    x = x.sigmoid()  # pixels
    reference = bptt(system, x, y, 60)
    found = agreement(estimate(TwoPhase(system, Estimator(beta=0.1), 60, 15), x, y), reference)
    assert float(found.cosine) >= 0.9995 and float(found.error) <= 0.05
    if dtype is DOUBLE:
        close = estimate(TwoPhase(system, Estimator(beta=0.01), 60, 15), x, y)
        assert error(close, reference) <= 1e-3


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize("cost", ["mse", "cross_entropy"])
def test_gradient_descending_updates(cost: str, steps: int) -> None:
    """GDU: after T2 nudged steps the estimate is BPTT through the last T2 free steps, from a converged free state.

    The error at beta 1e-4 is O(beta^2) = 1e-8 times a constant; rounding adds 1e-16 / beta = 1e-12.
    """
    system = network(cost=cost)
    found = gradient(system, "centered", 1e-4, 400, steps)
    assert error(found, bptt(system, X, Y, 400, last=steps)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["difference", "direct"])
def test_surrogate_is_the_difference_of_energies(kind: str, form: str) -> None:
    """The closed-form surrogate has the gradient that autograd finds for the energies of the same phases."""
    system = network()
    engine = TwoPhase(system, estimator(kind), 20, 6, form=form)  # type: ignore[arg-type]
    outcome = engine.run(X, Y)
    names, parameters = zip(*system.named_parameters(), strict=True)
    found = torch.autograd.grad(engine.surrogate(X, outcome), parameters)
    assert sum(complex(p.weight) for p in outcome.phases) == pytest.approx(0.0, abs=1e-12)
    context = system.prepare(x=X, differentiable=True)
    total: Any = 0.0
    for phase in outcome.phases:
        s = phase.states
        hidden = torch.cat([s["odd"], s["even"]], 1)
        w = context.matrix.to(hidden.dtype)
        coupled = (s["odd"] * (s["even"] @ w.t() + context.odd)).sum(1) + s["even"] @ context.even.to(hidden.dtype)
        total = total - complex(phase.weight) * coupled.mean()
    expected = torch.autograd.grad(total.real / (1.0 if kind == "contrastive" else 0.1), parameters)
    for name, one, other in zip(names, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("coupled_positive", 1.8, 2.2), ("coupled_negative", 1.8, 2.2), ("coupled_centered", 3.5, 4.5)],
)
def test_coupled_learning_limit(kind: str, low: float, high: float) -> None:
    """Its limit is the gradient for the cost derivative S (o - y), S the outputs' Hessian with hidden states eliminated
    (Schur complement); on a linear network the estimates converge to it with their order.
    """
    system = network(activation="linear")
    oracle = LinearOracle(system, X, ONE_HOT)
    cut = oracle.starts[-1]
    h = oracle.hessian
    schur = (h[cut:, cut:] - h[cut:, :cut] @ torch.linalg.solve(h[:cut, :cut], h[:cut, cut:])).detach()
    states = oracle.states()
    push = ((states - oracle.y)[:, cut:] @ schur).detach()
    names, parameters = zip(*system.named_parameters(), strict=True)
    reference = dict(zip(names, torch.autograd.grad((states[:, cut:] * push).sum(1).mean(), parameters), strict=True))
    assert error(gradient(system, kind, 1e-5), reference) < 1e-4
    if kind != "coupled_centered":
        errors = [error(gradient(system, kind, beta), reference) for beta in (0.1, 0.05)]
        assert low < errors[0] / errors[1] < high
    else:  # quadratic energies: the odd terms cancel exactly
        assert error(gradient(system, kind, 0.1), reference) < 1e-9
        smooth = network()
        fine = gradient(smooth, kind, 1e-4)
        errors = [error(gradient(smooth, kind, beta), fine) for beta in (0.1, 0.05)]
        assert low < errors[0] / errors[1] < high


def test_contrastive_holds_the_target() -> None:
    system = network()
    outcome = TwoPhase(system, estimator("contrastive"), 100, 100).run(X, Y)
    assert torch.equal(system.output(states=outcome.phases[0].states), ONE_HOT)
    assert outcome.phases[1].states is outcome.free
    assert not torch.equal(outcome.phases[0].states["even"], outcome.free["even"])


# ------------------------------------------------------------------ protocol


@pytest.mark.parametrize("kind", ["positive", "negative"])
@pytest.mark.parametrize("output", ["linear", "tanh"])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=["float64", "float32"])
def test_window_protocol_without_nudge_is_bitwise_free(kind: str, output: str, dtype: torch.dtype) -> None:
    """From the start, beta = 0: the nudged window is the free one; from the free state: T2 more free steps. In float32
    by the compiled window where there is one.
    """
    system = network(output=output, dtype=dtype)
    zero = torch.zeros((), dtype=dtype)
    outcome = TwoPhase(system, estimator(kind), 12, 12, nudge_from="start").run(X, Y, zero)
    nudged = next(p for p in outcome.phases if p.beta is not None)
    assert all(torch.equal(nudged.states[name], outcome.free[name]) for name in outcome.free)
    engine = TwoPhase(system, estimator(kind), 12, 5)
    outcome = engine.run(X, Y, zero)
    nudged = next(p for p in outcome.phases if p.beta is not None)
    longer = engine.free(X, 17)
    assert all(torch.equal(nudged.states[name], longer[name]) for name in longer)
    assert not torch.equal(longer["odd"], outcome.free["odd"])


@pytest.mark.parametrize("kind", ["positive", "centered"])
def test_noise_and_fields_are_restored(kind: str) -> None:
    """A system with its own field and generator: without nudge every phase sees the same noise, bit for bit; afterwards
    it stands where the free window left it.
    """
    system = Noisy()
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    alone = Noisy()
    states = alone.window(
        x=x, context=None, states=alone.start(x=x, context=None), steps=9, target=None, beta=None, clamped=None
    )
    outcome = TwoPhase(system, estimator(kind), 9, 9, nudge_from="start").run(x, y, torch.zeros(()))
    for phase in outcome.phases:
        assert torch.equal(phase.states["s"], states["s"])
    assert torch.equal(system.field, alone.field)
    assert torch.equal(system.generator.get_state(), alone.generator.get_state())
    pushed = TwoPhase(Noisy(), estimator(kind), 9, 9, nudge_from="start").run(x, y)
    assert not torch.equal(pushed.phases[0].states["s"], states["s"])


@pytest.mark.parametrize("missing", ["field", "generator"])
def test_unregistered_state_is_an_error(missing: str) -> None:
    names = tuple(name for name in ("field", "generator") if name != missing)
    engine = TwoPhase(Noisy(names), estimator("positive"), 2, 2)
    with pytest.raises(UnregisteredStateError, match=missing):
        engine.run(torch.randn(3, 2), torch.randn(3, 2))


@pytest.mark.parametrize("nudge_from", ["free", "start"])
@pytest.mark.parametrize("where", ["free", "nudged", "commit"])
def test_a_step_that_fails_changes_nothing(where: str, nudge_from: Any) -> None:
    """Field, generator and the warm start stand as before the step, whichever phase raises, an interrupt included; the
    next step is the one that would have been.
    """

    class Failing(Noisy):
        fails = False

        def window(self, **kwargs: Any) -> Any:
            states = super().window(**kwargs)
            if self.fails and where == ("free" if kwargs["beta"] is None else "nudged"):
                raise KeyboardInterrupt
            return states

        def commit(self, **kwargs: Any) -> None:
            if self.fails and where == "commit":
                raise MemoryError("no memory left")

    x, y = torch.randn(3, 2), torch.randn(3, 2)
    engines = [
        TwoPhase(Failing(), estimator("centered"), 4, 4, nudge_from=nudge_from, init="previous") for _ in range(2)
    ]
    previous = [engine.run(x, y).free for engine in engines]
    system = engines[0].system
    field, drawn = system.field.clone(), system.generator.get_state()
    system.fails = True
    with pytest.raises((KeyboardInterrupt, MemoryError)):
        engines[0].run(x, y)
    if where == "free":
        with pytest.raises(KeyboardInterrupt):
            engines[0].free(x)
    assert torch.equal(system.field, field) and torch.equal(system.generator.get_state(), drawn)
    assert engines[0].previous is previous[0]
    system.fails = False
    one, other = (engine.run(x, y) for engine in engines)
    assert torch.equal(one.free["s"], other.free["s"])


def test_the_first_error_is_the_one_that_is_seen() -> None:
    """Registered state that can no longer be written, as on a device that failed."""

    class Broken(Noisy):
        def window(self, **kwargs: Any) -> Any:
            self.field.resize_(5)
            raise MemoryError("no memory left")

    for call in ("run", "free"):
        engine = TwoPhase(Broken(), estimator("positive"), 2, 2)
        with pytest.raises(MemoryError, match="no memory left"):
            getattr(engine, call)(*([torch.randn(3, 2)] * (2 if call == "run" else 1)))


def test_weights_must_not_move_between_phases() -> None:
    class Drifting(Noisy):
        def window(self, **kwargs: Any) -> Any:
            with torch.no_grad():
                self.w.mul_(0.99)
            return super().window(**kwargs)

    engine = TwoPhase(Drifting(), estimator("positive"), 2, 2)
    engine._verified = True  # beyond the first step, on which the guard sees it too
    with pytest.raises(RuntimeError, match="w changed in a window"):
        engine.run(torch.randn(3, 2), torch.randn(3, 2))


def test_stacked_windows_equal_one_by_one() -> None:
    """Centered and holomorphic run all nudged windows as one batch; the sums of a product may take another order."""
    system = network()
    for kind in ("centered", "coupled_centered"):
        stacked = TwoPhase(system, estimator(kind), 20, 6).run(X, Y)
        system.stackable = False
        alone = TwoPhase(system, estimator(kind), 20, 6).run(X, Y)
        system.stackable = True
        for one, other in zip(stacked.phases, alone.phases, strict=True):
            for name in one.states:
                torch.testing.assert_close(one.states[name], other.states[name], rtol=1e-12, atol=1e-13)


def test_previous_states_start_the_next_batch() -> None:
    system = network(gain=1.0)
    engine = TwoPhase(system, estimator("positive"), 5, 2, init="previous")
    for _ in range(3):
        outcome = engine.run(X, Y)
    longer = engine.free(X, 15)
    assert all(torch.equal(outcome.free[name], longer[name]) for name in longer)
    smaller = engine.run(X[:5], Y[:5])  # another shape starts from zeros
    assert all(torch.equal(smaller.free[name], s) for name, s in engine.free(X[:5], 5).items())


def test_previous_states_follow_the_start_to_its_device() -> None:
    """Those of a checkpoint may lie on the CPU; the meta device stands for a GPU."""
    system = network()
    engine = TwoPhase(system, estimator("positive"), 5, 2, init="previous")
    engine.previous = engine.free(X)
    with torch.device("meta"):
        context = system.to("meta").prepare(x=X.to("meta"), differentiable=False)
    zeros = system.start(x=X.to("meta"), context=context)
    system.start = lambda **kwargs: zeros  # type: ignore[method-assign]
    moved = engine._start(X.to("meta"), context)
    assert all(s.device.type == "meta" and s is not zeros[name] for name, s in moved.items())


def test_tolerance_stops_early() -> None:
    engine = TwoPhase(network(), estimator("positive"), 1000, 5, tolerance=1e-9, check_every=7)
    assert not engine.capturable
    outcome = engine.run(X, Y, measure=True)
    fixed = engine.free(X, 400)
    assert float((outcome.free["odd"] - fixed["odd"]).abs().max()) < 1e-8
    assert not torch.equal(outcome.free["odd"], fixed["odd"])  # it did not take a thousand steps


@pytest.mark.parametrize("kind", KINDS)
def test_no_host_sync_in_a_step(kind: str) -> None:
    module = FreeNudgedModule(network(dtype=torch.float32), estimator(kind), 6, 3, statistics=True)
    x, y = X.float(), Y
    module.training_step((x, y)).backward()  # the first step checks registrations
    with SyncCounter() as counter:
        module.set_step(1)
        module.training_step((x, y)).backward()
    assert counter.found == []
    with SyncCounter() as counter:
        x.sum().item()
    assert counter.found  # it does count


def test_relaxation_records_no_gradients() -> None:
    """Leaving inference mode used to switch gradients on, so windows took the slow path and states had a graph."""
    for system in (network(), Noisy()):
        x, y = (X, Y) if isinstance(system, HopfieldMLP) else (torch.randn(3, 2), torch.randn(3, 2))
        seen: list[bool] = []
        engine = TwoPhase(system, estimator("centered"), 3, 2)
        own = system.prepare
        system.prepare = lambda own=own, seen=seen, **kwargs: seen.append(torch.is_grad_enabled()) or own(**kwargs)  # type: ignore
        engine._verified = True  # the guard would see the replaced hook's list
        outcome = engine.run(x, y, measure=True)
        states = [
            *outcome.free.values(),
            *engine.free(x).values(),
            *(s for p in outcome.phases for s in p.states.values()),
        ]
        assert seen == [False, False]
        assert not any(s.requires_grad for s in (*states, outcome.cost, outcome.residuals))
        assert engine.surrogate(x, outcome).requires_grad


def test_module_works_in_inference_mode() -> None:
    module = FreeNudgedModule(network(), free_steps=10)
    expected = module(X)
    with torch.inference_mode():
        assert torch.equal(module(X.clone()), expected)
    noisy = FreeNudgedModule(Noisy(), free_steps=10)  # by autograd
    with torch.inference_mode():
        assert noisy(torch.randn(3, 2)).shape == (3, 2)


def test_default_surrogate_of_a_system_by_autograd() -> None:
    """A system that brings an energy only: its estimate is the derivative of the solved minimum.

    min_s (s - xw)^2/2 is s = xw, so the gradient of the mean cost is x^T (xw - y) / N.
    """

    class Quiet(Noisy):
        def window(self, **kwargs: Any) -> Any:
            return System.window(self, **kwargs)

    system = Quiet(()).double()
    x, y = torch.randn(3, 2, dtype=DOUBLE), torch.randn(3, 2, dtype=DOUBLE)
    found = estimate(TwoPhase(system, estimator("centered", 1e-3), 300, 300), x, y)["w"]
    torch.testing.assert_close(found, x.t() @ (x @ system.w.detach() - y) / 3, rtol=1e-5, atol=1e-8)  # O(beta^2)
    assert error({"w": bptt(system, x, y, 300)["w"]}, {"w": found}) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "snapshot",
        "callbacks.free_nudged_monitor",
        "free_nudged.diagnostics",
        "free_nudged.engine",
        "free_nudged.estimator",
        "free_nudged.hopfield",
        "free_nudged.hopfield_conv",
        "free_nudged.module",
        "free_nudged.resistive",
        "free_nudged.stats",
        "free_nudged.system",
    ],
)
def test_examples_in_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"lightning_lrtt.{name}"))
    assert results.attempted > 0 and results.failed == 0


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"free_steps": 0}, "free_steps must be >= 1, got 0"),
        ({"nudged_steps": 0}, "nudged_steps must be >= 1, got 0"),
        ({"form": "other"}, "form must be one of 'difference', 'direct', got 'other'"),
        ({"init": "ones"}, "init must be one of"),
        ({"nudge_from": "start"}, r"nudged_steps must be equal to free_steps \(20\) with nudge_from 'start', got 4"),
        ({"tolerance": -1.0}, "tolerance must be finite and > 0, got -1.0"),
        (
            {"nudge_from": "start", "nudged_steps": 20, "tolerance": 1.0},
            "tolerance must be None with nudge_from 'start'",
        ),
        (
            {"estimator": Estimator(kind="negative", beta=1.0)},
            r"every nudge lies in \(-1, inf\), got 1.0.*nudges by -1",
        ),
        ({"estimator": Estimator(beta=1.5)}, "nudges by -1.5"),
        ({"estimator": Estimator(kind="contrastive"), "schedule": lambda step: 0.1}, "schedule must be None"),
        (
            {"system": network(activation="hard_sigmoid"), "estimator": Estimator(kind="holomorphic", points=4)},
            "estimator.kind must be other than 'holomorphic'",
        ),
        ({"system": network(output="tanh"), "estimator": Estimator(kind="positive", beta=1.0)}, r"lies in \(-1, 1\)"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FreeNudgedModule(**({"system": network()} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "both"}, "kind must be one of"),
        ({"beta": 0.0}, "beta must be finite and > 0, got 0.0"),
        ({"kind": "holomorphic"}, "points must be given for kind 'holomorphic'"),
        ({"kind": "holomorphic", "points": 1}, "points must be >= 2, got 1"),
        ({"points": 4}, "points must be left out for kind 'centered', got 4"),
        ({"kind": "contrastive", "beta": 0.3}, "beta must be left out for kind 'contrastive', got 0.3"),
    ],
)
def test_bad_estimators(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Estimator(**arguments)


def test_hooks_are_checked_by_signature() -> None:
    class Positional(Noisy):
        def cost(self, states: Any, target: Any) -> Tensor:
            return torch.zeros(1)

    class Renamed(Noisy):
        def output(self, *, s: Any) -> Tensor:  # type: ignore[override]
            return s["s"]

    with pytest.raises(TypeError, match=r"hook cost must be cost\(self, \*, states, target\), keyword-only"):
        TwoPhase(Positional(), Estimator())
    with pytest.raises(TypeError, match=r"hook output must be output\(self, \*, states\)"):
        TwoPhase(Renamed(), Estimator())
    with pytest.raises(TypeError, match="system must be a System, got Linear"):
        TwoPhase(torch.nn.Linear(1, 1), Estimator())  # type: ignore[arg-type]


def test_schedule_leaving_the_stable_range() -> None:
    module = FreeNudgedModule(network(), schedule=lambda step: 0.2 * (step + 1))
    module.set_step(3)
    assert float(module.beta) == pytest.approx(0.8)
    with pytest.raises(ValueError, match=r"every nudge lies in \(-1, inf\), got 1.0"):
        module.set_step(4)
    with pytest.raises(ValueError, match=r"schedule\(0\) must be finite and > 0"):
        FreeNudgedModule(network(), schedule=lambda step: 0.0)


def test_targets_of_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"target must be class indices \[N\] or values \[N, 4\], got \[16, 3\]"):
        TwoPhase(network(), Estimator()).run(X, torch.zeros(16, 3))
