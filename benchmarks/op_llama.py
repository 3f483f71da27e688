"""A Llama-shaped model with random weights: LR-TT on pulsed tiles beside dense AdamW, and what fits into less memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import contenders as c
import lightning.pytorch as pl
import torch
from lightning_lrtt.callbacks import CUDAGraph
from measure import Options, Row, say
from op_graphs import fit
from torch import Tensor, nn

from lightning_lrtt import LRTT, LRTTStrategy, convert_to_lrtt
from lightning_lrtt.nn import find_tiles
from lightning_lrtt.ops import COUNTS

LR, TILE_LR = 3e-4, 0.1
GIB = 2**30


def model_of(o: Options) -> nn.Module:
    """Float32 weights, random, made on the device."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # The same attention, known as one that wants no mask: to see whether one is needed transformers reads the positions
    # on the host, in every step, and within a capture makes a mask that keeps flash attention away.
    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    shape = LlamaConfig(  # type: ignore[call-arg]
        vocab_size=o.vocab,
        hidden_size=o.hidden,
        intermediate_size=o.intermediate,
        num_hidden_layers=o.layers,
        num_attention_heads=o.heads,
        num_key_value_heads=o.kv_heads,
        max_position_embeddings=o.tokens,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa_causal",
    )
    torch.manual_seed(0)
    with torch.device(o.device):
        model: nn.Module = LlamaForCausalLM(shape).train()
    return model


class Llama(pl.LightningModule):
    """Next-token prediction with fused AdamW; under LRTTStrategy the linear layers leave it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LR, fused=True)


def _clean(o: Options) -> None:
    gc.collect()
    if o.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(o: Options) -> float | None:
    """GiB of live tensors at most; None on a CPU."""
    return torch.cuda.max_memory_allocated() / GIB if o.device == "cuda" else None


def llama(o: Options) -> Iterator[Row]:
    """Tokens a second and peak memory of a Llama-shaped 1.1B model, bf16-mixed: pulsed tiles beside dense AdamW."""
    try:
        import transformers
    except ImportError as error:
        yield Row("all", missing=f"transformers is not installed ({error})")
        return
    say(f"transformers {transformers.__version__}")
    batches = [torch.randint(o.vocab, (o.rows, o.tokens)) for _ in range(4)]
    strategies: dict[str, Callable[[], Any]] = {
        "dense, fused AdamW": lambda: LRTTStrategy(include=[]),
        "LR-TT pulsed": lambda: LRTTStrategy(c.config(c.SOFT, o.rank, o.transfer_every), tile_lr_scale=TILE_LR / LR),
    }
    first: dict[str, float] = {}
    for name, strategy in strategies.items():
        for form in ("eager", "captured"):
            row = Row(f"{name}, {form}")
            if form == "captured" and o.device != "cuda":
                row.missing = "CUDA graphs need a GPU"
            else:
                _train(o, row, strategy(), batches, form)
                key = f"/ dense, {form}"
                first.setdefault(form, row.ms or 0.0)
                row.more[key] = (row.ms or 0.0) / first[form]
            yield row
    if o.device == "cuda":
        yield from _limited(o)
    else:
        yield Row(f"what fits into {o.limit_GiB} GiB", missing="the limit is that of a GPU's allocator")


def _train(o: Options, row: Row, strategy: Any, batches: list[Tensor], form: str) -> None:
    """Fill a row with one fit of a whole number of transfer cycles."""
    _clean(o)
    module = Llama(model_of(o))
    row.more["parameters, G"] = sum(p.numel() for p in module.parameters()) / 1e9
    graph = CUDAGraph() if form == "captured" else None
    skip = 8 if not o.quick else 2
    row.ms = fit(module, batches, strategy, skip, o.transfer_every, o.device, "bf16-mixed", graph)
    row.more["tokens a second"] = 1e3 * o.rows * o.tokens / row.ms
    row.more["peak, GiB"] = _peak(o)
    row.more["reserved, GiB"] = torch.cuda.max_memory_reserved() / GIB if o.device == "cuda" else None
    tiles = find_tiles(module)
    matrices = [p.numel() for name, p in module.named_parameters() if name.endswith("weight") and p.dim() == 2]
    linear = sum(matrices) - o.vocab * o.hidden  # without the embedding
    row.flops = (4 if tiles else 6) * o.rows * o.tokens * linear
    if tiles:
        counts = torch.stack([tile.tile_counts.cpu() for tile in tiles.values()])
        steps = skip + o.transfer_every
        cells = sum(tile.weight.numel() for tile in tiles.values())
        for array in "abc":
            row.more[f"pulses of {array.upper()} a step"] = float(counts[:, COUNTS[f"pulses_{array}"]].sum()) / steps
        row.more["cells of C, G"] = cells / 1e9
        row.checks["all finite"] = not int(counts[:, COUNTS["nonfinite"]].sum())
        row.checks["every linear layer on a tile"] = len(tiles) == 7 * o.layers + 1
    if graph is not None:
        row.more |= {"replays": graph.replays, "reasons": "; ".join(graph.reasons) or "none"}
    say(f"{row.name}: {row.ms:.1f} ms, {row.more['tokens a second']:.0f} tokens/s, peak {row.more['peak, GiB']} GiB")


# ---------------------------------------------------------------- less memory


def _limited(o: Options) -> Iterator[Row]:
    """The most sequences that a step takes when the allocator may use ``limit_GiB`` only, eagerly in a bare loop."""
    total = torch.cuda.get_device_properties(0).total_memory
    _clean(o)
    say(f"held before: {torch.cuda.memory_reserved() / GIB:.2f} GiB")
    torch.cuda.set_per_process_memory_fraction(min(1.0, o.limit_GiB * GIB / total))
    try:
        for name in ("dense, fused AdamW", "LR-TT pulsed"):
            row = Row(f"{name}, within {o.limit_GiB} GiB")
            rows = o.rows
            while rows and row.ms is None:
                row.ms, row.more["peak, GiB"] = _try(o, name, rows)
                if row.ms is None:
                    say(f"{row.name}: {rows} x {o.tokens} tokens do not fit")
                    rows //= 2
            if row.ms is None:
                row.missing = f"out of memory even with 1 x {o.tokens} tokens"
            else:
                row.more["batch"] = f"{rows} x {o.tokens} tokens"
                row.more["tokens a second"] = 1e3 * rows * o.tokens / row.ms
            yield row
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _try(o: Options, name: str, rows: int) -> tuple[float | None, float | None]:
    """Milliseconds a step and peak memory, or None where memory does not suffice."""
    _clean(o)
    try:
        return _loop(o, name, rows)
    except torch.cuda.OutOfMemoryError:
        return None, None


def _loop(o: Options, name: str, rows: int) -> tuple[float, float | None]:
    """Two steps to warm up, four timed; tiles transfer in every third."""
    model = model_of(o)
    if name.startswith("LR-TT"):
        convert_to_lrtt(model, c.config(c.SOFT, o.rank, 3))
    digital = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    optimizer: Any = LRTT(digital=digital, tile_lr_scale=TILE_LR / LR) if find_tiles(model) else digital
    batch = torch.randint(o.vocab, (rows, o.tokens), device=o.device)
    for i in range(6):
        if i == 2:
            torch.cuda.synchronize()
            start = time.perf_counter()
        optimizer.zero_grad()
        with o.autocast():
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / 4, _peak(o)
