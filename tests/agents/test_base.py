import importlib
import inspect
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from autoprune.agents import base
from autoprune.agents.base import Agent, in_turn
from autoprune.environment import Proposed
from autoprune.testing import AgentContract, synthetic_env

ORDERS: dict[str, tuple[int, str, list[str]]] = {
    "one at a time": (1, "a b a c", ["+a", "a", "+b", "b", "+a", "a", "+c", "c"]),
    "two at a time": (2, "a b c d", ["+a", "+b", "a", "+c", "b", "+d", "c", "d"]),
    "one that is known takes no place": (2, "a b a c", ["+a", "+b", "a", "+a", "a", "+c", "b", "c"]),
    "one that is under way is told with the first": (
        3,
        "a b a c d",
        ["+a", "+b", "+a", "a", "a", "+c", "+d", "b", "c", "d"],
    ),
    "one that is under way takes no place": (3, "a b b c d", ["+a", "+b", "+b", "a", "+c", "+d", "b", "b", "c", "d"]),
    "nothing": (3, "", []),
}


@pytest.mark.parametrize(("at_once", "proposals", "expected"), ORDERS.values(), ids=ORDERS)
def test_candidates_come_in_the_order_in_which_they_were_begun(
    at_once: int, proposals: str, expected: list[str]
) -> None:
    env, _ = synthetic_env(evaluations=1)
    env.at_once = at_once
    told: list[str] = []

    def begun() -> Iterator[tuple[str, Proposed]]:
        for name in proposals.split():
            told.append(f"+{name}")
            yield name, Proposed(name, lambda name=name: name)  # type: ignore[misc]

    for remembered, candidate in in_turn(env, begun()):
        assert candidate == remembered  # type: ignore[comparison-overlap]  # a stand-in
        told.append(remembered)
    assert told == expected


def test_policies_that_come_again_leave_no_worker_idle() -> None:
    """With half of the proposals known already, as many new ones are under way as may be."""
    env, evaluator = synthetic_env(evaluations=40)
    env.at_once = 8
    rng = np.random.default_rng(0)
    drawn = [env.space.decode(rng.random(len(env.space.dimensions)).tolist()) for _ in range(80)]
    policies = list(dict.fromkeys(drawn))[:40]
    waiting: set[str] = set()
    most: list[int] = []
    submit = env._submit

    begun_before: set[str] = set()

    def counted(policy: Any, rival: Any = None) -> Any:
        result = submit(policy, rival)
        if policy.id not in begun_before:
            begun_before.add(policy.id)
            waiting.add(policy.id)
            most.append(len(waiting))

        def taken() -> Any:
            waiting.discard(policy.id)
            return result()

        return taken

    env._submit = counted

    def begun() -> Iterator[tuple[None, Proposed]]:
        for number, policy in enumerate(policies):
            yield None, env.submit(policy)
            if number >= 8:
                yield None, env.submit(policies[number - 8])

    for _ in in_turn(env, begun()):
        pass
    assert len(evaluator.candidates) == 40
    assert most == [*range(1, 8), *[8] * 33]


IMPORTS = """from typing import ClassVar

import numpy as np

from autoprune.agents.base import Objectives
from autoprune.environment import PruningEnv

"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """A module of the agent that the docstring shows, so that another process can import it too."""
    text = inspect.getdoc(base)
    assert text is not None
    code = text.partition("::\n")[2].partition("\nAn agent that decides")[0]
    folder = tmp_path_factory.mktemp("shown")
    (folder / "shown_in_docstring.py").write_text(IMPORTS + textwrap.dedent(code), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("shown_in_docstring")


class TestTheShownAgent(AgentContract):
    @pytest.fixture
    def agent(self, shown: ModuleType) -> Agent:
        agent: Agent = shown.HillAgent()
        return agent
