"""Decoding on the device: the bits of the CPU for every compiled type, and whole loads straight into device memory."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from helpers import same_bits
from weights_helpers import Llama, random_blocks, write_gguf, write_llama

from lightning_lrtt import LRTTConfig, build_info, convert_to_lrtt, devices
from lightning_lrtt.ops.weight_kernels import DECODERS
from lightning_lrtt.weights import LazyCheckpoint, dequantize_into, load_pretrained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: GPU tests run on a machine that has one"),
    pytest.mark.skipif(not build_info()["with_cuda"], reason="this build has CPU kernels only"),
]
KINDS = [Kind(number) for number in DECODERS]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_are_those_of_the_cpu(kind: Kind, dtype: torch.dtype) -> None:
    """In order, in another row order, and into a window whose rows are not aligned."""
    size, _ = gguf.GGML_QUANT_SIZES[kind]
    raw = torch.from_numpy(random_blocks(np.random.default_rng(0), kind, 37, 5)).reshape(-1)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    for rows in (None, order):
        cpu = dequantize_into(torch.empty(37, 5 * size, dtype=dtype), raw, kind, rows)
        for blocks in (raw, raw.cuda(), raw.pin_memory()):
            gpu = dequantize_into(torch.empty(37, 5 * size, dtype=dtype, device="cuda"), blocks, kind, rows)
            assert same_bits(gpu.cpu(), cpu)
        wide = torch.full((37, 5 * size + 3), -7.0, dtype=dtype, device="cuda")
        dequantize_into(wide[:, 1:-2], raw, kind, rows)
        assert same_bits(wide[:, 1:-2].cpu().contiguous(), cpu)
        assert wide[:, 0].eq(-7).all()
        assert wide[:, -2:].eq(-7).all()


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_bytes_at_all(kind: Kind, dtype: torch.dtype) -> None:
    """Infinite and not-a-number scales too. A NaN's payload is the same in bfloat16 decoded from blocks only."""
    size, width = gguf.GGML_QUANT_SIZES[kind]
    raw = torch.from_numpy(np.random.default_rng(1).integers(0, 256, 64 * 8 * width, dtype=np.uint8))
    cpu = dequantize_into(torch.empty(64, 8 * size, dtype=dtype), raw, kind)
    gpu = dequantize_into(torch.empty(64, 8 * size, dtype=dtype, device="cuda"), raw, kind).cpu()
    if dtype is torch.bfloat16 and size > 1:
        assert same_bits(gpu, cpu)
    torch.testing.assert_close(gpu, cpu, rtol=0, atol=0, equal_nan=True)


@kinds
def test_many_blocks(kind: Kind) -> None:
    size, _ = gguf.GGML_QUANT_SIZES[kind]
    raw = torch.from_numpy(random_blocks(np.random.default_rng(1), kind, 512, 4096 // min(size, 256))).reshape(-1)
    columns = raw.numel() // 512 // gguf.GGML_QUANT_SIZES[kind][1] * size
    cpu = dequantize_into(torch.empty(512, columns), raw, kind)
    assert same_bits(dequantize_into(torch.empty(512, columns, device="cuda"), raw, kind).cpu(), cpu)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q4_0, Kind.Q8_0, Kind.TQ2_0], ids=lambda kind: kind.name)
def test_a_tensor_in_pieces_through_pinned_memory(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_lrtt.weights.tensor._PIECE", 10_000)
    values = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
    tensor = LazyCheckpoint.open(write_gguf(tmp_path / "a.gguf", {"w": (values, kind)}))["w"]
    cpu = tensor.into(torch.empty(256, 512))
    assert same_bits(tensor.into(torch.empty(256, 512, device="cuda")).cpu(), cpu)
    assert same_bits(tensor.into(torch.empty(512, 256, device="cuda").t()).cpu().contiguous(), cpu)
    order = torch.randperm(256)
    assert same_bits(tensor.into(torch.empty(256, 512, device="cuda"), order).cpu()[order], cpu)


def test_one_device_is_one_key(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", {"w": (np.ones((2, 32), np.float32), Kind.Q8_0)})
    tensor = LazyCheckpoint.open(path)["w"]
    first = tensor.load("cuda")
    assert tensor.load(f"cuda:{torch.cuda.current_device()}") is first


@pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])
def test_a_model_is_loaded_on_the_device_as_on_the_cpu(meta: bool, tmp_path: Path) -> None:
    write_llama(tmp_path / "a.gguf", kind=Kind.Q4_0, scale=1.0)
    config = LRTTConfig(rank=2, reinit_gain=1.0, visible_device=devices.SoftBounds())
    states = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        with torch.device("meta" if meta else device):
            module = Llama()
        convert_to_lrtt(module, config)
        report = load_pretrained(module, tmp_path / "a.gguf", device=device)
        assert {t.device.type for t in module.parameters()} == {device}
        states.append({name: value.cpu() for name, value in module.state_dict().items()} | {"clipped": report.clipped})
    for name, value in states[0].items():
        same = value == states[1][name] if name == "clipped" else same_bits(value, states[1][name])
        assert same, name
