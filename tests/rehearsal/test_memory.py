"""The estimate against models that are built and trained here, a measured GPU, and figures that others published."""

import importlib
import importlib.util
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.nn.functional as F
from megatron.core import parallel_state

from megatron_sat.layers import rope
from megatron_sat.model.flops import KeptShape, ModelShape, Recompute, kept_shape, whole
from megatron_sat.rehearsal.memory import (
    GIB,
    Beside,
    Bytes,
    Cut,
    Memory,
    Shards,
    Work,
    estimate,
    layer_bytes,
    loss_bytes,
    parameters,
    under_way,
)
from tests.helpers.plain_engine import MICRO_BATCHES, make_engine, train
from tests.helpers.ranks import run_ranks
from tests.helpers.saved import Saved
from tests.helpers.tiny import GPT2, GPT2_OUTSIDE, SEQ, VOCAB, bare, batch, layout, losses, tiny_chunks

LLAMA_7B = ModelShape(
    num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=32, kv_channels=128,
    ffn_hidden_size=11008, gated=True, padded_vocab_size=32000, seq_length=4096,
)  # fmt: skip
TINY = ModelShape(
    num_layers=4, hidden_size=64, num_attention_heads=8, num_query_groups=4, kv_channels=8, ffn_hidden_size=96,
    gated=True, padded_vocab_size=VOCAB, seq_length=SEQ,
)  # fmt: skip
MIXED = Bytes(weight=2, gradient=4, optimizer=12)
ALONE = Cut(tensor=1, context=1, layers=(32,))
PLAIN = Work(micro_batch_size=1, num_micro_batches=8, recompute=Recompute())
GPT2_HAS = Beside(linear_biases=True, norm_biases=True, positions=SEQ, rotates=False)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def memory_of(shape: ModelShape = LLAMA_7B, *kept: KeptShape, **changes: Any) -> Memory:
    given: dict[str, Any] = {"cut": ALONE, "size": MIXED, "shards": Shards(), "work": PLAIN, "packs": False}
    return estimate(shape, kept=kept or (whole(shape),), **given | changes)


# -- what others published


@pytest.mark.parametrize(
    ("shards", "gigabytes"),
    [((1, 1, 1), 120.0), ((1, 1, 64), 31.4), ((1, 64, 64), 16.6), ((64, 64, 64), 1.9)],
    ids=["none", "ZeRO-1", "ZeRO-2", "ZeRO-3"],
)
def test_state_is_that_of_zeros_figure_1(shards: tuple[int, int, int], gigabytes: float) -> None:
    """Rajbhandari et al. 2020: 7.5 billion parameters, 64 replicas, 16-bit gradients."""
    names = dict(zip(("weights", "gradients", "optimizer"), shards, strict=True))
    found = memory_of(size=Bytes(weight=2, gradient=2, optimizer=12), shards=Shards(**names))
    state = found.weights + found.gradients + found.optimizer
    each = state / parameters(LLAMA_7B, 0, cut=ALONE, tied=False)
    assert round(each * 7.5, 1) == gigabytes


def test_llama_2_7b_has_its_published_number_of_parameters() -> None:
    assert parameters(LLAMA_7B, 0, cut=ALONE, tied=False) == 6_738_415_616


def test_activations_are_those_of_korthikanti_et_al_for_their_layer() -> None:
    """34 s b h without the s x s matrix (their equation 1, s^2 terms left out), of 4 h channels without a gate.

    Ours: no masks of two dropouts (2 s b h), but Q and K before and after their rotation (4 s b h).
    """
    shape = replace(LLAMA_7B, ffn_hidden_size=4 * 4096, gated=False)
    parts = layer_bytes(shape, whole(shape), cut=ALONE, size=MIXED, work=PLAIN)
    small = 4 * 4096 * (32 + 2)  # the log of each head's sum, and both norms' scales: fp32
    assert sum(parts.values()) - small == (34 - 2 + 4) * 4096 * 4096


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="megatron-core 0.16.1's wheel has no megatron.training; 0.19's has",
)
@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (2, 1, 16), (2, 2, 8), (8, 1, 4)])
def test_state_is_what_megatron_lm_says(tp: int, pp: int, dp: int) -> None:
    theirs = importlib.import_module("megatron.training.theoretical_memory_usage")
    args = SimpleNamespace(
        kv_channels=128, num_attention_heads=32, hidden_size=4096, group_query_attention=False, num_experts=None,
        swiglu=True, num_layers=32, mtp_num_layers=None, normalization="RMSNorm", multi_latent_attention=False,
        padded_vocab_size=32000, untie_embeddings_and_output_weights=True, ffn_hidden_size=11008, moe_latent_size=None,
        add_bias_linear=False, moe_shared_expert_intermediate_size=None, expert_tensor_parallel_size=tp,
        expert_model_parallel_size=1, pipeline_model_parallel_size=pp, tensor_model_parallel_size=tp,
        world_size=tp * pp * dp, use_distributed_optimizer=dp > 1, data_parallel_size=dp,
    )  # fmt: skip
    cut = Cut(tensor=tp, context=1, layers=(32 // pp,) * pp)
    found = memory_of(cut=cut, shards=Shards(optimizer=dp))
    state = found.weights + found.gradients + found.optimizer
    # theirs cuts the last norm over the pipeline
    assert state == pytest.approx(theirs.compute_weight_and_optimizer_memory(args), rel=1e-5)


# -- what was measured


@pytest.mark.parametrize(
    ("rate", "weights"), [("0.0", "dense"), ("0.5", "compact"), ("0.96", "compact"), ("0.5", "gather")]
)
def test_a_step_on_an_h100_took_what_the_estimate_says(rate: str, weights: str) -> None:
    """12 layers of Llama-2-7B's widths, 4096 tokens: the allocator's peak, benchmarks/results."""
    name = "step-h100-llama7b-12-layers-8-micro-batches" + ("-gather" if weights == "gather" else "")
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    (measured,) = [row["peak_gib"] for row in rows if row["rate"] == float(rate) and row["weights"] == weights]
    shape = replace(LLAMA_7B, num_layers=12)
    kept = kept_shape(shape, Fraction(rate), selection_groups=1, channel_multiple=128, gqa="group")
    found = memory_of(shape, kept, cut=replace(ALONE, layers=(12,)), packs=weights == "compact")
    assert found.total / GIB == pytest.approx(measured, rel=0.02)


def saved_bytes(_: int, num_layers: int, micro_batch_size: int, fused: bool, changes: dict[str, Any]) -> int:
    rope.install()
    layout()
    (chunk,) = tiny_chunks(**{"num_layers": num_layers, "bias_activation_fusion": fused} | changes)
    with Saved([chunk]) as saved:
        losses(chunk, *batch(1, micro_batch_size))
    return saved.peak


@pytest.mark.parametrize(("micro_batch_size", "fused"), [(1, True), (3, True), (1, False)])
def test_autograd_keeps_of_a_layer_what_is_counted(micro_batch_size: int, fused: bool) -> None:
    """To the byte, by two models in fp32 that differ by two layers."""
    deep, flat = (run_ranks(saved_bytes, 1, layers, micro_batch_size, fused, {})[0] for layers in (4, 2))
    work = replace(PLAIN, micro_batch_size=micro_batch_size, fused_swiglu=fused)
    parts = layer_bytes(TINY, whole(TINY), cut=ALONE, size=Bytes(weight=4, gradient=4, optimizer=8), work=work)
    normalised = parts["layernorm"]  # kept by torch's RMSNorm on a CPU; a GPU's kernel works it out again
    assert deep - flat == 2 * (sum(parts.values()) + normalised)


@pytest.mark.parametrize("groups", [8, 4])
@pytest.mark.parametrize("fused", [False, True])
def test_autograd_keeps_of_a_layer_of_gpt2_what_is_counted(fused: bool, groups: int) -> None:
    changes = GPT2 | GPT2_OUTSIDE | {"num_query_groups": groups} | ({"activation_func": F.gelu} if fused else {})
    deep, flat = (run_ranks(saved_bytes, 1, layers, 2, fused, changes)[0] for layers in (4, 2))
    shape = replace(TINY, gated=False, num_query_groups=groups)
    work = replace(PLAIN, micro_batch_size=2, beside=GPT2_HAS)
    parts = layer_bytes(shape, whole(shape), cut=ALONE, size=Bytes(weight=4, gradient=4, optimizer=8), work=work)
    assert deep - flat == 2 * sum(parts.values())


def rank_parameters(_: int, tp: int, pp: int, changes: dict[str, Any]) -> tuple[int, int]:
    layout(tp=tp, pp=pp)
    chunks = tiny_chunks(**changes)
    number = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    return parallel_state.get_pipeline_model_parallel_rank(), number


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_parameters_are_those_of_the_model_that_is_built(tp: int, pp: int) -> None:
    cut = Cut(tensor=tp, context=1, layers=(4 // pp,) * pp)
    for stage, number in run_ranks(rank_parameters, tp * pp, tp, pp, {}):
        assert number == parameters(TINY, stage, cut=cut, tied=False)


@pytest.mark.parametrize(
    ("changes", "beside"),
    [
        (GPT2 | GPT2_OUTSIDE, GPT2_HAS),
        ({"add_qkv_bias": True}, Beside(qkv_biases=True)),
        ({"add_bias_linear": True}, Beside(linear_biases=True)),
    ],
    ids=["gpt2", "qwen2", "biases"],
)
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_biases_and_positions_are_those_of_the_model_that_is_built(
    tp: int, pp: int, changes: dict[str, Any], beside: Beside
) -> None:
    cut = Cut(tensor=tp, context=1, layers=(4 // pp,) * pp)
    gated = changes.get("gated_linear_unit", True)
    shape = replace(TINY, gated=gated, num_query_groups=changes.get("num_query_groups", 4))
    tied = changes.get("share_embeddings_and_output_weights", False)
    for stage, number in run_ranks(rank_parameters, tp * pp, tp, pp, changes):
        assert number == parameters(shape, stage, cut=cut, tied=tied, beside=beside)


def test_gpt2_small_has_its_published_number_of_parameters() -> None:
    shape = ModelShape(
        num_layers=12, hidden_size=768, num_attention_heads=12, num_query_groups=12, kv_channels=64,
        ffn_hidden_size=3072, gated=False, padded_vocab_size=50257, seq_length=1024,
    )  # fmt: skip
    has = replace(GPT2_HAS, positions=1024)
    assert parameters(shape, 0, cut=replace(ALONE, layers=(12,)), tied=True, beside=has) == 124_439_808


# -- what follows from settings


@pytest.mark.parametrize(
    ("ranks", "virtual", "micro_batches", "expected"),
    [(1, 1, 8, [1]), (4, 1, 8, [4, 3, 2, 1]), (4, 1, 2, [2, 2, 2, 1]), (2, 2, 8, [5, 3]), (4, 2, 2, [4, 4, 4, 4])],
)
def test_forwards_under_way_are_those_of_the_schedule(
    ranks: int, virtual: int, micro_batches: int, expected: list[int]
) -> None:
    cut = Cut(tensor=1, context=1, layers=(4,) * ranks, virtual=virtual)
    assert [under_way(stage, cut=cut, num_micro_batches=micro_batches) for stage in range(ranks)] == expected


def most_under_way(rank: int, virtual_pp: int | None) -> int:
    """Of a step of a real pipeline: forwards of a chunk's first MLP whose backward is still to come, at most."""
    model = {"overlap_p2p_comm": True, "batch_p2p_comm": False} if virtual_pp else {}
    engine, there = make_engine(pp=2, virtual_pp=virtual_pp, build=tiny_chunks, model=model)
    now, most = 0, 0

    def forward(*_: Any) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)

    def backward(*_: Any) -> None:
        nonlocal now
        now -= 1

    for chunk in engine.chunks:
        first = bare(chunk).decoder.layers[0].mlp
        first.register_forward_hook(forward)
        first.register_full_backward_hook(backward)
    train(engine, there, steps=range(1))
    assert now == 0
    return most


@pytest.mark.parametrize("virtual_pp", [None, 2])
def test_a_real_pipeline_has_as_many_forwards_under_way(virtual_pp: int | None) -> None:
    cut = Cut(tensor=1, context=1, layers=(2, 2), virtual=virtual_pp or 1)
    expected = [under_way(stage, cut=cut, num_micro_batches=MICRO_BATCHES) for stage in (0, 1)]
    assert run_ranks(most_under_way, 2, virtual_pp) == expected


def test_the_first_pipeline_rank_holds_the_activations_of_all_layers() -> None:
    """As many micro-batches as ranks, each of a part of the layers."""
    one, four = memory_of(), memory_of(cut=replace(ALONE, layers=(8,) * 4))
    assert four.stage == 0
    assert four.activations == one.activations


def test_sequence_parallelism_cuts_what_tensor_parallelism_leaves_whole() -> None:
    whole_bytes = layer_bytes(LLAMA_7B, whole(LLAMA_7B), cut=ALONE, size=MIXED, work=PLAIN)
    cut = Cut(tensor=4, context=1, layers=(32,))
    tp = layer_bytes(LLAMA_7B, whole(LLAMA_7B), cut=cut, size=MIXED, work=PLAIN)
    sp = layer_bytes(LLAMA_7B, whole(LLAMA_7B), cut=replace(cut, sequence_parallel=True), size=MIXED, work=PLAIN)
    assert tp["inputs"] == whole_bytes["inputs"]
    assert {part: 4 * number for part, number in sp.items()} == whole_bytes


def test_context_parallelism_cuts_everything() -> None:
    parts = [
        layer_bytes(LLAMA_7B, whole(LLAMA_7B), cut=replace(ALONE, context=cp), size=MIXED, work=PLAIN) for cp in (1, 2)
    ]
    assert {part: 2 * number for part, number in parts[1].items()} == parts[0]


def recomputing(*parts: str, layers: int | None = None, unit: int = 1) -> int:
    recompute = Recompute(parts=parts, layers=layers)
    return memory_of(work=replace(PLAIN, recompute=recompute, recompute_unit=unit)).activations


def test_what_is_recomputed_is_not_kept() -> None:
    parts = layer_bytes(LLAMA_7B, whole(LLAMA_7B), cut=ALONE, size=MIXED, work=PLAIN)
    layer, residual = sum(parts.values()), parts["inputs"] // 2
    assert recomputing() == 32 * layer
    assert recomputing("mlp", "core_attn") == 32 * (layer - parts["mlp"] - parts["core_attn"])
    assert recomputing("full") == 32 * residual
    assert recomputing("full", unit=4) == 8 * residual
    assert recomputing("full", layers=8) == 8 * residual + 24 * layer


def test_a_pack_stays_when_the_ladder_has_become_dense() -> None:
    half, all_ = KeptShape(heads=16, groups=16, channels=5504), whole(LLAMA_7B)
    dense, sparse = memory_of(), memory_of(LLAMA_7B, half, all_, packs=True)
    assert sparse.activations == dense.activations
    assert sparse.packed == 32 * (4 * 2048 * 4096 + 3 * 4096 * 5504) * 2
    assert memory_of(LLAMA_7B, half, all_, packs=False).total < sparse.total  # what is cut anew is gone by then
    assert memory_of(LLAMA_7B, half, packs=True).activations < dense.activations


def test_the_loss_counts_on_the_last_pipeline_rank_alone() -> None:
    loss = loss_bytes(LLAMA_7B, cut=ALONE, size=MIXED, work=PLAIN)
    assert loss == 4096 * (32000 * (2 + 2 + 4) + 2 * 4096 * 2)
    assert memory_of().transient == loss
    last = memory_of(replace(LLAMA_7B, padded_vocab_size=10**7), cut=replace(ALONE, layers=(16, 16)))
    assert (last.stage, last.transient > loss) == (1, True)


def test_a_tied_head_is_counted_once_on_one_stage() -> None:
    rows = 32000 * 4096
    sizes = [parameters(LLAMA_7B, 0, cut=ALONE, tied=tied) for tied in (False, True)]
    assert sizes[0] - sizes[1] == rows
    two = replace(ALONE, layers=(16, 16))
    assert parameters(LLAMA_7B, 1, cut=two, tied=True) == parameters(LLAMA_7B, 1, cut=two, tied=False)


def test_the_rows_add_up() -> None:
    found = memory_of()
    *parts, (name, together) = found.rows()
    assert name == "together"
    assert sum(number for _, number in parts) == together == found.total
