"""From a configuration to a run: the pieces fit, the plan is the configuration's, and the reader is told."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from megatron_sat import cli
from megatron_sat.build import build_run, introduce, recompute_of
from megatron_sat.model.flops import Recompute
from tests.helpers.command_line import run as configured
from tests.helpers.program import LADDER, Text, prepare_text
from tests.helpers.ranks import run_ranks


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return prepare_text(tmp_path_factory.mktemp("text"))


PIPELINE = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
RECOMPUTE = {
    "": Recompute(),
    "--recompute-granularity selective": Recompute(parts=("core_attn",)),
    "--recompute-granularity selective --recompute-modules mlp layernorm": Recompute(parts=("mlp", "layernorm")),
    "--recompute-activations": Recompute(parts=("core_attn",)),
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2": Recompute(parts=("full",)),
    "--recompute-granularity full --recompute-method block --recompute-num-layers 3": Recompute(
        parts=("full",), layers=3
    ),
    f"{PIPELINE} --recompute-granularity full --recompute-method block --recompute-num-layers 1": Recompute(
        parts=("full",), layers=4
    ),
    "--recompute-granularity full --recompute-method block --recompute-num-layers 9": Recompute(
        parts=("full",), layers=4
    ),
}
"""Of 4 layers. Blocks are counted from every chunk's first layer."""


@pytest.mark.parametrize("flags", RECOMPUTE)
def test_what_is_computed_again_is_told_from_the_flags(flags: str) -> None:
    ranks = 2 if "pipeline" in flags else 1
    assert recompute_of(configured(flags, ranks=ranks)) == RECOMPUTE[flags]


def built(_: int, argv: list[str], world_size: int) -> dict[str, Any]:
    """What stands in a run, in plain values."""
    run = build_run(cli.parse(argv, world_size=world_size, cuda=False))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        introduce(run)
    names = [name for chunk in run.engine.chunks for name, _ in chunk.named_parameters()]
    rows = sum(
        parameter.shape[0]
        for chunk in run.engine.chunks
        for name, parameter in chunk.named_parameters()
        if name == "embedding.word_embeddings.weight"
    )
    return {
        "names": names,
        "rows": rows,
        "parameters": sum(p.numel() for chunk in run.engine.chunks for p in chunk.parameters()),
        "shape": run.shape,
        "plan": run.plan,
        "selectors": [(s.place.kind, s.place.layer) for s in run.controller.selectors],
        "said": said.getvalue(),
        "samples": len(run.datasets.train),  # type: ignore[arg-type]
        "tokenizer": run.tokenizer.vocab_size,
    }


def test_a_run_has_a_selector_a_module_and_rows_for_every_token(text: Text) -> None:
    """The tokenizer has 4096 tokens; rows come in 65s on each rank."""
    flags = "--tensor-model-parallel-size 2 --make-vocab-size-divisible-by 65"
    one, two = run_ranks(built, 2, text.command(flags), 2)
    assert one["selectors"] == [(kind, layer) for layer in range(1, 5) for kind in ("attention", "mlp")]
    assert one["tokenizer"] == 4096
    assert one["rows"] + two["rows"] == one["shape"].padded_vocab_size == 4160
    assert one["samples"] >= 7 * 8
    assert "output_layer.weight" in one["names"]


def test_tied_embeddings_have_no_output_layer(text: Text) -> None:
    (run,) = run_ranks(built, 1, text.command(without="--untie-embeddings-and-output-weights"), 1)
    assert "output_layer.weight" not in run["names"]


def test_the_plan_is_of_this_configuration(text: Text) -> None:
    flags = f"{LADDER} --sat-importance maxip --sat-selection-interval 2"
    (every,) = run_ranks(built, 1, text.command(flags.replace("interval 2", "interval 1")), 1)
    (second,) = run_ranks(built, 1, text.command(flags), 1)
    assert second["plan"].rungs[0].choice_flops == every["plan"].rungs[0].choice_flops // 2 > 0
    assert (second["plan"].steps, second["plan"].tokens_per_step) == (7, 8 * 32)
    assert set(second["plan"].epochs) == {"poetry", "en"}
    assert second["plan"].quotas == ("4 query groups", "96 channels")


def test_the_reader_is_told_what_is_in_use_how_large_it_is_and_what_does_nothing(text: Text) -> None:
    (run,) = run_ranks(built, 1, text.command("--transformer-impl local --rotary-seq-len-interpolation-factor 2"), 1)
    said = run["said"]
    assert "optimizer: torch's AdamW" in said
    assert f"{run['parameters']:,} parameters on rank 0; 1 ranks: tensor 1, pipeline 1, context 1, data 1" in said
    assert "note: --transformer-impl local does nothing here" in said


def test_data_without_text_for_training_are_refused(text: Text) -> None:
    data = f"--data-path {text.prefix('zh/poetry')} --split 0,1,0"
    argv = text.command(data, without="--train-data-path --valid-data-path")
    with pytest.raises(RuntimeError, match=r"training needs text, got text for evaluation alone \(--split 0,1,0\)"):
        run_ranks(built, 1, argv, 1)


def test_what_is_wrong_with_the_text_is_said_before_a_model_is_built(text: Text, tmp_path: Path) -> None:
    """A model too large for any machine would not come to be refused otherwise."""
    huge = f"--hidden-size 8388608 --ffn-hidden-size 8388608 --train-data-path {tmp_path / 'absent'}"
    argv = text.command(huge, without="--train-data-path")
    with pytest.raises(RuntimeError, match=r"absent.bin does not exist"):
        run_ranks(built, 1, argv, 1)
