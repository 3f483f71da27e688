"""The subcommand ``lrtt device``."""

from __future__ import annotations

import argparse
import ast
import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from lightning_lrtt import _check, devices, presets
from lightning_lrtt.device_plots import characteristics, save_plot

log = logging.getLogger(__name__)


def names() -> list[str]:
    """Presets, then models."""
    return [*presets.DEVICES, *(name for name in devices.__all__ if name not in ("Device", "PulsedDevice"))]


def find_device(name: str, numbers: Sequence[str] = ()) -> devices.Device:
    """A device by the name of a preset or of a class.

    Args:
        name: ``ecram_mo``, ``SoftBounds``, ...
        numbers: ``field=value`` each, over the preset's or the class's own. Of ``OneSided``, ``device`` is a name like
            this.

    Raises:
        ValueError: If there is no such device or field, or the value is refused.

    Example:
        >>> find_device("SoftBounds", ["dw_min=0.01"]).dw_min
        0.01
    """
    _check.choice("lrtt device", "NAME", name, names())
    device: Any = presets.DEVICES[name] if name in presets.DEVICES else getattr(devices, name)()
    known = [f.name for f in fields(device)]
    changes: dict[str, Any] = {}
    for entry in numbers:
        field, equals, text = entry.partition("=")
        if not equals or field not in known:
            raise _check.fail(
                "lrtt device",
                "--set",
                f"field=value with a field of {type(device).__name__}",
                entry,
                f"its fields: {', '.join(known)}",
            )
        if field == "device":
            changes[field] = find_device(text)
            continue
        try:
            changes[field] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise _check.fail(
                "lrtt device", f"--set {field}", "a number, True, False or a tuple of numbers", text
            ) from None
    return replace(device, **changes)  # type: ignore[no-any-return]  # devices are dataclasses


HELP = "Say what a device does, and draw it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``lrtt device``."""
    parser.add_argument("name", metavar="NAME", help="preset or model")
    parser.add_argument(
        "--plot", metavar="FILE", help="figure to write, *.png, *.pdf or *.svg; replaced if it is there"
    )
    parser.add_argument(
        "--set", metavar="FIELD=VALUE", action="append", default=[], help="another number of the device"
    )
    parser.add_argument("--pulses", type=int, help="length of the trains (default: 1.5 times the number of states)")
    parser.add_argument("--cells", type=int, default=200, help="how many cells to draw (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws and the noise (default: 0)")


def main(args: Sequence[str]) -> None:
    """The subcommand ``lrtt device``.

    Args:
        args: Command line after ``device``.
    """
    parser = argparse.ArgumentParser(
        prog="lrtt device",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Say what a device does, and draw it: pulse response, steps, number of states, symmetry point.",
        epilog="examples:\n"
        "  lrtt device reram_es --plot reram_es.png\n"
        "  lrtt device SoftBounds --set dw_min=0.01 --set w_max=1.0 --plot soft.svg\n"
        "  lrtt device OneSided --set device=ecram --plot pair.png\n\n"
        f"presets: {', '.join(presets.DEVICES)}\n"
        f"models: {', '.join(n for n in devices.__all__ if n not in ('Device', 'PulsedDevice'))}",
    )
    add_arguments(parser)
    given = parser.parse_args(args)
    try:
        device = find_device(given.name, given.set)
        _check.integer("lrtt device", "--cells", given.cells, low=2, high=1_000_000)
        _check.integer("lrtt device", "--seed", given.seed, low=0, high=2**63 - 1)
        if given.pulses is not None:
            _check.integer("lrtt device", "--pulses", given.pulses, low=1)
        log.info("%s: %s", given.name, device)
        log.info("%s; granularity %.4g", characteristics(device, given.cells, given.seed), device.granularity)
        if given.plot:
            save_plot(device, given.plot, given.name, given.pulses, given.cells, given.seed)
            log.info("lrtt device: wrote %s", given.plot)
    except (OSError, ValueError, TypeError, ImportError) as error:
        parser.exit(1, f"{error}\n")
