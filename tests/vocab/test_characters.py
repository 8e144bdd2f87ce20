"""Which characters may be in a new piece."""

import unicodedata

import pytest

from megatron_sat.vocab.characters import chinese_characters, han_runs, has_chinese, is_chinese, is_fit

EVERY = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def test_no_character_that_english_or_code_uses_is_chinese() -> None:
    assert not any(is_chinese(chr(c)) for c in range(0x2E80))


def test_no_white_space_is_chinese() -> None:
    assert not [c for c in EVERY if is_chinese(c) and (c.isspace() or unicodedata.category(c) in ("Cc", "Cf", "Zs"))]


def test_every_ideograph_is_chinese() -> None:
    missing = [c for c in EVERY if unicodedata.name(c, "").startswith("CJK UNIFIED IDEOGRAPH") and not is_chinese(c)]
    assert not missing


def test_the_first_bytes_of_chinese_begin_nothing_that_may_not_change() -> None:
    """Byte-level pieces may be the first two or three bytes of a Chinese character."""
    used = [c for c in EVERY if unicodedata.category(c) != "Cn" and not unicodedata.name(c, "").startswith("CJK")]
    chinese = {c.encode()[:-1] for c in EVERY if is_chinese(c)}
    assert not [c for c in used if not has_chinese(c) and c.encode()[:-1] in chinese]


@pytest.mark.parametrize("piece", ["中", "，", "中国", "〇一", "Ａ", "𠀀𠮷"])
def test_a_chinese_piece_is_fit(piece: str) -> None:
    assert is_fit(piece)


@pytest.mark.parametrize(
    "piece", ["", "a", "中a", "1年", "▁中", "中 国", "中，", "，。", "ひと", "“", "—", "…", "🙂", "\u3000"]
)
def test_a_mixed_or_foreign_piece_is_not_fit(piece: str) -> None:
    assert not is_fit(piece)


def test_runs_are_cut_at_everything_else() -> None:
    assert list(han_runs("abc中文，漢字1字\n二〇二三年 ひ的")) == ["中文", "漢字", "字", "二〇二三年", "的"]
    assert chinese_characters("a，中b") == ["，", "中"]
    assert has_chinese("abc，") and not has_chinese("abc – “é” ひ")
