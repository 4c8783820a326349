"""What may be picked of a ledger's candidates."""

import dataclasses

from autoprune.cost import Cost
from autoprune.evaluation import Candidate, Measurement
from autoprune.policy import Policy
from autoprune.result import pickable

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
