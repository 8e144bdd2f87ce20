"""SAT inside Megatron-LM's own trainer: for those who keep `megatron.training.pretrain` (megatron-core 0.19).

Three things differ from Megatron-LM's pretrain_gpt.py, each marked with SAT below: the layer specification, the
selectors, and a wrapper around `train_step` that takes the sparse modules through the step. All of Megatron-LM's flags
work, and the method's `--sat-*` flags of pretrain_sat.py with the same meaning and the same checks of their values:

    torchrun --nproc-per-node 8 pretrain_gpt_sat.py <your arguments> --transformer-impl local \
        --sat-schedule ladder --sat-omission-rate 0.5 --sat-schedule-start 2000 --sat-rungs 5

Left out here, and there in pretrain_sat.py: the choice and its statistics in checkpoints (they matter for a resume
with --sat-selection-interval above 1 or --sat-statistics lagged, which this script refuses), weights packed once a step
(--sat-weights is no flag here: they are cut in every micro-batch), MST, --sat-sparse-reduce, the plan, FLOPs. So
neurons are chosen as in the paper unless it is said otherwise, not by pretrain_sat.py's defaults, whose score pays a
dense forward for each choice.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import megatron.training.training as megatron_training
import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, print_rank_0
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from torch import Tensor

from megatron_sat.data.batch import cut_for_context_parallel
from megatron_sat.distributed import current_layout
from megatron_sat.engines.frozen import hold_entries
from megatron_sat.flags.presets import CHOICE
from megatron_sat.flags.sat import METHOD
from megatron_sat.layers.attach import attach_selectors
from megatron_sat.model.spec import sparse_block_spec
from megatron_sat.sparsity.controller import Controller, sparse_modules
from megatron_sat.sparsity.schedule import ScheduleConfig, build_schedule, parse_rate
from megatron_sat.sparsity.selector import SelectionConfig

LEFT_OUT = ("sat_weights",)
"""Flags of the method that would have no effect here."""


def add_sat_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """SAT: the method's flags, from the table that pretrain_sat.py has them from."""
    group = parser.add_argument_group("sparsity-accelerated training")
    for flag in METHOD:
        if flag.key in LEFT_OUT:
            continue
        name = flag.names[0]
        default = CHOICE.get(flag.key, flag.default)
        group.add_argument(name, type=functools.partial(flag.read, said=name), default=default, help=flag.help)
    return parser


def selection_config(args: argparse.Namespace) -> SelectionConfig:
    """SAT: how neurons are chosen. Raises ValueError for what this trainer cannot do, or its checkpoints not carry."""
    if args.sat_schedule == "mst" or args.sat_selection == "mixed-growing":
        raise ValueError(
            f"--sat-schedule ({args.sat_schedule}) must be another than mst, --sat-selection ({args.sat_selection}) "
            "than mixed-growing, in Megatron-LM's trainer; use pretrain_sat.py --baseline mst-structured"
        )
    if args.sat_selection_interval != 1 or args.sat_statistics != "fresh":
        raise ValueError(
            f"--sat-selection-interval ({args.sat_selection_interval}) must be 1 and --sat-statistics "
            f"({args.sat_statistics}) fresh in Megatron-LM's trainer; use pretrain_sat.py, whose checkpoints carry them"
        )
    config = SelectionConfig(
        importance=args.sat_importance,
        swiglu_score=args.sat_swiglu_score,
        selection=args.sat_selection,
        temperature=args.sat_temperature,
        selection_groups=args.sat_selection_groups or args.tensor_model_parallel_size,
        channel_multiple=args.sat_channel_multiple or (128 if torch.cuda.get_device_capability()[0] else 1),
        gqa=args.sat_gqa,
        dp_selection=args.sat_dp_selection,
        rescale=args.sat_rescale,
        modules=args.sat_modules,
        omit=args.sat_omit,
        whole_ends=args.sat_whole_ends,
        seed=args.seed if args.sat_seed is None else args.sat_seed,
    )
    config.whole_layers(args.num_layers)  # refuses a model whose layers would all stay whole
    return config


def build_model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    """Megatron-LM's model provider, on the sparse layers (SAT), each with a selector (SAT)."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    model = GPTModel(
        config,
        sparse_block_spec(config, vp_stage=vp_stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    attach_selectors([model], config=selection_config(args), layout=current_layout())
    return model


class SparseStep:
    """SAT: Megatron-LM's train_step, with the sparse modules inside the step that it takes."""

    def __init__(self, train_step: Callable[..., Any]) -> None:
        self._train_step = train_step
        self._controller: Controller | None = None

    def __call__(self, forward_step: Any, iterator: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if self._controller is None:
            self._controller = _controller(model, optimizer)
        step = get_args().curr_iteration + 1
        with self._controller.step(step):
            answer = self._train_step(forward_step, iterator, model, optimizer, *args, **kwargs)
        rates = {kind: round(rate, 4) for kind, rate in self._controller.omission_rates(step).items()}
        print_rank_0(f" step {step} omission rates {rates}")
        return answer


def _controller(model: list[torch.nn.Module], optimizer: Any) -> Controller:
    args = get_args()
    schedule = build_schedule(
        ScheduleConfig(
            kind=args.sat_schedule,
            omission_rate=None if args.sat_omission_rate is None else parse_rate(args.sat_omission_rate),
            start=args.sat_schedule_start,
            rungs=args.sat_rungs,
            train_iters=args.train_iters,
        )
    )
    controller = Controller(sparse_modules(model), schedule=schedule, interval=1)
    if args.sat_omitted_neurons == "frozen":
        hold_entries(optimizer, entries=controller.omitted_entries)
    return controller


def build_datasets(samples: list[int], vp_stage: int | None = None) -> Any:
    """Megatron-LM's data set provider."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=get_blend_from_list(args.data_path),
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    dataset = GPTDataset if args.data_path else MockGPTDataset
    return BlendedMegatronDatasetBuilder(dataset, samples, lambda: True, config).build()


build_datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank builds: Megatron-LM asks by this mark


def mean_loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """losses, mask: [b, s]. The sum of unmasked losses, their number, and both for the log."""
    total, tokens = (losses.float() * mask).sum(), mask.sum().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}


def forward_step(iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> Any:
    """Megatron-LM's forward step: one micro-batch [b, s/cp]."""
    batch = {key: value.cuda() for key, value in next(iterator).items() if key != "dataset_id"}
    rank, size = mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()
    batch = cut_for_context_parallel(batch, cp_rank=rank, cp_size=size)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, functools.partial(mean_loss, batch["loss_mask"])


def main() -> None:
    """Parse Megatron-LM's arguments and ours, and train."""
    args = parse_and_validate_args(extra_args_provider=add_sat_arguments)
    megatron_training.train_step = SparseStep(megatron_training.train_step)
    megatron_training.pretrain(
        pretrain_cfg_container_from_args(args),
        build_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider=build_model,
    )


if __name__ == "__main__":
    main()
