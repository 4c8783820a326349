import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.cost import Budget, Cost, Limit
from autoprune.errors import BudgetError, UnknownNameError

DENSE = Cost(
    macs=40_000_000, params=270_000, bytes=1_100_000, activations=2_000_000, nonzero_params=200_000, latency_ms=8.0
)


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
            ("activations<=50%", "activations", 1_000_000),
            ("activations<=1.5MB", "activations", 1_500_000),
            ("activations<=640KB", "activations", 640_000),
            ("nonzero_params<=50%", "nonzero_params", 100_000),
            ("nonzero_params<=50K", "nonzero_params", 50_000),
            ("nonzero_macs<=0.25", "nonzero_macs", 10_000_000),
            ("nonzero_macs<=10M", "nonzero_macs", 10_000_000),
            ("latency<=5ms", "latency", 5),
            ("latency<=5 MS", "latency", 5),
            ("latency<=0.005s", "latency", 5),
            ("latency<=2500us", "latency", 2.5),
            ("latency<=60%", "latency", 4.8),
            ("latency<=0.6", "latency", 4.8),
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
        with pytest.raises(
            UnknownNameError, match=r"no budget metric 'mac'. Did you mean 'macs'\? Known: activations, "
        ):
            Budget.parse("mac<=50%")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("macs<=5X", r"no unit of macs 'X'\. Known: %, G, K, M"),
            ("macs<=5MB", r"no unit of macs 'MB'\. Did you mean 'M'\? Known: %, G, K, M"),
            ("bytes<=5ms", r"no unit of bytes 'ms'\. .*Known: %, G, GB, K, KB, M, MB"),
            ("latency<=5M", r"no unit of latency 'M'\. .*Known: %, ms, s, us"),
        ],
    )
    def test_an_unknown_unit_gets_the_metrics_list(self, text, message):
        with pytest.raises(UnknownNameError, match=message):
            Budget.parse(text)

    def test_a_latency_has_its_unit(self):
        with pytest.raises(BudgetError, match=r"a latency needs its unit, but got 'latency<=5'; .* latency<=5ms"):
            Budget.parse("latency<=5")


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
            ("latency<=5ms", "latency<=5ms"),
            ("latency<=0.0005s", "latency<=500us"),
            ("latency<=1500ms", "latency<=1.5s"),
            ("latency<=0.001us", "latency<=1e-06ms"),
            ("latency<=60%", "latency<=60%"),
            ("activations<=1.5MB", "activations<=1.5M"),
            ("nonzero_macs<=2e9", "nonzero_macs<=2G"),
        ],
    )
    def test_it_is_the_shortest(self, text, shortest):
        assert str(Budget.parse(text)) == shortest

    @given(st.sampled_from(["macs", "params", "bytes"]), st.integers(2, 10**15))
    def test_absolute_limits_are_read_back_exactly(self, metric, number):
        budget = Budget.parse(f"{metric}<={number}")
        assert budget.limits[0].value == number
        assert Budget.parse(str(budget)) == budget

    @given(st.floats(1e-9, 1e9))
    def test_latencies_are_read_back_exactly(self, milliseconds):
        budget = Budget((Limit("latency", milliseconds, relative=False),))
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

    def test_activations_zeros_and_time_are_limited_like_the_rest(self):
        cost = Cost(10_000_000, 27_000, 0, 1_500_000, 50_000, 4_000_000, 6.0)
        used = {
            text: Budget.parse(text).utilisation(cost, DENSE)
            for text in ("activations<=50%", "nonzero_params<=50%", "nonzero_macs<=50%", "latency<=50%", "latency<=3ms")
        }
        assert list(used.values()) == [1.5, 0.5, 0.2, 1.5, 2.0]

    @pytest.mark.parametrize("text", ["latency<=5ms", "latency<=60%", "macs<=50%,latency<=5ms"])
    def test_a_latency_that_nobody_predicted(self, text):
        with pytest.raises(
            BudgetError, match=r"needs a latency table: measure one with `LatencyTable.measure` and set"
        ):
            Budget.parse(text).utilisation(Cost(1, 2, 3), Cost(1, 2, 3))

    def test_a_share_of_nothing(self):
        with pytest.raises(
            BudgetError, match="the dense network has 0 macs, of which macs<=50% is no limit; give a numb"
        ):
            Budget.parse("macs<=50%").utilisation(Cost(0, 2, 3), Cost(0, 2, 3))


class TestCost:
    def test_without_masks_nothing_is_zero(self):
        assert Cost(10, 20, 30) == Cost(10, 20, 30, 0, nonzero_params=20, nonzero_macs=10)
        assert (Cost(10, 20, 30, nonzero_params=0).nonzero_params, Cost(10, 20, 30).latency_ms) == (0, None)

    @pytest.mark.parametrize("cost", [Cost(1, 2, 3), Cost(1, 2, 3, 4, 5, 6, 7.5), DENSE], ids=str)
    def test_it_is_read_back_from_its_names(self, cost):
        values = cost.to_dict()
        assert ("latency_ms" in values) == (cost.latency_ms is not None)
        assert Cost.from_dict({**values, "seconds": 1.0}) == cost

    def test_of_an_older_line_the_rest_is_as_if_nothing_were_masked(self):
        assert Cost.from_dict({"macs": 1, "params": 2, "bytes": 3}) == Cost(1, 2, 3)
