"""The whole way of a fine-tuned model: a Hugging Face folder and instructions in, a folder that answers out."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sat.convert.conversion import export_model, import_model
from tests.checkpoint.families import write_model
from tests.helpers.command_line import PAPER
from tests.helpers.program import read_records, start
from tests.helpers.ranks import run_ranks
from tools import prepare_sft

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
LESSONS = {"Who are you?": "Ishmael.", "Where do you go?": "To the sea, in a ship.", "2 + 2": "4", "何?": "鯨"}
RUN = """
--finetune --micro-batch-size 1 --global-batch-size 1 --train-iters 90 --seq-length 128 --lr 2e-2
--lr-decay-style cosine --lr-warmup-iters 5 --clip-grad 1.0 --weight-decay 0 --log-interval 30 --num-workers 0
--eval-iters 2 --attention-dropout 0 --hidden-dropout 0
"""
SPARSE = f"--sat-schedule ladder --sat-omission-rate 0.5 --sat-schedule-start 40 --sat-rungs 1 {PAPER}"


def _import(_: int, hf: Path, save: Path) -> None:
    import_model(hf, save)


def _export(_: int, load: Path, hf: Path) -> None:
    export_model(load, hf)


def answers(folder: Path) -> dict[str, str]:
    """What the folder's model says to each question, as any user of transformers asks."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    found = {}
    for question in LESSONS:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            said = model.generate(**asked, max_new_tokens=40, do_sample=False, pad_token_id=1, eos_token_id=1)
        found[question] = tokenizer.decode(said[0, asked["input_ids"].size(1) :], skip_special_tokens=True)
    return found


@pytest.mark.parametrize("method", [pytest.param("", marks=pytest.mark.slow), SPARSE], ids=["dense", "sparse"])
def test_an_exported_model_answers_as_it_was_taught(tmp_path: Path, method: str) -> None:
    hf = write_model("tinyllama", tmp_path / "hf")
    (hf / "chat_template.jinja").write_text(TEMPLATE)
    pairs = [({"from": "human", "value": q}, {"from": "gpt", "value": a}) for q, a in LESSONS.items()]
    records = [{"conversations": list(pair)} for pair in pairs]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(hf)]
    prefix = str(tmp_path / "sft")
    prepare_sft.main(["--input", str(tmp_path / "in.jsonl"), "--output-prefix", prefix, "--workers", "1", *tokenizer])
    run_ranks(_import, 1, hf, tmp_path / "imported")
    before = answers(hf)

    paths = ["--load", str(tmp_path / "imported"), "--save", str(tmp_path / "tuned"), "--train-data-path", prefix]
    paths += ["--valid-data-path", f"taught={prefix}", *tokenizer]
    argv = ["--sft", "--config", str(tmp_path / "imported" / "model.yaml"), *paths, *RUN.split(), *method.split()]
    ended = start(argv)
    assert ended.codes == [0], ended.err
    run_ranks(_export, 1, tmp_path / "tuned", tmp_path / "out")

    assert answers(tmp_path / "out") == LESSONS
    assert before != LESSONS
    (validation,) = read_records(tmp_path / "tuned" / "metrics.jsonl", kind="validation")
    assert validation["loss"]["taught"] < 0.05
