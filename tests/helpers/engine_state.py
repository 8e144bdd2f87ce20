"""Weights and optimizer state of an engine, by parameter and in its shape, whatever the optimizer holds."""

from collections.abc import Iterator

import torch
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_sat.engines.megatron import MegatronEngine


def named(engine: MegatronEngine) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of all chunks of this rank, "<chunk>.<name>"."""
    for index, chunk in enumerate(engine.chunks):
        for name, parameter in chunk.named_parameters():
            yield f"{index}.{name}", parameter


def snapshot(engine: MegatronEngine) -> dict[str, Tensor]:
    """Every weight, master weight and moment of this rank, shaped like its parameter: "<name> weight",
    "<name> main", "<name> exp_avg", ... with zeros where another rank has it."""
    optimizer = engine._optimizer
    engine.gather_weights()
    seen: dict[str, Tensor] = {}
    for name, parameter in named(engine):
        seen[f"{name} weight"] = parameter.detach().clone()
        for wrapper in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
            main, start = parameter, 0
            if hasattr(wrapper, "model_param_group_index_map"):
                if parameter not in wrapper.model_param_group_index_map:
                    continue
                group, order = wrapper.model_param_group_index_map[parameter]
                main = wrapper.optimizer.param_groups[group]["params"][order]
                start = wrapper._get_model_param_range_map(parameter)["param"].start
            elif parameter.dtype != torch.float32:
                main = parameter.main_param  # type: ignore[attr-defined]
            for key, tensor in {"main": main, **wrapper.optimizer.state.get(main, {})}.items():
                if isinstance(tensor, Tensor) and tensor.shape == main.shape:
                    whole = torch.zeros(parameter.numel(), dtype=tensor.dtype)
                    whole[start : start + tensor.numel()] = tensor.detach().flatten()
                    seen[f"{name} {key}"] = whole.view(parameter.shape)
    return seen
