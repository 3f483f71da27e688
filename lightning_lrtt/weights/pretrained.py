"""The pretrained checkpoint of a run: filled once, never over a resumed one."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from lightning_lrtt import _check
from lightning_lrtt.weights._materialize import materialize, uninitialised
from lightning_lrtt.weights._progress import byte_bar
from lightning_lrtt.weights.checkpoint import LazyCheckpoint
from lightning_lrtt.weights.lazy_fill import LazyFill
from lightning_lrtt.weights.plan import LoadPlan, make_plan
from lightning_lrtt.weights.report import LoadReport

log = logging.getLogger("lightning_lrtt")


class Pretrained:
    """Which checkpoint initialises a module, and when its tensors are read.

    Args:
        path: A GGUF or safetensors checkpoint (`LazyCheckpoint.open`).
        mode: ``progressive``: all tensors before training, with a progress bar. ``lazy``: each layer's before its first
            forward pass; layers that are never called are loaded when a checkpoint is saved. ``prefetch``: lazy, and a
            thread that walks ahead.
        names: See `load_pretrained`.
        strict: See `load_pretrained`.
        transforms: See `load_pretrained`.
        output_scale: See `load_pretrained`.
        verify: See `LazyCheckpoint.open`.
        sha256: See `LazyCheckpoint.open`.

    Raises:
        ValueError: If ``mode`` or ``verify`` is none of its choices.

    Example:
        >>> Pretrained("model.gguf", mode="lazy").pending  # nothing is opened before the strategy's setup
        []
    """

    def __init__(
        self,
        path: str,
        mode: Literal["progressive", "lazy", "prefetch"] = "progressive",
        names: str | dict[str, str] | list[list[str]] | Callable[[str], Any] = "auto",
        strict: bool = True,
        transforms: dict[str, str] | None = None,
        output_scale: bool = True,
        verify: Literal["structure", "values"] = "structure",
        sha256: str | None = None,
    ) -> None:
        _check.choice("Pretrained", "mode", mode, ("progressive", "lazy", "prefetch"))
        _check.choice("Pretrained", "verify", verify, ("structure", "values"))
        self.path, self.mode, self.names, self.strict = os.fspath(path), mode, names, strict
        self.transforms, self.output_scale, self.verify, self.sha256 = transforms, output_scale, verify, sha256
        self._module: weakref.ref[nn.Module] | None = None
        self._fill: LazyFill | None = None
        self._plan: LoadPlan | None = None
        self._restored = False

    @property
    def report(self) -> LoadReport | None:
        """What was loaded so far; None before anything was planned, and for a resumed run."""
        return None if self._plan is None else self._plan.report()

    @property
    def pending(self) -> list[str]:
        """Parameters that wait for their layer's first call."""
        return [] if self._fill is None else self._fill.pending

    def tensors(self) -> list[torch.Tensor]:
        """The parameters and buffers whose values come from the file; none before `apply` and after `restored`."""
        return (
            []
            if self._plan is None or self._restored
            else [getattr(entry.owner, entry.attr) for entry in self._plan.entries]
        )

    def apply(self, module: nn.Module, device: torch.device, bar: str | None = None) -> None:
        """Fill the module on ``device``, or install what will; once for each module, and not after `restored`.

        The thread of ``prefetch`` waits for `prefetch`: a strategy's setup reads and sends what a fill writes.

        Args:
            module: With its tiles; parameters on meta get memory on ``device``.
            device: Where the module is to live; it is moved there first.
            bar: ``rich``, ``tqdm`` or None.

        Raises:
            CheckpointFormatError, CheckpointMismatchError, CheckpointChangedError, ValueError: See `load_pretrained`;
                before anything is changed, but for a file that changes while it is read.
        """
        if self._is(module):
            return
        checkpoint = LazyCheckpoint.open(self.path, verify=self.verify, sha256=self.sha256)
        try:
            plan = make_plan(
                module, checkpoint, self.names, self.strict, self.transforms, self.output_scale, uninitialised(module)
            )
            materialize(module, device)
            module.to(device)
            self._plan, self._restored = plan, False
            if self.mode == "progressive":
                with byte_bar(bar, plan.bytes, f"Loading {os.path.basename(self.path)}") as advance:
                    for entry in plan.entries:
                        plan.fill(entry)
                        advance(entry.source.nbytes)
        except BaseException:
            checkpoint.close()
            raise
        self._module = weakref.ref(module)
        if self.mode == "progressive":
            self._end(checkpoint, plan)
            return
        log.info("lightning_lrtt: %d tensors of %s are loaded on first use", len(plan.entries), self.path)
        self._fill = LazyFill(module, plan, lambda: self._end(checkpoint, plan))

    def prefetch(self) -> None:
        """Let the thread of mode ``prefetch`` begin, once; call it when the setup of module and strategy is over."""
        if self._fill is not None and self.mode == "prefetch":
            self._fill.prefetch()

    def restored(self, module: nn.Module, device: torch.device) -> None:
        """A checkpoint is about to be loaded into the module: give it memory, and never fill it."""
        self.finish()
        materialize(module, device)
        if not self._is(module):
            self._plan = None
        self._module, self._restored = weakref.ref(module), True
        log.debug("lightning_lrtt: %s is not loaded, a checkpoint of a run is", self.path)

    def finish(self) -> None:
        """Fill what is pending."""
        if self._fill is not None:
            self._fill.finish()

    def stop(self) -> None:
        """End the prefetching thread; hooks stay."""
        if self._fill is not None:
            self._fill.stop()

    def _is(self, module: nn.Module) -> bool:
        return self._module is not None and self._module() is module

    def _end(self, checkpoint: LazyCheckpoint, plan: LoadPlan) -> None:
        checkpoint.close()
        self._fill = None
        report = plan.report()
        log.info(
            "lightning_lrtt: %d tensors, %.1f MB from %s in %.2f s",
            len(report.loaded),
            report.bytes / 1e6,
            self.path,
            report.seconds,
        )
        for what, names in (
            ("missing", report.missing),
            ("unexpected", report.unexpected),
            ("mismatched", tuple(report.mismatched)),
        ):
            if names:
                log.warning("lightning_lrtt: %s in %s: %s", what, self.path, ", ".join(names))
        clipped = {name: share for name, share in report.clipped.items() if share > 0}
        if clipped:
            worst = max(clipped, key=lambda name: clipped[name])
            log.warning(
                "lightning_lrtt: pretrained weights at or beyond their devices' bounds in %d tiles, most in %s (%.2g of "
                "the cells)",
                len(clipped),
                worst,
                clipped[worst],
            )
