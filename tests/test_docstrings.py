"""Docstrings: their examples run, and those of public names say what every argument is."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "lightning_lrtt").rglob("*.py"))
] + [f"lightning_lrtt.callbacks.{path.stem}" for path in sorted((ROOT / "callbacks").glob("[!_]*.py"))]
PUBLIC = (
    "lightning_lrtt",
    "lightning_lrtt.callbacks",
    "lightning_lrtt.device_plots",
    "lightning_lrtt.devices",
    "lightning_lrtt.export",
    "lightning_lrtt.free_nudged",
    "lightning_lrtt.graphs",
    "lightning_lrtt.nn",
    "lightning_lrtt.presets",
    "lightning_lrtt.weights",
)
# Shown by the example of what makes or takes them.
RECORDS = {
    "Characteristics": "characteristics",
    "Entry": "GraphCache",
    "Finding": "Finder",
    "LazyTensor": "LazyCheckpoint",
    "LoadReport": "load_pretrained",
    "Outcome": "TwoPhase",
    "Phase": "System",
    "Transform": "load_pretrained",
    "find_tiles": "convert_to_lrtt",
}
ABSTRACT = {"Device", "PulsedDevice", "Recorder", "Recording", "TileModule"}
REFERS = re.compile(r"All (?:other )?arguments (?:and shapes )?are those of `")


def _public() -> list[tuple[str, Any]]:
    found: dict[int, tuple[str, Any]] = {}
    for name in PUBLIC:
        module = importlib.import_module(name)
        for public in module.__all__:
            member = getattr(module, public)
            if inspect.isclass(member) or inspect.isfunction(member):
                found.setdefault(id(member), (f"{name}.{public}", member))
    return sorted(found.values(), key=lambda pair: pair[0])


EVERYTHING = _public()


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def _own(member: Any) -> str:
    """The docstring that was written for it, not one that it inherits or that dataclasses makes."""
    text = inspect.cleandoc(member.__doc__ or "")
    return "" if inspect.isclass(member) and text.startswith(f"{member.__name__}(") else text


@pytest.mark.parametrize(("name", "member"), EVERYTHING, ids=[name for name, _ in EVERYTHING])
def test_public_names_are_documented(name: str, member: Any) -> None:
    text = _own(member)
    assert text, "a docstring"
    if inspect.isclass(member) and issubclass(member, BaseException):
        return
    own_fields = inspect.get_annotations(member)
    elsewhere = importlib.import_module("lightning_lrtt.devices").SoftBounds.__dataclass_fields__
    for argument, value in inspect.signature(member).parameters.items():
        if argument in ("args", "kwargs", "options") or argument.startswith("_") or value.kind == value.VAR_POSITIONAL:
            continue
        documented = re.search(rf"^\s+{argument}:", text, re.MULTILINE)
        inherited = REFERS.search(text) and (argument in elsewhere or argument not in own_fields)
        assert documented or inherited, f"Args must name {argument}"
    module = importlib.import_module(member.__module__)
    shown = any("Example" in there for there in (text, module.__doc__ or ""))
    assert shown or member.__name__ in RECORDS or member.__name__ in ABSTRACT, "a runnable example"


def test_records_are_shown_by_an_example() -> None:
    members = {name.rpartition(".")[2]: member for name, member in EVERYTHING}
    for record, shown_by in RECORDS.items():
        assert record in members
        assert "Example" in _own(members[shown_by])


def test_errors_are_documented() -> None:
    """A public function or constructor that raises says so (`_check` raises too)."""
    for name, member in EVERYTHING:
        start = (
            member.__dict__.get("__post_init__", member.__dict__.get("__init__")) if inspect.isclass(member) else member
        )
        if start is None or member.__name__ in ABSTRACT or (isinstance(member, type) and issubclass(member, Exception)):
            continue
        try:
            source = inspect.getsource(start)
        except (OSError, TypeError):
            continue  # made by dataclasses
        raises = "raise " in source or re.search(r"_check\.\w+\(", source)
        inherits = REFERS.search(_own(member)) is not None
        assert not raises or "Raises:" in _own(member) or inherits, f"{name}: a section Raises"
