"""The gate's own judgement, on made-up traces; tests/convert runs it on models."""

import math
from typing import Any

import pytest
import torch

from megatron_sat.checkpoint import parity
from megatron_sat.checkpoint.parity import Recorded, check_first_loss, compare, record, refuse, sample
from megatron_sat.checkpoint.traces import Trace

IDS = [1, 5, 2, 7, 3]
VOCAB, ROWS = 8, 12


def _trace(*, rows: int = VOCAB) -> Trace:
    generator = torch.Generator().manual_seed(0)
    names = ["embedding", "layer 0 attention", "layer 0 MLP", "layer 0", "layer 10", "final norm"]
    logits = torch.randn(len(IDS), VOCAB, generator=generator)
    padding = logits.mean(-1, keepdim=True).expand(-1, rows - VOCAB)
    return {name: torch.randn(len(IDS), 4, generator=generator) for name in names} | {
        "logits": torch.cat([logits, padding], dim=-1)
    }


def _compared(change: dict[str, Any], *, dtype: torch.dtype = torch.float32) -> parity.Report:
    found = _trace(rows=ROWS)
    for name, edit in change.items():
        edit(found[name])
    return compare(_trace(), found, ids=IDS, vocab_size=VOCAB, dtype=dtype, layout="TP=1, PP=1")


def test_equal_traces_pass():
    report = _compared({})
    assert report.passed and report.first is None and report.max_delta == 0.0 and report.same_top == 1.0
    refuse(report)


@pytest.mark.parametrize("delta, passes", [(0.9e-4, True), (1.5e-4, False)])
def test_fp32_logits_must_be_within_the_limit(delta, passes):
    assert _compared({"logits": lambda logits: logits[2, 3].add_(delta)}).passed == passes


@pytest.mark.parametrize("share, passes", [(1.9e-5, True), (2.1e-5, False)])
def test_on_a_gpu_the_limit_grows_with_the_logits(share, passes):
    reference, found = _trace(), _trace(rows=ROWS)
    for trace in (reference, found):
        trace["logits"] *= 100
    found["logits"][2, 3] += share * reference["logits"].abs().max()
    asked = {"ids": IDS, "vocab_size": VOCAB, "dtype": torch.float32, "layout": "TP=1, PP=1"}
    assert compare(reference, found, on_gpu=True, **asked).passed == passes
    assert not compare(reference, found, **asked).passed


def test_the_first_place_that_differs_is_named_though_later_ones_differ_more():
    def nudge(value: torch.Tensor) -> None:
        value[0, 0] += 0.01

    report = _compared({"layer 10": lambda value: value.add_(5.0), "layer 0 MLP": nudge, "logits": nudge})
    assert report.first is not None and report.first[0] == "layer 0 MLP"
    with pytest.raises(ValueError, match=r"must compute the same: .* first place that differs: layer 0 MLP"):
        refuse(report)


def test_a_model_that_computes_nan_does_not_pass():
    report = _compared({"logits": lambda logits: logits[0, 0].fill_(math.nan)})
    assert not report.passed and report.first is not None and report.first[0] == "logits"


def test_bf16_is_held_to_the_likeliest_token():
    assert _compared({"logits": lambda logits: logits.add_(0.01)}, dtype=torch.bfloat16).passed
    assert not _compared({"logits": lambda logits: logits[0].neg_()}, dtype=torch.bfloat16).passed


def test_a_padding_row_that_is_likeliest_fails_the_gate():
    report = _compared({"logits": lambda logits: logits[1, ROWS - 1].fill_(50.0)})
    assert report.padding_predicted == 1 and not report.passed
    assert "a padding row is likeliest 1 times" in str(report)


def test_the_loss_counts_padding_as_training_does():
    report = _compared({})
    logits = _trace(rows=ROWS)["logits"]
    by_hand = [-math.log(math.exp(logits[i, IDS[i + 1]]) / sum(map(math.exp, logits[i]))) for i in range(len(IDS) - 1)]
    assert report.loss == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    assert report.reference_loss < report.loss < report.reference_loss + math.log(ROWS / VOCAB)


def test_a_recorded_loss_is_read_back_and_cut_to_a_shorter_text(tmp_path):
    recorded = record(_trace(), ids=IDS, padded_vocab_size=ROWS)
    recorded.save(tmp_path / "loss.json")
    assert Recorded.load(tmp_path / "loss.json") == recorded
    assert recorded.expected(2) == pytest.approx(sum(recorded.padded_losses[:2]) / 2)
    assert recorded.expected(4096) == pytest.approx(sum(recorded.padded_losses) / 4)


def test_the_recorded_text_is_a_micro_batch_of_any_size():
    recorded = record(_trace(), ids=IDS, padded_vocab_size=ROWS)
    batch = recorded.batch(6, micro_batch_size=2)
    assert batch["tokens"].tolist() == [[1, 5, 2, 7, 0, 0]] * 2
    assert batch["labels"].tolist() == [[5, 2, 7, 3, 0, 0]] * 2
    assert batch["loss_mask"].tolist() == [[1, 1, 1, 1, 0, 0]] * 2
    assert recorded.batch(2, micro_batch_size=1)["loss_mask"].tolist() == [[1, 1]]


def test_a_recorded_loss_counts_padding_as_training_will():
    recorded = record(_trace(), ids=IDS, padded_vocab_size=ROWS)
    assert recorded.expected(4) == pytest.approx(_compared({}).loss, rel=1e-6)
    assert sum(recorded.losses) / 4 == pytest.approx(_compared({}).reference_loss, rel=1e-6)
    without = record(_trace(), ids=IDS, padded_vocab_size=VOCAB)
    assert without.padded_losses == without.losses


def test_a_file_that_is_no_recorded_loss_is_refused(tmp_path):
    (tmp_path / "loss.json").write_text('{"x": 1}')
    with pytest.raises(ValueError, match="loss.json must be a recorded loss"):
        Recorded.load(tmp_path / "loss.json")


def test_the_first_loss_is_shown_beside_the_recorded_one():
    line = check_first_loss(2.8667, measured=2.8670, tolerance=1e-3)
    assert line == "step      0 | loss on the imported model's sample 2.8670, Hugging Face's 2.8667"


@pytest.mark.parametrize("measured", [2.9, 10.8, math.nan, math.inf])
def test_a_first_loss_that_is_apart_is_refused_unless_overridden(measured):
    with pytest.raises(ValueError, match="first loss must be Hugging Face's 2.8667 within 0.001 nats, got"):
        check_first_loss(2.8667, measured=measured, tolerance=1e-3)
    assert "as --allow-first-loss-apart permits" in check_first_loss(
        2.8667, measured=measured, tolerance=1e-3, override=True
    )


def test_a_sample_is_no_longer_than_the_model_and_no_id_beyond_it():
    assert sample(lambda text: list(range(1000)), vocab_size=1000, longest=10) == list(range(10))
    with pytest.raises(ValueError, match="must be the model's, it gives id 255 and the model has 100 rows"):
        sample(lambda text: list(range(1000)), vocab_size=100, longest=9999)
