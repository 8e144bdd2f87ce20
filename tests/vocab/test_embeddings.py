"""New rows from old ones."""

import pytest
import torch

from megatron_sat.vocab.embeddings import INITS, new_rows, padded, padding_row
from tests.helpers.tolerances import FP32_SUMS

OLD = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
SUBTOKENS = [[1, 2, 3], [7], [4, 4, 9, 11]]


def rows(init: str, *, match_norms: bool = False, old: torch.Tensor = OLD, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return new_rows(old, subtokens=SUBTOKENS, init=init, match_norms=match_norms, generator=generator)


def test_a_piece_begins_as_the_mean_of_what_spelt_it() -> None:
    expected = torch.stack([torch.stack([OLD[i] for i in ids]).mean(0) for ids in SUBTOKENS])
    torch.testing.assert_close(rows("subtoken-mean"), expected, **FP32_SUMS)


def test_matched_rows_have_the_mean_norm_of_what_they_are_made_from() -> None:
    expected = torch.tensor([sum(float(OLD[i].norm()) for i in ids) / len(ids) for ids in SUBTOKENS])
    matched = rows("subtoken-mean", match_norms=True)
    torch.testing.assert_close(matched.norm(dim=1), expected, **FP32_SUMS)
    assert rows("subtoken-mean").norm(dim=1)[0] < expected[0]
    torch.testing.assert_close(matched[1], OLD[7], **FP32_SUMS)


@pytest.mark.parametrize("init", [init for init in INITS if init != "subtoken-mean"])
def test_drawn_rows_can_have_the_norm_of_the_old_ones(init: str) -> None:
    norms = rows(init, match_norms=True).norm(dim=1)
    torch.testing.assert_close(norms, OLD.norm(dim=1).mean().expand(3), **FP32_SUMS)


def test_the_mean_is_that_of_all_old_rows() -> None:
    torch.testing.assert_close(rows("mean"), OLD.mean(0).expand(3, -1), **FP32_SUMS)


def test_drawn_rows_have_the_spread_that_they_are_said_to_have() -> None:
    many = [[0]] * 20_000
    old = OLD[:, :3] @ torch.tensor([[1.0, 0.9, 0], [0, 1.0, 0], [0, 0, 2.0]])

    def spread(init: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        drawn = new_rows(old.double(), subtokens=many, init=init, match_norms=False, generator=generator)
        return torch.cov((drawn - drawn.mean(0)).double().T)

    torch.testing.assert_close(spread("random"), torch.eye(3).double() * float(old.var()), rtol=0.05, atol=0.3)
    noise = torch.diag(old.var(0)).double() * 0.1**2
    torch.testing.assert_close(spread("mean+noise"), noise, rtol=0.05, atol=0.01)
    torch.testing.assert_close(spread("multivariate") * 1e9, torch.cov(old.T).double(), rtol=0.1, atol=0.7)


def test_the_same_seed_draws_the_same_rows() -> None:
    assert torch.equal(rows("random"), rows("random"))
    assert not torch.equal(rows("random"), rows("random", seed=2))


def test_low_precision_is_averaged_in_fp32() -> None:
    assert rows("subtoken-mean", old=OLD.bfloat16()).dtype == torch.float32


def test_an_unknown_init_is_refused() -> None:
    with pytest.raises(ValueError, match="--init must be one of subtoken-mean, .*, got zeros; try subtoken-mean"):
        rows("zeros")


def test_the_logit_of_a_padding_row_is_never_the_largest() -> None:
    hidden = torch.randn(1000, 8, generator=torch.Generator().manual_seed(3)) * 10
    assert ((hidden @ OLD.T).max(dim=1).values > hidden @ padding_row(OLD)).all()


@pytest.mark.parametrize(("size", "tp", "expected"), [(65_000, 1, 65_024), (65_024, 1, 65_024), (65_025, 8, 65_536)])
def test_rows_are_padded_to_a_multiple_for_every_rank(size: int, tp: int, expected: int) -> None:
    assert padded(size, multiple=128, tensor_parallel=tp) == expected


def test_padding_to_nothing_is_refused() -> None:
    with pytest.raises(
        ValueError, match="--pad-to \\(0\\) and --tensor-model-parallel-size \\(1\\) must be at least 1"
    ):
        padded(10, multiple=0, tensor_parallel=1)
