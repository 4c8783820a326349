"""Studies that several searches share: two processes on one, and what is left of a search that was killed."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import optuna
import pytest

from autoprune.agents.base import Agent
from autoprune.agents.optuna import CMAESAgent, NSGA2Agent, OptunaAgent, QMCAgent, TPEAgent
from autoprune.environment import PruningEnv, Submit
from autoprune.errors import ConfigError, SearchOver
from autoprune.evaluation import Candidate, Result
from autoprune.policy import Policy
from autoprune.testing import SyntheticEvaluator, run_agent, synthetic_env

TrialState = optuna.trial.TrialState
WIDTHS = (16, 16, 32, 32)


def shared_env(
    name: str,
    *,
    evaluations: int = 8,
    submit: Callable[[Result], Result] = lambda result: result,
    evaluator: SyntheticEvaluator | None = None,
    at_once: int = 1,
    warm: Sequence[Sequence[float]] = ((0.1, 0.9, 0.5, 0.5), (0.9, 0.1, 0.5, 0.5)),
    objectives: str = "one",
    known: Sequence[Policy] = (),
) -> tuple[PruningEnv, SyntheticEvaluator]:
    """Return the environment of a search with a name, and its evaluator, which stands for its ledger."""
    made, fresh = synthetic_env(evaluations=evaluations, widths=WIDTHS, objectives=objectives)  # type: ignore[arg-type]
    evaluator = evaluator or fresh
    env = PruningEnv(
        made.feasible,
        made.space,
        lambda policy, rival=None: submit(evaluator.submit(policy)),
        value=lambda candidate: candidate.accuracy,
        evaluations=evaluations,
        at_once=at_once,
        warm_starts=[made.space.decode(list(point) + [0.5] * (objectives == "several")) for point in warm],
        name=name,
        known=known,
    )
    return env, evaluator


def trials_of(where: str | optuna.storages.BaseStorage) -> list[optuna.trial.FrozenTrial]:
    if not isinstance(where, str):
        return optuna.load_study(study_name="s", storage=where).trials
    storage = optuna.storages.RDBStorage(where)
    trials = optuna.load_study(study_name="s", storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    return trials


@pytest.fixture
def storage() -> optuna.storages.BaseStorage:
    """What outlives a search here: to an agent it is as good as a database, and the tests are faster."""
    return optuna.storages.InMemoryStorage()


# -- two processes ----------------------------------------------------------------------------------------------------

PROCESS = """
import json, sys, time, warnings
warnings.simplefilter("error")
from autoprune.agents.optuna import TPEAgent
from autoprune.environment import PruningEnv
from autoprune.testing import run_agent, synthetic_env

name, urls = sys.argv[1], sys.argv[2:]
ledgers = {}
for url in urls:
    made, evaluator = synthetic_env(evaluations=8, widths=(16, 16, 32, 32))
    warm = [made.space.decode([0.1, 0.9, 0.5, 0.5]), made.space.decode([0.9, 0.1, 0.5, 0.5])]

    def submit(policy, rival=None):
        time.sleep(0.02)
        return evaluator.submit(policy)

    env = PruningEnv(
        made.feasible, made.space, submit, value=lambda c: c.accuracy, evaluations=8, warm_starts=warm, name=name
    )
    print("ready", flush=True)
    sys.stdin.readline()
    run_agent(TPEAgent(storage=url, study="s"), env, seed=0)
    ledgers[url] = [[candidate.id, candidate.accuracy] for candidate in evaluator.candidates]
print(json.dumps(ledgers), flush=True)
"""


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str | None]:
    """A PostgreSQL server's URL, on a Unix socket; None without PostgreSQL, or a user to run it as."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found or find_spec("psycopg") is None:
        yield None
        return
    root = os.getuid() == 0  # as whom PostgreSQL does not run
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # pytest's own can't be entered by others
    try:
        if root:
            shutil.chown(folder, "postgres", "postgres")

        def command(program: str, *arguments: str) -> None:
            user = {"user": "postgres", "group": "postgres", "extra_groups": []} if root else {}
            line = [found[-1].with_name(program), "-D", folder / "data", *arguments]
            subprocess.run(line, cwd=folder, check=True, stdout=subprocess.DEVNULL, **user)  # type: ignore[call-overload]

        command("initdb", "-U", "postgres", "--auth=trust", "--no-sync")
        options = f"-k {folder} -c listen_addresses= -c fsync=off"
        command("pg_ctl", "-o", options, "-l", str(folder / "log"), "-w", "start")
        try:
            yield f"postgresql://postgres@/postgres?host={folder}"
        finally:
            command("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


Ledger = list[tuple[str, float]]


@pytest.fixture(scope="module")
def ledgers(
    tmp_path_factory: pytest.TempPathFactory, postgresql: str | None
) -> dict[str, tuple[str, dict[str, Ledger]]]:
    """Name of a database → its URL, and the ledgers of two searches, "a" and "b", that began there together."""
    urls = {"sqlite": f"sqlite:///{tmp_path_factory.mktemp('shared') / 'trials.db'}"}
    if postgresql is not None:
        urls["postgresql"] = postgresql
    found_at = [
        place for place in sys.path if place and Path(place).resolve() != Path.cwd()
    ]  # not the source's folders
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(found_at), "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-P", "-c", PROCESS, name, *urls.values()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
            for name in "ab"
        }
        for process in processes.values():  # or the first to fail would have its peer waited for
            stack.callback(process.kill)
        for _ in urls:
            for process in processes.values():
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            for process in processes.values():
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
        done = {name: json.loads(process.communicate(timeout=60)[0]) for name, process in processes.items()}
    return {
        database: (address, {name: [tuple(line) for line in done[name][address]] for name in done})
        for database, address in urls.items()
    }


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_two_processes_work_on_one_study(
    ledgers: dict[str, tuple[str, dict[str, Ledger]]], database: str, postgresql: str | None
) -> None:
    if database not in ledgers:
        pytest.skip("there is no PostgreSQL server in /usr/lib/postgresql, or no psycopg")
    address, by_run = ledgers[database]
    kept = [trial for trial in trials_of(address) if trial.state != TrialState.WAITING]  # which nobody had time for
    again = [trial for trial in kept if "again" in trial.user_attrs]
    trials = [trial for trial in kept if "again" not in trial.user_attrs]
    assert {trial.state for trial in again} <= {TrialState.FAIL}
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    for name, ledger in by_run.items():
        assert len(ledger) == 8  # none of its evaluations went to waste
        told = {(trial.user_attrs["policy"], trial.value) for trial in trials if trial.user_attrs["run"] == name}
        assert told == set(ledger)  # each candidate is a trial, and each trial of it a candidate
    assert {trial.user_attrs["run"] for trial in trials} == {"a", "b"}
    everything = [policy for ledger in by_run.values() for policy, _ in ledger]
    assert len(set(everything)) >= 13  # the same seed, but not the same points; SQLite may give both a warm start
    warm = [trial for trial in trials if "warm start" in trial.user_attrs]
    assert len(warm) == 2  # not two each


# -- one process ------------------------------------------------------------------------------------------------------


def test_trials_say_what_they_are(storage: optuna.storages.BaseStorage) -> None:
    env, evaluator = shared_env("run-1")
    run_agent(TPEAgent(storage=storage, study="s"), env, seed=0)
    trials = trials_of(storage)
    assert [trial.user_attrs["policy"] for trial in trials] == [candidate.id for candidate in evaluator.candidates]
    first, candidate = trials[0], evaluator.candidates[0]
    assert list(first.params) == list(env.space.dimensions)
    assert first.value == candidate.accuracy
    assert first.user_attrs == {
        "run": "run-1",
        "warm start": True,
        "policy": candidate.id,
        "number": 0,
        "accuracy": candidate.accuracy,
        "macs": candidate.macs,
        "params": candidate.params,
        "fidelity": "short",
    }


def test_several_objectives_are_kept_too(storage: optuna.storages.BaseStorage) -> None:
    env, evaluator = shared_env("run-1", objectives="several")
    run_agent(NSGA2Agent(storage=storage, study="s"), env, seed=0)
    assert [tuple(trial.values) for trial in trials_of(storage)] == [env.objectives(c) for c in evaluator.candidates]


def test_a_later_search_learns_from_the_trials_that_are_there(
    storage: optuna.storages.BaseStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    env, _ = shared_env("run-1")
    run_agent(TPEAgent(storage=storage, study="s"), env, seed=0)
    seen: list[int] = []
    sample = optuna.samplers.TPESampler.sample_relative

    def spied(self: optuna.samplers.TPESampler, study: optuna.Study, *arguments: object) -> object:
        seen.append(len(study.get_trials(states=[TrialState.COMPLETE])))
        return sample(self, study, *arguments)  # type: ignore[arg-type]  # passed on as they are

    monkeypatch.setattr(optuna.samplers.TPESampler, "sample_relative", spied)
    env, _ = shared_env("run-2", evaluations=3)
    run_agent(TPEAgent(storage=storage, study="s"), env, seed=0)
    assert seen == [8, 9, 10]
    warm = [trial for trial in trials_of(storage) if "warm start" in trial.user_attrs]
    assert len(warm) == 2


@pytest.mark.parametrize("when", ["before it is begun", "while it is evaluated"])
def test_a_trial_that_was_given_to_another_search_too_is_told_once(
    storage: optuna.storages.BaseStorage, when: str
) -> None:
    stolen: list[int] = []

    def steal(study: optuna.Study) -> None:
        for trial in study.get_trials(states=[TrialState.RUNNING]):
            if not stolen:
                storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.25])
                stolen.append(trial.number)

    def submit(result: Result) -> Result:
        if when == "while it is evaluated":
            steal(optuna.load_study(study_name="s", storage=storage))
        return result

    class Thief(optuna.samplers.RandomSampler):
        def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            if when == "before it is begun":
                steal(study)

    env, evaluator = shared_env("run-1", submit=submit)
    run_agent(OptunaAgent(Thief, storage=storage, study="s"), env, seed=0)
    theirs, *own = trials_of(storage)
    assert stolen == [theirs.number]
    assert (theirs.value, "policy" in theirs.user_attrs) == (0.25, False)
    told = {(trial.user_attrs["policy"], trial.value) for trial in own if trial.state == TrialState.COMPLETE}
    assert told == {(c.id, c.accuracy) for c in evaluator.candidates}
    assert len(evaluator.candidates) == 8


def test_without_warm_starts_nothing_is_enqueued(storage: optuna.storages.BaseStorage) -> None:
    env, evaluator = shared_env("run-1")
    run_agent(TPEAgent(storage=storage, study="s", warm_start=False), env, seed=0)
    assert not any("warm start" in trial.user_attrs for trial in trials_of(storage))
    assert not {c.policy for c in evaluator.candidates} & set(env.warm_starts)


def test_what_comes_again_fails_and_searches_switch_to_policies_of_their_own(
    storage: optuna.storages.BaseStorage, stubborn: optuna.samplers.BaseSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoprune.agents.optuna.TPESampler", lambda **_: stubborn)
    ids = []
    for name in ("run-1", "run-2"):
        env, evaluator = shared_env(name)
        run_agent(TPEAgent(storage=storage, study="s", warm_start=False), env, seed=0)
        ids.append([candidate.id for candidate in evaluator.candidates])
    assert [len(set(own)) for own in ids] == [8, 8]
    assert ids[0][0] == ids[1][0]  # the sampler's point; what is tried for it differs
    assert set(ids[0][1:]) != set(ids[1][1:])
    trials = trials_of(storage)
    again = [trial for trial in trials if "again" in trial.user_attrs]
    assert {trial.state for trial in again} == {TrialState.FAIL}
    told = [(t.user_attrs["run"], t.user_attrs["policy"]) for t in trials if t.state == TrialState.COMPLETE]
    assert len(told) == len(set(told)) == 16


class KilledError(BaseException):
    """The process died."""


@pytest.mark.parametrize("make", [TPEAgent, CMAESAgent, QMCAgent], ids=["tpe", "cmaes", "qmc"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_killed_anywhere_it_goes_on_and_every_candidate_is_a_trial(
    storage: optuna.storages.BaseStorage, make: Callable[..., Agent], at_once: int
) -> None:
    known: list[Candidate] = []  # the ledger, which outlives the process
    for kill_at in (1, 4, 5, 9, None):
        env, _ = shared_env("run-1", evaluations=9, at_once=at_once)
        whole = env._submit

        def submit(
            policy: Policy, rival: Policy | None = None, whole: Submit = whole, kill_at: int | None = kill_at
        ) -> Result:
            result = whole(policy)

            def wait() -> Candidate:
                candidate = result()
                if candidate.id not in {other.id for other in known}:
                    known.append(candidate)
                    if len(known) == kill_at:  # written down, but not told
                        raise KilledError
                return candidate

            return wait

        env = PruningEnv(
            env.feasible,
            env.space,
            submit,
            value=lambda candidate: candidate.accuracy,
            evaluations=9,
            at_once=at_once,
            warm_starts=env.warm_starts,
            name="run-1",
            known=[candidate.policy for candidate in known],
        )
        if kill_at is None:
            run_agent(make(storage=storage, study="s"), env, seed=0)
            break
        with pytest.raises(KilledError):
            run_agent(make(storage=storage, study="s"), env, seed=0)
    trials = trials_of(storage)
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert {trial.user_attrs["policy"] for trial in trials} == {candidate.id for candidate in known}
    assert len(known) == len({candidate.id for candidate in known}) == 9  # what was under way was taken up


def test_what_a_lost_study_does_not_hold_is_told_to_the_new_one() -> None:
    places = [optuna.storages.InMemoryStorage() for _ in range(2)]
    env, evaluator = shared_env("run-1")
    run_agent(TPEAgent(storage=places[0], study="s"), env, seed=0)
    again, _ = shared_env("run-1", evaluator=evaluator, known=[c.policy for c in evaluator.candidates])
    run_agent(TPEAgent(storage=places[1], study="s"), again, seed=0)
    assert len(evaluator.candidates) == 8
    done = [trial for trial in trials_of(places[1]) if trial.state == TrialState.COMPLETE]
    assert {(t.user_attrs["policy"], t.value) for t in done} == {(c.id, c.accuracy) for c in evaluator.candidates}


def test_out_of_time_no_trial_is_left_open(storage: optuna.storages.BaseStorage) -> None:
    def late(result: Result) -> Result:
        if len(evaluator.candidates) > 4:
            raise SearchOver("time limit")
        return result

    env, evaluator = shared_env("run-1", submit=late, at_once=2, warm=[(0.1 * i, 0.5, 0.5, 0.5) for i in range(6)])
    with pytest.raises(SearchOver, match="time limit"):
        TPEAgent(storage=storage, study="s").run(env, seed=0)
    states = [trial.state for trial in trials_of(storage)]
    assert states.count(TrialState.COMPLETE) == 4
    assert states.count(TrialState.FAIL) == 1
    assert states.count(TrialState.WAITING) == 2  # the warm starts that nobody tried
    assert TrialState.RUNNING not in states


def test_failed_candidates_are_failed_trials(storage: optuna.storages.BaseStorage) -> None:
    def failed(result: Result) -> Result:
        return lambda: dataclasses.replace(result(), measurements=(), failure="the loss is not finite")

    env, _ = shared_env("run-1", submit=failed)
    run_agent(TPEAgent(storage=storage, study="s"), env, seed=0)
    trials = trials_of(storage)
    assert {trial.state for trial in trials} == {TrialState.FAIL}
    assert {trial.user_attrs["failure"] for trial in trials} == {"the loss is not finite"}


def test_a_study_of_another_space_is_refused(storage: optuna.storages.BaseStorage) -> None:
    env, _ = shared_env("run-1")
    run_agent(TPEAgent(storage=storage, study="s"), env, seed=0)
    other, _ = synthetic_env(evaluations=3, widths=(8, 8))
    with pytest.raises(ConfigError, match="study 's' is of another search: its dimensions are"):
        TPEAgent(storage=storage, study="s").run(other, seed=0)
    several, _ = shared_env("run-2", objectives="several")
    with pytest.raises(ConfigError, match="study 's' has 1 values a trial, not 3"):
        NSGA2Agent(storage=storage, study="s").run(several, seed=0)


@pytest.mark.parametrize("settings", [{"storage": "sqlite:///x.db"}, {"study": "s"}])
def test_a_storage_and_a_name_belong_together(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="only one of them is given"):
        TPEAgent(**settings)  # type: ignore[arg-type]


def test_a_storage_that_can_not_be_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoprune.agents.optuna._PAUSE", 0.0)
    env, _ = shared_env("run-1")
    with pytest.raises(ConfigError, match=r"the study's storage can't be used: .*unable to open") as error:
        TPEAgent(storage=f"sqlite:///{tmp_path}/no/where.db", study="s").run(env, seed=0)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="the database's driver is not installed"):
        TPEAgent(storage="mysql+pymysql://host/db", study="s").run(env, seed=0)
