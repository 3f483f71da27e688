"""GGUF files of every architecture whose transforms are known, against Hugging Face's models and its own GGUF import.

Files are written as llama.cpp's converter writes them: names by the gguf library's table, values changed by the formulas
below, which are written out independently of the package's.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from helpers import same_bits
from torch import Tensor, nn
from weights_helpers import decoded, interleave, write_gguf

from lightning_lrtt import LRTTConfig, convert_to_digital, convert_to_lrtt
from lightning_lrtt.nn import find_tiles
from lightning_lrtt.weights import CheckpointMismatchError, LazyCheckpoint, Transform, load_pretrained
from lightning_lrtt.weights._transforms import ARCHITECTURES

transformers = pytest.importorskip("transformers", reason="Hugging Face's models: pip install transformers")
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint  # noqa: E402

HEADS, KV_HEADS, DIM = 4, 2, 64
SIZES = {"vocab_size": 50, "hidden_size": DIM, "intermediate_size": 96, "num_hidden_layers": 2}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = SIZES | TOKENS | {"num_attention_heads": HEADS}
GROUPED = PLAIN | {"num_key_value_heads": KV_HEADS}
GPT2 = {"vocab_size": 50, "n_embd": DIM, "n_layer": 2, "n_head": HEADS, "n_positions": 32} | TOKENS
# Case -> the file's architecture, the model's configuration, whether transformers imports such files, too.
CASES: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "llama": ("llama", "LlamaConfig", GROUPED, True),
    "llama-biases": ("llama", "LlamaConfig", GROUPED | {"attention_bias": True, "mlp_bias": True}, True),
    "llama-no-groups": ("llama", "LlamaConfig", PLAIN, False),
    "llama-tied": ("llama", "LlamaConfig", GROUPED | {"tie_word_embeddings": True}, True),
    "mistral": ("llama", "MistralConfig", GROUPED, False),
    "granite": ("granite", "GraniteConfig", GROUPED, False),
    "gemma": ("gemma", "GemmaConfig", GROUPED | {"head_dim": 32}, False),
    "gemma2": ("gemma2", "Gemma2Config", GROUPED | {"head_dim": 32}, True),
    "gemma3": ("gemma3", "Gemma3TextConfig", GROUPED | {"head_dim": 32}, True),
    "gpt2": ("gpt2", "GPT2Config", GPT2, True),
    "gptneox": ("gptneox", "GPTNeoXConfig", PLAIN, False),
    "nemotron": ("nemotron", "NemotronConfig", GROUPED, True),
    "phi3": ("phi3", "Phi3Config", GROUPED, True),
    "qwen2": ("qwen2", "Qwen2Config", GROUPED, True),
    "qwen2-tied": ("qwen2", "Qwen2Config", GROUPED | {"tie_word_embeddings": True}, True),
    "qwen3": ("qwen3", "Qwen3Config", GROUPED | {"head_dim": 32}, True),
    "stablelm": ("stablelm", "StableLmConfig", GROUPED, True),
    "starcoder2": ("starcoder2", "Starcoder2Config", GROUPED, True),
}
cases = pytest.mark.parametrize("case", CASES)


def stored(arch: str, name: str, values: np.ndarray, kv_heads: int) -> np.ndarray:
    """What the converter makes of a parameter of the Hugging Face model."""
    if arch in ("llama", "granite"):
        for part, heads in (("q_proj", HEADS), ("k_proj", kv_heads)):
            if part in name:
                return interleave(values, heads)
    if arch in ("gemma", "gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        return values + 1
    if arch == "gpt2" and ".c_" in name and values.ndim == 2:
        return np.ascontiguousarray(values.T)
    if arch == "gptneox" and "query_key_value" in name:  # head by head q, k, v; then all q, all k, all v
        size = DIM // HEADS
        rows = [values[(3 * head + part) * size :][:size] for part in range(3) for head in range(HEADS)]
        return np.concatenate(rows)
    return values


def restored(arch: str, name: str, values: Tensor) -> Tensor:
    """The inverse, for what is not a permutation of rows (a row is quantised by itself)."""
    shifted = arch in ("gemma", "gemma2", "gemma3", "nemotron") and name.endswith("norm.weight")
    return values - 1 if shifted else values.t() if arch == "gpt2" and ".c_" in name and values.dim() == 2 else values


def model_of(case: str) -> nn.Module:
    """A tiny random model."""
    _, config, numbers, _ = CASES[case]
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**numbers)).eval()


def write(path: Path, case: str) -> dict[str, Tensor]:
    """A file of random weights; returns the decoded ones by their names in the model."""
    arch, _, numbers, _ = CASES[case]
    table = gguf.get_tensor_name_map({name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[arch], 2)
    rng, tensors, expected = np.random.default_rng(0), {}, {}
    for name, parameter in model_of(case).named_parameters():
        values = (0.2 * rng.standard_normal(tuple(parameter.shape))).astype(np.float32)
        changed = stored(arch, name, values, numbers.get("num_key_value_heads", HEADS))
        kind = Kind.Q8_0 if changed.ndim == 2 and changed.shape[1] % 32 == 0 else Kind.F32
        tensors[table.get_name(name, (".weight", ".bias"))] = (changed, kind)
        plain = changed if changed.shape != values.shape or arch == "gpt2" or "norm" in name else values
        expected[name] = restored(arch, name, decoded(gguf.quantize(plain, kind), kind).view(plain.shape))
    metadata = {"block_count": 2, "embedding_length": DIM, "attention.head_count": HEADS, "vocab_size": 50}
    if "num_key_value_heads" in numbers:
        metadata["attention.head_count_kv"] = KV_HEADS
    if "head_dim" in numbers:
        metadata["attention.key_length"] = numbers["head_dim"]
    assert len(tensors) == len(expected)  # the table gives every parameter a name of its own
    write_gguf(path, tensors, arch, **{f"{arch}.{key}".replace(".", "__"): value for key, value in metadata.items()})
    return expected


def logits(model: nn.Module) -> Tensor:
    """Of some tokens."""
    with torch.no_grad():
        return model(torch.arange(3, 15)[None]).logits


def test_every_architecture_of_the_table_is_tested() -> None:
    assert {arch for arch, *_ in CASES.values()} == set(ARCHITECTURES)


@cases
def test_a_file_gives_the_model_its_weights(case: str, tmp_path: Path) -> None:
    """All names are found, all parameters are filled, to the bit; the outputs are those of the same state dict."""
    arch, _, _, imported = CASES[case]
    expected = write(tmp_path / "a.gguf", case)
    model, reference = model_of(case), model_of(case)
    report = load_pretrained(model, tmp_path / "a.gguf")
    assert sorted(report.loaded) == sorted(expected)
    assert not report.unexpected
    for name, parameter in model.named_parameters():
        assert same_bits(parameter.detach(), expected[name].contiguous()), name
    moved = {name for name, how in report.converted.items() if "unpermuted" in how}
    # Rows move in q and k of the llama family and in fused layers of GPT-NeoX, and nowhere else.
    parts = {"llama": ("q_proj", "k_proj"), "granite": ("q_proj", "k_proj"), "gptneox": ("query_key_value",)}.get(
        arch, ()
    )
    assert moved == {name for name in expected if any(part in name for part in parts)}
    reference.load_state_dict({**reference.state_dict(), **expected})
    reference.tie_weights()
    assert same_bits(logits(model), logits(reference))
    if imported:
        theirs = load_gguf_checkpoint(str(tmp_path / "a.gguf"), return_tensors=True, model_to_load=model_of(case))[
            "tensors"
        ]
        assert set(theirs) == set(expected)
        for name, value in theirs.items():
            assert same_bits(expected[name].contiguous(), value.contiguous()), name


@cases
def test_tiles_in_the_model_get_them(case: str, tmp_path: Path) -> None:
    """Converted to tiles, behind a prefix, and back: the same outputs as the plain model's."""
    expected = write(tmp_path / "a.gguf", case)
    plain, tiles = model_of(case), nn.ModuleDict({"net": model_of(case)})
    convert_to_lrtt(tiles, LRTTConfig(rank=2))
    assert len(find_tiles(tiles)) >= 8
    load_pretrained(plain, tmp_path / "a.gguf")
    report = load_pretrained(tiles, tmp_path / "a.gguf")
    assert len(report.loaded) == len(expected)
    assert same_bits(logits(convert_to_digital(copy.deepcopy(tiles))["net"]), logits(plain))


def test_permuting_where_it_does_not_belong_would_show(tmp_path: Path) -> None:
    """The outputs above depend on the order of rows: a Qwen2 file read as a Llama's gives others."""
    write(tmp_path / "a.gguf", "qwen2")
    right, wrong = model_of("qwen2"), model_of("qwen2")
    load_pretrained(right, tmp_path / "a.gguf")
    with LazyCheckpoint.open(tmp_path / "a.gguf") as checkpoint:
        transforms = {"*q_proj*": Transform(heads=HEADS), "*k_proj*": Transform(heads=KV_HEADS)}
        load_pretrained(wrong, checkpoint, transforms=transforms)
    assert (logits(right) - logits(wrong)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arch", "config"), [("qwen2moe", "Qwen2MoeConfig"), ("bloom", "BloomConfig"), ("falcon", "FalconConfig")]
)
def test_other_architectures_are_refused(arch: str, config: str, tmp_path: Path) -> None:
    """Their values are changed in ways that nobody undoes here (stacked experts, reshaped heads)."""
    tensors = {name: (np.zeros((50, DIM), np.float32), Kind.F32) for name in ("token_embd.weight", "output.weight")}
    path = write_gguf(tmp_path / "a.gguf", tensors, arch, **{f"{arch}__block_count": 2})
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**PLAIN))
    with pytest.raises(ValueError, match=f"architecture must be one whose value transforms are known .* got '{arch}'"):
        load_pretrained(model, path, strict=False)


def test_a_mixture_of_experts_in_a_llama_file_is_refused(tmp_path: Path) -> None:
    """Mixtral files call themselves llama; their stacked experts have no counterpart among the model's names."""
    numbers = GROUPED | {"num_local_experts": 2}
    model = transformers.AutoModelForCausalLM.from_config(transformers.MixtralConfig(**numbers))
    write(tmp_path / "a.gguf", "llama")
    with pytest.raises(CheckpointMismatchError, match=r"missing in the file .*experts"):
        load_pretrained(model, tmp_path / "a.gguf")
