"""Records of four shapes come out as one conversation; what is none is named."""

import pytest

from megatron_sat.data.sft_records import FORMS, Conversation, Exchange, read_conversation

ONE = Conversation(exchanges=(Exchange(instruction="ask", response="say"),))
SHAPES = {
    "alpaca": {"instruction": "ask", "input": "", "output": "say"},
    "sharegpt": {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}]},
    "messages": {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]},
    "prompt": {"prompt": "ask", "response": "say"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_conversation_and_is_recognised(form):
    assert read_conversation(SHAPES[form], form=form) == ONE
    assert read_conversation({**SHAPES[form], "source": "x"}, form="auto") == ONE


@pytest.mark.parametrize("pair", [("prompt", "completion"), ("inputs", "targets")])
def test_a_pair_may_have_the_names_of_other_mixtures(pair):
    assert read_conversation(dict(zip(pair, ("ask", "say"), strict=True)), form="auto") == ONE


def test_an_input_stands_apart_and_belongs_to_the_question():
    (exchange,) = read_conversation({"instruction": "ask", "input": "this", "output": "say"}, form="auto").exchanges
    assert (exchange.instruction, exchange.input, exchange.question) == ("ask", "this", "ask\nthis")


@pytest.mark.parametrize(
    "record",
    [
        {"system": "be", "instruction": "ask", "output": "say"},
        {"system": "be", **SHAPES["sharegpt"]},
        {"messages": [{"role": "system", "content": "be"}, *SHAPES["messages"]["messages"]]},
    ],
)
def test_a_system_text_is_the_first_message(record):
    conversation = read_conversation(record, form="auto")
    assert conversation.messages(responses=1) == [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": "say"},
    ]


def test_messages_end_where_they_are_asked_to():
    turns = [{"from": who, "value": str(i)} for i, who in enumerate(["human", "gpt"] * 2)]
    conversation = read_conversation({"conversations": turns}, form="auto")
    said = [m["content"] for m in conversation.messages(responses=1, asked=True)]
    assert said == ["0", "1", "2"]
    assert [m["content"] for m in conversation.messages(responses=1)] == ["0", "1"]


@pytest.mark.parametrize(
    ("record", "form", "problem"),
    [
        ({"text": "x"}, "auto", "^fields of no known form: text$"),
        ({}, "auto", "fields of no known form: none"),
        ({"instruction": "x"}, "auto", "field 'output' that is no text but NoneType"),
        ({"instruction": "x", "output": 3}, "alpaca", "field 'output' that is no text but int"),
        ({"prompt": "x"}, "prompt", "no pair of fields prompt/response, prompt/completion, inputs/targets"),
        ({"messages": []}, "auto", "no list of turns in field 'messages'"),
        ({"messages": "x"}, "auto", "no list of turns in field 'messages'"),
        ({"messages": ["x"]}, "auto", "a turn that is no object but str"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "auto", "a turn of 'tool', who is none of system, human"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "auto", "a turn of \\['user'\\], who is none of"),
        ({"messages": [{"role": "user"}]}, "auto", "field 'content' that is no text but NoneType"),
        ({"conversations": SHAPES["sharegpt"]["conversations"][:1]}, "auto", "assistant's end but user$"),
        ({"conversations": SHAPES["sharegpt"]["conversations"][::-1]}, "auto", "assistant's end but assistant, user$"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "auto", "assistant's end but nobody$"),
    ],
)
def test_what_is_no_conversation_is_named(record, form, problem):
    with pytest.raises(ValueError, match=problem):
        read_conversation(record, form=form)
