"""A report as a page: the same blocks as Markdown and as one HTML file that holds its pictures.

Texts are plain; what stands between backquotes is set as code in both forms.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Heading:
    """Begins a section."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Bullets:
    """Sentences, each by itself."""

    items: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells under heads; every row as long as the heads."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    """So many columns from the left hold words; the others hold numbers."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG file."""

    path: Path
    says: str
    """For whoever does not see it."""


@dataclass(frozen=True, kw_only=True)
class Code:
    """Lines as they are typed."""

    text: str


Block = Heading | Bullets | Table | Picture | Code

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
th { border-bottom: 2px solid #999 }
.text { text-align: left }
img { max-width: 100% }
pre, code { font-family: ui-monospace, monospace; background: #f4f4f4 }
pre { padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere }
div { overflow-x: auto }
"""


def as_markdown(title: str, blocks: Sequence[Block], *, folder: Path) -> str:
    """The page as Markdown, to lie in ``folder``; pictures are named from there."""
    parts = [f"# {title}", *(_markdown(block, folder=folder) for block in blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block, *, folder: Path) -> str:
    match block:
        case Heading():
            return f"## {block.text}"
        case Bullets():
            return "\n".join(f"- {item}" for item in block.items)
        case Picture():
            return f"![{block.says}]({block.path.relative_to(folder).as_posix()})"
        case Code():
            return f"```\n{block.text}\n```"
        case Table():
            rule = [*["---"] * block.texts, *["---:"] * (len(block.heads) - block.texts)]
            return "\n".join(_line(cells) for cells in (block.heads, rule, *block.rows))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def as_html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML file that needs no other."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h2>{_inline(block.text)}</h2>"
        case Bullets():
            return "<ul>\n" + "\n".join(f"<li>{_inline(item)}</li>" for item in block.items) + "\n</ul>"
        case Picture():
            content = base64.b64encode(block.path.read_bytes()).decode()
            return f'<p><img alt="{html.escape(block.says)}" src="data:image/png;base64,{content}"></p>'
        case Code():
            return f"<pre>{html.escape(block.text)}</pre>"
        case Table():
            rows = [_row(block.heads, tag="th", texts=block.texts)]
            rows += [_row(row, tag="td", texts=block.texts) for row in block.rows]
            return "<div><table>\n" + "\n".join(rows) + "\n</table></div>"


def _row(cells: Sequence[str], *, tag: str, texts: int) -> str:
    classes = [' class="text"'] * texts + [""] * (len(cells) - texts)
    set_ = "".join(f"<{tag}{kind}>{_inline(cell)}</{tag}>" for cell, kind in zip(cells, classes, strict=True))
    return f"<tr>{set_}</tr>"


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
