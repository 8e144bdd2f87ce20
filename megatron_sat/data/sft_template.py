"""From a conversation to token ids, and which of them are the responses': what a model is asked to learn.

A template writes a conversation as the text that the model will see. ``tokenizer`` is the chat template of a Hugging
Face tokenizer, a path is a file of one, ``alpaca`` and ``plain`` are written here and serve any tokenizer. Where a
template marks what the assistant says (``{% generation %}``), its marks are taken. Else the text up to a response is
compared with the text that includes it: the ids from where the two part are the response's. That the one begins with
the other is checked.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sat.data.sft_records import Conversation, Exchange
from megatron_sat.data.tokenizer import NO_TOKEN, Tokenizer, transformers_tokenizer
from megatron_sat.log import warn_once

_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n"
)
_ALPACA_PAIRED = ", paired with an input that provides further context"
_MARKS = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A conversation in tokens."""

    ids: list[int]
    targets: list[bool]
    """Which ids belong to responses, what ends them included."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """How conversations are written."""

    name: str
    digest: str
    """sha256 of what decides the text."""
    encode: Callable[[Conversation], Example]
    """Raises ValueError, whose text is what was found, for a conversation that it cannot write."""


def build_template(name: str, *, tokenizer: Tokenizer, prepend_bos: bool = False) -> Template:
    """The template that ``--template`` names: tokenizer, alpaca, plain, or a file of a chat template.

    prepend_bos: for the templates that are written here; a chat template says so itself.
    Raises ValueError where the tokenizer has no such template, or no bos to begin with.
    """
    if name in WRITTEN_HERE:
        if prepend_bos and tokenizer.bos == NO_TOKEN:
            raise ValueError("--prepend-bos needs a tokenizer with a bos token, this one has none; leave the flag out")
        return _written_here(name, tokenizer=tokenizer, prepend_bos=prepend_bos)
    if prepend_bos:
        raise ValueError(f"--prepend-bos has no effect with --template {name}, which says itself; leave it out")
    if tokenizer.kind != "huggingface":
        raise ValueError(
            f"--template {name} needs a Hugging Face tokenizer, got {tokenizer.kind}; use --template alpaca or plain, "
            "or --tokenizer-type HuggingFaceTokenizer"
        )
    return _chat_template(name, tokenizer=tokenizer)


# -- templates of Hugging Face's form


def _chat_template(name: str, *, tokenizer: Tokenizer) -> Template:
    library = transformers_tokenizer(tokenizer)
    if name == "tokenizer":
        try:
            source = library.get_chat_template()
        except ValueError as error:
            raise ValueError(
                f"--template tokenizer needs a chat template, {tokenizer.path} has none; give a file of one, or use "
                "--template alpaca or plain"
            ) from error
    else:
        try:
            source = Path(name).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--template must be tokenizer, {', '.join(WRITTEN_HERE)} or a readable file, got {name}: {error}; "
                "check the path"
            ) from error
    encode = _by_marks if _MARKS.search(source) else _by_difference
    chat = _Chat(library=library, source=source, special=_special_tokens(library))
    return Template(
        name=name,
        digest=hashlib.sha256(f"chat {source}".encode()).hexdigest(),
        encode=lambda conversation: encode(chat, conversation),
    )


@dataclass(frozen=True, kw_only=True)
class _Chat:
    """A tokenizer of transformers, and the template that it is to use."""

    library: Any
    source: str
    special: dict[str, int]

    def write(self, messages: Sequence[dict[str, str]], *, asked: bool = False) -> str:
        """The text of these messages; asked: and of what comes before the assistant's next one."""
        text: str = self._apply(messages, tokenize=False, add_generation_prompt=asked)
        return text

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self.library(text, add_special_tokens=False)["input_ids"]
        return ids

    def marked(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[bool]]:
        """Ids, and what the template marks among them."""
        found = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return found["input_ids"], [bool(mark) for mark in found["assistant_masks"]]

    def _apply(self, messages: Sequence[dict[str, str]], **how: Any) -> Any:
        try:
            return self.library.apply_chat_template(list(messages), chat_template=self.source, **how)
        except Exception as error:  # a template raises what it likes: Jinja's errors, TypeError, KeyError
            raise ValueError(f"a conversation that the template refuses: {error}") from error

    def refuse_special(self, messages: Sequence[dict[str, str]]) -> None:
        """Text that spells a special token would become it."""
        for message in messages:
            spelled = next((token for token in self.special if token in message["content"]), None)
            if spelled is not None:
                raise ValueError(f"a text that spells the special token {spelled}")


def _special_tokens(library: Any) -> dict[str, int]:
    added = {str(token): number for number, token in library.added_tokens_decoder.items() if token.special}
    return dict(zip(library.all_special_tokens, library.all_special_ids, strict=True)) | added


def _by_marks(chat: _Chat, conversation: Conversation) -> Example:
    messages = conversation.messages(responses=len(conversation.exchanges))
    chat.refuse_special(messages)
    ids, targets = chat.marked(messages)
    return Example(ids=list(ids), targets=targets)


def _by_difference(chat: _Chat, conversation: Conversation) -> Example:
    total = len(conversation.exchanges)
    messages = conversation.messages(responses=total)
    chat.refuse_special(messages)
    whole = chat.write(messages)
    ids = chat.tokens(whole)
    targets = [False] * len(ids)
    for number in range(total):
        before = chat.write(conversation.messages(responses=number, asked=True), asked=True)
        after = chat.write(conversation.messages(responses=number + 1))
        if not (after.startswith(before) and whole.startswith(after)):
            raise ValueError(
                f"response {number + 1}, before which the template writes something else than when it is there; mark "
                "the responses in the template with {% generation %}"
            )
        first, last = (common_prefix(chat.tokens(text), ids) for text in (before, after))
        last = _end_of_turn(ids, first=first, last=last, special=set(chat.special.values()))
        targets[first:last] = [True] * (last - first)
    return Example(ids=ids, targets=targets)


def _end_of_turn(ids: Sequence[int], *, first: int, last: int, special: set[int]) -> int:
    """One past the last special token of a response: what a template writes behind it is never generated."""
    ends = [place + 1 for place in range(first, last) if ids[place] in special]
    if not ends:
        warn_once("the template ends a response without a special token: the model will not learn to stop")
    return ends[-1] if ends else last


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with. Less than the shorter one where a token reaches over its end."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


# -- templates that are written here


def _alpaca(exchange: Exchange, *, system: str, first: bool) -> str:
    """The prompt of Stanford Alpaca; further exchanges repeat its sections."""
    head = ""
    if first:
        head = f"{system}\n\n" if system else _ALPACA.format(paired=_ALPACA_PAIRED if exchange.input else "")
    asked = f"### Input:\n{exchange.input}\n\n" if exchange.input else ""
    return f"{'' if first else chr(10) * 2}{head}### Instruction:\n{exchange.instruction}\n\n{asked}### Response:\n"


def _plain(exchange: Exchange, *, system: str, first: bool) -> str:
    """The question and an end of line, as Flan's tasks."""
    head = f"{system}\n" if first and system else ""
    return f"{head}{exchange.question}\n"


WRITTEN_HERE: dict[str, Callable[..., str]] = {"alpaca": _alpaca, "plain": _plain}
"""By name, what is written before a response."""


def _written_here(name: str, *, tokenizer: Tokenizer, prepend_bos: bool) -> Template:
    write = WRITTEN_HERE[name]

    def encode(conversation: Conversation) -> Example:
        ids = [tokenizer.bos] if prepend_bos else []
        targets = [False] * len(ids)
        for number, exchange in enumerate(conversation.exchanges):
            before = write(exchange, system=conversation.system, first=number == 0)
            both = [*tokenizer.encode(before + exchange.response), tokenizer.eod]
            asked = common_prefix(tokenizer.encode(before), both)
            ids += both
            targets += [False] * asked + [True] * (len(both) - asked)
        return Example(ids=ids, targets=targets)

    sample = Exchange(instruction="\0", input="\1", response="")
    written = [write(each, system="", first=True) for each in (sample, Exchange(instruction="\0", response=""))]
    decides = f"{name} {written} {prepend_bos}"
    return Template(name=name, digest=hashlib.sha256(decides.encode()).hexdigest(), encode=encode)
