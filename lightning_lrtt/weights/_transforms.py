"""What converters to GGUF do to values, and how it is undone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_lrtt.weights.checkpoint import LazyCheckpoint
    from lightning_lrtt.weights.tensor import LazyTensor


@dataclass(frozen=True)
class Transform:
    """How a stored tensor becomes a parameter.

    Attributes:
        heads: Undo llama.cpp's interleaving of the two halves of each of this many heads' rows; 0: rows as they are.
        transpose: The file holds the transposed matrix.
        shift: Added after decoding.
    """

    heads: int = 0
    transpose: bool = False
    shift: float = 0.0

    def rows(self, source: LazyTensor) -> Tensor | None:
        """Where each stored row goes: stored row (h, i, half) is row (h, half, i)."""
        if not self.heads:
            return None
        count = source.shape[0]
        if count % (2 * self.heads):
            raise ValueError(
                f"load_pretrained: rows of {source.name!r} must be whole pairs of {self.heads} heads, got {count}; "
                "check the head counts in the file's metadata, or give transforms={}"
            )
        return torch.arange(count).view(self.heads, 2, -1).transpose(1, 2).reshape(-1)

    def __str__(self) -> str:
        said = [f"rows of {self.heads} heads unpermuted"] if self.heads else []
        said += ["transposed"] if self.transpose else []
        return ", ".join(said + ([f"{self.shift:+g}"] if self.shift else []))


# By llama.cpp's converter (convert_hf_to_gguf.py): globs of names in the file and what undoes what it did. An
# architecture that is not here may transform values in a way of its own.
_NORM = {"*norm.weight": "minus_one"}
ARCHITECTURES: dict[str, dict[str, str]] = {
    "llama": {"blk.*.attn_q.*": "q_rows", "blk.*.attn_k.*": "k_rows"},
    "granite": {"blk.*.attn_q.*": "q_rows", "blk.*.attn_k.*": "k_rows"},
    "gemma": _NORM,
    "gemma2": _NORM,
    "gpt2": {f"blk.*.{name}.weight": "transpose" for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "starcoder2": {},
}
_NAMED = {"transpose": Transform(transpose=True), "minus_one": Transform(shift=-1.0), "none": Transform()}


def by_architecture(checkpoint: LazyCheckpoint, source: str) -> Transform:
    """The transform of a tensor of a GGUF file.

    Raises:
        ValueError: If the architecture is not in the table.
    """
    arch = checkpoint.architecture
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"load_pretrained: the file's architecture must be one whose value transforms are known "
            f"({', '.join(ARCHITECTURES)}), "
            f"got {arch!r}; if its tensors hold the module's values as they are, give transforms={{}}"
        )
    for pattern, what in ARCHITECTURES[arch].items():
        if fnmatchcase(source, pattern):
            return Transform(heads=_heads(checkpoint, arch, source, what)) if what.endswith("_rows") else _NAMED[what]
    return Transform()


def by_pattern(transforms: Mapping[str, Transform | str], target: str) -> Transform:
    """The transform that the user gave for a parameter's name."""
    for pattern, what in transforms.items():
        if fnmatchcase(target, pattern):
            if isinstance(what, str) and what not in _NAMED:
                raise ValueError(
                    f"load_pretrained: transforms must be Transform or one of {', '.join(_NAMED)}, got {what!r}"
                )
            return _NAMED[what] if isinstance(what, str) else what
    return Transform()


def _heads(checkpoint: LazyCheckpoint, arch: str, source: str, what: str) -> int:
    key = f"{arch}.attention.head_count" + ("_kv" if what == "k_rows" else "")
    value: Any = checkpoint.metadata.get(key)
    if value is None and what == "k_rows":  # no grouped queries
        return _heads(checkpoint, arch, source, "q_rows")
    if isinstance(value, list):
        value = dict(enumerate(value)).get(int(source.split(".")[1]))
    if not isinstance(value, int) or value <= 0:
        raise ValueError(
            f"load_pretrained: metadata {key!r} must be the number of heads, by which rows of {source!r} are "
            f"unpermuted, got {value!r}; give transforms={{}} if they are not permuted"
        )
    return value
