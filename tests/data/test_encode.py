"""What lines become, and worker processes that give the same in the same order, or say that they died."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_sat.data.encode import Encoded, Encoder, TextOptions, check_options, encode_lines
from megatron_sat.data.side_file import Totals
from tests.data.conftest import TEXTS

U2 = np.dtype("<u2")


@dataclass(frozen=True)
class Chunk:
    lines: list[bytes]


def work(tokenizer):
    return functools.partial(encode_lines, tokenizer=tokenizer, options=TextOptions(), dtype=U2)


def line(text: str, **fields: object) -> bytes:
    return json.dumps({"text": text, **fields}, ensure_ascii=False).encode()


def documents(encoded: Encoded) -> list[list[int]]:
    ends = list(itertools.accumulate(encoded.lengths.tolist(), initial=0))
    return [encoded.tokens[a:b].tolist() for a, b in itertools.pairwise(ends)]


def test_text_comes_back_from_the_tokens(tokenizer):
    encoded = encode_lines([line(t) for t in TEXTS], tokenizer=tokenizer, options=TextOptions(), dtype=U2)
    assert [tokenizer.detokenize(ids) for ids in documents(encoded)] == TEXTS
    assert encoded.totals == Totals(
        documents=len(TEXTS),
        tokens=len(encoded.tokens),
        characters=sum(map(len, TEXTS)),
        bytes=sum(len(text.encode()) for text in TEXTS),
        max_token_id=max(encoded.tokens.tolist()),
    )


def test_documents_begin_and_end_where_asked_for(tokenizer):
    options = TextOptions(append_eod=True, prepend_bos=True)
    encoded = encode_lines([line("a b"), line("c")], tokenizer=tokenizer, options=options, dtype=U2)
    assert documents(encoded) == [[1, *tokenizer.tokenize("a b"), 2], [1, *tokenizer.tokenize("c"), 2]]


def test_records_are_kept_and_dropped_by_their_fields(ids):
    lines = [line(str(i), lang=lang, year=i) for i, lang in enumerate(["zh", "en", "zh", "de"])]
    lines.append(line("4"))
    for options, kept in (
        (TextOptions(keep={"lang": ["zh", "en"]}), [[0], [1], [2]]),
        (TextOptions(keep={"lang": ["zh"], "year": ["2"]}), [[2]]),
        (TextOptions(drop={"lang": ["zh"]}), [[1], [3], [4]]),
        (TextOptions(keep={"lang": ["zh"]}, drop={"year": ["0"]}), [[2]]),
    ):
        encoded = encode_lines(lines, tokenizer=ids, options=options, dtype=U2)
        assert (documents(encoded), encoded.totals.filtered) == (kept, 5 - len(kept))


def test_blank_lines_are_no_records_and_empty_texts_no_documents(ids):
    encoded = encode_lines([b"", line("1"), b"  ", line("")], tokenizer=ids, options=TextOptions(), dtype=U2)
    assert (documents(encoded), encoded.totals.empty, encoded.totals.malformed) == ([[1]], 1, 0)


MALFORMED = [
    (b'{"text": "1"', "Expecting"),
    (b'["text"]', "no JSON object but list"),
    (b'{"content": "1", "b": 2}', "no field 'text', only b, content"),
    (b'{"text": 1}', "field 'text' that is no text but int"),
    (b'{"text": "\xff"}', "can't decode byte"),
    (b'{"text": "\\ud800"}', "surrogates not allowed"),
    (b'{"text": "1", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"text": "no ids"}', "must be ids below 1000"),
]


@pytest.mark.parametrize("bad, reason", MALFORMED, ids=[reason for _, reason in MALFORMED])
def test_a_malformed_line_is_reported_with_the_lines_before_it(ids, bad, reason):
    encoded = encode_lines([line("1"), b"", bad, line("2")], tokenizer=ids, options=TextOptions(), dtype=U2)
    assert encoded.error is not None
    assert encoded.error[0] == 2
    assert reason in encoded.error[1]


def test_malformed_lines_are_counted_where_they_are_skipped(ids):
    lines = [line("1"), *(bad for bad, _ in MALFORMED), line("2")]
    encoded = encode_lines(lines, tokenizer=ids, options=TextOptions(skip_malformed=True), dtype=U2)
    assert (documents(encoded), encoded.totals.malformed, encoded.error) == ([[1], [2]], len(MALFORMED), None)


@pytest.mark.parametrize("workers", [1, 3])
def test_chunks_come_back_in_order_whatever_the_workers(ids, workers):
    slow_first = dataclasses.replace(
        ids, encode=lambda text: time.sleep(0.05 * (text == "0")) or ids.encode(text)
    )
    chunks = [Chunk([line(str(i))]) for i in range(40)]
    with Encoder(work(slow_first), workers=workers) as encoder:
        done = list(encoder.encode(iter(chunks)))
    assert [chunk for chunk, _ in done] == chunks
    assert [documents(encoded) for _, encoded in done] == [[[i]] for i in range(40)]


def test_a_worker_that_dies_is_an_error_and_no_hang(ids):
    deadly = dataclasses.replace(ids, encode=lambda text: os._exit(9))
    encoder = Encoder(work(deadly), workers=2)
    with encoder, pytest.raises(RuntimeError, match="2 worker processes must live to the end, one died"):
        list(encoder.encode([Chunk([line("1")])]))


def test_workers_leave_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from megatron_sat.data.encode import Encoder\n"
        "with Encoder(len, workers=2) as encoder:\n"
        "    print(*(pid for pid in encoder._pool._processes), flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(pid) for pid in workers)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"  # a zombie is gone
    except FileNotFoundError:
        return False


def test_options_that_the_tokenizer_cannot_carry_out_are_refused(ids):
    with pytest.raises(
        ValueError, match="--prepend-bos needs a tokenizer with a bos token, this one has none"
    ):
        check_options(TextOptions(prepend_bos=True), tokenizer=ids)
    with pytest.raises(ValueError, match=r"a field may be in --keep or in --drop, \['lang'\] are in both"):
        check_options(TextOptions(keep={"lang": ["a"]}, drop={"lang": ["b"]}), tokenizer=ids)
