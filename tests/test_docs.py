"""The pages: their code runs, their site builds without a warning, and reading it fetches nothing."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_blocks import ROOT, Block, Reader, blocks, check_command, compare, pages, problems

PAGES = [page for page in pages() if blocks(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the examples need it")
    with Reader(tmp_path) as reader:
        for block in blocks(page):
            assert not problems(block), f"{block}: {problems(block)}"
            try:
                reader.follow(block)
            except Exception as error:
                error.add_note(f"in the block at {block}") if sys.version_info >= (3, 11) else None
                raise
    assert not set(sys.modules) & {"lrtt_doc_page"}


def test_blocks_and_their_comments_are_found(tmp_path: Path) -> None:
    page = ROOT / "docs" / "unwritten.md"
    text = (
        "a\n\n<!-- not run: no GPU -->\n```python\nx = 1\n```\n"
        "<!-- setup\ny = 2\n-->\n<!-- file: a.yaml -->\n```yaml\nb: 1\n```\n"
    )
    (tmp_path / "page.md").write_text(text)
    first, second = (Block(page, b.line, b.kind, b.text, b.marks) for b in blocks(tmp_path / "page.md"))
    assert (first.line, first.kind, first.text, first.mark("not run")) == (4, "python", "x = 1\n", "no GPU")
    assert (second.mark("setup"), second.mark("file"), second.mark("run")) == ("y = 2", "a.yaml", None)
    assert problems(Block(page, 1, "bash", "", ("not run:", "rnu"))) == [
        "unknown comment 'rnu'",
        "'not run' needs a reason",
    ]


def test_a_failing_block_fails(tmp_path: Path) -> None:
    page = ROOT / "docs" / "unwritten.md"
    with Reader(tmp_path) as reader:
        with pytest.raises(ZeroDivisionError):
            reader.follow(Block(page, 1, "python", "1 / 0\n", ()))
        with pytest.raises(AssertionError, match="false"):
            reader.follow(Block(page, 1, "bash", "false\n", ("run",)))
        with pytest.raises(AssertionError, match="exit status"):
            reader.follow(Block(page, 1, "bash", "lrtt device no_such\n", ("run",)))
        reader.follow(Block(page, 1, "python", "print('accuracy', 0.95)\n", ()))
        reader.follow(Block(page, 1, "text", "... 0.96\n", ("output",)))
        with pytest.raises(AssertionError, match="not printed"):
            reader.follow(Block(page, 1, "text", "accuracy 0.90\n", ("output",)))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python benchmarks/no_such.py", "not in the repository"),
        ("python benchmarks/digits_accuracy.py --no_such", "no option --no_such"),
        ("lrtt fit --config examples/no_such.yaml", "not in the repository"),
        ("lrtt fit --config examples/digits/config.yaml --trainer.no_such=1", "exit status 2"),
        ("LRTT_CUDA=ON lrtt device reram_es --no_such x.png", "no option --no_such"),
        ("pip install -e .[no_such]", "no extra"),
    ],
)
def test_a_command_that_cannot_work_is_noticed(command: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the examples need it")
    monkeypatch.chdir(ROOT)
    with pytest.raises(AssertionError, match=message):
        check_command(command.split())


def test_outputs_are_compared_loosely() -> None:
    compare("test/acc 0.97\n", "noise\n│ test/acc │ 0.9722 │\n")
    with pytest.raises(AssertionError):
        compare("b\na\n", "a\nb\n")  # the order counts


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings_handlers.python", reason="needs the extra docs")
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},  # the theme's advertisement for its successor
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return target


def test_the_site_has_every_page(site: Path) -> None:
    expected = {page.stem for page in (ROOT / "docs").glob("*.md")} | {"index", "changelog", "contributing"}
    assert {page.stem for page in site.glob("*.html")} - {"404"} == expected
    navigation = (site / "index.html").read_text()
    for page in expected:
        assert f'href="{page}.html"' in navigation, f"{page} is not in the navigation of mkdocs.yml"


def test_reading_the_site_fetches_nothing(site: Path) -> None:
    """Scripts, styles, fonts and images come from the site itself; links may lead elsewhere."""
    for page in site.rglob("*.html"):
        text = page.read_text()
        fetched = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?([^\"'\s>]+)", text)
        fetched += re.findall(r"<link\b(?![^>]*rel=[\"']?(?:canonical|next|prev))[^>]*\bhref=[\"']?([^\"'\s>]+)", text)
        assert not [url for url in fetched if re.match(r"(?:https?:)?//", url)], page.name


def test_figures_are_small() -> None:
    """Figures of the pages stay below 100 kB each."""
    assert not [f.name for f in (ROOT / "docs").glob("*.png") if f.stat().st_size > 100_000]


def strings(path: Path) -> list[str]:
    """All strings of a module, f-strings with ``{}`` for what they insert."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values))
    return found


def test_tags_and_messages_of_the_troubleshooting_page_are_in_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    sources = [*(ROOT / "lightning_lrtt").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]
    said = [" ".join(text.split()) for path in sources for text in strings(path)]
    messages = re.findall(r'"([^"\n]+)"', page)
    assert len(messages) > 15
    assert not [message for message in messages if not any(message in text for text in said)]
    tags = re.findall(r"`((?:tile|pulse|transfer|graph|memory)/[^`]+)`", page)
    assert len(tags) > 10
    # Tags are put together from a prefix, the tile's name, and a statistic with or without its array.
    for tag in tags:
        first, *_, last = tag.split("/")
        parts = [first, re.sub(r"_?[ABC]$", "", last)]
        assert all(any(part in text for text in said) for part in parts), tag


def test_options_that_the_pages_for_readers_name_exist() -> None:
    """Words in backticks that look like options (a_b) of the tutorial and the troubleshooting page."""
    sources = [*(ROOT / "lightning_lrtt").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    lightning = {"every_n_steps", "drop_last", "gradient_clip_algorithm", "log_every_n_steps"}
    for page in ("tutorial", "troubleshooting"):
        prose = re.sub(r"^```.*?^```", "", (ROOT / "docs" / f"{page}.md").read_text(), flags=re.MULTILINE | re.DOTALL)
        for word in re.findall(r"`([a-z]+(?:_[a-z]+)+)\b[^`/]*`", prose):
            assert word in lightning or re.search(rf"\b{word}\b", text), f"{page}.md: {word}"
