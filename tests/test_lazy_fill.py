"""`LazyFill`: layers that are filled when they are called, one after the other or by a thread that walks ahead."""

from __future__ import annotations

import copy
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weights_helpers import Llama, write_llama

from lightning_lrtt.weights import CheckpointChangedError, LazyCheckpoint
from lightning_lrtt.weights.lazy_fill import LazyFill
from lightning_lrtt.weights.plan import make_plan


def lazily(module: nn.Module, path: str) -> LazyFill:
    """Hooks on the module."""
    return LazyFill(module, make_plan(module, LazyCheckpoint.open(path)), lambda: None)


def test_layers_are_loaded_when_they_are_called(llama: Any) -> None:
    path, expected = llama
    module = Llama()
    fill = lazily(module, path)
    assert len(fill.pending) == len(expected)
    assert module.lm_head.weight[0, 0].isnan()  # read around the forward pass it says so
    module.model.layers[1].mlp(torch.zeros(1, 64))
    assert set(expected) - set(fill.pending) == {
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }
    assert torch.equal(module.model.layers[1].mlp.up_proj.weight, expected["model.layers.1.mlp.up_proj.weight"])
    module.model.norm.state_dict()  # a part that is saved is a part that is filled
    assert "model.norm.weight" not in fill.pending
    module(torch.zeros(1, 3, dtype=torch.int64))
    assert not fill.pending
    for layer in module.modules():
        assert not layer._forward_pre_hooks
        assert not layer._state_dict_pre_hooks
        assert not layer._load_state_dict_pre_hooks
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


def test_a_tied_weight_comes_with_whichever_layer_is_called_first(tmp_path: Path) -> None:
    expected = write_llama(tmp_path / "a.gguf", head=False)
    module = Llama(tied=True)
    fill = lazily(module, str(tmp_path / "a.gguf"))
    module.lm_head(torch.zeros(1, 64))
    assert torch.equal(module.model.embed_tokens.weight, expected["lm_head.weight"])
    assert "model.embed_tokens.weight" not in fill.pending


@pytest.mark.parametrize("training", [True, False])
def test_parents_that_read_weights_of_their_children(tmp_path: Path, training: bool) -> None:
    """MultiheadAttention and the fast path of the encoder never call out_proj and linear1."""

    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        return nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "encoder": nn.TransformerEncoder(layer, 2)})

    source, module, x = make(), make(), torch.randn(2, 3, 8)
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    lazily(module, str(tmp_path / "a.safetensors"))
    with torch.set_grad_enabled(training):
        for name in ("attention", "encoder"):
            one, other = (
                (m[name].train(training)(*([x] * (3 if name == "attention" else 1)))) for m in (source, module)
            )
            torch.testing.assert_close(other, one, rtol=0, atol=0)


def test_a_pending_module_is_not_copied_and_a_loaded_one_not_overwritten(llama: Any) -> None:
    path, expected = llama
    module = Llama()
    fill = lazily(module, path)
    with pytest.raises(
        RuntimeError, match=f"must be filled before it is copied.* but {len(expected)} tensors are pending"
    ):
        copy.deepcopy(module)
    own = {name: torch.full_like(value, 0.5) for name, value in expected.items()}
    module.load_state_dict(own)  # fills first, so no hook comes later
    assert not fill.pending
    module(torch.zeros(1, 3, dtype=torch.int64))
    assert all(value.eq(0.5).all() for value in module.state_dict().values())


def test_a_file_that_changes_before_the_first_call(llama: Any) -> None:
    """The layer raises, and again; nothing is half-known."""
    path, _ = llama
    module = Llama()
    lazily(module, path)
    os.truncate(path, os.path.getsize(path) - 1)
    for _ in range(2):
        with pytest.raises(CheckpointChangedError, match="size was"):
            module(torch.zeros(1, 3, dtype=torch.int64))


def test_prefetching_races_with_the_forward_pass(llama: Any) -> None:
    path, expected = llama
    for _ in range(10):
        module = Llama()
        fill = lazily(module, path)
        thread = fill.prefetch()
        module(torch.zeros(1, 3, dtype=torch.int64))
        thread.join(100)
        assert not thread.is_alive()
        assert fill._flight.counts["loads"] >= len(expected)
        assert sorted(fill.plan.report().loaded) == sorted(expected)  # each once
        assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


def test_stopping_waits_for_the_tensor_that_is_being_read(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a teardown moved the module to the CPU while the thread wrote into the memory it had before."""
    path, expected = llama
    module = Llama()
    fill = lazily(module, path)
    reading, read = threading.Event(), fill.plan.fill

    def slow(entry: Any) -> None:
        reading.set()
        assert fill._stop.wait(100)
        time.sleep(0.1)  # a stop() that did not wait would be back by now
        read(entry)

    monkeypatch.setattr(fill.plan, "fill", slow)
    thread = fill.prefetch()
    assert reading.wait(100)
    fill.stop()
    assert not thread.is_alive()
    assert len(fill.pending) == len(expected) - 1
    module(torch.zeros(1, 3, dtype=torch.int64))  # the hooks stay
    assert not fill.pending


def test_a_failing_prefetch_is_said_and_raised_where_needed(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = llama
    module = Llama()
    fill = lazily(module, path)
    os.utime(path, ns=(1, 1))
    with caplog.at_level(logging.WARNING, "lightning_lrtt"):
        fill.prefetch().join(100)
    assert "prefetching stopped" in caplog.text
    with pytest.raises(CheckpointChangedError, match="mtime was"):
        module(torch.zeros(1, 3, dtype=torch.int64))
