"""``lrtt completion``: a script with which a shell completes the words of the command.

jsonargparse writes one too, of all arguments of all subclasses: for a Trainer 160 MB. This one knows the subcommands,
their options, and the names that go behind some of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy

from lightning_lrtt import device_command, presets

__all__ = ["mirror"]

HELP = "Write a script that completes the words of this command."
_SHELLS = ("bash", "zsh", "tcsh")
_CLASSES = {
    "--optimizer": torch.optim.Optimizer,
    "--trainer.strategy": Strategy,
    "--trainer.callbacks": Callback,
    "--trainer.logger": Logger,
}
_FILES = ("--config", "--ckpt_path", "--of", "--to", "--plot", "checkpoint")


def mirror(parser: argparse.ArgumentParser, file: Any = None) -> argparse.ArgumentParser:
    """A plain parser with the subcommands and options of ``parser``.

    Args:
        parser: With one level of subcommands.
        file: What shtab takes for a file name, put on options that take one.
    """
    plain = argparse.ArgumentParser(prog=parser.prog)
    _copy(parser, plain, file)
    below = plain.add_subparsers()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                _copy(sub, below.add_parser(name, help=name), file)
    return plain


def _copy(source: argparse.ArgumentParser, target: argparse.ArgumentParser, file: Any) -> None:
    for action in source._actions:
        words = action.option_strings or [action.dest]
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)) or action.help == argparse.SUPPRESS:
            continue
        copied = target.add_argument(*words, choices=_names(words, action))
        if file is not None and set(words) & set(_FILES):
            copied.complete = file  # type: ignore[attr-defined]  # what shtab reads


def _names(words: Sequence[str], action: argparse.Action) -> list[str] | None:
    if words == ["name"]:
        return device_command.names()
    if words == ["--device-preset"]:
        return list(presets.DEVICES)
    kind = next((kind for option, kind in _CLASSES.items() if option in words), None)
    if kind is None:
        return None if action.choices is None else [str(choice) for choice in action.choices]
    todo: list[type] = [kind]
    found = {"lrtt", "lrtt_ddp"} if kind is Strategy else set()
    while todo:
        below: list[type] = todo.pop().__subclasses__()
        todo += below
        found |= {c.__name__ for c in below if not c.__name__.startswith("_")}
    return sorted(found)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``lrtt completion``."""
    parser.add_argument("shell", choices=_SHELLS, help="what the script is for")


def main(args: Sequence[str], build: Callable[[], argparse.ArgumentParser]) -> None:
    """The subcommand ``lrtt completion``.

    Args:
        args: Command line after ``completion``.
        build: Makes the parser of the whole command.
    """
    parser = argparse.ArgumentParser(
        prog="lrtt completion",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write a script that completes subcommands, options, names of classes and devices. Needs shtab.",
        epilog="examples:\n"
        "  lrtt completion bash > ~/.local/share/bash-completion/completions/lrtt\n"
        '  lrtt completion zsh > "${fpath[1]}/_lrtt"',
    )
    add_arguments(parser)
    given = parser.parse_args(args)
    try:
        import shtab  # type: ignore[import-not-found,unused-ignore]  # optional
    except ImportError:
        parser.exit(1, "lrtt completion: shtab must be installed, but it is not; pip install shtab\n")
    sys.stdout.write(shtab.complete(mirror(build(), shtab.FILE), shell=given.shell))
