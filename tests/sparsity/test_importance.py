"""The metrics against their equations written as loops: signed, in fp32, and as sums that ranks can add."""

import pytest
import torch

from megatron_sat.sparsity import importance
from megatron_sat.sparsity.importance import METRICS
from megatron_sat.sparsity.neurons import Channels, Heads
from tests.helpers.reference import (
    label_qkv,
    literal_contribution,
    literal_head_scores,
    literal_scores,
    mean,
)
from tests.helpers.tolerances import EXACT, FP32_SUMS

OF_ROWS = ["uniform", "magnitude", "wanda", "maxip"]
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens_of(width: int, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[s, b, width] whose columns have means of their own, as hidden states do."""
    return random(5, 2, width, seed=2, dtype=dtype) + random(width, seed=3, dtype=dtype)


def scores_of(metric: str, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return METRICS[metric].score(weight, METRICS[metric].sums(tokens))


def close(scores: torch.Tensor, literal: list[float]) -> bool:
    return torch.allclose(scores.double(), torch.tensor(literal, dtype=torch.float64), **FP32_SUMS)


def test_the_table_holds_the_four_metrics_of_the_paper_and_our_own():
    assert list(METRICS) == ["uniform", "magnitude", "wanda", "maxip", "contribution"]
    assert [metric.needs for metric in METRICS.values()] == [
        "nothing",
        "nothing",
        "inputs",
        "inputs",
        "activations",
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", OF_ROWS)
def test_a_metric_of_rows_is_its_equation_read_literally_and_in_fp32(metric, dtype):
    weight, tokens = random(7, 6, dtype=dtype), tokens_of(6, dtype=dtype)
    scores = scores_of(metric, weight, tokens)

    assert scores.dtype == torch.float32
    assert close(scores, literal_scores(metric, weight, tokens.view(-1, 6)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_contribution_is_rms_activation_times_the_norm_of_the_output_column(dtype):
    weight, activations = random(6, 9, dtype=dtype), tokens_of(9, dtype=dtype)
    scores = scores_of("contribution", weight, activations)

    assert scores.dtype == torch.float32
    assert close(scores, literal_contribution(weight, activations.view(-1, 9)))


@pytest.mark.parametrize("metric", ["wanda", "maxip"])
def test_scores_in_bf16_arithmetic_would_be_told_apart(metric):
    weight, tokens = random(7, 6, dtype=torch.bfloat16), tokens_of(6, dtype=torch.bfloat16)
    flat = tokens.view(-1, 6)
    vector = flat.mean(0) if metric == "maxip" else torch.linalg.vector_norm(flat, dim=0)

    assert not close(weight @ vector, literal_scores(metric, weight, flat))


@pytest.mark.parametrize("metric", ["wanda", "maxip"])
def test_scores_carry_the_sign_of_the_weights(metric):
    weight, tokens = random(7, 6), tokens_of(6)
    scores = scores_of(metric, weight, tokens)

    assert (scores < 0).any()
    torch.testing.assert_close(scores_of(metric, -weight, tokens), -scores, **EXACT)
    assert not torch.allclose(scores_of(metric, weight.abs(), tokens), scores.abs(), **FP32_SUMS)


def test_maxip_carries_the_sign_of_the_tokens_and_wanda_does_not():
    weight, tokens = random(7, 6), tokens_of(6)

    torch.testing.assert_close(
        scores_of("maxip", weight, -tokens), -scores_of("maxip", weight, tokens), **EXACT
    )
    torch.testing.assert_close(
        scores_of("wanda", weight, -tokens), scores_of("wanda", weight, tokens), **EXACT
    )


def test_maxip_does_not_depend_on_the_number_of_tokens_and_wanda_grows_with_its_root():
    weight, tokens = random(7, 6), tokens_of(6)
    four = torch.cat([tokens] * 4)

    torch.testing.assert_close(
        scores_of("maxip", weight, four), scores_of("maxip", weight, tokens), **FP32_SUMS
    )
    torch.testing.assert_close(
        scores_of("wanda", weight, four), 2 * scores_of("wanda", weight, tokens), **FP32_SUMS
    )


@pytest.mark.parametrize("metric", METRICS)
def test_sums_of_parts_added_up_score_as_all_tokens_do(metric):
    weight, tokens = random(6, 6), tokens_of(6)
    sums = METRICS[metric].sums
    parts = sums(tokens[:1]) + sums(tokens[1:4]) + sums(tokens[4:])  # 2, 6 and 2 tokens

    torch.testing.assert_close(
        METRICS[metric].score(weight, parts), scores_of(metric, weight, tokens), **FP32_SUMS
    )


def test_the_mean_of_means_of_unequal_parts_would_be_told_apart():
    weight, tokens = random(6, 6), tokens_of(6)
    naive = (scores_of("maxip", weight, tokens[:1]) + scores_of("maxip", weight, tokens[1:])) / 2

    assert not torch.allclose(naive, scores_of("maxip", weight, tokens), **FP32_SUMS)


@pytest.mark.parametrize("metric", METRICS)
def test_sums_are_fp32_and_end_in_the_number_of_tokens(metric):
    sums = METRICS[metric].sums(tokens_of(6, dtype=torch.bfloat16))

    assert sums.dtype == torch.float32
    assert sums.shape == ((1,) if METRICS[metric].needs == "nothing" else (7,))
    assert sums[-1].item() == 10


def test_the_sum_of_many_16_bit_tokens_does_not_stall():
    ones = torch.ones(3000, 1, dtype=torch.bfloat16)

    assert METRICS["maxip"].sums(ones).tolist() == METRICS["wanda"].sums(ones).tolist() == [3000.0, 3000.0]
    assert sum(ones[:, 0]).item() == 256  # what adding in bf16 comes to


@pytest.mark.parametrize("metric", ["wanda", "maxip"])
def test_rows_scored_a_block_at_a_time_score_as_all_at_once(metric, monkeypatch):
    weight, tokens = random(7, 6, dtype=torch.bfloat16), tokens_of(6)
    whole = scores_of(metric, weight, tokens)
    monkeypatch.setattr(importance, "ROWS_AT_ONCE", 3)

    torch.testing.assert_close(scores_of(metric, weight, tokens), whole, **FP32_SUMS)


def test_what_is_compiled_on_a_gpu_adds_up_in_fp32():
    """Here it is not compiled."""
    weight, vector = random(7, 6, dtype=torch.bfloat16), random(6)
    found = importance._widened(weight, vector)

    assert found.dtype == torch.float32
    assert close(found, [sum(w * v for w, v in zip(row, vector.tolist(), strict=True)) for row in weight.tolist()])


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(7, 6), (48, 320)])
def test_bf16_weights_on_a_gpu_score_as_the_loops_say(metric, shape):
    weight, tokens = random(*shape, dtype=torch.bfloat16), tokens_of(shape[1], dtype=torch.bfloat16)
    on_gpu = scores_of(metric, weight.cuda(), tokens.cuda())
    flat = tokens.view(-1, shape[1])
    by_rows = metric != "contribution"
    literal = literal_scores(metric, weight, flat) if by_rows else literal_contribution(weight, flat)

    assert on_gpu.dtype == torch.float32
    assert close(on_gpu.cpu(), literal)


@pytest.mark.parametrize("whole_groups", [True, False])
@pytest.mark.parametrize("metric", OF_ROWS)
def test_heads_of_a_real_projection_score_as_equations_5_to_7_say(metric, whole_groups):
    heads = Heads(groups=2, heads_per_group=3, head_dim=2, whole_groups=whole_groups)
    labels = label_qkv(groups=2, heads_per_group=3, head_dim=2)
    weight, tokens = random(len(labels), 6), tokens_of(6)

    per_row = literal_scores(metric, weight, tokens.view(-1, 6))
    literal = literal_head_scores(per_row, labels, whole_groups=whole_groups)
    scores = heads.scores_of_rows(scores_of(metric, weight, tokens))
    assert close(scores, [literal[key] for key in sorted(literal)])


@pytest.mark.parametrize("whole_groups", [True, False])
def test_heads_of_a_real_projection_contribute_the_mean_of_their_columns(whole_groups):
    heads = Heads(groups=2, heads_per_group=3, head_dim=2, whole_groups=whole_groups)
    weight, activations = random(6, 12), tokens_of(12)

    per_column = literal_contribution(weight, activations.view(-1, 12))
    size = 6 if whole_groups else 2
    literal = [mean(per_column[at : at + size]) for at in range(0, 12, size)]
    assert close(heads.scores_of_columns(scores_of("contribution", weight, activations)), literal)


@pytest.mark.parametrize("source", ["gate", "up", "gate+up"])
@pytest.mark.parametrize("metric", OF_ROWS)
def test_gated_channels_score_by_gate_or_up_or_the_mean_of_both(metric, source):
    gate, up, tokens = random(5, 6, seed=4), random(5, 6, seed=5), tokens_of(6)
    channels = Channels(units=5, gated=True, score_source=source)

    by_gate, by_up = (literal_scores(metric, weight, tokens.view(-1, 6)) for weight in (gate, up))
    both = [mean([g, u]) for g, u in zip(by_gate, by_up, strict=True)]
    scores = channels.scores_of_rows(scores_of(metric, channels.scored_rows(torch.cat([gate, up])), tokens))
    assert close(scores, {"gate": by_gate, "up": by_up, "gate+up": both}[source])
