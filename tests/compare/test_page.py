"""A page says the same as Markdown and as HTML, and the HTML needs no other file."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_sat.compare.page import Block, Bullets, Code, Heading, Picture, Table, as_html, as_markdown

PNG = b"\x89PNG something"


@pytest.fixture
def blocks(tmp_path: Path) -> list[Block]:
    (tmp_path / "curves.png").write_bytes(PNG)
    return [
        Bullets(items=["SAT < dense & `x` holds"]),
        Heading(text="Section"),
        Table(heads=["domain", "bits"], rows=[["zh/a|b", "1.5"]]),
        Picture(path=tmp_path / "curves.png", says="The curves"),
        Code(text="run --steps 3 <now>"),
    ]


def test_markdown_has_every_block(blocks: list[Block], tmp_path: Path) -> None:
    assert as_markdown("Title", blocks, folder=tmp_path) == (
        "# Title\n\n- SAT < dense & `x` holds\n\n## Section\n\n"
        "| domain | bits |\n| --- | ---: |\n| zh/a\\|b | 1.5 |\n\n"
        "![The curves](curves.png)\n\n```\nrun --steps 3 <now>\n```\n"
    )


class _Reader(HTMLParser):
    """Collects texts and what is referred to; complains of tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html_is_whole_holds_its_pictures_and_escapes_what_it_says(blocks: list[Block]) -> None:
    reader = _Reader()
    reader.feed(as_html("A < B", blocks))
    assert reader.open == []
    said = re.sub(r"\s+", " ", "".join(reader.texts))
    for text in ("A < B", "SAT < dense & x holds", "zh/a|b", "1.5", "run --steps 3 <now>"):
        assert text in said
    (source,) = reader.sources
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == PNG


def test_words_are_set_to_the_left_and_numbers_to_the_right() -> None:
    assert '<td class="text">a</td><td>b</td>' in as_html("", [Table(heads=["x", "y"], rows=[["a", "b"]])])
    assert "<th>x</th>" in as_html("", [Table(heads=["x"], rows=[], texts=0)])
