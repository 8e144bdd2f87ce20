"""Ways of fine-tuning beside each other, on a tiny model: the same start, the same examples, each judged and timed."""

import json
import re
import statistics
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Trainer

from benchmarks import sft_methods
from benchmarks.sft_choice import COUNT, candidates, choice_accuracy
from benchmarks.sft_methods import HEADS, METHODS, arguments, hold_out, main, table
from examples import sft_hf
from examples.sft_hf import NOT_LEARNT, Material
from tests.helpers.tiny_chat import save_chat_llama

WORDS = ("who", "is", "Ishmael", "in", "my", "soul")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model (in model/) and data.jsonl, 14 records."""
    save_chat_llama(tmp_path / "model")
    texts = [" ".join(WORDS[number % 6 :] + WORDS[: number // 6]) for number in range(14)]
    records = [{"instruction": text, "output": text[::-1]} for text in texts]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of every micro-batch that anything is trained on, as it comes."""
    found: list[list[int]] = []
    step = Trainer.training_step

    def seen(self: Trainer, model: Any, inputs: Any, *more: Any) -> Any:
        found.append(inputs["input_ids"].flatten().tolist())
        return step(self, model, inputs, *more)

    monkeypatch.setattr(Trainer, "training_step", seen)
    return found


def flags(place: Path, *more: str, steps: int = 4, batch: int = 2) -> list[str]:
    found = ["--model", str(place / "model"), "--data", str(place / "data.jsonl"), "--out", str(place / "found.json")]
    shared = f"--flags=--global-batch-size {batch} --micro-batch-size {batch}"
    return [*found, "--steps", str(steps), "--held-out", "5", shared, *more]


def test_methods_stand_beside_each_other_and_full_training_in_sats_time(
    place: Path, trained_on: list[list[int]]
) -> None:
    rates = ["--lr", "full=5e-3", "sat=5e-3", "lora=1e-2"]
    rows = main(flags(place, "--methods", "full", "sat", "lora", "--seeds", "1", "2", "--warm-up", "0", *rates))
    control = "full, time of sat"
    named = ["untrained", *("full", "sat", "lora", control) * 2]
    assert [row["name"] for row in rows] == named
    assert [row["seed"] for row in rows] == [1, *[1] * 4, *[2] * 4]
    start, full, sat, lora, in_time, *second = rows
    assert in_time["steps"] == max(1, int(sat["seconds"] * full["steps per second"]))
    assert in_time["learning rate"] == full["learning rate"] == 5e-3
    for row in (full, sat, lora, *second):
        assert row["loss"] < start["loss"]
        assert 0 <= row["accuracy"] <= 1
        assert len(row["step seconds"]) == row["steps"]
        assert row["steps per second"] == row["steps"] / row["seconds"]
        assert row["peak GiB"] is None, "of a GPU alone"
    assert len({row["loss"] for row in (full, sat, lora, second[0])}) == 4
    assert full["trained parameters"] == sat["trained parameters"] > lora["trained parameters"] > 0
    assert sat["omitted"] == {"attention": 0.5, "mlp": 47 / 48}, "one of two groups is the least"
    assert (start["steps"], full["omitted"]) == (0, {})

    orders = []
    for row in rows[1:]:
        orders.append(trained_on[: row["steps"]])
        del trained_on[: row["steps"]]
    assert trained_on == []
    for of_full, *others, of_control in (orders[:4], orders[4:]):
        assert others == [of_full, of_full], "the same examples in the same order"
        shorter = min(len(of_full), len(of_control))
        assert of_control[:shorter] == of_full[:shorter]
    assert orders[0] != orders[4]

    found = json.loads((place / "found.json").read_text())
    assert found["rows"] == rows
    assert found["records"] == {"learnt": 9, "held out": 5}
    assert {"command", "commit", "machine", "libraries"} <= found["about"].keys()
    assert "peft" in found["about"]["libraries"]
    shown = (place / "found.md").read_text()
    losses = [row["loss"] for row in rows if row["name"] == "sat"]
    mean, deviation = statistics.mean(losses), statistics.stdev(losses)
    assert f"| sat | 0.005 | 4 ± 0 | {mean:.4f} ± {deviation:.4f} |" in shown
    assert found["about"]["command"] in shown


def test_the_untrained_model_is_the_files(place: Path) -> None:
    row = main(flags(place, "--methods", "full", "--warm-up", "0"))[0]
    args = sft_hf.read_flags(sft_methods.command_line(arguments(flags(place)), "full", folder=str(place)))
    held_out = hold_out(sft_hf.read_material(args), count=5).held_out
    model = AutoModelForCausalLM.from_pretrained(place / "model").eval()
    losses = torch.cat([literal(model, example) for example in held_out])
    assert row["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    own = sum(
        literal(model, group[0]).mean() <= min(literal(model, other).mean() for other in group[1:])
        for group in candidates(held_out)
    )
    assert row["accuracy"] == pytest.approx(float(own) / 5)


@torch.no_grad()
def literal(model: Any, example: dict[str, torch.Tensor]) -> torch.Tensor:
    """Nats of each learnt token."""
    likely = F.log_softmax(model(example["input_ids"][None]).logits[0].double(), dim=-1)
    places = [at for at in range(1, len(example["labels"])) if example["labels"][at] != NOT_LEARNT]
    return torch.stack([-likely[at - 1, example["labels"][at]] for at in places])


def test_a_run_that_is_thrown_away_changes_nothing_but_time(place: Path, trained_on: list[list[int]]) -> None:
    counts = ("0", "3", "9")
    cold, *warm = (main(flags(place, "--methods", "full", "--warm-up", count))[-1]["loss"] for count in counts)
    assert warm == [cold, cold]
    assert len(trained_on) == 4 + (3 + 4) + (4 + 4), "and it is not longer than the run"


def test_what_is_thrown_away_is_the_beginning_of_the_run(place: Path, trained_on: list[list[int]]) -> None:
    """Settings that are right for the run, and not for one as short as what is thrown away."""
    methods = ["full", "spiel=spiel --spiel-accumulate 3", "late=sat --sat-schedule-start 3"]
    rows = main(flags(place, "--methods", *methods, "--warm-up", "2"))
    assert [row["name"] for row in rows if "failed" in row] == []
    assert [row["steps"] for row in rows[1:4]] == [4, 4, 4]
    for first in (0, 6, 12):
        assert trained_on[first : first + 2] == trained_on[first + 2 : first + 4]
    assert len(trained_on) == 3 * (2 + 4) + rows[4]["steps"]


def test_a_method_that_fails_is_reported_and_stops_no_other(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = "late=sat --sat-schedule-start 9"
    rows = main(flags(place, "--methods", late, "spiel", "full", "--warm-up", "0", steps=2))
    assert [row["name"] for row in rows] == ["untrained", "late", "spiel", "full"], "and it has no control"
    assert rows[2]["failed"].startswith("ValueError: a run with SpIEL must be longer than its first accumulation")
    assert "failed" in rows[1]
    assert rows[3]["loss"] > 0
    assert json.loads((place / "found.json").read_text())["rows"] == rows
    assert "| spiel | failed: ValueError: a run with SpIEL must be longer" in (place / "found.md").read_text()
    assert "spiel, seed 1, failed: ValueError: a run with SpIEL" in " ".join(capsys.readouterr().out.split())


def test_every_method_trains_under_autocast_and_leaves_nothing_to_the_next(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is still held would count in the next one's peak of memory."""
    models: list[Any] = []
    alive: list[bool] = []
    build = sft_methods.build_trainer

    def built(*args: Any, **named: Any) -> Any:
        alive.extend(model() is not None for model in models)
        trainer, prepared = build(*args, **named)
        models.append(weakref.ref(prepared.model))
        return trainer, prepared

    monkeypatch.setattr(sft_methods, "build_trainer", built)
    line = flags(place, "--warm-up", "0", steps=6)
    at = next(number for number, text in enumerate(line) if text.startswith("--flags="))
    line[at] += " --bf16"
    rows = main(line)
    assert len(models) == len(rows) == 1 + len(METHODS) + 2
    assert not any(alive)
    assert [row["name"] for row in rows if "failed" in row] == []
    assert [row["name"] for row in rows[-2:]] == ["full, time of sat", "full, time of sat-contribution"]
    start, *trained = rows
    assert len({row["loss"] for row in rows[:-2]}) == len(rows) - 2
    assert all(row["loss"] < start["loss"] + 0.1 for row in trained)


def examples_of(*pairs: tuple[str, str]) -> list[dict[str, torch.Tensor]]:
    """A prompt's and a response's bytes, and an end that is not learnt."""
    found = []
    for prompt, response in pairs:
        ids = torch.tensor([*prompt.encode(), *response.encode(), 0])
        labels = torch.tensor([*[NOT_LEARNT] * len(prompt), *response.encode(), NOT_LEARNT])
        found.append({"input_ids": ids, "labels": labels})
    return found


def text(example: dict[str, torch.Tensor]) -> str:
    learnt = example["labels"] != NOT_LEARNT
    ids = example["input_ids"]
    return bytes(ids[~learnt].tolist()).decode() + ":" + bytes(ids[learnt].tolist()).decode()


def test_a_response_is_chosen_among_those_to_the_prompts_that_are_most_alike() -> None:
    found = candidates(examples_of(("b1", "2"), ("a1", "1"), ("b3", "4"), ("c", "6"), ("b2", "3"), ("b4", "5")))
    assert [[text(each) for each in group] for group in found] == [
        ["a1:1", "a1:2", "a1:3", "a1:4"],
        ["b1:2", "b1:1", "b1:3", "b1:4"],
        ["b2:3", "b2:1", "b2:2", "b2:4"],
        ["b3:4", "b3:2", "b3:3", "b3:5"],
        ["b4:5", "b4:3", "b4:4", "b4:6"],
        ["c:6", "c:3", "c:4", "c:5"],
    ]


def test_conversations_are_not_asked_and_too_few_records_are_an_error() -> None:
    records = examples_of(*[(letter, letter) for letter in "abcde"])
    talk = {"input_ids": torch.arange(4), "labels": torch.tensor([NOT_LEARNT, 1, NOT_LEARNT, 3])}
    assert len(candidates([talk, *records])) == 5
    with pytest.raises(ValueError, match="--held-out must hold 4 records of one response to choose from, it holds 3;"):
        candidates([talk, *records[:3]])


def test_batches_and_filling_change_no_choice(place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    trainer: Any = SimpleNamespace(
        model_wrapped=model,
        args=SimpleNamespace(device=torch.device("cpu")),
        compute_loss_context_manager=lambda: torch.no_grad(),
    )
    pairs = [(word * (1 + at), word[::-1] * at + "x") for at, word in enumerate(WORDS)]
    asked = candidates(examples_of(*pairs))
    found = {choice_accuracy(trainer, asked, batch=batch) for batch in (1, 7, 64)}
    right = [
        min(range(COUNT), key=lambda at, group=group: literal(model, group[at]).mean().item()) == 0 for group in asked
    ]
    assert found == {torch.tensor(right).float().mean().item()}
    assert 0 < sum(right) < len(right)


def test_records_are_held_out_once_for_all_seeds() -> None:
    records = examples_of(*[(letter, letter) for letter in "abcdefgh"])
    found = hold_out(Material(train=records, held_out=[], fill=0), count=5)
    again = hold_out(Material(train=records, held_out=[], fill=0), count=5)
    names = [[text(each) for each in part] for part in (found.train, found.held_out)]
    assert sorted([*names[0], *names[1]]) == sorted(text(each) for each in records)
    assert [len(part) for part in names] == [3, 5]
    assert [text(each) for each in again.held_out] == names[1]


@pytest.mark.parametrize("count", [3, 8])
def test_a_part_that_cannot_be_held_out_is_an_error(count: int) -> None:
    material = Material(train=examples_of(*[(letter, letter) for letter in "abcdefgh"]), held_out=[], fill=0)
    with pytest.raises(ValueError, match=rf"--held-out must be from 4, .*, to 7, .* has 8 records, got {count}"):
        hold_out(material, count=count)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods", "full", "adapter"], "--methods must be of full, .* or NAME='METHOD FLAGS', got adapter"),
        (["--methods", "half=sat --sat-omission-rate 1/2"], "--methods must have full where SAT is, .*; add it"),
        (["--methods", "full", "--lr", "lora=1"], "--lr must be NAME=VALUE with a NAME of --methods, got lora=1; try"),
        (["--steps", "0"], "--steps must be at least 1 and --warm-up at least 0, got 0 and 8"),
        (["--warm-up", "-1"], "--steps must be at least 1 and --warm-up at least 0, got 4 and -1"),
        (["--lr", "full"], "--lr must be NAME=VALUE with a NAME of --methods, got full; try full=1e-4"),
        (["--methods", "full", "x=lora --sat-rungs 1"], "--sat-rungs has no effect with --method lora, got 1"),
    ],
)
def test_what_no_method_is_ends_it_before_the_first_run(
    more: list[str], said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(flags(place, *more))
    assert re.search(said, " ".join(capsys.readouterr().err.split()))
    assert not (place / "found.json").exists()


def test_a_table_has_a_line_for_a_method_and_none_of_its_figures_where_all_failed() -> None:
    rows = [{"name": "ia3", "seed": seed, "steps": 3, "failed": "OutOfMemoryError: 3 |\n GiB"} for seed in (1, 2)]
    assert table(rows) == [["ia3", "failed: OutOfMemoryError: 3 | GiB", *[""] * (len(HEADS) - 2)]]
