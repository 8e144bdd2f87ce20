"""examples/sft_hf.py with each method, on a tiny model and a few records."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from examples.sft_hf import COUNTS, NOT_LEARNT, collate, main, read_examples, read_flags
from examples.sft_hf_methods import LEARNING_RATES, build_model
from megatron_sat.data.sft_template import build_template
from megatron_sat.data.tokenizer import tokenizer_of_folder
from tests.data.test_sft_template import CHATML
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_chat import save_chat_llama
from tests.helpers.tolerances import RUN_LOSS
from tests.helpers.zero_engine import load_library, needs_deepspeed
from tests.hf.training import as_a_rank

RECORDS: list[dict[str, Any]] = [
    {"instruction": "who", "input": "in my soul", "output": "Ishmael"},
    {"messages": [{"role": "user", "content": "who is"}, {"role": "assistant", "content": "my soul"}]},
    {"prompt": "soul", "response": "who is Ishmael in my soul"},
    {"conversations": [{"from": "human", "value": "is"}, {"from": "gpt", "value": "in"}]},
    {"instruction": "in my", "output": "soul soul"},
]
WHOLE = ("full", "sat", "spdf")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model (in model/), train.jsonl and dev.jsonl."""
    save_chat_llama(tmp_path / "model")
    write(tmp_path / "train.jsonl", RECORDS)
    write(tmp_path / "dev.jsonl", RECORDS[:3])
    return tmp_path


def write(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def flags(place: Path, method: str, *more: str, batch: int = 2) -> list[str]:
    found = ["--model", str(place / "model"), "--data", str(place / "train.jsonl")]
    found += ["--valid-data", str(place / "dev.jsonl"), "--save", str(place / "out"), "--method", method]
    return [*found, "--global-batch-size", str(batch), "--lr", "5e-3", *more]


def literal_loss(model: Any, place: Path) -> float:
    """Each held-out record alone, its responses' tokens one by one."""
    template = build_template("tokenizer", tokenizer=tokenizer_of_folder(place / "model"))
    lost, count = 0.0, 0
    for example in read_examples([str(place / "dev.jsonl")], template=template, max_tokens=2048, said="--data"):
        with torch.no_grad():
            likely = F.log_softmax(model.eval()(example["input_ids"][None]).logits[0].double(), dim=-1)
        for at in range(1, len(example["labels"])):
            if example["labels"][at] != NOT_LEARNT:
                lost -= likely[at - 1, example["labels"][at]].item()
                count += 1
    return lost / count


SPIEL = ["--spiel-interval", "3", "--spiel-accumulate", "1", "--spiel-weight-decay", "1"]
"""Three replacements in the nine steps of three epochs."""
MORE = {"spiel": SPIEL}


@pytest.mark.parametrize("method", ["full", "sat", "spdf", "lora", "ia3", "spiel"])
def test_a_method_trains_and_leaves_a_plain_model_and_its_report(method: str, place: Path) -> None:
    before = literal_loss(AutoModelForCausalLM.from_pretrained(place / "model"), place)
    report = main(flags(place, method, *MORE.get(method, [])))
    trained = AutoModelForCausalLM.from_pretrained(place / "out")
    assert json.loads((place / "out" / "report.json").read_text()) == report
    assert report["held-out loss"] == pytest.approx(literal_loss(trained, place), rel=1e-5)
    assert report["held-out loss"] < before - (0.1 if method in WHOLE else 0.001)
    assert report["steps"] == 3 * math.ceil(len(RECORDS) / 2)
    assert (report["trained parameters"] == sum(p.numel() for p in trained.parameters())) is (
        method in WHOLE
    )
    assert "memory" in report["peak memory"] and report["seconds"] > 0
    assert AutoTokenizer.from_pretrained(place / "out").chat_template == CHATML
    assert list(trained.state_dict()) == list(AutoModelForCausalLM.from_pretrained(place / "model").state_dict())


@pytest.mark.slow
def test_the_methods_are_different_trainings(place: Path) -> None:
    """The negative control; and rate 0 is full fine-tuning."""
    losses = {}
    ways = {"full": [], "sat": [], "sat 0": ["--sat-omission-rate", "0"], "spdf": [], "spdf 0": ["--spdf-rate", "0"]}
    ways["sat frozen"] = ["--sat-omitted-neurons", "frozen"]
    for name, more in (ways | {"lora": [], "ia3": [], "spiel": SPIEL}).items():
        losses[name] = main(flags(place, name.split()[0], *more))["held-out loss"]
    assert losses["sat 0"] == losses["spdf 0"] == losses["full"]
    assert len(set(losses.values())) == len(losses) - 2


def test_the_log_has_a_loss_at_each_interval(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(flags(place, "full", "--train-iters", "4"))
    each = capsys.readouterr().out.count("'loss'")
    main(flags(place, "full", "--train-iters", "4", "--log-interval", "2"))
    assert (each, capsys.readouterr().out.count("'loss'")) == (4, 2)


def test_a_run_of_one_step_is_sparse(place: Path) -> None:
    learnt = {
        method: main(flags(place, method.split()[0], "--train-iters", "1", *method.split()[1:]))["held-out loss"]
        for method in ("full", "sat", "sat --sat-schedule-start 0")
    }
    assert learnt["full"] == learnt["sat --sat-schedule-start 0"] != learnt["sat"]


def test_spdf_leaves_half_of_each_matrix_zero_until_its_last_sparse_step(place: Path) -> None:
    zeros = []
    for more in (["4", "--spdf-until", "4"], ["4", "--spdf-until", "3"], ["4"], ["1"]):
        main(flags(place, "spdf", "--train-iters", *more))
        trained = AutoModelForCausalLM.from_pretrained(place / "out")
        zeros.append({(layer.weight == 0).float().mean().item() for layer in linear_layers(trained)})
    assert zeros == [{0.5}, {0.0}, {0.0}, {0.5}]


def linear_layers(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("_proj")]


@pytest.mark.parametrize(
    "method", ["sat", "spiel", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "ia3"))]
)
def test_recomputation_changes_no_method(method: str, place: Path) -> None:
    argv = flags(place, method, "--train-iters", "2", *MORE.get(method, []))
    assert main(argv)["held-out loss"] == main([*argv, "--recompute"])["held-out loss"]


def test_spiel_trains_as_many_entries_as_lora_and_leaves_all_others_as_they_were(place: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(place / "model").state_dict()
    report = main(flags(place, "spiel", *SPIEL, "--spiel-rank", "4"))
    after = AutoModelForCausalLM.from_pretrained(place / "out").state_dict()
    changed = {name: int((after[name] != before[name]).sum()) for name in before}
    assert {name for name, count in changed.items() if count} == {name for name in before if "_proj" in name}
    shapes = [tensor.shape for name, tensor in before.items() if "_proj" in name]
    budget = sum(4 * sum(shape) for shape in shapes)
    assert budget - len(shapes) < report["trained parameters"] <= budget
    assert sum(changed.values()) == report["trained parameters"]


def test_a_resumed_spiel_goes_on_bit_for_bit_within_an_accumulation(place: Path) -> None:
    argv = ["--spiel-interval", "4", "--spiel-accumulate", "2", "--train-iters", "7", "--save-interval", "5"]
    whole = main(flags(place, "spiel", *argv))
    saved = place / "out" / "checkpoint-5"
    resumed = main(flags(place, "spiel", *argv, "--resume", str(saved)))
    assert resumed["held-out loss"] == whole["held-out loss"]
    assert (resumed["steps"], "seconds" in resumed) == (7, False), "those of two steps are not those of seven"
    assert resumed["seconds since the resume"] > 0
    assert resumed.keys() - {"seconds since the resume"} == whole.keys() - {"seconds"}


def test_spiel_on_two_processes_is_spiel_on_one_with_two_micro_batches(place: Path) -> None:
    write(place / "train.jsonl", RECORDS[:4])  # batches that divide
    together = run_ranks(rank_of_two, 2, flags(place, "spiel", *SPIEL))
    alone = main(flags(place, "spiel", *SPIEL))
    assert together[0]["held-out loss"] == pytest.approx(alone["held-out loss"], rel=RUN_LOSS["rtol"])


def test_spiel_under_deepspeed_is_an_error(place: Path) -> None:
    args = read_flags(flags(place, "spiel", "--deepspeed", "zero.json"))
    with pytest.raises(ValueError, match="--method spiel cannot be combined with --deepspeed, got zero.json: entries"):
        build_model(args, steps=20)


@pytest.mark.parametrize("method", LEARNING_RATES)
def test_one_process_with_several_gpus_is_an_error(
    method: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer would train batches of 2 x 2 examples, and twice the epochs that were asked for."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    said = f"--method {method} needs a process for each GPU, this one has 2, .* --nproc-per-node 2, or show it one GPU"
    with pytest.raises(ValueError, match=said):
        main(flags(place, method, *MORE.get(method, [])))


def test_only_responses_and_their_end_are_learnt(place: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    template = build_template("tokenizer", tokenizer=tokenizer_of_folder(place / "model"))
    examples = read_examples([str(place / "train.jsonl")], template=template, max_tokens=2048, said="--data")
    learnt = [tokenizer.decode(example["labels"][example["labels"] != NOT_LEARNT]) for example in examples]
    assert learnt == [
        f"{text}<|im_end|>" for text in ("Ishmael", "my soul", "who is Ishmael in my soul", "in", "soul soul")
    ]


def test_a_batch_is_filled_up_where_nothing_is_learnt_or_seen() -> None:
    short = {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([-100, 6])}
    long = {"input_ids": torch.tensor([7, 8, 9]), "labels": torch.tensor([-100, -100, 9])}
    batch = collate([short, long], fill=3)
    assert batch["input_ids"].tolist() == [[5, 6, 3], [7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 6, -100], [-100, -100, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    longer = collate([short, long], fill=3, multiple=4)
    assert longer["input_ids"].tolist() == [[5, 6, 3, 3], [7, 8, 9, 3]]
    assert longer["labels"].tolist() == [[-100, 6, -100, -100], [-100, -100, 9, -100]]
    assert longer["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert all(torch.equal(collate([short, long], fill=3, multiple=3)[name], batch[name]) for name in batch)


@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.slow), "sat"])
def test_filling_batches_up_changes_no_training(method: str, place: Path) -> None:
    learnt = [main(flags(place, method, "--pad-to-multiple-of", multiple))["held-out loss"] for multiple in ("1", "32")]
    assert learnt[0] == pytest.approx(learnt[1], rel=RUN_LOSS["rtol"])


@pytest.mark.parametrize("count", [0, -5])
@pytest.mark.parametrize("name", COUNTS)
def test_a_count_is_at_least_one(name: str, count: int, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flag = f"--{name.replace('_', '-')}"
    method = {"lora_rank": "lora", "spdf_until": "spdf"}.get(name, "full")
    with pytest.raises(SystemExit):
        read_flags(flags(place, method, flag, str(count)))
    assert capsys.readouterr().err.endswith(f"error: {flag} must be at least 1, got {count}\n")


@pytest.mark.parametrize(
    ("method", "flag", "given", "said"),
    [
        ("sat", "--sat-omission-rate", "1", "must be in [0, 1), got 1; 0.5 leaves every second out, 0 none"),
        ("spdf", "--spdf-rate", "-0.5", "must be in [0, 1), got -0.5; 0.5 leaves every second out, 0 none"),
        ("spdf", "--spdf-rate", "half", "must be a number such as 0.5 or 1/2, got 'half'"),
        ("spiel", "--spiel-replaced", "1/0", "must be a number such as 0.5 or 1/2, got '1/0'"),
        ("spiel", "--spiel-replaced", "1.5", "must be in [0, 1], got 1.5; 0.5 is a half, 1 is all"),
        ("spiel", "--spiel-replaced", "-1/5", "must be in [0, 1], got -1/5; 0.5 is a half, 1 is all"),
    ],
)
def test_a_share_that_is_none_is_an_error(
    method: str, flag: str, given: str, said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read_flags(flags(place, method, f"{flag}={given}"))
    assert capsys.readouterr().err.endswith(f"error: argument {flag}: {said}\n")


def test_shares_are_read_as_they_are_written(place: Path) -> None:
    assert read_flags(flags(place, "sat", "--sat-omission-rate", "0.96")).sat_omission_rate == Fraction(24, 25)
    assert read_flags(flags(place, "spdf", "--spdf-rate", "1/3")).spdf_rate == Fraction(1, 3)
    assert [
        read_flags(flags(place, "spiel", "--spiel-replaced", text)).spiel_replaced for text in ("0", "1")
    ] == [0, 1]


def test_a_longer_example_is_cut_off_one_without_a_response_is_left_out_and_both_are_said(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "train.jsonl", [*RECORDS, {"instruction": "in my", "output": ""}])
    template = build_template("tokenizer", tokenizer=tokenizer_of_folder(place / "model"))

    def lengths(most: int) -> list[int]:
        found = read_examples([str(place / "train.jsonl")], template=template, max_tokens=most, said="--data")
        return [len(example["input_ids"]) for example in found]

    whole = lengths(2048)
    assert lengths(max(whole) - 1) == [min(length, max(whole) - 1) for length in whole]
    said, cut = capsys.readouterr().out.replace("\n", " "), whole.count(max(whole))
    assert f"--data: {len(RECORDS)} examples, {sum(whole) - cut} tokens, " in said
    assert f"; {cut} truncated; left out: 0 malformed, 0 filtered, 1 without a response" in said


def rank_of_two(rank: int, argv: list[str], *, knows_gloo: bool = True) -> dict[str, Any]:
    as_a_rank(knows_gloo=knows_gloo)
    return main(argv)


def test_two_processes_report_the_loss_of_all_held_out_records(place: Path) -> None:
    """Three records for two processes: one of them has a forward of its own less."""
    reports = run_ranks(rank_of_two, 2, flags(place, "sat"))
    trained = AutoModelForCausalLM.from_pretrained(place / "out")
    assert reports[0]["held-out loss"] == reports[1]["held-out loss"]
    assert reports[0]["held-out loss"] == pytest.approx(literal_loss(trained, place), rel=1e-5)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("method", ["sat", "lora"])
def test_zero_3_trains_and_reports_the_same(method: str, place: Path) -> None:
    load_library()
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    (place / "zero.json").write_text(json.dumps({"zero_optimization": zero} | dict.fromkeys(auto, "auto")))
    more = ["--train-iters", "4"]
    with_zero = run_ranks(rank_of_two, 2, flags(place, method, *more, "--deepspeed", str(place / "zero.json")))
    (place / "out").rename(place / "out of shards")
    assert (place / "out of shards" / ("model.safetensors" if method == "sat" else "adapter")).exists()
    without = run_ranks(rank_of_two, 2, flags(place, method, *more))
    assert with_zero[0]["held-out loss"] == pytest.approx(without[0]["held-out loss"], rel=RUN_LOSS["rtol"])
    assert with_zero[0]["trained parameters"] == without[0]["trained parameters"]


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_on_processes_that_accelerate_does_not_know_of_is_an_error(place: Path) -> None:
    load_library()
    (place / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    argv = flags(place, "full", "--deepspeed", str(place / "zero.json"))
    with pytest.raises(RuntimeError, match="--deepspeed must have a GPU for each of the 2 processes, .* knows of 1;"):
        run_ranks(rank_of_two, 2, argv, knows_gloo=False)


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("full", ["--sat-rungs", "2"], "--sat-rungs has no effect with --method full, got 2; leave it out"),
        ("lora", ["--spdf-until", "3"], "--spdf-until has no effect with --method lora, got 3; leave it out"),
        ("lora", ["--spiel-rank", "8"], "--spiel-rank has no effect with --method lora, got 8; leave it out"),
        ("sat", ["--lora-rank", "8"], "--lora-rank has no effect with --method sat, got 8; leave it out"),
        (
            "sat",
            ["--sat-selection", "top-k", "--sat-temperature", "0.05"],
            "--sat-temperature has no effect with --sat-selection top-k, which draws nothing, got 0.05; leave it out",
        ),
        ("sat", ["--sat-selection", "mixed-growing"], "--sat-selection mixed-growing must have the settings of"),
        ("sat", ["--sat-temperature", "0"], "--sat-temperature must be above 0, got 0.0; the paper uses 0.05"),
    ],
)
def test_a_flag_that_is_not_the_methods_or_has_no_effect_is_an_error(
    method: str, more: list[str], said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(flags(place, method, *more))
    assert said in capsys.readouterr().err


def test_a_batch_that_does_not_divide_is_an_error(place: Path) -> None:
    with pytest.raises(ValueError, match=r"--global-batch-size \(3\) must be a multiple of .* \(2 x 1\); try 4"):
        main(flags(place, "full", "--micro-batch-size", "2", batch=3))


def test_a_line_that_is_no_record_is_named(place: Path) -> None:
    write(place / "train.jsonl", [RECORDS[0], {"text": "Call me"}])
    with pytest.raises(ValueError, match="train.jsonl, line 2, must be an instruction record, it is fields of no"):
        main(flags(place, "full"))


def test_files_without_a_response_are_an_error(place: Path) -> None:
    write(place / "dev.jsonl", [{"instruction": "who", "output": ""}])
    with pytest.raises(ValueError, match="--valid-data must hold at least one example with a response, it holds none"):
        main(flags(place, "full"))
