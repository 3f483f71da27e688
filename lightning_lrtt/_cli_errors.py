"""What the ``lrtt`` command says of a mistake: one line with the remedy.

jsonargparse tells what it tried, a page of it for a nested class; the one line is its innermost complaint, the path of
keys that leads there, and a name that looks like the one given. ``LRTT_TRACEBACK=1`` leaves everything as it was raised.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import StrategyRegistry

from lightning_lrtt import NonFiniteError
from lightning_lrtt.weights import CheckpointChangedError, CheckpointFormatError, CheckpointMismatchError

VARIABLE = "LRTT_TRACEBACK"
_OURS = (
    MisconfigurationException,
    NonFiniteError,
    CheckpointFormatError,
    CheckpointMismatchError,
    CheckpointChangedError,
)
_CHECKERS = ("jsonargparse", "lightning.pytorch.trainer", "lightning.pytorch.cli", "lightning.fabric.accelerators")
# What tells nothing that another line does not tell better.
_NOISE = re.compile(
    r"(?:- )?(?:Does not validate against|Subtypes:|Errors:|Given value|Expected a <class '[\w.]+'>$|Expected a path but|"
    r"Problem with given class_path|Parser key|Expected an? (?:List|list|Union|Iterable))"
)
_REMEDIES = (
    ("No supported gpu backend", "--trainer.accelerator=cpu or auto; `lrtt info` says what torch sees"),
    ("ile does not exist", "paths are relative to the current directory"),
    ("Problems parsing config", "the file must be YAML; --print_config writes one to begin with"),
    ("file not found", "paths are relative to the current directory"),
    ("arguments are required", "give it on the command line or in a file: --config FILE"),
)


def full() -> bool:
    """Whether the user wants the whole story."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def is_mistake(error: BaseException) -> bool:
    """Whether a line is enough: the configuration is wrong or a file missing, not the program or the user's code."""
    if isinstance(error, (*_OURS, FileNotFoundError)) or (isinstance(error, OSError) and error.filename is not None):
        return True
    if isinstance(error, (ValueError, TypeError, ImportError, OSError)):
        if re.match(r"[^\n]+: [^\n]+ must ", str(error)):  # the words of _check
            return True
        # jsonargparse wraps whatever a class raises when it is built.
        about_values = all(isinstance(e, (ValueError, TypeError, ImportError, OSError)) for e in _causes(error))
        return about_values and _raised_by(error).startswith(_CHECKERS)
    return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _raised_by(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))


def line(error: BaseException | str, options: Iterable[str] = ()) -> str:
    """The mistake in one line.

    Args:
        error: What was raised, or the text of a parser.
        options: Option strings of the parser, among which a mistyped one has a neighbour.

    Returns:
        Without a line break, ending with the remedy if one is known.

    Example:
        >>> line("unrecognized arguments: --modle.lr=3", ["--model", "--data"])
        "unrecognized arguments: --modle.lr=3; did you mean '--model'?"
    """
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
        return text + ("; paths are relative to the current directory" if isinstance(error, FileNotFoundError) else "")
    if found := re.search(r"invalid strategy name: `strategy='(.*?)'`", text):
        near = _neighbour(found[1], ["auto", *StrategyRegistry.available_strategies()])
        return f"trainer.strategy must be auto, lrtt, lrtt_ddp or another one of Lightning's, got {found[1]!r}{near}"
    if found := re.search(r"[^\n]*unrecognized arguments: (\S+)[^\n]*", text):
        return found[0] + _neighbour(re.split(r"[.=]", found[1])[0], options)
    said = _condense(text)
    said = said.rstrip("!. ")
    return said + next((f"; {remedy}" for words, remedy in _REMEDIES if words in said and remedy not in said), "")


def _condense(text: str) -> str:
    lines = text.splitlines()
    path = ".".join(re.findall(r'Parser key "(.*?)":', text))
    classes = re.findall(r"class_path '(.*?)':", text)
    leaves = [entry for entry in lines[:-1] + lines[-1:] if entry.strip() and not _NOISE.match(entry.strip())]
    if unknown := [entry for entry in leaves if "Expected a dot import path string" in entry]:
        leaves = unknown[-1:] if any("Subclass types expect one of" in entry for entry in leaves) else leaves
    leaf = max(leaves, key=lambda entry: len(entry) - len(entry.lstrip()), default="").strip().removeprefix("- ")
    where = f"{path}: " if path else ""
    if found := re.match(r"Option '(.*?)' is not accepted", leaf):
        names = _parameters(classes[-1]) if classes else []
        return _wrong_name(path + " key" if path else "the key", found[1], names)
    if found := re.match(r"Expected a dot import path string: (.*)", leaf):
        kinds = {kind.__name__: kind for base in _subtypes(text) for kind in _subclasses(base)}
        if found[1] in kinds:  # jsonargparse looks names up for the outer class only
            rule = "the full dotted path of a class where it is an argument of another"
            return f"{where}must be {rule}, got {found[1]!r}; write {_path(kinds[found[1]])!r}"
        rule = "a class: its dotted path, or the name of one that is known here"
        return f"{where}must be {rule}, got {found[1]!r}{_neighbour(found[1], kinds)}"
    if re.match(r"No module named|module '.*' has no attribute", leaf) and classes:
        module, _, name = classes[-1].rpartition(".")
        near = _neighbour(name, dir(_import(module)) if _import(module) is not None else [])
        return f"{where}no class {classes[-1]!r} ({leaf}){near or '; imports begin in the current directory'}"
    if found := re.match(r"Expected an? (.*?)\. Got value: (.*)", leaf):
        return f"{where}must be {_plain(found[1])}, got {found[2]!r}"
    if not leaf and (found := re.search(r"Given value: (.*)", text)):
        return f"{where}must be {' or '.join(_plain(kind) for kind in _subtypes(text))}, got {found[1]!r}"
    if len(lines) == 1 or not (path or "Does not validate" in text):  # no story of types: as it is
        leaf = " ".join(entry.strip() for entry in lines if entry.strip())
        return re.sub(r'^Parser key "(.*?)":\s*', r"\1: ", leaf)
    return where + leaf


def _plain(kind: str) -> str:
    if kind.startswith("typing.Literal"):
        return "one of " + kind[len("typing.Literal[") : -1]
    return re.sub(r"<class '([\w.]+)'>", r"\1", kind).replace("NoneType", "null")


def _subtypes(text: str) -> list[str]:
    found = re.findall(r"Subtypes: \[(.*)\]", text)
    return re.findall(r"<class '([\w.]+)'>", found[-1]) if found else []


def _import(path: str) -> Any:
    try:
        return importlib.import_module(path)
    except Exception:  # whatever a user's module raises: this is only for a suggestion
        return None


def _parameters(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    kind = getattr(_import(module), name, None)
    return [] if kind is None else [p for p in inspect.signature(kind).parameters if p != "self"]


def _subclasses(path: str) -> list[type]:
    module, _, name = path.rpartition(".")
    todo, kinds = [getattr(_import(module), name, None)] if module else [], []
    while todo:
        kind = todo.pop()
        kinds += [] if kind is None else [kind]
        todo += [] if kind is None else kind.__subclasses__()
    return [kind for kind in kinds if not kind.__name__.startswith("_")]


def _path(kind: type) -> str:
    """The shortest dotted path that leads to a class."""
    parts = kind.__module__.split(".")
    places = (".".join(parts[:k]) for k in range(1, len(parts) + 1))
    return next(
        (f"{p}.{kind.__name__}" for p in places if getattr(_import(p), kind.__name__, None) is kind), kind.__qualname__
    )


def _wrong_name(what: str, given: str, names: Iterable[str]) -> str:
    names = list(dict.fromkeys(names))
    rule = f" must be one of {', '.join(names)}," if names else " is unknown,"
    return f"{what}{rule} got {given!r}{_neighbour(given, names)}"


def _neighbour(given: str, names: Iterable[str]) -> str:
    known = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), known, n=1)
    return f"; did you mean {known[near[0]]!r}?" if near else ""
