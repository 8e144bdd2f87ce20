"""Command line and file: Megatron-LM's scripts work, what is printed is the run, errors are one line."""

import pytest
import yaml

from megatron_sat import cli
from megatron_sat.flags.defaults import Machine
from megatron_sat.flags.table import table
from tests.helpers.command_line import LADDER, llama, refusal, run

SCRIPT = """
--use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
--group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192
--max-position-embeddings 8192
--position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0
--hidden-dropout 0.0 --swiglu --normalization RMSNorm --init-method-std 0.0134 --attention-backend fused
--untie-embeddings-and-output-weights --disable-bias-linear --transformer-impl transformer_engine
--micro-batch-size 1 --global-batch-size 128 --train-samples 1953125000 --lr-decay-samples 1949218748
--lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001 --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5
--lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16
--grad-reduce-in-bf16 --cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc
--empty-unused-memory-level 1 --exit-duration-in-mins 235 --tensor-model-parallel-size 2
--context-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer
--overlap-grad-reduce --overlap-param-gather --expert-model-parallel-size 1 --data-path 1.0 corpus
--tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer --vocab-size 128256 --data-cache-path cache
--tiktoken-pattern v2 --split 99,1,0 --no-create-attention-mask-in-dataloader --no-mmap-bin-files
--num-workers 1 --log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput
--profile --profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist
--distributed-timeout-minutes 60 --save checkpoints --load checkpoints --tensorboard-dir tensorboard
--distributed-backend nccl --timing-log-level 0 --log-timers-to-tensorboard --wandb-project p
--recompute-granularity selective --recompute-modules core_attn mlp --num-virtual-stages-per-pipeline-rank 2
"""
"""What a launch script of Megatron-LM for Llama 3 8B gives, and more that its scripts have in common."""


def test_a_launch_script_of_megatron_lm_works_on_a_gpu():
    config = cli.parse(SCRIPT.split(), world_size=16, cuda=True, machine=Machine(cuda=True))
    assert config.parallel.data == 2
    assert config.training.train_iters == 1953125000 // 128
    assert config.learning_rate.lr_warmup_iters == 3906252 // 128
    assert config.optimizer["decoupled_lr"] == 5.0e-4
    assert config.transformer["recompute_modules"] == ["core_attn", "mlp"]
    assert config.ddp["grad_reduce_in_fp32"] is False
    assert len(config.remarks) == 14


def test_the_same_script_is_refused_by_name_without_a_gpu(capsys):
    with pytest.raises(cli.ParsedExit) as stopped:
        cli.parse(SCRIPT.split(), world_size=16, cuda=False)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "error: --cross-entropy-loss-fusion needs a GPU, this machine has none; leave it out\n"
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--num-layer 4", "--num-layer is unknown; the nearest known is --num-layers, --help lists all"),
        (
            "--sat-ommission-rate=0.5",
            "--sat-ommission-rate is unknown; the nearest known is --sat-omission-rate",
        ),
        ("--num-experts 8", "--num-experts is not supported: experts are not sparse neurons"),
        ("--expert-model-parallel-size 2", "--expert-model-parallel-size is not supported"),
        (
            "--fp8-format hybrid --num-layer 4",
            "--fp8-format is not supported: fp8 and fp4 act inside Transformer",
        ),
        ("stray", "stray stands where a setting's name should; names begin with --"),
        ("--lr", "--lr: expected one argument"),
        ("--lr fast", "--lr must be a number, got 'fast'"),
        ("--swiglu=yes", "--swiglu: ignored explicit argument 'yes'"),
        (
            "--lr-decay-style exp",
            "--lr-decay-style must be one of constant, linear, cosine, inverse-square-root, WSD",
        ),
    ],
)
def test_what_cannot_be_understood_is_one_line(capsys, more, said):
    line = refusal(capsys, f"--seed 5 {more}" if more != "stray" else "--swiglu stray")
    assert line.startswith(f"error: {said}")


def test_a_refused_setting_that_asks_for_nothing_is_let_pass():
    assert run("--expert-model-parallel-size 1 --num-experts=0") == run()


def test_a_setting_given_twice_has_its_last_value():
    assert run("--lr 1e-3 --lr 2e-3").learning_rate.lr == 2e-3


def test_other_spellings_are_the_same_setting():
    spelled = "--override-opt_param-scheduler --use-rotary-position-embeddings --recompute-activations"
    plain = "--override-opt-param-scheduler --position-embedding-type rope --recompute-granularity selective"
    assert run(spelled) == run(plain)


def test_on_many_ranks_one_speaks(capsys):
    with pytest.raises(cli.ParsedExit) as stopped:
        cli.parse(["--num-layer", "4"], world_size=2, cuda=False, speaks=False)
    assert (stopped.value.code, capsys.readouterr()) == (2, ("", ""))
    assert "--num-layers" in stopped.value.said


# -- the file


def write(folder, text):
    path = folder / "run.yaml"
    path.write_text(text)
    return f"--config {path}"


def test_a_file_gives_settings_by_key_or_name_flat_or_under_headlines(tmp_path):
    config = write(
        tmp_path,
        "optimization:\n  lr: 1e-3\n  adam-beta1: 0.8\nmodel:\n  disable_bias_linear: true\n"
        "norm-epsilon: 1e-6\nrecompute-activations: true\nsat_schedule: none\nseed: null\ndata:\n",
    )
    expected = run("--lr 1e-3 --adam-beta1 0.8 --norm-epsilon 1e-6 --recompute-activations")
    assert run(config, without="--lr --disable-bias-linear") == expected


def test_the_command_line_overrides_the_file(tmp_path):
    config = write(tmp_path, "lr: 1.0\nadd_bias_linear: true\nswiglu: false\nsat_schedule: constant\n")
    assert run(f"{config} --sat-schedule none") == run()


def test_of_several_files_a_later_one_overrides_an_earlier_one(tmp_path):
    (tmp_path / "model.yaml").write_text("model:\n  swiglu: false\n  norm_epsilon: 1e-6\nlr: 1.0\n")
    later = write(tmp_path, "swiglu: true\nlr: 1e-3\n").removeprefix("--config ")
    found = run(f"--config {tmp_path}/model.yaml {later}", without="--lr --swiglu")
    assert found == run("--lr 1e-3 --swiglu --norm-epsilon 1e-6")


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("recompute_activations: false", {}),
        ("no-rope-fusion: true", {"apply_rope_fusion": False}),
        ("no_save_optim: false", {"save_optim": True}),
        ("bf16: 'true'", {"bf16": True}),
    ],
)
def test_names_without_a_value_take_true_and_false_in_a_file(tmp_path, key, given):
    settings = run(f"{write(tmp_path, key)} --save x").settings
    assert settings.items() >= given.items()
    assert "recompute_granularity" not in settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 1", "--learning-rat is unknown; the nearest known is"),
        ("num_experts: 2", "--num-experts is not supported"),
        ("lr: 1\nlr: 2", "is not: lr is given twice; mend it"),
        ("<<: {lr: 1}\n<<: {lr: 2}", "is not: << is given twice; mend it"),
        ("norm-epsilon: 1\nlayernorm_epsilon: 2", "layernorm_epsilon is given twice; leave one out"),
        ("modle:\n  lr: 1", "modle is no headline; the headlines are baselines, checkpoint, data, finetuning, gradie"),
        ("lr: [1, 2]", "lr must be a number, got [1, 2]"),
        ("no_rope_fusion: 3", "no_rope_fusion must be true or false, got 3"),
        ("- lr", "--config must hold keys and values"),
        ("a: b: c", "--config must be YAML"),
    ],
)
def test_a_file_that_cannot_be_understood_is_one_line(capsys, tmp_path, text, said):
    assert said in refusal(capsys, write(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {x: 1, y: 1}\nb: {<<: *a, y: 2}",
        "outer: {in: &a {<<: &base {x: 1, y: 0}, y: 1}}\nb: {<<: *a, y: 2}",  # b is built before what it brings in
        "a: [&a {x: 1}, &c {y: 3}]\nb: {y: 2, <<: [*a, *c]}",
    ],
)
def test_what_a_mapping_brings_in_gives_way_to_its_own_keys(text):
    read = yaml.load(text, Loader=cli.Loader)
    assert read == yaml.safe_load(text)
    assert read["b"] == {"x": 1, "y": 2}


def test_a_file_of_settings_may_bring_some_in(tmp_path):
    config = write(tmp_path, "<<: {lr: 1.0, adam_beta1: 0.8}\nlr: 1e-3")
    assert run(config, without="--lr") == run("--lr 1e-3 --adam-beta1 0.8")


def test_a_file_that_is_not_there_is_named(capsys, tmp_path):
    assert f"--config must be a readable text file, {tmp_path}/none.yaml is not" in refusal(
        capsys, f"--config {tmp_path}/none.yaml"
    )


# -- back to text

RUNS = [
    ("", 1),
    (LADDER, 1),
    (f"{LADDER} --sat-selection top-k --sat-importance magnitude --sat-omission-rate 1/3", 2),
    ("--sat-schedule linear --sat-omission-rate 0.96 --sat-schedule-start 10 --sat-dp-selection local", 2),
    ("--bf16 --use-distributed-optimizer --overlap-grad-reduce --save x --save-interval 5 --no-save-rng", 2),
    ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --no-rope-freq 2", 2),
    ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|t|t|tL", 2),
    ("--recompute-activations --use-mcore-models --attention-backend unfused --optimizer sgd", 1),
]


@pytest.mark.parametrize(("more", "ranks"), RUNS)
def test_the_printed_configuration_given_back_is_the_same_run(capsys, tmp_path, more, ranks):
    config = run(more, ranks=ranks)
    with pytest.raises(cli.ParsedExit) as stopped:
        run(f"{more} --print-config", ranks=ranks)
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.err) == (0, "")
    path = tmp_path / "printed.yaml"
    path.write_text(printed.out)
    again = cli.parse(["--config", str(path)], world_size=ranks, cuda=False)
    assert again == config
    assert again.remarks == ()


def test_the_saved_configuration_given_back_is_the_same_run(tmp_path):
    config = run(LADDER)
    cli.save_resolved(config, tmp_path / "run" / "config.yaml")
    assert cli.parse(["--config", str(tmp_path / "run" / "config.yaml")], world_size=1, cuda=False) == config


def test_a_run_said_in_samples_is_printed_in_samples(tmp_path):
    more = "--train-samples 807 --lr-warmup-samples 40"
    config = run(more, without="--train-iters --lr-warmup-iters")
    cli.save_resolved(config, tmp_path / "config.yaml")
    assert "train_iters" not in (tmp_path / "config.yaml").read_text()
    assert cli.parse(["--config", str(tmp_path / "config.yaml")], world_size=1, cuda=False) == config


def test_the_printed_configuration_is_plain_yaml_with_remarks_as_comments(capsys):
    with pytest.raises(cli.ParsedExit):
        run("--print-config --use-mcore-models")
    out = capsys.readouterr().out
    assert out.startswith("# --use-mcore-models does nothing here")
    assert set(yaml.safe_load(out)) <= {flag.section for flag in table().working}


def test_help_lists_every_working_setting(capsys):
    with pytest.raises(cli.ParsedExit) as stopped:
        cli.parse([*llama(), "--help"], world_size=1, cuda=False)
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert [flag.key for flag in table().working if flag.all_names[0] not in out] == []
    assert "--sat-schedule {none,constant,linear,cosine,ladder," in out
    assert "--data-path [STR ...]" in out
