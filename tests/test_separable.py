import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.cost import Budget, Limit
from autoprune.separable import allocate, hull, ranking, threshold
from autoprune.testing import SyntheticEvaluator, chain

SIZES = (8, 16, 12)


def convex(weights):
    return [lambda removed, w=w, size=size: w * (removed / size) ** 2 for w, size in zip(weights, SIZES, strict=True)]


def counts(feasible, policy):
    return np.array([feasible.structure.removed(policy)[name] for name in feasible.structure.names])


class TestAllocate:
    @settings(deadline=None)
    @given(st.lists(st.floats(0.1, 10), min_size=3, max_size=3), st.sampled_from([30, 50, 80]))
    def test_it_meets_the_budget_and_no_element_could_come_back(self, weights, percent):
        feasible = chain(SIZES, budget=f"macs<={percent}%")
        removed = counts(feasible, allocate(feasible, convex(weights)))
        assert feasible.utilisation(removed) <= 1
        for index in np.flatnonzero(removed > feasible.lower):
            fewer = removed.copy()
            fewer[index] -= 1
            assert feasible.utilisation(fewer) > 1

    @pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (5.0, 0.2, 1.0), (0.1, 3.0, 9.0)])
    def test_it_is_near_the_best_of_all_policies(self, weights):
        feasible, losses = chain(SIZES, budget="macs<=50%"), convex(weights)

        def total(removed):
            return sum(loss(count) for loss, count in zip(losses, removed, strict=True))

        grid = np.stack(np.meshgrid(*(np.arange(high + 1) for high in feasible.upper), indexing="ij"), -1).reshape(
            -1, 3
        )
        best = min(total(removed) for removed in grid if feasible.utilisation(removed) <= 1)
        found = total(counts(feasible, allocate(feasible, losses)))
        assert best - 1e-12 <= found <= 1.02 * best

    @settings(deadline=None)
    @given(st.lists(st.floats(0.1, 10), min_size=3, max_size=3), st.sampled_from([55, 70, 90]))
    def test_it_is_the_best_where_what_groups_save_adds_up(self, weights, percent):
        feasible = chain((8, 6, 12, 6, 10), budget=f"macs<={percent}%")
        prunable = [0, 2, 4]  # none reads another's outputs
        upper = np.where(np.isin(np.arange(5), prunable), feasible.upper, 0)
        apart = dataclasses.replace(feasible, upper=upper)
        losses = [lambda removed, w=w, s=s: w * (removed / s) ** 3 for w, s in zip(weights, (8, 12, 10), strict=True)]
        losses = [losses[index // 2] if index in prunable else lambda removed: 0.0 for index in range(5)]
        grid = np.array(list(itertools.product(*(range(high + 1) for high in upper))))
        totals = sum(np.vectorize(loss, otypes=[float])(column) for loss, column in zip(losses, grid.T, strict=True))
        best = min(total for total, removed in zip(totals, grid, strict=True) if apart.utilisation(removed) <= 1)
        removed = counts(apart, allocate(apart, losses))
        found = sum(loss(count) for loss, count in zip(losses, removed, strict=True))
        assert best - 1e-12 <= found <= best * 1.01 + 1e-12

    def test_on_more_groups_it_is_mostly_the_best_and_at_worst_near_it(self):
        gaps = []
        for widths in [(8, 8, 16, 16, 8), (12, 10, 8, 16, 12, 8)]:
            for budget in ["macs<=50%", "macs<=15%", "params<=40%"]:
                feasible = chain(widths, budget)
                for seed in range(4, 10):
                    problem = SyntheticEvaluator(feasible, evaluations=1, seed=seed, interaction=0.0)
                    losses = [
                        lambda removed, weight=weight, power=power, size=size: weight * (removed / size) ** power
                        for weight, power, size in zip(problem.weights, problem.powers, feasible.sizes, strict=True)
                    ]
                    found, best = allocate(feasible, losses), problem.optimum()
                    gaps.append((1 - problem.accuracy(found)) / (1 - problem.accuracy(best)) - 1)
        assert min(gaps) >= -1e-12
        assert np.mean(gaps) < 0.003
        assert max(gaps) < 0.04
        assert np.mean(np.array(gaps) < 1e-12) > 0.8

    def test_a_group_that_costs_nothing_goes_first(self):
        feasible = chain(SIZES, budget="macs<=70%")
        removed = counts(feasible, allocate(feasible, convex((1.0, 0.0, 1.0))))
        assert removed[1] > 0
        assert removed[0] == removed[2] == 0


class TestRanking:
    @settings(deadline=None)
    @given(st.integers(0, 1000), st.sampled_from([30, 50, 80]))
    def test_the_lowest_of_all_go_one_after_another(self, seed, percent):
        feasible = chain(SIZES, budget=f"macs<={percent}%", max_sparsity=0.99)
        scores = [np.sort(np.random.default_rng(seed + size).normal(size=size)) for size in SIZES]
        removed = np.zeros(3, dtype=np.int64)
        for _, index in sorted((score, index) for index, one in enumerate(scores) for score in one[:-1]):
            if feasible.utilisation(removed) <= 1:
                break
            removed[index] += 1
        found = counts(feasible, ranking(feasible, scores))
        assert feasible.utilisation(found) <= 1
        assert set((removed - found).tolist()) <= {0, 1}  # the last one saved so much that another may come back

    def test_ties_go_together_and_no_more_than_must(self):
        feasible = chain(SIZES, budget="macs<=50%")
        removed = counts(feasible, ranking(feasible, [np.ones(size) for size in SIZES]))
        assert feasible.utilisation(removed) <= 1
        assert feasible.utilisation(np.maximum(removed - 1, 0)) > 1

    def test_what_must_never_go_is_infinite(self):
        feasible = chain(SIZES, budget="macs<=80%")
        scores = [np.full(8, np.inf), np.arange(16.0), np.arange(12.0)]
        assert counts(feasible, ranking(feasible, scores))[0] == 0

    def test_bounds_hold(self):
        feasible = chain(SIZES, budget="macs<=50%")
        narrow = dataclasses.replace(feasible, upper=np.array([2, 14, 10]), lower=np.array([1, 0, 3]))
        removed = counts(narrow, ranking(narrow, [np.zeros(8), np.ones(16), np.full(12, 9.0)]))
        assert np.all((removed >= narrow.lower) & (removed <= narrow.upper))
        assert narrow.utilisation(removed) <= 1


class TestThreshold:
    def test_all_groups_lose_the_same(self):
        feasible, losses = chain(SIZES, budget="macs<=50%"), convex((1.0, 4.0, 2.0))
        removed = counts(feasible, threshold(feasible, losses))
        assert feasible.utilisation(removed) <= 1
        rises = [loss(count) for loss, count in zip(losses, removed, strict=True)]
        assert max(rises) - min(rises) < 0.25

    def test_a_budget_that_only_the_smallest_network_meets(self):
        least, most = 0.61, 1.66
        assert least + (most - least) < most  # by a rounding, no group may go all the way
        feasible = chain(SIZES, budget="macs<=50%")
        tight = dataclasses.replace(feasible, budget=Budget((Limit("macs", feasible.smallest.macs, relative=False),)))
        ends = [lambda removed, end=end: most if removed == end else least for end in feasible.upper.tolist()]
        for policy in (threshold(tight, ends), allocate(tight, ends)):
            assert counts(tight, policy).tolist() == feasible.upper.tolist()


class TestHull:
    def test_what_lies_above_is_left_out(self):
        x, y = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 1.0, 1.2, 4.0])
        assert hull(x, y) == [0, 2, 3]

    @settings(deadline=None)
    @given(st.lists(st.floats(0, 10), min_size=2, max_size=12))
    def test_it_is_convex_and_below(self, values):
        x, y = np.arange(float(len(values))), np.array(values)
        kept = hull(x, y)
        lowered = np.interp(x, x[kept], y[kept])
        assert np.all(lowered <= y + 1e-9)
        assert np.all(np.diff(lowered, 2) >= -1e-9)
        assert (kept[0], kept[-1]) == (0, len(values) - 1)
