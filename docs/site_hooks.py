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
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^(```.*?^```[ ]*$)", re.MULTILINE | re.DOTALL)


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show mkdocstrings the package as it is installed: callbacks/ lies beside it in the repository."""
    sources = Path(tempfile.mkdtemp(prefix="lrtt-docs-"))
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "lightning_lrtt", sources / "lightning_lrtt", ignore=ignore)
    shutil.copytree(ROOT / "callbacks", sources / "lightning_lrtt" / "callbacks", ignore=ignore)
    for file in sources.rglob("*.py"):  # the name of that section in the parser; ours have one example each
        text = file.read_text(encoding="utf-8")
        file.write_text(re.sub(r"^(\s+)Example:$", r"\1Examples:", text, flags=re.MULTILINE), encoding="utf-8")
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(sources)]
    config.extra["sources"] = str(sources)
    return config


def on_post_build(config: MkDocsConfig) -> None:
    """Remove the copy of `on_config`."""
    shutil.rmtree(config.extra["sources"], ignore_errors=True)


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
