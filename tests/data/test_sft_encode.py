"""Lines to examples and back from disk; what is left out is counted, what cannot be read is named."""

import json
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_sat.data.index_file import documents, read_index
from megatron_sat.data.prepare import prepare_lines
from megatron_sat.data.sft_encode import ChatOptions, chat_job, encode_examples, read, written
from megatron_sat.data.sft_template import Example, build_template
from megatron_sat.data.side_file import read_side_file
from megatron_sat.data.tokenizer import Tokenizer

RECORDS = [
    {"instruction": "1 2", "input": "3", "output": "4 5", "lang": "zh"},
    {"prompt": "6", "response": "7 8 9"},
    {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}], "lang": "en"},
]
EXAMPLES = [([1, 2, 3, 4, 5, 999], 3), ([6, 7, 8, 9, 999], 1), ([1, 2, 999], 1)]
"""What `RECORDS` become: ids, and how many of them are read before the response."""


def lines(records: list[dict] = RECORDS) -> list[bytes]:
    return [json.dumps(record).encode() for record in records]


def stored(examples: list[tuple[list[int], int]]) -> list[list[int]]:
    return [[-1 - i for i in ids[:read]] + ids[read:] for ids, read in examples]


def cut(encoded) -> list[list[int]]:
    return [part.tolist() for part in np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1])]


@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1))
def test_ids_and_targets_come_back_as_they_went_in(pairs):
    ids, targets = (list(column) for column in zip(*pairs, strict=True))
    there = read(written(Example(ids=ids, targets=targets)))
    assert (there[0].tolist(), there[1].tolist()) == (ids, targets)


def test_lines_become_examples_and_are_counted(ids):
    encoded = encode_examples([*lines(), b"  "], template=build_template("plain", tokenizer=ids), options=ChatOptions())
    assert cut(encoded) == stored(EXAMPLES)
    count = encoded.totals
    assert (count.documents, count.tokens, count.targets, count.max_token_id) == (3, 14, 9, 999)
    assert (count.characters, count.bytes, encoded.error) == (15, 15, None)


PAIRS = [b'{"prompt": "\\ud800", "response": "1"}', b'{"prompt": "x", "response": "1"}']
MALFORMED = [b"{", b"[1]", b'{"text": "1"}', *PAIRS]


@pytest.mark.parametrize("line", MALFORMED)
def test_a_malformed_line_ends_the_work_or_is_counted(ids, line):
    template = build_template("plain", tokenizer=ids)
    stopped = encode_examples([*lines(), line], template=template, options=ChatOptions())
    assert stopped.error is not None and stopped.error[0] == 3
    passed = encode_examples([line, *lines()], template=template, options=ChatOptions(skip_malformed=True))
    assert (passed.error, passed.totals.malformed, cut(passed)) == (None, 1, stored(EXAMPLES))


def test_records_are_left_out_by_field_and_without_a_response(ids):
    template = build_template("plain", tokenizer=ids)
    some = encode_examples(lines(), template=template, options=ChatOptions(keep={"lang": ["zh", "en"]}))
    assert (cut(some), some.totals.filtered) == (stored([EXAMPLES[0], EXAMPLES[2]]), 1)
    silent = [{"prompt": "1", "response": ""}, {"prompt": "", "response": " "}]  # the second is its end alone
    none = encode_examples(lines(silent), template=template, options=ChatOptions())
    assert (len(none.lengths), none.totals.empty, none.totals.documents) == (0, 2, 0)


@pytest.mark.parametrize(
    ("too_long", "expected", "truncated", "left_out"),
    [("truncate", [([1, 2, 3, 4], 3), ([6, 7, 8, 9], 1), EXAMPLES[2]], 2, 1), ("drop", [EXAMPLES[2]], 0, 3)],
)
def test_long_examples_are_cut_or_left_out_and_counted(ids, too_long, expected, truncated, left_out):
    unanswered = {"prompt": "1 2 3 4", "response": "5"}  # nothing of the response would be left
    encoded = encode_examples(
        [*lines(), *lines([unanswered])],
        template=build_template("plain", tokenizer=ids),
        options=ChatOptions(max_tokens=4, too_long=too_long),
    )
    assert cut(encoded) == stored(expected)
    assert (encoded.totals.truncated, encoded.totals.too_long) == (truncated, left_out)


def test_a_data_set_on_disk_is_megatrons_and_says_what_it_is(tmp_path: Path, ids: Tokenizer):
    packed = tmp_path / "in.jsonl.xz"
    packed.write_bytes(lzma.compress(b"\n".join(lines())))
    template, prefix = build_template("plain", tokenizer=ids), str(tmp_path / "out")
    prepared = prepare_lines(
        [str(packed)], output_prefix=prefix, tokenizer=ids, job=chat_job(ChatOptions(), template=template), workers=2
    )
    side = read_side_file(prefix)
    assert side == prepared
    assert (side.fingerprint, side.totals.documents, side.totals.targets) == (ids.fingerprint, 3, 9)
    said = side.options
    assert (said["kind"], said["template"], said["template_digest"]) == ("conversations", "plain", template.digest)
    assert [part.tolist() for part in documents(prefix, read_index(prefix))] == stored(EXAMPLES)
    opened = IndexedDataset(prefix)
    assert [opened[number].tolist() for number in range(3)] == stored(EXAMPLES)


def test_another_template_is_another_data_set(tmp_path: Path, jsonl: Callable[..., str], ids: Tokenizer):
    path, prefix = jsonl(RECORDS), str(tmp_path / "out")

    def make(**how: bool) -> None:
        template = build_template("plain", tokenizer=ids)
        job = chat_job(ChatOptions(**how), template=template)
        prepare_lines([path], output_prefix=prefix, tokenizer=ids, job=job, workers=1)

    make()
    make()  # is left alone
    with pytest.raises(ValueError, match="output_prefix must be free, .* was made from other input or settings"):
        make(skip_malformed=True)


def test_a_bad_record_is_named_by_file_and_line(tmp_path: Path, jsonl: Callable[..., str], ids: Tokenizer):
    path = jsonl([*RECORDS, {"prompt": "1"}])
    job = chat_job(ChatOptions(), template=build_template("plain", tokenizer=ids))
    with pytest.raises(ValueError, match=f"^{path}:4 must be an instruction record, got fields of no known form"):
        prepare_lines([path], output_prefix=str(tmp_path / "out"), tokenizer=ids, job=job, workers=1)


def test_nothing_but_long_examples_is_an_error_that_says_so(tmp_path: Path, jsonl: Callable[..., str], ids: Tokenizer):
    template = build_template("plain", tokenizer=ids)
    job = chat_job(ChatOptions(max_tokens=2, too_long="drop"), template=template)
    with pytest.raises(ValueError, match="at least one document, got none .*, 3 too long"):
        prepare_lines([jsonl(RECORDS)], output_prefix=str(tmp_path / "out"), tokenizer=ids, job=job, workers=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "csv"}, "--format must be one of auto, alpaca, sharegpt, messages, prompt, got csv"),
        ({"too_long": "split"}, "--too-long must be one of truncate, drop, got split"),
        ({"max_tokens": 1}, "--max-tokens must be at least 2, got 1; leave it out for any length"),
        ({"keep": {"a": ["1"]}, "drop": {"a": ["2"]}}, "a field may be in --keep or in --drop, \\['a'\\] are in both"),
    ],
)
def test_options_that_cannot_be_carried_out_are_refused(options, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        ChatOptions(**options)
