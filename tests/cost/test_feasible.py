import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.cost import Budget, CostModel, FeasibleSet
from autoprune.errors import ConfigError, InfeasibleBudgetError
from autoprune.policy import Policy
from autoprune.structure import LockedGroup, Structure
from autoprune.structure.channels import find_channels
from autoprune.testing import TinyNet, TinyResNet

BUDGETS = ["macs<=50%", "params<=30%", "macs<=0.6,params<=0.35", "bytes<=70%"]


def made(net, budget, **options):
    example = torch.zeros(1, 1, 8, 8)
    *groups, output = find_channels(net, example)[0]
    locked = LockedGroup(output.name, "channels", output.size, output.layers, "its elements are the network's output")
    structure = Structure(tuple(groups), (locked,))
    return FeasibleSet.build(structure, CostModel(net, example, structure), Budget.parse(budget), **options)


@pytest.fixture(scope="module", params=[(net, budget) for net in (TinyNet, TinyResNet) for budget in BUDGETS], ids=str)
def feasible(request):
    net, budget = request.param
    return made(net(), budget)


def every(feasible):
    ranges = [range(low, high + 1) for low, high in zip(feasible.lower, feasible.upper, strict=True)]
    return [np.array(counts) for counts in itertools.product(*ranges)]


class TestBuild:
    def test_counts_come_from_sparsities(self):
        feasible = made(TinyNet(), "macs<=50%", bounds={"conv2": (0.2, 0.6)}, max_sparsity=0.75)
        assert (feasible.lower.tolist(), feasible.upper.tolist()) == ([0, 2], [6, 5])
        assert feasible.sizes.tolist() == [8, 8]

    def test_a_group_always_keeps_one(self):
        assert made(TinyNet(), "macs<=50%", max_sparsity=0.999).upper.tolist() == [7, 7]

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
            f"the budget macs<=1% allows {dense / 100:,.0f} macs, but the smallest network within the bounds has "
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
        for a, b in zip(first.tolist(), last.tolist(), strict=True):
            if b > a:
                jumps |= {(k + 0.5 - a) / (b - a) for k in range(int(a) - 1, int(b) + 1) if a < k + 0.5 < b}
        ordered = sorted(jumps)
        middles = [(x + y) / 2 for x, y in itertools.pairwise(ordered) if y - x > 1e-9]  # less is rounding
        counts += [np.rint(first + x * (last - first)).astype(np.int64) for x in middles]
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
        end = feasible.upper if (result > start).any() and not (result < start - 0.5).any() else feasible.lower
        moves = [(abs(r - s) - 0.5, abs(r - s) + 0.5, abs(e - s)) for r, s, e in zip(result, start, end, strict=True)]
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
        removed = np.array([data.draw(st.integers(int(low), int(high))) for low, high in bounds_of(feasible)])
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


def bounds_of(feasible):
    return zip(feasible.lower, feasible.upper, strict=True)
