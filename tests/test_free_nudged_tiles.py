"""Two-phase updates of LR-TT tiles: digital and pulsed, in difference and direct form, latched before the first
write.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from free_nudged_helpers import DOUBLE, data, network
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_helpers import SOFT
from torch import Tensor, nn

from lightning_lrtt import LRTT, LRTTConfig, convert_to_digital, convert_to_lrtt
from lightning_lrtt.free_nudged import (
    Estimator,
    FreeNudgedModule,
    HopfieldMLP,
    System,
    TwoPhase,
    agreement,
    bptt,
    couplings,
    estimate,
)
from lightning_lrtt.nn import find_tiles

DIGITAL = LRTTConfig(rank=3, alpha=0.7, transfer_every=100)
PULSED = LRTTConfig(rank=3, alpha=0.7, transfer_every=100, fast_device=SOFT)
FORMS = ["difference", "direct"]


def on_tiles(config: LRTTConfig, dtype: torch.dtype = DOUBLE) -> HopfieldMLP:
    """A network on tiles whose A is not 0."""
    system = network(dtype=dtype)
    convert_to_lrtt(system, config)
    generator = torch.Generator().manual_seed(5)
    for tile in find_tiles(system).values():
        tile.A.data.copy_(0.2 * torch.randn(tile.A.shape, generator=generator))
        tile.B.data.copy_(0.2 * torch.randn(tile.B.shape, generator=generator))
    return system


def dense_gradients(system: HopfieldMLP, x: Tensor, y: Tensor, **kwargs: Any) -> list[Tensor]:
    """The estimate for plain layers with the tiles' effective weights."""
    twin = network(dtype=x.dtype)
    for layer, tile in zip(twin.layers, system.layers, strict=True):
        layer.weight.data.copy_(tile.effective_weight())
        layer.bias.data.copy_(tile.bias)
    found = estimate(TwoPhase(twin, Estimator(**kwargs), 40, 12), x, y)
    return [found[f"layers.{i}.weight"] for i in range(len(twin.layers))]


@pytest.mark.parametrize("kind", ["positive", "centered", "holomorphic", "coupled_centered", "contrastive"])
@pytest.mark.parametrize("form", FORMS)
def test_factor_gradients_follow_from_the_dense_one(form: str, kind: str) -> None:
    """dA = alpha G B^T and dB = alpha A^T G, with G the estimate for the dense effective weight: both forms, to
    1e-6.
    """
    x, y = data()
    system = on_tiles(DIGITAL)
    numbers: dict[str, Any] = {"kind": kind} | ({"points": 3} if kind == "holomorphic" else {})
    found = estimate(TwoPhase(system, Estimator(**numbers), 40, 12, form=form), x, y)  # type: ignore[arg-type]
    for i, g in enumerate(dense_gradients(system, x, y, **numbers)):
        tile = system.layers[i]
        torch.testing.assert_close(found[f"layers.{i}.A"], 0.7 * g @ tile.B.detach().t(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found[f"layers.{i}.B"], 0.7 * tile.A.detach().t() @ g, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_pulsed_tiles_latch_both_phases_in_one_call(form: str) -> None:
    """Backward writes nothing; the latched operands, made from the factors before the step, sum to the dense
    estimate.
    """
    x, y = data(dtype=torch.float32)
    system = on_tiles(PULSED, torch.float32)
    before = [p.clone() for p in system.parameters()]
    engine = TwoPhase(system, Estimator(), 40, 12, form=form)  # type: ignore[arg-type]
    engine.surrogate(x, engine.run(x, y)).backward()
    assert all(torch.equal(p, old) for p, old in zip(system.parameters(), before, strict=True))
    rows = {"difference": [16, 32, 32], "direct": [32, 32, 32]}[form]
    for tile, g, count in zip(system.layers, dense_gradients(system, x, y), rows, strict=True):
        (call,) = tile.latch.calls
        assert len(call.x) == count
        scale = float(g.abs().max())  # float32 rounding of sums over 32 rows of states divided by 2 beta
        torch.testing.assert_close(call.d.t() @ call.x, g, rtol=0, atol=1e-4 * scale)
        torch.testing.assert_close(call.xb, call.x @ tile.B.detach().t(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(call.da, call.d @ tile.A.detach(), rtol=1e-5, atol=1e-6)


def test_difference_form_programs_less() -> None:
    """The magnitude sum |d| |x| that is sent as pulses falls in every layer, most at the input."""
    x, y = data(64, dtype=torch.float32)
    sent = {}
    for form in FORMS:
        system = on_tiles(PULSED, torch.float32)
        engine = TwoPhase(system, Estimator(), 40, 12, form=form)  # type: ignore[arg-type]
        engine.surrogate(x, engine.run(x, y)).backward()
        sent[form] = [float((c.d.abs().t() @ c.x.abs()).sum()) for c in (tile.latch.calls[0] for tile in system.layers)]
    ratios = [direct / difference for direct, difference in zip(sent["direct"], sent["difference"], strict=True)]
    assert ratios[0] > 5 and min(ratios) > 1.5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])
def test_a_step_moves_the_factors_by_the_estimate(config: LRTTConfig, form: str) -> None:
    """LRTT's step from pre-step values: exact when digital; in expectation when pulsed, over 200 seeds within 5
    standard errors of the digital step (devices without variation, whose bounds are far away).
    """
    x, y = data(dtype=torch.float32)
    plain = on_tiles(DIGITAL, torch.float32)
    engine = TwoPhase(plain, Estimator(), 40, 12)
    grads = estimate(engine, x, y)
    lr = 0.05
    moves: dict[str, list[Tensor]] = {"A": [], "B": []}
    from lightning_lrtt import devices

    ideal = devices.Ideal(dw_min=1e-4, w_max=10.0, w_min=-10.0)
    for seed in range(200 if config is PULSED else 1):
        numbers = LRTTConfig(
            rank=3,
            alpha=0.7,
            transfer_every=100,
            seed=seed,
            reinit_gain=1.0,
            fast_device=ideal if config is PULSED else None,
        )
        system = on_tiles(numbers, torch.float32)
        old = {name: getattr(system.layers[1], name).detach().clone() for name in "AB"}
        optimizer = LRTT(system.parameters(), lr=lr)
        engine = TwoPhase(system, Estimator(), 40, 12, form=form)  # type: ignore[arg-type]
        engine.surrogate(x, engine.run(x, y)).backward()
        optimizer.step()
        for name, found in moves.items():
            found.append(getattr(system.layers[1], name).detach() - old[name])
    for name, found in moves.items():
        stack = torch.stack(found)
        expected = -lr * grads[f"layers.1.{name}"]
        slack = 1e-6 if config is DIGITAL else 5 * stack.std(0) / 200**0.5 + 2e-5  # and a fifth of a pulse
        assert bool(((stack.mean(0) - expected).abs() <= slack).all())


def test_biases_get_their_exact_gradient() -> None:
    x, y = data()
    system = on_tiles(DIGITAL)
    twin = convert_to_digital(on_tiles(DIGITAL))
    found = estimate(TwoPhase(system, Estimator(), 40, 12), x, y)
    expected = estimate(TwoPhase(twin, Estimator(), 40, 12), x, y)
    for i in range(3):
        torch.testing.assert_close(found[f"layers.{i}.bias"], expected[f"layers.{i}.bias"], rtol=1e-9, atol=1e-12)


def test_bptt_reaches_the_factors() -> None:
    """The diagnostic's reference on tiles is close to the estimate, and neither latches anything."""
    x, y = data(dtype=torch.float32)
    system = on_tiles(PULSED, torch.float32)
    reference, found = bptt(system, x, y, 60), estimate(TwoPhase(system, Estimator(), 60, 30), x, y)
    for name in ("layers.1.A", "layers.1.B", "layers.0.A"):
        assert float(torch.cosine_similarity(reference[name].flatten(), found[name].flatten(), 0)) > 0.99
    assert not any(tile.latch.calls for tile in find_tiles(system).values())
    assert all(p.grad is None for p in system.parameters())


@pytest.mark.parametrize("unfrozen", [False, True])
def test_scaled_tiles(unfrozen: bool) -> None:
    """The reference and the energies multiply by what relaxation multiplies by, the output scale included, and C takes no
    gradient even where it asks for one.
    """
    x, y = data()
    system = on_tiles(DIGITAL)
    for tile in system.layers:
        tile.set_output_scale(0.5)
        tile.weight.requires_grad_(unfrozen)
    engine = TwoPhase(system, Estimator(beta=0.01), 100, 60)
    factors = [name for name, _ in system.named_parameters() if name[-1] in "AB"]
    found, reference = (
        {name: g[name] for name in factors} for g in (estimate(engine, x, y), bptt(system, x, y, steps=100))
    )
    assert float(agreement(found, reference).error) < 0.01
    outcome = engine.run(x, y)
    parameters = [system.get_parameter(name) for name in factors]
    by_energy = System.contrast(system, x=x, target=outcome.target, phases=outcome.phases, form="difference") / 0.01
    for g, name in zip(torch.autograd.grad(by_energy, parameters), factors, strict=True):
        torch.testing.assert_close(g, found[name], rtol=1e-6, atol=1e-9)
    for tile in system.layers:
        for factor in (tile.A, tile.B):
            factor.requires_grad_(False)
        assert not couplings.live_weight(tile).requires_grad


def test_frozen_layers_and_foreign_couplings() -> None:
    system = network()
    system.layers[1] = nn.Sequential(nn.Linear(9, 7))  # type: ignore[assignment]
    with pytest.raises(MisconfigurationException, match="couplings must be Linear or LR-TT tiles, got Sequential"):
        FreeNudgedModule(system)
