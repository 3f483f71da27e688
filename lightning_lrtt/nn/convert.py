"""Turning digital layers into tiles and back."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_lrtt.config import LRTTConfig
from lightning_lrtt.nn.conv import LRTTConv1d, LRTTConv2d
from lightning_lrtt.nn.linear import LRTTLinear
from lightning_lrtt.nn.tile import TileModule, find_tiles
from lightning_lrtt.nn.transposed import LRTTTransposedLinear, conv1d_class

log = logging.getLogger(__name__)

# Exact types only: a subclass may multiply in a way of its own. It is named among the layers that stay digital.
_TILES: dict[type[nn.Module], Any] = {nn.Linear: LRTTLinear, nn.Conv1d: LRTTConv1d, nn.Conv2d: LRTTConv2d}


def _kinds() -> dict[type[nn.Module], Any]:
    conv1d = conv1d_class()
    return _TILES if conv1d is None else {**_TILES, conv1d: LRTTTransposedLinear}


class PatternError(ValueError):
    """A pattern of ``include`` or ``exclude`` matches no layer."""


def convert_to_lrtt(
    module: nn.Module, config: LRTTConfig, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> nn.Module:
    """Replace Linear, Conv1d and Conv2d layers, and Conv1D of Hugging Face transformers, by tiles, in place.

    Weights and biases keep their Parameter identity, so an optimizer built before keeps working. What cannot be a tile stays
    digital and is named in one log message: weights shared with a layer that is not converted, parametrized layers, layers
    whose parent reads ``.weight`` itself (MultiheadAttention), grouped convolutions. Hooks of a layer go on with its tile.
    The layer itself raises if something outside the module tree (a list, a closure) still calls it. Idempotent.
    Tiles are numbered by their place below ``module``, and a number makes a tile's random key: convert at the root of a
    model, or give separate conversions different seeds.

    Args:
        module: The model; may itself be a layer, then its replacement is returned.
        config: For all tiles. A rank above min(d, k) is lowered for that layer, which is logged.
        include: Glob patterns of qualified names; only layers that match one are converted. None: all.
        exclude: Glob patterns of qualified names that stay digital.

    Outputs agree before and after, up to rounding, where devices can hold the weights and reads are exact (``io=None``).

    Returns:
        ``module``, or the tile that replaces it.

    Raises:
        ValueError: If a pattern matches no layer (`PatternError`).

    Example:
        >>> from torch import nn
        >>> model = convert_to_lrtt(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), LRTTConfig(rank=2))
        >>> {name: type(tile).__name__ for name, tile in find_tiles(model).items()}
        {'0': 'LRTTLinear'}
    """
    kinds = _kinds()
    layers: dict[str, Any] = {name: child for name, child in module.named_modules() if isinstance(child, tuple(kinds))}
    known = list(layers) + list(find_tiles(module))
    for kind, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in known):
                raise PatternError(
                    f"convert_to_lrtt: {kind} must match layers, but {pattern!r} matches none of {known}; "
                    "patterns are globs on qualified names, e.g. 'encoder.*'"
                )
    wanted = {
        name: child
        for name, child in layers.items()
        if (include is None or any(fnmatchcase(name, p) for p in include))
        and not any(fnmatchcase(name, p) for p in exclude or ())
    }
    refused = _refuse(module, wanted)
    lowered: list[str] = []
    first_tile = len(find_tiles(module))
    # A layer's number is its place among all layers that are or could be tiles, whichever are converted now: a second call
    # with other patterns gives no number twice.
    numbers = {
        id(child): i
        for i, child in enumerate(child for child in module.modules() if isinstance(child, (*kinds, TileModule)))
    }
    converted: dict[int, TileModule] = {}
    for name, child in wanted.items():
        if name in refused:
            continue
        d, k = child.weight.shape[0], child.weight[0].numel()
        own = config
        if config.rank > min(d, k):
            own = dataclasses.replace(config, rank=min(d, k))
            lowered.append(f"{name or type(child).__name__} ({min(d, k)})")
        converted[id(child)] = kinds[type(child)].from_digital(child, own, tile=numbers[id(child)])
        _share_hooks(child, converted[id(child)])
        child.forward = partial(_gone, name or type(child).__name__)
    result: nn.Module | None = converted.get(id(module))
    if result is None:
        for parent in list(module.modules()):
            for name, child in list(parent._modules.items()):  # named_children would skip a second use
                if id(child) in converted:
                    _put(parent, name, converted[id(child)])
        result = module
    _disable_fast_paths(module)
    if not converted and first_tile:
        return result  # a second conversion has nothing new to say
    log.info("lightning_lrtt: %d layers on LR-TT tiles", len(converted))
    if lowered:
        log.warning("lightning_lrtt: rank %d lowered to min(d, k) in %s", config.rank, ", ".join(lowered))
    if refused:
        log.warning("lightning_lrtt: kept digital: %s", "; ".join(f"{name} ({why})" for name, why in refused.items()))
    return result


def convert_to_digital(module: nn.Module) -> nn.Module:
    """Replace tiles by plain torch layers with the effective weights ``C + alpha A B``, in place.

    Args:
        module: Any module, a tile too.

    Returns:
        ``module``, or the layer that replaces it. Outputs agree with those of exact reads (``io=None``) up to rounding.

    Example:
        >>> type(convert_to_digital(LRTTLinear(4, 4, config=LRTTConfig(rank=1)))).__name__
        'Linear'
    """
    if isinstance(module, TileModule):
        return _share_hooks(module, module.to_digital())
    made: dict[int, nn.Module] = {}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, TileModule):
                if id(child) not in made:
                    made[id(child)] = _share_hooks(child, child.to_digital())
                _put(parent, name, made[id(child)])
    _enable_fast_paths(module)
    return module


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def _share_hooks(old: nn.Module, new: nn.Module) -> nn.Module:
    """Let ``new`` run the hooks of ``old``: the very dictionaries, so that handles go on removing from them."""
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]
    return new


def _gone(name: str, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        f"convert_to_lrtt: layer {name!r} must be called in its module, where it is a tile now, but something outside the "
        "module tree (a list, a closure) called the layer that it was; look it up in the module, e.g. with get_submodule"
    )


def _put(parent: nn.Module, name: str, child: nn.Module) -> None:
    setattr(parent, name, child)
    if hasattr(parent, "dynamo_ctx"):  # torch.compile of the layer itself: the wrapper holds the old layer's forward
        cast(Any, parent)._initialize()


def _refuse(module: nn.Module, wanted: dict[str, Any]) -> dict[str, str]:
    """Layers of ``wanted`` that must stay digital, with the reason."""
    refused: dict[str, str] = {}
    kinds = _kinds()
    owners: dict[int, list[nn.Module]] = {}
    for owner in module.modules():
        for parameter in owner._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(owner)
    attention = {id(m.out_proj) for m in module.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, child in wanted.items():
        if parametrize.is_parametrized(child):
            refused[name] = "parametrized"
        elif id(child) in attention:
            refused[name] = "MultiheadAttention reads its weight directly"
        elif type(child) not in kinds:
            refused[name] = f"a {type(child).__name__}, which may multiply in its own way"
        elif not isinstance(child.weight, nn.Parameter):
            refused[name] = "its weight is not a parameter"
        elif not isinstance(child.bias, nn.Parameter | None):
            refused[name] = "its bias is not a parameter"
        elif 0 in child.weight.shape:
            refused[name] = f"its weight {list(child.weight.shape)} is empty"
        elif "forward" in child.__dict__:
            gone = getattr(child.__dict__["forward"], "func", None) is _gone
            refused[name] = "it became a tile of another module" if gone else "its forward was replaced"
        elif any(owner is not child for owner in owners[id(child.weight)]):
            refused[name] = "its weight is shared with another layer"
        elif getattr(child, "groups", 1) != 1:
            refused[name] = "grouped convolution"
        elif getattr(child, "padding_mode", "zeros") != "zeros":
            refused[name] = f"padding mode {child.padding_mode}"
        elif getattr(child, "padding", 0) == "same" and any(
            d * (k - 1) % 2 for d, k in zip(child.dilation, child.kernel_size, strict=True)
        ):
            refused[name] = "padding 'same' adds more on one side"
        elif child.weight.dtype not in (torch.float32, torch.float64):
            refused[name] = f"dtype {child.weight.dtype}"
    return refused


# The attribute by which each of these decides at call time whether to take torch's inference fast path, which reads
# `.weight` of its layers directly and would bypass A B.
_FAST_PATHS: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}


def _disable_fast_paths(module: nn.Module) -> None:
    for layer in module.modules():
        for kind, mark in _FAST_PATHS.items():
            value: Any = getattr(layer, mark, 0)
            if value and isinstance(layer, kind) and find_tiles(layer):
                layer._lrtt_fast_path = value
                setattr(layer, mark, 0)


def _enable_fast_paths(module: nn.Module) -> None:
    for layer in module.modules():
        for kind, mark in _FAST_PATHS.items():
            if isinstance(layer, kind) and "_lrtt_fast_path" in layer.__dict__ and not find_tiles(layer):
                setattr(layer, mark, layer.__dict__.pop("_lrtt_fast_path"))
