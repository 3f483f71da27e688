"""dequantize_into against gguf.quants, bit for bit: every compiled type, any blocks, threads, strides, rows."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from helpers import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_helpers import decoded, random_blocks

from lightning_lrtt.ops.weight_kernels import DECODERS
from lightning_lrtt.weights import dequantize_into

COMPILED = [Kind(number) for number in DECODERS]
OTHERS = [Kind.TQ1_0, Kind.TQ2_0, Kind.IQ4_NL, Kind.IQ4_XS, Kind.IQ2_XXS, Kind.IQ3_S, Kind.F64]
compiled = pytest.mark.parametrize("kind", COMPILED, ids=lambda kind: kind.name)


def test_the_compiled_types_and_their_sizes() -> None:
    names = [
        "F32",
        "F16",
        "BF16",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "MXFP4",
    ]
    assert sorted(kind.name for kind in COMPILED) == sorted(names)
    for kind in COMPILED:
        assert DECODERS[kind] == gguf.GGML_QUANT_SIZES[kind]


@compiled
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), blocks=st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_bits_of_random_blocks(kind: Kind, seed: int, rows: int, blocks: int) -> None:
    raw = random_blocks(np.random.default_rng(seed), kind, rows, blocks)
    expected = decoded(raw, kind).view(rows, -1)
    out = torch.full_like(expected, torch.nan)
    assert same_bits(dequantize_into(out, torch.from_numpy(raw).reshape(-1), kind), expected)
    half = torch.empty_like(expected, dtype=torch.bfloat16)
    assert same_bits(dequantize_into(half, raw.tobytes(), kind.name), expected.bfloat16())


@compiled
def test_any_bytes_at_all(kind: Kind) -> None:
    """Infinite and not-a-number scales too; NaN equals NaN, whose payload nobody promises."""
    size, width = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(1).integers(0, 256, (64, 8 * width), dtype=np.uint8)
    expected = decoded(raw, kind).view(64, -1)
    out = dequantize_into(torch.empty(64, 8 * size), raw, kind)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    finite = expected.isfinite()
    assert same_bits(out[finite], expected[finite])
    assert same_bits(out[expected.isinf()], expected[expected.isinf()])


@pytest.mark.parametrize(
    "kind",
    [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.MXFP4, Kind.BF16, Kind.F16],
    ids=lambda kind: kind.name,
)
def test_blocks_made_by_the_library(kind: Kind) -> None:
    raw = gguf.quantize(np.random.default_rng(2).standard_normal((16, 256)).astype(np.float32), kind)
    out = dequantize_into(torch.empty(16, 256), raw.view(np.uint8), kind)
    assert same_bits(out, decoded(raw, kind).view(16, 256))


def test_every_half_and_every_bfloat() -> None:
    """All 65536 numbers, subnormal ones included; and rounding to bfloat16 as torch does it."""
    raw = np.arange(65536, dtype=np.uint16).view(np.uint8)
    words = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    for kind, dtype in ((Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)):
        expected = words.view(dtype).float()
        out = dequantize_into(torch.empty(1, 65536), raw, kind)[0]
        good = ~expected.isnan()
        assert same_bits(out[good], expected[good])
        assert bool(out[~good].isnan().all())
    # Every upper half of a float32 with lower halves around the tie.
    bits = torch.cat([(words.to(torch.int64) << 16) + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    values = bits.to(torch.uint32).view(torch.float32)
    out = dequantize_into(torch.empty(1, len(values), dtype=torch.bfloat16), values.view(torch.uint8), Kind.F32)[0]
    good = ~values.isnan()
    assert same_bits(out[good], values[good].bfloat16())
    assert bool(out[~good].isnan().all())


@compiled
def test_threads_do_not_matter(kind: Kind) -> None:
    raw = torch.from_numpy(random_blocks(np.random.default_rng(3), kind, 4, 4096)).reshape(-1)
    columns = 4096 * gguf.GGML_QUANT_SIZES[kind][0]
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            found.append(dequantize_into(torch.empty(4, columns), raw, kind))
        finally:
            torch.set_num_threads(1)
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


@pytest.mark.parametrize("kind", [*COMPILED, *OTHERS], ids=lambda kind: kind.name)
def test_rows_strides_and_dtypes(kind: Kind) -> None:
    """A row order, a window of a wider array, a transposed array, and dtypes that the core does not write."""
    raw = random_blocks(np.random.default_rng(4), kind, 6, 2)
    if kind in OTHERS:  # scales of unknown places: small blocks from zero
        raw = np.zeros_like(raw)
    expected = decoded(raw, kind).view(6, -1) if kind is not Kind.F64 else torch.zeros(6, 2)
    order, blocks = torch.tensor([3, 0, 5, 1, 2, 4]), torch.from_numpy(raw).reshape(-1)
    moved = dequantize_into(torch.empty_like(expected), blocks, kind, rows=order)
    assert same_bits(moved[order], expected)
    wide = torch.full((6, expected.shape[1] + 3), -7.0)
    dequantize_into(wide[:, 1:-2], blocks, kind)
    assert same_bits(wide[:, 1:-2].contiguous(), expected)
    assert wide[:, 0].eq(-7).all()
    assert wide[:, -2:].eq(-7).all()
    transposed = torch.empty(expected.shape[1], 6)
    dequantize_into(transposed.t(), blocks, kind)
    assert same_bits(transposed.t().contiguous(), expected)
    for dtype in (torch.float64, torch.float16):
        assert same_bits(
            dequantize_into(torch.empty(6, expected.shape[1], dtype=dtype), blocks, kind), expected.to(dtype)
        )


@pytest.mark.parametrize("kind", OTHERS[:-1], ids=lambda kind: kind.name)
def test_types_of_the_library_alone(kind: Kind) -> None:
    raw = np.random.default_rng(5).integers(0, 60, (3, 4 * gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    expected = decoded(raw, kind).view(3, -1)
    assert same_bits(dequantize_into(torch.empty_like(expected), raw, kind), expected)


def test_refusals() -> None:
    blocks = torch.zeros(18, dtype=torch.uint8)
    with pytest.raises(ValueError, match="blocks must be the Q4_0 blocks of 1 rows of 64, got 18 bytes"):
        dequantize_into(torch.empty(1, 64), blocks, "Q4_0")
    with pytest.raises(ValueError, match="blocks must be the Q4_0 blocks of 1 rows of 33"):
        dequantize_into(torch.empty(1, 33), blocks, "Q4_0")
    with pytest.raises(ValueError, match="out must have memory, got a tensor on the meta device"):
        dequantize_into(torch.empty(1, 32, device="meta"), blocks, "Q4_0")
    with pytest.raises(ValueError, match="type must be one of GGML's types, got 'Q9_9'"):
        dequantize_into(torch.empty(1, 32), blocks, "Q9_9")
    with pytest.raises(ValueError, match="type must be one that can be decoded, got Q8_1"):
        dequantize_into(torch.empty(1, 32), torch.zeros(40, dtype=torch.uint8), "Q8_1")
    with pytest.raises(ValueError, match="rows must be rows of out, 0 to 0, got 3 to 3"):
        dequantize_into(torch.empty(1, 32), blocks, "Q4_0", rows=torch.tensor([3]))


def test_opcheck() -> None:
    args = (torch.empty(2, 64), torch.zeros(2 * 36, dtype=torch.uint8), int(Kind.Q4_0), None)
    torch.library.opcheck(torch.ops.lrtt.dequantize_.default, args)
    torch.library.opcheck(torch.ops.lrtt.dequantize_.default, (*args[:3], torch.tensor([1, 0])))
