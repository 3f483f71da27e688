"""Which tensor of the file a parameter gets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_lrtt.weights._types import gguf_library
from lightning_lrtt.weights.tensor import LazyTensor

if TYPE_CHECKING:
    from lightning_lrtt.weights.checkpoint import LazyCheckpoint

Names = str | Mapping[str, str | LazyTensor] | Sequence[Sequence[str]] | Callable[[str], str | LazyTensor | None]
_SUFFIXES = (".weight", ".bias")
# Tables that a module computes itself; llama.cpp wants them in the file.
DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def resolve(
    targets: Mapping[str, Sequence[str]], checkpoint: LazyCheckpoint, names: Names
) -> tuple[dict[str, list[LazyTensor]], bool]:
    """Find each target's tensors.

    Args:
        targets: Name -> all its names (tied parameters have several).
        checkpoint: The file.
        names: See `load_pretrained`.

    Returns:
        Target -> the tensors that its names lead to, of which it takes the first, for those that have one; and whether
        the names are the file's own.
    """
    if isinstance(names, str):
        if names != "auto":
            raise ValueError(
                f"load_pretrained: names must be 'auto', a dict, pairs of regex and replacement, or a callable, got "
                f"{names!r}"
            )
        return _auto(targets, checkpoint)
    find = _finder(names)

    def lookup(name: str) -> LazyTensor | None:
        source = find(name)
        return source if source is None or isinstance(source, LazyTensor) else checkpoint.get(source)

    return _look_up(targets, lookup), False


def _look_up(
    targets: Mapping[str, Sequence[str]], lookup: Callable[[str], LazyTensor | None]
) -> dict[str, list[LazyTensor]]:
    found = {}
    for target, aliases in targets.items():
        tensors = [tensor for tensor in map(lookup, aliases) if tensor is not None]
        if tensors:
            found[target] = tensors
    return found


def _finder(names: Any) -> Callable[[str], str | LazyTensor | None]:
    if callable(names):
        return names  # type: ignore[no-any-return]  # gguf carries no types
    if isinstance(names, Mapping):
        return lambda name: names.get(name, name)
    pairs = []
    for pair in names:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"load_pretrained: names must be pairs of regex and replacement, got {pair!r}")
        pairs.append((re.compile(pair[0]), pair[1]))

    def replaced(name: str) -> str:
        for pattern, replacement in pairs:
            if pattern.search(name):
                return str(pattern.sub(replacement, name))
        return name

    return replaced


def _auto(targets: Mapping[str, Sequence[str]], checkpoint: LazyCheckpoint) -> tuple[dict[str, list[LazyTensor]], bool]:
    """The most targets by one rule: names without a common beginning, as they are or through the architecture's map."""
    lookups: list[tuple[Callable[[str], LazyTensor | None], bool]] = [(checkpoint.get, True)]
    table = _architecture_map(checkpoint)
    if table is not None:
        lookups += [
            (lambda name: _mapped(table, checkpoint, name), False),
            (lambda name: _mapped(table, checkpoint, "model." + name), False),
        ]
    elif checkpoint.format == "safetensors":
        lookups.append((lambda name: checkpoint.get("model." + name), True))
    best: tuple[dict[str, list[LazyTensor]], bool] = {}, True
    for prefix in _prefixes(targets):
        for lookup, exact in lookups:
            within = {
                target: [alias.removeprefix(prefix) for alias in aliases if alias.startswith(prefix)]
                for target, aliases in targets.items()
            }
            found = _look_up(within, lookup)
            if len(found) > len(best[0]):
                best = found, exact
        if len(best[0]) == len(targets):
            break
    return best


def _prefixes(targets: Mapping[str, Sequence[str]]) -> list[str]:
    found = {""}
    for target in targets:
        parts = target.split(".")[:-1]
        found.update(".".join(parts[:k]) + "." for k in range(1, min(3, len(parts)) + 1))
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _architecture_map(checkpoint: LazyCheckpoint) -> Any:
    """gguf's table from Hugging Face names to the file's, or None."""
    arch = checkpoint.architecture
    if arch is None:
        return None
    gguf = gguf_library()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = checkpoint.metadata.get(f"{arch}.block_count")
    if arch not in kinds or not isinstance(blocks, int) or not 0 <= blocks <= len(checkpoint):
        return None
    return gguf.get_tensor_name_map(kinds[arch], blocks)


def _mapped(table: Any, checkpoint: LazyCheckpoint, name: str) -> LazyTensor | None:
    source = table.get_name(name, _SUFFIXES)
    if source == "output.weight" and source not in checkpoint:
        source = "token_embd.weight"  # GGUF leaves out a head that is tied to the embedding
    return checkpoint.get(source) if source is not None else None


def suggest(checkpoint: LazyCheckpoint) -> dict[str, str]:
    """Tensor of the file -> the Hugging Face name that it would map to, by the architecture's table."""
    table = _architecture_map(checkpoint)
    if table is None:
        return {}
    ours = ("model.layers.", "model.embed_tokens", "model.norm", "lm_head")  # the table has every family's names
    found: dict[str, str] = {}
    for name, (_, stem) in table.mapping.items():
        for suffix in _SUFFIXES:
            source = stem + suffix
            if source in checkpoint and (
                source not in found or (name.startswith(ours) and not found[source].startswith(ours))
            ):
                found[source] = name + suffix
    return found
