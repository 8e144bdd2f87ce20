"""Measures follow from sums, files come back, and only results of the same text stand beside each other."""

import json
import math
from dataclasses import asdict, replace

import pytest

from megatron_sat.evaluate.result import Domain, Result, check_comparable, columns, markdown, remarks, rows

ZH = Domain(documents=2, tokens=100, characters=50, bytes=150, nats=300 * math.log(2))
EN = Domain(documents=1, tokens=10, characters=40, bytes=40, nats=60 * math.log(2))
RESULT = Result(
    name="before",
    model="models/a",
    kind="hf",
    step=None,
    seq_length=128,
    stride=64,
    dtype="fp32",
    tokenizer="abc",
    domains={"zh/poetry": ZH, "zh/news": replace(ZH, nats=600 * math.log(2)), "en/news": EN},
)
AFTER = replace(RESULT, name="after", kind="megatron", step=7, tokenizer="def")


def test_measures_are_of_tokens_bytes_and_characters():
    measures = ZH.measures
    assert measures.loss == pytest.approx(3 * math.log(2))
    assert measures.perplexity == pytest.approx(8.0)
    assert measures.bits_per_byte == pytest.approx(2.0)
    assert measures.bits_per_character == pytest.approx(6.0)


def test_averages_count_each_domain_the_same_and_average_losses_before_the_exponential():
    assert RESULT.average.bits_per_character == pytest.approx((6 + 12 + 1.5) / 3)
    assert RESULT.average.perplexity == pytest.approx(2 ** ((3 + 6 + 6) / 3))
    assert list(RESULT.languages) == ["zh", "en"]
    assert RESULT.languages["zh"].bits_per_byte == pytest.approx(3.0)


def test_a_domain_without_a_slash_is_of_no_language():
    assert replace(RESULT, domains={"zh": ZH, "zhx/a": EN}).languages.keys() == {"zhx"}


def test_a_file_holds_what_readers_expect_and_comes_back(tmp_path):
    RESULT.save(tmp_path / "result.json")
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["kind"] == "hf" and content["step"] is None and content["stride"] == 64
    assert set(content["domains"]["zh/poetry"]) == set(
        "documents tokens characters bytes nats loss perplexity bits_per_byte bits_per_character".split()
    )
    assert set(content["average"]) == {"loss", "perplexity", "bits_per_byte", "bits_per_character", "languages"}
    assert content["average"]["languages"]["zh"] == asdict(RESULT.languages["zh"])
    assert Result.load(tmp_path / "result.json") == RESULT


@pytest.mark.parametrize(
    "damage", ["", "[]", "{}", '{"average": {}, "domains": {"a": {}}}', "missing", "kind", "empty"]
)
def test_a_file_of_another_kind_is_refused(tmp_path, damage):
    path = tmp_path / "result.json"
    RESULT.save(path)
    content = json.loads(path.read_text())
    if damage == "missing":
        path.unlink()
    elif damage == "kind":
        path.write_text(json.dumps(content | {"kind": "gguf"}))
    elif damage == "empty":
        path.write_text(json.dumps(content | {"domains": {}}))
    else:
        path.write_text(damage)
    with pytest.raises(ValueError, match=r"result\.json must be a result of tools/evaluate\.py, it is not"):
        Result.load(path)


@pytest.mark.parametrize("change", [{"characters": 51}, {"bytes": 151}, {"documents": 3}])
def test_results_of_different_text_do_not_stand_beside_each_other(change):
    other = replace(AFTER, domains={**AFTER.domains, "zh/poetry": replace(ZH, **change)})
    with pytest.raises(
        ValueError, match=r"must be of the same text, zh/poetry is 2 documents, 50 characters.* before and"
    ):
        rows([RESULT, other])


def test_a_domain_that_one_lacks_is_named():
    other = replace(AFTER, domains={name: domain for name, domain in AFTER.domains.items() if name != "en/news"})
    for pair in ([RESULT, other], [replace(other, name="x"), RESULT]):
        with pytest.raises(ValueError, match=r"same text, en/news is .*missing.*; evaluate both on the same files"):
            check_comparable(pair)


def test_results_of_one_name_are_refused():
    with pytest.raises(ValueError, match="must have different names, 2 are named before; give this one another --name"):
        check_comparable([RESULT, RESULT])


def test_tokens_may_differ():
    check_comparable([RESULT, replace(AFTER, domains={n: replace(d, tokens=3) for n, d in AFTER.domains.items()})])


def test_a_table_of_one_result_says_everything():
    assert columns([RESULT])[:3] == ["domain", "characters", "tokens"]
    table = rows([RESULT])
    assert table[0] == ["zh/poetry", "50", "100", "6.0000", "2.0000", "8.0000", f"{3 * math.log(2):.4f}"]
    assert [row[0] for row in table[3:]] == ["zh, average", "en, average", "average"]
    assert table[-1][1:3] == ["", ""]


def test_a_table_of_two_shows_each_measure_side_by_side():
    heads = columns([RESULT, AFTER])
    assert heads[2:4] == ["bits per character, before", "bits per character, after"]
    assert all(len(row) == len(heads) for row in rows([RESULT, AFTER]))
    text = markdown([RESULT, AFTER])
    assert text.splitlines()[2].startswith("| zh/poetry | 50 | 6.0000 | 6.0000 |")
    assert "tokenizers differ" in text and "after: models/a, step 7, windows of 128 tokens, stride 64, fp32" in text


def test_different_windows_are_remarked():
    assert not any("differ" in said for said in remarks([RESULT]))
    assert any("The windows differ" in said for said in remarks([RESULT, replace(AFTER, stride=32)]))
