"""Masks: the counts against a count by loops, which weights go by hand, and zeros that outlive training."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from autoprune.errors import ConfigError
from autoprune.finetuning import Recipe, train
from autoprune.structure.groups import Pattern
from autoprune.structure.masks import hold_zeros, mask, tile_sums, units, zeros
from autoprune.task import cross_entropy

WEIGHTS = Pattern("w")
PAIRS = Pattern("w", run=4)
TILES = Pattern("w", tile=(2, 2))


def by_loops(pattern: Pattern, saliency: torch.Tensor, removed: int, size: int) -> torch.Tensor:
    """Return the mask that `mask` should give, weight by weight."""
    members: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    outputs, inputs = saliency.shape[:2][::-1] if pattern.transposed else saliency.shape[:2]
    kernel = list(itertools.product(*map(range, saliency.shape[2:])))
    for row, (position, place), column in itertools.product(range(outputs), enumerate(kernel), range(inputs)):
        index = ((column, row) if pattern.transposed else (row, column)) + place
        if pattern.run:
            unit, fits = (row, position, column // pattern.run), column < inputs // pattern.run * pattern.run
        else:
            (height, width), along = pattern.tile, position * inputs + column
            unit = (row // height, along // width)
            fits = row < outputs // height * height and along < len(kernel) * inputs // width * width
        if fits:
            members.setdefault(unit, []).append(index)
    stays = torch.ones(saliency.shape, dtype=torch.bool)
    if pattern.run:
        for run in members.values():
            for index in sorted(run, key=lambda index: saliency[index].item())[:removed]:
                stays[index] = False
        return stays
    order = sorted(members)
    if pattern.tile == (1, 1):  # in the order of the tensor itself
        order = sorted(members, key=lambda unit: members[unit][0])
    order.sort(key=lambda unit: sum(saliency[index].item() for index in members[unit]))
    for unit in order[: len(members) * removed // size]:
        for index in members[unit]:
            stays[index] = False
    return stays


@st.composite
def cases(draw: st.DrawFn) -> tuple[Pattern, torch.Tensor, int, int]:
    shape = draw(st.tuples(*[st.integers(1, 9)] * 2, *[st.integers(1, 3)] * draw(st.integers(0, 2))))
    run = draw(st.sampled_from([0, 2, 3, 4, 8]))
    tile = (1, 1) if run else draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (4, 1), (3, 4)]))
    size = run or draw(st.integers(1, 200))
    removed = draw(st.integers(0, size))
    values = draw(st.lists(st.integers(0, 3), min_size=math.prod(shape), max_size=math.prod(shape)))  # many ties
    saliency = torch.tensor(values, dtype=torch.float32).view(shape)
    return Pattern("w", run, tile, draw(st.booleans())), saliency, removed, size


class TestCounts:
    @pytest.mark.parametrize(
        ("pattern", "shape", "transposed", "expected"),
        [
            (WEIGHTS, (3, 5), False, 15),
            (WEIGHTS, (3, 5, 2, 2), True, 60),
            (WEIGHTS, (7,), False, 7),
            (PAIRS, (3, 9), False, 3 * 2),
            (PAIRS, (3, 9, 3, 3), False, 3 * 9 * 2),  # not 3 * (81 // 4): a run stays within a position
            (PAIRS, (9, 3, 3, 3), True, 3 * 9 * 2),
            (PAIRS, (9, 3), False, 0),
            (TILES, (5, 3), False, 2 * 1),
            (TILES, (5, 3, 1, 3), False, 2 * 4),  # nine columns
            (TILES, (3, 5, 1, 3), True, 2 * 4),
            (Pattern("w", tile=(16, 16)), (15, 400), False, 0),
        ],
    )
    def test_units(self, pattern: Pattern, shape: tuple[int, ...], transposed: bool, expected: int) -> None:
        assert units(replace(pattern, transposed=transposed), shape) == expected

    @pytest.mark.parametrize(
        ("pattern", "shape", "removed", "size", "expected"),
        [
            (WEIGHTS, (3, 5), 7, 15, 7),
            (WEIGHTS, (2, 4), 7, 15, 3),  # what was sliced loses the same share, rounded down: 56 / 15
            (PAIRS, (3, 9), 2, 4, 12),
            (TILES, (6, 6), 4, 9, 16),
            (TILES, (4, 5), 4, 9, 4),  # 4 tiles left: 16 / 9 is one of them
            (TILES, (1, 9), 4, 9, 0),
        ],
    )
    def test_zeros(self, pattern: Pattern, shape: tuple[int, ...], removed: int, size: int, expected: int) -> None:
        assert zeros(pattern, shape, removed, size) == expected

    @pytest.mark.parametrize("removed", [-1, 5])
    def test_a_count_out_of_range_is_refused(self, removed: int) -> None:
        message = rf"^`0 <= removed <= size` must hold, but got {removed} of 4 for `w`$"
        with pytest.raises(ConfigError, match=message):
            zeros(PAIRS, (3, 9), removed, 4)
        with pytest.raises(ConfigError, match=message):
            mask(PAIRS, torch.zeros(3, 9), removed, 4)


class TestMask:
    def test_single_weights(self) -> None:
        saliency = torch.tensor([[5.0, 1.0, 3.0], [0.0, 4.0, 2.0]])
        assert mask(WEIGHTS, saliency, 3, 6).tolist() == [[True, False, True], [False, True, False]]

    def test_runs_lie_along_the_inputs_and_leave_the_rest(self) -> None:
        saliency = torch.tensor([[1.0, 4.0, 3.0, 2.0, 0.0], [9.0, 8.0, 7.0, 6.0, 0.0]])
        assert mask(PAIRS, saliency, 2, 4).int().tolist() == [[0, 1, 1, 0, 1], [1, 1, 0, 0, 1]]

    def test_runs_of_a_convolution_stay_within_a_position(self) -> None:
        """The four inputs of each position, not four neighbours in memory."""
        saliency = torch.tensor([[1.0, 40.0], [2.0, 30.0], [3.0, 20.0], [4.0, 10.0]]).view(1, 4, 1, 2)
        assert mask(PAIRS, saliency, 2, 4).view(4, 2).int().tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]

    def test_runs_of_a_transposed_convolution_lie_along_its_first_dimension(self) -> None:
        saliency = torch.tensor([[1.0, 8.0], [2.0, 7.0], [3.0, 6.0], [4.0, 5.0]]).view(4, 2, 1)
        stays = mask(replace(PAIRS, transposed=True), saliency, 2, 4)
        assert stays.view(4, 2).int().tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]

    def test_tiles_go_by_their_sum_and_leave_the_edges(self) -> None:
        saliency = torch.tensor([[9.0, 0.0, 3.0, 3.0, 0.0], [0.0, 0.0, 3.0, 3.0, 0.0], [0.0] * 5])
        assert tile_sums(TILES, saliency).tolist() == [[9, 12]]
        assert mask(TILES, saliency, 1, 2).int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [1] * 5]

    def test_tiles_of_a_convolution_have_the_input_channel_fastest(self) -> None:
        """Two inputs, two positions: the first tile is the first position's."""
        saliency = torch.tensor([[[1.0, 5.0], [1.0, 5.0]], [[1.0, 5.0], [1.0, 5.0]]])
        assert tile_sums(TILES, saliency).tolist() == [[4, 20]]
        assert mask(TILES, saliency, 1, 2).int().tolist() == [[[0, 1], [0, 1]]] * 2

    def test_half_precision_sums_do_not_overflow(self) -> None:
        saliency = torch.full((2, 4), 60000.0, dtype=torch.float16)
        assert tile_sums(TILES, saliency).tolist() == [[240000, 240000]]

    @pytest.mark.parametrize("pattern", [WEIGHTS, PAIRS, TILES])
    def test_all_and_none(self, pattern: Pattern) -> None:
        assert mask(pattern, torch.rand(4, 4), 0, 4).all()
        assert not mask(pattern, torch.rand(4, 4), 4, 4).any()

    @settings(max_examples=150, deadline=None)
    @given(cases())
    def test_it_is_the_mask_made_by_loops_and_has_the_zeros_of_the_formula(
        self, case: tuple[Pattern, torch.Tensor, int, int]
    ) -> None:
        pattern, saliency, removed, size = case
        stays = mask(pattern, saliency, removed, size)
        assert stays.dtype == torch.bool
        assert torch.equal(stays, by_loops(*case))
        assert int((~stays).sum()) == zeros(pattern, saliency.shape, removed, size)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 9), st.integers(1, 30), st.integers(2, 9), st.data())
    def test_every_run_keeps_the_same_number(self, outputs: int, inputs: int, run: int, data: st.DataObject) -> None:
        removed = data.draw(st.integers(0, run))
        stays = mask(Pattern("w", run), torch.rand(outputs, inputs, 2, 2), removed, run)
        whole = inputs // run * run
        kept = stays[:, :whole].unflatten(1, (-1, run)).sum(2) if whole else torch.zeros(0)
        assert (kept == run - removed).all()
        assert stays[:, whole:].all()

    def test_any_layout_and_a_gradient_make_no_difference(self) -> None:
        saliency = torch.rand(6, 8, 3, 3)
        other = saliency.to(memory_format=torch.channels_last).requires_grad_()
        for pattern in (WEIGHTS, PAIRS, TILES):
            assert torch.equal(mask(pattern, saliency, 2, 4), mask(pattern, other, 2, 4))

    @pytest.mark.parametrize(("limit", "value"), [("_AT_ONCE", 8), ("_COMPARED", 0)])
    def test_neither_parts_nor_sorting_make_a_difference(
        self, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
    ) -> None:
        saliency = torch.randint(0, 4, (7, 24))
        whole = mask(PAIRS, saliency, 1, 4)
        monkeypatch.setattr(f"autoprune.structure.masks.{limit}", value)
        assert torch.equal(mask(PAIRS, saliency, 1, 4), whole)

    def test_long_runs(self) -> None:
        long = Pattern("w", run=300)
        saliency = torch.randint(0, 50, (2, 600)).float()
        assert torch.equal(mask(long, saliency, 120, 300), by_loops(long, saliency, 120, 300))

    @pytest.mark.parametrize("pattern", [WEIGHTS, PAIRS, TILES])
    def test_nan_is_refused(self, pattern: Pattern) -> None:
        saliency = torch.rand(4, 4)
        saliency[1, 2] = math.nan
        with pytest.raises(ConfigError, match=r"^the saliency of `w` has NaN"):
            mask(pattern, saliency, 2, 4)


def masked_net() -> nn.Sequential:
    """Return a network with a third of each weight at zero."""
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight *= mask(WEIGHTS, layer.weight.abs(), 1, 3)
    return net


def batches(count: int = 4) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(10, 6, generator=generator), torch.randint(0, 3, (10,), generator=generator)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int = 4) -> None:
    for inputs, targets in batches(count):

        def closure(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> torch.Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(net(inputs), targets).mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def zero_places(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() == 0 for name, parameter in net.named_parameters() if parameter.dim() > 1}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def hooks_left(net: nn.Module) -> int:
    return len(_global_optimizer_post_hooks) + sum(len(p._backward_hooks or {}) for p in net.parameters())


NAMES = ("0.weight", "2.weight")

Make = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1),
}


class TestHoldZeros:
    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_zeros_survive_any_optimizer_and_the_rest_learns(self, make: Make) -> None:
        net = masked_net()
        before, weight = zero_places(net), net[0].weight.detach().clone()
        assert [int(places.sum()) for places in before.values()] == [18, 9]
        with hold_zeros(net, NAMES):
            steps(net, make(net.parameters()))
        assert same(before, zero_places(net))
        assert int((net[0].weight.detach() != weight).sum()) >= 30  # of 36; a hidden unit may have no way out

    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_they_are_lost_without_it(self, make: Make) -> None:
        net = masked_net()
        before = zero_places(net)
        steps(net, make(net.parameters()))
        assert not same(before, zero_places(net))

    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_momentum_from_before_brings_none_back(self, make: Make) -> None:
        net = masked_net()
        before = zero_places(net)
        optimizer = make(net.parameters())
        steps(net, optimizer, 2)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name in before:
                    parameter.masked_fill_(before[name], 0.0)
        with hold_zeros(net, NAMES):
            steps(net, optimizer)
        assert same(before, zero_places(net))

    def test_gradients_of_zeros_are_zero_before_anything_reads_them(self) -> None:
        """So a loop without an optimizer holds them too, and clipping sees the network that is left."""
        net, free = masked_net(), masked_net()
        free.load_state_dict(net.state_dict())
        inputs, targets = next(batches())
        with hold_zeros(net, NAMES):
            cross_entropy(net(inputs), targets).mean().backward()
        cross_entropy(free(inputs), targets).mean().backward()
        for layer, unheld in ((net[0], free[0]), (net[2], free[2])):
            gone = layer.weight == 0
            assert torch.equal(layer.weight.grad, unheld.weight.grad * ~gone)
            assert unheld.weight.grad[gone].any()
            assert torch.equal(layer.bias.grad, unheld.bias.grad)

    def test_infinite_gradients_do_not_reach_zeros(self) -> None:
        net = masked_net()
        with hold_zeros(net, NAMES):
            (net[0].weight.sum() * math.inf).backward()
        assert (net[0].weight.grad[net[0].weight == 0] == 0).all()

    def test_nothing_is_left_behind(self) -> None:
        net = masked_net()
        before = zero_places(net)
        with hold_zeros(net, NAMES):
            assert hooks_left(net) == 3
        assert hooks_left(net) == 0
        with pytest.raises(RuntimeError, match="in between"), hold_zeros(net, NAMES):
            raise RuntimeError("in between")
        assert hooks_left(net) == 0
        steps(net, torch.optim.SGD(net.parameters(), 0.1))
        assert not same(before, zero_places(net))

    def test_only_the_named_are_held(self) -> None:
        net = masked_net()
        before = zero_places(net)
        with hold_zeros(net, ["2.weight"]):
            steps(net, torch.optim.SGD(net.parameters(), 0.1))
        after = zero_places(net)
        assert torch.equal(before["2.weight"], after["2.weight"])
        assert not torch.equal(before["0.weight"], after["0.weight"])

    def test_an_unknown_name_is_refused(self) -> None:
        net = masked_net()
        with (
            pytest.raises(ConfigError, match=r"^the network has no parameter '1.weight'"),
            hold_zeros(net, ["1.weight"]),
        ):
            pass
        assert hooks_left(net) == 0

    def test_two_networks_at_once(self) -> None:
        one, other = masked_net(), masked_net()
        before = zero_places(one), zero_places(other)
        with hold_zeros(one, NAMES), hold_zeros(other, NAMES):
            steps(one, torch.optim.Adam(one.parameters(), 0.1))
            steps(other, torch.optim.Adam(other.parameters(), 0.1))
        assert same(before[0], zero_places(one))
        assert same(before[1], zero_places(other))

    def test_a_tied_tensor_is_held_by_either_name(self) -> None:
        net = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
        net["b"].weight = net["a"].weight
        with torch.no_grad():
            net["a"].weight[0] = 0
        with hold_zeros(net, ["b.weight", "a.weight"]):
            net["b"](torch.ones(2, 6)).sum().backward()
            torch.optim.SGD(net.parameters(), 0.1).step()
        assert (net["a"].weight[0] == 0).all()
        assert (net["a"].weight[1:] != 0).all()

    def test_frozen_weights_and_those_with_sparse_gradients(self) -> None:
        net = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
        with torch.no_grad():
            net[0].weight[:, 0] = 0
            net[1].weight[:, 1] = 0
        net[1].weight.requires_grad_(False)
        with hold_zeros(net, ["0.weight", "1.weight"]):
            net(torch.tensor([1, 2])).square().sum().backward()
            assert net[0].weight.grad.is_sparse
            torch.optim.SGD([net[0].weight], 0.1).step()
        assert (net[0].weight[:, 0] == 0).all()
        assert (net[1].weight[:, 1] == 0).all()

    def test_the_training_loop_holds_what_it_is_told_to(self) -> None:
        held, lost = masked_net(), masked_net()
        before = zero_places(held), zero_places(lost)
        recipe = Recipe(lr=0.3)
        train(held, batches(), 4, recipe=recipe, loss=cross_entropy, seed=0, zeroed=NAMES)
        train(lost, batches(), 4, recipe=recipe, loss=cross_entropy, seed=0)
        assert same(before[0], zero_places(held))
        assert not same(before[1], zero_places(lost))
        assert hooks_left(held) == 0
