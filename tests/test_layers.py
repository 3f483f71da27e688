"""Dependencies between the parts of the package point one way (CONTRIBUTING.md has the picture)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A part may import parts of earlier rows, none of its own row. `snapshot` is neutral; `free_nudged`, `weights` and `graphs`
# stand beside the optimizer and know nothing of each other.
LAYERS: list[set[str]] = [
    {"_C", "_check", "_files"},
    {"_compiled", "snapshot"},
    {"data", "ops"},
    {"devices", "io_config"},
    {"config"},
    {"presets"},
    {"costs", "device_plots", "nn"},
    {"export", "free_nudged", "graphs", "tile_step", "weights"},
    {"optim"},
    {"strategies"},
    {"callbacks"},
    set(),  # commands of `lrtt`: every other module of the package's root; they may use each other
    {"__init__", "cli"},
]
COMMANDS = next(rank for rank, row in enumerate(LAYERS) if not row)
# Below the strategies only these know Lightning: its exception for set-ups, its module as a base class.
KNOW_LIGHTNING = {"optim", "free_nudged"}


def rank(part: str) -> int:
    return next((i for i, row in enumerate(LAYERS) if part in row), COMMANDS)


def modules() -> dict[str, Path]:
    """Name within the package, as it is installed, to file."""
    found = {}
    for folder, prefix in ((ROOT / "lightning_lrtt", ()), (ROOT / "callbacks", ("callbacks",))):
        for file in sorted(folder.rglob("*.py")):
            names = [*prefix, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(names[:-1] if len(names) > 1 and names[-1] == "__init__" else names)] = file
    return found


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, also inside functions and for type checkers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports of the package are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def violations(name: str, source: str, parts: set[str]) -> list[str]:
    """What a module imports against the order."""
    own, wrong = name.split(".")[0], []
    for line, target in imported(ast.parse(source)):
        words = target.split(".")
        if words[0] == "lightning" and rank(own) < rank("strategies") and own not in KNOW_LIGHTNING:
            wrong.append(f"{name}:{line} imports {target}: below the strategies only {KNOW_LIGHTNING} know Lightning")
        if words[0] != "lightning_lrtt":
            continue
        part = words[1] if len(words) > 1 and words[1] in parts else "__init__"  # a name re-exported by the package
        whole = part == "__init__" and rank(own) >= rank("callbacks")  # the package by its public names
        command = rank(part) == rank(own) == COMMANDS  # they may share their parts
        if part != own and rank(part) >= rank(own) and not whole and not command:
            wrong.append(f"{name}:{line} imports {target}: {part} stands above or beside {own}")
    return wrong


def parts() -> set[str]:
    return {name.split(".")[0] for name in modules()} | {"_C"}


def test_imports_point_one_way() -> None:
    wrong = [text for name, file in modules().items() for text in violations(name, file.read_text(), parts())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("ops.schema", "from lightning_lrtt.nn import TileModule"),
        ("graphs.cache", "from lightning_lrtt import weights"),
        ("nn.tile", "def f():\n    from lightning_lrtt import LRTT"),
        ("weights.plan", "import lightning.pytorch as pl"),
        ("strategies.ddp", "from lightning_lrtt.callbacks.cuda_graph import CUDAGraph"),
    ],
    ids=["up", "beside", "through-the-package", "lightning", "callbacks"],
)
def test_the_check_sees(name: str, line: str) -> None:
    assert violations(name, line, parts())


def test_every_row_exists() -> None:
    """A part that is gone leaves the table."""
    assert set().union(*LAYERS) <= parts()
