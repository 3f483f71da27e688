"""docs/features.md is what the tests say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def script() -> Any:
    pytest.importorskip("sklearn", reason="the tests of the examples need it")
    spec = importlib.util.spec_from_file_location("make_features", DOCS / "make_features.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.undo()
    return module


def test_the_page_is_up_to_date(script: Any) -> None:
    assert (DOCS / "features.md").read_text() == script.page(), "run python docs/make_features.py"


def test_every_feature_says_what_holds(script: Any) -> None:
    for file, function, mark in script.marked():
        assert script.text(function), f"{file}: {function.__name__} needs a docstring"
        assert mark.kwargs["group"] in script.GROUPS


def test_failures_are_marked(script: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="test_swa[pulsed]"><failure/></testcase>'
        '<testcase name="test_ema[pulsed]"/></testsuite></testsuites>'
    )
    assert script.failures(report) == {"test_swa"}
    row = next(
        line for line in script.page({"test_swa"}).splitlines() if line.startswith("| StochasticWeightAveraging")
    )
    assert row.count("| failed |") >= 1
