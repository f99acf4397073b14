"""Hooks of mkdocs: tables of settings, pages and pictures from outside docs/, and links that leave
docs/.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from shardes.config import schema

DOCS = Path(__file__).parent
ROOT = DOCS.parent
ELSEWHERE = {
    "benchmarks.md": "benchmarks/README.md",
    "contribute.md": "CONTRIBUTING.md",
    "examples.md": "examples/README.md",
    "results.md": "results/README.md",
    "slurm.md": "launchers/slurm/README.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
}
PICTURES = ("results", "benchmarks/results")
KEYS = re.compile(r"<!-- keys(?: of (\w+))? -->")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:\s]+)((?:#[^)]*)?)\)")


def on_files(files: Any, config: Any, **_: object) -> None:
    """Called by mkdocs with the site's files: adds the measured pictures, at their own paths."""
    for directory in PICTURES:
        for picture in sorted((ROOT / directory).rglob("*.png")):
            name = picture.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(picture)))


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Called by mkdocs with each page's text."""
    source = ELSEWHERE.get(page.file.src_uri)
    return (
        rendered((ROOT / source).read_text(encoding="utf-8"), (ROOT / source).parent)
        if source
        else rendered(markdown, DOCS)
    )


def rendered(markdown: str, directory: Path) -> str:
    """The text of a page of the site, from a file in `directory`."""
    markdown = KEYS.sub(lambda match: table(match[1]), markdown)
    return LINK.sub(lambda match: _link(match, directory), markdown)


def table(section: str | None) -> str:
    """A table of a section's settings, or of those without a section: key, default, meaning."""
    rows = [
        f"| `{key}` | {_default(setting.default)} | {_escaped(setting.help)} |"
        for key, setting in schema.SETTINGS.items()
        if key.rpartition(".")[0] == (section or "")
    ]
    assert rows, f"there are no settings of {section}"
    return "\n".join(["| key | default | meaning |", "| --- | --- | --- |", *rows])


def _default(value: Any) -> str:
    shown = schema.shown(value)
    return shown if shown == "required" else f"`{shown}`"


def _escaped(text: str) -> str:
    return re.sub(r"([|<>*_{}])", r"\\\1", text)


def _link(match: re.Match[str], directory: Path) -> str:
    """A link to a page of the site; the name of a file that the site does not have."""
    image, text, target, anchor = match.groups()
    path = (directory / target).resolve()
    if path.is_relative_to(DOCS):
        return f"{image}[{text}]({os.path.relpath(path, DOCS)}{anchor})"
    pages = {ROOT / file: page for page, file in ELSEWHERE.items()}
    if path in pages:
        return f"[{text}]({pages[path]}{anchor})"
    name = path.relative_to(ROOT).as_posix()
    if image:
        assert name.startswith(PICTURES) and path.is_file(), f"no picture of the site: {name}"
        return f"![{text}]({name})"
    return text if name in text else f"{text} (`{name}`)"
