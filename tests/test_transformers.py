"""GPT-2- and Llama-shaped models of Hugging Face transformers, tiny and with random weights: convert, train, export."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import same_bits
from lightning_helpers import trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_lrtt import LRTT, LRTTConfig, convert_to_digital, convert_to_lrtt, devices
from lightning_lrtt.export import digital_state_dict, export_checkpoint
from lightning_lrtt.nn import LRTTLinear, LRTTTransposedLinear, find_tiles

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install transformers)")
from transformers.pytorch_utils import Conv1D  # noqa: E402

WIDE = devices.SoftBounds(dw_min=0.001, w_max=2.0, w_min=-2.0)
DIGITAL = LRTTConfig(rank=2, transfer_every=2)
PULSED = LRTTConfig(rank=2, transfer_every=2, reinit_gain=1.0, fast_device=WIDE, visible_device=WIDE)
both = pytest.mark.parametrize("config", [DIGITAL, PULSED], ids=["digital", "pulsed"])


def gpt2() -> Any:
    """Two blocks of Conv1D layers; the head is tied to the token embedding."""
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=17,
            n_positions=8,
            n_embd=8,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def llama(tied: bool = False) -> Any:
    """Two blocks of Linear layers without bias, grouped-query attention, gated MLP."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=17,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=8,
            tie_word_embeddings=tied,
        )
    )


MODELS = {"gpt2": gpt2, "llama": llama, "llama-tied": lambda: llama(tied=True)}
TILES = {"gpt2": 2 * 4, "llama": 2 * 7 + 1, "llama-tied": 2 * 7}
models = pytest.mark.parametrize("name", MODELS)


def tokens() -> torch.Tensor:
    """[batch, position]."""
    return torch.randint(17, (4, 8), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    """In evaluation."""
    with torch.no_grad():
        return model.eval()(tokens()).logits


@models
def test_outputs_survive_the_conversion(name: str) -> None:
    """And A reaches them; the layers that are tied to the embedding stay digital."""
    torch.manual_seed(0)
    model = MODELS[name]()
    before = logits(model)
    assert convert_to_lrtt(model, DIGITAL) is model
    assert len(find_tiles(model)) == TILES[name]
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)  # A = 0: another order of the same sums
    assert type(model.get_output_embeddings()) is (LRTTLinear if name == "llama" else nn.Linear)
    for tile in find_tiles(model).values():
        nn.init.normal_(tile.A)
    assert not torch.allclose(logits(model), before, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_tied_embeddings_are_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = MODELS[name]()
    with caplog.at_level(logging.WARNING, "lightning_lrtt"):
        convert_to_lrtt(model, DIGITAL)
    assert "kept digital: lm_head (its weight is shared with another layer)" in caplog.text
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    convert_to_digital(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@models
@both
def test_a_few_steps_and_back_to_digital(name: str, config: LRTTConfig) -> None:
    """The loss of the batch falls, every tile moves, and the exported model gives the tiles' logits."""
    torch.manual_seed(0)
    model = convert_to_lrtt(MODELS[name](), config)
    optimizer = LRTT(model.parameters(), lr=0.3)
    # Queries and keys of small random weights have next to no gradient: no pulse may come in nine steps.
    still = ("q_proj", "k_proj") if config.is_pulsed else ()
    moving = {n: tile for n, tile in find_tiles(model).items() if not n.endswith(still)}
    before = {n: tile.effective_weight() for n, tile in moving.items()}
    losses = []
    for _ in range(9):
        optimizer.zero_grad()
        loss = model.train()(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(not torch.equal(before[n], tile.effective_weight()) for n, tile in moving.items())
    assert all(float(tile.A.detach().abs().max()) > 0 for tile in moving.values())  # in the middle of a cycle
    expected, state = logits(model), digital_state_dict(model.state_dict())
    exported = MODELS[name]()
    exported.load_state_dict(state, strict=True)
    torch.testing.assert_close(logits(exported), expected, rtol=0, atol=2e-6)
    convert_to_digital(model)
    assert not find_tiles(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in exported.modules()]
    assert all(same_bits(value, exported.state_dict()[n]) for n, value in model.state_dict().items())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-6)


class Language(pl.LightningModule):
    """Holds the model as a user would."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = MODELS[name]()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_under_the_strategy_and_lrtt_export(name: str, tmp_path: Path) -> None:
    """--prefix model. gives a file for the model without its LightningModule; tied weights are in it twice."""
    torch.manual_seed(0)
    module = Language(name)
    run = trainer(tmp_path, [], PULSED, max_steps=3, logger=False)
    run.fit(module, DataLoader(tokens(), 2))
    run.save_checkpoint(tmp_path / "model.ckpt")
    suffix = "safetensors" if importlib.util.find_spec("safetensors") else "pt"
    state = export_checkpoint(tmp_path / "model.ckpt", tmp_path / f"model.{suffix}", prefix="model.")
    model = MODELS[name]()
    model.load_state_dict(state, strict=True)
    torch.testing.assert_close(logits(model), logits(module.model), rtol=0, atol=2e-6)


# ------------------------------------------------------------------ Conv1D


def test_conv1d_keeps_its_parameters_and_loads_both_ways() -> None:
    """A square weight cannot be told by its shape: what a checkpoint is, its other names say."""
    torch.manual_seed(0)
    layer = Conv1D(4, 4)
    weight, bias, values = layer.weight, layer.bias, layer.weight.detach().clone()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    tile = convert_to_lrtt(layer, DIGITAL)
    assert type(tile) is LRTTTransposedLinear
    assert (tile.nx, tile.nf) == (4, 4)
    assert tile.weight is weight
    assert tile.bias is bias
    assert torch.equal(weight, values.t())
    tile.load_state_dict(state)
    assert torch.equal(tile.weight, values.t())
    nn.init.normal_(tile.A)
    copy = LRTTTransposedLinear(4, 4, config=DIGITAL)
    copy.load_state_dict(tile.state_dict())
    assert torch.equal(copy.weight, tile.weight)
    back = convert_to_digital(tile)
    assert type(back) is Conv1D
    x = torch.randn(3, 4)
    torch.testing.assert_close(back(x), copy(x), rtol=0, atol=1e-5)
    assert "nf=4" in repr(back)


def test_a_linear_checkpoint_is_no_conv1d_checkpoint() -> None:
    tile = LRTTLinear(4, 4, config=DIGITAL)
    with pytest.raises(RuntimeError, match="transposed is False in the checkpoint and True here"):
        LRTTTransposedLinear(4, 4, config=DIGITAL).load_state_dict(tile.state_dict())


def test_the_package_does_not_import_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class is looked up only where somebody else has imported it."""
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils")
    convert_to_digital(convert_to_lrtt(nn.Sequential(nn.Linear(4, 4)), DIGITAL))
    assert "transformers.pytorch_utils" not in sys.modules
