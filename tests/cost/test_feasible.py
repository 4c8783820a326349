import itertools
from statistics import mean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoprune.cost import Budget, CostModel, FeasibleSet
from autoprune.errors import ConfigError, InfeasibleBudgetError
from autoprune.policy import Policy
from autoprune.structure import analyse
from autoprune.testing import TinyNet, TinyResNet

BUDGETS = ["macs<=50%", "params<=30%", "macs<=0.6,params<=0.35", "bytes<=70%", "activations<=80%"]


class Residual(nn.Module):
    """Two blocks of 8 channels and a hidden layer of 8 each, which a norm follows; the stream stays."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm, self.down = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 1)

        def forward(self, x):
            return x + self.down(self.norm(self.up(x)).relu())

    def __init__(self):
        super().__init__()
        self.first, self.second, self.fc = self.Block(), self.Block(), nn.Linear(64, 4)

    def forward(self, x):
        return self.fc(self.second(self.first(x)).flatten(1))


def made(net, budget, *, kinds=("channels",), multiple=1, **options):
    example = torch.zeros(1, 1, 8, 8)
    structure = analyse(net, example, kinds=kinds, multiple=multiple)
    return FeasibleSet.build(structure, CostModel(net, example, structure), Budget.parse(budget), **options)


CASES = [(net, budget, 1) for net in (TinyNet, TinyResNet) for budget in BUDGETS]
CASES += [(TinyNet, "macs<=50%", 3), (TinyResNet, "params<=40%", 2)]


@pytest.fixture(scope="module", params=CASES, ids=str)
def feasible(request):
    net, budget, multiple = request.param
    return made(net(), budget, multiple=multiple)


def choices(feasible):
    """Return the counts that every group allows within the bounds, by trying each."""
    bounds = zip(feasible.structure, feasible.lower.tolist(), feasible.upper.tolist(), strict=True)
    return [
        [gone for gone in range(low, high + 1) if group.nearest(gone) == gone or gone in (low, high)]
        for group, low, high in bounds
    ]


def every(feasible):
    return [np.array(counts) for counts in itertools.product(*choices(feasible))]


class TestBuild:
    def test_counts_come_from_sparsities(self):
        feasible = made(TinyNet(), "macs<=50%", bounds={"conv2": (0.2, 0.6)}, max_sparsity=0.75)
        assert (feasible.lower.tolist(), feasible.upper.tolist()) == ([0, 2], [6, 5])
        assert feasible.sizes.tolist() == [8, 8]

    def test_a_group_always_keeps_one(self):
        assert made(TinyNet(), "macs<=50%", max_sparsity=0.999).upper.tolist() == [7, 7]

    @pytest.mark.parametrize("budget", ["macs<=50%", "params<=50%", "macs<=60%,params<=40%", "bytes<=70%"])
    @pytest.mark.parametrize("net", [TinyNet, TinyResNet])
    def test_many_are_priced_as_each_is(self, net, budget):
        feasible = made(net(), budget)
        counts = np.random.default_rng(0).integers(feasible.lower, feasible.upper + 1, (20, len(feasible.upper)))
        assert feasible.utilisations(counts).tolist() == [feasible.utilisation(one) for one in counts]

    def test_what_a_group_may_lose_leaves_multiples(self):
        feasible = made(TinyNet(), "macs<=50%", multiple=3, bounds={"conv2": (0.1, 0.6)})
        for index, size in enumerate(feasible.sizes.tolist()):
            low, high = feasible.lower[index], feasible.upper[index]
            kept = [c for c in range(low, high + 1) if (size - c) % 3 == 0 or c == low]
            assert feasible.allowed(index).tolist() == kept

    def test_counts_are_multiples(self):
        feasible = made(TinyNet(), "macs<=50%", multiple=3, bounds={"conv2": (0.1, 0.6)})
        assert (feasible.lower.tolist(), feasible.upper.tolist()) == ([0, 0], [5, 5])
        assert feasible.multiples.tolist() == [3, 3]
        assert feasible.removed({"conv1": 0.5, "conv2": 0.2}).tolist() == [5, 2]

    def test_a_block_may_vanish(self):
        feasible = made(Residual(), "macs<=50%", kinds=("channels", "blocks"))
        bounds = dict(zip(feasible.structure.names, feasible.upper.tolist(), strict=True))
        assert bounds == {"first.up": 7, "second.up": 7, "first": 1, "second": 1}
        without = feasible.removed({"first": 1.0, "second": 1.0})
        assert feasible.costs.cost(without).macs == 64 * 4
        assert feasible.policy(without)["first"] == 1.0

    def test_the_smallest(self):
        feasible = made(TinyNet(), "macs<=50%", max_sparsity=0.75)
        assert feasible.smallest == feasible.costs.cost({"conv1": 6, "conv2": 6})

    def test_policies_and_utilisation(self):
        feasible = made(TinyNet(), "macs<=50%")
        counts = np.array([2, 4])
        assert feasible.policy(counts) == Policy({"conv1": 0.25, "conv2": 0.5})
        assert feasible.utilisation(counts) == feasible.costs.cost(counts).macs / (0.5 * feasible.costs.dense.macs)
        assert feasible.removed({"conv1": 0.25, "conv2": 0.99}).tolist() == [2, 7]
        assert feasible.removed({}).tolist() == [0, 0]

    def test_counts_are_moved_into_the_bounds(self):
        feasible = made(TinyNet(), "macs<=50%", bounds={"conv1": (0.25, 0.5), "conv2": (0.0, 0.5)})
        assert feasible.removed({"conv1": 0.0, "conv2": 0.9}).tolist() == [2, 4]


class TestLimited:
    def test_all_limits_shrink(self):
        feasible = made(TinyNet(), "macs<=50%,params<=40%")
        counts = np.array([2, 4])
        less = feasible.limited(0.5)
        assert less.utilisation(counts) == pytest.approx(feasible.utilisation(counts) / 0.5)
        assert str(less.budget) == "macs<=25%,params<=20%"

    def test_without_limits_it_is_a_share_of_the_dense_multiply_adds(self):
        feasible = made(TinyNet(), None)
        assert str(feasible.limited(0.5).budget) == "macs<=50%"

    def test_it_may_be_empty(self):
        less = made(TinyNet(), "macs<=50%").limited(1e-6)
        assert less.utilisation(less.upper) > 1


class TestRefused:
    def test_a_bound_of_an_unknown_group(self):
        with pytest.raises(ConfigError, match=r"a bound is given for group 'conv3', but .* groups are conv1, conv2"):
            made(TinyNet(), "macs<=50%", bounds={"conv3": (0.0, 0.5)})

    def test_a_bound_of_a_locked_group(self):
        with pytest.raises(ConfigError, match="group 'fc', but it is locked: its elements are the network's output"):
            made(TinyNet(), "macs<=50%", bounds={"fc": (0.0, 0.5)})

    @pytest.mark.parametrize("pair", [(0.5, 0.4), (-0.1, 0.5), (0.0, 1.0), (float("nan"), 0.5), (0.0, float("nan"))])
    def test_bounds_out_of_range(self, pair):
        with pytest.raises(ConfigError, match=r"`0 <= low <= high < 1` must hold for .* but got conv1="):
            made(TinyNet(), "macs<=50%", bounds={"conv1": pair})

    @pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan")])
    def test_a_highest_sparsity_out_of_range(self, sparsity):
        with pytest.raises(ConfigError, match="`0 <= max_sparsity < 1` must hold, but got max_sparsity="):
            made(TinyNet(), "macs<=50%", max_sparsity=sparsity)

    def test_an_infeasible_budget_says_what_blocks_it(self):
        with pytest.raises(InfeasibleBudgetError) as caught:
            made(TinyNet(), "macs<=90%,macs<=1%")
        dense, reached = 64 * 9 * 72 + 80, 64 * 9 * 2 + 10
        assert str(caught.value) == (
            f"the budget macs<=1% allows {dense / 100:,} macs, but the smallest network within the bounds has "
            f"{reached:,} ({reached / dense:.1%} of {dense:,}); "
            "raise the budget or the bounds' highest sparsity (locked groups: fc)"
        )

    def test_bounds_can_make_a_budget_infeasible(self):
        made(TinyNet(), "macs<=50%")
        with pytest.raises(InfeasibleBudgetError, match="locked groups: fc"):
            made(TinyNet(), "macs<=50%", bounds={"conv1": (0.0, 0.1), "conv2": (0.0, 0.1)})

    def test_exactly_the_smallest_is_feasible(self):
        smallest = made(TinyNet(), "macs<=50%").smallest
        assert made(TinyNet(), f"macs<={smallest.macs}").smallest == smallest
        with pytest.raises(InfeasibleBudgetError):
            made(TinyNet(), f"macs<={smallest.macs - 1}")


def path(feasible, sparsities):
    """Return all counts on the line from the lower bounds to the sparsities and on to the upper bounds, in order."""
    start = np.clip(sparsities * feasible.sizes, feasible.lower, feasible.upper)
    counts = []
    for first, last in ((feasible.lower, start), (start, feasible.upper)):
        jumps = {0.0, 1.0}
        for group, a, b in zip(feasible.structure, first.tolist(), last.tolist(), strict=True):
            allowed = [gone for gone in range(group.size) if group.nearest(gone) == gone]
            if b > a:
                jumps |= {(half - a) / (b - a) for half in map(mean, itertools.pairwise(allowed)) if a < half < b}
        ordered = sorted(jumps)
        middles = [(x + y) / 2 for x, y in itertools.pairwise(ordered) if y - x > 1e-9]  # less is rounding
        counts += [feasible.settled(first + x * (last - first)) for x in middles]
    return counts


class TestProject:
    SPARSITIES = st.tuples(st.integers(0, 95), st.integers(0, 95)).map(lambda percent: np.array(percent) / 100)

    @settings(max_examples=40, deadline=None)
    @given(sparsities=SPARSITIES, target=st.floats(0.5, 1.0))
    def test_it_uses_at_most_the_target_and_no_less_than_it_must(self, feasible, sparsities, target):
        result = feasible.project(sparsities, target)
        assert (feasible.lower <= result).all()
        assert (result <= feasible.upper).all()
        if feasible.utilisation(result) > target:
            assert (result == feasible.upper).all()
        fewer = [c for c in path(feasible, sparsities) if (c <= result).all() and (c < result).any()]
        assert all(feasible.utilisation(counts) > target for counts in fewer)

    @settings(max_examples=40, deadline=None)
    @given(sparsities=SPARSITIES)
    def test_it_stays_on_the_line(self, feasible, sparsities):
        result = feasible.project(sparsities)
        start = np.clip(sparsities * feasible.sizes, feasible.lower, feasible.upper)
        down = (result < start - feasible.multiples / 2).any()
        end = feasible.upper if (result > start).any() and not down else feasible.lower
        half = feasible.multiples / 2
        moves = [
            (abs(r - s) - h, abs(r - s) + h, abs(e - s)) for r, s, e, h in zip(result, start, end, half, strict=True)
        ]
        lowest = max((low / way for low, _, way in moves if way > 0), default=0.0)
        highest = min((high / way for _, high, way in moves if way > 0), default=1.0)
        assert lowest <= highest + 1e-9

    @settings(max_examples=20, deadline=None)
    @given(sparsities=SPARSITIES)
    def test_done_again_it_changes_nothing_that_costs_more(self, feasible, sparsities):
        result = feasible.project(sparsities)
        again = feasible.project(result / feasible.sizes)
        assert feasible.utilisation(result) <= feasible.utilisation(again) <= 1

    def test_what_costs_too_much_moves_up_and_what_costs_less_moves_down(self):
        feasible = made(TinyNet(), "macs<=50%")
        assert (feasible.project(np.array([0.0, 0.0])) > 0).all()
        assert (feasible.project(np.array([0.8, 0.8])) < 7).all()

    def test_the_dense_network_is_its_own_budget(self):
        assert made(TinyNet(), None).project(np.array([0.5, 0.25])).tolist() == [0, 0]

    def test_bounds_hold(self):
        feasible = made(TinyNet(), "macs<=50%", bounds={"conv1": (0.0, 0.0)})
        assert feasible.project(np.array([0.9, 0.0])).tolist() == [0, 5]


class TestInterval:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_the_fewest_is_what_trying_all_finds(self, feasible, data):
        removed = np.array([data.draw(st.sampled_from(counts)) for counts in choices(feasible)])
        undecided = np.array([data.draw(st.booleans()) for _ in removed])
        index = data.draw(st.integers(0, 1))
        low, high = feasible.interval(removed, index, undecided)
        possible = []
        for counts in every(feasible):
            others = [other for other in range(2) if other != index]
            if all(undecided[other] or counts[other] == removed[other] for other in others):
                possible += [int(counts[index])] if feasible.utilisation(counts) <= 1 else []
        assert high == feasible.upper[index]
        assert low == min(possible, default=high)

    def test_decided_one_by_one_the_budget_is_met(self, feasible):
        removed, undecided = np.zeros(2, dtype=np.int64), np.array([True, True])
        for index in range(2):
            removed[index], _ = feasible.interval(removed, index, undecided)
            undecided[index] = False
        assert feasible.utilisation(removed) <= 1

    def test_its_arguments_are_not_changed(self, feasible):
        removed, undecided = np.array([3, 0]), np.array([False, True])
        feasible.interval(removed, 1, undecided)
        assert (removed.tolist(), undecided.tolist()) == ([3, 0], [False, True])


class TestFewer:
    def test_the_next_lower_count_of_every_group(self, feasible):
        for index, counts in enumerate(choices(feasible)):
            for lower, count in itertools.pairwise(counts):
                removed = feasible.upper.copy()
                removed[index] = count
                assert feasible.fewer(removed)[index] == lower

    def test_at_the_start_there_are_none(self, feasible):
        assert feasible.fewer(np.zeros(2, dtype=np.int64)).tolist() == [0, 0]


class TestUniform:
    @settings(max_examples=30, deadline=None)
    @given(target=st.floats(0.3, 1.5))
    def test_it_is_the_first_common_sparsity_that_is_enough(self, feasible, target):
        """Of the groups that move at that sparsity, those that need not move stay."""
        jumps = {0.0, 1.0}
        for group in feasible.structure:
            allowed = [gone for gone in range(group.size) if group.nearest(gone) == gone]
            jumps |= {half / group.size for half in map(mean, itertools.pairwise(allowed))}
        between = [(low + high) / 2 for low, high in itertools.pairwise(sorted(jumps))]
        steps = [feasible.settled(sparsity * feasible.sizes) for sparsity in between]
        enough = next((n for n, counts in enumerate(steps) if feasible.utilisation(counts) <= target), len(steps) - 1)
        result = feasible.uniform(target)
        looser, tighter = steps[max(enough - 1, 0)], steps[enough]
        assert (looser <= result).all()
        assert (result <= tighter).all()
        if feasible.utilisation(tighter) <= target:
            assert feasible.utilisation(result) <= target
            for index in np.flatnonzero(result > looser):
                trial = result.copy()
                trial[index] = looser[index]
                assert feasible.utilisation(trial) > target

    def test_blocks_stay_where_they_can(self):
        feasible = made(Residual(), "macs<=60%", kinds=("channels", "blocks"))
        assert feasible.uniform().tolist()[2:] == [0, 0]
        assert feasible.utilisation(feasible.uniform()) <= 1
        few = made(Residual(), "macs<=10%", kinds=("channels", "blocks"), max_sparsity=0.6)
        assert few.uniform().tolist()[2:] != [0, 0]
        assert few.utilisation(few.uniform()) <= 1
