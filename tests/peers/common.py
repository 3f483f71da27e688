"""What both comparisons with aihwkit share: limits, a fresh run of aihwkit, the table in a page of docs/."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def replace_between(page: Path, head: str, tail: str, text: str) -> None:
    """Replace what stands between two lines of a page, each of which it has once."""
    before, rest = page.read_text().split(head + "\n")
    page.write_text(f"{before}{head}\n{text}\n{tail}{rest.split(tail)[1]}")


def fresh_table(script: str, folder: Path) -> Path:
    """Run a script of this folder with the Python that LRTT_AIHWKIT_PYTHON names; its table."""
    table = folder / "table.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [os.environ["LRTT_AIHWKIT_PYTHON"], Path(__file__).with_name(script), table]
    subprocess.run(command, check=True, cwd=folder, env=environment)
    return table


def assert_within(rows: Iterable[Any]) -> None:
    """Every comparison holds; the message lists those that do not."""
    far = [f"{row.what}: {row.distance:.4g} > {row.limit:.4g}" for row in rows if not row.distance <= row.limit]
    assert not far, "; ".join(far)
