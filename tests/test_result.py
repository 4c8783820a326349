"""What may be picked of a ledger's candidates."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from autoprune.cost import Cost
from autoprune.evaluation import Candidate, Ledger, Measurement
from autoprune.policy import Policy
from autoprune.result import pick_from, pickable

POLICY = Policy({"conv1": 0.5})
WHOLE = Candidate(
    number=0,
    id=POLICY.id,
    arm="search",
    agent="evolution",
    policy=POLICY,
    removed={"conv1": 3},
    cost=Cost(100, 10, 40),
    measurements=(Measurement("reconstructed", 0.5, 0.01, 1.0, 0.1),),
    seconds=0.25,
)
STOPPED = dataclasses.replace(WHOLE, measurements=(Measurement("reconstructed", 0.9, 0.1, 1.0, 0.1, samples=10),))
FAILED = dataclasses.replace(WHOLE, measurements=(), failure="the loss is nan")


def test_an_estimate_is_no_pick_where_a_whole_measurement_is_there() -> None:
    assert (WHOLE.stopped, STOPPED.stopped, FAILED.stopped) == (False, True, False)
    assert pickable([STOPPED, WHOLE, FAILED]) == [WHOLE]
    assert pickable([STOPPED, FAILED]) == [STOPPED]
    assert pickable([FAILED]) == []


@pytest.mark.parametrize(("budget", "picked"), [("macs<=100%", WHOLE), ("macs<=50%", STOPPED)])
def test_an_estimate_is_picked_where_nothing_else_meets_the_budget(budget: str, picked: Candidate) -> None:
    ledger = Ledger()
    for number, one in enumerate((WHOLE, dataclasses.replace(STOPPED, id="cheaper", cost=Cost(40, 10, 40)))):
        ledger.append(dataclasses.replace(one, number=number))
    evaluator: Any = SimpleNamespace(ledger=ledger, costs=SimpleNamespace(dense=Cost(100, 10, 40)))
    chosen, rule = pick_from(evaluator, 1.0, None, budget)
    assert chosen.measurements == picked.measurements
    assert rule == f"most accurate within {budget}"
