"""Names, shapes and transforms of a load, decided before any parameter changes; and the filling of one parameter."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_lrtt.nn import TileModule
from lightning_lrtt.weights import _names
from lightning_lrtt.weights._transforms import Transform, by_architecture, by_pattern, check_patterns
from lightning_lrtt.weights._types import can_decode
from lightning_lrtt.weights.checkpoint import LazyCheckpoint
from lightning_lrtt.weights.errors import CheckpointMismatchError
from lightning_lrtt.weights.report import LoadReport
from lightning_lrtt.weights.tensor import LazyTensor

log = logging.getLogger("lightning_lrtt.weights")
_TILE_OWN = ("A", "B", "tile_state", "tile_counts", "output_scale")


@dataclass(frozen=True, eq=False)
class Entry:
    """One parameter or buffer, its tensor and how the one becomes the other."""

    name: str
    owner: nn.Module
    attr: str
    source: LazyTensor
    transform: Transform

    @property
    def tile(self) -> TileModule | None:
        """The tile whose C this is."""
        return self.owner if self.attr == "weight" and isinstance(self.owner, TileModule) else None

    def destination(self) -> Tensor:
        """The parameter's memory in the file's layout."""
        out: Tensor = getattr(self.owner, self.attr).detach()
        if self.tile is not None and self.tile.transposed:
            out = out.t()
        return out.t() if self.transform.transpose and out.dim() == 2 else out


@dataclass
class LoadPlan:
    """Everything that a load will do; makes the report."""

    checkpoint: LazyCheckpoint
    entries: list[Entry]
    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, str]
    output_scale: bool = True
    copies: dict[str, str] = field(default_factory=dict)  # tensors that a tied parameter has twice, and its name
    _loaded: list[str] = field(default_factory=list)
    _converted: dict[str, str] = field(default_factory=dict)
    _scales: dict[str, float] = field(default_factory=dict)
    _clipped: dict[str, float] = field(default_factory=dict)
    _bytes: int = 0
    _span: tuple[float, float] = (0.0, 0.0)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def bytes(self) -> int:
        """What all entries hold in the file."""
        return sum(entry.source.nbytes for entry in self.entries)

    @torch.no_grad()
    def fill(self, entry: Entry) -> None:
        """Decode one tensor into its parameter; a tile starts over from it."""
        start = time.perf_counter()
        memory = out = entry.destination()
        if out.dim() > 2 and not out.is_contiguous():  # channels_last, say: no view of it has rows
            out = torch.empty_like(out, memory_format=torch.contiguous_format)
        rows = entry.transform.rows(entry.source)
        if rows is None and self.checkpoint.flight.budget and self._shared(entry.source):
            out.copy_(entry.source.load(out.device))
        elif out.dim() == 1 and rows is not None:
            entry.source.into(out)
            out.copy_(torch.empty_like(out).index_copy_(0, rows.to(out.device), out))
        else:
            entry.source.into(out, rows)
        if entry.transform.shift:
            out.add_(entry.transform.shift)
        if out is not memory:
            memory.copy_(out)
        said = (
            [f"{entry.source.type} to {str(out.dtype).removeprefix('torch.')}"]
            if entry.source.type.plain != out.dtype
            else []
        )
        said += [str(entry.transform)] if str(entry.transform) else []
        if entry.tile is not None:
            said += self._start_tile(entry.name.rpartition(".")[0], entry.tile)
        with self._lock:
            if said:
                self._converted[entry.name] = ", ".join(said)
            self._loaded.append(entry.name)
            self._bytes += entry.source.nbytes
            self._span = self._span[0] or start, time.perf_counter()
        log.debug("%s <- %s (%s)", entry.name, entry.source.name, ", ".join(said) or "as stored")

    def _shared(self, source: LazyTensor) -> bool:
        """Whether several entries take the very bytes; slices of one tensor share nothing."""
        own = source.name, source.position, source.nbytes
        return sum((e.source.name, e.source.position, e.source.nbytes) == own for e in self.entries) > 1

    def _start_tile(self, name: str, tile: TileModule) -> list[str]:
        said = []
        tile.set_output_scale(None)
        if tile.config.visible_device is not None:
            scale = _fitting_scale(tile) if self.output_scale else 1.0
            if scale != 1.0:
                tile.weight.div_(scale)
                tile.set_output_scale(scale)
                self._scales[name] = scale
                said = [f"output scale {scale:g}"]
        clipped = tile.restart()
        if tile.config.visible_device is not None:
            self._clipped[name] = clipped / tile.weight.numel()
        return said

    def report(self) -> LoadReport:
        """What was done so far."""
        return LoadReport(
            tuple(self._loaded),
            tuple(self.missing),
            tuple(self.unexpected),
            dict(self.mismatched),
            dict(self._converted),
            dict(self._scales),
            dict(self._clipped),
            self._bytes,
            self._span[1] - self._span[0],
        )


def _fitting_scale(tile: TileModule) -> float:
    """The least power of two by which C must be divided to lie within its device's mean bounds; 1 if that never helps.

    A power of two, so that dividing and multiplying again are exact.
    """
    low, high = (float(v) for v in torch.aminmax(tile.weight.detach()))
    bottom, top = tile.bounds()
    need = max(high / top if top > 0 else 0.0, low / bottom if bottom < 0 else 0.0)
    return 2.0 ** math.ceil(math.log2(need)) if 1.0 < need < math.inf else 1.0


def make_plan(
    module: nn.Module,
    checkpoint: LazyCheckpoint,
    names: _names.Names = "auto",
    strict: bool = True,
    transforms: Mapping[str, Transform | str] | None = None,
    output_scale: bool = True,
    uninitialised: list[str] | None = None,
) -> LoadPlan:
    """Decide what goes where.

    Args:
        module: See `load_pretrained`, also for the next five.
        checkpoint: The file.
        names: How names lead to tensors.
        strict: Raise if anything is missing, unexpected or of another shape.
        transforms: What is done to values.
        output_scale: Scale weights beyond the bounds of a tile's device.
        uninitialised: Names that have no values yet (they were on the meta device): each must be in the file.

    Raises:
        CheckpointMismatchError: If something does not fit.
        ValueError: If the architecture's transforms are unknown, or a given one is, or its pattern matches nothing.
    """
    checkpoint.check()
    places = _targets(module)
    targets = {name: aliases for name, (_, _, aliases, _) in places.items()}
    if transforms is not None:
        check_patterns(transforms, [alias for aliases in targets.values() for alias in aliases])
    found, exact = _names.resolve(targets, checkpoint, names)
    entries, mismatched, copies = [], {}, {}
    for name, (source, *others) in found.items():
        owner, attr, _, _ = places[name]
        if transforms is not None:
            transform = by_pattern(transforms, targets[name])
        elif exact or checkpoint.format != "gguf":
            transform = Transform()
        else:
            transform = by_architecture(checkpoint, source.name)
        entry = Entry(name, owner, attr, source, transform)
        shape = tuple(entry.destination().shape)
        if shape != source.shape:
            mismatched[name] = f"{list(shape)} here, {list(source.shape)} in {source.name!r}"
        elif not can_decode(source.type):
            mismatched[name] = f"{source.name!r} is {source.type}, which nothing decodes"
        else:
            if transform.heads and source.nbytes != checkpoint[source.name].nbytes:
                raise ValueError(
                    f"load_pretrained: {name!r} must get the whole of {source.name!r}, whose rows are permuted, got a "
                    "slice; load it whole, or give transforms={}"
                )
            transform.rows(source)
            entries.append(entry)
            copies.update(
                {other.name: name for other in others if other.name != source.name and other.same_bytes(source)}
            )
    missing = [name for name, (_, _, _, is_buffer) in places.items() if name not in found and not is_buffer]
    used = copies.keys() | {sources[0].name for sources in found.values()}
    unexpected = [name for name in checkpoint if name not in used and name not in _names.DERIVED]
    empty = set(uninitialised or ())
    covered = {alias for entry in entries for alias in targets[entry.name]}
    lost = sorted(empty - covered)
    if strict and (missing or unexpected or mismatched):
        raise CheckpointMismatchError(_all_problems(checkpoint, missing, unexpected, mismatched))
    if lost:
        raise CheckpointMismatchError(
            f"load_pretrained: tensors on the meta device must be in {checkpoint.path}, but are not: {', '.join(lost)}; "
            "build them with memory (outside of torch.device('meta')), or map them with names="
        )
    return LoadPlan(checkpoint, entries, missing, unexpected, mismatched, output_scale, copies)


def _targets(module: nn.Module) -> dict[str, tuple[nn.Module, str, list[str], bool]]:
    """Name -> (owner, attribute, all names, whether a buffer) of everything that a digital checkpoint holds."""
    found: dict[str, tuple[nn.Module, str, list[str], bool]] = {}
    first: dict[int, str] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        own = _TILE_OWN if isinstance(owner, TileModule) else ()
        for is_buffer, kind in ((False, owner._parameters), (True, owner._buffers)):
            for attr, tensor in kind.items():
                if tensor is None or attr in own or (is_buffer and attr in owner._non_persistent_buffers_set):
                    continue
                name = f"{prefix}.{attr}" if prefix else attr
                if id(tensor) in first:
                    found[first[id(tensor)]][2].append(name)
                else:
                    first[id(tensor)] = name
                    found[name] = (owner, attr, [name], is_buffer)
    return found


def _all_problems(
    checkpoint: LazyCheckpoint, missing: list[str], unexpected: list[str], mismatched: dict[str, str]
) -> str:
    lines = [f"load_pretrained: {checkpoint.path} must fit the module:"]
    lines += [f"  missing in the file ({len(missing)}): {', '.join(missing)}"] if missing else []
    lines += [f"  unexpected in the file ({len(unexpected)}): {', '.join(unexpected)}"] if unexpected else []
    lines += [f"  mismatched: {name}: {shapes}" for name, shapes in mismatched.items()]
    return "\n".join(
        [*lines, "  map them with names=, or load what fits with strict=False; `lrtt inspect` shows the file"]
    )
