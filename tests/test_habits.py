"""The project's habits, checked: linting, formats, types, lengths of files, words that say something is unfinished."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest

from lightning_lrtt import _C, build_info

ROOT = Path(__file__).resolve().parent.parent
INSTALL = 'pip install -c constraints.txt -e ".[test]"'
TEXT = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".md", ".toml", ".yaml", ".yml", ".txt", ".cmake"}

# Lines of a file, at most. Files that were longer when this was written may not grow; a file that shrinks below the limit
# leaves the table.
LIMITS = {
    "lightning_lrtt": 450,
    "callbacks": 450,
    "csrc": 400,
    "benchmarks": 450,
    "examples": 450,
    "docs": 450,
    "tests": 700,
}
LONGER = {
    "csrc/devices.h": 477,
}
# Spelled in two halves, so that this file passes its own test.
UNFINISHED = re.compile("|".join(("TO" + "DO", "FIX" + "ME", r"\bXX" + r"X\b", r"\bTB" + r"D\b", "lorem " + "ipsum")))


def tracked() -> list[Path]:
    """Files of the repository that hold text, without what git ignores."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout, so nothing says which files are the repository's")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    files = [ROOT / name for name in listed.stdout.splitlines()]
    return [file for file in files if file.suffix in TEXT and file.is_file()]


def command(name: str) -> str:
    """Path of a tool in the version of constraints.txt; skips without it, since another version judges differently."""
    path = shutil.which(name, path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", ""))))
    if path is None:
        pytest.skip(f"{name} is not installed; {INSTALL}")
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    if pinned(name) not in said:
        pytest.skip(f"{name} must be {pinned(name)}, got {said.strip()!r}; {INSTALL}")
    return path


def pinned(name: str) -> str:
    """The version of a package in constraints.txt."""
    found = re.search(rf"^{re.escape(name)}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None, f"constraints.txt does not pin {name}"
    return found[1]


def run(*words: str) -> None:
    """Run a tool at the root; its output is the failure's message."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, f"{' '.join(words[:4])}:\n{done.stdout}{done.stderr}"


def test_ruff_check() -> None:
    run(command("ruff"), "check", ".")


def test_ruff_format() -> None:
    run(command("ruff"), "format", "--check", ".")


@pytest.mark.timeout(600)  # half a minute without a cache on a machine that has nothing else to do
def test_mypy() -> None:
    """As CONTRIBUTING.md says; ``strict`` stands in pyproject.toml and is repeated here, so that it cannot get lost."""
    mypy = command("mypy")
    for library in ("torch", "lightning", "numpy", "gguf", "safetensors", "transformers"):
        if version(library).partition("+")[0] != pinned(library):  # it is annotated otherwise
            pytest.skip(f"{library} must be {pinned(library)}, got {version(library)}; {INSTALL}")
    run(mypy, "--strict", "lightning_lrtt", "callbacks")


def test_clang_format() -> None:
    sources = [str(file) for file in tracked() if file.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert len(sources) > 30
    run(command("clang-format"), "--dry-run", "--Werror", *sources)


def test_pre_commit_configuration() -> None:
    """It is valid, and no hook wants anything from the network."""
    pytest.importorskip("pre_commit", reason=f"pre-commit is not installed; {INSTALL}")
    run(sys.executable, "-m", "pre_commit", "validate-config", ".pre-commit-config.yaml")
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (\S+)", text) == ["local"]
    assert set(re.findall(r"language: (\S+)", text)) == {"system"}


def test_lengths() -> None:
    wrong, short = [], dict(LONGER)
    for file in tracked():
        name = file.relative_to(ROOT).as_posix()
        limit = LIMITS.get(name.split("/")[0])
        if limit is None or file.suffix not in {".py", ".h", ".cpp", ".cu", ".cuh"}:
            continue
        lines = len(file.read_text().splitlines())
        if lines > short.pop(name, limit):
            wrong.append(f"{name} has {lines} lines, at most {LONGER.get(name, limit)}: split it by idea")
        if name in LONGER and lines <= limit:
            wrong.append(f"{name} has {lines} lines: take it out of LONGER")
    wrong += [f"{name} is gone: take it out of LONGER" for name in short]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_left_for_later() -> None:
    wrong = []
    for file in tracked():
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
            if UNFINISHED.search(line) or any(cell in {"?", "...", "…"} for cell in cells):
                wrong.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)


def test_nothing_prints() -> None:
    """Results of commands are written to stdout by name; the package itself speaks through `logging`."""
    wrong = []
    for folder in ("lightning_lrtt", "callbacks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, wrong


def test_type_ignores_have_a_reason() -> None:
    """``# type: ignore[code]  # why``; mypy itself refuses one without a code."""
    wrong = []
    for file in tracked():
        if file.suffix not in {".py", ".pyi"} or file.relative_to(ROOT).parts[0] not in ("lightning_lrtt", "callbacks"):
            continue
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            if line.startswith("def _("):  # a fake: its types stand in the operator's schema
                continue
            if "# type: ignore" in line and not re.search(r"# type: ignore\[[a-z, -]+\]  # \S", line):
                wrong.append(f"{file.relative_to(ROOT)}:{number}")
    assert not wrong, "\n".join(wrong)


def test_stub_of_the_compiled_module() -> None:
    """`_C.pyi` names what `_C` has, and beyond it only the kernels of a CUDA build."""
    tree = ast.parse((ROOT / "lightning_lrtt" / "_C.pyi").read_text())
    said = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    said |= {
        node.target.id for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    there = {name for name in dir(_C) if not name.startswith("__")}
    assert there <= said, f"_C.pyi lacks {sorted(there - said)}"
    missing = {name for name in said - there if not name.endswith(("_cuda", "_cuda_bytes"))}
    assert not missing, f"_C.pyi has {sorted(missing)}, which the module has not"
    assert not (build_info()["with_cuda"] and said - there), f"_C.pyi has {sorted(said - there)}"
