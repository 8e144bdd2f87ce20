"""Lines of instruction records to examples, and how an example lies in a .bin: ids, and which of them are learnt.

An id that belongs to a response stands in the .bin as it is, any other id ``i`` as ``-1 - i``; so both are one file of
i32, an example is a document, and nothing can come between them. `written` and `read` are the two directions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from megatron_sat.data.encode import Encoded, parse_record, refuse_both, wanted
from megatron_sat.data.prepare import Job
from megatron_sat.data.sft_records import FORMS, Conversation, read_conversation
from megatron_sat.data.sft_template import Example, Template
from megatron_sat.data.side_file import CONVERSATIONS, Totals

DTYPE = np.dtype("<i4")
"""Of a .bin of examples."""
TOO_LONG = ("truncate", "drop")
"""What may become of an example that is too long."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Which records become examples, and how: all that decides the output besides input, tokenizer and template."""

    form: str = "auto"
    """A key of `sft_records.FORMS`, or auto: by the fields of each record."""
    max_tokens: int | None = None
    """Tokens of an example at most, at least 2; None: any number."""
    too_long: str = "truncate"
    """What becomes of a longer one: its end is cut off (truncate), or it is left out (drop)."""
    keep: Mapping[str, list[str]] = field(default_factory=dict)
    """Keep only records whose field has one of these values; all fields must agree."""
    drop: Mapping[str, list[str]] = field(default_factory=dict)
    """Leave out records of which any of these fields has one of these values."""
    skip_malformed: bool = False
    """Count lines that cannot be read instead of ending with the first."""

    def __post_init__(self) -> None:
        if self.form != "auto" and self.form not in FORMS:
            raise ValueError(f"--format must be one of auto, {', '.join(FORMS)}, got {self.form}")
        if self.too_long not in TOO_LONG:
            raise ValueError(f"--too-long must be one of {', '.join(TOO_LONG)}, got {self.too_long}")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"--max-tokens must be at least 2, got {self.max_tokens}; leave it out for any length")
        refuse_both(self.keep, drop=self.drop)


def chat_job(options: ChatOptions, *, template: Template) -> Job:
    """What `prepare.prepare_lines` takes to make examples of lines."""
    return Job(
        work=partial(encode_examples, template=template, options=options),
        options=asdict(options)
        | {"kind": CONVERSATIONS, "template": template.name, "template_digest": template.digest},
        dtype=DTYPE,
        wanted="an instruction record",
    )


def encode_examples(lines: Sequence[bytes], *, template: Template, options: ChatOptions) -> Encoded:
    """Examples of jsonl lines. Blank lines are no records; a malformed one ends the work unless skipped."""
    examples: list[np.ndarray] = []
    totals = Totals()
    error = None
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            example = _example(parse_record(line), template=template, options=options, totals=totals)
        except ValueError as problem:
            if not options.skip_malformed:
                error = (number, str(problem))
                break
            totals.malformed += 1
            continue
        if example is not None:
            examples.append(example)
    tokens = np.concatenate(examples) if examples else np.zeros(0, dtype=DTYPE)
    totals.tokens, totals.targets = len(tokens), int((tokens >= 0).sum())
    totals.max_token_id = int(np.maximum(tokens, ~tokens).max()) if examples else -1
    lengths = np.array([len(example) for example in examples], dtype=np.int32)
    return Encoded(tokens=tokens, lengths=lengths, totals=totals, error=error)


def told(count: Totals) -> str:
    """What became of records, for the reader."""
    return (
        f"{count.documents:,} examples, {count.tokens:,} tokens, {count.targets:,} of them of responses; "
        f"{count.truncated:,} truncated; left out: {count.malformed:,} malformed, {count.filtered:,} filtered, "
        f"{count.empty:,} without a response, {count.too_long:,} too long"
    )


def _example(
    record: dict[str, Any], *, template: Template, options: ChatOptions, totals: Totals
) -> np.ndarray | None:
    """What is written for a record, which is counted in; None where it is left out."""
    if not wanted(record, keep=options.keep, drop=options.drop):
        totals.filtered += 1
        return None
    conversation = read_conversation(record, form=options.form)
    characters, size = _size(conversation)
    if not all(exchange.response for exchange in conversation.exchanges):
        totals.empty += 1
        return None
    example = template.encode(conversation)
    if not any(example.targets[1:]):  # nothing to predict
        totals.empty += 1
        return None
    if options.max_tokens is not None and len(example.ids) > options.max_tokens:
        ids, targets = example.ids[: options.max_tokens], example.targets[: options.max_tokens]
        if options.too_long == "drop" or not any(targets[1:]):
            totals.too_long += 1
            return None
        totals.truncated += 1
        example = Example(ids=ids, targets=targets)
    totals.add(Totals(documents=1, characters=characters, bytes=size))
    return written(example)


def _size(conversation: Conversation) -> tuple[int, int]:
    """Characters and bytes (UTF-8) of what a record says. Raises ValueError for a lone surrogate."""
    said = [conversation.system]
    said += [text for each in conversation.exchanges for text in (each.instruction, each.input, each.response)]
    return sum(map(len, said)), sum(len(text.encode()) for text in said)


def written(example: Example) -> np.ndarray:
    """[tokens] i32, as it lies in the .bin."""
    ids = np.array(example.ids, dtype=DTYPE)
    return np.where(np.array(example.targets), ids, ~ids)


def read(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[tokens] as they lie in the .bin -> ids (int64), and which of them are learnt (bool)."""
    ids = np.asarray(stored, dtype=np.int64)
    return np.where(ids < 0, ~ids, ids), ids >= 0
