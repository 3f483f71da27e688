"""What a tile's arrays mean, stored beside them: a checkpoint alone says how to read C, A and B.

The description holds what must be the same where a checkpoint is written and where it is loaded. Everything else
(schedule, pulse trains, seed) may be changed between runs and is not part of it.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from torch import Tensor

from lightning_lrtt.config import LRTTConfig
from lightning_lrtt.devices import Device


def describe(config: LRTTConfig, transposed: bool = False) -> dict[str, Any]:
    """The tile in builtins; devices as they stand in YAML.

    Args:
        config: The tile's numbers.
        transposed: Whether the digital layer stores its weight as ``[in, out]``.
    """
    return {
        "rank": config.rank,
        "alpha": config.alpha,
        "fast_device": _device(config.fast_device),
        "visible_device": _device(config.visible_device),
        "transposed": transposed,
    }


def encode(description: dict[str, Any]) -> Tensor:
    """A uint8 tensor of JSON: a state dict of tensors only goes through ``weights_only=True`` and safetensors."""
    return torch.tensor(list(json.dumps(description).encode()), dtype=torch.uint8, device="cpu")


def decode(encoded: Tensor) -> dict[str, Any]:
    """What `encode` was given."""
    return json.loads(bytes(encoded.cpu().tolist()))  # type: ignore[no-any-return]  # an object, by its own encoder


def disagreements(saved: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """Sentences on what differs, e.g. ``alpha is 0.5 in the checkpoint and 1.0 here``."""
    said = []
    for name in own:
        one, other = saved.get(name, own[name]), own[name]
        if isinstance(one, dict) and isinstance(other, dict) and one["class_path"] == other["class_path"]:
            # Fields that only one version of the package knows had no effect in the other.
            fields = [f for f in one["init_args"] if f in other["init_args"]]
            said += [
                f"{name}.{f} is {one['init_args'][f]!r} in the checkpoint and {other['init_args'][f]!r} here"
                for f in fields
                if one["init_args"][f] != other["init_args"][f]
            ]
        elif one != other:
            said.append(f"{name} is {_short(one)} in the checkpoint and {_short(other)} here")
    return said


def _short(value: Any) -> str:
    return value["class_path"].rpartition(".")[2] if isinstance(value, dict) else repr(value)


def _device(device: Device | None) -> dict[str, Any] | None:
    if device is None:
        return None
    if dataclasses.is_dataclass(device):
        values = {f.name: getattr(device, f.name) for f in dataclasses.fields(device)}
        arguments = {name: _device(value) if isinstance(value, Device) else value for name, value in values.items()}
    else:
        arguments = device.numbers()
    path = f"{type(device).__module__}.{type(device).__qualname__}"
    return {"class_path": path, "init_args": json.loads(json.dumps(arguments))}  # tuples become lists, as after loading
