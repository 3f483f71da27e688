"""What conversion takes along from a layer, what it refuses, and what it leaves of the layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import randn
from torch import nn
from torch.nn.utils import prune

from lightning_lrtt import LRTTConfig, convert_to_digital, convert_to_lrtt
from lightning_lrtt.nn import find_tiles

CONFIG = LRTTConfig(rank=2)


def test_hooks_of_a_layer_go_on_with_its_tile_and_back():
    """Regression: they were dropped without a word, and with them a ReLU or the features of a loss."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    calls: list[str] = []
    handles = [
        model[0].register_forward_pre_hook(lambda m, args: calls.append("pre")),
        model[0].register_forward_hook(lambda m, args, kwargs, y: y.relu(), with_kwargs=True),
        model[0].register_forward_hook(lambda m, args, y: calls.append("always"), always_call=True),
        model[0].register_full_backward_hook(lambda m, gx, gy: calls.append("backward")),
    ]
    x = randn(0, 5, 4).requires_grad_()
    before = model(x)
    convert_to_lrtt(model, CONFIG)
    for turn in range(2):
        calls.clear()
        y = model(x)
        torch.testing.assert_close(y, before, rtol=1e-6, atol=1e-6)  # A = 0: the same products, in another call
        y.sum().backward()
        assert calls == ["pre", "always", "backward"], turn
        convert_to_digital(model)
    for handle in handles:
        handle.remove()
    calls.clear()
    model(x).sum().backward()
    assert calls == [] and (model[0](x) < 0).any()


def test_the_layer_that_became_a_tile_says_so():
    """Regression: a list that held it went on computing with C alone, and nothing trained."""

    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.order = [self.a, self.b]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.order[1](self.order[0](x))

    model = convert_to_lrtt(Ordered(), CONFIG)
    with pytest.raises(RuntimeError, match=r"layer 'a' must be called in its module, .* get_submodule"):
        copy.deepcopy(model)(randn(0, 2, 4))


def test_a_layer_of_two_models_becomes_a_tile_of_one(caplog: pytest.LogCaptureFixture):
    layer = nn.Linear(4, 4)
    first, second = (nn.Sequential(layer, nn.ReLU()) for _ in range(2))
    convert_to_lrtt(first, CONFIG)
    convert_to_lrtt(second, CONFIG)
    assert list(find_tiles(first)) == ["0"] and "0 (it became a tile of another module)" in caplog.text
    with pytest.raises(RuntimeError, match="layer '0' must be called in its module"):
        second(randn(0, 2, 4))


def _pruned_bias() -> nn.Module:
    layer = nn.Linear(4, 3)
    prune.l1_unstructured(layer, "bias", 1)
    return layer


def _replaced_forward() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.forward = lambda x: x[..., :3]  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Conv2d(4, 3, 2, padding="same"), "padding 'same' adds more on one side"),
        (_pruned_bias, "its bias is not a parameter"),
        (_replaced_forward, "its forward was replaced"),
        (lambda: nn.Linear(0, 3), "its weight [3, 0] is empty"),
    ],
    ids=["same", "pruned-bias", "forward", "empty"],
)
def test_what_cannot_be_a_tile_stays_digital_and_is_named(make: Any, why: str, caplog: pytest.LogCaptureFixture):
    """Regression: these raised half way, and left the layers before them converted."""
    odd = make()
    model = convert_to_lrtt(nn.ModuleList([nn.Linear(4, 4), odd]), CONFIG)
    assert list(find_tiles(model)) == ["0"] and model[1] is odd
    assert f"1 ({why})" in caplog.text


def test_same_padding_that_is_symmetric_is_a_tile():
    model = convert_to_lrtt(nn.Sequential(nn.Conv2d(4, 3, 3, padding="same")), CONFIG)
    assert list(find_tiles(model)) == ["0"]
