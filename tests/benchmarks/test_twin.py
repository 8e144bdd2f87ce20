"""The twin in plain PyTorch is the program's dense model: its losses, its gradients, its updates."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import twin
from benchmarks.program import CONSTANT, Size, built, flags, random_text
from megatron_sat.data.batch import build_train_iterator
from megatron_sat.model.flops import ModelShape
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import FP32_SUMS, RUN_LOSS, RUN_NORM

SIZE = Size(model="tiny", layers=2, seq_length=24, micro_batch_size=2, micro_batches=3, vocabulary=128)
GROUPED = "--group-query-attention --num-query-groups 4 --seed 3 --clip-grad 0.5 --weight-decay 0.1"
STEPS = 4
NAMES = {
    "decoder.layers.{}.input_layernorm.weight": "blocks.{}.attention_norm.weight",
    "decoder.layers.{}.self_attention.linear_qkv.weight": "blocks.{}.qkv.weight",
    "decoder.layers.{}.self_attention.linear_proj.weight": "blocks.{}.out.weight",
    "decoder.layers.{}.pre_mlp_layernorm.weight": "blocks.{}.mlp_norm.weight",
    "decoder.layers.{}.mlp.linear_fc1.weight": "blocks.{}.gate_up.weight",
    "decoder.layers.{}.mlp.linear_fc2.weight": "blocks.{}.down.weight",
    "embedding.word_embeddings.weight": "embedding.weight",
    "decoder.final_layernorm.weight": "head.norm.weight",
    "output_layer.weight": "head.logits.weight",
}


def translated(state: dict[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    """Megatron's names and its qkv by groups to the twin's names and [Q | K | V]."""
    found = {}
    for name, tensor in state.items():
        number = re.search(r"layers\.(\d+)\.", name)
        pattern = re.sub(r"layers\.\d+\.", "layers.{}.", name)
        if "linear_qkv" in name:
            by_group = tensor.view(shape.num_query_groups, shape.heads_per_group + 2, shape.kv_channels, -1)
            parts = (by_group[:, :-2], by_group[:, -2], by_group[:, -1])
            tensor = torch.cat([part.reshape(-1, tensor.size(1)) for part in parts])
        found[NAMES[pattern].format(number.group(1) if number else "")] = tensor.clone()
    return found


def both(_: int, folder: Path, base: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """(losses, first gradients and last weights) of the program and of the twin, from the same weights and batches."""
    line = flags(SIZE, data=random_text(folder, SIZE), cuda=False, steps=50, method=CONSTANT, more=GROUPED)
    line[line.index("--lr") + 1] = "3e-3"
    with built(line) as run:
        (chunk,) = run.engine.chunks
        with torch.no_grad():
            for name, parameter in chunk.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
        ours = dict(chunk.named_parameters())
        twin.BASE = base
        trainings = [
            twin.plain_training(run.shape, run.config.settings, sums=torch.float32, device=torch.device("cpu"))
            for _ in range(2)
        ]
        for training in trainings:
            training.model.load_state_dict(translated({name: p.detach() for name, p in ours.items()}, run.shape))
        reader = build_train_iterator(
            run.datasets.train,
            micro_batch_size=SIZE.micro_batch_size,
            dp_rank=0,
            dp_size=1,
            consumed_samples=0,
            num_workers=0,
            device=run.device,
        )
        steps = [[next(reader) for _ in range(SIZE.micro_batches)] for _ in range(STEPS)]
        found = [run.engine.train_step(iter(batches), num_micro_batches=SIZE.micro_batches) for batches in steps[:1]]
        gradients = translated({name: p.main_grad for name, p in ours.items()}, run.shape)
        for batches in steps[1:]:
            found.append(run.engine.train_step(iter(batches), num_micro_batches=SIZE.micro_batches))
        weights = translated({name: p.detach() for name, p in ours.items()}, run.shape)
        norm = found[0].grad_norm
        plain = trainings[0]
        losses = [plain.step(batches) for batches in steps]
        plain_weights = {name: p.detach() for name, p in plain.model.named_parameters()}
        model = trainings[1].model
        model(*(torch.cat([batch[name] for batch in steps[0]]) for name in ("tokens", "labels"))).backward()
        sums = trainings[1]._sums or []
        plain_gradients = dict(zip((name for name, _ in model.named_parameters()), sums, strict=True))
    tokens = SIZE.tokens
    clipped = min(1.0, 0.5 / norm) / tokens
    return (
        {"losses": [each.loss for each in found], "gradients": gradients, "weights": weights},
        {
            "losses": losses,
            "gradients": {name: total * clipped for name, total in plain_gradients.items()},
            "weights": plain_weights,
        },
    )


@pytest.fixture(scope="module")
def program_and_twin(tmp_path_factory):
    return run_ranks(both, 1, tmp_path_factory.mktemp("text"), twin.BASE)[0]


def test_the_twins_losses_are_those_of_the_program_over_updates(program_and_twin):
    program, plain = program_and_twin
    torch.testing.assert_close(plain["losses"], program["losses"], **RUN_LOSS)
    assert program["losses"][0] - program["losses"][-1] > 0.01, "the updates must have changed something"


def test_the_twins_gradients_are_those_of_the_program(program_and_twin):
    program, plain = program_and_twin
    assert plain["gradients"].keys() == program["gradients"].keys()
    for name, gradient in program["gradients"].items():
        scale = gradient.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(plain["gradients"][name] / scale, gradient / scale, **FP32_SUMS | {"rtol": 0.0})


def test_the_twins_weights_move_as_those_of_the_program(program_and_twin):
    program, plain = program_and_twin
    for name, weight in program["weights"].items():
        assert (plain["weights"][name] - weight).norm() <= RUN_NORM["rtol"] * weight.norm(), name


def test_another_rotary_base_is_seen(tmp_path):
    program, plain = run_ranks(both, 1, tmp_path, 100.0)[0]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(plain["losses"], program["losses"], **RUN_LOSS)


def test_sums_in_the_models_own_precision_are_what_autograd_adds_up():
    """In bf16, where fp32 sums and bf16 sums differ: each stays what it says."""
    shape = ModelShape(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        num_query_groups=2,
        kv_channels=8,
        ffn_hidden_size=24,
        gated=True,
        padded_vocab_size=32,
        seq_length=8,
    )
    settings = {"bf16": True, "lr": 1e-2, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_eps": 1e-8}
    settings |= {"weight_decay": 0.0, "clip_grad": 1.0}
    torch.manual_seed(2)
    ids = torch.randint(0, 32, (6, 2, 9))
    batches = [{"tokens": each[:, :-1], "labels": each[:, 1:]} for each in ids]
    found = {}
    for sums in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        training = twin.plain_training(shape, settings, sums=sums, device=torch.device("cpu"))
        norms = [p.norm().item() for p in training._main]
        found[sums] = [training.step(batches) for _ in range(3)]
        assert [p.dtype for p in training._main] == [torch.float32] * len(norms)
        assert all(p.grad is None for p in training.model.parameters())
        torch.testing.assert_close(training._main[0].to(torch.bfloat16), training._parameters[0].detach())
    assert found[torch.float32][0] == found[torch.bfloat16][0]
    assert found[torch.float32][2] != found[torch.bfloat16][2]
    assert found[torch.bfloat16][2] < found[torch.bfloat16][0]
