"""SpIEL-AG against a training of dense matrices written out, entry by entry."""

import gc
import math
import weakref
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Linear, Module, Sequential, Tanh
from torch.testing import assert_close

from megatron_sat.baselines import spiel as room
from megatron_sat.baselines.spiel import SparseLinear, Spiel, SpielConfig, budget
from tests.helpers.ranks import run_ranks
from tests.helpers.tolerances import EXACT, FP32_SUMS

NAMES = ("one", "two")
LEARNING_RATE, DECAY, BETAS, EPS = 1e-2, 3.0, (0.9, 0.999), 1e-6
INTERVAL, ACCUMULATE, STEPS = 5, 2, 13
Batch = tuple[Tensor, Tensor]


def make_model() -> Any:
    torch.manual_seed(0)
    model = Sequential()
    model.one, model.tanh, model.two = Linear(8, 12), Tanh(), Linear(12, 6, bias=False)
    return model


def make_config(**changes: Any) -> SpielConfig:
    settings: dict[str, Any] = {"rank": 1, "interval": INTERVAL, "accumulate": ACCUMULATE, "steps": STEPS, "seed": 3}
    return SpielConfig(**(settings | changes))


def micro_batches(step: int, *, count: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    return [
        (torch.randn(4, 8, generator=generator), torch.randn(4, 6, generator=generator)) for _ in range(count)
    ]


def loss_of(model: Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean() / 2


def train(model: Module, *, steps: range = range(1, STEPS + 1), **changes: Any) -> tuple[Spiel, Any]:
    spiel = Spiel(model, names=NAMES, config=make_config(**changes))
    optimizer = spiel.optimizer(lr=LEARNING_RATE, weight_decay=DECAY)
    go_on(spiel, optimizer, steps=steps)
    return spiel, optimizer


def go_on(spiel: Spiel, optimizer: Any, *, steps: range) -> None:
    for step in steps:
        spiel.begin_step(step)
        for batch in micro_batches(step):
            loss_of(spiel.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        spiel.end_step()


class Entry:
    """An active entry of the reference: where it lies, its change, and what Adam knows of it."""

    def __init__(self, place: int, *, mean: float = 0.0, square: float = 0.0, age: int = 1) -> None:
        self.place, self.change, self.mean, self.square, self.age = place, 0.0, mean, square, age

    def update(self, gradient: float) -> None:
        self.mean = BETAS[0] * self.mean + (1 - BETAS[0]) * gradient
        self.square = BETAS[1] * self.square + (1 - BETAS[1]) * gradient**2
        size = (math.sqrt(self.square) + EPS) / math.sqrt(1 - BETAS[1] ** self.age)
        self.change -= LEARNING_RATE * self.mean / (1 - BETAS[0] ** self.age) / size
        self.change *= 1 - LEARNING_RATE * DECAY
        self.age += 1


def written_out(starts: dict[str, list[int]]) -> tuple[Any, dict[str, dict[int, float]], int]:
    """Dense gradients of a model whose matrices are W plus the changes; the changes by place, and how many came."""
    model, pretrained = make_model(), make_model().state_dict()
    active = {name: [Entry(place) for place in places] for name, places in starts.items()}
    sums: dict[str, dict[int, list[float]]] = {}
    came = 0
    for step in range(1, STEPS + 1):
        at, dense = (step - 1) % INTERVAL, dict[str, list[float]]()
        for batch in micro_batches(step):
            gradients = torch.autograd.grad(loss_of(model, batch), [model.get_submodule(n).weight for n in NAMES])
            for name, gradient in zip(NAMES, gradients, strict=True):
                flat = gradient.flatten().tolist()
                if name not in dense and at == 0:
                    order = sorted(range(len(flat)), key=lambda place: -abs(flat[place]))
                    sums[name] = {place: [0.0, 0.0] for place in order[: len(active[name])]}
                dense[name] = [a + b for a, b in zip(dense.get(name, [0.0] * len(flat)), flat, strict=True)]
        for name in NAMES:
            for entry in active[name]:
                entry.update(dense[name][entry.place])
            if at < ACCUMULATE:
                for place, found in sums[name].items():
                    found[0] += dense[name][place]
                    found[1] += dense[name][place] ** 2
            if at == ACCUMULATE - 1:
                share = 1.0 if step == ACCUMULATE else 0.2 * (1 - step / STEPS)
                active[name], new = replaced(active[name], sums[name], count=math.floor(len(active[name]) * share))
                came += new
            weight = pretrained[f"{name}.weight"].clone()
            for entry in active[name]:
                weight.view(-1)[entry.place] += entry.change
            model.get_submodule(name).weight.data = weight
    return model, {name: {entry.place: entry.change for entry in active[name]} for name in NAMES}, came


def replaced(active: list[Entry], sums: dict[int, list[float]], *, count: int) -> tuple[list[Entry], int]:
    ordered = sorted(active, key=lambda entry: abs(entry.change))
    leaving, staying = ordered[:count], ordered[count:]
    free = [place for place in sums if place not in {entry.place for entry in staying}]
    coming = sorted(free, key=lambda place: -abs(sums[place][0]))[:count]
    new = [place for place in coming if place not in {entry.place for entry in leaving}]
    gone = [entry for entry in leaving if entry.place not in coming][: len(new)]
    fresh = [
        Entry(place, mean=sums[place][0] / ACCUMULATE, square=sums[place][1] / ACCUMULATE, age=ACCUMULATE)
        for place in new
    ]
    return [entry for entry in active if entry not in gone] + fresh, len(new)


def starts_of(spiel: Spiel) -> dict[str, list[int]]:
    return {name: layer.indices.tolist() for name, layer in spiel.layers.items()}


def changes_of(spiel: Spiel) -> dict[str, dict[int, float]]:
    return {
        name: dict(zip(layer.indices.tolist(), layer.delta.tolist(), strict=True))
        for name, layer in spiel.layers.items()
    }


@pytest.mark.parametrize("rank", [1, 2])
def test_a_run_is_adam_on_entries_that_come_and_go(rank: int) -> None:
    """Thirteen steps with three replacements, of everything and then of a fifth, falling."""
    config = {"rank": rank}
    twin, changes, came = written_out(starts_of(Spiel(make_model(), names=NAMES, config=make_config(**config))))
    spiel, _ = train(make_model(), **config)
    for name, found in changes_of(spiel).items():
        assert sorted(found) == sorted(changes[name])
        ours, theirs = ([each[place] for place in sorted(found)] for each in (found, changes[name]))
        assert_close(torch.tensor(ours), torch.tensor(theirs), **FP32_SUMS)
        assert_close(spiel.model.get_submodule(name).weight, twin.get_submodule(name).weight, **FP32_SUMS)
    first = sum(budget([make_model().one, make_model().two], rank))
    assert came > first // 2 + 2  # the first time most, then some


def test_what_is_not_active_is_what_it_was_bit_for_bit() -> None:
    spiel, _ = train(make_model())
    before, seen = make_model(), 0
    for name, layer in spiel.layers.items():
        left = torch.ones(layer.weight.numel(), dtype=torch.bool)
        left[layer.indices.long()] = False
        weight: Any = layer.weight
        assert_close(weight.view(-1)[left], before.get_submodule(name).weight.view(-1)[left], **EXACT)
        seen += int((weight.view(-1)[~left] != before.get_submodule(name).weight.view(-1)[~left]).sum())
    assert seen > 0.8 * sum(len(layer.delta) for layer in spiel.layers.values())
    assert_close(spiel.model.one.bias, before.one.bias, **EXACT)


def test_only_the_changes_train_and_only_they_have_moments() -> None:
    spiel, optimizer = train(make_model())
    assert {name for name, p in spiel.model.named_parameters() if p.requires_grad} == {"one.delta", "two.delta"}
    assert all(parameter.grad is None for parameter in spiel.model.parameters())
    sizes = {tensor.numel() for state in optimizer.state.values() for tensor in state.values()}
    assert sizes == {len(layer.delta) for layer in spiel.layers.values()}


def test_the_gradient_is_a_dense_ones_at_the_entries() -> None:
    spiel, dense = Spiel(make_model(), names=NAMES, config=make_config(rank=2)), make_model()
    spiel.begin_step(1)
    for model in (spiel.model, dense):
        loss_of(model, micro_batches(1)[0]).backward()
    for name, layer in spiel.layers.items():
        weight: Any = dense.get_submodule(name).weight
        expected = [weight.grad.view(-1)[place] for place in layer.indices.tolist()]
        assert layer.delta.grad is not None
        assert_close(layer.delta.grad, torch.stack(expected), **EXACT)
        assert layer.weight.grad is None


def test_one_matrixs_gradient_lives_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted when each arrives, in the steps that choose candidates too."""
    model = Sequential(*(Sequential() for _ in range(6)))
    for part in model:
        part.one = Linear(32, 32)
    spiel = Spiel(model, names=NAMES, config=make_config())
    seen: list[Any] = []
    kept: list[Tensor] = []
    living: list[int] = []
    take = SparseLinear.take

    def counted(layer: SparseLinear, gradient: Tensor) -> Tensor:
        gc.collect()
        living.append(sum(found() is not None for found in seen))
        seen.append(weakref.ref(gradient.untyped_storage()))
        if hold:
            kept.append(gradient.view(-1))
        return take(layer, gradient)

    monkeypatch.setattr(SparseLinear, "take", counted)
    for hold in (False, True):  # the second is the negative control
        seen.clear()
        living.clear()
        spiel.begin_step(1)
        model(torch.randn(4, 32)).square().sum().backward()
        assert living == ([0, 1, 2, 3, 4, 5] if hold else [0] * 6)


def test_a_forward_keeps_no_second_copy_of_a_weight() -> None:
    saved: list[int] = []
    spiel = Spiel(make_model(), names=NAMES, config=make_config())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        loss_of(spiel.model, micro_batches(1)[0])
    assert {layer.weight.data_ptr() for layer in spiel.layers.values()} & set(saved) == {
        spiel.model.two.weight.data_ptr()  # the first layer's input wants no gradient
    }


def test_a_resumed_run_goes_on_bit_for_bit_also_within_an_accumulation() -> None:
    whole, _ = train(make_model())
    for last in (6, 8):  # the 6th step is the first of two that are accumulated
        half, optimizer = train(make_model(), steps=range(1, last + 1))
        again = Spiel(make_model(), names=NAMES, config=make_config(seed=99))
        other = again.optimizer(lr=1.0, weight_decay=0.0)
        again.model.load_state_dict(half.model.state_dict())
        other.load_state_dict(optimizer.state_dict())
        go_on(again, other, steps=range(last + 1, STEPS + 1))
        assert_close(dict(again.model.state_dict()), dict(whole.model.state_dict()), **EXACT)


def test_merged_is_the_plain_model_with_what_was_learned() -> None:
    spiel, _ = train(make_model())
    batch = micro_batches(99)[0][0]
    before = spiel.model(batch)
    plain: Any = spiel.merge()
    assert list(plain.state_dict()) == list(make_model().state_dict())
    assert isinstance(plain.one, Linear) and all(p.requires_grad for p in plain.parameters())
    assert_close(plain(batch), before, **EXACT)
    assert (before - make_model()(batch)).abs().max() > 1e-2


def test_bf16_weights_follow_changes_in_fp32() -> None:
    model = make_model().bfloat16()
    spiel = Spiel(model, names=NAMES, config=make_config())
    layer = spiel.layers["one"]
    with torch.no_grad():
        layer.delta += 1e-2
    layer.write()
    expected = make_model().bfloat16().one.weight.detach().view(-1)[layer.indices.long()].float() + 1e-2
    assert layer.delta.dtype == torch.float32
    assert_close(layer.weight.detach().view(-1)[layer.indices.long()], expected.bfloat16(), **EXACT)


def rank_of_two(rank: int) -> dict[str, Tensor]:
    """A replica with every other micro-batch, whose gradients DDP averages; a loss of twice the size makes a sum."""
    model = make_model()
    spiel = Spiel(model, names=NAMES, config=make_config(), group=dist.group.WORLD)
    optimizer = spiel.optimizer(lr=LEARNING_RATE, weight_decay=DECAY)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(1, STEPS + 1):
        spiel.begin_step(step)
        (2 * loss_of(parallel, micro_batches(step)[rank])).backward()
        optimizer.step()
        optimizer.zero_grad()
        spiel.end_step()
    return dict(model.state_dict())


def test_two_replicas_are_one_process_with_two_micro_batches() -> None:
    whole = dict(train(make_model())[0].model.state_dict())
    for found in run_ranks(rank_of_two, 2):
        assert_close(found, whole, **FP32_SUMS)


def test_the_budget_is_loras_shared_out_by_size() -> None:
    """Llama 2 7B: the authors' number for a rank, 2,498,560 in 32 layers."""
    shapes = [(4096, 4096)] * 4 + [(4096, 11008)] * 3
    linears = [Linear(*shape, device="meta") for shape in shapes] * 32
    counts = budget(linears, 8)
    assert 8 * 2_498_560 - len(linears) < sum(counts) <= 8 * 2_498_560
    assert counts[4] / counts[0] == pytest.approx(11008 / 4096, rel=1e-4)


def test_entries_at_the_start_are_distinct_and_spread() -> None:
    for size, count in ((96, 20), (7, 7), (1000, 1)):
        found = room._one_of_each_stretch(size, count=count, generator=torch.Generator().manual_seed(0)).tolist()
        for number, place in enumerate(found):
            assert number * size // count <= place < (number + 1) * size // count
    other = {tuple(starts_of(Spiel(make_model(), names=NAMES, config=make_config(seed=s)))["one"]) for s in range(3)}
    assert len(other) == 3


def test_a_first_replacement_is_whole_and_the_others_fall_to_nothing() -> None:
    config = make_config(steps=100, interval=20, accumulate=5)
    assert [config.share(step) for step in (5, 25, 45, 100)] == [1, Fraction(3, 20), Fraction(11, 100), 0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 0}, "--spiel-rank must be at least 1, got 0; its authors try 8 to 64"),
        ({"accumulate": 0}, r"--spiel-accumulate must be between 1 and --spiel-interval \(5\), got 0; its authors"),
        ({"accumulate": 6}, r"--spiel-accumulate must be between 1 and --spiel-interval \(5\), got 6; its authors"),
        ({"replaced": Fraction(3, 2)}, r"--spiel-replaced must be in \[0, 1\], got 3/2; its authors use 1/5"),
        ({"steps": 2}, r"must be longer than its first accumulation \(--spiel-accumulate 2\), got 2 steps: only"),
    ],
)
def test_a_setting_out_of_range_is_an_error(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_config(**changes)


def test_a_budget_of_more_than_the_model_is_an_error() -> None:
    """16 times 38 entries of 168; half of them is a rank of 2."""
    with pytest.raises(ValueError, match="--spiel-rank must leave each layer .*, 16 gives 608 of 168 in 2 layers; try"):
        Spiel(make_model(), names=NAMES, config=make_config(rank=16))


def test_a_model_without_such_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="must have linear layers three, and torch's own, it has none; give a plain"):
        Spiel(make_model(), names=("three",), config=make_config())


def test_layers_that_are_not_torchs_are_an_error() -> None:
    model = make_model()
    Spiel(model, names=("one",), config=make_config())
    with pytest.raises(ValueError, match="must have linear layers one, two, and torch's own, it has one, two; give"):
        Spiel(model, names=NAMES, config=make_config())


def test_weights_in_shards_are_an_error() -> None:
    model = make_model()
    model.one.weight.ds_shape = (12, 8)
    with pytest.raises(ValueError, match="SpIEL needs whole weights, ZeRO-3 has left them in shards; use DDP"):
        Spiel(model, names=NAMES, config=make_config())
