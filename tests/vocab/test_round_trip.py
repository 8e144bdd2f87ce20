"""Whatever Unicode has comes back, through every form, and the forms agree on it."""

from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_sat.vocab.characters import has_chinese
from megatron_sat.vocab.extension import Extension

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
MIXTURE = st.lists(
    st.one_of(
        st.text(CHARACTERS, max_size=8),
        st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), max_size=8),
        st.sampled_from(
            ["中国人民", "法律", " ", "  ", "\n", "\t", "\0", "🙂", "the ", "def f(x):", "<s>", "<|end_of_text|>", "。"]
        ),
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytelevel"])
def test_every_text_comes_back_and_all_forms_agree(kind: str, request: pytest.FixtureRequest) -> None:
    extension = cast(Extension, request.getfixturevalue(f"{kind}_extension"))

    @settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(MIXTURE)
    def holds(text: str) -> None:
        old = extension.old.encode(text)
        for form in extension.new:
            ids = form.encode(text)
            assert form.decode(ids) == text
            assert ids == extension.new[0].encode(text)
            assert len(ids) <= len(old)
            if not has_chinese(text):
                assert ids == old

    holds()
