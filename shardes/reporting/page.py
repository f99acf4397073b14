"""HTML for the report: the page, tables, figures and samples.

Text from models and users is escaped, so that none of it becomes markup.
"""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root {
  color-scheme: light dark;
  --bg: #fcfcfb; --fg: #1d1d1f; --dim: #62636a; --line: #dcdcda; --box: #f2f2ef;
  --c0: #2563c9; --c1: #c2570c; --c2: #0f8a5f; --c3: #8a4fc9; --c4: #b0356b; --c5: #7a6a12;
  --c6: #8b8d94; --up: #0b7a4b; --down: #b3261e; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #17181b; --fg: #e7e7e6; --dim: #a0a2aa; --line: #36383e; --box: #222429;
  --c0: #7aacff; --c1: #ff9f5c; --c2: #58d0a0; --c3: #c79bff; --c4: #ff8fbb; --c5: #dcc75a;
  --c6: #80828a; --up: #58d0a0; --down: #ff8f87; } }
* { box-sizing: border-box; }
body { background: var(--bg); color: var(--fg); font: 15px/1.5 system-ui, sans-serif;
  margin: 0 auto; max-width: 960px; padding: 32px 20px 80px; }
h1 { font-size: 27px; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 44px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 22px 0 8px; }
p { color: var(--dim); margin: 6px 0 12px; max-width: 75ch; overflow-wrap: anywhere; }
nav a { color: var(--c0); margin-right: 16px; text-decoration: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 10px;
  margin: 18px 0; }
.cards div { background: var(--box); border-radius: 8px; padding: 10px 14px; }
.cards b { display: block; font-size: 17px; font-variant-numeric: tabular-nums; }
.cards span, .tag { color: var(--dim); font-size: 13px; }
figure { margin: 14px 0 22px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--dim); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: 1; }
.legend span { margin-right: 18px; font-size: 13px; white-space: nowrap; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px;
  margin-right: 6px; vertical-align: -1px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; margin: 8px 0; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
th { color: var(--dim); font-weight: 500; }
.sample { background: var(--box); border-radius: 8px; padding: 10px 14px; margin: 0 0 12px; }
.sample > div { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr));
  gap: 14px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 16em; overflow-y: auto;
  margin: 2px 0 6px; font: 13px/1.45 ui-monospace, monospace; unicode-bidi: isolate; }
pre.prompt { color: var(--dim); }
.up { color: var(--up); }
.down { color: var(--down); }
summary { cursor: pointer; color: var(--dim); }
@media print { pre { max-height: none; } }
"""
# If markup got into the page in spite of escaping, it could load and run nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def escaped(value: Any) -> str:
    """A value as text, with markup and control characters escaped."""
    # HTML must not hold control characters: Unicode has a picture of each.
    return escape(
        re.sub(r"[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), str(value))
    )


def page(title: str, head: str, sections: Mapping[str, str]) -> str:
    """The page; sections without content are left out."""
    anchors = {
        name: re.sub(r"\W+", "-", name.lower()) for name, content in sections.items() if content
    }
    links = "".join(f'<a href="#{anchor}">{escaped(name)}</a>' for name, anchor in anchors.items())
    body = "".join(
        f'<section id="{anchor}"><h2>{escaped(name)}</h2>{sections[name]}</section>\n'
        for name, anchor in anchors.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body><h1>{escaped(title)}</h1>{head}<nav>{links}</nav>\n{body}</body></html>\n"
    )


def cards(figures: Mapping[str, str]) -> str:
    boxes = (
        f"<div><span>{escaped(name)}</span><b>{escaped(value)}</b></div>"
        for name, value in figures.items()
    )
    return f'<div class="cards">{"".join(boxes)}</div>\n'


def table(rows: Sequence[Sequence[str]], *head: str) -> str:
    if not rows:
        return "<p>None.</p>"
    header = "".join(f"<th>{escaped(name)}</th>" for name in head) if any(head) else ""
    cells = ("".join(f"<td>{escaped(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in cells)
    return f'<div class="wide"><table><tr>{header}</tr>{body}</table></div>\n'


def rows_of(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in values.items()]


def sample(prompt: Any, responses: Mapping[str, Mapping[str, Any]]) -> str:
    """A prompt and its responses side by side.

    Args:
        responses: rows with "response" and "reward", by their captions.
    """
    first = next(iter(responses.values()))["reward"]
    columns = []
    for name, row in responses.items():
        change = "up" if row["reward"] > first else "down" if row["reward"] < first else ""
        columns.append(
            f'<div><span class="tag">{escaped(name)}: reward '
            f'<b class="{change}">{row["reward"]:.4g}</b></span>'
            f"<pre>{escaped(row['response']) or '(nothing)'}</pre></div>"
        )
    return (
        f'<div class="sample"><pre class="prompt">{escaped(_as_text(prompt))}</pre>'
        f"<div>{''.join(columns)}</div></div>\n"
    )


def _as_text(prompt: Any) -> str:
    """A prompt as text, with a line for each message of a chat."""
    if isinstance(prompt, str):
        return prompt
    try:
        return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    except (TypeError, KeyError):
        return json.dumps(prompt, ensure_ascii=False)
