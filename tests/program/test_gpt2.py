"""GPT-2 in the program, pre-trained from random weights: layouts, resumption, engines, baselines, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sat.convert.conversion import export_model
from megatron_sat.convert.opening import open_model
from megatron_sat.layers.activation import tanh_gelu
from tests.helpers.program import SPARSE, Text, Trained, each_once, open_session, start, trained
from tests.helpers.ranks import run_ranks
from tests.helpers.slow import mostly_slow
from tests.helpers.zero_engine import load_library, needs_deepspeed
from tests.program.test_baselines import MST, OVERLAPPED, SPDF, STRUCTURED
from tests.program.test_est import EST
from tests.program.test_layouts import PP, TP, WIDE, assert_same_run

LLAMAS = (
    "--swiglu --normalization --disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type "
    "--group-query-attention --num-query-groups"
)
"""What `program.LLAMA` says otherwise than Megatron-LM's defaults, which are GPT-2's."""
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
OURS = (
    f"{SPARSE} --sat-importance contribution --sat-statistics lagged --sat-selection-interval 2 "
    "--sat-rescale inverse-keep --sat-omitted-neurons frozen"
)


def command(text: Text, more: str = "", *, without: str = "") -> list[str]:
    return text.command(f"--openai-gelu {more}", without=f"{LLAMAS} {without}")


@pytest.fixture(scope="module")
def weights(text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    ended = start(command(text, f"--save {folder} --train-iters 2 --lr-warmup-iters 0"))
    assert ended.codes == [0], ended.err
    return folder


@pytest.fixture(scope="module")
def train(text: Text, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """(flags, ranks) to a run from the common weights; each is run once."""
    folder = tmp_path_factory.mktemp("runs")
    return each_once(folder, lambda flags: command(text, f"--load {weights} --finetune {flags}"))


METHODS = {
    "dense": "",
    "sparse": SPARSE,
    "ours": OURS,
    "magnitude": f"{SPARSE} --sat-importance magnitude",
    "uniform": f"{SPARSE} --sat-importance uniform",
    "wanda": f"{SPARSE} --sat-importance wanda",
    "omitted backwards": f"{SPARSE} --sat-omit backward",
    "omitted from weight gradients": f"{SPARSE} --sat-omit weight-gradient",
    "sparse reduction": f"{SPARSE} --sat-sparse-reduce",
}
LAYOUTS = {
    "tp 2, sequence parallel": (2, f"{TP} --sequence-parallel", ""),
    "pp 2": (2, PP, ""),
    "dp 2": (2, OVERLAPPED, WIDE),
    "cp 2": (2, "--context-parallel-size 2", ""),
}
FAST = (
    ("tp 2, sequence parallel", "sparse"), ("pp 2", "sparse"), ("dp 2", "sparse reduction"), ("cp 2", "ours"),
)  # fmt: skip


@pytest.mark.parametrize(
    "layout, method",
    [
        pytest.param(layout, method, marks=() if (layout, method) in FAST else pytest.mark.slow)
        for layout in LAYOUTS
        for method in METHODS
        if layout == "dp 2" or method != "sparse reduction"
    ],
)
def test_a_layout_trains_as_one_process_does(layout: str, method: str, train: Callable[..., Trained]) -> None:
    ranks, flags, alone = LAYOUTS[layout]
    expected = METHODS[method].replace("--sat-sparse-reduce", "")
    assert_same_run(train(f"{METHODS[method]} {flags}", ranks), train(f"{expected} {alone}"))


def test_the_form_of_gelu_is_the_flags(train: Callable[..., Trained]) -> None:
    """Beside weights as small as the first ones the two forms differ little."""
    assert train(f"{SPARSE} --no-openai-gelu").losses != train(SPARSE).losses


@pytest.mark.slow
def test_packed_weights_train_as_gathered_ones_do(train: Callable[..., Trained]) -> None:
    assert_same_run(train(f"{SPARSE} --sat-weights gather"), train(SPARSE))


BASELINES = {"sparse": SPARSE, "spdf": SPDF, "mst": MST, "mst-structured": STRUCTURED, "est": EST}


@pytest.mark.parametrize("method", mostly_slow(BASELINES, fast=("sparse", "mst")))
def test_a_resumed_run_with_dropout_equals_the_uninterrupted_one_bit_for_bit(
    method: str, text: Text, tmp_path: Path
) -> None:
    jsonl, saves = tmp_path / "metrics.jsonl", f"{BASELINES[method]} {DROPOUT} --save {tmp_path} --save-interval 2"
    whole = trained(command(text, saves), jsonl)
    resumed = trained(command(text, f"{saves} --load {tmp_path} --ckpt-step 4"), jsonl)
    assert resumed == whole
    assert any(loss != whole.losses[0] for loss in whole.losses[1:])


@needs_deepspeed
@pytest.mark.parametrize("stage", mostly_slow({str(stage): "" for stage in (0, 1, 2, 3)}, fast=("3",)))
def test_deepspeed_trains_as_megatrons_engine_does(stage: str, train: Callable[..., Trained]) -> None:
    load_library()
    assert_same_run(train(f"{SPARSE} --engine deepspeed --zero-stage {stage}", 2), train(f"{SPARSE} {WIDE}"))


# -- replayed layers


def test_layers_with_biases_are_not_replayed(text: Text) -> None:
    ended = start(command(text, f"{SPARSE} --layer-graphs"))
    assert ended.codes == [2]
    assert "--layer-graphs has no effect with model parallelism, recomputation, dropout, biases" in ended.err


def test_without_biases_replayed_layers_train_as_eager_ones_do(text: Text, tmp_path: Path) -> None:
    flags = f"{SPARSE} --disable-bias-linear"
    eager = trained(command(text, flags), tmp_path / "eager.jsonl")
    assert trained(command(text, f"{flags} --layer-graphs"), tmp_path / "replayed.jsonl") == eager


# -- the checkpoint


def opened(_: int, folder: str) -> tuple[bool, str, bool]:
    model: Any = open_model(Path(folder))
    chunk = model.chunks[0]
    layer = chunk.decoder.layers[0]
    return (
        layer.mlp.activation_func is tanh_gelu,
        type(layer.input_layernorm).__name__,
        hasattr(chunk.embedding, "position_embeddings"),
    )


def test_a_checkpoint_opens_as_the_model_that_was_trained(weights: Path) -> None:
    assert run_ranks(opened, 1, str(weights))[0] == (True, "LayerNorm", True)


def exported(_: int, folder: str, to: str) -> None:
    export_model(Path(folder), Path(to))


def test_export_is_refused_before_anything_is_written(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ValueError: swiglu of an exported model must be True, got .*: only llama"):
        run_ranks(exported, 1, str(weights), str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


def test_positions_are_learned(text: Text, weights: Path, tmp_path: Path) -> None:
    """Each of the positions that a sample has moves, the others stay."""
    argv = command(text, f"--max-position-embeddings 40 --save {tmp_path} --weight-decay 0 --seed 3")
    first, last = run_ranks(moved, 1, argv)[0]
    changed = (first != last).any(dim=1)
    assert changed.tolist() == [True] * 32 + [False] * 8


def moved(_: int, argv: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The table of positions before training and after it."""
    session = open_session(argv)
    (chunk,) = session.run.engine.chunks
    table = dict(chunk.named_parameters())["embedding.position_embeddings.weight"]
    before = table.detach().clone()
    session.train()
    return before, table.detach().clone()
