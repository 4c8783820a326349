"""The three schemes of See et al. 2016, by hand on few weights and by their laws on many."""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.errors import ConfigError, PolicyError
from autoprune.policy import Policy
from autoprune.scoring.allocation import class_blind, class_distribution, class_uniform
from autoprune.structure.groups import Pattern
from autoprune.structure.masks import mask

Weights = Mapping[str, torch.Tensor]
Scheme = Callable[[Weights, float], Policy]
SCHEMES = [class_blind, class_uniform, class_distribution]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.__name__)


def counts(weights: Weights, policy: Policy) -> dict[str, int]:
    removed = {name: policy[name] * values.numel() for name, values in weights.items()}
    assert all(abs(count - round(count)) < 1e-6 for count in removed.values())
    return {name: round(count) for name, count in removed.items()}


def tensors(**lists: list[float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values) for name, values in lists.items()}


@st.composite
def weights(draw: st.DrawFn, smallest: int = 1) -> dict[str, torch.Tensor]:
    values = st.lists(st.integers(-4, 4).map(float), min_size=smallest, max_size=12)
    return {str(index): torch.tensor(draw(values)) for index in range(draw(st.integers(1, 5)))}


SMALL_AND_LARGE = tensors(small=[0.1, -0.2, 0.3, -0.4], large=[1.0, -2.0, 3.0, -4.0, 5.0, -6.0])


class TestByHand:
    def test_class_blind_has_one_threshold(self) -> None:
        assert counts(SMALL_AND_LARGE, class_blind(SMALL_AND_LARGE, 0.3)) == {"small": 3, "large": 0}
        assert counts(SMALL_AND_LARGE, class_blind(SMALL_AND_LARGE, 0.5)) == {"small": 3, "large": 2}

    def test_class_uniform_has_one_fraction(self) -> None:
        assert counts(SMALL_AND_LARGE, class_uniform(SMALL_AND_LARGE, 0.5)) == {"small": 2, "large": 3}
        # 1.2 and 1.8 weights: three in all, the larger fraction of a weight gets the one that is left
        assert counts(SMALL_AND_LARGE, class_uniform(SMALL_AND_LARGE, 0.3)) == {"small": 1, "large": 2}

    def test_class_distribution_has_a_threshold_of_deviations(self) -> None:
        """Deviations 1 and 10: thresholds 1.1 and 11 take one and two."""
        given = tensors(narrow=[1.0, -1.0] * 2, wide=[2.0, -2.0, math.sqrt(196), -math.sqrt(196)])
        assert given["narrow"].std(correction=0) == 1
        assert given["wide"].std(correction=0) == 10
        assert counts(given, class_distribution(given, 0.25)) == {"narrow": 0, "wide": 2}
        assert counts(given, class_blind(given, 0.25)) == {"narrow": 2, "wide": 0}
        assert counts(given, class_distribution(given, 0.5)) == {"narrow": 2, "wide": 2}

    def test_the_deviation_is_that_of_signed_weights(self) -> None:
        """Of magnitudes it would be 0 for the first, and 1 for the second."""
        given = tensors(signed=[3.0, -3.0, 3.0, -3.0], shifted=[3.0, 5.0, 3.0, 5.0])
        assert counts(given, class_distribution(given, 3 / 8)) == {"signed": 3, "shifted": 0}

    def test_constant_weights_go_last(self) -> None:
        given = tensors(constant=[0.5] * 4, zeros=[0.0] * 2, other=[1.0, 2.0, 3.0])
        assert counts(given, class_distribution(given, 2 / 9)) == {"constant": 0, "zeros": 0, "other": 2}
        assert counts(given, class_distribution(given, 4 / 9)) == {"constant": 2, "zeros": 0, "other": 2}

    def test_ties_go_by_order(self) -> None:
        given = tensors(a=[1.0] * 3, b=[1.0] * 3)
        assert counts(given, class_blind(given, 0.5)) == {"a": 2, "b": 1}
        given = tensors(a=[0.0, 0.0, 0.0], b=[0.0] * 3, c=[2.0])
        assert counts(given, class_blind(given, 3 / 7)) == {"a": 2, "b": 1, "c": 0}

    def test_double_precision_is_not_rounded(self) -> None:
        given = {"a": torch.tensor([1 + 1e-12, 2.0], dtype=torch.float64), "b": torch.tensor([1.0, 2.0])}
        assert counts(given, class_blind(given, 0.25)) == {"a": 0, "b": 1}

    def test_half_precision_and_shapes(self) -> None:
        given = {"a": torch.arange(8.0).view(2, 2, 2).bfloat16(), "b": torch.full((2, 2), 3.5).half()}
        given["a"].requires_grad_()
        assert counts(given, class_blind(given, 0.5)) == {"a": 4, "b": 2}


class TestLaws:
    @every_scheme
    @settings(max_examples=60, deadline=None)
    @given(given_weights=weights(smallest=2), sparsity=st.floats(0, 1, exclude_max=True))
    def test_the_total_is_met_and_no_group_is_emptied(
        self, scheme: Scheme, given_weights: dict[str, torch.Tensor], sparsity: float
    ) -> None:
        before = {name: values.clone() for name, values in given_weights.items()}
        removed = counts(given_weights, scheme(given_weights, sparsity))
        sizes = {name: values.numel() for name, values in given_weights.items()}
        assert list(removed) == list(given_weights)
        assert all(0 <= removed[name] < size for name, size in sizes.items())
        total = round(sparsity * sum(sizes.values()))
        missed = min(total, sum(sizes.values()) - len(sizes)) - sum(removed.values())
        emptied = sum(removed[name] == size - 1 for name, size in sizes.items())  # but for the last weight
        assert 0 <= missed <= (emptied if scheme is class_uniform else 0)
        assert all(torch.equal(values, before[name]) for name, values in given_weights.items())

    @settings(max_examples=60, deadline=None)
    @given(weights(), st.floats(0, 1, exclude_max=True))
    def test_class_blind_removes_the_smallest_of_all_but_each_groups_largest(
        self, given_weights: dict[str, torch.Tensor], sparsity: float
    ) -> None:
        candidates: list[tuple[float, int, int]] = []
        for group, values in enumerate(given_weights.values()):
            ordered = sorted((abs(value), group, place) for place, value in enumerate(values.tolist()))
            candidates += ordered[:-1]
        total = round(sparsity * sum(values.numel() for values in given_weights.values()))
        expected = {(group, place) for _, group, place in sorted(candidates)[:total]}
        removed = counts(given_weights, class_blind(given_weights, sparsity))
        gone = set()
        for group, (name, values) in enumerate(given_weights.items()):
            stays = mask(Pattern(name), values.abs(), removed[name], values.numel())
            gone |= {(group, place) for place in (~stays).nonzero().flatten().tolist()}
        assert gone == expected

    @settings(max_examples=60, deadline=None)
    @given(weights(), st.floats(0, 1, exclude_max=True))
    def test_class_uniform_is_off_by_less_than_a_weight(
        self, given_weights: dict[str, torch.Tensor], sparsity: float
    ) -> None:
        for name, count in counts(given_weights, class_uniform(given_weights, sparsity)).items():
            assert abs(count - sparsity * given_weights[name].numel()) < 1 + 1e-9

    @settings(max_examples=60, deadline=None)
    @given(weights(smallest=2), st.floats(0, 0.9), st.sampled_from([0.5, 4.0]))
    def test_class_distribution_does_not_see_a_groups_scale(
        self, given_weights: dict[str, torch.Tensor], sparsity: float, scale: float
    ) -> None:
        first, *rest = given_weights
        scaled = {first: given_weights[first] * scale, **{name: given_weights[name] for name in rest}}
        assert class_distribution(scaled, sparsity) == class_distribution(given_weights, sparsity)

    def test_class_blind_does_see_it(self) -> None:
        scaled = {"small": SMALL_AND_LARGE["small"] * 100, "large": SMALL_AND_LARGE["large"]}
        assert class_blind(scaled, 0.5) != class_blind(SMALL_AND_LARGE, 0.5)

    @every_scheme
    def test_of_one_group_all_take_the_same(self, scheme: Scheme) -> None:
        given = tensors(only=[3.0, -1.0, 2.0, 0.0, 5.0])
        assert counts(given, scheme(given, 0.6)) == {"only": 3}


class TestEdges:
    @every_scheme
    def test_none_at_all(self, scheme: Scheme) -> None:
        assert scheme({}, 0.5) == Policy({})
        assert scheme(SMALL_AND_LARGE, 0.0) == Policy({"small": 0, "large": 0})

    @every_scheme
    def test_a_single_weight_stays(self, scheme: Scheme) -> None:
        given = tensors(single=[0.0], other=[1.0, 2.0])
        assert counts(given, scheme(given, 0.99)) == {"single": 0, "other": 1}

    @every_scheme
    @pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan])
    def test_a_rate_out_of_range_is_refused(self, scheme: Scheme, sparsity: float) -> None:
        with pytest.raises(PolicyError, match=r"^`0 <= sparsity < 1` must hold for what is shared out, but got"):
            scheme(SMALL_AND_LARGE, sparsity)

    @every_scheme
    def test_an_empty_group_is_refused(self, scheme: Scheme) -> None:
        with pytest.raises(ConfigError, match=r"^every group must have weights, but 'a' has none; leave it out$"):
            scheme({"a": torch.zeros(0), **SMALL_AND_LARGE}, 0.5)

    @pytest.mark.parametrize("scheme", [class_blind, class_distribution])
    def test_nan_is_refused(self, scheme: Scheme) -> None:
        with pytest.raises(ConfigError, match=r"^the weights of 'a' have NaN"):
            scheme(tensors(a=[1.0, math.nan, 2.0]), 0.5)
