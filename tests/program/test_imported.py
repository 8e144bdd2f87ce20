"""Runs from an imported model with an extended vocabulary: its first loss, and new rows that are trained alone."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from megatron_sat.checkpoint.parity import RECORDED
from megatron_sat.convert.conversion import import_model
from megatron_sat.data.encode import TextOptions
from megatron_sat.data.prepare import prepare
from megatron_sat.data.tokenizer import build_tokenizer
from megatron_sat.vocab.job import ModelSettings, extend_vocabulary
from tests.checkpoint.families import write_model
from tests.helpers.command_line import PAPER
from tests.helpers.program import Text, open_session, read_records, start, trained
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import global_name

ADD = 100
RUN = """--micro-batch-size 2 --global-batch-size 4 --seq-length 64 --train-iters 3 --lr 1e-2 --min-lr 1e-2
--weight-decay 0.1 --log-interval 1 --eval-iters 0 --num-workers 0 --attention-dropout 0 --hidden-dropout 0"""
NEW = "--train-only new-embeddings"
ROWS = ("word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A model with `ADD` Chinese pieces, imported, and text in its tokens; only to be read."""

    load: Path
    data: Path
    first: int
    """The first new token."""

    def command(self, more: str = "") -> list[str]:
        argv = ["--config", str(self.load / "model.yaml"), "--load", str(self.load), "--finetune", *RUN.split()]
        paths = ["--train-data-path", str(self.data), "--data-cache-path", str(self.data.parent / "cache")]
        return [*argv, *paths, *more.split()]


@pytest.fixture(scope="module")
def imported(text: Text, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    folder = tmp_path_factory.mktemp("imported")
    source = Path(f"{text.prefix('zh/religion')}.jsonl")
    chinese = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    report = extend_vocabulary(
        write_model("tinyllama", folder / "old"),
        add=ADD,
        output=folder / "new",
        documents=lambda: chinese,
        held_out={"zh": [chinese[0][:400]]},
        ready_model=None,
        coverage=0.5,
        model=ModelSettings(folder=folder / "old", loss_characters=100, max_loss_increase=100.0),
    )
    run_ranks(_import, 1, folder / "new", folder / "load")
    flags = yaml.safe_load((folder / "load" / "model.yaml").read_text())["data"]
    tokenizer = build_tokenizer(flags["tokenizer_type"], model=flags["tokenizer_model"])
    options = TextOptions(append_eod=True)
    prepare([str(source)], output_prefix=str(folder / "zh"), tokenizer=tokenizer, options=options, workers=1)
    return Imported(load=folder / "load", data=folder / "zh", first=report["old_tokens"])


def _import(_: int, hf: Path, save: Path) -> None:
    import_model(hf, save, tp=2)


LAYOUTS = {
    "one process": (1, ""),
    "tp 2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp 2": (2, "--pipeline-model-parallel-size 2"),
    "interleaved": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "cp 2": (2, "--context-parallel-size 2"),
    "dp 2, weights gathered late": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "bf16": (1, "--bf16"),
    "sparse": (1, f"--sat-schedule constant --sat-omission-rate 0.5 {PAPER}"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_loss_stands_beside_hugging_faces_in_any_layout(layout: str, imported: Imported) -> None:
    ranks, flags = LAYOUTS[layout]
    ended = start(imported.command(f"--train-iters 1 {flags}"), ranks=ranks)
    assert ended.codes == [0] * ranks, ended.err
    (line,) = [line for line in ended.out.splitlines() if "the imported model's sample" in line]
    measured, theirs = (float(words.split()[-1]) for words in line.split("sample ")[1].split(", Hugging Face's"))
    assert measured == pytest.approx(theirs, abs=2e-2 if layout == "bf16" else 2e-4)
    assert theirs > 1


def test_a_model_that_computes_otherwise_is_not_trained(imported: Imported, tmp_path: Path) -> None:
    """A flag behind the model's own, as a launch script may have it left over."""
    wrong = "--norm-epsilon 0.5 --train-iters 1"
    ended = start(imported.command(f"{wrong} --save {tmp_path}"))
    assert ended.codes == [2]
    assert "the first loss must be Hugging Face's" in ended.err and "--allow-first-loss-apart" in ended.err
    assert not list(tmp_path.iterdir())

    permitted = start(imported.command(f"{wrong} --allow-first-loss-apart"))
    assert permitted.codes == [0], permitted.err
    assert "as --allow-first-loss-apart permits" in permitted.out


def test_an_import_without_a_recorded_loss_is_trained_unchecked(imported: Imported, tmp_path: Path) -> None:
    for path in imported.load.iterdir():
        if path.name != RECORDED:
            (tmp_path / path.name).symlink_to(path)
    argv = [word.replace(str(imported.load), str(tmp_path)) for word in imported.command("--train-iters 1")]
    ended = start(argv)
    assert ended.codes == [0], ended.err
    assert "Hugging Face" not in ended.out


# -- new rows alone


def _moved(_: int, argv: list[str]) -> dict[str, list[bool]]:
    """By parameter, which rows a run changed."""
    session = open_session(argv)
    before = _copies(session)
    session.train()
    session.run.engine.gather_weights()
    after = _copies(session)
    return {name: (before[name] != after[name]).reshape(len(after[name]), -1).any(1).tolist() for name in after}


def _copies(session: object) -> dict[str, torch.Tensor]:
    return {
        global_name(name, chunk): parameter.detach().clone()
        for chunk in session.run.engine.chunks  # type: ignore[attr-defined]
        for name, parameter in chunk.named_parameters()
    }


@pytest.mark.parametrize("flags", ["", "--use-distributed-optimizer --bf16"])
def test_new_embeddings_move_and_nothing_else_does(flags: str, imported: Imported) -> None:
    (moved,) = run_ranks(_moved, 1, imported.command(f"{NEW} {flags}"))
    for name, rows in moved.items():
        if name.endswith(ROWS):
            assert any(rows) and {i for i, row in enumerate(rows) if row} <= set(
                range(imported.first, imported.first + ADD)
            )
        else:
            assert not any(rows), name


def test_the_first_new_token_may_be_named(imported: Imported) -> None:
    first = imported.first + ADD // 2
    (moved,) = run_ranks(_moved, 1, imported.command(f"{NEW} --train-only-first-id {first}"))
    (embedding,) = [rows for name, rows in moved.items() if name.endswith(ROWS[0])]
    assert any(embedding[first:]) and not any(embedding[:first])


def test_what_is_trained_is_said(imported: Imported) -> None:
    ended = start(imported.command(f"{NEW} --train-iters 1"))
    first, last = imported.first, imported.first + ADD - 1
    assert f"only the tokens {first} to {last} are trained: {2 * ADD * 32:,} entries on rank 0" in ended.out


def test_a_resumed_stage_equals_the_uninterrupted_one(imported: Imported, tmp_path: Path) -> None:
    save = f"{NEW} --save {tmp_path} --save-interval 1"
    whole = trained(imported.command(save), tmp_path / "metrics.jsonl")
    resumed = [word for word in imported.command(f"{save} --ckpt-step 1") if word != "--finetune"]
    resumed[resumed.index("--load") + 1] = str(tmp_path)
    again = trained(resumed, tmp_path / "metrics.jsonl")
    assert again.losses == whole.losses and again.weights == whole.weights


def test_the_next_stage_trains_everything_from_there(imported: Imported, tmp_path: Path) -> None:
    stage = start(imported.command(f"{NEW} --save {tmp_path}"))
    assert stage.codes == [0], stage.err
    argv = imported.command(f"--save {tmp_path / 'next'} --sat-schedule constant --sat-omission-rate 0.5 {PAPER}")
    argv[argv.index("--load") + 1] = str(tmp_path)
    ended = start(argv)
    assert ended.codes == [0], ended.err
    assert "the imported model's sample" not in ended.out  # it is another model by now
    before, after = (read_records(folder / "metrics.jsonl") for folder in (tmp_path, tmp_path / "next"))
    assert after[0]["loss"] < before[0]["loss"]


REFUSED = {
    "sparse": (f"{NEW} --sat-schedule constant --sat-omission-rate 0.5", "--train-only new-embeddings needs --sat-"),
    "idle": ("--train-only-first-id 300", "has no effect without --train-only new-embeddings"),
    "no rows": (f"{NEW} --train-only-first-id 9999", "new rows must be a range of ids, got 9999 to"),
    "below 1": (f"{NEW} --train-only-first-id 0", "--train-only-first-id must be at least 1, got 0"),
    "unknown": ("--train-only old-embeddings", "--train-only must be one of all, new-embeddings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_alone_is_refused(case: str, imported: Imported) -> None:
    flags, message = REFUSED[case]
    ended = start(imported.command(flags))
    assert ended.codes == [2]
    assert message in ended.err


def test_a_vocabulary_that_was_never_extended_has_no_new_rows(text: Text) -> None:
    ended = start(text.command(NEW))
    assert ended.codes == [2]
    assert "vocabulary_extension.json must say which tokens are new" in ended.err
