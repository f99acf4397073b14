"""What mkdocs makes of the pages: tables of settings, pages that lie elsewhere, and links that leave this directory."""

import os
import re
from pathlib import Path
from typing import Any

from shardes import config

DOCS = Path(__file__).parent
ROOT = DOCS.parent
ELSEWHERE = {"contribute.md": "CONTRIBUTING.md", "security.md": "SECURITY.md", "changelog.md": "CHANGELOG.md"}
KEYS = re.compile(r"<!-- keys(?: of (\w+))? -->")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:\s]+)((?:#[^)]*)?)\)")


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Called by mkdocs with each page's text."""
    source = ELSEWHERE.get(page.file.src_uri)
    return rendered((ROOT / source).read_text(encoding="utf-8"), ROOT) if source else rendered(markdown, DOCS)


def rendered(markdown: str, home: Path) -> str:
    """A page of the site from a text that lies in `home`."""
    markdown = KEYS.sub(lambda found: table(found[1]), markdown)
    return LINK.sub(lambda found: _link(found, home), markdown)


def table(section: str | None) -> str:
    """The settings of a section, or those of none, with their defaults and meanings."""
    prefix = f"{section}." if section else ""
    rows = [
        f"| `{key}` | {_default(default)} | {_escaped(meaning)} |"
        for key, (default, meaning) in config.keys().items()
        if key.rpartition(".")[0] == prefix.removesuffix(".")
    ]
    assert rows, f"there are no settings of {section}"
    return "\n".join(["| key | default | meaning |", "| --- | --- | --- |", *rows])


def _default(value: Any) -> str:
    shown = config.shown(value)
    return shown if shown == "required" else f"`{shown}`"


def _escaped(text: str) -> str:
    return re.sub(r"([|<>*_{}])", r"\\\1", text)


def _link(found: re.Match[str], home: Path) -> str:
    """A link to another page, from here; what lies outside this directory is named, for the site does not have it."""
    image, text, target, anchor = found.groups()
    path = (home / target).resolve()
    if path.is_relative_to(DOCS):
        return f"{image}[{text}]({os.path.relpath(path, DOCS)}{anchor})"
    pages = {ROOT / file: page for page, file in ELSEWHERE.items()}
    if path in pages:
        return f"[{text}]({pages[path]}{anchor})"
    place = str(path.relative_to(ROOT))
    return text if place in text else f"{text} (`{place}`)"
