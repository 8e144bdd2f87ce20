"""The settings of the method, and of this program: names that Megatron-LM has not."""

from megatron_sat.flags.baselines import BASELINES
from megatron_sat.flags.finetuning import FINETUNING
from megatron_sat.flags.flag import Flag, option, switch
from megatron_sat.flags.presets import PRESET
from megatron_sat.sparsity.importance import METRICS
from megatron_sat.sparsity.schedule import KINDS
from megatron_sat.sparsity.settings import MODULES, PASSES, SELECTIONS
from megatron_sat.training.guard import POLICIES

METHOD: tuple[Flag, ...] = (
    option(
        "sat_schedule",
        choices=KINDS,
        default="none",
        help="omission rate over the run; none is dense, mst is of --baseline mst-structured",
    ),
    option("sat_omission_rate", "rate", help="r, share of neurons left out in the first step, in [0, 1)"),
    option("sat_schedule_start", "int", help="η, last step at the full rate: ladder, linear, cosine"),
    option("sat_rungs", "int", help="L, stages of the descent: ladder"),
    option("sat_importance", choices=tuple(METRICS), default="contribution", help="how a neuron is scored"),
    option(
        "sat_swiglu_score",
        choices=("gate", "up", "gate+up"),
        default="gate",
        help="what scores a gated channel",
    ),
    option(
        "sat_selection",
        choices=SELECTIONS,
        default="top-k",
        help="from scores to neurons; sampling of equal ones; mixed-growing is of --baseline mst-structured",
    ),
    option("sat_temperature", "float", default=0.05, help="τ of the sampling, above 0"),
    option("sat_selection_groups", "int", help="G, quotas a layer; as many as TP ranks unless given"),
    option(
        "sat_selection_interval",
        "int",
        default=100,
        help="K, steps that a choice is kept; of a shorter run all, of replicas that choose alone 1",
    ),
    option(
        "sat_channel_multiple",
        "int",
        help="M, kept channels of a group are a multiple: 128 with CUDA, else 1",
    ),
    option(
        "sat_gqa",
        choices=("group", "head"),
        default="group",
        help="whole query groups leave, or heads in each",
    ),
    option(
        "sat_statistics",
        choices=("fresh", "lagged"),
        default="fresh",
        help="of this step, or of the one before",
    ),
    option(
        "sat_dp_selection",
        choices=("shared", "local"),
        default="shared",
        help="replicas choose alike, or alone",
    ),
    option("sat_modules", choices=MODULES, default="all", help="what omits neurons"),
    option(
        "sat_omit",
        choices=PASSES,
        default="both",
        help="what leaves neurons out: both passes, backward alone, weight gradients alone",
    ),
    option("sat_whole_ends", "int", default=0, help="layers at each end of the model that omit none"),
    option(
        "sat_rescale", choices=("none", "inverse-keep"), default="none", help="1/(share kept) on what is kept"
    ),
    option("sat_weights", choices=("compact", "gather"), help="packed once a step, or cut every micro-batch"),
    option(
        "sat_omitted_neurons",
        choices=("optimizer", "frozen"),
        default="optimizer",
        help="momentum and decay move them, or nothing does",
    ),
    option("sat_seed", "int", help="of the sampling; --seed unless given"),
)

DATA: tuple[Flag, ...] = (
    option("replay_data_path", many="*", help="prefixes of text not to be forgotten, each after its weight"),
    option("replay_share", "float", default=0.0, help="share of training samples drawn from it, in [0, 1)"),
    option("index_timeout_minutes", "float", default=60.0, help="how long ranks wait for the data's indices"),
)

CHECKPOINT: tuple[Flag, ...] = (
    option("save_keep_last", "int", help="checkpoints to leave in --save; without it all"),
    switch(
        "allow_first_loss_apart",
        default=False,
        help="train an imported model although its first loss is not Hugging Face's",
    ),
)

LOGGING: tuple[Flag, ...] = (
    option("log_jsonl", help="file with one JSON object a line; metrics.jsonl in --save unless given"),
)

TRAINING: tuple[Flag, ...] = (
    option("engine", choices=("megatron", "deepspeed"), default="megatron", help="what moves the gradients"),
    option("zero_stage", "int", choices=(0, 1, 2, 3), help="of --engine deepspeed; 1, or what its file says"),
    option("deepspeed_config", "str", "--deepspeed_config", help="JSON file that tunes --engine deepspeed"),
    switch("layer_graphs", help="record a layer once a rung and replay it; by CUDA graphs"),
    option(
        "train_only",
        choices=("all", "new-embeddings"),
        default="all",
        help="new-embeddings: only the rows that a vocabulary extension added",
    ),
    option("train_only_first_id", "int", help="first of them; vocabulary_extension.json says it unless given"),
    option("requeue_exit_code", "int", default=75, help="exit code after --exit-signal: start again"),
    option(
        "on_bad_step",
        choices=POLICIES,
        default="stop",
        help="a loss or gradient that is no number: end, leave the update out, or go back to the last checkpoint",
    ),
    option("max_bad_steps", "int", default=10, help="of a run, that skip and rollback pass over"),
    option("max_loss_leap", "float", help="a loss above this multiple of the recent median is bad too"),
    option("max_norm_leap", "float", help="the same of the gradient's norm"),
)

PARALLEL: tuple[Flag, ...] = (
    switch(
        "sat_sparse_reduce",
        default=False,
        help="replicas send each other the gradients of kept rows and columns alone",
    ),
    switch(
        "preflight",
        help="compare all ranks and try the network before anything is built; on with more than one host",
    ),
    option("preflight_timeout", "float", default=300.0, help="seconds that a rank may stay silent in it"),
)

SECTIONS: dict[str, tuple[Flag, ...]] = {
    "sparsity": (*PRESET, *METHOD),
    "data": DATA,
    "checkpoint": CHECKPOINT,
    "logging": LOGGING,
    "training": TRAINING,
    "parallel": PARALLEL,
    "finetuning": FINETUNING,
    "baselines": BASELINES,
}
"""Headline of the printed configuration to its settings."""
