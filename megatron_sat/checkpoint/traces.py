"""What a model computes for a text at the places of `hf_names.POINTS`, Hugging Face's and ours, for `parity`.

Shapes: `s` tokens, `h` hidden.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_sat.checkpoint.hf_names import LAYER, POINTS
from megatron_sat.distributed import Layout

_MODULES_WITH_BIAS = ("attention", "MLP")
Trace = dict[str, Tensor]
"""By the name of a place, in the order of the computation: [s, h] in fp32 on the CPU; "logits": [s, rows]."""


@torch.no_grad()
def trace_hugging_face(model: nn.Module, ids: Sequence[int]) -> Trace:
    """What one of transformers' models computes for a text."""
    modules = dict(model.named_modules())
    found: Trace = {}
    places = {}
    count = 1 + max(int(name.rsplit(".", 1)[1]) for name in modules if _is_layer(name))
    for label, theirs, _ in POINTS:
        for number in range(count if LAYER in theirs else 1):
            places[label.replace(LAYER, str(number))] = modules[theirs.replace(LAYER, str(number))]
    with _listening(places, lambda name, out: found.__setitem__(name, _plain(_first(out)[0]))):
        model(torch.tensor([list(ids)], device=next(model.parameters()).device), use_cache=False)
    return _in_order(found)


def _is_layer(name: str) -> bool:
    head, _, number = name.rpartition(".")
    return number.isdigit() and head == "model.layers"


@torch.no_grad()
def trace_megatron(chunks: Sequence[nn.Module], ids: Sequence[int], *, layout: Layout) -> Trace:
    """What our model computes for the text, in any layout without context parallelism; collective.

    Every rank gets the trace of the whole model.
    """
    found: Trace = {}
    places: dict[str, nn.Module] = {}
    for chunk in chunks:
        places |= _places(chunk)
        chunk.eval()

    def keep(name: str, out: Any) -> None:
        value = _first(out)
        if name.endswith(_MODULES_WITH_BIAS) and out[1] is not None:
            value = value + out[1]  # Megatron adds it together with the residual
        found[name] = _plain(value[:, 0])

    with _listening(places, keep):
        _run(chunks, ids)
    everyone: list[Any] = [None] * layout.model_group.size()
    dist.all_gather_object(everyone, (layout.tp_rank, found), group=layout.model_group)
    merged: Trace = {}
    for _, part in everyone:
        merged |= part
    heads = {rank: part["logits"] for rank, part in everyone if "logits" in part}
    merged["logits"] = torch.cat([heads[rank] for rank in sorted(heads)], dim=-1)
    return _in_order(merged)


def _places(chunk: nn.Module) -> dict[str, nn.Module]:
    while hasattr(chunk, "module"):  # inside of Float16Module
        chunk = cast(nn.Module, chunk.module)
    model = cast(GPTModel, chunk)
    found: dict[str, nn.Module] = {}
    for label, _, ours in POINTS:
        if LAYER not in ours:
            if (module := _submodule(model, ours)) is not None:
                found[label] = module
            continue
        for here, layer in enumerate(model.decoder.layers):
            module = _submodule(model, ours.replace(LAYER, str(here)))
            assert module is not None
            found[label.replace(LAYER, str(layer.layer_number - 1))] = module
    return found


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    """A module that this pipeline stage has, or None."""
    for name in path.split("."):
        found = getattr(model, name, None)
        if found is None:
            return None
        model = found
    return model


def _run(chunks: Sequence[nn.Module], ids: Sequence[int]) -> None:
    """One forward of all pipeline stages."""
    device = next(chunks[0].parameters()).device
    tokens = torch.tensor([list(ids)], device=device)
    positions = torch.arange(len(ids), device=device)[None]

    def step(_: Iterator[Any], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        return chunk(tokens, positions, None), lambda output, non_loss_data=True: None

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(()) for _ in chunks],
        model=list(chunks),
        num_microbatches=1,
        seq_length=len(ids),
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )


@contextmanager
def _listening(places: Mapping[str, nn.Module], hear: Callable[[str, Any], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        return lambda module, inputs, out: hear(name, out)

    handles = [module.register_forward_hook(hook(name)) for name, module in places.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _plain(value: Tensor) -> Tensor:
    return value.detach().to(device="cpu", dtype=torch.float32, copy=True)  # Megatron adds the residual in place


def _in_order(found: Trace) -> Trace:
    """By the order of the computation: embedding, layers by number, and in a layer as `POINTS` has them."""
    order = [label for label, _, _ in POINTS]

    def place(name: str) -> tuple[int, int, int]:
        number = next((int(word) for word in name.split() if word.isdigit()), None)
        row = order.index(name if number is None else name.replace(str(number), LAYER, 1))
        return (0, 0, row) if row == 0 else (2, 0, row) if number is None else (1, number, row)

    return {name: found[name] for name in sorted(found, key=place)}
