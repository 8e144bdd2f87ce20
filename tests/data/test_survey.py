"""What domains hold, their shares and epochs, and data that cannot be trained on."""

import dataclasses
from pathlib import Path

import pytest

from megatron_sat.data.domains import Domain
from megatron_sat.data.encode import TextOptions
from megatron_sat.data.prepare import prepare
from megatron_sat.data.side_file import read_side_file, write_side_file
from megatron_sat.data.survey import Holding, epochs_per_domain, inspect, mix_in, take_stock
from megatron_sat.data.tokenizer import build_tokenizer


def domain(prefix: str, weight: float | None = None) -> Domain:
    return Domain(name=Path(prefix).name, prefix=prefix, weight=weight)


def holding(name: str, tokens: int, share: float) -> Holding:
    return Holding(name=name, prefix=name, first=0, last=1, tokens=tokens, share=share)


@pytest.fixture
def three(corpus, ids):
    """Domains a, b, c of 10 documents with 10, 20 and 70 tokens each."""

    def make(weights=(None, None, None)):
        prefixes = [corpus(name, [[1] * (size - 1)] * 10) for name, size in (("a", 10), ("b", 20), ("c", 70))]
        chosen = [domain(prefix, weight) for prefix, weight in zip(prefixes, weights, strict=True)]
        return [(one, inspect(one, tokenizer=ids)) for one in chosen]

    return make


def test_without_weights_shares_follow_tokens(three):
    stock = take_stock(three(), span=(0, 1), split="train", seq_length=8)
    assert [(one.tokens, one.share) for one in stock] == [(100, 0.1), (200, 0.2), (700, 0.7)]


def test_weights_are_normalised(three):
    stock = take_stock(three((3.0, 2.0, 5.0)), span=(0, 1), split="train", seq_length=8)
    assert [one.share for one in stock] == pytest.approx([0.3, 0.2, 0.5])


def test_a_span_takes_its_documents(three):
    stock = take_stock(three(), span=(0.9, 1.0), split="valid", seq_length=8)
    assert [(one.first, one.last, one.tokens) for one in stock] == [(9, 10, 10), (9, 10, 20), (9, 10, 70)]


def test_replay_takes_exactly_its_share():
    main = [holding("zh", 100, 0.25), holding("zh2", 300, 0.75)]
    mixed = mix_in(main, replay=[holding("en", 50, 1.0)], share=0.2)
    assert [one.share for one in mixed] == pytest.approx([0.2, 0.6, 0.2])


def test_epochs_count_how_often_a_domain_is_seen():
    stock = [holding("zh", 1000, 0.8), holding("en", 4000, 0.2)]
    # 500 samples of 10 tokens: 4,000 tokens of zh's 1,000, and 1,000 of en's 4,000
    assert epochs_per_domain(stock, samples=500, seq_length=10) == pytest.approx({"zh": 4.0, "en": 0.25})


def test_a_domain_shorter_than_a_sample_is_refused(three):
    rule = r"domain a: train must hold one sample of seq_length \+ 1 = 101 tokens"
    with pytest.raises(ValueError, match=rule + ", its 10 documents hold 100"):
        take_stock(three(), span=(0, 1), split="train", seq_length=100)
    assert len(take_stock(three(), span=(0, 1), split="train", seq_length=99)) == 3


def test_a_domain_shorter_than_a_sample_may_be_left_out_with_a_warning(three):
    left_out = r": valid must hold one sample .* \(left out of valid\)"
    with pytest.warns(UserWarning, match="domain a" + left_out), pytest.warns(match="domain b" + left_out):
        stock = take_stock(three(), span=(0.9, 1), split="valid", seq_length=30, skip_short=True)
    assert [(one.name, one.share) for one in stock] == [("c", 1.0)]


def test_another_tokenizer_is_refused_by_fingerprint(corpus, ids):
    prefix = corpus("a", [[1, 2]])
    other = build_tokenizer("NullTokenizer", vocab_size=2000)
    both = f"made with null {ids.fingerprint[:12]}, this one is null {other.fingerprint[:12]}"
    with pytest.raises(ValueError, match=f"domain a: data and training must have one tokenizer, .*{both}"):
        inspect(domain(prefix), tokenizer=other)


def test_a_missing_side_file_is_said_and_the_ids_are_looked_at(corpus, ids):
    prefix = corpus("bare", [[1, 700]])
    Path(f"{prefix}.json").unlink()
    with pytest.warns(
        UserWarning, match=r"domain bare: .*bare.json does not exist, so nothing tells which tokenizer"
    ):
        assert inspect(domain(prefix), tokenizer=ids).tokens == 3
    small = build_tokenizer("NullTokenizer", vocab_size=700)
    with pytest.raises(
        ValueError, match=r"domain bare: token ids must be in \[0, 700\), .* holds 999; prepare it again"
    ):
        inspect(domain(prefix), tokenizer=small)


def test_ids_outside_the_vocabulary_are_refused_by_the_side_file(corpus, ids):
    prefix = corpus("a", [[1, 2]])
    side = read_side_file(prefix)
    assert side is not None
    write_side_file(
        prefix, dataclasses.replace(side, totals=dataclasses.replace(side.totals, max_token_id=1000))
    )
    with pytest.raises(ValueError, match=r"domain a: token ids must be in \[0, 1000\), .* holds 1000"):
        inspect(domain(prefix), tokenizer=ids)


def test_a_side_file_of_other_data_is_refused(corpus, ids):
    first, second = corpus("first", [[1, 2]]), corpus("second", [[1, 2, 3]])
    Path(f"{first}.json").write_bytes(Path(f"{second}.json").read_bytes())
    rule = "domain first: .*first.json must describe the .bin beside it"
    with pytest.raises(ValueError, match=f"{rule}, which has 8 bytes there and 6 on disk"):
        inspect(domain(first), tokenizer=ids)


def test_documents_without_an_end_are_said(tmp_path, jsonl, ids):
    prefix = str(tmp_path / "endless")
    prepare([jsonl(["1 2 3"])], output_prefix=prefix, tokenizer=ids, options=TextOptions(), workers=1)
    with pytest.warns(UserWarning, match="domain endless was prepared without --append-eod"):
        inspect(domain(prefix), tokenizer=ids)
