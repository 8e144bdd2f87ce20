"""From settings to every owner's configuration."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sat.config import ParallelConfig
from megatron_sat.data.blend import DataConfig
from megatron_sat.engines.optim import LearningRateConfig, make_optimizer_config
from megatron_sat.layers.activation import tanh_gelu
from megatron_sat.sparsity.schedule import ScheduleConfig
from megatron_sat.sparsity.selector import SelectionConfig
from megatron_sat.training.settings import TrainingConfig
from tests.helpers.command_line import LADDER, refusal, run


def test_the_three_classes_of_megatron_take_their_parts():
    config = run(
        "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --adam-beta2 0.95"
    )
    model, ddp = TransformerConfig(**config.transformer), DistributedDataParallelConfig(**config.ddp)
    optimizer = make_optimizer_config(config.learning_rate, model=model, ddp=ddp, **config.optimizer)
    assert (model.hidden_size, model.ffn_hidden_size, model.num_query_groups, model.kv_channels) == (
        64,
        176,
        4,
        8,
    )
    assert (model.params_dtype, model.pipeline_dtype) == (torch.bfloat16, torch.bfloat16)
    assert (model.normalization, model.add_bias_linear, model.transformer_impl) == ("RMSNorm", False, "local")
    assert (ddp.use_distributed_optimizer, ddp.overlap_param_gather, ddp.grad_reduce_in_fp32) == (
        True,
        True,
        True,
    )
    assert (optimizer.lr, optimizer.adam_beta2, optimizer.clip_grad, optimizer.bf16) == (
        3e-4,
        0.95,
        1.0,
        True,
    )


@pytest.mark.parametrize(
    ("more", "without", "function", "gated"),
    [
        ("", "", F.silu, True),
        ("--quick-geglu", "--swiglu", quick_gelu, True),
        ("--squared-relu", "--swiglu", squared_relu, False),
        ("", "--swiglu", F.gelu, False),
        ("--openai-gelu", "--swiglu", tanh_gelu, False),
    ],
)
def test_the_activation_follows_from_its_flag(more, without, function, gated):
    model = TransformerConfig(**run(more, without=without).transformer)
    assert (model.activation_func, model.gated_linear_unit) == (function, gated)


def test_without_grouped_queries_every_head_has_its_own():
    transformer = run(without="--group-query-attention --num-query-groups").transformer
    assert TransformerConfig(**transformer).num_query_groups == 8


def test_biases_of_qkv_come_with_all_biases_and_alone():
    with_all = run(without="--disable-bias-linear").transformer
    alone = run("--add-qkv-bias").transformer
    assert (with_all["add_bias_linear"], with_all["add_qkv_bias"]) == (True, True)
    assert (alone["add_bias_linear"], alone["add_qkv_bias"]) == (False, True)


def test_xavier_initialisation_is_handed_over():
    transformer = run("--init-method-xavier-uniform").transformer
    assert (
        transformer["init_method"] is transformer["output_layer_init_method"] is torch.nn.init.xavier_uniform_
    )


def test_the_ranks_are_laid_out():
    config = run(
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel "
        "--distributed-timeout-minutes 3",
        ranks=8,
    )
    assert config.parallel == ParallelConfig(
        world_size=8,
        tensor=2,
        pipeline=2,
        context=1,
        data=2,
        virtual_pipeline=None,
        sequence_parallel=True,
        backend="gloo",
        timeout_minutes=3,
    )


def test_a_time_out_below_a_minute_is_refused(capsys):
    assert "--distributed-timeout-minutes must be at least 1, got 0" in refusal(
        capsys, "--distributed-timeout-minutes 0"
    )


def test_the_run_is_counted_in_updates_and_micro_batches():
    config = run("--eval-interval 50 --eval-iters 4 --exit-interval 70 --exit-duration-in-mins 90", ranks=2)
    assert config.training == TrainingConfig(
        train_iters=100,
        micro_batch_size=2,
        global_batch_size=8,
        num_micro_batches=2,
        eval_interval=50,
        eval_iters=4,
        exit_interval=70,
        exit_duration_in_mins=90,
        seed=1234,
    )


def test_the_learning_rate_has_its_schedule():
    assert run().learning_rate == LearningRateConfig(
        lr=3e-4,
        train_iters=100,
        global_batch_size=8,
        min_lr=3e-5,
        lr_decay_style="cosine",
        lr_warmup_iters=5,
        weight_decay=0.1,
    )


def test_a_run_said_in_samples_is_the_same_in_updates():
    in_samples = run(
        "--train-samples 807 --lr-warmup-samples 40 --lr-decay-samples 760",
        without="--train-iters --lr-warmup-iters",
    )
    in_updates = run("--lr-decay-iters 95")
    assert in_samples.learning_rate == in_updates.learning_rate
    assert in_samples.training == in_updates.training


def test_the_last_leg_of_wsd_may_be_said_in_samples():
    wsd = "--lr-decay-style WSD --lr-wsd-decay-style minus_sqrt"
    in_samples = run(
        f"{wsd} --train-samples 800 --lr-wsd-decay-samples 160 --lr-warmup-samples 40",
        without="--train-iters --lr-warmup-iters",
    )
    assert in_samples.learning_rate == run(f"{wsd} --lr-wsd-decay-iters 20").learning_rate


def test_the_data_come_with_length_seed_and_replay():
    replay = "--replay-data-path data/old --replay-share 0.2"
    assert run(f"{replay} --seed 5 --eod-mask-loss --num-workers 0 --no-mmap-bin-files").data == DataConfig(
        seq_length=64,
        seed=5,
        data_path=("0.7", "data/en", "0.3", "data/zh"),
        split="98,1,1",
        replay_data_path=("data/old",),
        replay_share=0.2,
        eod_mask_loss=True,
        num_workers=0,
        mmap_bin_files=False,
    )


def test_the_schedule_and_the_selection_are_the_methods():
    config = run(
        f"{LADDER} --sat-importance wanda --sat-swiglu-score gate+up --sat-temperature 0.1 --sat-seed 9 "
        "--sat-selection-groups 2 --sat-selection-interval 4 --sat-channel-multiple 8 --sat-gqa head "
        "--sat-statistics lagged --sat-rescale inverse-keep --sat-omitted-neurons frozen"
    )
    assert config.schedule == ScheduleConfig(
        kind="ladder", omission_rate=Fraction(1, 2), start=60, rungs=5, train_iters=100
    )
    assert config.selection == SelectionConfig(
        importance="wanda",
        swiglu_score="gate+up",
        temperature=0.1,
        selection_groups=2,
        selection_interval=4,
        channel_multiple=8,
        gqa="head",
        statistics="lagged",
        rescale="inverse-keep",
        seed=9,
    )
    assert config.omitted_neurons == "frozen"


@pytest.mark.parametrize("rate", ["0.3", "1/3", "0.96"])
def test_a_rate_stays_exact_on_its_way(rate):
    assert run(f"{LADDER} --sat-omission-rate {rate}").schedule.omission_rate == Fraction(rate)


def test_rate_0_is_a_schedule_like_any_other():
    config = run("--sat-schedule constant --sat-omission-rate 0 --sat-importance magnitude")
    assert (config.schedule.omission_rate, config.selection.importance) == (0, "magnitude")


def test_checkpoints_and_logs_go_where_they_are_told():
    config = run(
        "--save runs/a --save-interval 10 --load runs/b --finetune --no-save-rng --no-load-optim "
        "--log-interval 5 --tensorboard-dir runs/tb --log-jsonl runs/log.jsonl"
    )
    saved = config.checkpoint
    assert (saved.save, saved.save_interval, saved.load, saved.finetune) == ("runs/a", 10, "runs/b", True)
    assert (saved.save_optim, saved.save_rng, saved.load_optim, saved.load_rng) == (True, False, False, True)
    said = config.logging
    assert (said.log_interval, said.tensorboard_dir, said.log_jsonl) == (5, "runs/tb", "runs/log.jsonl")


def test_remarks_do_not_make_another_run():
    config = run()
    assert replace(config, remarks=("something",)) == config
