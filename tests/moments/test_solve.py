import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.moments.solve import (
    FLOOR,
    Eliminator,
    fitted,
    gram,
    kept_from_rows,
    kept_weights,
    losses,
    masked_weights,
    regularised,
    removal_order,
    shrinkage,
)

FLOAT = torch.float64


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT)


def problem(seed, outputs=3, width=8, rows=20, ridge=1e-2):
    """Return a weight, rows that hang together, and their moments with a ridge."""
    inputs = drawn(rows, width, seed=seed) @ drawn(width, width, seed=seed + 1000)
    second = inputs.T @ inputs / rows + ridge * torch.eye(width, dtype=FLOAT)
    return drawn(outputs, width, seed=seed + 2000), inputs, second


def by_least_squares(weight, inputs, ridge, kept):
    """Return what rows in place of moments give: fit the outputs, and stay near the dense weights."""
    rows = len(inputs)
    system = torch.cat([inputs[:, kept] / rows**0.5, ridge**0.5 * torch.eye(len(kept), dtype=FLOAT)])
    wanted = torch.cat([inputs @ weight.T / rows**0.5, ridge**0.5 * weight[:, kept].T])
    return torch.linalg.lstsq(system, wanted).solution.T


def loss_of(weight, second, kept, new):
    """Return tr((V - W) H (V - W)ᵀ)."""
    change = -weight.clone()
    change[:, kept] += new
    return ((change @ second) * change).sum()


def brute_order(readers, size, each=1):
    """Return the order that trying every removal at every step gives; `readers` are weight, moments and columns."""
    gone, left = [], list(range(size))
    total = torch.zeros((), dtype=FLOAT)
    while left:
        tried = torch.stack([loss_without(readers, [*gone, element]) - total for element in left])
        going = [left[place] for place in torch.argsort(tried, stable=True)[:each].tolist()]
        gone += going
        total = loss_without(readers, gone)
        left = [element for element in left if element not in going]
    return gone


def loss_without(readers, gone):
    total = torch.zeros((), dtype=FLOAT)
    for weight, second, columns in readers:
        lost = columns[gone].flatten().tolist()
        kept = torch.tensor([column for column in range(len(second)) if column not in lost], dtype=torch.int64)
        total = total + loss_of(weight, second, kept, kept_weights(weight, second, kept))
    return total


def eliminators(readers):
    return [Eliminator(weight, torch.linalg.inv(second), columns) for weight, second, columns in readers]


class TestKeptWeights:
    @pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4, 5, 6], [1, 6], [7], [5, 2, 0]])
    @pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
    def test_they_are_ridge_regression(self, kept, ridge):
        weight, inputs, second = problem(3, ridge=ridge)
        expected = by_least_squares(weight, inputs, ridge, kept)
        torch.testing.assert_close(kept_weights(weight, second, torch.tensor(kept)), expected, rtol=1e-8, atol=1e-9)

    def test_without_losses_nothing_changes(self):
        weight, _, second = problem(0)
        assert torch.equal(kept_weights(weight, second, torch.arange(8)), weight)

    def test_all_can_go(self):
        weight, _, second = problem(0)
        assert kept_weights(weight, second, torch.arange(0)).shape == (3, 0)

    def test_a_duplicate_takes_over_exactly(self):
        weight, inputs, _ = problem(0)
        inputs[:, 5] = inputs[:, 1]
        ridge = 1e-10
        kept = torch.tensor([0, 1, 2, 3, 4, 6, 7])
        new = kept_weights(weight, inputs.T @ inputs / 20 + ridge * torch.eye(8, dtype=FLOAT), kept)
        expected = weight[:, kept].clone()
        expected[:, 1] += weight[:, 5]
        torch.testing.assert_close(new, expected, rtol=0, atol=1e-7)
        torch.testing.assert_close(inputs[:, kept] @ new.T, inputs @ weight.T, rtol=0, atol=1e-7)

    def test_a_much_larger_ridge_is_slicing(self):
        weight, inputs, _ = problem(0)
        kept = torch.tensor([0, 3, 4])
        new = kept_weights(weight, inputs.T @ inputs / 20 + 1e12 * torch.eye(8, dtype=FLOAT), kept)
        torch.testing.assert_close(new, weight[:, kept], rtol=0, atol=1e-8)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 10_000), st.lists(st.booleans(), min_size=8, max_size=8), st.sampled_from([1e-4, 0.1, 3.0]))
    def test_they_lose_no_more_than_slicing_and_no_other_weights_lose_less(self, seed, stays, ridge):
        weight, _, second = problem(seed, rows=5, ridge=ridge)
        kept = torch.tensor(stays).nonzero()[:, 0]
        best = kept_weights(weight, second, kept)
        least = loss_of(weight, second, kept, best)
        assert least <= loss_of(weight, second, kept, weight[:, kept]) * (1 + 1e-9)
        near = best + 1e-3 * drawn(*best.shape, seed=seed)
        assert least <= loss_of(weight, second, kept, near) + 1e-12


class TestKeptFromRows:
    @pytest.mark.parametrize("rows", [1, 3, 8, 20])
    @pytest.mark.parametrize("kept", [[0, 2, 3, 5, 6, 7], [4], []])
    def test_they_are_those_of_the_moments(self, rows, kept):
        weight, inputs, _ = problem(7, rows=rows)
        kept = torch.tensor(kept, dtype=torch.int64)
        expected = kept_weights(weight, regularised(inputs.T @ inputs / rows, rows), kept)
        torch.testing.assert_close(kept_from_rows(weight, inputs, kept), expected, rtol=1e-9, atol=1e-10)

    def test_rows_of_zeros_leave_the_weights(self):
        weight = drawn(3, 8)
        kept = torch.tensor([1, 2])
        assert torch.equal(kept_from_rows(weight, torch.zeros(4, 8), kept), weight[:, kept])


class TestLosses:
    @pytest.mark.parametrize("columns", [1, 2, 4])
    def test_they_are_those_of_the_weights_that_are_kept(self, columns):
        weight, _, second = problem(5)
        order = torch.tensor([6, 1, 0, 7, 3, 2, 5, 4]).reshape(-1, columns)
        found = losses(weight, torch.linalg.inv(second), order)
        for steps in range(len(order) + 1):
            kept = torch.tensor(sorted(order[steps:].flatten().tolist()), dtype=torch.int64)
            expected = loss_of(weight, second, kept, kept_weights(weight, second, kept))
            assert float(found[steps]) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)
        assert float(found[-1]) == pytest.approx(float(((weight @ second) * weight).sum()), rel=1e-9)

    def test_some_columns_may_stay_for_good(self):
        weight, _, second = problem(5)
        found = losses(weight, torch.linalg.inv(second), torch.tensor([[2], [4]]))
        kept = torch.tensor([0, 1, 3, 5, 6, 7])
        expected = loss_of(weight, second, kept, kept_weights(weight, second, kept))
        assert float(found[-1]) == pytest.approx(float(expected), rel=1e-9)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 10_000), st.permutations(range(8)))
    def test_they_never_fall(self, seed, order):
        weight, _, second = problem(seed, rows=4)
        found = losses(weight, torch.linalg.inv(second), torch.tensor(order)[:, None])
        assert float(found[0]) == 0.0
        assert (found.diff() >= 0).all()


class TestRemovalOrder:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("columns", [1, 2])
    def test_it_is_what_trying_every_removal_gives(self, seed, columns):
        weight, _, second = problem(seed, width=6 * columns)
        readers = [(weight, second, torch.arange(6 * columns).reshape(6, columns))]
        assert removal_order(eliminators(readers), 6).tolist() == brute_order(readers, 6)

    @pytest.mark.parametrize("seed", range(3))
    def test_several_readers_decide_together(self, seed):
        """One reads the elements in another order, and other inputs too; one reads two inputs for each."""
        first, second = problem(seed), problem(seed + 50, width=10)
        readers = [
            (first[0], first[2], torch.tensor([3, 1, 7, 0, 2])[:, None]),
            (second[0], second[2], torch.arange(10).reshape(5, 2)),
        ]
        expected = brute_order(readers, 5)
        assert removal_order(eliminators(readers), 5).tolist() == expected
        alone = [brute_order([reader], 5) for reader in readers]
        assert any(order != expected for order in alone)

    @pytest.mark.parametrize(("steps", "each"), [(3, 2), (2, 3), (1, 6), (6, 1), (64, 1)])
    def test_with_fewer_steps_several_go_at_once(self, steps, each):
        weight, _, second = problem(1, width=6)
        readers = [(weight, second, torch.arange(6)[:, None])]
        [eliminator] = eliminators(readers)
        asked, costs = [], eliminator.costs
        eliminator.costs = lambda left: asked.append(len(left)) or costs(left)
        order = removal_order([eliminator], 6, steps)
        assert order.tolist() == brute_order(readers, 6, each)
        assert asked == list(range(6, 0, -each))

    def test_ties_go_by_number(self):
        weight, second = torch.ones(1, 80, dtype=FLOAT), torch.eye(80, dtype=FLOAT)
        readers = [(weight, second, torch.arange(80)[:, None])]
        assert removal_order(eliminators(readers), 80).tolist() == list(range(80))

    def test_of_two_that_say_the_same_one_stays_before_a_useful_one(self):
        """Elements 0 and 1 are alike and loud, the others hardly matter: one of the two is free, then dear."""
        inputs = drawn(200, 6)
        inputs[:, 1] = inputs[:, 0]
        weight = torch.tensor([[5.0, 5.0, 0.5, 0.6, 0.7, 0.8]], dtype=FLOAT)
        second = inputs.T @ inputs / 200 + 1e-6 * torch.eye(6, dtype=FLOAT)
        order = removal_order(eliminators([(weight, second, torch.arange(6)[:, None])]), 6).tolist()
        assert order[0] in (0, 1)
        assert order[-1] in (0, 1)

    def test_it_loses_less_than_most_orders(self):
        weight, _, second = problem(9, width=6)
        inverse, columns = torch.linalg.inv(second), torch.arange(6)[:, None]
        found = losses(weight, inverse, columns[removal_order(eliminators([(weight, second, columns)]), 6)])
        others = [losses(weight, inverse, columns[list(order)])[3] for order in itertools.permutations(range(6))]
        assert float((torch.stack(others) < found[3] - 1e-9).double().mean()) < 0.1

    def test_what_is_given_is_not_changed(self):
        weight, _, second = problem(0)
        inverse = torch.linalg.inv(second)
        before = weight.clone(), inverse.clone()
        removal_order([Eliminator(weight, inverse, torch.arange(8)[:, None])], 8)
        assert torch.equal(weight, before[0])
        assert torch.equal(inverse, before[1])


class TestEliminator:
    def test_costs_are_what_the_loss_grows_by(self):
        weight, _, second = problem(2)
        reader = (weight, second, torch.arange(8).reshape(4, 2))
        eliminator = eliminators([reader])[0]
        eliminator.remove(torch.tensor([2]))
        before = loss_without([reader], [2])
        expected = [float(loss_without([reader], [2, element]) - before) for element in (0, 1, 3)]
        assert eliminator.costs(torch.tensor([0, 1, 3])).tolist() == pytest.approx(expected, rel=1e-9)


class TestShrinkage:
    def test_by_hand(self):
        """H = diag(3, 1): tr H² = 10, tr H = 4, d = 2: (0 + 16) / ((rows + 1 - 1) (10 - 8)) is 8 / rows."""
        second = torch.diag(torch.tensor([3.0, 1.0], dtype=FLOAT))
        assert float(shrinkage(second, 100)) == pytest.approx(0.08 / 0.92)
        assert float(shrinkage(second, 9)) == 1.0

    def test_by_hand_with_three(self):
        second = torch.diag(torch.tensor([4.0, 1.0, 1.0], dtype=FLOAT))
        intensity = (18 / 3 + 36) / ((50 + 1 - 2 / 3) * (18 - 36 / 3))
        assert float(shrinkage(second, 50)) == pytest.approx(intensity / (1 - intensity))

    def test_fewer_rows_need_more(self):
        second = problem(0)[2]
        ridges = [float(shrinkage(second, rows)) for rows in (10, 40, 200, 1000)]
        assert ridges == sorted(ridges, reverse=True)
        assert len(set(ridges)) > 2

    def test_even_moments_get_most_and_many_rows_least(self):
        assert float(shrinkage(torch.eye(5, dtype=FLOAT), 10**9)) == 1.0
        assert float(shrinkage(problem(0)[2], 10**9)) == FLOOR
        assert float(shrinkage(torch.zeros(4, 4), 7)) == 1.0

    def test_batches_are_one_by_one(self):
        second = torch.stack([problem(seed)[2] for seed in range(5)])
        torch.testing.assert_close(
            shrinkage(second, 30), torch.stack([shrinkage(one, 30) for one in second]), rtol=1e-12, atol=0
        )
        torch.testing.assert_close(
            regularised(second, 30), torch.stack([regularised(one, 30) for one in second]), rtol=1e-12, atol=0
        )

    @pytest.mark.parametrize("rows", [3, 8, 30])
    def test_products_of_the_rows_say_as_much(self, rows):
        inputs = problem(0, rows=rows)[1]
        expected = shrinkage(inputs.T @ inputs / rows, rows)
        assert float(shrinkage(inputs @ inputs.T / rows, rows, 8)) == pytest.approx(float(expected), rel=1e-12)


class TestRegularised:
    def test_the_ridge_is_relative_to_the_mean_of_the_diagonal(self):
        second = torch.diag(torch.tensor([3.0, 1.0]))
        expected = second.double() + torch.eye(2, dtype=FLOAT) * 2 * shrinkage(second.double(), 100)
        assert torch.equal(regularised(second, 100), expected)  # in double precision, though what is given is not

    def test_of_nothing_it_is_the_identity(self):
        second = torch.stack([torch.zeros(3, 3), torch.eye(3)])
        assert regularised(second, 10)[0].tolist() == torch.eye(3).tolist()

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 6), st.integers(0, 1000), st.floats(1e-6, 1e6))
    def test_it_can_always_be_inverted_and_does_not_depend_on_units(self, rows, seed, unit):
        inputs = drawn(rows, 8, seed=seed)
        second = regularised(inputs.T @ inputs / rows, rows)
        assert torch.linalg.eigvalsh(second)[0] > 0
        scaled = regularised(unit**2 * inputs.T @ inputs / rows, rows)
        torch.testing.assert_close(scaled, unit**2 * second, rtol=1e-9, atol=0)


class TestMaskedWeights:
    @staticmethod
    def problem(outputs=3, width=6, seed=0):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(50, width, generator=generator, dtype=torch.float64)
        rows[:, 1] = 0.9 * rows[:, 0] + 0.1 * rows[:, 1]
        weight = torch.randn(outputs, width, generator=generator, dtype=torch.float64)
        stays = torch.rand(outputs, width, generator=generator) < 0.5
        return weight, regularised(rows.T @ rows / 50, 50), stays

    @staticmethod
    def loss(left, weight, second):
        return float((((left - weight) @ second) * (left - weight)).sum())

    @given(st.integers(0, 1000))
    @settings(deadline=None, max_examples=25)
    def test_each_row_is_its_own_least_squares(self, seed):
        weight, second, stays = self.problem(seed=seed)
        found = masked_weights(weight, second, stays)
        factor = torch.linalg.cholesky(second).T  # the loss is the square of factor @ (left - weight)
        for row, target, there in zip(found, weight, stays, strict=True):
            expected = torch.zeros_like(target)
            if there.any():
                expected[there] = torch.linalg.lstsq(factor[:, there], factor @ target).solution
            torch.testing.assert_close(row, expected, atol=1e-8, rtol=1e-6)

    def test_the_sweep_keeps_zeros_and_lies_between_zeroing_and_the_best(self):
        losses = []
        for seed in range(20):
            weight, second, stays = self.problem(outputs=8, seed=seed)
            best, swept = (masked_weights(weight, second, stays, exact=exact) for exact in (10**9, 0))
            assert torch.all(swept[~stays] == 0)
            losses.append([self.loss(left, weight, second) for left in (best, swept, weight * stays)])
            assert losses[-1][0] <= losses[-1][1] + 1e-9
        least, more, most = (sum(column) for column in zip(*losses, strict=True))
        assert least < more < most

    def test_the_sweep_is_the_same_over_several_blocks(self, monkeypatch):
        weight, second, stays = self.problem(outputs=4, width=12)
        whole = masked_weights(weight, second, stays, exact=0)
        monkeypatch.setattr("autoprune.moments.solve._BLOCK", 5)
        torch.testing.assert_close(masked_weights(weight, second, stays, exact=0), whole)

    def test_rows_are_solved_some_at_a_time_to_the_same(self, monkeypatch):
        weight, second, stays = self.problem(outputs=7)
        whole = masked_weights(weight, second, stays)
        monkeypatch.setattr("autoprune.moments.solve._BYTES", 8 * 6**2 * 2)
        torch.testing.assert_close(masked_weights(weight, second, stays), whole)

    def test_nothing_to_zero_changes_nothing_and_everything_is_zero(self):
        weight, second, stays = self.problem()
        torch.testing.assert_close(masked_weights(weight, second, torch.ones_like(stays)), weight)
        assert torch.all(masked_weights(weight, second, torch.zeros_like(stays)) == 0)


class TestGram:
    @pytest.mark.parametrize("width", [1, 5, 6, 7, 13])
    @pytest.mark.parametrize("leading", [(), (1,), (3,)])
    def test_wide_rows_are_multiplied_by_blocks_to_the_same(self, width, leading, monkeypatch):
        monkeypatch.setattr("autoprune.moments.solve._WIDE", 6)
        rows = drawn(*leading, 20, width)
        torch.testing.assert_close(gram(rows), rows.mT @ rows)


class TestFitted:
    @pytest.mark.parametrize(("rows", "width"), [(30, 6), (6, 30), (8, 8)])
    def test_it_is_ridge_regression_however_it_is_solved(self, rows, width):
        inputs, outputs = drawn(2, rows, width), drawn(2, rows, 3, seed=1)
        found = fitted(inputs, outputs)
        for group in range(2):
            x, y = inputs[group], outputs[group]
            second = x.T @ x / rows
            ridge = shrinkage(second, rows) * second.diagonal().mean()
            expected = torch.linalg.solve(second + ridge * torch.eye(width, dtype=FLOAT), x.T @ y / rows).T
            torch.testing.assert_close(found[group], expected, rtol=1e-9, atol=1e-12)

    def test_no_system_is_wider_than_the_rows(self, monkeypatch):
        """A linear layer behind a flattened picture reads tens of thousands of inputs."""
        sizes = []
        cholesky = torch.linalg.cholesky
        monkeypatch.setattr(torch.linalg, "cholesky", lambda matrix: sizes.append(matrix.shape[-1]) or cholesky(matrix))
        fitted(drawn(1, 5, 4000), drawn(1, 5, 2, seed=1))
        assert sizes == [5]
