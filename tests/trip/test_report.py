"""The report of a trip: every number from the findings, the dense run at equal time in every table and sentence."""

from pathlib import Path

import pytest

from megatron_sat.compare.provenance import Provenance
from megatron_sat.trip.report import in_short, write_report
from tests.trip.findings import findings, result

TOLD = Provenance(command="adapt_chinese.sh smol out", commit="abc1234", machine="1 x H100", libraries="torch 2.14")
CONTROL = "dense for SAT's time"


def test_the_short_form_says_what_was_added_gained_and_lost_and_who_is_ahead_at_equal_time(tmp_path: Path) -> None:
    added, zh, en, cost, time, steps, speed, export = in_short(findings(tmp_path))
    assert added == (
        "8,000 pieces were added to 49,152; 1 of 1 proofs hold; a character of held-out zh needs 0.750 tokens, it "
        "needed 1.500."
    )
    bits = "Bits a character of {}, mean of its domains: original {}, extended {}, SAT {}, dense {}, {} {}."
    assert zh == bits.format("zh", "9.000", "10.000", "5.500", "5.000", CONTROL, "5.250")
    assert en == bits.format("en", "2.000", "2.000", "2.250", "2.500", CONTROL, "2.375")
    against = "What en cost, bits a character against original (2.000)"
    assert cost == f"{against}: SAT +0.250, dense +0.500, {CONTROL} +0.375."
    assert time == (
        f"At equal training time: on zh {CONTROL} is ahead of SAT by 0.250 bits a character (5.250 against 5.500); "
        f"on en SAT is ahead of {CONTROL} by 0.125 bits a character (2.250 against 2.375)."
    )
    assert steps == (
        "After equally many steps: on zh dense is ahead of SAT by 0.500 bits a character (5.000 against 5.500); on en "
        "SAT is ahead of dense by 0.250 bits a character (2.250 against 2.500)."
    )
    assert speed.startswith("A step of SAT took 20.0% less time than one of dense and executed 40.0% fewer operations")
    assert export == (
        "The exported folder, read by transformers, and SAT's checkpoint differ by 0.0e+00 bits a character at most "
        "(allowed: 0.001): equal but for rounding."
    )


def test_models_that_print_alike_are_level(tmp_path: Path) -> None:
    found = findings(tmp_path, control=result(CONTROL, zh=5.5, en=2.25))
    assert f"on zh SAT and {CONTROL} are level (5.500)" in in_short(found)[4]


@pytest.mark.parametrize(("dtype", "off", "equal"), [("fp32", 5e-4, True), ("fp32", 5e-3, False), ("bf16", 5e-3, True)])
def test_an_export_may_be_off_by_rounding_and_no_more(dtype: str, off: float, equal: bool, tmp_path: Path) -> None:
    sat, exported = result("SAT", zh=5, en=2, dtype=dtype), result("exported", zh=5, en=2 + off, dtype=dtype)
    found = findings(tmp_path, sat=sat, exported=exported)
    assert found.export_is_equal is equal
    assert found.export_difference == pytest.approx(off)
    assert ("NOT EQUAL: do not use the exported folder" in in_short(found)[-1]) is not equal


def test_an_export_that_yields_nan_is_not_equal(tmp_path: Path) -> None:
    assert not findings(tmp_path, exported=result("exported", zh=5, en=float("nan"))).export_is_equal


def test_a_proof_that_fails_is_said_to(tmp_path: Path) -> None:
    found = findings(tmp_path)
    vocabulary = {**found.vocabulary, "proofs": [{"statement": "s", "tried_on": "t", "offenders": ["越来越"]}]}
    assert "0 of 1 proofs hold" in in_short(findings(tmp_path, vocabulary=vocabulary))[0]


def test_both_pages_have_every_section_and_the_control_in_every_table(tmp_path: Path) -> None:
    write_report(findings(tmp_path), tmp_path, told=TOLD, notes=["Only a toy."])
    page = (tmp_path / "report.md").read_text()
    html = (tmp_path / "report.html").read_text()
    for said in ("adapt_chinese.sh smol out", "abc1234", "1 x H100", "torch 2.14", "Only a toy.", "8,000 pieces"):
        assert said in page and said in html
    lines = page.splitlines()
    assert f"| bits a character | original | extended | SAT | dense | {CONTROL} | SAT - original |" in lines
    assert "| zh/law | 8.000 | 9.000 | 4.500 | 4.000 | 4.250 | -3.500 |" in lines
    assert "| en, average | 2.000 | 2.000 | 2.250 | 2.500 | 2.375 | +0.250 |" in lines
    assert "| SAT | 100 | 400.0 | 400.0 | 5,120 | 0.600 | 0.800 | 0.800 |" in lines
    assert f"| {CONTROL} | 80 | 500.0 | 500.0 | 4,096 | 1.000 | 1.000 | 0.800 |" in lines
    assert "| vocabulary | 12.2 |" in lines
    assert "zh: 1,000,000 characters, 500,000 tokens; en: 2,000,000 characters, 490,000 tokens" in page
    assert html.count("data:image/png;base64,") == 2
    assert 'src="curves' not in html
    for picture in ("curves.png", "domains.png"):
        assert f"({picture})" in page
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
