"""The evaluator: the one place that counts, caches and records evaluations.

Agents propose through an `Arm`, which ends them by `SearchOver`; they can't open a data set. An evaluation depends on
the policy, its rival in a race, and the search's seed alone, never on what was evaluated before, so that a ledger can
be replayed.

Evaluations may be under way together. Candidates are numbered as they are proposed and written down as they are done;
an agent that takes them in the order in which it proposed them sees the same whoever is faster.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from autoprune.cost import CostModel
from autoprune.errors import SearchOver
from autoprune.evaluation.candidate import Candidate
from autoprune.evaluation.executor import Executor, InProcess, Work
from autoprune.evaluation.ledger import Ledger
from autoprune.evaluation.pipeline import Pipeline, Raced
from autoprune.evaluation.workbench import Workbench
from autoprune.policy import Policy

__all__ = ["TIME_LIMIT", "Arm", "Evaluator", "Result"]

TIME_LIMIT = "time limit"
"""`Arm.stopped` of an arm that ran out of time; such a search can go on."""
_REPEATS = 200  # proposals in a row that were all evaluated before: the agent has converged

Result = Callable[[], Candidate]
"""An evaluation that was begun; called, it waits for the candidate."""


@dataclass(frozen=True, slots=True)
class _Proposal:
    number: int
    policy: Policy
    work: Work
    removed: dict[str, int]
    arm: str
    agent: str


class Evaluator:
    """Turns policies into candidates.

    Args:
        pipeline: What happens to a policy.
        costs: Prices policies.
        ledger: Where candidates are written, and looked up before anything is evaluated.
        executor: Where evaluations run; by default here, one after another. It is started when it is first needed.
        at_once: How many may be under way; by default as many as the executor has.
        rival: What candidates are raced against, where who proposes them names no other (see
            `autoprune.evaluation.race`). None: no candidate is raced.

    Attributes:
        watch: Called with every candidate as soon as it is known: on disk, or asked for and found there.
        waited: Seconds in which evaluations were waited for.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        costs: CostModel,
        ledger: Ledger,
        executor: Executor | None = None,
        at_once: int | None = None,
        rival: Policy | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.rival = rival
        self.costs = costs
        self.ledger = ledger
        self.executor: Executor = InProcess() if executor is None else executor
        self.at_once = self.executor.at_once if at_once is None else at_once
        self.watch: Callable[[Candidate], None] = lambda candidate: None
        self.waited = 0.0
        self._seen: set[str] = set()
        self._started = False
        self._pending: dict[str, _Proposal] = {}
        self._numbers = itertools.count()

    @property
    def bench(self) -> Workbench:
        """The pipeline's."""
        return self.pipeline.bench

    def start(self) -> None:
        """Start the executor, if it is not running; evaluations do so themselves."""
        if not self._started:
            self._started = True
            self.executor.start(self.pipeline)

    def close(self) -> None:
        """Stop the executor and drop what is under way; what is evaluated afterwards is so in this process."""
        if self._started:
            self.executor.close()
        self._pending.clear()
        self.leave()

    def leave(self) -> None:
        """Leave the executor to another evaluator, as it is; what is evaluated afterwards is so in this process."""
        if self._pending:
            raise RuntimeError("evaluations are under way")
        self._started = False
        self.executor = InProcess()

    def submit(self, policy: Policy, *, arm: str, agent: str, rival: Policy | None = None) -> Result:
        """Begin an evaluation, unless the ledger has it or it is under way; waits while too many are.

        Args:
            policy: Which network.
            arm: Why.
            agent: Who proposes it.
            rival: In a race, against what; by default the evaluator's.

        Raises:
            PolicyError: A policy names a group that the network does not offer.
        """
        removed = self.bench.structure.removed(policy)
        rounded = self.bench.structure.policy(removed)
        known = self.ledger.get(rounded.id)
        if known is not None:
            self._see(known)
        elif rounded.id not in self._pending:
            self.start()
            self.make_room()
            work = self._work(rounded, rival)
            self._pending[rounded.id] = _Proposal(self._free_number(), rounded, work, removed, arm, agent)
            self.executor.submit(work)
        return partial(self._result, rounded.id)

    def _work(self, policy: Policy, rival: Policy | None) -> Policy | Raced:
        if self.rival is None:
            return policy
        against = self.bench.structure.rounded(self.rival if rival is None else rival)
        return policy if against.id == policy.id else Raced(policy, against)

    def make_room(self) -> None:
        """Wait until another evaluation may be begun."""
        while len(self._pending) >= self.at_once:
            self._collect()

    def evaluate(self, policy: Policy, *, arm: str, agent: str) -> Candidate:
        """Return the candidate of a policy, from the ledger if the same elements were removed before.

        Raises:
            PolicyError: The policy names a group that the network does not offer.
        """
        return self.submit(policy, arm=arm, agent=agent)()

    def _result(self, policy_id: str) -> Candidate:
        while (known := self.ledger.get(policy_id)) is None:
            if policy_id not in self._pending:
                raise RuntimeError("this evaluation was dropped, when another failed or the evaluator was closed")
            self._collect()
        return known

    def _collect(self) -> None:
        """Write down the evaluation that is done next."""
        started = time.monotonic()
        try:
            outcome = self.executor.finished()
        except BaseException:  # who interrupts, or mends what was raised, may evaluate the same again
            self._started = False
            self._pending.clear()
            self.executor.close()
            raise
        finally:
            self.waited += time.monotonic() - started
        proposal = {one.work.id: one for one in self._pending.values()}[outcome.id]
        candidate = Candidate(
            number=proposal.number,
            id=proposal.policy.id,
            arm=proposal.arm,
            agent=proposal.agent,
            policy=proposal.policy,
            removed=proposal.removed,
            cost=self.costs.cost(proposal.removed),
            measurements=outcome.measurements,
            seconds=outcome.seconds,
            failure=outcome.failure,
            rival=proposal.work.rival.id if isinstance(proposal.work, Raced) else None,
        )
        self.ledger.append(candidate)
        del self._pending[candidate.id]  # not before it is on disk
        self._see(candidate)

    def _see(self, candidate: Candidate) -> None:
        if candidate.id not in self._seen:
            self._seen.add(candidate.id)
            self.watch(candidate)

    def _free_number(self) -> int:
        """Return the lowest number that no candidate has: replayed, a search gives those it lost theirs again."""
        return next(number for number in self._numbers if not self.ledger.has(number))


class Arm:
    """One agent's access to the evaluator: counts what it proposes, and ends it.

    Distinct policies count, whether they were evaluated by this arm or found in the ledger, so that a search that is
    replayed from its ledger ends where it ended the first time.

    Args:
        evaluator: What evaluates.
        arm: "search", "uniform" or "random".
        agent: The agent's name.
        limit: Distinct policies that may be proposed.
        deadline: Value of `time.monotonic()` after which nothing new is evaluated, or None.

    Attributes:
        name: As given by `arm`.
        candidates: Policy id → candidate, of those whose results were taken.
        stopped: Why the arm ended before its limit, or None.
    """

    def __init__(self, evaluator: Evaluator, arm: str, agent: str, limit: int, deadline: float | None = None) -> None:
        self._evaluator = evaluator
        self.name, self._agent = arm, agent
        self._deadline = deadline
        self._repeats = 0
        self._proposed: dict[str, Result] = {}
        self.limit = limit
        self.candidates: dict[str, Candidate] = {}
        self.stopped: str | None = None

    @property
    def proposed(self) -> tuple[str, ...]:
        """The ids of the distinct policies, in the order of proposal."""
        return tuple(self._proposed)

    def submit(self, policy: Policy, rival: Policy | None = None) -> Result:
        """Begin to evaluate a policy; in a race, against a rival.

        Raises:
            SearchOver: The limit, the deadline, or the end of new ideas is reached; nothing was begun.
        """
        policy_id = self._evaluator.bench.structure.rounded(policy).id
        if policy_id in self._proposed:
            self._repeats += 1
            if self._repeats >= _REPEATS:
                self._end(f"the agent proposed nothing new {_REPEATS} times in a row")
            return partial(self._result, policy_id)
        if len(self._proposed) >= self.limit:
            raise SearchOver("all evaluations are spent")
        self._evaluator.make_room()  # which takes time
        late = self._deadline is not None and time.monotonic() >= self._deadline
        if late and self._evaluator.ledger.get(policy_id) is None:
            self._end(TIME_LIMIT)
        self._proposed[policy_id] = self._evaluator.submit(policy, arm=self.name, agent=self._agent, rival=rival)
        self._repeats = 0
        return partial(self._result, policy_id)

    def __call__(self, policy: Policy) -> Candidate:
        """Evaluate a policy.

        Raises:
            SearchOver: As `submit`.
        """
        return self.submit(policy)()

    def drain(self) -> None:
        """Wait for all that was begun."""
        for policy_id in tuple(self._proposed):
            self._result(policy_id)

    def _result(self, policy_id: str) -> Candidate:
        if policy_id not in self.candidates:
            self.candidates[policy_id] = self._proposed[policy_id]()
        return self.candidates[policy_id]

    def _end(self, reason: str) -> None:
        self.stopped = reason
        raise SearchOver(reason)
