"""Loads the compiled core and says what to do when it is not there."""

from __future__ import annotations

from typing import Any

try:
    from lightning_lrtt import _C
except ImportError as error:  # the source folder shadows an installed package, or nothing was built
    raise ImportError(
        "lightning_lrtt: the compiled module lightning_lrtt._C was not found. Either the package was not built "
        "(run `pip install -e .` in the repository), or Python picked the source folder instead of the installed "
        "package because it was started from the repository root (start it elsewhere, use `python -P`, or install "
        "with `pip install -e .`)."
    ) from error

LAYOUT: dict[str, Any] = _C.layout()


def build_info() -> dict[str, Any]:
    """What was compiled into this installation.

    Returns:
        ``with_cuda`` (bool), ``openmp`` (bool), ``debug`` (bool: with assertions, or not optimised),
        ``cpu_instructions`` (``base``, ``v3`` or ``v4``: the widest loops this processor runs), ``compiler``, and with
        CUDA kernels ``cuda_architectures``, ``cuda_runtime`` and ``cuda_driver`` (versions as
        ``1000 * major + 10 * minor``; driver 0 means that there is none).

    Example:
        >>> build_info()["cpu_instructions"] in ("base", "v3", "v4")
        True
    """
    return dict(_C.build_info())
