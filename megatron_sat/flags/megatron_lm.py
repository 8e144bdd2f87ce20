"""Settings with Megatron-LM's names that no class of megatron.core has: model, run, data, checkpoints, log.

Types and defaults are those of its parser (0.19); a test compares them. None stands where the machine, the
layout or another setting decides.
"""

from megatron_sat.data.tokenizer import KINDS as TOKENIZERS
from megatron_sat.flags.flag import Flag, option, switch

POSITIONS = ("learned_absolute", "rope", "none")

MODEL: tuple[Flag, ...] = (
    option("seq_length", "int", "--encoder-seq-length", help="tokens of a training sample"),
    option("max_position_embeddings", "int", help="longest sequence that positions exist for"),
    option("vocab_size", "int", help="tokens before padding; without it the tokenizer's"),
    option("padded_vocab_size", "int", help="rows of the embedding; without it vocab_size, padded"),
    option(
        "make_vocab_size_divisible_by",
        "int",
        default=128,
        help="padding of the vocabulary, times the TP size",
    ),
    switch("pad_vocab_size", no=("--disable-pad-vocab-size",), default=True, help="pad the vocabulary"),
    switch("untie_embeddings_and_output_weights", default=False, help="an output layer of its own"),
    Flag(
        key="position_embedding_type",
        names=("--position-embedding-type",),
        presets={"--use-rotary-position-embeddings": "rope"},
        choices=POSITIONS,
        default="learned_absolute",
        help="Llama-like models use rope, GPT-2 learned_absolute",
    ),
    option("rotary_base", "int", default=10000, help="base of the rotary frequencies"),
    option("rotary_percent", "float", default=1.0, help="share of a head's dimensions that is rotated"),
    option("rotary_seq_len_interpolation_factor", "int", help="positions are divided by it"),
    switch("use_rope_scaling", default=False, help="Llama-3's scaling of the rotary frequencies"),
    option("rope_scaling_factor", "float", default=8.0, help="factor of --use-rope-scaling"),
    switch("swiglu", default=False, help="gated MLP with SiLU, as Llama's"),
    switch("quick_geglu", default=False, help="gated MLP with quick GELU"),
    switch("squared_relu", default=False, help="ungated MLP with squared ReLU"),
    switch(
        "openai_gelu",
        help="GELU in GPT-2's tanh form; where not given: with biases, unless --no-bias-gelu-fusion, for that is what "
        "Megatron-LM's fused kernel computes",
    ),
    switch("group_query_attention", default=False, help="query heads share keys and values in groups"),
    switch("init_method_xavier_uniform", default=False, help="Xavier instead of normal initialisation"),
    switch("fp16_lm_cross_entropy", default=False, help="the loss in fp16 (with --fp16)"),
)

TRANSFORMER: tuple[Flag, ...] = (
    Flag(
        key="attention_backend",
        names=("--attention-backend",),
        presets={"--use-flash-attn": "flash"},
        choices=("flash", "fused", "unfused", "local", "auto"),
        default="auto",
        help="auto: flash-attn if installed, else torch's; flash insists on flash-attn; the rest mean auto",
    ),
    Flag(
        key="recompute_granularity",
        names=("--recompute-granularity",),
        presets={"--recompute-activations": "selective"},
        choices=("full", "selective"),
        help="what the backward computes again",
    ),
    switch("bias_swiglu_fusion", help="fused bias and SwiGLU; on with CUDA"),
    switch("bias_gelu_fusion", help="fused bias and GELU (tanh form); on with CUDA and biases"),
)

TRAINING: tuple[Flag, ...] = (
    option("micro_batch_size", "int", help="samples of one forward on one replica; required"),
    option("global_batch_size", "int", help="samples of one update; without it one micro-batch a replica"),
    option("train_iters", "int", help="updates of the whole run; this or --train-samples is required"),
    option("train_samples", "int", help="samples of the whole run; rounded down to whole updates"),
    option("eval_interval", "int", help="updates between evaluations; without it none on the way"),
    option("eval_iters", "int", default=100, help="global batches of one evaluation"),
    option("exit_interval", "int", help="end the process after an update that this divides"),
    option("exit_duration_in_mins", "int", help="end the process after so many minutes"),
    switch("exit_signal_handler", default=False, help="at --exit-signal save after the step under way, and end"),
    option(
        "exit_signal",
        choices=("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"),
        default="SIGTERM",
        help="the signal of --exit-signal-handler",
    ),
    option("seed", "int", default=1234, help="of weights, dropout and data order"),
)

PARALLEL: tuple[Flag, ...] = (
    option("num_layers_per_virtual_pipeline_stage", "int", help="interleaving, said in layers"),
    option("num_virtual_stages_per_pipeline_rank", "int", help="interleaving, said in chunks a rank"),
    option("distributed_backend", choices=("nccl", "gloo"), help="nccl with CUDA, else gloo"),
    option("distributed_timeout_minutes", "int", default=10, help="of the collectives"),
)

OPTIMIZATION: tuple[Flag, ...] = (
    option("lr", "float", help="highest learning rate; required"),
    option("min_lr", "float", default=0.0, help="lowest learning rate after the decay"),
    option(
        "lr_decay_style",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
        default="linear",
        help="form of the decay",
    ),
    option("lr_decay_iters", "int", help="updates until --min-lr; without it all"),
    option("lr_decay_samples", "int", help="the same in samples, with --train-samples"),
    option("lr_warmup_iters", "int", default=0, help="updates of linear warm-up"),
    option("lr_warmup_samples", "int", default=0, help="the same in samples, with --train-samples"),
    option("lr_warmup_fraction", "float", help="warm-up as a share of the decay"),
    option("lr_warmup_init", "float", default=0.0, help="rate at which the warm-up starts"),
    option(
        "lr_wsd_decay_style",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
        default="exponential",
        help="form of WSD's last leg",
    ),
    option("lr_wsd_decay_iters", "int", help="updates of WSD's last leg"),
    option("lr_wsd_decay_samples", "int", help="the same in samples, with --train-samples"),
    switch(
        "override_opt_param_scheduler",
        yes=("--override-opt_param-scheduler", "--override-lr-scheduler"),
        default=False,
        help="on resume these rates replace the checkpoint's (re-warming)",
    ),
    switch(
        "use_checkpoint_opt_param_scheduler",
        yes=("--use-checkpoint-opt_param-scheduler", "--use-checkpoint-lr-scheduler"),
        default=False,
        help="on resume the checkpoint's rates replace these",
    ),
    option("weight_decay", "float", default=0.01, help="decoupled decay of matrices"),
    option("start_weight_decay", "float", help="where the decay grows"),
    option("end_weight_decay", "float", help="where the decay grows"),
    option(
        "weight_decay_incr_style",
        choices=("constant", "linear", "cosine"),
        default="constant",
        help="how the weight decay grows",
    ),
)

GRADIENTS: tuple[Flag, ...] = (
    switch("accumulate_allreduce_grads_in_fp32", help="gradients in fp32; on with --bf16"),
    switch("grad_reduce_in_bf16", default=False, help="gradients in bf16, with --bf16"),
    switch(
        "align_grad_reduce",
        no=("--disable-align-grad-reduce",),
        default=True,
        help="pipeline stages reduce together",
    ),
)

DATA: tuple[Flag, ...] = (
    option("data_path", many="*", help="prefixes of .bin/.idx, each after its weight, cut by --split"),
    option("train_data_path", many="*", help="the same for training alone"),
    option("valid_data_path", many="*", help="the same for validation alone"),
    option("test_data_path", many="*", help="the same for the final test alone"),
    option("split", help="parts for training, validation, test, such as 969,30,1"),
    option("data_cache_path", help="folder of the index caches"),
    option("num_workers", "int", default=2, help="processes that load data, a rank"),
    switch("eod_mask_loss", default=False, help="no loss where a document ends"),
    switch("mmap_bin_files", default=True, help="map .bin files into memory"),
    option(
        "mid_level_dataset_surplus", "float", default=0.005, help="samples indexed beyond a domain's share"
    ),
    option("tokenizer_type", choices=tuple(TOKENIZERS), help="what reads --tokenizer-model; required"),
    option("tokenizer_model", help="a SentencePiece file or a Hugging Face folder"),
)

CHECKPOINT: tuple[Flag, ...] = (
    option("save", help="folder of the checkpoints"),
    option("save_interval", "int", "--persistent-save-interval", help="updates between checkpoints"),
    switch("async_save", default=False, help="a process a rank writes checkpoints while training goes on"),
    option("load", help="folder to resume from; an empty one is a fresh start"),
    option("ckpt_step", "int", help="iteration of the checkpoint to load; without it the newest"),
    option("ckpt_format", choices=("torch_dist", "torch", "torch_dcp", "fsdp_dtensor"), default="torch_dist"),
    switch("exit_on_missing_checkpoint", default=False, help="refuse to start afresh where --load is empty"),
    switch("finetune", default=False, help="weights alone from --load, and step 1"),
    switch("save_optim", default=True, help="optimizer state in the checkpoint"),
    switch("save_rng", default=True, help="random state in the checkpoint"),
    switch("load_optim", default=True, help="take the optimizer state from the checkpoint"),
    switch("load_rng", default=True, help="take the random state from the checkpoint"),
)

LOGGING: tuple[Flag, ...] = (
    option("log_interval", "int", default=100, help="updates between lines"),
    option("tensorboard_dir", help="folder of the TensorBoard files"),
)

SECTIONS: dict[str, tuple[Flag, ...]] = {
    "model": MODEL,
    "transformer": TRANSFORMER,
    "parallel": PARALLEL,
    "training": TRAINING,
    "optimization": OPTIMIZATION,
    "gradients": GRADIENTS,
    "data": DATA,
    "checkpoint": CHECKPOINT,
    "logging": LOGGING,
}
"""Headline of the printed configuration to its settings."""
