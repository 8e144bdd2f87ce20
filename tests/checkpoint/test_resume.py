"""A run stopped and resumed equals the uninterrupted one, here or in another layout; a misfit is refused."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_sat.checkpoint import resume
from megatron_sat.checkpoint.folder import TRACKER, folder_of, iterations
from megatron_sat.checkpoint.header import Header
from megatron_sat.checkpoint.resume import (
    LoadConfig,
    Resumed,
    load_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from megatron_sat.distributed import Layout, initialize_model_parallel
from megatron_sat.engines.megatron import MegatronEngine
from tests.helpers.plain_engine import bits, make_engine, train, weights
from tests.helpers.plain_gpt import make_batches, make_chunks, make_config
from tests.helpers.ranks import run_ranks

LOSS, NORM = 2e-6, 5e-6  # another layout sums in another order, fp32
BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
FP16 = {"fp16": True, "params_dtype": torch.float16, "pipeline_dtype": torch.float16}
LATE = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
INTERLEAVED = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
DISTRIBUTED = {"use_distributed_optimizer": True}
DATA = {"blend": [0.7, "zh", 0.3, "en"], "seed": 1}


def sat_tensors(layout: Layout) -> dict[str, Tensor]:
    """What a controller would give: other layers on other stages, the same on all other ranks."""
    first = 4 // layout.pp_size * layout.pp_rank
    return {
        f"sat.layers.{layer}.mlp.kept": torch.arange(layer, 20 + layer)
        for layer in range(first, first + 4 // layout.pp_size)
    } | {
        f"sat.layers.{first}.mlp.mean": torch.full((32,), 0.1 + first),
        f"sat.layers.{first}.ever": torch.tensor([True]),
    }


def header(iteration: int, **changes: Any) -> Header:
    fields: dict[str, Any] = {"tokenizer": "abc", "data": DATA, "extra": {"rung": 2}, "config": {"lr": 3e-3}}
    return Header(iteration=iteration, consumed_train_samples=8 * iteration, **{**fields, **changes})


def save(engine: MegatronEngine, layout: Layout, root: Path, *, iteration: int, **how: Any) -> Path:
    return save_checkpoint(
        root, trainer=engine, header=header(iteration), tensors=sat_tensors(layout), layout=layout, **how
    )


def load(
    engine: MegatronEngine, layout: Layout, root: Path, *, step: int | None = None, **flags: Any
) -> Resumed:
    expected: dict[str, Any] = {"tokenizer": "abc", "data": DATA}
    expected |= {key: flags.pop(key) for key in ("tokenizer", "data") if key in flags}
    checkpoint = open_checkpoint(root, step=step)
    return load_checkpoint(checkpoint, trainer=engine, layout=layout, config=LoadConfig(**flags), **expected)


def state_bits(engine: MegatronEngine) -> dict[str, bytes]:
    """Weights, fp32 copies and moments of this rank, and what the schedule writes, as bytes."""
    engine.gather_weights()
    tensors = weights(engine)
    inner = engine._optimizer.chained_optimizers[0].optimizer
    for group_index, group in enumerate(inner.param_groups):
        tensors[f"{group_index}.rates"] = torch.tensor([group["lr"], group["weight_decay"]])
        for index, main in enumerate(group["params"]):
            tensors[f"{group_index}.{index}.main"] = main.detach().clone()
            for key, tensor in inner.state[main].items():
                tensors[f"{group_index}.{index}.{key}"] = tensor.detach().clone().reshape(-1)
    return bits(tensors)


def to_the_end(rank: int, settings: dict[str, Any], root: Path | None) -> tuple[list[Any], dict[str, bytes]]:
    """Five steps; with a root, a checkpoint after the second."""
    engine, layout = make_engine(**settings)
    steps = train(engine, layout, steps=range(2))
    if root is not None:
        save(engine, layout, root, iteration=2)
    return steps + train(engine, layout, steps=range(2, 5)), state_bits(engine)


def go_on(
    rank: int, settings: dict[str, Any], root: Path, **flags: Any
) -> tuple[list[Any], dict[str, bytes], Resumed]:
    """Load into a new engine whose weights were something else, then three steps."""
    engine, layout = make_engine(**settings)
    with torch.no_grad():
        for chunk in engine.chunks:
            for parameter in chunk.parameters():
                parameter.normal_()
    resumed = load(engine, layout, root, **flags)
    return train(engine, layout, steps=range(2, 5)), state_bits(engine), resumed


SAME: dict[str, tuple[int, dict[str, Any]]] = {
    "fp32": (1, {}),
    "bf16": (1, {"model": BF16}),
    "fp16 with its loss scale": (1, {"model": FP16, "optim": {"initial_loss_scale": 2.0**10}}),
    "sgd": (1, {"optim": {"optimizer": "sgd"}}),
    "tp 2": (2, {"tp": 2}),
    "pp 2": (2, {"pp": 2}),
    "pp 2, interleaved": (2, {"pp": 2, "virtual_pp": 2, "model": INTERLEAVED}),
    "dp 2": (2, {}),
    "dp 2, distributed": (2, {"ddp": DISTRIBUTED}),
    "dp 2, distributed, bf16, overlapped": (2, {"ddp": LATE, "model": BF16}),
    "decoupled rate": (1, {"optim": {"decoupled_lr": 1e-3, "decoupled_min_lr": 1e-4}}),
}


@pytest.mark.parametrize("case", SAME)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(case: str, tmp_path: Path) -> None:
    ranks, settings = SAME[case]
    whole = run_ranks(to_the_end, ranks, settings, None)
    assert run_ranks(to_the_end, ranks, settings, tmp_path) == whole, "saving changes nothing"
    resumed = run_ranks(go_on, ranks, settings, tmp_path)
    for (steps, state), (later, state_later, _) in zip(whole, resumed, strict=True):
        assert later == steps[2:]
        assert state_later == state


OTHERS: dict[str, tuple[int, dict[str, Any], int, dict[str, Any]]] = {
    "tp 2 to 1": (2, {"tp": 2}, 1, {}),
    "tp 2 to 1, distributed": (2, {"tp": 2, "ddp": DISTRIBUTED}, 1, {"ddp": DISTRIBUTED}),
    "tp 1 to 2": (1, {}, 2, {"tp": 2}),
    "pp 2 to tp 2": (2, {"pp": 2}, 2, {"tp": 2}),
    "pp 2 interleaved to pp 2": (2, {"pp": 2, "virtual_pp": 2, "model": INTERLEAVED}, 2, {"pp": 2}),
    "dp 2 to 1, distributed": (2, {"ddp": DISTRIBUTED}, 1, {"ddp": DISTRIBUTED}),
    "tp 2 dp 2 to pp 2, distributed": (4, {"tp": 2, "ddp": LATE}, 2, {"pp": 2, "ddp": DISTRIBUTED}),
}


@pytest.fixture(scope="module")
def uninterrupted() -> list[Any]:
    return run_ranks(to_the_end, 1, {}, None)[0][0]


@pytest.mark.parametrize("case", OTHERS)
def test_a_run_goes_on_in_another_layout(case: str, tmp_path: Path, uninterrupted: list[Any]) -> None:
    ranks, settings, other_ranks, other_settings = OTHERS[case]
    run_ranks(to_the_end, ranks, settings, tmp_path)
    for steps, _, resumed in run_ranks(go_on, other_ranks, other_settings, tmp_path):
        assert max(abs(a[0] - b[0]) for a, b in zip(steps, uninterrupted[2:], strict=True)) < LOSS
        assert max(abs(a[1] - b[1]) for a, b in zip(steps, uninterrupted[2:], strict=True)) < NORM
        assert (resumed.iteration, resumed.consumed_train_samples) == (2, 16)
        assert resumed.extra == {"rung": 2}
        for layer in range(4):
            assert torch.equal(
                resumed.tensors[f"sat.layers.{layer}.mlp.kept"], torch.arange(layer, 20 + layer)
            )


def test_without_its_moments_a_resumed_run_is_another(tmp_path: Path, uninterrupted: list[Any]) -> None:
    run_ranks(to_the_end, 1, {}, tmp_path)
    steps, _, resumed = run_ranks(go_on, 1, {}, tmp_path, no_load_optim=True)[0]
    assert resumed.iteration == 2
    assert steps[0][0] == uninterrupted[2][0], "the first loss is before the first update"
    assert abs(steps[2][0] - uninterrupted[4][0]) > 1e-4


def test_finetune_takes_weights_alone_and_starts_a_new_run(tmp_path: Path, uninterrupted: list[Any]) -> None:
    run_ranks(to_the_end, 2, {"tp": 2}, tmp_path)
    steps, _, resumed = run_ranks(
        go_on, 1, {"ddp": DISTRIBUTED}, tmp_path, finetune=True, data={"blend": "other"}
    )[0]
    assert resumed == Resumed(iteration=0, consumed_train_samples=0, extra={}, tensors={})
    assert steps[0][0] == pytest.approx(uninterrupted[2][0], abs=LOSS)


def rates(
    rank: int, root: Path, changes: dict[str, Any], optim: dict[str, Any]
) -> tuple[float, float, float, float]:
    """Rate, decay, and both rates of the schedule's end after loading with another schedule."""
    engine, layout = make_engine(rate=changes, optim=optim)
    load(engine, layout, root)
    group = engine._optimizer.param_groups[0]
    train(engine, layout, steps=range(2, 3))
    return engine.learning_rate, group["weight_decay"], group["max_lr"], engine._scheduler.max_lr


def test_a_changed_schedule_is_refused_unless_a_flag_says_whose_counts(tmp_path: Path) -> None:
    run_ranks(to_the_end, 1, {}, tmp_path)
    new = {"lr": 1e-3, "lr_decay_style": "constant", "weight_decay": 0.2}
    with pytest.raises(
        RuntimeError, match=r"max_lr of the schedule must be the checkpoint's \(0.003\), got 0.001; pass"
    ):
        run_ranks(rates, 1, tmp_path, new, {})
    theirs = run_ranks(rates, 1, tmp_path, {**new, "use_checkpoint_opt_param_scheduler": True}, {})[0]
    assert theirs == run_ranks(rates, 1, tmp_path, {}, {})[0]
    assert theirs[1:] == (0.1, 3e-3, 3e-3)
    ours = run_ranks(rates, 1, tmp_path, {**new, "override_opt_param_scheduler": True}, {})[0]
    assert ours == (1e-3, 0.2, 1e-3, 1e-3)
    with pytest.raises(RuntimeError, match="it has none for .* set --decoupled-lr"):
        run_ranks(rates, 1, tmp_path, {}, {"decoupled_lr": 1e-3, "decoupled_min_lr": 0.0})


def test_a_changed_decoupled_rate_is_refused(tmp_path: Path) -> None:
    run_ranks(to_the_end, 1, {"optim": {"decoupled_lr": 1e-3, "decoupled_min_lr": 0.0}}, tmp_path)
    with pytest.raises(
        RuntimeError, match=r"max_lr of a parameter group must be the checkpoint's \(0.001\), got 0.002"
    ):
        run_ranks(rates, 1, tmp_path, {}, {"decoupled_lr": 2e-3, "decoupled_min_lr": 0.0})


def untouched(rank: int, settings: dict[str, Any], root: Path, flags: dict[str, Any]) -> str:
    """The refusal of a load, after which the engine must be as it was."""
    engine, layout = make_engine(**settings)
    train(engine, layout, steps=range(1))
    before = state_bits(engine)
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the caller matches the text
        load(engine, layout, root, **flags)
    assert state_bits(engine) == before
    return str(refusal.value)


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "width": (
        {"model": {"ffn_hidden_size": 64}},
        {},
        (
            "2 tensors differ:"
            "\n  decoder.layers.mlp.linear_fc1.weight: [4, 128, 32] in the model, [4, 96, 32] in the "
            "checkpoint\n  decoder.layers.mlp.linear_fc2.weight: [4, 32, 64] in the model, [4, 32, 48] in"
        ),
    ),
    "layers": (
        {"model": {"num_layers": 2}},
        {},
        "[2, 32] in the model, [4, 32] in the checkpoint\n  and 1 more",
    ),
    "biases": (
        {"model": {"add_qkv_bias": True}},
        {},
        "linear_qkv.bias: [4, 64] in the model, absent from the checkpoint",
    ),
    "tied": ({"tied": True}, {}, "output_layer.weight: [96, 32] in the checkpoint, absent from the model"),
    "vocabulary without a known tokenizer": (
        {"vocab": 128},
        {"tokenizer": None, "finetune": True},
        "embedding.word_embeddings.weight: [128, 32] in the model, [96, 32] in the checkpoint",
    ),
    "tokenizer": (
        {},
        {"tokenizer": "xyz"},
        "the tokenizer must be the checkpoint's (fingerprint abc), got xyz",
    ),
    "tokenizer of a new run": (
        {},
        {"tokenizer": "xyz", "finetune": True},
        "pass the tokenizer that the model was",
    ),
    "blend": ({}, {"data": {**DATA, "blend": [1, "zh"]}}, "blend was [0.7, 'zh', 0.3, 'en'], got [1, 'zh']"),
    "seed": (
        {},
        {"data": {**DATA, "seed": 2}},
        "seed was 1, got 2: the samples already read could not be told",
    ),
    "optimizer": (
        {"ddp": DISTRIBUTED},
        {},
        "this run's kind (distributed, fully_reshardable), the checkpoint's is fp32",
    ),
    "precision": ({"model": BF16}, {}, "this run's kind (16-bit with fp32 copies), the checkpoint's is fp32"),
    "step": ({}, {"step": 5}, "iter_0000005 is not there; whole ones: 2; choose with --ckpt-step"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    run_ranks(to_the_end, 1, {}, root)
    return root


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_before_anything_is_touched(case: str, saved: Path) -> None:
    settings, flags, message = REFUSALS[case]
    for refusal in run_ranks(untouched, 2, settings, saved, flags):
        assert message in refusal


@pytest.mark.parametrize(
    "settings, kind",
    [({"ddp": DISTRIBUTED}, "distributed, fully_reshardable"), ({"model": BF16}, "16-bit with fp32 copies")],
)
def test_the_kind_of_a_saved_optimizer_is_named(settings: dict[str, Any], kind: str, tmp_path: Path) -> None:
    run_ranks(to_the_end, 1, settings, tmp_path)
    message = f"this run's kind (fp32), the checkpoint's is {kind}"
    assert message in run_ranks(untouched, 1, {}, tmp_path, {})[0]


def padded(rank: int, root: Path) -> tuple[bool, bool]:
    """Whether the rows of a vocabulary padded further are the checkpoint's, and the new ones zero."""
    engine, layout = make_engine(vocab=128)
    load(engine, layout, root, no_load_optim=True)
    table = engine.chunks[0].state_dict()["embedding.word_embeddings.weight"]
    small, layout = make_engine()
    load(small, layout, root, no_load_optim=True)
    same = small.chunks[0].state_dict()["embedding.word_embeddings.weight"]
    return torch.equal(table[:96], same), not table[96:].any()


def test_the_same_vocabulary_may_be_padded_otherwise(saved: Path) -> None:
    assert run_ranks(padded, 1, saved) == [(True, True)]


def saved_without(rank: int, root: Path) -> None:
    engine, layout = make_engine()
    save(engine, layout, root, iteration=1, with_optimizer=False, with_rng=False)


def test_weights_saved_alone_need_a_flag_to_go_on(tmp_path: Path) -> None:
    run_ranks(saved_without, 1, tmp_path)
    assert (
        "the checkpoint has no optimizer state; pass --no-load-optim"
        in run_ranks(untouched, 1, {}, tmp_path, {})[0]
    )
    iteration, warned = run_ranks(go_on_without, 1, tmp_path)[0]
    assert iteration == 1
    assert any("for another layout or device and stay as seeded" in text for text in warned)


def go_on_without(rank: int, root: Path) -> tuple[int, list[str]]:
    engine, layout = make_engine()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = load(engine, layout, root, no_load_optim=True)
    return resumed.iteration, [str(warning.message) for warning in caught]


def drawn(rank: int, root: Path, resume_it: bool, flags: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Random numbers after a checkpoint, of the uninterrupted process or of one that loaded it."""
    engine, layout = make_engine(tp=2)
    if resume_it:
        load(engine, layout, root, **flags)
    else:
        train(engine, layout, steps=range(1))
        torch.rand(7)
        save(engine, layout, root, iteration=1)
    with get_cuda_rng_tracker().fork():
        mine = torch.rand(3)
    with get_cuda_rng_tracker().fork("data-parallel-rng"):
        shared = torch.rand(3)
    return torch.rand(3), mine, shared


def test_random_numbers_go_on_where_they_stopped(tmp_path: Path) -> None:
    first = run_ranks(drawn, 2, tmp_path, False, {})
    again = run_ranks(drawn, 2, tmp_path, True, {})
    fresh = run_ranks(drawn, 2, tmp_path, True, {"no_load_rng": True})
    for one, two, new in zip(first, again, fresh, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert not torch.equal(one[0], new[0])
    assert not torch.equal(first[0][1], first[1][1]), "tensor-parallel ranks draw their own"


def plain_load(rank: int, root: Path) -> float:
    """The checkpoint in a plain GPTModel through megatron.core alone; the loss it gives."""
    layout = initialize_model_parallel(tp=2, pp=1, cp=1, virtual_pp=None, seed=0)
    (model,) = make_chunks(make_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    state = {"model": model.sharded_state_dict(metadata={"dp_cp_group": layout.dp_cp_group})}
    loaded = dist_checkpointing.load(state, str(folder_of(root, 2)))
    assert loaded["iteration"] == 2
    model.load_state_dict(loaded["model"])
    batch = next(make_batches(2, total=1))
    losses = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return losses.mean().item()


def our_load(rank: int, root: Path) -> float:
    engine, layout = make_engine()
    load(engine, layout, root)
    batch = next(make_batches(2, total=1))
    args = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    return engine.chunks[0](*args, labels=batch["labels"]).mean().item()


def test_plain_megatron_opens_a_checkpoint(saved: Path) -> None:
    assert run_ranks(plain_load, 2, saved)[0] == pytest.approx(run_ranks(our_load, 1, saved)[0], abs=LOSS)


def foreign(rank: int, root: Path) -> None:
    """A checkpoint as another program would write it: weights and an iteration."""
    engine, _ = make_engine()
    metadata = engine.content_metadata
    state = engine.sharded_state_dict(is_loading=False, with_optimizer=True, content_metadata=metadata)
    folder_of(root, 7).mkdir()
    dist_checkpointing.save({**state, "iteration": 7}, str(folder_of(root, 7)), content_metadata=metadata)
    (root / TRACKER).write_text("7")


def test_weights_of_another_program_start_a_run_and_do_not_continue_one(tmp_path: Path) -> None:
    run_ranks(foreign, 1, tmp_path)
    assert "has weights of another program; pass --finetune" in run_ranks(untouched, 1, {}, tmp_path, {})[0]
    steps, _, resumed = run_ranks(go_on, 1, {}, tmp_path, finetune=True)[0]
    assert resumed.iteration == 0
    (tmp_path / TRACKER).write_text("release")
    folder_of(tmp_path, 7).rename(tmp_path / "release")
    assert "has weights of another program; pass --finetune" in run_ranks(untouched, 1, {}, tmp_path, {})[0]
    assert run_ranks(go_on, 1, {}, tmp_path, finetune=True)[0][0] == steps


def crash(rank: int, root: Path) -> None:
    engine, layout = make_engine()
    save(engine, layout, root, iteration=1)
    true = dist_checkpointing.save

    def dies(*args: Any, **kwargs: Any) -> None:
        true(*args, **kwargs)
        raise OSError("no space left")

    resume.dist_checkpointing.save = dies  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="no space"):
        save(engine, layout, root, iteration=2)
    resume.dist_checkpointing.save = true  # type: ignore[attr-defined]


def save_three(rank: int, root: Path, keep_last: int | None) -> None:
    engine, layout = make_engine()
    for iteration in (2, 3, 4):
        save(engine, layout, root, iteration=iteration, keep_last=keep_last)
    save(engine, layout, root, iteration=4, keep_last=keep_last)  # again: replaced


def test_a_crash_while_saving_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    run_ranks(crash, 2, tmp_path)
    assert iterations(tmp_path) == [1]
    assert open_checkpoint(tmp_path).iteration == 1
    run_ranks(save_three, 1, tmp_path, None)
    assert iterations(tmp_path) == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"iter_000000{i}" for i in (1, 2, 3, 4)),
        TRACKER,
    ], "nothing unfinished is left"


@pytest.mark.parametrize("keep, left", [(1, [4]), (2, [3, 4]), (9, [2, 3, 4])])
def test_the_last_checkpoints_are_kept(keep: int, left: list[int], tmp_path: Path) -> None:
    run_ranks(save_three, 1, tmp_path, keep)
    assert iterations(tmp_path) == left
    assert open_checkpoint(tmp_path).iteration == 4


def keep_none(rank: int, root: Path) -> None:
    engine, layout = make_engine()
    save(engine, layout, root, iteration=1, keep_last=0)


def test_keeping_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="--save-keep-last must be at least 1, got 0"):
        run_ranks(keep_none, 1, tmp_path)


def test_a_checkpoint_tells_its_run_before_it_is_loaded(saved: Path) -> None:
    opened = open_checkpoint(saved)
    assert opened.header == header(2)
    assert opened.shapes["decoder.layers.mlp.linear_fc1.weight"] == (4, 96, 32)
    assert opened.dtypes["sat.layers.0.mlp.kept"] == torch.int64
