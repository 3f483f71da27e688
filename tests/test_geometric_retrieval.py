"""The geometric example: metrics, rotor, window, rule, and what went wrong in its original."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from free_nudged_helpers import DOUBLE, SyncCounter
from torch import Tensor

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install -e '.[examples]'")
sys.path.append(str(Path(__file__).resolve().parent.parent))

from examples.geometric_retrieval import geometry
from examples.geometric_retrieval.geometry import GivensRotor
from examples.geometric_retrieval.model import EmbeddingsDataModule, GeometricModule
from examples.geometric_retrieval.system import GeometricRetrieval
from lightning_lrtt.free_nudged import Estimator, System, TwoPhase

POSITIVE = Estimator(kind="positive", beta=0.1)


def filled(entries: int = 60, memory: int = 64, **kwargs: Any) -> tuple[GeometricRetrieval, Tensor, Tensor]:
    """A system with a memory of clustered embeddings, a turned metric, and a batch of queries."""
    generator = torch.Generator().manual_seed(0)
    system = GeometricRetrieval(memory=memory, classes=4, **kwargs).double()
    centres = 2 * torch.randn(4, 8, generator=generator, dtype=DOUBLE)
    labels = torch.arange(entries) % 4
    keys = centres[labels] + 0.7 * torch.randn(entries, 8, generator=generator, dtype=DOUBLE)
    system.commit(x=keys, states={}, target=system.encode(target=labels))
    system.g.data.copy_(torch.linspace(0.5, 1.5, 8))
    system.rotor.angles.data.copy_(torch.linspace(-1, 1, system.rotor.k))
    y = torch.tensor([0, 1, 2, 3, 0])
    return system, centres[y] + torch.randn(5, 8, generator=generator, dtype=DOUBLE), y


# ------------------------------------------------------------------ geometry


def test_metric_forms_equal_dense() -> None:
    generator = torch.Generator().manual_seed(1)
    v, g = torch.randn(3, 5, 4, generator=generator, dtype=DOUBLE), torch.rand(4, generator=generator, dtype=DOUBLE)
    matrix, u, d = (torch.randn(4, k, generator=generator, dtype=DOUBLE) for k in (4, 2, 1))
    d = d[:2, 0].abs()
    many = torch.randn(3, 4, 4, generator=generator, dtype=DOUBLE)

    def dense(m: Tensor) -> Tensor:
        return torch.stack([torch.stack([row @ (m[b] if m.dim() == 3 else m) @ row for row in v[b]]) for b in range(3)])

    torch.testing.assert_close(geometry.diagonal(v, g), dense(g.diag()))
    torch.testing.assert_close(geometry.full(v, matrix), dense(matrix))
    torch.testing.assert_close(geometry.batched(v, many), dense(many))
    torch.testing.assert_close(geometry.low_rank(v, g, u, d), dense(g.diag() + u @ d.diag() @ u.t()))
    with pytest.raises(ValueError, match=r"U must be \[n, r\] and D \[r\]"):
        geometry.low_rank(v, g, u, d[:1])


@pytest.mark.parametrize(("n", "k"), [(8, 6), (8, 4), (8, 9), (7, 6), (7, 8), (2, 3), (5, 11)], ids=str)
def test_rotor_equals_the_nested_loop(n: int, k: int) -> None:
    """Forward and gradients of a plain loop over layers and pairs; odd and even n, k no multiple of n // 2; R
    orthogonal.
    """
    rotor = GivensRotor(n, k).double()
    rotor.angles.data.copy_(torch.randn(k, dtype=DOUBLE, generator=torch.Generator().manual_seed(k)))
    v = torch.randn(3, n, dtype=DOUBLE, generator=torch.Generator().manual_seed(n))
    kept = v.clone()
    angles = rotor.angles.detach().clone().requires_grad_()
    rows = list(v.unbind(1))
    for index in range(k):
        layer, pair = divmod(index, n // 2)
        a = (2 * pair + layer % n) % n
        b = (a + 1) % n
        cos, sin = angles[index].cos(), angles[index].sin()
        rows[a], rows[b] = cos * rows[a] - sin * rows[b], sin * rows[a] + cos * rows[b]
    expected, found = torch.stack(rows, 1), rotor(v)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(v, kept)  # the original turned its argument, so that phases lived in different frames
    torch.testing.assert_close(v @ rotor.matrix().t(), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(rotor.matrix() @ rotor.matrix().t(), torch.eye(n, dtype=DOUBLE))
    weight = torch.arange(3 * n, dtype=DOUBLE).view(3, n)
    (one,) = torch.autograd.grad((found * weight).sum(), rotor.angles)
    (other,) = torch.autograd.grad((expected * weight).sum(), angles)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_projections() -> None:
    """Angles wrap to [-pi, pi) and keep the rotation; the metric stays in [0.01, 100] with its trace."""
    system, _, _ = filled()
    angles = torch.tensor([3.2, -3.2, math.pi, 7.0, 0.5, -10.0], dtype=DOUBLE)
    before = system.rotor.matrix(angles)
    system.rotor.angles.data.copy_(angles)
    system.g.data.copy_(torch.tensor([-1.0, 0.5, 1, 1, 2, 2, 1, 1.5]))
    system.project()
    torch.testing.assert_close(system.rotor.matrix(), before)
    assert bool((system.rotor.angles >= -math.pi).all()) and bool((system.rotor.angles < math.pi).all())
    assert float(system.g.min()) == pytest.approx(0.01)
    assert float(system.g[1:].sum()) == pytest.approx(8.0 * 9 / 8)  # 9 of the sum 8 before the clamp of -1


# ------------------------------------------------------------------ window and rule


def loop(system: GeometricRetrieval, x: Tensor, steps: int, beta: float, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The window written out, sample by sample: act, LIoR ``[B, S]`` and path ``[B, S, n]``."""
    turn, g = system.rotor.matrix().detach(), system.g.detach()
    metric = turn.t() @ g.diag() @ turn
    n = int(system.written)
    keys, values = system.keys[:n], system.values[:n]
    prototypes = torch.stack([keys[values[:, c] == 1].mean(0) for c in range(4)])
    cand, kinds = torch.cat([prototypes, keys]), torch.cat([torch.eye(4, dtype=DOUBLE), values])
    q, field = x.clone(), torch.zeros(8, dtype=DOUBLE)
    liors, path = [], []
    for _ in range(steps):
        r2 = (q * q).sum(1)
        r = 1 + system.curvature * r2 / (1 + r2)
        v = cand.unsqueeze(0) - q.unsqueeze(1)
        spd = (torch.einsum("bki,ij,bkj->bk", v, metric, v) + system.eps).sqrt()
        act = torch.softmax(-system.retrieval_beta * r.unsqueeze(1) * spd, 1) @ kinds
        velocity = act @ prototypes - q + system.momentum * field + beta * (prototypes[y] - q)
        liors.append(r * (torch.einsum("bi,ij,bj->b", velocity, metric, velocity) + system.eps).sqrt())
        path.append(velocity)
        field = field + system.rate * (velocity.mean(0) - field)
        q = q + system.rate * velocity
    return act, torch.stack(liors, 1), torch.stack(path, 1)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_window_equals_the_plain_loop(beta: float) -> None:
    system, x, y = filled()
    context = system.prepare(x=x, differentiable=False)
    with torch.no_grad():
        states = system.window(
            x=x,
            context=context,
            states=system.start(x=x, context=context),
            steps=12,
            target=system.encode(target=y),
            beta=torch.tensor(beta, dtype=DOUBLE),
            clamped=None,
        )
    system.field.zero_()
    act, lior, path = loop(system, x, 12, beta, y)
    torch.testing.assert_close(states["act"], act, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(states["lior"], lior, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(states["path"], path, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(system.energy(x=x, context=context, states=states), lior.sum(1), rtol=1e-9, atol=1e-12)


def test_rule_is_the_contrastive_gradient_of_the_energy() -> None:
    """dE/dg_i = sum_t R_t (R v_t)_i^2 / (2 spd_t), once divided by beta (the original divided .1 by 1e-3)."""
    system, x, y = filled()
    engine = TwoPhase(system, POSITIVE, 16, 16, nudge_from="start")
    outcome = engine.run(x, y)
    found, angles = torch.autograd.grad(engine.surrogate(x, outcome), [system.g, system.rotor.angles])
    expected = torch.zeros(8, dtype=DOUBLE)
    for phase in outcome.phases:
        turned = system.rotor(phase.states["path"]).detach()
        spd = (geometry.diagonal(turned, system.g.detach()) + system.eps).sqrt()
        each = phase.states["curvature"].unsqueeze(-1) * turned**2 / (2 * spd.unsqueeze(-1))
        expected += complex(phase.weight).real * each.sum((0, 1)) / len(x) / 0.1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    # The angles by central differences of the energies of the same paths.
    for index in range(2):
        values = []
        for shift in (1e-5, -1e-5):
            system.rotor.angles.data[index] += shift
            values.append(
                float(System.contrast(system, x=x, target=outcome.target, phases=outcome.phases, form="direct")) / 0.1
            )
            system.rotor.angles.data[index] -= shift
        assert float(angles[index]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-8)


def test_phases_share_everything_but_the_nudge() -> None:
    """Without a nudge the second window is the first, bit for bit (field and frame included); with one it is not, and
    is nearer the target's prototype (in the original the nudge had no effect at all).
    """
    system, x, y = filled()
    engine = TwoPhase(system, POSITIVE, 64, 64, nudge_from="start")
    outcome = engine.run(x, y, torch.zeros((), dtype=DOUBLE))
    nudged, free = outcome.phases
    assert all(torch.equal(nudged.states[name], free.states[name]) for name in free.states)
    system, x, y = filled()
    goal = system.encode(target=y) @ system.prepare(x=x, differentiable=False).prototypes
    nudged, free = TwoPhase(system, POSITIVE, 64, 64, nudge_from="start").run(x, y).phases
    far, near = ((p.states["position"] - goal).norm(dim=1) for p in (free, nudged))
    assert bool((near < far).all())


def test_memory_and_field_are_those_of_the_free_window() -> None:
    """One commit a step, after both windows; the field stands where the free window left it."""
    system, x, y = filled()
    alone, _, _ = filled()
    context = alone.prepare(x=x, differentiable=False)
    with torch.no_grad():
        alone.window(
            x=x,
            context=context,
            states=alone.start(x=x, context=context),
            steps=9,
            target=None,
            beta=None,
            clamped=None,
        )
    TwoPhase(system, POSITIVE, 9, 9, nudge_from="start").run(x, y)
    assert torch.equal(system.field, alone.field)
    assert int(system.written) == 65
    assert torch.equal(system.keys[60:64], x[:4]) and torch.equal(system.keys[0], x[4])  # a ring
    assert not torch.equal(system.keys[1], x[4])


def test_a_stored_query_does_not_retrieve_itself() -> None:
    """Otherwise every training query that was seen before would be classified by its own label."""
    system, _, _ = filled()
    x = system.keys[:5].clone()
    barred = system.prepare(x=x, differentiable=False).barred
    assert barred is not None
    assert [row.nonzero().flatten().tolist()[0] - 4 for row in barred] == list(range(5))
    assert bool((barred[:, 64:] > 0).all())  # slots that were never written


def test_an_empty_memory_gives_finite_numbers() -> None:
    system = GeometricRetrieval()
    x, y = torch.randn(4, 8), torch.tensor([0, 1, 2, 3])
    engine = TwoPhase(system, POSITIVE, 8, 8, nudge_from="start")
    engine.surrogate(x, engine.run(x, y)).backward()
    assert bool(torch.isfinite(system.g.grad).all())


def test_no_host_sync_in_a_window() -> None:
    """The original had 387."""
    system, x, y = filled()
    module = GeometricModule(system=system, estimator=POSITIVE, statistics=True)
    module.training_step((x, y)).backward()
    with SyncCounter() as counter:
        module.training_step((x, y)).backward()
    assert counter.found == []


def test_statistics_leave_out_the_growing_path() -> None:
    """They used to compare the path before and after a window's last step, of different lengths."""
    system, x, y = filled()
    outcome = TwoPhase(system, POSITIVE, 16, 16, nudge_from="start").run(x, y, measure=True)
    assert outcome.free["path"].shape == (5, 16, 8)
    velocity = (system.rate * outcome.free["path"][:, -1]).abs().max()
    assert float(outcome.residuals[0]) >= float(velocity) > 0


def test_the_metric_learns_what_is_noise() -> None:
    """Two of four coordinates are noise: the learned metric shortens them, and retrieval beats the fixed one."""
    generator = torch.Generator().manual_seed(2)
    centres = torch.tensor([[1.5, 0, 0, 0], [-1.5, 0, 0, 0], [0, 1.5, 0, 0], [0, -1.5, 0, 0]])
    accuracies = {}
    for lr in (0.0, 0.02):
        generator.manual_seed(2)
        system = GeometricRetrieval(n=4, classes=4, rotor_k=2, rotor_mode="off", memory=256)
        module = GeometricModule(lr=lr, window=32, system=system, estimator=POSITIVE)
        optimizer = module.configure_optimizers()

        def draw(count: int) -> tuple[Tensor, Tensor]:
            y = torch.randint(4, (count,), generator=generator)
            noise = torch.randn(count, 4, generator=generator) * torch.tensor([0.6, 0.6, 2.0, 2.0])
            return centres[y] + noise, y

        for _ in range(60):
            optimizer.zero_grad()
            module.training_step(draw(32)).backward()
            optimizer.step()
            system.project()
        x, y = draw(1000)
        accuracies[lr] = float((module(x).argmax(1) == y).float().mean())
    assert float(system.g[2:].max()) < 0.5 * float(system.g[:2].min())
    assert accuracies[0.02] > accuracies[0.0] + 0.04  # 3 standard errors of a difference of 1000 samples each


def test_bad_input() -> None:
    for arguments, message in (
        ({"rotor_mode": "maybe"}, "rotor_mode must be one of 'off', 'on'"),
        ({"n": 1}, "n must be >= 2"),
        ({"retrieval_beta": 0.0}, "retrieval_beta must be finite and > 0"),
        ({"momentum": 1.0}, "momentum must be finite and >= 0 and <= 0.99"),
    ):
        with pytest.raises(ValueError, match=message):
            GeometricRetrieval(**arguments)
    with pytest.raises(ValueError, match="GivensRotor: n must be >= 2 and k >= 1"):
        GivensRotor(4, 0)
    with pytest.raises(ValueError, match="free_steps must be >= 1, got 0"):
        GeometricModule(system=GeometricRetrieval(), window=0)
    with pytest.raises(ValueError, match="step_progress_every must be between 1 and 64, got 65"):
        GeometricModule(system=GeometricRetrieval(), step_progress_every=65)


def test_windows_between_the_nudged_ones_remember_only() -> None:
    system, x, y = filled()
    module = GeometricModule(system=system, estimator=POSITIVE, nudge_every_windows=2, window=8)
    assert module.training_step((x, y)) is not None
    module.learning.eval()  # as on_train_batch_start does
    assert module.training_step((x + 1, y)) is None
    assert int(system.written) == 70


def test_compiled_steps() -> None:
    """`torch.compile` fuses a step without changing it: free and nudged states to float32 rounding over 3 steps."""
    plain, x, y = filled()
    system = GeometricRetrieval(memory=64, classes=4, compiled=True)
    system.load_state_dict(plain.float().state_dict())
    ends = []
    for one in (plain, system):
        outcome = TwoPhase(one, POSITIVE, 3, 3, nudge_from="start").run(x.float(), y)
        ends.append([phase.states["position"] for phase in outcome.phases] + [one.field])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_data_are_fixed_by_their_seed() -> None:
    one, two = EmbeddingsDataModule(), EmbeddingsDataModule()
    for module in (one, two):
        module.setup("fit")
    assert torch.equal(one.train.tensors[0], two.train.tensors[0])
    assert [len(part) for part in (one.train, one.val, one.test)] == [1197, 240, 360]
