"""The code of README.md, its neighbours and docs/: which blocks a page has, and running them in order in a folder of their own.

What happens to a block stands in an HTML comment right before it, which readers do not see:

=========================  =============================================================================================
no comment                 ``python``: run; all blocks of a page share their names. ``bash``: checked but not run: files,
                           subcommands and options must exist. ``yaml``: must parse.
``<!-- run -->``           ``bash``: run. Lines of ``lrtt`` run in this process, other lines in a shell.
``<!-- not run: why -->``  Left alone, for the reason given.
``<!-- file: name -->``    Written to that file (and not run): later blocks use it.
``<!-- over: file -->``    ``yaml``: must be a valid configuration on top of that file. ``over: file at a.b`` puts it
                           under the key a.b first.
``<!-- output -->``        Each line must be in what the block before it printed, in this order. ``...`` stands for
                           anything; numbers may differ by 0.02, or by X with ``output: within X``.
``<!-- setup ... -->``     Python that runs before the block: what a reader has and a test has not.
=========================  =============================================================================================

``<!-- no block is run: why -->`` anywhere leaves all blocks of a page alone.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shlex
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(
    r"(?P<marks>(?:^<!--(?:(?!-->).)*-->[ ]*\n)*)^(?P<fence>```+)(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_MARK = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)
_KNOWN = ("run", "not run:", "file:", "over:", "output", "setup\n", "no block is run:")
_TOLERANCE = 0.02  # of accuracies: other processors add in another order, and of 360 scans seven make 0.02
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    kind: str
    text: str
    marks: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def mark(self, name: str) -> str | None:
        """What follows ``name`` in the block's comments, None without such a comment."""
        for mark in self.marks:
            if mark == name or mark.startswith((f"{name}:", f"{name}\n")):
                return mark[len(name) :].lstrip(":").strip()
        return None


def pages() -> list[Path]:
    """All pages with text for readers."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, with their comments."""
    text = page.read_text(encoding="utf-8")
    whole = re.search(r"<!--\s*(no block is run:.*?)\s*-->", text)
    found = []
    for match in _BLOCK.finditer(text):
        marks = tuple(_MARK.findall(match["marks"])) + ((f"not run: {whole[1]}",) if whole else ())
        line = text.count("\n", 0, match.start("fence")) + 1
        found.append(Block(page, line, match["kind"], match["text"], marks))
    return found


def problems(block: Block) -> list[str]:
    """What is wrong with a block's comments."""
    out = [f"unknown comment {mark!r}" for mark in block.marks if not mark.startswith(_KNOWN)]
    if block.mark("not run") == "":
        out.append("'not run' needs a reason")
    return out


class Reader:
    """Follows a page: runs and checks its blocks in order.

    Args:
        folder: The working folder; examples/, docs/ and the like are linked into it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("examples", "docs", "benchmarks", "constraints.txt"):
            (folder / name).symlink_to(ROOT / name)
        self.module = types.ModuleType("lrtt_doc_page")
        self.names = self.module.__dict__
        self.printed = ""

    def __enter__(self) -> Reader:
        self._modules = set(sys.modules)
        self._path = list(sys.path)
        self._cwd = os.getcwd()
        sys.modules[self.module.__name__] = self.module
        sys.path.insert(0, str(self.folder))
        os.chdir(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        os.chdir(self._cwd)
        sys.path[:] = self._path
        for name in set(sys.modules) - self._modules:  # modules of the page's files; others may stay
            file = getattr(sys.modules[name], "__file__", None) or ""
            if name == self.module.__name__ or Path(file).is_relative_to(self.folder):
                del sys.modules[name]

    def follow(self, block: Block) -> None:
        """Do with a block what its comments say.

        Raises:
            AssertionError: If it does not do what the page says; any exception of its code.
        """
        if block.mark("not run") is not None:
            return
        setup = block.mark("setup")
        if setup:
            exec(compile(setup, f"{block} (setup)", "exec"), self.names)
        name = block.mark("file")
        if name:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        over = block.mark("over")
        if over:
            self._overlay(block, over)
        elif block.mark("output") is not None:
            within = re.fullmatch(r"within (.+)", block.mark("output") or "")
            compare(block.text, self.printed, float(within[1]) if within else _TOLERANCE)
        elif name:
            pass
        elif block.kind == "python":
            self._collect(lambda: exec(compile(block.text, str(block), "exec"), self.names))
        elif block.kind == "bash":
            self._commands(block)
        elif block.kind == "yaml":
            yaml.safe_load(block.text)

    def _collect(self, call: Any) -> None:
        """Keep what a call prints and logs."""
        out = io.StringIO()
        handler, log = logging.StreamHandler(out), logging.getLogger("lightning_lrtt")
        level = log.level
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                call()
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
            self.printed = out.getvalue()

    def _commands(self, block: Block) -> None:
        run = block.mark("run") is not None
        printed = ""
        for line in commands(block.text):
            words = shlex.split(line, comments=True)
            if not run:
                check_command(words)
            elif words[0] == "lrtt" and not set(words) & {"&&", "|", ">"}:
                self._collect(lambda words=words: lrtt(words[1:]))
                printed += self.printed
            else:
                path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
                done = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", line],
                    env=os.environ | {"PATH": path},
                    capture_output=True,
                    text=True,
                    timeout=240,
                )
                assert done.returncode == 0, f"{block}: {line}\n{done.stdout}{done.stderr}"
                printed += done.stdout + done.stderr
        self.printed = printed

    def _overlay(self, block: Block, over: str) -> None:
        base, _, path = over.partition(" at ")
        tree = yaml.safe_load(block.text)
        for key in reversed(path.split(".") if path else []):
            tree = {key: tree}
        layer = self.folder / "overlay.yaml"
        layer.write_text(yaml.safe_dump(tree))
        self._collect(lambda: lrtt(["fit", "--config", base, "--config", str(layer), "--print_config"]))
        read = yaml.safe_load(self.printed)
        assert isinstance(read, dict) and "trainer" in read, f"{block}: no configuration came out:\n{self.printed}"


def commands(text: str) -> list[str]:
    """The commands of a shell block, without comments and prompts, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def lrtt(words: list[str]) -> None:
    """The ``lrtt`` command, in this process; it must succeed."""
    from lightning_lrtt.cli import main

    before, sys.argv = sys.argv, ["lrtt", *words]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, f"lrtt {' '.join(words)}: exit status {stop.code}"
    finally:
        sys.argv = before


def help_of(words: list[str]) -> str:
    """What ``lrtt WORDS --help`` says."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        lrtt([*words, "--help"])
    return out.getvalue()


def check_command(words: list[str]) -> None:
    """A command that is not run must name files, subcommands, options and extras that exist.

    Raises:
        AssertionError: If it does not.
    """
    while words and "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]  # variables
    for both in ("&&", "|", ";"):
        if both in words:
            at = words.index(both)
            check_command(words[:at])
            check_command(words[at + 1 :])
            return
    if not words:
        return
    command, rest = Path(words[0]).name, words[1:]
    if command == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        for extra in ",".join(extras).split(","):
            assert not extra or extra in known, f"pip install: no extra {extra!r} in pyproject.toml"
    elif command == "python" and rest and rest[0].endswith(".py"):
        script = ROOT / rest[0]
        assert script.is_file(), f"{rest[0]} is not in the repository"
        text = script.read_text()
        for option in (word.partition("=")[0] for word in rest[1:] if word.startswith("--")):
            assert f'"{option}"' in text, f"{rest[0]} has no option {option}"
    elif command == "lrtt" and rest and rest[0] in ("fit", "validate", "test", "predict"):
        given = _config_files(rest)
        missing = [file for file in given if file.startswith("examples/") and not (ROOT / file).is_file()]
        assert not missing, f"lrtt: {missing} are not in the repository"
        if given and all(file.startswith("examples/") for file in given):
            # Data and weights that an example makes are not there; the options are what is checked.
            lrtt([*rest, "--print_config=skip_default"])
    elif command == "lrtt" and rest:
        text = help_of(rest[:1])
        for option in (word.partition("=")[0] for word in rest[1:] if word.startswith("--")):
            assert option in text, f"lrtt {rest[0]} has no option {option}"


def _config_files(words: list[str]) -> list[str]:
    pairs = zip(words, [*words[1:], ""], strict=True)
    return [after for word, after in pairs if word in ("--config", "-c")] + [
        word.removeprefix("--config=") for word in words if word.startswith("--config=")
    ]


def compare(expected: str, printed: str, tolerance: float = _TOLERANCE) -> None:
    """Each line of ``expected`` must be in ``printed``, in this order; numbers loosely.

    Raises:
        AssertionError: Naming the first line that is not there.
    """
    lines = iter(_clean(printed))
    for want in _clean(expected):
        assert any(_alike(want, line, tolerance) for line in lines), f"not printed: {want!r}; all of it:\n{printed}"


def _clean(text: str) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;]*m|[│┃─━┏┓┗┛┡┩└┘┴┬┳╇]", " ", text)
    return [" ".join(line.split()) for line in plain.splitlines() if line.strip()]


def _alike(want: str, line: str, tolerance: float) -> bool:
    parts = [re.split(f"({_NUMBER.pattern})", part) for part in want.split("...")]
    pattern = ".*".join(
        "".join(f"({_NUMBER.pattern})" if i % 2 else re.escape(word) for i, word in enumerate(part)) for part in parts
    )
    found = re.fullmatch(f"{pattern}.*", line)
    if found is None:
        return False
    wanted = [float(word) for part in parts for word in part[1::2]]
    return all(abs(float(a) - b) <= tolerance for a, b in zip(found.groups(), wanted, strict=True))
