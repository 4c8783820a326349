"""The evaluator: what a candidate is worth depends on its elements and the seed, and each is evaluated once."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autoprune.cost import count
from autoprune.errors import PolicyError, SearchOver
from autoprune.evaluation import RUNGS, Arm, Candidate, Evaluator, Ledger, Recovery, measure
from autoprune.finetuning import Recipe, Refit, recalibrate
from autoprune.policy import Policy
from autoprune.seeds import derive
from autoprune.structure import cut
from autoprune.task import Task, cross_entropy, top1

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

Make = Callable[..., Evaluator]
HALF = Policy({"conv1": 0.5, "conv2": 0.25})


def timeless(candidate: Candidate) -> Candidate:
    return dataclasses.replace(candidate, seconds=0.0)


def evaluate(evaluator: Evaluator, policy: Policy) -> Candidate:
    return evaluator.evaluate(policy, arm="search", agent="tpe")


class Counted:
    """Counts the measurements of a workbench."""

    def __init__(self, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        real = evaluator.bench.measure

        def measured(model: nn.Module, *options: Any) -> Any:
            self.count += 1
            return real(model, *options)

        monkeypatch.setattr(evaluator.bench, "measure", measured)


# ---------------------------------------------------------------------------------------------------------- workbench


def test_nothing_removed_is_the_dense_network(task: Task, make_evaluator: Make) -> None:
    bench = make_evaluator(task).bench
    inputs = next(task.val_batches(20))[0]
    torch.testing.assert_close(cut(bench.model, bench.change({}))(inputs), task.model.eval()(inputs))
    torch.testing.assert_close(
        cut(bench.model, bench.change(dict.fromkeys(bench.structure.names, 0)))(inputs), task.model(inputs)
    )
    direct = measure(task.model, task.val_batches(7), top1, cross_entropy)
    torch.testing.assert_close(bench.measure(bench.model).losses, direct.losses, rtol=1e-4, atol=1e-5)


def test_slicing_removes_the_least_important_first(task: Task, make_evaluator: Make) -> None:
    """Summed over the filter and over the weights that read it, the smallest L1 norms go."""
    bench = make_evaluator(task).bench
    assert isinstance(task.model, nn.Module)
    state = task.model.state_dict()
    norms = state["conv1.weight"].abs().sum((1, 2, 3)) + state["conv2.weight"].abs().sum((0, 2, 3))
    kept = sorted(norms.argsort()[3:].tolist())
    sliced = cut(bench.model, bench.change({"conv1": 3})).state_dict()
    assert torch.equal(sliced["conv1.weight"], state["conv1.weight"][kept])
    assert torch.equal(sliced["conv2.weight"], state["conv2.weight"][:, kept])


def test_calibration_reads_as_many_training_images_as_asked_for(task: Task, make_evaluator: Make) -> None:
    bench = make_evaluator(task, Recovery(calibration_images=130)).bench
    assert sum(len(inputs) for inputs, _ in bench.calibration) == 130
    again = make_evaluator(task, Recovery(calibration_images=130)).bench
    other = make_evaluator(task, Recovery(calibration_images=130), seed=1).bench
    (first, _), (second, _), (third, _) = (next(iter(made.calibration)) for made in (bench, again, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_the_input_network_is_never_changed(task: Task, make_evaluator: Make) -> None:
    before = copy.deepcopy(task.model.state_dict())
    modes = [module.training for module in task.model.modules()]
    evaluate(make_evaluator(task), HALF)
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())
    assert [module.training for module in task.model.modules()] == modes


# --------------------------------------------------------------------------------------------------------- evaluation


def test_a_candidate_states_what_was_removed_what_it_costs_and_how_far_it_was_recovered(
    task: Task, make_evaluator: Make
) -> None:
    evaluator = make_evaluator(task)
    candidate = evaluate(evaluator, Policy({"conv1": 0.45, "conv2": 0.3}))
    assert candidate.removed == {"conv1": 4, "conv2": 2}
    assert candidate.policy == Policy({"conv1": 4 / 8, "conv2": 2 / 8})
    assert candidate.id == candidate.policy.id
    assert (candidate.number, candidate.arm, candidate.agent) == (0, "search", "tpe")
    assert [m.fidelity for m in candidate.measurements] == ["reconstructed", "short"]
    assert candidate.failure is None
    assert candidate.seconds > 0
    built, measurements = evaluator.pipeline.recovered(candidate.policy)
    assert candidate.cost == count(built, task.example_input).cost
    assert measurements == candidate.measurements
    assert not built.training


@pytest.mark.parametrize("rung", RUNGS)
def test_the_rungs_are_what_slicing_recovering_and_training_by_hand_give(
    task: Task, make_evaluator: Make, rung: str
) -> None:
    evaluator = make_evaluator(task)
    bench = evaluator.bench
    bench.rung = rung
    candidate = evaluate(evaluator, HALF)
    change = bench.change({"conv1": 4, "conv2": 2})
    model = cut(bench.model, change)
    if rung == "recalibrated":
        recalibrate(model, bench.calibration)
    else:
        images = torch.cat([inputs for inputs, _ in bench.calibration]).contiguous(memory_format=torch.channels_last)
        Refit(bench.model, images, each=50, seed=derive(0, "fitted rows"))(model, change)
    assert bench.measure(model).summary(rung) == candidate.at(rung)
    before = copy.deepcopy(model.state_dict())
    network, _ = evaluator.pipeline.recovered(HALF)
    assert any(not torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_reconstructing_is_nearer_to_the_dense_network_than_recalibrating(task: Task, make_evaluator: Make) -> None:
    evaluator = make_evaluator(task)
    inputs = next(iter(task.val_batches(100)))[0]
    errors = []
    with torch.no_grad():
        dense = evaluator.bench.model(inputs)
        for rung in RUNGS:
            evaluator.bench.rung = rung
            errors.append(float((evaluator.bench.recovered({"conv1": 4, "conv2": 4})(inputs) - dense).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_without_steps_it_stops_at_the_first_rung(task: Task, make_evaluator: Make) -> None:
    candidate = evaluate(make_evaluator(task, Recovery(200, 0)), HALF)
    assert candidate.fidelity == "reconstructed"
    assert len(candidate.measurements) == 1


def test_policies_that_slice_alike_are_evaluated_once(
    task: Task, make_evaluator: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = make_evaluator(task)
    counted = Counted(evaluator, monkeypatch)
    first = evaluate(evaluator, Policy({"conv1": 0.5, "conv2": 0.0}))
    for other in ({"conv2": 0.0, "conv1": 0.5}, {"conv1": 0.51}, {"conv1": 0.47, "conv2": 0.05}):
        assert evaluator.evaluate(Policy(other), arm="random", agent="random") is first
    assert counted.count == 2  # one a rung
    assert len(evaluator.ledger) == 1
    assert evaluate(evaluator, Policy({"conv1": 0.6})) is not first
    assert counted.count == 4


def test_a_result_does_not_depend_on_what_was_evaluated_before(task: Task, make_evaluator: Make) -> None:
    policies = [HALF, Policy({"conv1": 0.75, "conv2": 0.0}), Policy({"conv1": 0.0, "conv2": 0.5})]
    forth, back = make_evaluator(task), make_evaluator(task)
    ahead = {c.id: c for c in [evaluate(forth, policy) for policy in policies]}
    behind = {c.id: c for c in [evaluate(back, policy) for policy in reversed(policies)]}
    for policy_id, candidate in ahead.items():
        assert behind[policy_id].measurements == candidate.measurements
    assert evaluate(make_evaluator(task), policies[2]).measurements == ahead[policies[2].id].measurements


def test_the_seed_matters(task: Task, make_evaluator: Make) -> None:
    one, other = (evaluate(make_evaluator(task, seed=seed), HALF) for seed in (0, 1))
    assert one.loss != other.loss


def test_it_answers_from_the_ledger_of_an_earlier_process(
    task: Task, make_evaluator: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.jsonl"
    first = evaluate(make_evaluator(task, ledger=Ledger(path)), HALF)
    resumed = make_evaluator(task, ledger=Ledger(path))
    counted = Counted(resumed, monkeypatch)
    assert timeless(evaluate(resumed, HALF)) == timeless(first)
    assert counted.count == 0
    assert evaluate(resumed, Policy({"conv1": 0.75})).number == 1


def test_an_unknown_group_is_refused_before_anything_runs(task: Task, make_evaluator: Make) -> None:
    evaluator = make_evaluator(task)
    with pytest.raises(PolicyError, match="no group 'conv9'"):
        evaluate(evaluator, Policy({"conv9": 0.5}))
    assert len(evaluator.ledger) == 0


# ----------------------------------------------------------------------------------------------------------- failures


def test_a_fine_tuning_that_diverges_is_recorded_and_the_next_goes_on(
    task: Task, make_evaluator: Make, tmp_path: Path
) -> None:
    recovery = Recovery(200, 5, Recipe(lr=1e30))
    evaluator = make_evaluator(task, recovery, Ledger(tmp_path / "ledger.jsonl"))
    failed = evaluate(evaluator, HALF)
    assert failed.failure is not None
    assert failed.failure.startswith("the loss is nan at fine-tuning step ")
    assert failed.measurements == ()
    assert math.isnan(failed.accuracy)
    assert failed.cost == evaluator.costs.cost(failed.removed)
    assert [c.failure for c in Ledger(tmp_path / "ledger.jsonl")] == [failed.failure]
    evaluator.pipeline.recovery = Recovery(200, 1)
    assert evaluate(evaluator, HALF) is failed  # a ledger is not forgotten
    assert evaluate(evaluator, Policy({"conv1": 0.75})).failure is None


@pytest.mark.parametrize("steps", [0, 2])
def test_a_validation_loss_that_is_not_finite_is_recorded(
    task: Task, make_evaluator: Make, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    evaluator = make_evaluator(task, Recovery(200, steps))
    real = evaluator.bench.recovered

    def poisoned(removed: Mapping[str, int]) -> nn.Module:
        model = real(removed)
        if removed["conv1"] == 4:
            model.get_parameter("fc.bias").data[0] = math.nan
        return model

    monkeypatch.setattr(evaluator.bench, "recovered", poisoned)
    failed = evaluate(evaluator, HALF)
    assert failed.failure == "the validation loss is nan"
    assert (failed.fidelity, failed.measurements) == ("none", ())
    assert evaluate(evaluator, Policy({"conv1": 0.25})).failure is None
    assert [c.number for c in evaluator.ledger] == [0, 1]


def test_a_residual_network_that_lost_stream_and_inside_is_evaluated(residual_task: Task, make_evaluator: Make) -> None:
    evaluator = make_evaluator(residual_task)
    assert evaluator.bench.structure.names == ("stem", "conv1")
    candidate = evaluate(evaluator, Policy({"stem": 0.5, "conv1": 0.75}))
    assert candidate.cost == count(evaluator.pipeline.recovered(candidate.policy)[0], residual_task.example_input).cost


# --------------------------------------------------------------------------------------------------------------- arms


def policies(count: int) -> list[Policy]:
    return [Policy({"conv1": number / 8, "conv2": second / 8}) for number in range(8) for second in (0, 1)][:count]


@pytest.fixture
def cheap(task: Task, make_evaluator: Make) -> Evaluator:
    return make_evaluator(task, Recovery(50, 0))


def test_the_limit_counts_distinct_policies(cheap: Evaluator) -> None:
    arm = Arm(cheap, "search", "tpe", 3)
    for policy in [*policies(2), policies(1)[0], *policies(3)]:
        arm(policy)
    with pytest.raises(SearchOver, match="all evaluations are spent"):
        arm(policies(4)[3])
    assert len(cheap.ledger) == len(arm.candidates) == 3
    assert arm.stopped is None
    assert arm(policies(1)[0]) is cheap.ledger.get(policies(1)[0].id)  # asking again is still free


def test_what_another_arm_evaluated_counts_but_costs_nothing(cheap: Evaluator) -> None:
    random, search = Arm(cheap, "random", "random", 2), Arm(cheap, "search", "tpe", 2)
    shared = random(policies(1)[0])
    random(policies(4)[3])
    assert search(policies(1)[0]) is shared
    assert shared.arm == "random"
    search(policies(2)[1])
    with pytest.raises(SearchOver):
        search(policies(3)[2])
    assert len(cheap.ledger) == 3  # two of the one arm, and one more of the other


def test_an_arm_without_evaluations_ends_at_once(cheap: Evaluator) -> None:
    with pytest.raises(SearchOver):
        Arm(cheap, "random", "random", 0)(policies(1)[0])
    assert len(cheap.ledger) == 0


def test_an_agent_that_only_repeats_itself_is_ended(cheap: Evaluator) -> None:
    arm = Arm(cheap, "search", "tpe", 5)
    for _ in range(200):  # the first, and 199 repeats
        arm(policies(1)[0])
    with pytest.raises(SearchOver, match="nothing new 200 times in a row"):
        arm(policies(1)[0])
    assert arm.stopped == "the agent proposed nothing new 200 times in a row"


def test_a_new_policy_starts_the_count_of_repeats_anew(cheap: Evaluator) -> None:
    arm = Arm(cheap, "search", "tpe", 5)
    for policy in policies(3):
        for _ in range(150):
            arm(policy)
    assert arm.stopped is None


def test_after_the_deadline_nothing_new_is_evaluated(cheap: Evaluator) -> None:
    known = Arm(cheap, "random", "random", 1)(policies(1)[0])
    arm = Arm(cheap, "search", "tpe", 5, deadline=time.monotonic() - 1)
    assert arm(policies(1)[0]) is known  # the ledger's answers take no time
    with pytest.raises(SearchOver, match="time limit"):
        arm(policies(2)[1])
    assert arm.stopped == "time limit"
    assert len(cheap.ledger) == 1


def test_before_the_deadline_it_goes_on(cheap: Evaluator) -> None:
    arm = Arm(cheap, "search", "tpe", 5, deadline=time.monotonic() + 600)
    arm(policies(1)[0])
    assert arm.stopped is None


def test_a_replayed_arm_ends_where_it_ended(
    task: Task, make_evaluator: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent run again from its seed, answered from the ledger, then measuring on."""

    def run(evaluator: Evaluator, stop_after: int = 100) -> list[Candidate]:
        arm, asked = Arm(evaluator, "search", "tpe", 4), 0
        try:
            for policy in [*policies(2), *policies(6)]:
                arm(policy)
                asked += 1
                if asked == stop_after:
                    break
        except SearchOver:
            pass
        return [timeless(c) for c in evaluator.ledger]

    recovery = Recovery(50, 1)
    whole = run(make_evaluator(task, recovery))
    path = tmp_path / "ledger.jsonl"
    for stop_after in (1, 3, 5, 100):
        evaluator = make_evaluator(task, recovery, Ledger(path))
        had = len(evaluator.ledger)
        counted = Counted(evaluator, monkeypatch)
        seen = run(evaluator, stop_after)
        assert counted.count == 2 * (len(seen) - had)
        assert seen == whole[: len(seen)]
    assert seen == whole
    assert len(whole) == 4
