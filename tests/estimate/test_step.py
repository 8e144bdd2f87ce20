"""A step's time is the sum of its parts, each worked out by hand for a device whose rates are known."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from megatron_sat.estimate.hardware import FAR, Attended, Choosing, Collective, Product
from megatron_sat.estimate.links import Link
from megatron_sat.estimate.step import (
    KINDS,
    Batch,
    Spread,
    StepTime,
    linears,
    predict_step,
    product_sizes,
    streamed_bytes,
    tensor_seconds,
)
from megatron_sat.model.flops import KeptShape, ModelShape, Recompute, kept_shape, layer_forward_flops, whole
from megatron_sat.rehearsal.memory import layer_matrices
from tests.estimate.tables import ATTENTION, CHOOSING, PER_LOGIT, PER_PARAMETER, PRODUCTS, REPLAYED, STREAM, even

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=256,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=32,
    ffn_hidden_size=640,
    gated=True,
    padded_vocab_size=1024,
    seq_length=128,
)
BATCH = Batch(micro_batch_size=2, micro_batches=3)
TOKENS = 256
ALONE = Spread(layers=(4,))
SLOW, ENDLESS = (Link(source="here", bytes_per_second=each) for each in (1e9, 1e15))
HALF = kept_shape(SHAPE, Fraction(1, 2), selection_groups=1, channel_multiple=1, gqa="group")


def predict(kept: KeptShape, **changes) -> StepTime:
    settings = {"hardware": even(), "batch": BATCH, "spread": ALONE} | changes
    return predict_step(SHAPE, kept, **settings)


def layer_by_hand(kept: KeptShape, *, replayed: bool = False) -> float:
    """Of a micro-batch: operations over rates, bytes over bandwidth."""
    flops = layer_forward_flops(SHAPE, kept)
    attention = 3 * TOKENS * flops.pop("core_attn") / ATTENTION
    streamed = streamed_bytes(SHAPE, kept, tokens=TOKENS, tensor=1, split=False, replayed=replayed)
    return 3 * TOKENS * sum(flops.values()) / PRODUCTS + attention + streamed / STREAM


@pytest.mark.parametrize("kept", [whole(SHAPE), HALF], ids=["dense", "half"])
def test_layers_are_operations_over_rates_and_bytes_over_bandwidth(kept):
    assert predict(kept).layers == pytest.approx(3 * 4 * layer_by_hand(kept))


def test_the_three_products_of_a_layer_are_those_of_its_autograd():
    """(m, n, k) of forward, input and weight gradient, from the shapes of tensors that compute them."""
    x, weight, gradient = torch.empty(7, 3), torch.empty(5, 3), torch.empty(7, 5)
    for kind, (left, right) in {
        "forward": (x, weight.t()),
        "input": (gradient, weight),
        "weight": (gradient.t(), x),
    }.items():
        sizes = (*(left @ right).shape, left.size(1))
        assert product_sizes(kind, tokens=7, inputs=3, outputs=5) == sizes


def test_the_four_linears_hold_the_layers_matrices():
    for kept in (whole(SHAPE), HALF):
        entries = sum(inputs * outputs for inputs, outputs in linears(SHAPE, kept).values())
        assert entries == layer_matrices(SHAPE, kept, tensor=1)
        halves = sum(inputs * outputs for inputs, outputs in linears(SHAPE, kept, tensor=2).values())
        assert 2 * halves == entries


@pytest.mark.parametrize(
    ("tensor", "split", "replayed"), [(1, False, False), (2, False, False), (2, True, False), (1, False, True)]
)
def test_streamed_bytes_are_those_of_the_tensors_that_pass_through_memory(tensor, split, replayed):
    """Kernel by kernel, with the tensors that it reads and writes."""

    def made(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16)

    part = TOKENS // tensor if split else TOKENS
    x = made(part, 256)
    heads, groups, channels = 8 // tensor, 4 // tensor, 640 // tensor
    q, k, v = made(TOKENS, heads * 32), made(TOKENS, groups * 32), made(TOKENS, groups * 32)
    wide = made(TOKENS, channels)
    kernels: list[list[Tensor]] = []
    for _ in range(2):
        kernels.append([x, x])  # norm: in, out
        kernels.append([x, x, x])  # its backward: input, gradient, gradient of the input
        kernels.append([x, x])  # that of its weight: input, gradient
        kernels.append([x, x, x])  # residual: two in, one out
        kernels.append([x, x, x])  # two gradients of one tensor
        if replayed:
            kernels.append([x, x])  # the gradient that comes in, to where the recorded half reads it
        for rotated in (q, k):
            kernels.append([rotated, rotated])  # forward, then backward
    kernels.append([q, k, v, q, k, v])  # gradients of Q, K and V into that of the fused projection
    kernels.append([wide, wide, wide])  # SwiGLU: gate, up, product
    kernels.append([wide, wide, wide, wide])  # gate, up, gradient, gradient of the gate
    kernels.append([wide, wide, wide])  # gate, gradient, gradient of what is gated
    counted = sum(tensor.nbytes for kernel in kernels for tensor in kernel)
    sizes = {"tokens": TOKENS, "tensor": tensor, "split": split, "replayed": replayed}
    assert streamed_bytes(SHAPE, whole(SHAPE), **sizes) == counted


def test_the_head_is_its_products_and_a_price_a_logit():
    logits = TOKENS * 1024
    assert predict(HALF).loss == pytest.approx(3 * (3 * 2 * 256 * logits / PRODUCTS + PER_LOGIT * logits))


def test_the_update_is_a_price_a_parameter_and_is_shared_where_it_is_sharded():
    parameters = 4 * (layer_matrices(SHAPE, whole(SHAPE), tensor=1) + 2 * 256) + 2 * 1024 * 256 + 256
    alone = predict(HALF).update
    assert alone == pytest.approx(PER_PARAMETER * parameters)
    assert predict(HALF, tied=True).update == pytest.approx(PER_PARAMETER * (parameters - 1024 * 256))
    shared = replace(ALONE, data=4, data_link=SLOW, shards_update=True)
    assert predict(HALF, spread=shared).update == pytest.approx(alone / 4)
    assert predict(HALF, spread=replace(shared, shards_update=False)).update == pytest.approx(alone)


def test_choosing_is_once_a_step_or_once_in_so_many_and_never_of_a_dense_one():
    assert predict(HALF).choosing == pytest.approx(4 * CHOOSING)
    assert predict(HALF, interval=5).choosing == pytest.approx(4 * CHOOSING / 5)
    assert predict(HALF, graphs=True).choosing == pytest.approx(4 * REPLAYED)
    assert predict(whole(SHAPE)).choosing == 0.0


def test_a_layer_that_is_faster_than_its_launches_waits_for_them_unless_it_is_replayed():
    slow_host = even(launch_seconds=2 * layer_by_hand(HALF))
    assert predict(HALF, hardware=slow_host).layers == pytest.approx(3 * 4 * 2 * layer_by_hand(HALF))
    replayed = predict(HALF, hardware=slow_host, graphs=True).layers
    assert replayed == pytest.approx(3 * 4 * layer_by_hand(HALF, replayed=True))
    fast_host = even(launch_seconds=0.5 * layer_by_hand(HALF))
    assert predict(HALF, hardware=fast_host).layers == predict(HALF).layers


def test_recomputation_runs_forwards_again():
    flops = layer_forward_flops(SHAPE, HALF)
    base = predict(HALF).layers
    mlp = predict(HALF, recompute=Recompute(parts=("mlp",))).layers - base
    assert mlp == pytest.approx(12 * TOKENS * flops["mlp"] / PRODUCTS)
    attention = predict(HALF, recompute=Recompute(parts=("core_attn",))).layers - base
    assert attention == pytest.approx(12 * 2 / 7 * 3 * TOKENS * flops["core_attn"] / ATTENTION)
    full = predict(HALF, recompute=Recompute(parts=("full",))).layers - base
    assert mlp + attention < full < base
    some = predict(HALF, recompute=Recompute(parts=("full",), layers=1)).layers - base
    assert some == pytest.approx(full / 4)


def test_tensor_parallelism_divides_the_products_and_pays_for_four_sums():
    spread = Spread(layers=(4,), tensor=2, tensor_link=SLOW)
    sums = 4 * 2 * (1 / 2) * TOKENS * 256 * 2 / 1e9
    assert tensor_seconds(SHAPE, tokens=TOKENS, spread=spread) == pytest.approx(sums)
    found, alone = predict(whole(SHAPE), spread=spread), predict(whole(SHAPE))
    assert found.tensor == pytest.approx(3 * 4 * sums)
    assert 0.5 * alone.layers < found.layers < 0.75 * alone.layers, "norms are whole on each rank"
    split = predict(whole(SHAPE), spread=replace(spread, sequence_parallel=True))
    assert split.layers == pytest.approx(0.5 * alone.layers)
    assert split.loss == pytest.approx(0.5 * alone.loss)
    assert alone.tensor == 0.0


def test_with_sequence_parallelism_a_sum_is_two_halves_of_another_collective():
    size = TOKENS * 256 * 2
    whole_sum, half = 3e-3, 2e-3
    rows = (
        Collective(kind="all-reduce", ranks=2, size=size, seconds=whole_sum),
        Collective(kind="reduce-scatter", ranks=2, size=size, seconds=half),
    )
    spread = Spread(layers=(4,), tensor=2, tensor_link=replace(SLOW, measured=rows))
    assert tensor_seconds(SHAPE, tokens=TOKENS, spread=spread) == pytest.approx(4 * whole_sum)
    split = replace(spread, sequence_parallel=True)
    assert tensor_seconds(SHAPE, tokens=TOKENS, spread=split) == pytest.approx(4 * 2 * half)
    unmeasured = [replace(each, tensor_link=SLOW) for each in (spread, split)]
    by_ring = [tensor_seconds(SHAPE, tokens=TOKENS, spread=each) for each in unmeasured]
    assert by_ring[0] == pytest.approx(by_ring[1])


def test_replicas_wait_for_the_collective_that_they_use():
    parameters = 4 * layer_matrices(SHAPE, whole(SHAPE), tensor=1) + 4 * 2 * 256 + 2 * 1024 * 256 + 256
    divided, size = 2 * 4 * parameters / STREAM, 4 * parameters
    rows = (
        Collective(kind="all-reduce", ranks=2, size=size, seconds=3.0),
        Collective(kind="reduce-scatter", ranks=2, size=size, seconds=2.0),
    )
    spread = Spread(layers=(4,), data=2, data_link=replace(SLOW, measured=rows))
    assert predict(HALF, spread=spread).reduction == pytest.approx(3.0 + divided)
    gathered = 2.0 / 2  # bf16, at the pace of reducing into parts
    found = predict(HALF, spread=replace(spread, shards_update=True)).reduction
    assert found == pytest.approx(2.0 + gathered + divided)


def test_replicas_reduce_what_is_kept_and_hide_what_they_can():
    spread = Spread(layers=(4,), data=2, data_link=SLOW)
    matrices = [4 * layer_matrices(SHAPE, kept, tensor=1) for kept in (whole(SHAPE), HALF)]
    parameters = matrices[0] + 4 * 2 * 256 + 2 * 1024 * 256 + 256
    whole_reduction = predict(HALF, spread=spread).reduction
    divided = 2 * 4 * parameters / STREAM
    assert whole_reduction == pytest.approx(2 * (1 / 2) * 4 * parameters / 1e9 + divided)
    sparse = predict(HALF, spread=replace(spread, sparse_reduction=True)).reduction
    assert whole_reduction - sparse == pytest.approx(2 * (1 / 2) * 4 * (matrices[0] - matrices[1]) / 1e9)
    hidden = predict(HALF, spread=replace(spread, overlaps_reduction=True)).reduction
    assert whole_reduction - hidden == pytest.approx(2 / 3 * 4 * layer_by_hand(HALF))
    fast = replace(spread, overlaps_reduction=True, data_link=ENDLESS)
    assert predict(HALF, spread=fast).reduction == pytest.approx(divided), "nothing computes beside it"
    assert predict(HALF).reduction == 0.0


def test_replicas_that_update_a_part_each_get_half_a_reduction_and_gather_the_rest():
    spread = Spread(layers=(4,), data=4, data_link=SLOW, shards_update=True)
    parameters = 4 * layer_matrices(SHAPE, whole(SHAPE), tensor=1) + 4 * 2 * 256 + 2 * 1024 * 256 + 256
    scattered, gathered = (3 / 4 * size * parameters / 1e9 for size in (4, 2))
    found = predict(HALF, spread=spread).reduction
    divided = 2 * 4 * parameters / STREAM
    assert found == pytest.approx(scattered + gathered + divided)
    beside = replace(spread, overlaps_reduction=True)
    assert found - predict(HALF, spread=beside).reduction == pytest.approx(2 / 3 * 4 * layer_by_hand(HALF))
    both = replace(beside, overlaps_gathering=True)
    assert found - predict(HALF, spread=both).reduction == pytest.approx(4 * layer_by_hand(HALF))
    assert predict(HALF, spread=replace(both, data_link=ENDLESS)).reduction == pytest.approx(divided)
    sparse = predict(HALF, spread=replace(spread, sparse_reduction=True)).reduction
    assert gathered < sparse < found, "parameters are gathered whole"


def test_pipeline_ranks_wait_for_the_one_that_takes_longest():
    found = predict(HALF, spread=Spread(layers=(2, 2)))
    micro_batch = (found.layers + found.loss) / 3
    assert found.loss > 0, "the last rank has the head, and so takes longest"
    assert found.waiting == pytest.approx(micro_batch)
    assert predict(HALF, spread=Spread(layers=(2, 2), virtual=2)).waiting == pytest.approx(micro_batch / 2)
    uneven = predict(HALF, spread=Spread(layers=(4, 1)))
    assert uneven.loss == 0.0, "the first rank takes longest, and has no head"
    assert uneven.layers == pytest.approx(predict(HALF).layers)
    assert predict(HALF).waiting == 0.0


def test_a_steps_seconds_are_its_parts():
    found = predict(HALF, spread=Spread(layers=(2, 2), data=2, data_link=SLOW, tensor=2, tensor_link=SLOW))
    assert all(seconds > 0 for seconds in found.parts().values())
    assert found.seconds == pytest.approx(sum(found.parts().values()))


def test_a_table_of_these_very_shapes_is_at_no_distance_and_others_are_far():
    pairs = [*linears(SHAPE, HALF).values(), (256, 1024)]
    sizes = [(kind, product_sizes(kind, tokens=TOKENS, inputs=i, outputs=o)) for kind in KINDS for i, o in pairs]
    every, some = (layer_matrices(SHAPE, kept, tensor=1) for kept in (whole(SHAPE), HALF))
    measured = even(
        products=tuple(Product(kind=kind, m=m, n=n, k=k, seconds=1e-3) for kind, (m, n, k) in sizes),
        attention=(Attended(batch=2, sequence=128, heads=4, groups=2, head_dim=32, seconds=2e-3),),
        choosing=(Choosing(weights=every, kept=some, seconds=4e-3, device_seconds=0.0),),
    )
    found = predict(HALF, hardware=measured)
    assert found.distance == 0.0
    streamed = streamed_bytes(SHAPE, HALF, tokens=TOKENS, tensor=1, split=False, replayed=False) / STREAM
    assert found.layers == pytest.approx(12 * (12 * 1e-3 + 2e-3 + streamed))
    assert found.choosing == pytest.approx(4 * 4e-3)
    assert predict_step(SHAPE, whole(SHAPE), hardware=measured, batch=BATCH, spread=ALONE).distance > 0
    huge = replace(SHAPE, hidden_size=10**6)
    assert predict_step(huge, HALF, hardware=measured, batch=BATCH, spread=ALONE).distance > FAR
