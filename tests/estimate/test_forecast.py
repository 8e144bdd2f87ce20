"""A run's prediction: its rungs added up, what it is compared with, and what the time model does not know."""

import json
from fractions import Fraction
from typing import Any

import pytest

from megatron_sat.build import plan_of
from megatron_sat.config import Config
from megatron_sat.estimate.forecast import Forecast, communication, forecast, layer_of, spread_of
from megatron_sat.estimate.links import Link, Links
from megatron_sat.estimate.step import Batch, Spread, predict_step
from megatron_sat.flags.defaults import Machine
from megatron_sat.model.flops import kept_shape, whole
from megatron_sat.rehearsal.cluster import Cluster
from megatron_sat.rehearsal.rehearse import beside_of, memory_of, model_shape, vocabulary_rows
from tests.estimate.tables import PER_PARAMETER, even
from tests.helpers.command_line import LADDER, run

CUDA = Machine(cuda=True)
NVLINK, NETWORK = Link(source="inside", bytes_per_second=1e11), Link(source="across", bytes_per_second=5e9)
LINKS = Links(inside=NVLINK, across=None)


def shape_of(config: Config) -> Any:
    return model_shape(config, rows=vocabulary_rows(config)[0])


def predicted(
    more: str = LADDER, *, ranks: int = 1, per_host: int = 8, links: Links = LINKS, **hardware: Any
) -> Forecast:
    config = run(f"{more} --bf16", ranks=ranks, machine=CUDA)
    cluster = Cluster(gpu="h100", world_size=ranks, per_host=per_host)
    return forecast(config, shape=shape_of(config), hardware=even(**hardware), cluster=cluster, links=links)


def test_a_run_is_its_rungs_and_is_compared_with_as_many_dense_steps():
    found = predicted()
    config = run(f"{LADDER} --bf16", machine=CUDA)
    shape, batch = shape_of(config), Batch(micro_batch_size=2, micro_batches=4)
    seconds = 0.0
    for rung in found.plan.rungs:
        kept = kept_shape(shape, rung.rung.rate, selection_groups=1, channel_multiple=128, gqa="group")
        step = predict_step(shape, kept, hardware=even(), batch=batch, spread=Spread(layers=(4,)))
        seconds += rung.rung.steps * step.seconds
    dense = predict_step(shape, whole(shape), hardware=even(), batch=batch, spread=Spread(layers=(4,)))
    assert found.seconds == pytest.approx(seconds)
    assert found.dense_seconds == pytest.approx(100 * dense.seconds)
    assert found.saved == pytest.approx(1 - seconds / (100 * dense.seconds))
    assert found.memory == memory_of(config, shape=shape, plan=plan_of(config, shape=shape, epochs={}))


def test_a_dense_run_saves_nothing():
    found = predicted("")
    assert (found.saved, found.seconds) == (0.0, found.dense_seconds)


def test_the_table_has_a_row_a_rung_and_one_of_the_dense_step():
    found = predicted()
    rows, columns = found.rows(), found.columns()
    assert [row[0] for row in rows] == [f"{r.rung.first}-{r.rung.last}" for r in found.plan.rungs] + ["dense"]
    assert all(len(row) == len(columns) for row in rows)
    assert [row[1] for row in rows] == ["0.5", "0.4", "0.3", "0.2", "0.1", "0", "0"]
    assert [row[2] for row in rows] == [round(rung.step.seconds, 4) for rung in found.rungs] + [
        round(found.dense.seconds, 4)
    ]
    assert (rows[-1][3], rows[-2][3]) == (1.0, 1.0)


def test_a_rung_a_step_makes_a_row_a_stretch():
    found = predicted("--sat-schedule linear --sat-omission-rate 0.5 --sat-schedule-start 20")
    rows = found.rows()
    assert len(rows) <= 13 < len(found.rungs)
    assert (rows[0][0], rows[0][1], rows[-2][0]) == ("1-20", "0.5", "93-100")
    last = [rung.seconds for rung in found.rungs if rung.planned.rung.first >= 93]
    assert rows[-2][2] == round(sum(last) / 8, 4)


def test_the_parts_of_a_dense_step_stand_beside_those_of_the_first_rung():
    found = predicted()
    parts = {name: both for name, *both in found.parts()}
    assert parts.keys() == {"layers", "loss", "choosing", "update"}
    assert parts["choosing"][0] == 0.0 < parts["choosing"][1]
    assert parts["layers"][1] < parts["layers"][0]
    assert parts["layers"][0] == round(1e3 * found.dense.layers, 2)


def test_layers_that_wait_for_launches_are_pointed_to_graphs():
    said = "layers or their choices wait for launches: with --layer-graphs the run would take"
    assert any(said in remark for remark in predicted("", launch_seconds=1.0).remarks)
    assert not any(said in remark for remark in predicted("", launch_seconds=0.0).remarks)
    assert any(said in remark for remark in predicted(launch_seconds=0.0).remarks), "choices are launched too"
    assert not any(said in remark for remark in predicted(f"{LADDER} --layer-graphs", launch_seconds=1.0).remarks)


def test_the_sentences_say_what_is_saved_and_from_what():
    said = "\n".join(predicted(launch_seconds=1e-3).lines())
    assert "100 settled steps take" in said
    assert "% saved" in said
    assert "operations alone would save" in said
    assert "GiB on the GPU that needs most" in said
    assert "from what NVIDIA Even 80GB was measured to do: none, commit none" in said


def test_machines_get_plain_numbers():
    found = predicted()
    stored = json.loads(json.dumps(found.as_dict()))
    assert stored["seconds"] == found.seconds
    assert [Fraction(rung["rate"]) for rung in stored["rungs"]] == [r.rung.rate for r in found.plan.rungs]
    assert stored["memory_bytes"]["together"] == found.memory.total
    assert stored["dense_step"]["layers"] == found.dense.layers


def test_the_layout_of_the_run_is_that_of_the_prediction():
    more = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"
    more += " --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    config = run(f"{LADDER} {more} --bf16", ranks=8, machine=CUDA)
    spread = spread_of(config, cluster=Cluster(gpu="h100", world_size=8), links=LINKS)
    assert spread == Spread(
        layers=(2, 2),
        tensor=2,
        sequence_parallel=True,
        tensor_link=NVLINK,
        data=2,
        data_link=NVLINK,
        shards_update=True,
        overlaps_reduction=True,
        overlaps_gathering=True,
    )


def test_sparse_reduction_is_that_of_the_run():
    config = run(f"{LADDER} --sat-sparse-reduce --bf16", ranks=2, machine=CUDA)
    assert spread_of(config, cluster=Cluster(gpu="h100", world_size=2), links=LINKS).sparse_reduction


def test_replicas_on_several_hosts_use_the_network_and_someone_must_say_how_fast_it_is():
    config = run(f"{LADDER} --bf16", ranks=4, machine=CUDA)
    cluster = Cluster(gpu="h100", world_size=4, per_host=2)
    with pytest.raises(ValueError, match=r"--network must say how fast 2 hosts are joined .* 4 replicas of 1 GPUs"):
        spread_of(config, cluster=cluster, links=LINKS)
    assert spread_of(config, cluster=cluster, links=Links(inside=NVLINK, across=NETWORK)).data_link == NETWORK


def test_context_parallelism_is_not_predicted():
    with pytest.raises(ValueError, match="--context-parallel-size must be 1 for a prediction, got 2: .* without"):
        predicted(f"{LADDER} --context-parallel-size 2", ranks=2)
    with pytest.raises(ValueError, match="--sat-omit must be both for a prediction, got backward: .* without it"):
        predicted(f"{LADDER} --sat-omit backward")


def test_layers_that_are_left_out_are_not_predicted():
    config = run("--baseline est --est-layers-until 20 --est-until 60")
    with pytest.raises(ValueError, match="--baseline must not be est for a prediction: layers .* predict another run"):
        spread_of(config, cluster=Cluster(gpu="h100", world_size=1), links=LINKS)


def test_deepspeed_is_not_predicted():
    with pytest.raises(ValueError, match="--engine must be megatron for a prediction, got deepspeed; predict"):
        predicted(f"{LADDER} --engine deepspeed", ranks=2)


@pytest.mark.parametrize(
    ("more", "remark"),
    [
        (f"{LADDER} --sat-importance wanda", "choosing was measured for maxip, not for wanda"),
        (
            f"{LADDER} --sat-importance contribution --sat-selection-interval 10",
            "choosing was measured for maxip, not for contribution, which chooses once in 10 steps here",
        ),
        (f"{LADDER} --sat-weights gather", "layers are predicted as packed once a step; --sat-weights gather"),
        (LADDER, "away from all that were measured (4 times in one size is 1.4): a guess; measure it with"),
    ],
)
def test_what_the_prediction_does_not_know_is_said(more, remark):
    assert any(remark in said for said in predicted(more).remarks)


GPT2 = (
    "--no-swiglu --openai-gelu --normalization LayerNorm --add-bias-linear --position-embedding-type learned_absolute "
    "--hidden-dropout 0.1"
)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (GPT2, "biases, LayerNorm, positions that are not rotations, dropout"),
        ("--add-qkv-bias", "biases"),
        ("--attention-dropout 0.1", "dropout"),
    ],
)
def test_what_no_measured_layer_had_is_named(more, named):
    said = f"layers were measured as Llama has them: what {named} cost beside that is left out"
    assert said in predicted(f"{LADDER} {more}").remarks
    assert not any("as Llama has them" in remark for remark in predicted().remarks)


def test_layers_that_cannot_be_replayed_are_not_pointed_to_graphs():
    for more in ("--add-bias-linear", "--hidden-dropout 0.1"):
        assert not any("--layer-graphs" in remark for remark in predicted(more, launch_seconds=1.0).remarks)


def test_biases_and_positions_are_updated_too():
    more = "--add-bias-linear --position-embedding-type learned_absolute"
    config = run(more, machine=CUDA)
    extra = 4 * (8 * 8 + 2 * 4 * 8 + 2 * 176 + 2 * 64) + 64 * 64  # of each layer; and a row a position
    updates = [predicted(each).dense.update for each in ("", more)]
    assert beside_of(config).positions == 64
    assert updates[1] - updates[0] == pytest.approx(extra * PER_PARAMETER)


def test_a_default_run_on_one_gpu_needs_no_word_on_metrics_or_communication():
    assert not any("choosing" in said or "communicate" in said for said in predicted().remarks)
    assert "replicas communicate by inside" in predicted(ranks=2).remarks


def test_each_way_in_which_ranks_talk_says_where_its_times_come_from():
    assert communication(Spread(layers=(4,))) == []
    assert communication(Spread(layers=(2, 2), tensor=2, tensor_link=NVLINK, data=2, data_link=NETWORK)) == [
        "tensor parallelism communicates by inside",
        "replicas communicate by across",
        "what pipeline ranks pass on is not counted",
    ]


def test_a_layer_alone_is_that_of_a_step_without_launches():
    config = run(f"{LADDER} --bf16", machine=CUDA)
    shape = shape_of(config)
    one = layer_of(config, shape=shape, rate=Fraction(1, 2), hardware=even(launch_seconds=9.0))
    kept = kept_shape(shape, Fraction(1, 2), selection_groups=1, channel_multiple=128, gqa="group")
    batch = Batch(micro_batch_size=2, micro_batches=1)
    assert one == pytest.approx(
        predict_step(shape, kept, hardware=even(), batch=batch, spread=Spread(layers=(4,))).layers / 4
    )
