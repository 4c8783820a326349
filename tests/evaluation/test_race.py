"""Racing: who is clearly worse is stopped, who is as good hardly ever; estimates are of samples in pairs."""

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from autoprune.evaluation import Evaluator, Ledger, Pipeline, Raced, Recovery, Samples, Workbench
from autoprune.evaluation.race import clearly_worse, legs
from autoprune.policy import Policy
from autoprune.task import Task

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def samples(*scores: float) -> Samples:
    values = torch.tensor(scores, dtype=torch.float64)
    return Samples(values, 1 - values)


def drawn(share: float, n: int, seed: int) -> Samples:
    """Return samples of which so many, on average, are right."""
    right = np.random.default_rng(seed).random(n) < share
    return samples(*right.astype(float))


class TestTest:
    def test_legs_end_at_a_tenth_a_quarter_a_half(self):
        assert [list(leg) for leg in legs(range(20))] == [[0, 1], [2, 3, 4], list(range(5, 10)), list(range(10, 20))]
        assert [list(leg) for leg in legs(range(3))] == [[0], [1], [2]]
        assert [list(leg) for leg in legs(range(1))] == [[0]]

    def test_ten_lost_and_none_gained_is_chance_enough_and_twelve_is_not(self):
        """One-sided sign test by the normal approximation: z = -n / sqrt(n), and 3.09 is the level of 0.001."""
        rival = samples(*[1.0] * 40)
        assert not clearly_worse(samples(*[0.0] * 9, *[1.0] * 31), rival)
        assert clearly_worse(samples(*[0.0] * 12, *[1.0] * 28), rival)

    def test_only_the_samples_so_far_count(self):
        rival = samples(*[1.0] * 20, *[0.0] * 1000)
        assert clearly_worse(samples(*[0.0] * 20), rival)
        assert not clearly_worse(samples(*[1.0] * 20), rival)

    def test_better_and_equal_are_never_worse(self):
        assert not clearly_worse(drawn(0.9, 500, 0), drawn(0.1, 500, 1))
        assert not clearly_worse(drawn(0.5, 500, 0), drawn(0.5, 500, 0))

    def test_who_is_as_good_is_stopped_once_in_a_thousand_looks(self):
        stopped = sum(clearly_worse(drawn(0.8, 300, 2 * n), drawn(0.8, 300, 2 * n + 1)) for n in range(600))
        assert stopped <= 4

    def test_who_is_ten_points_worse_is_seen_in_five_hundred_samples(self):
        seen = sum(clearly_worse(drawn(0.6, 500, 2 * n), drawn(0.75, 500, 2 * n + 1)) for n in range(40))
        assert seen >= 36


class TestEstimate:
    def test_the_rival_on_all_and_the_difference_on_some(self):
        rival = samples(1, 1, 0, 0, 1, 1, 1, 1)
        found = samples(1, 0, 0, 0).summary("reconstructed", rival)
        assert found.accuracy == pytest.approx(6 / 8 - 1 / 4)
        assert found.loss == pytest.approx(2 / 8 + 1 / 4)
        differences = math.sqrt(0.25 / 4)  # the variance of (0, -1, 0, 0) over their number
        assert found.accuracy_se == pytest.approx(math.hypot(rival.summary("").accuracy_se, differences))
        assert found.samples == 4

    def test_all_samples_are_no_estimate(self):
        rival = samples(1, 0, 1, 1)
        assert samples(1, 1, 0, 0).summary("short", rival) == samples(1, 1, 0, 0).summary("short")
        assert samples(1, 1, 0, 0).summary("short").samples is None


BAD, GOOD, SLIGHT = Policy({"conv1": 0.75, "conv2": 0.75}), Policy({"conv2": 0.25}), Policy({"conv2": 0.375})


def racing(task: Task, plain: Evaluator) -> Pipeline:
    """Return a pipeline that races, on batches of four samples."""
    bench = plain.bench
    raced = Workbench(task, bench.structure, bench.orders, 200, 0, "recalibrated", race=True)
    raced._batch = 4
    raced._val = raced._validation()
    return Pipeline(raced, Recovery(200), 0)


def measured_by(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list that will hold how many samples each network is measured on."""
    measure, sizes = pipeline.bench.measure, list[int]()

    def noted(*given: Any, **named: Any) -> Samples:
        found = measure(*given, **named)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(pipeline.bench, "measure", noted)
    return sizes


class TestPipeline:
    def test_a_bad_candidate_is_stopped_and_a_good_one_is_not(
        self, task: Task, make_evaluator: Callable[..., Evaluator]
    ) -> None:
        plain = make_evaluator(task)
        pipeline = racing(task, plain)
        (bad,), (exact,) = pipeline(Raced(BAD, GOOD)).measurements, pipeline(BAD).measurements
        assert bad.samples is not None
        assert bad.samples < 101
        assert bad.accuracy == pytest.approx(exact.accuracy, abs=0.2)
        assert bad.accuracy < pipeline(GOOD).measurements[0].accuracy
        assert exact.samples is None
        assert pipeline(Raced(SLIGHT, GOOD)).measurements == pipeline(SLIGHT).measurements

    def test_what_is_known_depends_on_the_rival_and_so_does_its_name(
        self, task: Task, make_evaluator: Callable[..., Evaluator]
    ) -> None:
        pipeline = racing(task, make_evaluator(task))
        outcomes = [pipeline(work) for work in (Raced(BAD, GOOD), Raced(BAD, BAD), BAD)]
        assert [one.measurements[0].samples is None for one in outcomes] == [False, True, True]
        assert [one.id for one in outcomes] == [f"{BAD.id} against {GOOD.id}", f"{BAD.id} against {BAD.id}", BAD.id]

    def test_a_rival_that_was_measured_is_not_measured_again(
        self, task: Task, make_evaluator: Callable[..., Evaluator], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipeline = racing(task, make_evaluator(task))
        sizes = measured_by(pipeline, monkeypatch)
        first = [pipeline(work) for work in (GOOD, Raced(BAD, GOOD), Raced(SLIGHT, GOOD))]
        assert len(sizes) == 3
        monkeypatch.setattr(pipeline, "_rivals", {})
        again = pipeline(Raced(BAD, GOOD))
        assert sizes[3] == 101
        assert sizes[4] < 101
        assert again.measurements == first[1].measurements

    def test_a_rival_that_was_stopped_is_measured_to_the_end(
        self, task: Task, make_evaluator: Callable[..., Evaluator], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipeline = racing(task, make_evaluator(task))
        sizes = measured_by(pipeline, monkeypatch)
        pipeline(Raced(BAD, GOOD))
        pipeline(Raced(SLIGHT, BAD))
        assert sizes[0] == sizes[2] == sizes[3] == 101
        assert sizes[1] < 101

    def test_few_rivals_are_kept_and_who_is_asked_for_stays(
        self, task: Task, make_evaluator: Callable[..., Evaluator], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("autoprune.evaluation.pipeline._RIVALS", 2)
        pipeline = racing(task, make_evaluator(task))
        for work in (GOOD, SLIGHT, Raced(BAD, GOOD), Policy({"conv1": 0.125}), Policy({})):
            pipeline(work)
        assert list(pipeline._rivals) == [Policy({"conv1": 0.125}).id, Policy({}).id]
        for work in (GOOD, SLIGHT, Raced(BAD, GOOD), Policy({"conv1": 0.125})):
            pipeline(work)
        assert list(pipeline._rivals) == [GOOD.id, Policy({"conv1": 0.125}).id]

    def test_what_is_final_is_measured_on_all(self, task: Task, make_evaluator: Callable[..., Evaluator]) -> None:
        pipeline = racing(task, make_evaluator(task))
        _, (last,) = pipeline.recovered(BAD, final=True, rival=GOOD)
        assert last.samples is None
        assert not pipeline._rivals

    def test_what_is_fine_tuned_is_measured_on_all(self, task: Task, make_evaluator: Callable[..., Evaluator]) -> None:
        raced = racing(task, make_evaluator(task))
        pipeline = Pipeline(raced.bench, Recovery(200, finetune_steps=1), 0)
        last = pipeline(Raced(BAD, GOOD)).measurements[-1]
        assert (last.fidelity, last.samples) == ("short", None)
        assert not pipeline._rivals

    def test_a_pipeline_elsewhere_stops_at_the_same_sample(
        self, task: Task, make_evaluator: Callable[..., Evaluator]
    ) -> None:
        plain = make_evaluator(task)
        bench = Workbench(task, plain.bench.structure, plain.bench.orders, 200, 0, "recalibrated", race=True)
        pipeline = Pipeline(bench, Recovery(200), 0)
        there: Pipeline = pickle.loads(pickle.dumps(pipeline))
        assert there.bench.race
        assert there(Raced(BAD, GOOD)).measurements == pipeline(Raced(BAD, GOOD)).measurements

    def test_the_order_of_samples_is_random_and_repeatable(
        self, task: Task, make_evaluator: Callable[..., Evaluator]
    ) -> None:
        plain = make_evaluator(task).bench
        one, other = (
            Workbench(task, plain.structure, plain.orders, 200, seed, race=True)._validation() for seed in (0, 0)
        )
        ((_, targets),) = one
        assert torch.equal(targets, next(iter(other))[1])
        assert not torch.equal(targets, torch.arange(101) % 4)  # as they come
        assert targets.bincount().tolist() == [26, 25, 25, 25]


class TestEvaluator:
    @pytest.fixture
    def told(self, task: Task, make_evaluator: Callable[..., Evaluator]) -> Callable[..., Evaluator]:
        """Return what makes an evaluator with a rival, or without one."""
        plain = make_evaluator(task)
        pipeline = racing(task, plain)
        return lambda rival: Evaluator(pipeline, plain.costs, Ledger(), rival=rival)

    def test_it_races_against_whom_the_agent_names_or_else_its_own(self, told: Callable[..., Evaluator]) -> None:
        evaluator = told(GOOD)
        bad, slight, good = (evaluator.bench.structure.rounded(policy).id for policy in (BAD, SLIGHT, GOOD))
        by_default = evaluator.submit(BAD, arm="search", agent="a")()
        named = evaluator.submit(SLIGHT, arm="search", agent="a", rival=Policy({"conv2": 0.27}))()
        assert (by_default.id, by_default.rival) == (bad, good)
        assert by_default.measurements[0].samples is not None
        assert (named.id, named.rival) == (slight, good)  # what the named policy comes to
        assert [candidate.id for candidate in evaluator.ledger] == [bad, slight]

    def test_nobody_races_against_itself(self, told: Callable[..., Evaluator]) -> None:
        assert told(GOOD).evaluate(GOOD, arm="uniform", agent="uniform").rival is None

    def test_without_a_race_nobody_is_raced_whoever_is_named(self, told: Callable[..., Evaluator]) -> None:
        candidate = told(None).submit(BAD, arm="search", agent="a", rival=GOOD)()
        assert candidate.rival is None
        assert candidate.measurements[0].samples is None

    def test_under_way_or_known_the_first_rival_counts(self, told: Callable[..., Evaluator]) -> None:
        evaluator = told(GOOD)
        evaluator.at_once = 3
        good = evaluator.bench.structure.rounded(GOOD).id
        results = [evaluator.submit(BAD, arm="search", agent="a", rival=rival) for rival in (GOOD, SLIGHT)]
        results.append(evaluator.submit(SLIGHT, arm="search", agent="a"))
        assert [result().rival for result in results] == [good] * 3
        assert evaluator.submit(BAD, arm="search", agent="a", rival=SLIGHT)().rival == good
        assert len(evaluator.ledger) == 2
