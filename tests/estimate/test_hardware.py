"""The measured table of a device: between its shapes, on disk, and what is said where there is none."""

import json
from pathlib import Path

import pytest

from megatron_sat.estimate.hardware import (
    FAR,
    Attended,
    Collective,
    Product,
    find,
    interpolate,
    load,
    save,
    slug,
)
from megatron_sat.model.flops import ModelShape, layer_forward_flops, whole
from tests.estimate.tables import PRODUCTS, even

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_what_was_measured_is_returned_as_it_was():
    points = [((2, 3), 5.0), ((4, 3), 9.0), ((2, 30), 1.0)]
    for sizes, value in points:
        found = interpolate(sizes, points)
        assert (found.value, found.distance) == (value, 0.0)


def test_half_way_in_logarithms_is_the_mean_and_beyond_is_the_nearest_ones():
    points = [((10,), 1.0), ((1000,), 3.0)]
    assert interpolate((100,), points).value == pytest.approx(2.0)
    assert 1.0 < interpolate((20,), points).value < 2.0
    assert interpolate((10**6,), points).value > 2.0
    assert all(1.0 <= interpolate((size,), points).value <= 3.0 for size in (1, 5, 50, 10**9))


def test_only_the_nearest_shapes_count():
    near = [((size,), 1.0) for size in (90, 95, 105, 110)]
    assert interpolate((100,), [*near, ((101_000,), 10**6)]).value == pytest.approx(1.0)
    assert interpolate((100,), [*near[:3], ((101_000,), 10**6)]).value > 1.5


def test_distance_says_how_far_the_nearest_is():
    assert interpolate((40,), [((10,), 1.0)]).distance == pytest.approx(FAR)


def test_a_products_seconds_follow_its_operations_at_an_even_rate():
    found = even().product_seconds("weight", m=100, n=200, k=300)
    assert found.seconds == pytest.approx(2 * 100 * 200 * 300 / PRODUCTS)
    assert found.distance > 0


def test_kinds_are_told_apart():
    hardware = even()
    slow = [Product(kind=p.kind, m=p.m, n=p.n, k=p.k, seconds=10 * p.seconds) for p in hardware.products]
    others = [product for product in hardware.products if product.kind != "input"]
    mixed = even(products=(*others, *(product for product in slow if product.kind == "input")))
    forward, back = (mixed.product_seconds(kind, m=64, n=64, k=64).seconds for kind in ("forward", "input"))
    assert back == pytest.approx(10 * forward)


def test_attention_counts_the_operations_of_the_model():
    shape = ModelShape(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=8,
        kv_channels=8,
        ffn_hidden_size=64,
        gated=True,
        padded_vocab_size=128,
        seq_length=48,
    )
    counted = layer_forward_flops(shape, whole(shape))["core_attn"] * 3 * (2 * 48)
    assert Attended(batch=2, sequence=48, heads=8, groups=8, head_dim=8, seconds=1.0).operations == counted


def test_a_table_is_read_back_as_it_was_saved(tmp_path):
    save(even(), tmp_path / "results" / "gemm-even.json")
    assert load(tmp_path / "results" / "gemm-even.json") == even()


def test_collectives_and_where_they_come_from_are_read_back_too(tmp_path):
    rows = (Collective(kind="all-reduce", ranks=2, size=10**6, seconds=1e-3),)
    table = even(collectives=rows, collectives_about={"command": "some", "commit": "any"})
    save(table, tmp_path / "gemm-even.json")
    assert load(tmp_path / "gemm-even.json") == table
    assert load(tmp_path / "gemm-even.json").collectives == rows


def test_a_table_from_before_collectives_has_none(tmp_path):
    save(even(), tmp_path / "gemm-even.json")
    stored = json.loads((tmp_path / "gemm-even.json").read_text())
    del stored["collectives"], stored["collectives_about"]
    (tmp_path / "gemm-even.json").write_text(json.dumps(stored))
    assert load(tmp_path / "gemm-even.json") == even()


def test_what_a_rank_of_a_ring_sends():
    summed = Collective(kind="all-reduce", ranks=4, size=800, seconds=2.0)
    assert summed.bytes_per_second == 2 * 3 * 200 / 2.0  # three parts passed on as sums grow, three as they are told
    assert Collective(kind="reduce-scatter", ranks=4, size=800, seconds=2.0).bytes_per_second == 3 * 200 / 2.0


def test_collectives_say_where_they_come_from():
    rows = (Collective(kind="all-reduce", ranks=2, size=10**6, seconds=1e-3),)
    with pytest.raises(ValueError, match=r"collectives_about must hold the command and commit .*again .*bench_comm"):
        even(collectives=rows, collectives_about={"command": "some"})
    with pytest.raises(ValueError, match="a measured time must be above 0, got Collective"):
        even(collectives=(Collective(kind="all-reduce", ranks=2, size=1, seconds=0.0),))


def test_every_table_of_the_repository_can_be_read_and_says_how_it_was_made():
    files = sorted(RESULTS.glob("gemm-*.json"))
    assert files, "tools/plan.py has nothing to predict from"
    for file in files:
        found = load(file)
        assert file.stem == f"gemm-{slug(found.name)}"
        assert "benchmarks/bench_layer.py" in found.about["command"]
        assert "/tmp" not in file.read_text()


def test_a_missing_table_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(ValueError, match=r"must be a file, .*none\.json is none; measure .*benchmarks/bench_layer\.py"):
        load(tmp_path / "none.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"products": [{"kind": "forward"}], "attention": [], "choosing": []}'])
def test_a_file_of_something_else_is_no_table(text, tmp_path):
    (tmp_path / "gemm-x.json").write_text(text)
    with pytest.raises(ValueError, match="must be a table of measured products, it cannot be read: .*bench_layer"):
        load(tmp_path / "gemm-x.json")


@pytest.mark.parametrize("empty", ["attention", "choosing", "products"])
def test_a_table_without_a_part_is_refused(empty, tmp_path):
    save(even(), tmp_path / "gemm-x.json")
    stored = json.loads((tmp_path / "gemm-x.json").read_text())
    stored[empty] = stored[empty][:2] if empty == "products" else []
    (tmp_path / "gemm-x.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="must hold products of all three kinds, attention and choosing, some are"):
        load(tmp_path / "gemm-x.json")


def test_times_and_rates_are_above_zero():
    with pytest.raises(ValueError, match="a measured time must be above 0, got Product"):
        even(products=(Product(kind="forward", m=1, n=1, k=1, seconds=0.0),))
    with pytest.raises(ValueError, match=r"bytes_per_second must be above 0, got 0\.0; measure again"):
        even(bytes_per_second=0.0)


def test_the_only_table_is_found_and_of_two_the_one_that_is_named(tmp_path):
    h100, a100 = tmp_path / "gemm-nvidia-h100-80gb-hbm3.json", tmp_path / "gemm-nvidia-a100.json"
    h100.touch()
    assert find(tmp_path, name=None) == h100
    a100.touch()
    assert find(tmp_path, name="H100") == h100
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    with pytest.raises(ValueError, match="one table of measured products for a device .*there are 2 .*nvidia-a100, nv"):
        find(tmp_path, name=None)
    with pytest.raises(ValueError, match="for b200 .*there are 0 .*make the table on this one with: .*bench_layer"):
        find(tmp_path, name="b200")


def test_without_any_table_the_command_that_makes_one_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there are 0 \(for all: none\).*python benchmarks/bench_layer\.py"):
        find(tmp_path, name=None)
