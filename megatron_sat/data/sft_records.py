"""Instruction records of several shapes, read as one: a conversation is a system text and exchanges.

    alpaca      {"instruction", "input" (may be empty or missing), "output", "system" (likewise)}
    sharegpt    {"conversations": [{"from": human | gpt | system, "value"}, ...]}
    messages    {"messages": [{"role": user | assistant | system, "content"}, ...]}
    prompt      {"prompt", "response"}, also with the names that Flan's mixtures give the two

Nothing here knows tokens or templates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}
"""Who speaks, as records spell it."""
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("inputs", "targets"))
"""Names of a prompt and its response; Flan's are the last."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What is asked, and what is answered."""

    instruction: str
    input: str = ""
    """What the instruction is about, where a record keeps it apart."""
    response: str

    @property
    def question(self) -> str:
        """Instruction and input in one, for templates that do not tell them apart."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One example."""

    system: str = ""
    exchanges: tuple[Exchange, ...]
    """At least one."""

    def messages(self, *, responses: int, asked: bool = False) -> list[dict[str, str]]:
        """The conversation up to so many responses, as chat templates take it; asked: and the question behind them."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for number, exchange in enumerate(self.exchanges[: responses + asked]):
            found.append({"role": "user", "content": exchange.question})
            if number < responses:
                found.append({"role": "assistant", "content": exchange.response})
        return found


def read_conversation(record: Mapping[str, Any], *, form: str) -> Conversation:
    """The conversation of a record. form: a key of `FORMS`, or auto, which goes by the record's fields.

    Raises ValueError, whose text is what was found instead, for a record of another form, a turn out of order, a role
    or a text that is none.
    """
    return FORMS[_recognised(record) if form == "auto" else form](record)


def _recognised(record: Mapping[str, Any]) -> str:
    fields = {"messages": "messages", "conversations": "sharegpt", "instruction": "alpaca"}
    for name, form in fields.items():
        if name in record:
            return form
    if any(set(pair) <= record.keys() for pair in _PAIRS):
        return "prompt"
    raise ValueError(f"fields of no known form: {', '.join(sorted(map(str, record))) or 'none'}")


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    exchange = Exchange(
        instruction=_text(record, "instruction"), input=_text(record, "input", ""), response=_text(record, "output")
    )
    return Conversation(system=_text(record, "system", ""), exchanges=(exchange,))


def _prompt(record: Mapping[str, Any]) -> Conversation:
    for prompt, response in _PAIRS:
        if prompt in record and response in record:
            exchange = Exchange(instruction=_text(record, prompt), response=_text(record, response))
            return Conversation(exchanges=(exchange,))
    raise ValueError(f"no pair of fields {', '.join('/'.join(pair) for pair in _PAIRS)}")


def _turns(name: str) -> Callable[[Mapping[str, Any]], Conversation]:
    """A reader of records whose turns are listed in the field ``name``."""

    def read(record: Mapping[str, Any]) -> Conversation:
        turns = record.get(name)
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"no list of turns in field {name!r}")
        said = [_turn(turn) for turn in turns]
        system = _text(record, "system", "")
        if said[0][0] == "system":
            system = said.pop(0)[1]
        wanted = ["user", "assistant"] * (len(said) // 2)
        if [role for role, _ in said] != wanted or not wanted:
            order = ", ".join(role for role, _ in said) or "nobody"
            raise ValueError(f"turns that do not go user, assistant, ... to an assistant's end but {order}")
        texts = [text for _, text in said]
        pairs = zip(texts[::2], texts[1::2], strict=True)
        return Conversation(system=system, exchanges=tuple(Exchange(instruction=q, response=a) for q, a in pairs))

    return read


def _turn(turn: Any) -> tuple[str, str]:
    """Who speaks (as chat templates call them), and what."""
    if not isinstance(turn, dict):
        raise ValueError(f"a turn that is no object but {type(turn).__name__}")
    said_by = turn.get("from", turn.get("role"))
    role = _ROLES.get(said_by) if isinstance(said_by, str) else None
    if role is None:
        raise ValueError(f"a turn of {said_by!r}, who is none of {', '.join(_ROLES)}")
    return role, _text(turn, "value" if "value" in turn else "content")


_REQUIRED: Any = object()


def _text(record: Mapping[str, Any], name: str, default: Any = _REQUIRED) -> str:
    text = record.get(name)
    if text is None and default is not _REQUIRED:
        return str(default)
    if not isinstance(text, str):
        raise ValueError(f"field {name!r} that is no text but {type(text).__name__}")
    return text


FORMS: dict[str, Callable[[Mapping[str, Any]], Conversation]] = {
    "alpaca": _alpaca,
    "sharegpt": _turns("conversations"),
    "messages": _turns("messages"),
    "prompt": _prompt,
}
"""By the name that ``--format`` takes."""
