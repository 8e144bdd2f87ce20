"""Tasks of our own through lm-eval, from a model's files to harness.json, beside the same numbers computed by hand."""

import json
import math
import re
import shutil
import sys
import urllib.error
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sat.evaluate import harness
from megatron_sat.evaluate.harness import GROUPS, gpt4all_average, run_harness
from tests.checkpoint.families import write_model

datasets = pytest.importorskip("datasets", reason="pip install 'megatron-sat[eval]'")
lm_tasks = pytest.importorskip("lm_eval.tasks", reason="pip install 'megatron-sat[eval]'")
hub = pytest.importorskip("huggingface_hub.constants")

ITEMS: list[dict[str, Any]] = [
    {"question": "Which number comes after seven?", "choices": ["eight", "six", "the sea"], "answer": 0},
    {"question": "月亮是什么颜色的?", "choices": ["白", "红色", "绿得像草一样"], "answer": 0},
    {"question": "def f(x): return x + 1  # f(2) is", "choices": ["2", "3"], "answer": 1},
    {"question": "Fish live in", "choices": ["trees and houses", "water"], "answer": 1},
    {"question": "春眠不觉晓,", "choices": ["处处闻啼鸟", "夜来风雨声", "花落知多少", "x"], "answer": 0},
]
TEXTS = ["The sea is wide and the land is far.\nSo is the sky.", "春眠不觉晓,处处闻啼鸟。", "def f(x):\n    return x\n"]
CHOICE = """\
task: own_choice
dataset_path: {path}
dataset_kwargs: {arguments}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3.0}}
"""
TEXT = """\
task: own_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data are cached in the test's own folder, and nobody gets as far as asking for an address."""

    def refused(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("there is no network in a test")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.urlopen", refused)
    monkeypatch.setattr("socket.getaddrinfo", refused)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("tinyllama", tmp_path_factory.mktemp("model"))


def write_lines(file: Path, items: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the two tasks and their data."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    items = write_lines(folder / "items.jsonl", ITEMS)
    texts = write_lines(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    (folder / "choice.yaml").write_text(CHOICE.format(path="json", arguments=f"{{data_files: {{test: {items}}}}}"))
    (folder / "text.yaml").write_text(TEXT.format(file=texts))
    return folder


def run(model: Path, *tasks: str, folder: Path | None, output: Path, **changes: Any) -> dict[str, Any]:
    settings = {"tasks_folder": folder, "limit": None, "batch_size": 2, "output": output}
    return run_harness(model, tasks=tasks, **settings | changes)


class ByHand:
    """Log-probabilities one token after the other, each from a forward pass of its own."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def sum(self, before: list[int], after: list[int]) -> float:
        total = 0.0
        for token in after:
            logits = self.model(torch.tensor([before])).logits[0, -1]
            total += float(logits.log_softmax(-1)[token])
            before = [*before, token]
        return total

    def choice(self, item: dict[str, Any], *, by_length: bool) -> int:
        context = self.tokenizer.encode(f"{item['question']}\nAnswer:", add_special_tokens=False)
        scores = []
        for choice in item["choices"]:
            whole = self.tokenizer.encode(f"{item['question']}\nAnswer: {choice}", add_special_tokens=False)
            assert whole[: len(context)] == context
            scores.append(self.sum(context, whole[len(context) :]) / (len(choice) if by_length else 1))
        return max(range(len(scores)), key=scores.__getitem__)

    def text(self, text: str) -> float:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return self.sum([self.tokenizer.bos_token_id], ids)


def test_lm_eval_on_tasks_of_our_own_equals_a_computation_by_hand(model: Path, folder: Path, tmp_path: Path) -> None:
    report = run(model, "own_choice", "own_text", folder=folder, output=tmp_path / "out")
    found, hand = report["results"], ByHand(model)
    right = [hand.choice(item, by_length=False) == item["answer"] for item in ITEMS]
    assert found["own_choice"]["acc,none"] == pytest.approx(sum(right) / len(right), abs=1e-12)
    right = [hand.choice(item, by_length=True) == item["answer"] for item in ITEMS]
    assert found["own_choice"]["acc_norm,none"] == pytest.approx(sum(right) / len(right), abs=1e-12)
    total = sum(hand.text(text) for text in TEXTS)
    size, words = sum(len(text.encode()) for text in TEXTS), sum(len(re.split(r"\s+", text)) for text in TEXTS)
    assert found["own_text"]["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    assert found["own_text"]["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert found["own_text"]["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-4)


def test_the_file_holds_what_is_returned_and_how_it_came_about(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(model, "own_choice", folder=folder, output=tmp_path / "out", limit=2, batch_size=1)
    assert json.loads((tmp_path / "out" / "harness.json").read_text(encoding="utf-8")) == report
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["harness.json"]
    assert (report["limit"], report["batch_size"], report["dtype"], report["device"]) == (2, 1, "float32", "cpu")
    assert report["n-samples"]["own_choice"] == {"original": len(ITEMS), "effective": 2}
    assert (report["versions"], report["n-shot"]) == ({"own_choice": 3.0}, {"own_choice": 0})
    assert set(report["packages"]) == {"lm-eval", "transformers", "torch"}
    said = capsys.readouterr().out
    assert "the first 2 documents of each" in said
    assert re.search(rf"own_choice\D+0\D+2\D+acc\D+{report['results']['own_choice']['acc,none']:.4f}", said)


def test_a_failed_run_leaves_an_earlier_result_alone(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "harness.json").write_text("earlier")

    def broken(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "json", SimpleNamespace(dumps=broken))
    with pytest.raises(KeyboardInterrupt):
        run(model, "own_text", folder=folder, output=tmp_path)
    assert (tmp_path / "harness.json").read_text() == "earlier"


def test_a_group_of_tasks_is_run_and_averaged_as_its_file_says(model: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "both.yaml").write_text(
        "group: own_both\ntask: [own_choice, {task: own_again, num_fewshot: 0}]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    again = (folder / "choice.yaml").read_text().replace("task: own_choice", "task: own_again")
    (folder / "again.yaml").write_text(again)
    report = run(model, "own_both", folder=folder, output=tmp_path / "out")
    assert report["groups"]["own_both"]["acc,none"] == report["results"]["own_choice"]["acc,none"]
    assert report["group_subtasks"]["own_both"] == ["own_choice", "own_again"]


def test_data_that_lie_in_the_cache_are_used_without_a_network(model: Path, folder: Path, tmp_path: Path) -> None:
    from_file = run(model, "own_choice", folder=folder, output=tmp_path / "out")
    (built,) = (tmp_path / "cache" / "json").glob("*/*/*/")
    cached = tmp_path / "cache" / "some___pairs" / "default" / "0.0.0" / built.name
    shutil.copytree(built, cached)
    (cached / "json-test.arrow").rename(cached / "pairs-test.arrow")
    about = (cached / "dataset_info.json").read_text().replace('"dataset_name": "json"', '"dataset_name": "pairs"')
    (cached / "dataset_info.json").write_text(about)
    (folder / "choice.yaml").write_text(CHOICE.format(path="some/pairs", arguments="{}"))
    from_cache = run(model, "own_choice", folder=folder, output=tmp_path / "out")
    assert from_cache["results"] == from_file["results"]
    assert (hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (False, False)


@pytest.mark.parametrize(("offline", "why"), [(False, "cannot be reached"), (True, "HF_HUB_OFFLINE or HF_DATASETS_")])
def test_a_data_set_that_is_missing_is_named_before_anything_runs(
    offline: bool, why: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    (folder / "choice.yaml").write_text(CHOICE.format(path="some/pairs", arguments="{}"))
    (tmp_path / "config.json").write_text("{}")  # no model: it is not looked at
    with pytest.raises(ValueError, match="data sets that are not on this machine") as caught:
        run(tmp_path, "own_text", "own_choice", folder=folder, output=tmp_path / "out")
    said = str(caught.value)
    assert why in said
    assert "\n  some/pairs, for own_choice\n" in said and "own_text" not in said
    assert ".load(['own_choice'])" in said and f"HF_DATASETS_CACHE to the copy (now {tmp_path / 'cache'})" in said
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_missing_is_named(model: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "texts.jsonl").unlink()
    with pytest.raises(ValueError, match="own_text reads files that are not there .*texts.jsonl.*paths count from"):
        run(model, "own_text", folder=folder, output=tmp_path)


def test_a_task_whose_data_are_not_what_it_says_is_named(model: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "text.yaml").write_text((folder / "text.yaml").read_text().replace("test_split: test", "test_split: dev"))
    with pytest.raises(ValueError, match="task own_text cannot be loaded: 'dev'; see that its file and its data"):
        run(model, "own_text", folder=folder, output=tmp_path)


@pytest.fixture(scope="module")
def everything() -> Any:
    """lm-eval's own index, of the folders that matter here: all 14,000 names take ten seconds."""
    own = Path(lm_tasks.__file__).parent
    parts = "agieval arc ceval cmmlu hellaswag humaneval mmlu/default openbookqa piqa super_glue winogrande".split()
    return lm_tasks.TaskManager(include_path=[own / part for part in parts], include_defaults=False)


def test_every_named_group_is_one_that_lm_eval_has(everything: Any) -> None:
    assert [name for members in GROUPS.values() for name in members if name not in everything.task_index] == []
    sizes = {name: sum(len(harness.needs_of(m, index=everything.task_index)) for m in GROUPS[name]) for name in GROUPS}
    assert sizes == {"cmmlu": 67, "agieval": 21, "ceval": 52, "mmlu": 57, "gpt4all": 7}


def test_the_missing_data_of_the_named_groups_are_listed_quickly(
    everything: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_tasks, "TaskManager", lambda **_: everything)
    with pytest.raises(ValueError, match="not on this machine") as caught:
        run(model, "gpt4all", "cmmlu", "ceval", folder=None, output=tmp_path)
    said = str(caught.value)
    assert "\n  allenai/ai2_arc, for arc_easy, arc_challenge\n" in said
    assert re.search(r"\n  haonan-li/cmmlu, for cmmlu_agronomy, cmmlu_anatomy, \w+ and 64 more\n", said)
    assert "'hellaswag', 'openbookqa', 'winogrande', 'arc_easy', 'arc_challenge', 'boolq', 'piqa', 'cmmlu'" in said


@pytest.mark.parametrize(
    ("name", "said"), [("hellaswagg", r"got hellaswagg; try hellaswag,"), ("§", "got §; there are cmmlu, agieval")]
)
def test_an_unknown_task_is_refused_with_the_nearest(
    name: str, said: str, everything: Any, model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = lm_tasks.TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(
        lm_tasks, "TaskManager", lambda include_defaults=True, **_: everything if include_defaults else own
    )
    with pytest.raises(ValueError, match=said):
        run(model, name, folder=folder, output=tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("humaneval",), "must not run a model's answers as code, as humaneval does"),
        (("mmlu", "mmlu_anatomy"), "mmlu_anatomy is in mmlu and mmlu_anatomy; drop one"),
    ],
)
def test_tasks_that_may_not_be_run_so_are_refused(
    names: tuple[str, ...], said: str, everything: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_tasks, "TaskManager", lambda **_: everything)
    with pytest.raises(ValueError, match=said):
        run(model, *names, folder=None, output=tmp_path)


def test_without_lm_eval_the_way_out_is_said(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r"needs lm-eval, which cannot be .*; pip install 'megatron-sat\[eval\]'"):
        run(model, "mmlu", folder=None, output=tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"limit": 0}, "--harness-limit must be at least 1 document a task, got 0; leave it out for all"),
        ({"batch_size": 0}, "--harness-batch-size must be at least 1, got 0; try 1"),
        ({"tasks_folder": Path("absent")}, "--harness-tasks-folder must be a folder with YAML files, got absent"),
        ({"tasks": ()}, "--harness needs a task, got none; name some of cmmlu, agieval, ceval, mmlu, gpt4all"),
        ({"hf_folder": Path("absent")}, "--harness needs a Hugging Face folder, absent has no config.json; export"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], said: str, model: Path, tmp_path: Path) -> None:
    settings = {"tasks": ("mmlu",), "tasks_folder": None, "limit": None, "batch_size": 1, "output": tmp_path} | changes
    with pytest.raises(ValueError, match=re.escape(said)):
        run_harness(settings.pop("hf_folder", model), **settings)


def test_several_ranks_are_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="runs in one process, got 4 ranks; start it again without torchrun"):
        run(model, "mmlu", folder=None, output=tmp_path)


def test_a_folder_without_weights_is_refused(model: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copyfile(model / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match=f"{tmp_path} must hold a model and its tokenizer, it cannot be loaded: "):
        run(tmp_path, "own_text", folder=folder, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("answer", "reached"),
    [(urllib.error.HTTPError("", 403, "", {}, None), True), (urllib.error.URLError("no"), False)],  # type: ignore[arg-type]
)
def test_a_refusal_is_an_answer_and_silence_is_none(
    answer: OSError, reached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answering(*_: Any, **__: Any) -> None:
        raise answer

    monkeypatch.setattr("urllib.request.urlopen", answering)
    assert harness._answers("http://hub.invalid") is reached


def test_the_gpt4all_average_is_the_one_that_model_cards_print() -> None:
    """Nous-Hermes-2-Mixtral-8x7B-DPO's card: seven tasks, "Average: 75.70"; its boolq and winogrande have acc alone."""
    normed = {"arc_challenge": 0.6425, "arc_easy": 0.8636, "hellaswag": 0.8489, "openbookqa": 0.4660, "piqa": 0.8379}
    results = {task: {"acc,none": 0.0, "acc_norm,none": score} for task, score in normed.items()}
    results |= {"boolq": {"acc,none": 0.8783}, "winogrande": {"acc,none": 0.7616}}
    assert f"{100 * gpt4all_average(results):.2f}" == "75.70"
