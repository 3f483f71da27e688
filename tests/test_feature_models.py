"""Models with tiles as objects: copied, compiled, evaluated, trained by another strategy."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from features import Full, Silent, both, feature, fresh, loss_of, same, snapshot, steps_of
from lightning_helpers import DIGITAL, PULSED, loader, trainer
from torch import nn

from lightning_lrtt import LRTT, LRTTConfig, convert_to_lrtt
from lightning_lrtt.nn import LRTTLinear, find_tiles


@feature("Models", "deepcopy and pickle")
@both
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(tmp_path: Path, config: LRTTConfig, how: str) -> None:
    """The copy has its own tiles: it trains on to the bits of the original, which stays as it was."""
    model = fresh()
    trainer(tmp_path, [], config).fit(model, loader(6))
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    before = snapshot(model)
    assert same(before, snapshot(other))
    assert {id(t) for t in find_tiles(model).values()}.isdisjoint(id(t) for t in find_tiles(other).values())
    trainer(tmp_path, [], config).fit(other, loader(6))
    assert same(before, snapshot(model))
    assert steps_of(other) == 12
    trainer(tmp_path, [], config).fit(model, loader(6))
    assert same(snapshot(other), snapshot(model))


@feature("Models", "torch.compile")
@both
@pytest.mark.parametrize("what", ["module", "submodule", "layer", "in place"])
def test_compiled(tmp_path: Path, config: LRTTConfig, what: str) -> None:
    """A compiled LightningModule, submodule or layer trains as the uncompiled one. Reads of pulsed tiles break the
    graph, because their operands are latched outside of it.

    A layer that had been compiled by itself used to go on as the digital layer that its tile had replaced.
    """
    torch._dynamo.reset()
    plain, model = fresh(Silent), fresh(Silent)
    given = model
    if what == "module":
        given = torch.compile(model, backend="aot_eager")
    elif what == "submodule":
        model.net = torch.compile(model.net, backend="aot_eager")
    elif what == "layer":
        model.net[0] = torch.compile(model.net[0], backend="aot_eager")
    else:
        model.net.compile(backend="aot_eager")
    for one in (plain, given):
        trainer(tmp_path, [], config).fit(one, loader(6))
    tiles, expected = find_tiles(model), find_tiles(plain)
    assert len(tiles) == 2
    for tile, other in zip(tiles.values(), expected.values(), strict=True):
        assert tile.counts()["transfers"] == other.counts()["transfers"] == 1
        # The same products in another order; a pulse more or less is a step of 0.002.
        torch.testing.assert_close(
            tile.effective_weight(), other.effective_weight(), rtol=1e-4, atol=0.02 if config is PULSED else 1e-6
        )
    assert loss_of(model) == pytest.approx(loss_of(plain), rel=0.05)


def _penalty(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Mean square of the gradient of sum(y^2) by x, which can be differentiated once more."""
    (slope,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    return slope.square().mean()


@feature("Models", "second derivatives", tiles="digital")
def test_second_derivatives() -> None:
    """A gradient penalty trains the factors outside of autocast, whose reads of tiles are differentiated once."""
    layer = LRTTLinear(6, 4, config=DIGITAL, tile=0)
    nn.init.normal_(layer.A, std=0.1)
    a, b = (factor.detach().clone().requires_grad_() for factor in (layer.A, layer.B))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    _penalty(layer(x), x).backward()
    alpha = layer.config.alpha
    _penalty(nn.functional.linear(x, layer.weight + alpha * a @ b, layer.bias.detach()), x).backward()
    assert layer.A.grad is not None and layer.B.grad is not None
    torch.testing.assert_close(layer.A.grad, a.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.B.grad, b.grad, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="once_differentiable"):
        _penalty(layer(x), x).backward()


@feature("Models", "second derivatives", tiles="pulsed", refused=True)
def test_second_derivatives_of_pulsed_tiles() -> None:
    """A pulsed update is an outer product of what one backward pass left behind; torch refuses a second one."""
    layer = LRTTLinear(6, 4, config=PULSED, tile=0)
    x = torch.randn(5, 6).requires_grad_()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        _penalty(layer(x), x).backward()


@feature("Loops", "test, validate, predict (inference mode)")
@both
def test_loops_without_gradients(tmp_path: Path, config: LRTTConfig) -> None:
    """They read C + alpha A B, latch nothing and change nothing."""
    model = fresh()
    run = trainer(tmp_path, [], config)
    run.fit(model, loader(6))
    before = snapshot(model)
    predicted = torch.cat(run.predict(model, loader(3)))
    x, y = loader(3).dataset.tensors
    assert run.test(model, loader(3), verbose=False)[0]["test/loss"] == pytest.approx(
        float((predicted - y).square().mean()), rel=1e-5
    )
    assert run.validate(model, loader(3), verbose=False)[0]["val/loss"] > 0
    assert same(before, snapshot(model))
    assert not any(tile.latch.calls for tile in find_tiles(model).values())
    effective = nn.Sequential(model.net[0].to_digital(), model.net[1], model.net[2].to_digital())
    torch.testing.assert_close(predicted, effective(x), rtol=1e-4, atol=1e-5)


@feature("Loops", "modules that bring their own tiles", tiles="digital")
def test_own_tiles_under_the_stock_strategy(tmp_path: Path) -> None:
    """Train under any one-device strategy with LRTT as their optimizer, to the same bits as under lrtt."""

    class Own(Full):
        def configure_optimizers(self) -> Any:
            return LRTT(self.parameters(), lr=0.05)

    states = []
    for config in (None, DIGITAL):
        model = fresh(Own)
        convert_to_lrtt(model, DIGITAL)
        trainer(tmp_path, [], config).fit(model, loader(6))
        states.append(snapshot(model))
    assert same(*states)
