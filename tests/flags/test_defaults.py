"""What is decided by the machine, the layout and other settings."""

import pytest

from megatron_sat.cli import as_yaml, parse
from megatron_sat.config import compose
from megatron_sat.flags.defaults import Machine, look_at_machine, written_rate
from megatron_sat.layers.activation import tanh_gelu
from tests.helpers.command_line import LADDER, run

GPU = Machine(cuda=True)
FUSIONS = ("bias_swiglu_fusion", "bias_dropout_fusion")


def test_without_a_gpu_no_library_counts():
    assert look_at_machine(cuda=False) == Machine(
        cuda=False, emerging_optimizers=look_at_machine(cuda=False).emerging_optimizers
    )


def test_without_a_gpu_kernels_are_plain_and_ranks_speak_gloo():
    settings = run(LADDER).settings
    assert [settings[key] for key in FUSIONS] == [False, False]
    assert (settings["distributed_backend"], settings["use_cpu_initialization"]) == ("gloo", True)
    assert settings["sat_channel_multiple"] == 1


def test_with_a_gpu_kernels_are_fused_and_ranks_speak_nccl():
    settings = run(f"{LADDER} --ffn-hidden-size 512", machine=GPU).settings
    assert [settings[key] for key in FUSIONS] == [True, True]
    assert (settings["distributed_backend"], settings["use_cpu_initialization"]) == ("nccl", False)
    assert settings["sat_channel_multiple"] == 128


def test_a_fusion_is_off_where_it_is_switched_off():
    settings = run("--no-bias-swiglu-fusion --no-gradient-accumulation-fusion", machine=GPU).settings
    assert not settings["bias_swiglu_fusion"]
    assert not settings["gradient_accumulation_fusion"]


@pytest.mark.parametrize(
    ("more", "without", "tanh", "fused_on_a_gpu"),
    [
        ("", "--disable-bias-linear", True, True),
        ("--openai-gelu", "--disable-bias-linear", True, True),
        ("--openai-gelu", "", True, False),
        ("--no-bias-gelu-fusion", "--disable-bias-linear", False, False),
        ("--no-openai-gelu", "--disable-bias-linear", False, False),
        ("--openai-gelu --no-bias-gelu-fusion", "--disable-bias-linear", True, False),
        ("", "", False, False),
    ],
)
def test_the_form_of_gelu_is_megatron_lms_and_the_same_on_every_machine(more, without, tanh, fused_on_a_gpu):
    for machine in (GPU, Machine(cuda=False)):
        config = run(more, without=f"--swiglu {without}", machine=machine)
        fused = config.transformer["bias_activation_fusion"]
        assert config.settings["openai_gelu"] is tanh
        assert fused is (fused_on_a_gpu and machine.cuda)
        assert config.transformer.get("activation_func") is (tanh_gelu if tanh and not fused else None)


def test_a_printed_configuration_keeps_its_gelu_on_another_machine():
    first = run(without="--swiglu --disable-bias-linear")
    again = compose(first.settings, machine=GPU, world_size=1)
    assert (first.settings["openai_gelu"], again.settings["openai_gelu"]) == (True, True)


@pytest.mark.parametrize("machine", [GPU, Machine(cuda=False)])
def test_gradients_are_fused_and_weights_packed_everywhere(machine):
    config = run(LADDER, machine=machine)
    assert config.settings["gradient_accumulation_fusion"] and config.weights == "compact"


def test_without_fused_gradients_weights_are_gathered():
    assert run(f"{LADDER} --no-gradient-accumulation-fusion").weights == "gather"


def test_channels_are_not_rounded_to_more_than_a_group_has():
    config = run(f"{LADDER} --tensor-model-parallel-size 2", ranks=2, machine=GPU)
    assert config.selection.channel_multiple == 1


@pytest.mark.parametrize(
    ("more", "ranks", "chunks"),
    [
        ("", 2, None),
        ("--num-virtual-stages-per-pipeline-rank 2", 2, 2),
        ("--num-virtual-stages-per-pipeline-rank 1", 2, None),
        ("--num-layers-per-virtual-pipeline-stage 1", 2, 2),
        ("--pipeline-model-parallel-layout Et|t|t|tL", 2, 2),
        ("--pipeline-model-parallel-layout Ett|ttL", 2, None),
    ],
)
def test_interleaving_is_the_same_whichever_way_it_is_said(more, ranks, chunks):
    config = run(f"--pipeline-model-parallel-size 2 {more}", ranks=ranks)
    assert config.parallel.virtual_pipeline == chunks
    assert config.transformer.get("virtual_pipeline_model_parallel_size") == chunks
    assert config.transformer["overlap_p2p_comm"] is (chunks is not None)
    assert config.transformer["batch_p2p_comm"] is (chunks is None)
    assert config.ddp["align_param_gather"] is (chunks is not None)


def test_sizes_that_are_not_given_are_megatrons():
    settings = run(without="--ffn-hidden-size --global-batch-size", ranks=3).settings
    assert (settings["ffn_hidden_size"], settings["kv_channels"], settings["global_batch_size"]) == (
        128,
        8,
        6,
    )


@pytest.mark.parametrize(
    ("more", "in_fp32"),
    [("", False), ("--bf16", True), ("--bf16 --grad-reduce-in-bf16", False), ("--fp16", False)],
)
def test_gradients_are_reduced_in_fp32_under_bf16_unless_told_otherwise(more, in_fp32):
    assert run(more).ddp["grad_reduce_in_fp32"] is in_fp32


@pytest.mark.parametrize(
    ("more", "checked"),
    [
        ("--clip-grad 0", True),
        ("--clip-grad 0 --fp16", False),
        ("--clip-grad 0 --fp16 --loss-scale 128", True),
        ("--clip-grad 1", False),
        ("--clip-grad 1 --check-for-nan-in-loss-and-grad", True),
    ],
)
def test_megatron_watches_for_nan_where_nothing_computes_the_norm_but_under_dynamic_loss_scaling(more, checked):
    assert run(more, without="--clip-grad").ddp["check_for_nan_in_grad"] is checked


def test_the_selection_takes_its_groups_from_tensor_parallelism_and_its_seed_from_the_run():
    selection = run(f"{LADDER} --tensor-model-parallel-size 2 --seed 7", ranks=2).selection
    assert (selection.selection_groups, selection.seed) == (2, 7)


CONSTANT = "--sat-schedule constant --sat-omission-rate 0.5"


def choosing(more: str = "", *, without: str = "", ranks: int = 1) -> tuple[str, str, int]:
    selection = run(f"{CONSTANT} {more}", without=without, ranks=ranks).selection
    return selection.importance, selection.selection, selection.selection_interval


def test_a_sparse_run_chooses_the_largest_contributions_and_keeps_them_for_a_hundred_steps():
    assert choosing("--train-iters 300") == ("contribution", "top-k", 100)
    assert run(f"{CONSTANT} --train-iters 300").remarks == ()


LAYOUTS = ("--engine deepspeed", "--context-parallel-size 2", "--pipeline-model-parallel-size 2")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_how_a_sparse_run_chooses_stands_beside_every_layout(layout):
    assert choosing(f"--train-iters 300 {layout}", ranks=2) == ("contribution", "top-k", 100)


@pytest.mark.parametrize(
    ("more", "without", "steps"),
    [
        ("--train-iters 30", "", 30),
        ("--train-samples 80", "--train-iters --lr-warmup-iters", 10),
        ("--train-iters 300 --sat-selection-interval 7", "", 7),
    ],
)
def test_a_run_shorter_than_a_choice_is_kept_keeps_one(more, without, steps):
    assert choosing(more, without=without) == ("contribution", "top-k", steps)


def test_replicas_that_choose_for_themselves_do_so_in_every_step():
    assert choosing("--sat-dp-selection local", ranks=2) == ("contribution", "top-k", 1)


def test_neurons_without_scores_are_sampled():
    assert choosing("--sat-importance uniform") == ("uniform", "sampling", 100)


def test_how_neurons_are_chosen_is_written_down_as_it_is(tmp_path):
    file = tmp_path / "config.yaml"
    for more in ("", "--train-iters 30", "--sat-importance uniform", "--sat-importance maxip --sat-selection sampling"):
        config = run(f"{CONSTANT} {more}")
        file.write_text(as_yaml(config.settings))
        assert parse(["--config", str(file)], world_size=1, cuda=False, machine=Machine(cuda=False)) == config


def test_the_log_lies_beside_the_checkpoints():
    assert run("--save runs/a").logging.log_jsonl == "runs/a/metrics.jsonl"


@pytest.mark.parametrize(
    ("given", "written"),
    [("0.50", "0.5"), ("1/2", "0.5"), ("0.96", "0.96"), ("24/25", "0.96"), ("1/3", "1/3"), ("0", "0.0")],
)
def test_a_rate_is_written_in_one_exact_spelling(given, written):
    assert written_rate(given) == written
