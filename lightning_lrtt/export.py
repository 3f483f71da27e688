"""From a checkpoint with tiles to a digital one: every tile becomes its effective weight ``C + alpha A B``."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lrtt import _check
from lightning_lrtt._files import replacing
from lightning_lrtt.nn import identity

__all__ = ["digital_state_dict", "export_checkpoint"]

log = logging.getLogger(__name__)
_OWN = (
    "A",
    "B",
    "tile_state",
    "tile_counts",
    "tile_reads",
    "A_cells",
    "B_cells",
    "C_cells",
    "output_scale",
    "_extra_state",
)
_SUFFIXES = (".safetensors", ".pt")


def digital_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of the digital model: effective weights, without factors and counters.

    Args:
        state_dict: Of a model with tiles.

    Returns:
        A new dict; entries that belong to no tile are the same objects.

    Raises:
        ValueError: If there are no tiles in it, or a tile without its description.

    Example:
        >>> import torch
        >>> from lightning_lrtt import LRTTConfig, convert_to_lrtt
        >>> tiles = convert_to_lrtt(torch.nn.Sequential(torch.nn.Linear(4, 3)), LRTTConfig(rank=2))
        >>> state = digital_state_dict(tiles.state_dict())
        >>> torch.nn.Sequential(torch.nn.Linear(4, 3)).load_state_dict(state)
        <All keys matched successfully>
    """
    me = "digital_state_dict"
    tiles = [name.removesuffix("tile_state") for name in state_dict if name.rpartition(".")[2] == "tile_state"]
    if not tiles:
        raise _check.fail(
            me,
            "state_dict",
            "that of a model with LR-TT tiles",
            f"{len(state_dict)} entries without any",
            "a digital checkpoint needs no export",
        )
    digital = dict(state_dict)
    for prefix in tiles:
        own = {name: digital.pop(prefix + name, None) for name in _OWN}
        if own["_extra_state"] is None:
            raise _check.fail(
                me,
                prefix + "_extra_state",
                "there, since alpha is in it",
                None,
                "load the checkpoint into the model after convert_to_lrtt and save it again",
            )
        if own["A"] is None or own["B"] is None or prefix + "weight" not in digital:
            raise _check.fail(
                me,
                f"the tile {prefix.removesuffix('.')!r}",
                "complete (weight, A, B)",
                "only a part",
                "give the whole state dict",
            )
        said = identity.decode(own["_extra_state"])
        weight = _effective(digital[prefix + "weight"], own["A"], own["B"], said["alpha"])
        if own["output_scale"] is not None:
            weight = weight * own["output_scale"]
        digital[prefix + "weight"] = weight.t().contiguous() if said["transposed"] else weight
    return digital


@torch.no_grad()
def _effective(c: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return torch.addmm(c.reshape(a.shape[0], -1), a, b, alpha=alpha).view(c.shape)  # TileModule.effective_weight's bits


def export_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    prefix: str = "",
    overwrite: bool = False,
    weights_only: bool = True,
) -> dict[str, Any]:
    """Write the digital state dict of a checkpoint with tiles.

    Args:
        source: A Lightning checkpoint, or a state dict saved by ``torch.save`` or safetensors.
        target: File to write, ``.safetensors`` or ``.pt``; it appears whole or not at all.
        prefix: Keep only the entries whose names start with it, and take it off: ``model.`` for a model that the
            LightningModule holds as ``self.model``.
        overwrite: Replace an existing target.
        weights_only: False unpickles whatever is in ``source``: only for files that you trust.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: If there is no source.
        FileExistsError: If there is a target and ``overwrite`` is off.
        ValueError: If the target's suffix is unknown, or the source is no checkpoint with tiles.
        ImportError: If safetensors is needed and missing.

    Example:
        >>> import tempfile, torch
        >>> from lightning_lrtt import LRTTConfig, convert_to_lrtt
        >>> folder = tempfile.mkdtemp()
        >>> tiles = convert_to_lrtt(torch.nn.Sequential(torch.nn.Linear(4, 3)), LRTTConfig(rank=2))
        >>> torch.save(tiles.state_dict(), f"{folder}/tiles.pt")
        >>> sorted(export_checkpoint(f"{folder}/tiles.pt", f"{folder}/digital.pt"))
        ['0.bias', '0.weight']
    """
    me = "export"
    source, target = Path(source), Path(target)
    if target.suffix not in _SUFFIXES:
        raise _check.fail(me, "target", f"a file named *{' or *'.join(_SUFFIXES)}", str(target))
    if not source.is_file():
        raise FileNotFoundError(
            f"{me}: source must be a checkpoint file, got {str(source)!r}, which is "
            f"{'a folder' if source.is_dir() else 'not there'}"
        )
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"{me}: target must be a new file, got {str(target)!r}; --overwrite (overwrite=True) replaces it"
        )
    state = _read(source, weights_only)
    if prefix:
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if not state:
            raise _check.fail(me, "prefix", "the beginning of names in the checkpoint", prefix)
    try:
        state = digital_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{me}: {source}: {error}") from None
    if target.suffix == ".safetensors":
        save_file = _safetensors().save_file
        alien = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if alien:
            raise _check.fail(me, "target", "a .pt file for entries that are no tensors", str(target), f"here: {alien}")
        # Copies: safetensors refuses tensors that share memory, as tied weights do.
        state = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
        with replacing(target) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
    else:
        with replacing(target) as temporary:
            torch.save(state, temporary)
    return state


def _read(source: Path, weights_only: bool) -> dict[str, Any]:
    if source.suffix == ".safetensors":
        return _safetensors().load_file(source)  # type: ignore[no-any-return]  # safetensors carries no types
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"export: source must hold tensors and builtins, got {str(source)!r}, which torch.load(weights_only=True) "
            "refuses; if it is a checkpoint that you trust, use --unsafe (weights_only=False). "
            f"{str(error).splitlines()[0]}"
        ) from None
    except (RuntimeError, EOFError) as error:
        raise _check.fail("export", "source", "a checkpoint", str(source), str(error).partition("\n")[0]) from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise _check.fail("export", "source", "a Lightning checkpoint or a state dict", str(source))
    return dict(state)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "export: safetensors must be installed for *.safetensors, but it is not; "
            "pip install safetensors, or export to *.pt"
        ) from None
    return safetensors.torch


HELP = "Make a digital checkpoint of one with tiles."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``lrtt export``."""
    parser.add_argument("checkpoint", help="Lightning checkpoint, or a state dict (.pt, .safetensors)")
    parser.add_argument("--to", required=True, metavar="FILE", help="file to write, *.safetensors or *.pt")
    parser.add_argument("--prefix", default="", help="keep only names that start with it, and take it off")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    parser.add_argument(
        "--unsafe",
        action="store_true",
        help="unpickle any object of the checkpoint, which can run code: only for files that you trust",
    )


def main(args: Sequence[str]) -> None:
    """The subcommand ``lrtt export``.

    Args:
        args: Command line after ``export``.
    """
    parser = argparse.ArgumentParser(
        prog="lrtt export",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Turn a checkpoint with LR-TT tiles into a digital state dict: each weight becomes C + alpha A B,\n"
        "and the file loads into the original model with strict=True.",
        epilog="examples:\n"
        "  lrtt export logs/run/version_0/checkpoints/last.ckpt --to digits.safetensors\n"
        "  lrtt export last.ckpt --to gpt2.safetensors --prefix model.   # the module's self.model alone\n\n"
        "in Python: lightning_lrtt.export.export_checkpoint, or convert_to_digital(module) for a live model",
    )
    add_arguments(parser)
    given = parser.parse_args(args)
    try:
        state = export_checkpoint(
            given.checkpoint, given.to, prefix=given.prefix, overwrite=given.overwrite, weights_only=not given.unsafe
        )
    except (OSError, ValueError, ImportError) as error:
        parser.exit(1, f"lrtt {error}\n")
    log.info("lrtt export: wrote %d tensors to %s", len(state), given.to)
