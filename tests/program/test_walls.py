"""Walls 1 and 6: what the program saves is Megatron's, and what it evaluates is the dense model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from torch import Tensor

from megatron_sat.distributed import initialize_model_parallel
from tests.helpers.plain_gpt import make_config
from tests.helpers.program import SPARSE, Text, open_session, read_records, start
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import RUN_LOSS

SHORT = "--train-iters 4"


def batches_of_religion(_: int, argv: list[str]) -> list[dict[str, Tensor]]:
    """What an evaluation of this domain reads."""
    return list(open_session(argv).valid["religion"])


def plain_loss(_: int, folder: Path, batches: list[dict[str, Tensor]]) -> float:
    """The loss of Megatron's own GPTModel, of its local layers, with the checkpoint's weights."""
    initialize_model_parallel(tp=1, pp=1, cp=1, virtual_pp=None, seed=1)
    config = make_config(hidden_size=64, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=96)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=4096,
        max_sequence_length=32,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    assert not any(type(module).__module__.startswith("megatron_sat") for module in model.modules())
    metadata = dist_checkpointing.load_content_metadata(str(folder))
    state: dict[str, Any] = {"model": model.sharded_state_dict(metadata=metadata)}
    loaded = dist_checkpointing.load(state, str(folder))
    model.load_state_dict(loaded["model"])
    model.eval()
    causal = torch.triu(torch.ones(1, 1, 32, 32), 1).bool()
    total = tokens = 0.0
    with torch.no_grad():
        for batch in batches:
            losses = model(batch["tokens"], batch["position_ids"], causal, labels=batch["labels"])
            total += (losses * batch["loss_mask"]).double().sum().item()
            tokens += batch["loss_mask"].sum().item()
    return total / tokens


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    ],
)
def test_a_checkpoint_of_a_sparse_run_opens_in_plain_megatron_and_gives_its_evaluation(
    ranks: int, layout: str, text: Text, tmp_path: Path
) -> None:
    argv = text.command(f"{SHORT} {SPARSE} --save {tmp_path} {layout}")
    ended = start(argv, ranks=ranks)
    assert set(ended.codes) == {0}, ended.err
    said = read_records(tmp_path / "metrics.jsonl", kind="validation")[-1]["loss"]["religion"]

    (batches,) = run_ranks(batches_of_religion, 1, text.command(SHORT))
    (plain,) = run_ranks(plain_loss, 1, tmp_path / "iter_0000004", batches)
    assert said == pytest.approx(plain, rel=RUN_LOSS["rtol"])


def test_the_weights_of_an_earlier_step_give_another_loss(text: Text, tmp_path: Path) -> None:
    assert start(text.command(f"{SHORT} {SPARSE} --save {tmp_path} --save-interval 2")).codes == [0]
    (batches,) = run_ranks(batches_of_religion, 1, text.command(SHORT))
    early, late = (run_ranks(plain_loss, 1, tmp_path / f"iter_000000{step}", batches)[0] for step in (2, 4))
    assert abs(early / late - 1) > 100 * RUN_LOSS["rtol"]
