"""What mkdocs does to the pages (mkdocs.yml names this file): README.md and CHANGELOG.md are pages too.

The Markdown files are written to be read on a code host, where a link may lead to any file. On the site there are pages
only, so a link to another file of the repository becomes the file's name.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
_RULE = re.compile(r" +=+(?: =+)+$")  # a line of a table in reStructuredText
_SKETCH = re.compile(r"^( +)Example::\n\n((?:\1 +.*\n|\n)+)", re.MULTILINE)  # an example that is not run
_FENCE = re.compile(r"^(```.*?^```[ ]*$)", re.MULTILINE | re.DOTALL)


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show mkdocstrings the package as it is installed: callbacks/ lies beside it in the repository."""
    copy = tempfile.TemporaryDirectory(prefix="lrtt-docs-")
    config.extra["sources"], sources = copy, Path(copy.name)  # gone with the configuration
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "lightning_lrtt", sources / "lightning_lrtt", ignore=ignore)
    shutil.copytree(ROOT / "callbacks", sources / "lightning_lrtt" / "callbacks", ignore=ignore)
    for file in sources.rglob("*.py"):
        file.write_text(_for_the_parser(file.read_text(encoding="utf-8")), encoding="utf-8")
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(sources)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that live outside of docs/."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_from_root(text)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep links between pages, and turn those to other files into the files' names."""

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        path = target.partition("#")[0]
        if not path or ":" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join("docs", path))
        if path.startswith("docs/") and files.get_file_from_path(path.removeprefix("docs/")) is not None:
            return found[0]
        back = {source: page for page, source in PAGES.items()}
        if path in back:
            return f"[{text}]({back[path]})"
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri}: the link to {target} leads nowhere")
        return f"`{path}`" if text.strip("`") in (path, posixpath.basename(path)) else f"{text} (`{path}`)"

    return _outside_code(link, markdown)


def _for_the_parser(source: str) -> str:
    """Docstrings in the words of mkdocstrings: its name of the section with examples, Markdown for tables and sketches."""
    source = re.sub(r"^(\s+)Example:$", r"\1Examples:", source, flags=re.MULTILINE)
    source = _SKETCH.sub(lambda m: f"{m[1]}Examples:\n{m[1]}    ```python\n{m[2].rstrip()}\n{m[1]}    ```\n\n", source)
    lines, rules = [], 0
    for line in source.splitlines():
        if _RULE.match(line):  # a table has three: above and below its head, and at its end
            fence = " " * (len(line) - len(line.lstrip())) + "```"
            rules += 1
            lines += [fence + "text", line] if rules == 1 else [line, fence] if rules == 3 else [line]
            rules %= 3
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _from_root(text: str) -> str:
    """A file of the repository's root as if it lay in docs/."""

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        if ":" in target or target.startswith("#"):
            return found[0]
        return f"[{text}]({target.removeprefix('docs/') if target.startswith('docs/') else '../' + target})"

    images = re.sub(r"!\[([^\]]*)\]\(docs/", r"![\1](", text)
    return _outside_code(link, images)


def _outside_code(link, text: str) -> str:  # type: ignore[no-untyped-def]
    """Replace links where they are links: not within fenced blocks."""
    parts = _FENCE.split(text)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)
