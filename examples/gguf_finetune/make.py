"""Makes the pretrained checkpoint: a small Llama trained on Python sources for a few hundred steps, written as GGUF.

    python -m examples.gguf_finetune.make logs/gguf_finetune

The fine-tuning example does it by itself when the file is not there. Files are written as llama.cpp's converter writes
a Llama: names by the gguf library's table, rows of q and k interleaved, matrices in Q8_0 or Q4_0, norms in F32.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import trange

from examples.gguf_finetune.model import Llama
from lightning_lrtt._files import replacing

log = logging.getLogger("lightning_lrtt.examples")


def pretrain(text: Tensor, steps: int = 400, length: int = 128, batch: int = 16, seed: int = 0) -> Llama:
    """A digital Llama after some steps of AdamW on random windows of the text."""
    torch.manual_seed(seed)
    model = Llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in (bar := trange(steps, desc="Pretraining")):
        starts = torch.randint(len(text) - length, (batch, 1))
        windows = text[starts + torch.arange(length + 1)]
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model


def write(model: Llama, path: Path, kind: GGMLQuantizationType) -> None:
    """Write the model as a GGUF file of architecture ``llama``."""
    body, attention = model.model, model.model.layers[0].self_attn
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(body.layers))
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        writer.add_name(f"byte-llama {kind.name}")
        writer.add_block_count(len(body.layers))
        writer.add_embedding_length(body.embed_tokens.embedding_dim)
        writer.add_head_count(attention.heads)
        writer.add_head_count_kv(attention.kv_heads)
        for name, parameter in model.state_dict().items():
            values = parameter.numpy()
            for part, heads in (("q_proj", attention.heads), ("k_proj", attention.kv_heads)):
                if part in name:  # LlamaModel.permute of llama.cpp's converter
                    pairs = values.reshape(heads, 2, len(values) // heads // 2, values.shape[1])
                    values = pairs.swapaxes(1, 2).reshape(values.shape)
            own = kind if values.ndim == 2 else GGMLQuantizationType.F32
            writer.add_tensor(
                names.get_name(name, (".weight",)), gguf.quantize(np.ascontiguousarray(values), own), raw_dtype=own
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def make_checkpoints(folder: Path, text: Tensor, steps: int = 400) -> None:
    """Write ``llama-q8_0.gguf`` and ``llama-q4_0.gguf``."""
    model = pretrain(text, steps)
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0):
        path = folder / f"llama-{kind.name.lower()}.gguf"
        write(model, path, kind)
        log.info("wrote %s, %d bytes", path, path.stat().st_size)


def main() -> None:
    """Make both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    from examples.gguf_finetune.data import sources

    make_checkpoints(args.folder, sources(), args.steps)


if __name__ == "__main__":
    main()
