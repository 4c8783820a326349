import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.cost import Budget, Cost, Limit
from autoprune.errors import BudgetError, UnknownNameError

DENSE = Cost(macs=40_000_000, params=270_000, bytes=1_100_000)


class TestParse:
    @pytest.mark.parametrize(
        ("text", "metric", "allowed"),
        [
            ("macs<=50%", "macs", 20_000_000),
            ("macs<=0.5", "macs", 20_000_000),
            ("macs<=20M", "macs", 20_000_000),
            ("macs<=20m", "macs", 20_000_000),
            ("MACs <= 20 M", "macs", 20_000_000),
            ("macs<=20000000", "macs", 20_000_000),
            ("macs<=2e7", "macs", 20_000_000),
            ("macs<=0.02G", "macs", 20_000_000),
            ("params<=100K", "params", 100_000),
            ("params<=1", "params", 270_000),
            ("params<=150%", "params", 405_000),
            ("bytes<=0.5MB", "bytes", 500_000),
            ("bytes<=500kb", "bytes", 500_000),
            ("bytes<=1GB", "bytes", 10**9),
        ],
    )
    def test_one_limit(self, text, metric, allowed):
        (limit,) = Budget.parse(text).limits
        assert limit.metric == metric
        assert limit.absolute(DENSE) == pytest.approx(allowed, rel=1e-12)

    def test_several(self):
        budget = Budget.parse("macs<=50%, params<=0.4,bytes<=1MB")
        assert budget.limits == (
            Limit("macs", 0.5, relative=True),
            Limit("params", 0.4, relative=True),
            Limit("bytes", 1e6, relative=False),
        )

    def test_none_is_no_limit(self):
        assert Budget.parse(None) == Budget()
        assert str(Budget()) == ""

    @pytest.mark.parametrize(
        "text", ["", "macs", "macs<50%", "macs>=50%", "50%", "macs<=", "macs<=half", "macs<=-5", ",", "macs<=50%,"]
    )
    def test_what_can_not_be_read_is_shown_an_example(self, text):
        with pytest.raises(BudgetError, match=r"can't read the budget .*; write for example macs<=50%, macs<=20M or"):
            Budget.parse(text)

    def test_a_number_with_two_points(self):
        with pytest.raises(BudgetError, match=r"can't read the number in the budget 'macs<=1\.2\.3M'"):
            Budget.parse("macs<=1.2.3M")

    @pytest.mark.parametrize("text", ["macs<=0", "macs<=0%", "macs<=0.0M", "macs<=1e999"])
    def test_it_is_positive(self, text):
        with pytest.raises(BudgetError, match="a budget must be a positive number, but got"):
            Budget.parse(text)

    def test_an_unknown_metric_gets_the_nearest(self):
        with pytest.raises(UnknownNameError, match=r"no budget metric 'mac'. Did you mean 'macs'\? Known: bytes, macs"):
            Budget.parse("mac<=50%")

    def test_an_unknown_unit_gets_the_list(self):
        with pytest.raises(UnknownNameError, match=r"no budget unit 'X'\. Known: %, G, GB, K, KB, M, MB"):
            Budget.parse("macs<=5X")


class TestText:
    @pytest.mark.parametrize(
        ("text", "shortest"),
        [
            ("macs<=50%", "macs<=50%"),
            ("macs<=0.5, params <= 0.4", "macs<=50%,params<=40%"),
            ("macs<=20000000", "macs<=20M"),
            ("macs<=12345678", "macs<=12.345678M"),
            ("params<=999", "params<=999"),
            ("bytes<=1.5GB", "bytes<=1.5G"),
            ("macs<=33.3333333%", "macs<=33.3333333%"),
        ],
    )
    def test_it_is_the_shortest(self, text, shortest):
        assert str(Budget.parse(text)) == shortest

    @given(st.sampled_from(["macs", "params", "bytes"]), st.integers(2, 10**15))
    def test_absolute_limits_are_read_back_exactly(self, metric, number):
        budget = Budget.parse(f"{metric}<={number}")
        assert budget.limits[0].value == number
        assert Budget.parse(str(budget)) == budget

    @given(st.floats(1e-6, 1))
    def test_relative_limits_are_read_back_exactly(self, fraction):
        budget = Budget((Limit("macs", fraction, relative=True),))
        assert Budget.parse(str(budget)) == budget


class TestUtilisation:
    def test_it_is_the_tightest_limit(self):
        budget = Budget.parse("macs<=50%,params<=0.4")
        assert budget.utilisation(Cost(10_000_000, 27_000, 0), DENSE) == 0.5
        assert budget.utilisation(Cost(10_000_000, 108_000, 0), DENSE) == 1.0
        assert budget.utilisation(Cost(30_000_000, 27_000, 0), DENSE) == 1.5

    def test_without_limits_the_dense_network_is_the_budget(self):
        assert Budget().utilisation(DENSE, DENSE) == 1.0
        assert Budget().utilisation(Cost(10_000_000, 0, 0), DENSE) == 0.25

    def test_a_limit_is_met_up_to_the_last_unit(self):
        budget = Budget.parse("macs<=12345678")
        assert budget.utilisation(Cost(12_345_678, 0, 0), DENSE) == 1.0
        assert budget.utilisation(Cost(12_345_679, 0, 0), DENSE) > 1
