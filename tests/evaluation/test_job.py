"""One number for one model and text: the same from transformers, from Megatron in any layout, from a literal loop."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sat.checkpoint.parity import SAMPLE
from megatron_sat.convert.conversion import import_model
from megatron_sat.data.encode import TextOptions
from megatron_sat.data.prepare import prepare
from megatron_sat.data.tokenizer import tokenizer_of_folder
from megatron_sat.evaluate.result import Result
from megatron_sat.evaluation.job import SEQ_LENGTH, evaluate
from megatron_sat.evaluation.models import hugging_face_model, megatron_model
from megatron_sat.evaluation.texts import Limits
from tests.checkpoint.families import write_model
from tests.helpers.ranks import run_ranks

WINDOW, STRIDE = 24, 10
NATS_A_TOKEN = 1e-5
"""Between two implementations in fp32; 1e-4 is promised."""
TEXTS = {
    "zh/poetry": ["床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。", "", "天"],
    "en/prose": [SAMPLE[:400], "x", SAMPLE[400:470], SAMPLE[500:513]],
}


def run(
    _: int,
    folder: Path,
    layouts: Sequence[tuple[int, int] | None] = (None,),
    *,
    data: dict[str, list[str]] | None = None,
    **options: Any,
) -> list[Result]:
    """An evaluation for each layout; None: of the Hugging Face model."""
    chosen = {"seq_length": WINDOW, "stride": STRIDE, "limits": Limits()} | options
    data = data or {name: [str(folder / f"{name.replace('/', '.')}.jsonl")] for name in TEXTS}
    results = []
    for layout in layouts:
        if layout is None:
            subject = hugging_face_model(folder / "hf")
        else:
            subject = megatron_model(folder / "save", tp=layout[0], pp=layout[1])
        results.append(evaluate(subject, data, name="it", **chosen))
    return results


def _import(_: int, folder: Path) -> None:
    import_model(folder / "hf", folder / "save", tp=2, gate=None)


@pytest.fixture(scope="module", params=["mistral", "qwen2-tied"])
def models(request, tmp_path_factory):
    """A folder with a model (one with a SentencePiece tokenizer, one with padding rows), its import, and texts."""
    folder = tmp_path_factory.mktemp(request.param)
    write_model(request.param, folder / "hf")
    run_ranks(_import, 1, folder)
    for name, texts in TEXTS.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name.replace('/', '.')}.jsonl").write_text(lines)
    return folder


def literal(folder: Path, texts: Sequence[str]) -> tuple[float, int]:
    """Nats and tokens of texts, one document and one window at a time, as transformers' own guide does it."""
    tokenizer = tokenizer_of_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for text in texts:
        ids = [tokenizer.bos, *tokenizer.tokenize(text)]
        done = 0
        for begin in range(0, len(ids), STRIDE):
            end = min(begin + WINDOW, len(ids) - 1)
            inputs, targets = ids[begin:end], ids[begin + 1 : end + 1]
            fresh = end - max(done, begin)
            if not inputs or fresh <= 0:
                break
            with torch.no_grad():
                logits = model(torch.tensor([inputs])).logits[0].double()
            chances = torch.log_softmax(logits, dim=-1)
            for place in range(len(inputs) - fresh, len(inputs)):
                total -= chances[place, targets[place]].item()
                count += 1
            done = end
    return total, count


def _literal(_: int, folder: Path) -> dict[str, tuple[float, int]]:
    return {name: literal(folder / "hf", texts) for name, texts in TEXTS.items()}


def assert_same(found: Result, expected: Result, *, within: float = NATS_A_TOKEN) -> None:
    assert list(found.domains) == list(expected.domains)
    for name, domain in expected.domains.items():
        assert found.domains[name].nats / domain.tokens == pytest.approx(domain.nats / domain.tokens, abs=within)
        assert replace(found.domains[name], nats=domain.nats) == domain


def test_an_evaluation_is_a_literal_loop_over_documents_and_windows(models):
    ((result,),) = run_ranks(run, 1, models)
    (expected,) = run_ranks(_literal, 1, models)
    for name, (nats, tokens) in expected.items():
        domain = result.domains[name]
        assert domain.tokens == tokens
        assert domain.nats / tokens == pytest.approx(nats / tokens, abs=NATS_A_TOKEN)
        there = "".join(TEXTS[name])
        assert (domain.characters, domain.bytes) == (len(there), len(there.encode()))
        assert domain.documents == sum(bool(text) for text in TEXTS[name])


def test_megatron_equals_transformers_at_tp_pp_and_dp_two(models):
    ((reference, one),) = run_ranks(run, 1, models, [None, (1, 1)])
    assert (one.kind, reference.kind, one.tokenizer) == ("megatron", "hf", reference.tokenizer)
    everyone = run_ranks(run, 2, models, [(2, 1), (1, 2), (1, 1), None])
    assert everyone[0] == everyone[1]
    for result in [one, *everyone[0]]:
        assert_same(result, reference)


def test_another_window_would_be_seen(models):
    """The control of the tests above: less context costs more than they tolerate."""
    ((short,),) = run_ranks(run, 1, models, seq_length=12)
    ((long,),) = run_ranks(run, 1, models)
    apart = abs(short.domains["en/prose"].measures.loss - long.domains["en/prose"].measures.loss)
    assert apart > 100 * NATS_A_TOKEN


@pytest.mark.parametrize("layout", [None, (1, 2)])
def test_the_micro_batch_size_does_not_matter(models, layout):
    ranks = 1 if layout is None else 2
    one, three, all_of_them = (run_ranks(run, ranks, models, [layout], micro_batch_size=b)[0][0] for b in (1, 3, 100))
    assert_same(three, one)
    assert_same(all_of_them, one)


def _prepare(_: int, folder: Path) -> None:
    tokenizer = tokenizer_of_folder(folder / "hf")
    for name in TEXTS:
        path = str(folder / f"{name.replace('/', '.')}")
        options = TextOptions(append_eod=True)
        prepare([f"{path}.jsonl"], output_prefix=path, tokenizer=tokenizer, options=options, workers=1)


def test_prepared_data_give_the_numbers_of_their_jsonl(models):
    run_ranks(_prepare, 1, models)
    ((jsonl,),) = run_ranks(run, 1, models)
    data = {name: [str(models / name.replace("/", "."))] for name in TEXTS}
    ((prepared,),) = run_ranks(run, 1, models, data=data)
    assert prepared == jsonl


def test_bf16_is_near_fp32(models):
    ((exact,),) = run_ranks(run, 1, models, [(1, 1)])
    ((theirs, ours),) = run_ranks(run, 1, models, [None, (1, 1)], dtype="bf16")
    assert ours.dtype == "bf16"
    for result in (theirs, ours):
        assert result.domains["en/prose"].nats != exact.domains["en/prose"].nats
        assert_same(result, exact, within=0.05)


def test_windows_are_as_long_as_the_model_allows_and_half_of_them_is_the_stride(models):
    ((result,),) = run_ranks(run, 1, models, seq_length=None, stride=None, limits=Limits(documents=1))
    assert (result.seq_length, result.stride) == (min(512, SEQ_LENGTH), 256)


def _refusal(_: int, folder: Path, options: dict[str, Any]) -> str:
    try:
        run(0, folder, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stride": 25}, "--stride must be between 1 and --seq-length (24), got 25"),
        ({"seq_length": 513}, "--seq-length must be between 1 and the model's 512 positions, got 513"),
        ({"micro_batch_size": 0}, "--micro-batch-size must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(models, options, said):
    assert run_ranks(_refusal, 1, models, options)[0].startswith(said)


def _incomparable(_: int, folder: Path) -> str:
    data = {"zh/poetry": [str(folder / "zh.poetry.jsonl")]}
    (earlier,) = run(0, folder, data=data)
    subject = replace(hugging_face_model(folder / "hf"), open=lambda dtype, length: pytest.fail("computed"))
    with pytest.raises(ValueError) as caught:  # noqa: PT011  matched by the caller
        evaluate(subject, data, name="new", limits=Limits(documents=1), beside=[earlier])
    return str(caught.value)


def test_an_earlier_result_of_other_text_is_refused_before_anything_is_computed(models):
    (said,) = run_ranks(_incomparable, 1, models)
    assert "must be of the same text, zh/poetry is 2 documents, 25 characters" in said


def _few_rows(_: int, folder: Path) -> str:
    data = {"zh/poetry": [str(folder / "zh.poetry.jsonl")]}
    with pytest.raises(ValueError) as caught:  # noqa: PT011  matched by the caller
        evaluate(replace(hugging_face_model(folder / "hf"), vocab_size=250), data, name="it", limits=Limits())
    return str(caught.value)


def _broken(_: int, folder: Path) -> str:
    subject = hugging_face_model(folder / "hf")

    def broken(dtype: str, seq_length: int) -> Any:
        return replace(subject.open(dtype, seq_length), score=lambda batches: float("nan"))

    data = {"zh/poetry": [str(folder / "zh.poetry.jsonl")]}
    with pytest.raises(ValueError) as caught:  # noqa: PT011  matched by the caller
        evaluate(replace(subject, open=broken), data, name="it", limits=Limits())
    return str(caught.value)


def test_text_that_needs_a_row_that_the_model_lacks_is_refused_with_its_domain(models):
    (said,) = run_ranks(_few_rows, 1, models)
    assert "ids of text must be rows of the model" in said and "hf has 250, zh/poetry has id" in said


def test_a_loss_that_is_no_number_is_refused_with_its_domain(models):
    assert "must be finite, on zh/poetry it is nan; take --dtype fp32" in run_ranks(_broken, 1, models)[0]
