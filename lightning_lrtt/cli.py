"""The ``lrtt`` command: a LightningCLI that knows the strategies, callbacks and optimizer of this package by name."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

import lightning_lrtt.callbacks
import lightning_lrtt.devices  # noqa: F401  short names in YAML: SoftBounds
from lightning_lrtt import LRTT, LRTTDDPStrategy, LRTTStrategy, device_command, export  # noqa: F401  short names in YAML
from lightning_lrtt.weights import inspect

_EPILOG = (
    "Besides: `lrtt export CHECKPOINT --to FILE` makes a digital checkpoint of one with tiles, "
    "`lrtt device NAME --plot FILE` draws what a device does, `lrtt inspect FILE` shows the tensors of a GGUF or "
    "safetensors file and where they would go (each has --help)."
)


class LRTTCLI(LightningCLI):
    """A LightningCLI in subclass mode with ``--test_after_fit``."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("subclass_mode_model", True)
        kwargs.setdefault("subclass_mode_data", True)
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})
        super().__init__(**kwargs)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=False,
            help="After `fit`, run `test` on the best checkpoint (the last weights where none was monitored).",
        )

    def after_fit(self) -> None:
        """Run the test set if the configuration asks for it."""
        once = self.trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
        if self.config.fit.test_after_fit and not once:
            best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path="best" if best else None)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the ``lrtt`` command: LightningCLI's subcommands, and some that need no Trainer.

    Args:
        args: Command line without the program name; None reads ``sys.argv``.
    """
    # A console script does not see the current directory; class_paths next to a YAML should resolve.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    log = logging.getLogger("lightning_lrtt")
    if not log.hasHandlers():  # what was converted and what stayed digital belongs on the screen
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    # Lightning 2.6 under torch 2.13 warns about its own use of torch's pytree.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
    words = sys.argv[1:] if args is None else list(args)
    beside = {"export": export.main, "device": device_command.main, "inspect": inspect.main}
    if words and words[0] in beside:
        beside[words[0]](words[1:])
    else:
        LRTTCLI(args=None if args is None else words, parser_kwargs={"epilog": _EPILOG})


if __name__ == "__main__":
    main()
