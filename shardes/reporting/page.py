"""The report's page: the kinds of its content, and the template that makes HTML of them.

The template escapes every value, so that no text of models or users becomes markup. If some did,
the page's policy lets it run and load nothing: it allows only the page's own two scripts.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from shardes.words import prompt_text

HERE = Path(__file__).parent


@dataclass
class Text:
    kind: ClassVar = "text"
    text: str


@dataclass
class Heading:
    kind: ClassVar = "heading"
    text: str


@dataclass
class Cards:
    """Figures that are read first, by name."""

    kind: ClassVar = "cards"
    figures: Mapping[str, str]


@dataclass
class Table:
    kind: ClassVar = "table"
    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()


@dataclass
class Chart:
    kind: ClassVar = "chart"
    title: str
    figure: go.Figure

    @property
    def json(self) -> dict[str, Any]:
        return self.figure.to_plotly_json()


@dataclass
class Answer:
    """A response with its reward; `change` is that of the reward since the first one."""

    caption: str
    response: str
    reward: float
    change: float = 0.0


@dataclass
class Answers:
    """A prompt, and responses to it side by side."""

    kind: ClassVar = "answers"
    prompt: Any
    answers: Sequence[Answer]

    @property
    def text(self) -> str:
        return prompt_text(self.prompt)


@dataclass
class Details:
    """Content that is folded at first."""

    kind: ClassVar = "details"
    summary: str
    blocks: "Sequence[Block]"


Block = Text | Heading | Cards | Table | Chart | Answers | Details


def page(title: str, about: Sequence[str], sections: Mapping[str, Sequence[Block]]) -> str:
    """The page as HTML; sections without content are left out.

    Args:
        about: paragraphs under the title.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [get_plotlyjs(), (HERE / "draw.js").read_text()]
    return environment.get_template("page.html").render(
        title=title,
        about=about,
        sections={name: blocks for name, blocks in sections.items() if blocks},
        scripts=list(map(Markup, scripts)),
        hashes=[_hash(script) for script in scripts],
    )


def _printable(value: Any) -> Any:
    """Text without control characters, which HTML must not hold: Unicode has a picture of each.

    Halves of UTF-16's pairs, which a damaged file may hold, become U+FFFD: UTF-8 has none.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    value = re.sub("[\ud800-\udfff]", "\ufffd", value)
    return re.sub(r"[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), value)


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
