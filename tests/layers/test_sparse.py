"""What attention and MLP share: rescaling, the look at all neurons, and the entries that belong to units."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_sat.layers.sparse import SparsePair
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import layout
from tests.layers.twins import Pair, attach, attention_pair, mlp_pair, run, step

PAIRS = pytest.mark.parametrize("build", [attention_pair, mlp_pair], ids=["attention", "mlp"])


def outputs(_: int, build: Any, rescale: str) -> tuple[Tensor, Fraction | None]:
    """The output [s, b, h] in a step at one third (4 groups or 96 channels), and the share kept."""
    layout()
    pair: Pair = build(add_bias_linear=True)
    selector = attach(pair.sparse, rescale=rescale, selection="top-k")
    for name, parameter in pair.sparse.named_parameters():
        if name in ("linear_proj.bias", "linear_fc2.bias"):
            parameter.data.zero_()  # what comes after the sum over neurons is not rescaled
    with step(pair.sparse, rate=Fraction(1, 3)):
        output = run(pair.sparse, pair.rest).output
        return output, selector.choice and selector.choice.keep_rate


@PAIRS
def test_inverse_keep_multiplies_the_output_by_one_over_the_share_kept(build: Any) -> None:
    plain, keep_rate = run_ranks(outputs, 1, build, "none")[0]
    scaled, _ = run_ranks(outputs, 1, build, "inverse-keep")[0]
    assert keep_rate in (Fraction(1, 2), Fraction(2, 3))
    assert_close(scaled, plain * float(1 / keep_rate))


def scaled_bias(_: int) -> tuple[Tensor, Tensor]:
    """The bias that a rescaled module hands back, and the parameter."""
    layout()
    pair = mlp_pair(add_bias_linear=True)
    attach(pair.sparse, rescale="inverse-keep")
    with step(pair.sparse, rate=Fraction(1, 3)):
        _, bias = pair.sparse(torch.randn(3, 1, 64, dtype=torch.float64))
    return bias, pair.sparse.linear_pair()[1].bias


def test_rescaling_leaves_the_bias_behind_the_neurons_alone() -> None:
    bias, parameter = run_ranks(scaled_bias, 1)[0]
    assert torch.equal(bias, parameter)


def look(_: int, build: Any, size: int) -> dict[str, Any]:
    """A step that scores by activations, with dropout on; what it did to modes and to the pair."""
    layout()
    pair: Pair = build(attention_dropout=0.5, params_dtype=torch.float32)
    sparse: SparsePair = pair.sparse
    attach(sparse, importance="contribution")
    frozen = next(child for child in sparse.children())
    frozen.eval()
    seen: list[Tensor] = []
    with step(sparse, rate=Fraction(1, 2)):
        run(sparse, pair.rest)
        column, row = sparse.linear_pair()
        row.observe = seen.append
        run(sparse, pair.rest)
    return {
        "modes": (sparse.training, frozen.training),
        "width after": seen[0].size(-1) / size,
        "rows": column.rows,
    }


@pytest.mark.parametrize(("build", "size"), [(attention_pair, 64), (mlp_pair, 96)], ids=["attention", "mlp"])
def test_a_look_at_all_neurons_restores_modes_and_leaves_the_module_cut(build: Any, size: int) -> None:
    after = run_ranks(look, 1, build, size)[0]
    assert after["modes"] == (True, False) and after["width after"] == 0.5 and after["rows"] is not None


def random_states(_: int, importance: str) -> Tensor:
    """The random state after a first forward that scores, with attention dropout on."""
    layout()
    pair = attention_pair(attention_dropout=0.5, params_dtype=torch.float32)
    attach(pair.sparse, importance=importance, selection="top-k")
    torch.manual_seed(1)
    with step(pair.sparse, rate=Fraction(1, 2)):
        run(pair.sparse, pair.rest)
    return torch.get_rng_state()


def test_a_look_at_all_neurons_draws_no_random_numbers() -> None:
    states = [run_ranks(random_states, 1, importance)[0] for importance in ("uniform", "contribution")]
    assert torch.equal(*states)


def activations(_: int, build: Any) -> tuple[Tensor, Tensor]:
    """What a step that scores by activations was shown, and the input of the twin's second linear layer."""
    layout()
    pair: Pair = build(params_dtype=torch.float32)
    shown: list[Tensor] = []
    selector = attach(pair.sparse, importance="contribution")
    true_kept = selector.kept

    def spy(tokens: Tensor, look: Any) -> Any:
        shown.append(look())
        return true_kept(tokens, lambda: shown[0])

    selector.kept = spy
    with step(pair.sparse, rate=Fraction(1, 2)):
        run(pair.sparse, pair.rest)
    twins: list[Tensor] = []
    children = dict(pair.twin.named_children())
    second = children.get("linear_proj") or children["linear_fc2"]
    second.register_forward_hook(lambda _, inputs, __: twins.append(inputs[0]))
    run(pair.twin, pair.rest)
    return shown[0], twins[0]


@PAIRS
def test_the_activations_shown_are_those_of_the_dense_module(build: Any) -> None:
    shown, twins = run_ranks(activations, 1, build)[0]
    assert_close(shown, twins.detach())


def named_entries(_: int, build: Any, **changes: Any) -> list[tuple[str, int, list[int]]]:
    """The entries of unit 1, by parameter name."""
    layout()
    pair: Pair = build(**changes)
    attach(pair.sparse)
    names = {id(parameter): name for name, parameter in pair.sparse.named_parameters()}
    entries = pair.sparse.entries(torch.tensor([1]))
    return [(names[id(parameter)], dim, index.tolist()) for parameter, dim, index in entries]


def test_a_channels_entries_are_its_rows_of_gate_and_up_its_column_of_down_and_its_biases() -> None:
    assert run_ranks(named_entries, 1, mlp_pair, add_bias_linear=True)[0] == [
        ("linear_fc1.weight", 0, [1, 97]),
        ("linear_fc2.weight", 1, [1]),
        ("linear_fc1.bias", 0, [1, 97]),
    ]


def test_a_query_groups_entries_are_its_four_blocks_and_the_columns_of_its_heads() -> None:
    assert run_ranks(named_entries, 1, attention_pair)[0] == [
        ("linear_qkv.weight", 0, list(range(32, 64))),
        ("linear_proj.weight", 1, list(range(16, 32))),
    ]


def test_a_pair_that_does_not_say_what_its_layers_are_is_refused() -> None:
    with pytest.raises(NotImplementedError):
        SparsePair().linear_pair()
