"""Write docs/features.md from the tests: one row for every ``@feature(group, name)``, its docstring as the text.

    python docs/make_features.py                          # rewrite the page
    pytest --junitxml report.xml; python docs/make_features.py --junit report.xml     # and mark what failed

A test of the suite compares the committed page with what this script writes.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "features.md"
GROUPS = (
    "Modules",
    "Loops",
    "Precision",
    "Step",
    "Optimizers",
    "Averaging",
    "Callbacks",
    "Tools",
    "Data",
    "Models",
    "Two-phase training (FreeNudgedModule)",
    "Command line",
    "Distributed",
)
HEAD = """# What works on tiles

Every row is a test ([how](../tests/features.py)); this page is made from them by `python docs/make_features.py`.
✓ works, ✗ is refused with a message that says what to do, - has no test of its own.
"""


@dataclass
class Row:
    """One feature: its columns by kind of tile, and what its tests say."""

    columns: dict[str, str] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    tests: list[str] = field(default_factory=list)


def marked() -> list[tuple[str, Any, Any]]:
    """File, function and mark of every test that is a feature."""
    found = []
    for added in (str(ROOT / "tests"), str(ROOT)):
        if added not in sys.path:
            sys.path.append(added)
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if "@feature(" not in path.read_text():
            continue
        spec = importlib.util.spec_from_file_location(f"features_of_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for function in vars(module).values():
            for mark in getattr(function, "pytestmark", []):
                if mark.name == "feature" and function.__module__ == module.__name__:
                    found.append((path.name, function, mark))
    return found


def failures(report: Path) -> set[str]:
    """Names of the test functions that failed in a junit report."""
    return {
        case.get("name", "").split("[")[0]
        for case in ElementTree.parse(report).iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    }


def text(function: Any) -> str:
    """First paragraph of the docstring on one line, as Markdown."""
    paragraph = (function.__doc__ or "").strip().split("\n\n")[0]
    return re.sub(r"\s+", " ", paragraph).replace("``", "`").replace("|", "\\|")


def page(failed: frozenset[str] | set[str] = frozenset()) -> str:
    """The whole page."""
    groups: dict[str, dict[str, Row]] = {group: {} for group in GROUPS}
    for file, function, mark in marked():
        about = mark.kwargs
        row = groups[about["group"]].setdefault(about["name"], Row())
        kinds = ("digital", "pulsed") if about["tiles"] == "both" else (about["tiles"],)
        for kind in kinds:
            sign = "failed" if function.__name__ in failed else "✗" if about["refused"] else "✓"
            if row.columns.get(kind) != "failed":
                row.columns[kind] = sign
        said = text(function)
        label = "" if len(kinds) == 2 or not said else f"{about['tiles'].capitalize()}: "
        if label + said not in row.texts:
            row.texts.append(label + said)
        row.tests.append(f"[{function.__name__.removeprefix('test_')}](../tests/{file})")
    lines = [HEAD]
    for group, rows in groups.items():
        if not rows:
            continue
        lines += [f"## {group}", "", "| feature | digital | pulsed | what holds | test |", "|---|---|---|---|---|"]
        for name, row in rows.items():
            columns = [row.columns.get(kind, "-") for kind in ("digital", "pulsed")]
            lines.append("| " + " | ".join([name, *columns, " ".join(row.texts), ", ".join(row.tests)]) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", type=Path, default=None, help="a report of pytest --junitxml")
    args = parser.parse_args()
    PAGE.write_text(page(failures(args.junit) if args.junit else set()))


if __name__ == "__main__":
    main()
