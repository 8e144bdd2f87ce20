"""Which characters a new piece may be made of, and the runs of them in a text.

New pieces are Chinese and nothing but Chinese: a text without these characters cannot contain one, so English and
code are segmented as before, whatever is added. Several characters in one piece are all Han: most pre-tokenizers
cut between letters, digits and punctuation, and would make a mixed piece unreachable. White space is left out,
the ideographic space too.
"""

import re
from collections.abc import Iterator

_HAN = (
    "\u3005-\u3007",  # 々〆〇
    "\u3400-\u4dbf",
    "\u4e00-\u9fff",
    "\uf900-\ufaff",
    "\U00020000-\U000323af",
)
_OTHER = (
    "\u3001-\u3004\u3008-\u303f",  # punctuation
    "\uff01-\uff5e",  # full-width forms
)
"""Dashes, quotation marks and the ellipsis of Chinese text are used by English too, and are not here. Nor are Bopomofo,
radicals and vertical forms: they begin with the same bytes as Korean letters and the selectors of emoji, and a
byte-level piece of these bytes would re-segment those."""
_SHARING = ("\u3000", "\uff5f-\uff7f")
"""The ideographic space and half-width forms: no pieces, but they begin with the same bytes as what is in `_OTHER`."""

_HAN_RUN = re.compile(f"[{''.join(_HAN)}]+")
_CHINESE = re.compile(f"[{''.join(_HAN + _OTHER)}]")
_TOUCHED = re.compile(f"[{''.join(_HAN + _OTHER + _SHARING)}]")


def is_chinese(character: str) -> bool:
    """Whether a character may be a piece of its own."""
    return _CHINESE.fullmatch(character) is not None


def has_chinese(text: str) -> bool:
    """Whether any character of the text may be spelt by new pieces; where none is, nothing may change."""
    return _TOUCHED.search(text) is not None


def chinese_characters(text: str) -> list[str]:
    """All characters of the text that may be pieces, in order, repeated as they are."""
    return _CHINESE.findall(text)


def han_runs(text: str) -> Iterator[str]:
    """The longest stretches of Han characters: what pieces of several characters are found in."""
    return (match.group() for match in _HAN_RUN.finditer(text))


def is_fit(piece: str) -> bool:
    """Whether a piece may be added: one Chinese character, or several Han characters."""
    return is_chinese(piece) or (len(piece) > 1 and _HAN_RUN.fullmatch(piece) is not None)
