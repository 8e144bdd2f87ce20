"""Settings of fine-tuning, what must hold beside them, and epochs said in updates."""

from typing import Any

from megatron_sat.data.blend import DataConfig
from megatron_sat.data.sft import SFTConfig, updates_of_epochs
from megatron_sat.data.sft_encode import TOO_LONG
from megatron_sat.flags.flag import Flag, Settings, dashed, option, switch

FINETUNING: tuple[Flag, ...] = (
    switch("sft", default=False, help="train on instruction data, loss on responses alone; finetune_sat.py says it"),
    option("train_epochs", "int", help="passes over the instruction data, in place of --train-iters; of whole updates"),
    switch("sft_packing", default=True, help="several examples a sample; without it each is padded"),
    option(
        "sft_too_long",
        choices=TOO_LONG,
        default="truncate",
        help="an example of more than --seq-length + 1 tokens: its end is cut off, or it is left out",
    ),
)
PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


def sft_config(settings: Settings) -> SFTConfig | None:
    """How examples become samples; None where the run trains on text."""
    if not settings["sft"]:
        return None
    return SFTConfig(packing=settings["sft_packing"], too_long=settings["sft_too_long"])


def settle_epochs(given: Settings) -> dict[str, Any]:
    """What was given, with --train-iters in the place of --train-epochs; reads the data's lengths.

    Raises ValueError where epochs cannot be counted, and for data that `data.sft` refuses.
    """
    settled = dict(given)
    epochs = settled.pop("train_epochs", None)
    if epochs is None:
        return settled
    if not settled.get("sft"):
        raise ValueError("--train-epochs has no effect without --sft, which finetune_sat.py says; use --train-iters")
    if epochs < 1:
        raise ValueError(f"--train-epochs must be at least 1, got {epochs}; use --train-iters for a part of one")
    for key in ("train_iters", "train_samples"):
        if settled.get(key) is not None:
            raise ValueError(f"--train-epochs and {dashed(key)} say the same thing, got both; leave one out")
    for key in ("seq_length", "global_batch_size"):
        if settled.get(key) is None:
            raise ValueError(f"--train-epochs needs {dashed(key)}, got it without; add it")
    defaults = {flag.key: flag.default for flag in FINETUNING}
    sft = sft_config({**defaults, **{key: value for key, value in settled.items() if value is not None}})
    assert sft is not None
    paths: dict[str, Any] = {key: tuple(settled.get(key) or ()) for key in PATHS}
    seed = SEED if settled.get("seed") is None else settled["seed"]
    config = DataConfig(seq_length=settled["seq_length"], seed=seed, split=settled.get("split"), **paths)
    settled["train_iters"] = updates_of_epochs(
        config, sft=sft, epochs=epochs, global_batch_size=settled["global_batch_size"]
    )
    return settled


SEED = 1234
"""The default of --seed, which decides what shares a window."""
