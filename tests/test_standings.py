"""Standings: intervals, tests and words with exact numbers."""

import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.errors import ConfigError
from autoprune.standings import Interval, Standings, Trace, holm, paired, standings, t_interval

DENSE = 100.0


def trace(*accuracies: float, macs: float = 50.0, seconds: float = 1.0) -> Trace:
    return Trace(accuracies, (macs,) * len(accuracies), seconds)


def of(picks: Mapping[str, Sequence[float]], **more: Mapping[str, Sequence[float]]) -> Standings:
    """Return the standings of searches of one evaluation each."""
    return standings({agent: [trace(pick) for pick in several] for agent, several in picks.items()}, 1, DENSE, **more)


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_an_interval_is_students() -> None:
    by = t_interval([1.0, 2.0, 3.0])
    assert by.mean == 2.0
    assert by.low == pytest.approx(2 - 4.302653 / math.sqrt(3))  # t of 2 degrees of freedom at 97.5 %
    assert by.high == pytest.approx(2 + 4.302653 / math.sqrt(3))


def test_one_value_has_no_interval() -> None:
    assert t_interval([0.7]) == Interval(0.7, None, None)


def test_no_value_has_no_mean() -> None:
    with pytest.raises(ConfigError, match="got none"):
        t_interval([])


def test_pairs_take_out_what_seeds_share() -> None:
    by, p = paired([1.1, 5.2, 9.3], [1.0, 5.0, 9.0])
    assert by.mean == pytest.approx(0.2)
    assert by.high == pytest.approx(0.2 + 4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert p == pytest.approx(0.0741799, rel=1e-5)  # t = 2 sqrt(3) with 2 degrees of freedom


def test_pairs_that_differ_alike_are_certain_and_equal_ones_are_not_different() -> None:
    assert paired([0.3, 0.5], [0.1, 0.3]) == (Interval(0.2, 0.2, 0.2), 0.0)
    assert paired([0.3, 0.5], [0.3, 0.5]) == (Interval(0.0, 0.0, 0.0), 1.0)
    assert paired([0.3], [0.1]) == (Interval(0.2, None, None), None)


def test_a_difference_of_one_sample_is_not_made_certain_by_rounding() -> None:
    (mean, low, high), p = paired([0.91, 0.91], [0.90, 0.90], samples=100)
    reach = 12.7062 * 0.01 / math.sqrt(12)  # t of 1 degree of freedom at 97.5 %, times the error of two roundings
    assert (mean, low, high) == pytest.approx((0.01, 0.01 - reach, 0.01 + reach), rel=1e-5)
    assert p == pytest.approx(1 - 2 * math.atan(math.sqrt(12)) / math.pi)
    assert paired([0.91, 0.81], [0.90, 0.70], samples=100) == paired([0.91, 0.81], [0.90, 0.70])
    (_, low, high), p = paired([0.9, 0.9], [0.9, 0.9], samples=100)
    assert low == -(high or 0)
    assert p == 1.0


def test_pairs_of_other_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 2 and 1"):
        paired([1.0, 2.0], [1.0])


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_no_correction_and_bonferroni(probabilities: list[float]) -> None:
    corrected = holm(probabilities)
    for p, one in zip(probabilities, corrected, strict=True):
        assert p <= one <= max(1.0, len(probabilities) * p)
    order = sorted(range(len(probabilities)), key=lambda index: probabilities[index])
    assert [corrected[index] for index in order] == sorted(corrected)


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_course_of_searches() -> None:
    first = Trace((0.5, math.nan, 0.8, 0.7), (50.0, 10.0, 50.0, 25.0), 3.0)
    second = Trace((0.2, 0.4), (50.0, 50.0), 1.0)  # which ended early
    found = standings({"tpe": [first, second]}, 4, DENSE)
    (row,) = found.table
    assert row.accuracies == (0.8, 0.4)
    assert row.hypervolumes == pytest.approx((0.8 * 0.5 + 0.7 * 0.25, 0.4 * 0.5))
    assert row.nearly == (3, 2)
    assert row.used == (4, 2)
    assert row.seconds == (3.0, 1.0)
    assert [one.mean for one in found.curves["tpe"]["accuracy"]] == pytest.approx([0.35, 0.45, 0.6, 0.6])
    assert [one.mean for one in found.curves["tpe"]["hypervolume"]] == pytest.approx([0.175, 0.225, 0.3, 0.3875])
    assert found.picked is None  # nothing to compare with
    assert "tpe proposed 2 to 4 policies of 4, and had no more to propose." in found.words


def test_where_nothing_was_measured_the_pick_is_worth_nothing() -> None:
    (row,) = standings({"tpe": [trace(math.nan), Trace((), ())]}, 1, DENSE).table
    assert row.accuracies == (0.0, 0.0)
    assert row.hypervolumes == (0.0, 0.0)


def test_nearly_is_99_of_100() -> None:
    (row,) = standings({"tpe": [trace(0.98, 0.99, 1.0), trace(0.5, 0.5, 0.5)]}, 3, DENSE).table
    assert row.nearly == (2, 1)


def test_the_best_comes_first_whatever_the_order() -> None:
    found = of({"uniform": [0.5, 0.6], "tpe": [0.7, 0.8], "random": [0.6, 0.7]})
    assert [row.agent for row in found.table] == ["tpe", "random", "uniform"]
    assert found.picked is not None
    assert found.picked.best == "tpe"
    assert [one.agent for one in found.picked.to_random] == ["tpe", "uniform"]
    assert [one.agent for one in found.picked.to_best] == ["random", "uniform"]


@pytest.mark.parametrize(
    ("traces", "said"),
    [
        ({}, "every agent needs as many searches"),
        ({"tpe": []}, "at least one"),
        ({"tpe": [trace(0.1)], "random": [trace(0.1), trace(0.2)]}, r"got \[1, 2\]"),
        ({"tpe": [trace(0.1, 0.2)]}, "searches of 1 evaluations are compared, but one has 2"),
    ],
)
def test_what_cant_be_compared_is_refused(traces: dict[str, list[Trace]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        standings(traces, 1, DENSE)


def test_a_trace_of_two_lengths_is_refused() -> None:
    with pytest.raises(ConfigError, match="got 2 and 1"):
        Trace((0.1, 0.2), (1.0,))


def test_it_goes_to_json() -> None:
    document = of({"tpe": [0.7, 0.8], "random": [0.6, 0.7]}, tests={"tpe": [0.6, 0.6], "random": [0.5, 0.5]}).to_dict()
    row = document["table"][0]
    assert row["agent"] == "tpe"
    assert row["accuracy"]["values"] == [0.7, 0.8]
    assert row["test"]["mean"] == 0.6
    assert "finetuned" not in row
    (difference,) = document["differences"]["picked"]["to_random"]
    assert difference == {"agent": "tpe", "other": "random", "mean": 0.1, "low": 0.1, "high": 0.1} | {
        "p": 0.0,
        "p_holm": 0.0,
        "clear": True,
    }
    assert document["curves"]["random"]["accuracy"]["mean"] == pytest.approx([0.65])


# -- words ------------------------------------------------------------------------------------------------------------


def test_words_tell_what_is_clear_from_what_is_not() -> None:
    found = of(
        {
            "random": [0.900, 0.902, 0.898, 0.901],
            "evolution": [0.910, 0.911, 0.906, 0.911],
            "amc": [0.902, 0.899, 0.903, 0.898],
            "uniform": [0.850, 0.850, 0.850, 0.850],
        }
    )
    assert found.words == (
        "evolution picks best on average over 4 seeds: 91.0 % (90.6 to 91.3).",
        "evolution picks 0.9 points more than random (0.8 to 1.1).",
        "uniform picks 5.0 points less than random (4.8 to 5.3).",
        "amc (+0.03 points, −0.6 to 0.7) can't be told apart from random.",
        "evolution is the best by these same numbers, which favours it in what follows.",
        "amc picks 0.9 points less than evolution (0.2 to 1.6).",
        "uniform picks 5.9 points less than evolution (5.6 to 6.3).",
        "In hypervolume against random, evolution (+0.005, 0.004 to 0.005) is ahead; uniform (−0.025, −0.026 to "
        "−0.024) is behind; amc (0.000, −0.003 to 0.003) can't be told apart.",
    )


def spending(macs: Mapping[str, Sequence[float]], samples: tuple[int, int] = (0, 0)) -> Standings:
    """Return the standings of searches whose one policy is always as accurate, at other costs: 0.8 * (1 - macs)."""
    traces = {agent: [trace(0.8, macs=each) for each in several] for agent, several in macs.items()}
    return standings(traces, 1, DENSE, samples=samples)


def test_hypervolumes_are_tested_too() -> None:
    costs = {"random": [50.0] * 3, "thrifty": [25.0, 30.0, 35.0], "lavish": [75.0, 70.0, 65.0]}
    found = spending(costs)
    assert found.dominated is not None
    thrifty, lavish = found.dominated.to_random
    reach = 4.302653 * 0.04 / math.sqrt(3)  # t of 2 degrees of freedom at 97.5 %
    assert thrifty.by == pytest.approx((0.16, 0.16 - reach, 0.16 + reach), rel=1e-6)
    assert lavish.by == pytest.approx((-0.16, -0.16 - reach, -0.16 + reach), rel=1e-6)
    p = 1 - math.sqrt(48 / 50)  # t = 4 sqrt(3) with 2 degrees of freedom
    assert (thrifty.p, thrifty.corrected) == pytest.approx((p, 2 * p))
    assert (lavish.p, lavish.corrected) == pytest.approx((p, 2 * p))
    assert found.dominated.best == "thrifty"
    assert [(one.agent, round(one.by.mean, 9)) for one in found.dominated.to_best] == [
        ("random", -0.16),
        ("lavish", -0.32),
    ]
    assert found.words[-1] == (
        "In hypervolume against random, thrifty (+0.160, 0.061 to 0.259) is ahead; lavish (−0.160, −0.259 to −0.061) "
        "is behind."
    )
    document = found.to_dict()["differences"]["hypervolume"]
    assert [one["clear"] for one in document["to_random"]] == [True, True]
    more = spending(costs | {"wavering": [40.0, 60.0, 50.0]})  # of three, Holm takes both back
    assert more.dominated is not None
    assert [one.corrected for one in more.dominated.to_random] == pytest.approx([3 * p, 1.0, 3 * p])
    assert more.words[-1] == (
        "In hypervolume against random, thrifty (+0.160, 0.061 to 0.259), wavering (0.000, −0.199 to 0.199) and lavish "
        "(−0.160, −0.259 to −0.061) can't be told apart."
    )


def test_hypervolumes_of_equal_seeds_are_as_coarse_as_accuracies() -> None:
    costs = {"random": [50.0] * 3, "tpe": [49.0] * 3, "amc": [49.5] * 3}
    assert (
        spending(costs).words[-1].endswith("tpe (+0.008, 0.008 to 0.008) and amc (+0.004, 0.004 to 0.004) are ahead.")
    )
    rounded = spending(costs, samples=(100, 100)).words[-1]  # 4.3 times 0.01 / sqrt(18) to either side
    assert rounded.endswith("tpe (+0.008, −0.002 to 0.018) and amc (+0.004, −0.006 to 0.014) can't be told apart.")


def test_several_that_cant_be_told_apart_are_one_sentence() -> None:
    found = of({"random": [0.9, 0.91, 0.92], "tpe": [0.93, 0.9, 0.91], "amc": [0.92, 0.90, 0.92]})
    assert found.words[1:] == (
        "amc (+0.3 points, −3.5 to 4.1) and tpe (+0.3 points, −5.4 to 6.1) can't be told apart from random.",
        "amc is the best by these same numbers, which favours it in what follows.",
        "tpe (0.0 points, −2.5 to 2.5) can't be told apart from amc.",
        "In hypervolume against random, amc (+0.002, −0.017 to 0.021) and tpe (+0.002, −0.027 to 0.030) can't be told "
        "apart.",
    )


def test_a_difference_that_holm_takes_back_is_not_called_one() -> None:
    picks = {"random": [0.90, 0.90, 0.90], "a": [0.911, 0.912, 0.907], "b": [0.90, 0.91, 0.90], "c": [0.90, 0.90, 0.91]}
    found = of(picks)
    assert found.picked is not None
    first = found.picked.to_random[0]
    assert first.agent == "a"
    assert first.p is not None
    assert first.p < 0.05 < (first.corrected or 0)
    assert not first.clear
    assert "a (+1.0 points, 0.3 to 1.7), b" in found.words[1]


def test_one_seed_has_no_intervals_and_says_so() -> None:
    found = of({"random": [0.9], "tpe": [0.95]}, tests={"random": [0.8], "tpe": [0.7]})
    assert found.words == (
        "tpe picks best with this seed: 95.0 %.",
        "With one seed there are no intervals, and nothing says which differences are larger than the noise; compare "
        "with more seeds.",
        "Fine-tuned alike, random's picks are the best on the test split: 80.0 %.",
    )
    assert found.picked is not None
    assert [one.clear for one in found.picked.to_random] == [False]
    assert found.table[0].to_dict()["accuracy"] == {"mean": 0.95, "low": None, "high": None, "values": [0.95]}


def test_the_test_split_has_words_of_its_own() -> None:
    picks = {"random": [0.9, 0.91], "tpe": [0.95, 0.96]}
    found = of(
        picks, tests={"random": [0.8, 0.81], "tpe": [0.79, 0.80]}, tuned={"random": [0.9, 0.9], "tpe": [0.9, 0.9]}
    )
    assert found.words[-2:] == (
        "Fine-tuned alike, random's picks are the best on the test split: 80.5 %.",
        "On the test split, tpe has 1.0 point less than random (1.0 to 1.0).",
    )
