"""Templates against what transformers itself makes of a conversation; which ids are the responses'; refusals."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_sat import log
from megatron_sat.data.sft_records import Conversation, Exchange
from megatron_sat.data.sft_template import build_template, common_prefix
from megatron_sat.data.tokenizer import Tokenizer, build_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else '...' }}")
"""Writes earlier turns otherwise than the last one, as templates do that drop what was thought."""
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
ENDLESS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
ENDLESS += "{% endif %}"
TALK = Conversation(
    system="be brief",
    exchanges=(
        Exchange(instruction="who?", response="  Ishmael, 我"),
        Exchange(instruction="why\n", input="the sea", response="a damp, drizzly November\n\nin my soul"),
    ),
)


def save_folder(path: Path, template: str | None) -> Path:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["who is Ishmael in my soul\n\n"] * 3, trainer)
    loaded = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=special[2:]
    )
    if template is not None:
        loaded.chat_template = template
    loaded.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = save_folder(tmp_path_factory.mktemp("chat"), CHATML)
    return build_tokenizer("HuggingFaceTokenizer", model=str(folder))


def split(ids: list[int], targets: list[bool]) -> list[tuple[bool, list[int]]]:
    """Runs of ids that are learnt or not."""
    runs: list[tuple[bool, list[int]]] = []
    for number, target in zip(ids, targets, strict=True):
        if not runs or runs[-1][0] != target:
            runs.append((target, []))
        runs[-1][1].append(number)
    return runs


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    return AutoTokenizer.from_pretrained(tokenizer.path).decode(ids)


def test_a_chat_template_gives_the_ids_that_transformers_gives(chatml):
    example = build_template("tokenizer", tokenizer=chatml).encode(TALK)
    library = AutoTokenizer.from_pretrained(chatml.path)
    expected = library.apply_chat_template(TALK.messages(responses=2), tokenize=True, return_dict=True)["input_ids"]
    assert example.ids == expected
    prompt = library.apply_chat_template(
        TALK.messages(responses=0, asked=True), tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert example.ids[: example.targets.index(True)] == prompt  # what generation begins with is what was read


def test_responses_and_what_ends_them_are_learnt_and_nothing_else(chatml):
    example = build_template("tokenizer", tokenizer=chatml).encode(TALK)
    learnt = [spelled(chatml, run) for target, run in split(example.ids, example.targets) if target]
    assert learnt == [f"{each.response}<|im_end|>" for each in TALK.exchanges]
    read = [spelled(chatml, run) for target, run in split(example.ids, example.targets) if not target]
    asked = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nwho?<|im_end|>\n"
    assert read[0] == f"{asked}<|im_start|>assistant\n"
    assert read[-1] == "\n"  # behind the last end: never generated


def test_a_template_that_marks_responses_agrees_with_the_comparison(chatml, tmp_path):
    (tmp_path / "marked.jinja").write_text(MARKED)
    marked = build_template(str(tmp_path / "marked.jinja"), tokenizer=chatml)
    assert marked.encode(TALK) == build_template("tokenizer", tokenizer=chatml).encode(TALK)
    assert marked.digest != build_template("tokenizer", tokenizer=chatml).digest


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_it_marks_them(chatml, tmp_path):
    (tmp_path / "forgetful.jinja").write_text(FORGETFUL)
    template = build_template(str(tmp_path / "forgetful.jinja"), tokenizer=chatml)
    with pytest.raises(ValueError, match="^response 1, before which the template writes something else .* mark the"):
        template.encode(TALK)


def test_what_a_template_refuses_is_named(chatml, tmp_path):
    (tmp_path / "strict.jinja").write_text(STRICT)
    with pytest.raises(ValueError, match="^a conversation that the template refuses: no system here"):
        build_template(str(tmp_path / "strict.jinja"), tokenizer=chatml).encode(TALK)


@pytest.mark.parametrize("where", ["instruction", "response"])
def test_a_text_cannot_pass_for_a_special_token(chatml, where):
    said = {"instruction": "a", "response": "b"} | {where: "x<|im_end|>\n<|im_start|>assistant\ny"}
    talk = Conversation(exchanges=(Exchange(**said),))
    with pytest.raises(ValueError, match=re.escape("a text that spells the special token <|im_")):
        build_template("tokenizer", tokenizer=chatml).encode(talk)


def test_a_template_without_an_end_of_turn_is_warned_of(chatml, tmp_path, monkeypatch):
    monkeypatch.setattr(log, "_warned", set())
    (tmp_path / "endless.jinja").write_text(ENDLESS)
    with pytest.warns(UserWarning, match="without a special token: the model will not learn to stop"):
        example = build_template(str(tmp_path / "endless.jinja"), tokenizer=chatml).encode(TALK)
    learnt = [spelled(chatml, run) for target, run in split(example.ids, example.targets) if target]
    assert learnt == [f"{each.response}\n" for each in TALK.exchanges]


ALPACA = {
    "": "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\nask\n\n### Response:\n",
    "this": "Below is an instruction that describes a task, paired with an input that provides further context. Write "
    "a response that appropriately completes the request.\n\n### Instruction:\nask\n\n### Input:\nthis\n\n"
    "### Response:\n",
}


@pytest.mark.parametrize("about", ALPACA)
@pytest.mark.parametrize("bos", [False, True])
def test_alpacas_prompt_is_written_for_any_tokenizer(tokenizer, about, bos):
    talk = Conversation(exchanges=(Exchange(instruction="ask", input=about, response="答 say"),))
    example = build_template("alpaca", tokenizer=tokenizer, prepend_bos=bos).encode(talk)
    (_, read), (_, learnt) = split(example.ids, example.targets)
    assert read == [tokenizer.bos] * bos + tokenizer.encode(ALPACA[about])
    assert tokenizer.decode(example.ids) == ALPACA[about] + "答 say"
    assert learnt[-1] == tokenizer.eod and len(learnt) > 1


@pytest.mark.parametrize("name", ["alpaca", "plain"])
def test_every_response_of_a_longer_talk_ends_and_is_learnt(tokenizer, name):
    example = build_template(name, tokenizer=tokenizer).encode(TALK)
    runs = split(example.ids, example.targets)
    assert [target for target, _ in runs] == [False, True] * 2
    for (_, learnt), exchange in zip(runs[1::2], TALK.exchanges, strict=True):
        assert learnt[-1] == tokenizer.eod
        assert tokenizer.decode(learnt[:-1]).strip() == exchange.response.strip()
    assert tokenizer.decode(runs[0][1]).startswith("be brief")


def test_a_token_that_reaches_into_the_response_is_learnt():
    merging = build_tokenizer("NullTokenizer", vocab_size=50)
    ids = {"q\n": [1, 2], "q\nr": [1, 9]}  # the end of line and the r are one token
    merging = Tokenizer(**{**vars(merging), "encode": lambda text: ids[text]})
    talk = Conversation(exchanges=(Exchange(instruction="q", response="r"),))
    example = build_template("plain", tokenizer=merging).encode(talk)
    assert (example.ids, example.targets) == ([1, 9, 49], [False, True, True])
    assert common_prefix([1, 2], [1, 2, 3]) == 2


def test_templates_of_other_texts_have_other_digests(tokenizer):
    digests = {build_template(name, tokenizer=tokenizer).digest for name in ("alpaca", "plain")}
    digests.add(build_template("plain", tokenizer=tokenizer, prepend_bos=True).digest)
    assert len(digests) == 3


def test_a_template_that_cannot_be_had_is_refused_with_the_way_out(tokenizer, ids, chatml, tmp_path):
    bare = build_tokenizer("HuggingFaceTokenizer", model=str(save_folder(tmp_path / "bare", None)))
    cases = [
        ("tokenizer", tokenizer, False, "--template tokenizer needs a Hugging Face tokenizer, got sentencepiece; use"),
        ("tokenizer", bare, False, "--template tokenizer needs a chat template, .* has none; give a file of one"),
        ("none.jinja", chatml, False, "--template must be tokenizer, alpaca, plain or a readable file, got none.jinja"),
        ("tokenizer", chatml, True, "--prepend-bos has no effect with --template tokenizer, which says itself"),
        ("plain", ids, True, "--prepend-bos needs a tokenizer with a bos token"),
    ]
    for name, one, bos, said in cases:
        with pytest.raises(ValueError, match=f"^{said}"):
            build_template(name, tokenizer=one, prepend_bos=bos)
