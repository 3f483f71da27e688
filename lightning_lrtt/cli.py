"""The ``lrtt`` command: a LightningCLI that knows the strategies, callbacks and optimizer of this package by name."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

import jsonargparse
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

import lightning_lrtt.callbacks
import lightning_lrtt.devices  # noqa: F401  short names in YAML: TileMonitor, SoftBounds
from lightning_lrtt import (  # noqa: F401  likewise
    LRTT,
    LRTTDDPStrategy,
    LRTTStrategy,
    _cli_errors,
    bench_command,
    completion_command,
    device_command,
    export,
    info_command,
)
from lightning_lrtt.weights import inspect

log = logging.getLogger("lightning_lrtt")

_DESCRIPTION = """\
Train on simulated analog memory with low-rank Tiki-Taka. A run is a YAML file; every key of it is an option too."""

_EPILOG = """\
first steps, in the repository:
  lrtt fit --config examples/digits/config.yaml              train, test, leave logs and checkpoints in logs/
  lrtt fit --config examples/digits/pulsed.yaml --trainer.max_epochs=5 --trainer.strategy.init_args.config.rank=4
  lrtt fit --config examples/digits/pulsed.yaml --config examples/overlays/debug.yaml      files lie on one another
  lrtt fit --config run.yaml --print_config > all.yaml       every key with its default
  lrtt fit --config run.yaml --ckpt_path last.ckpt           go on where it stopped, bit for bit
  lrtt test --config run.yaml --ckpt_path best.ckpt
  lrtt export last.ckpt --to model.safetensors               back to a digital model
  tensorboard --logdir logs

help that goes deeper:
  lrtt fit --help                                            all of the Trainer
  lrtt fit --model.help examples.digits.model.DigitsClassifier
  lrtt fit --trainer.strategy.help lightning_lrtt.LRTTStrategy
  lrtt device --help                                         presets and device models

A mistake is told in one line; LRTT_TRACEBACK=1 shows where it was raised. Completion of words by TAB:
  lrtt completion bash > ~/.local/share/bash-completion/completions/lrtt       (pip install shtab)
"""

_BESIDE: dict[str, ModuleType] = {
    "export": export,
    "inspect": inspect,
    "device": device_command,
    "bench": bench_command,
    "info": info_command,
    "completion": completion_command,
}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Leaves the examples as they are written."""


_WORDS = {"prog": "lrtt", "description": _DESCRIPTION, "epilog": _EPILOG, "formatter_class": _HelpFormatter}


class _Parser(LightningArgumentParser):
    """Says a mistake in one line."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if _cli_errors.full() or not self.exit_on_error:  # a parser inside the parser raises, for the outer one to tell
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = " ".join(word for word in parser.prog.split() if word != "[options]")
        options = [o for action in parser._actions for o in action.option_strings]
        self.exit(2, f"{prog}: {_cli_errors.line(message, options)}\n")


class LRTTCLI(LightningCLI):
    """A LightningCLI in subclass mode with ``--test_after_fit``."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("subclass_mode_model", True)
        kwargs.setdefault("subclass_mode_data", True)
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})
        kwargs.setdefault("parser_class", _Parser)
        super().__init__(**kwargs)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="After `fit`, run `test` on the best checkpoint (the last weights where none was monitored).",
        )

    @override
    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name, module in _BESIDE.items():  # for --help and completion; `main` runs them
            beside = self.parser_class(description=module.HELP)
            module.add_arguments(beside)
            assert parser._subcommands_action is not None
            parser._subcommands_action.add_subcommand(name, beside, help=module.HELP)

    @override
    def before_instantiate_classes(self) -> None:
        """Give `CUDAGraph` a strategy that it can work with where the configuration names none."""
        trainer = self._get(self.config, "trainer")
        if self.subcommand != "fit" or not trainer or trainer.get("strategy") != "auto":
            return
        callbacks = trainer.get("callbacks") or []
        if any(
            str(c.get("class_path")).endswith(".CUDAGraph") for c in callbacks if isinstance(c, jsonargparse.Namespace)
        ):
            defaults = jsonargparse.ArgumentParser()
            defaults.add_class_arguments(LRTTStrategy, "strategy")
            arguments = defaults.get_defaults().strategy
            arguments.include = []
            trainer.strategy = jsonargparse.Namespace(  # type: ignore[no-untyped-call]  # not annotated
                class_path="lightning_lrtt.LRTTStrategy", init_args=arguments
            )
            log.info(
                "lrtt: CUDAGraph needs a strategy of this package; LRTTStrategy(include=[]) leaves all layers digital"
            )

    def after_fit(self) -> None:
        """Run the test set if the configuration asks for it."""
        once = self.trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
        if self.config.fit.test_after_fit and not once:
            best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path="best" if best else None)


class _Reader(LRTTCLI):
    """Parses and builds nothing."""

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # without the warning that sys.argv has words too

    @override
    def _set_seed(self) -> None:
        pass

    @override
    def instantiate_classes(self) -> None:
        pass

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        pass


def read_config(files: Sequence[str]) -> Mapping[str, Any]:
    """The configuration that ``lrtt fit`` makes of these files, checked against all signatures; nothing is built.

    Args:
        files: YAML files; later ones override.

    Raises:
        SystemExit: If they are no configuration, after a line that says why.
    """
    given = [word for file in files for word in ("--config", file)]
    return _Reader(args=["fit", *given]).config.fit.as_dict()  # type: ignore[no-any-return]  # not annotated


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of the whole command."""
    return _Reader(args=["info"], parser_kwargs=_WORDS).parser


_NEEDS: dict[str, dict[str, Any]] = {"info": {"read_config": read_config}, "completion": {"build": build_parser}}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the ``lrtt`` command: LightningCLI's subcommands, and some that need no Trainer.

    Args:
        args: Command line without the program name; None reads ``sys.argv``.

    Raises:
        SystemExit: With status 1 or 2 after one line about a mistake of the user's; with ``LRTT_TRACEBACK=1`` the
            exception itself.
    """
    # A console script does not see the current directory; class_paths next to a YAML should resolve.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if not log.hasHandlers():  # what was converted and what stayed digital belongs on the screen
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    # Lightning 2.6 under torch 2.13 warns about its own use of torch's pytree.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
    words = sys.argv[1:] if args is None else list(args)
    try:
        if words and words[0] in _BESIDE:
            _BESIDE[words[0]].main(words[1:], **_NEEDS.get(words[0], {}))
        else:
            LRTTCLI(args=None if args is None else words, parser_kwargs=_WORDS)
    except Exception as error:
        if _cli_errors.full() or not _cli_errors.is_mistake(error):
            raise
        name = words[0] if words and not words[0].startswith("-") else ""
        sys.stderr.write(
            f"{f'lrtt {name}'.strip()}: {_cli_errors.line(error)} ({_cli_errors.VARIABLE}=1 shows where)\n"
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
