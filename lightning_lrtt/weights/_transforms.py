"""What converters to GGUF do to values, and how it is undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
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
        heads: Put rows of this many heads back into order; 0: rows as they are.
        fused: What the order was. False: llama.cpp's interleaving of the two halves of each head's rows (q and k).
            True: all heads' q, then k, then v, of a layer that holds q, k and v of each head together.
        transpose: The file holds the transposed matrix.
        shift: Added after decoding.
    """

    heads: int = 0
    fused: bool = False
    transpose: bool = False
    shift: float = 0.0

    def rows(self, source: LazyTensor) -> Tensor | None:
        """Where each stored row goes: row (h, i, half) to (h, half, i), or of a fused layer (part, h, i) to (h, part, i).

        Raises:
            ValueError: If the rows are not whole heads.
        """
        if not self.heads:
            return None
        count, parts = source.shape[0], 3 if self.fused else 2
        if count % (parts * self.heads):
            raise ValueError(
                f"load_pretrained: rows of {source.name!r} must be whole {'q, k and v' if self.fused else 'pairs'} of "
                f"{self.heads} heads, got {count}; check the head counts in the file's metadata, or give transforms={{}}"
            )
        places = torch.arange(count).view(self.heads, parts, -1)
        return places.transpose(*((0, 1) if self.fused else (1, 2))).reshape(-1)

    def __str__(self) -> str:
        said = [f"rows of {self.heads} {'fused ' if self.fused else ''}heads unpermuted"] if self.heads else []
        said += ["transposed"] if self.transpose else []
        return ", ".join(said + ([f"{self.shift:+g}"] if self.shift else []))


# By llama.cpp's converter (convert_hf_to_gguf.py): globs of names in the file and what undoes what it did. Each entry is
# tested on Hugging Face's model of that architecture; one that is not here may transform values in a way of its own.
_NORM = {"*norm.weight": "minus_one"}
_INTERLEAVED = {"blk.*.attn_q.*": "q_rows", "blk.*.attn_k.*": "k_rows"}
ARCHITECTURES: dict[str, dict[str, str]] = {
    "llama": _INTERLEAVED,  # Mistral, too
    "granite": _INTERLEAVED,
    "gemma": _NORM,
    "gemma2": _NORM,
    "gemma3": _NORM,
    "gpt2": {f"blk.*.{name}.weight": "transpose" for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")},
    "gptneox": {"blk.*.attn_qkv.*": "qkv_rows"},
    "nemotron": _NORM,
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "stablelm": {},
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
            f"({', '.join(ARCHITECTURES)}), got {arch!r}; if its tensors hold the module's values as they are, give "
            "transforms={}"
        )
    for pattern, what in ARCHITECTURES[arch].items():
        if fnmatchcase(source, pattern):
            if what.endswith("_rows"):
                return Transform(heads=_heads(checkpoint, arch, source, what), fused=what == "qkv_rows")
            return _NAMED[what]
    return Transform()


def check_patterns(transforms: Mapping[str, Transform | str], names: Sequence[str]) -> None:
    """Refuse what would do nothing.

    Raises:
        ValueError: If a value is no transform, or a pattern matches none of ``names``.
    """
    for pattern, what in transforms.items():
        if not isinstance(what, Transform) and not (isinstance(what, str) and what in _NAMED):
            raise ValueError(
                f"load_pretrained: transforms must be Transform or one of {', '.join(_NAMED)}, got {what!r} for {pattern!r}"
            )
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ValueError(
                f"load_pretrained: transforms must be given for parameters, but {pattern!r} matches none of "
                f"{len(names)}, such as {', '.join(map(repr, near))}; patterns are globs on qualified names, e.g. "
                "'*.c_attn.weight'"
            )


def by_pattern(transforms: Mapping[str, Transform | str], names: Iterable[str]) -> Transform:
    """The transform that the user gave for a parameter, by one of its names; they have passed `check_patterns`."""
    for pattern, what in transforms.items():
        if any(fnmatchcase(name, pattern) for name in names):
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
