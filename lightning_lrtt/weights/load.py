"""Filling a module from a checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping

import torch
from torch import nn

from lightning_lrtt.weights._materialize import materialize, uninitialised
from lightning_lrtt.weights._names import Names
from lightning_lrtt.weights._transforms import Transform
from lightning_lrtt.weights.checkpoint import LazyCheckpoint
from lightning_lrtt.weights.plan import make_plan
from lightning_lrtt.weights.report import LoadReport

log = logging.getLogger("lightning_lrtt.weights")


def load_pretrained(
    module: nn.Module,
    checkpoint: LazyCheckpoint | str | os.PathLike[str],
    *,
    names: Names = "auto",
    strict: bool = True,
    transforms: Mapping[str, Transform | str] | None = None,
    output_scale: bool = True,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> LoadReport:
    """Decode a checkpoint into the parameters of a module, in place and one after the other.

    All names and shapes are resolved before any parameter changes. C of an LR-TT tile takes its digital layer's weight:
    it is clipped to its device, and the factors start afresh, as when a digital state dict is loaded. A and B are not
    expected in the file. Buffers are filled where the file has them.

    Args:
        module: Tiles, digital layers, or both; parameters on the meta device get memory.
        checkpoint: An open one, or a path for `LazyCheckpoint.open`.
        names: How a parameter's name leads to a tensor's. ``auto``: the same name, or through the ``gguf`` library's
            table for the file's architecture, without a common beginning such as ``model.``. A dict from names to names
            (or to a `LazyTensor`, such as rows of a fused one); a sequence of (regex, replacement), of which the first
            that is found is applied; a callable. What a dict or the regexes leave out keeps its name.
        strict: Raise if anything is missing, unexpected or of another shape; False loads what fits. What a file holds
            of a tied parameter under its other names must have the same bytes.
        transforms: Glob on parameter names -> `Transform`, ``transpose``, ``minus_one`` or ``none``. None: what the
            file's architecture needs (GGUF files of the llama family hold permuted rows of q and k); ``{}``: nothing.
        output_scale: Divide weights beyond the mean bounds of a tile's device by a power of two that the tile
            multiplies its output with.
        device: Memory of parameters on meta; None: the CPU.
        progress: Called with the bytes of each tensor after it is loaded.

    Returns:
        What was done.

    Raises:
        CheckpointMismatchError: With ``strict``, one error that lists everything; always for a parameter on meta that
            the file does not have.
        CheckpointFormatError: If the file breaks its format's rules.
        CheckpointChangedError: If it changes meanwhile.
        ValueError: If the value transforms of the file's architecture are unknown and none are given, or a given one is
            no transform or its glob matches nothing.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> path = tempfile.mkdtemp() + "/one.safetensors"
        >>> save_file({"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, path)
        >>> load_pretrained(torch.nn.Linear(2, 3), path).loaded
        ('weight', 'bias')
    """
    opened = None
    if not isinstance(checkpoint, LazyCheckpoint):
        checkpoint = opened = LazyCheckpoint.open(checkpoint)
    try:
        plan = make_plan(module, checkpoint, names, strict, transforms, output_scale, uninitialised(module))
        materialize(module, torch.device("cpu" if device is None else device))
        for entry in plan.entries:
            plan.fill(entry)
            if progress is not None:
                progress(entry.source.nbytes)
        report = plan.report()
        log.debug(
            "%s: %d tensors, %d bytes in %.3f s", checkpoint.path, len(report.loaded), report.bytes, report.seconds
        )
        return report
    finally:
        if opened is not None:
            opened.close()
