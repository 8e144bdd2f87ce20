"""Operations of a baseline by its source's count, against every product written out."""

from fractions import Fraction

import pytest

from megatron_sat.baselines.settings import MstConfig, SpdfConfig
from megatron_sat.counting import count_mst, count_spdf
from megatron_sat.model.flops import ModelShape, masked_step_flops, step_flops, whole
from megatron_sat.sparsity.growing import Growing
from megatron_sat.sparsity.schedule import ScheduleConfig

SHAPE = ModelShape(
    num_layers=3,
    hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,
    ffn_hidden_size=24,
    gated=True,
    padded_vocab_size=50,
    seq_length=8,
)


def written_out(density: float, *, tokens: int) -> float:
    """Forward and twice the forward, two operations a weight and token; a token attends to 4.5 tokens on average."""
    weights = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
    attention = 2 * (2 * 16 * 4.5)
    return 3 * tokens * (3 * (2 * density * weights + attention) + 2 * 16 * 50)


@pytest.mark.parametrize("density", [Fraction(1), Fraction(1, 2), Fraction(1, 10)])
def test_a_weight_that_is_left_out_costs_nothing(density: Fraction) -> None:
    assert float(masked_step_flops(SHAPE, density=density, tokens=32)) == written_out(float(density), tokens=32)


def test_a_dense_step_is_counted_as_everywhere() -> None:
    assert masked_step_flops(SHAPE, density=Fraction(1), tokens=32) == step_flops(SHAPE, whole(SHAPE), tokens=32)


def test_spdf_is_sparse_until_its_step_and_dense_after_it() -> None:
    config = SpdfConfig(rate=Fraction(1, 2), until=6, mask="magnitude", seed=1)
    counted = count_spdf(config, shape=SHAPE, tokens_per_step=32, steps=8)
    assert [(s.first, s.last, s.density) for s in counted.stretches] == [(1, 6, Fraction(1, 2)), (7, 8, 1)]
    expected = 6 * written_out(0.5, tokens=32) + 2 * written_out(1, tokens=32)
    assert float(counted.share) == pytest.approx(expected / (8 * written_out(1, tokens=32)))
    told = counted.as_dict()
    assert told["share_of_dense"] == float(counted.share)
    assert told["stretches"][0]["step_flops"] == written_out(0.5, tokens=32)
    assert counted.lines()[0] == (
        "SPDF: 0.5 of each matrix's weights, by magnitude, are zero until step 6; then all train"
    )
    assert counted.lines()[1].startswith(f"counted as published: {float(counted.share):.3f} of a dense run's operat")


def test_spdf_to_the_end_has_one_stretch() -> None:
    config = SpdfConfig(rate=Fraction(1, 2), until=8, mask="random", seed=1)
    assert len(count_spdf(config, shape=SHAPE, tokens_per_step=32, steps=8).stretches) == 1


def mst(*, stride: int) -> MstConfig:
    schedule = ScheduleConfig(
        kind="mst", omission_rate=Fraction(1, 2), train_iters=12, warmup=4, restoration=4, stages=2, interval=2
    )
    growing = Growing(replaced=0.3, random_share=0.25, last_step=12)
    return MstConfig(schedule=schedule, growing=growing, attention_stride=stride, seed=1)


def test_mst_is_counted_as_published() -> None:
    """(3 f_S Δ + 2 f_S + f_D) / (Δ + 1), Δ = 2, f a forward."""
    counted = count_mst(mst(stride=0), shape=SHAPE, tokens_per_step=32)
    f_d = written_out(1, tokens=32) / 3
    for stretch, density in zip(counted.stretches, (1, 1 - 7 / 16, 0.5, 1 - 7 / 16, 1), strict=True):
        f_s = written_out(density, tokens=32) / 3
        assert float(stretch.flops) == pytest.approx((3 * f_s * 2 + 2 * f_s + f_d) / 3)
    assert [(s.first, s.last) for s in counted.stretches] == [(1, 2), (3, 4), (5, 8), (9, 10), (11, 12)]
    assert "attention" not in counted.what


def test_hybrid_attention_costs_less_in_the_ultra_sparse_phase_alone() -> None:
    dense, hybrid = (count_mst(mst(stride=stride), shape=SHAPE, tokens_per_step=32) for stride in (0, 2))
    cheaper = [there.flops < here.flops for there, here in zip(hybrid.stretches, dense.stretches, strict=True)]
    assert cheaper == [False, False, True, False, False]
    assert "attention is to the last 2 tokens and every 2-th" in hybrid.what
