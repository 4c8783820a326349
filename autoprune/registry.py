"""Names of agents, search spaces and criteria, as text, so that listing them imports none of them.

A member is `"module:attribute"`. Packages of others add theirs through the entry-point groups `autoprune.agents`,
`autoprune.search_spaces` and `autoprune.scoring`.
"""

import importlib
import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

from autoprune.errors import ConfigError, UnknownNameError

__all__ = ["FAMILIES", "make", "names", "resolve"]

FAMILIES = MappingProxyType(
    {
        "agent": MappingProxyType(
            {
                "amc": "autoprune.agents.amc:AMCAgent",
                "analytic": "autoprune.agents.analytic:AnalyticAgent",
                "cmaes": "autoprune.agents.optuna:CMAESAgent",
                "gp": "autoprune.agents.optuna:GPAgent",
                "motpe": "autoprune.agents.optuna:MultiObjectiveTPEAgent",
                "ppo": "autoprune.agents.amc:PPOAgent",
                "sac": "autoprune.agents.amc:SACAgent",
                "td3": "autoprune.agents.amc:TD3Agent",
                "evolution": "autoprune.agents.evolution:EvolutionAgent",
                "global": "autoprune.agents.global_ranking:GlobalRankingAgent",
                "greedy": "autoprune.agents.greedy:GreedyAgent",
                "legr": "autoprune.agents.legr:LeGRAgent",
                "nsga2": "autoprune.agents.optuna:NSGA2Agent",
                "nsga3": "autoprune.agents.optuna:NSGA3Agent",
                "qmc": "autoprune.agents.optuna:QMCAgent",
                "random": "autoprune.agents.random:RandomAgent",
                "separable": "autoprune.agents.separable:SeparableAgent",
                "spdy": "autoprune.agents.spdy:SPDYAgent",
                "surrogate": "autoprune.agents.surrogate:SurrogateAgent",
                "threshold": "autoprune.agents.threshold:ThresholdAgent",
                "tpe": "autoprune.agents.optuna:TPEAgent",
                "tpe-univariate": "autoprune.agents.optuna:UnivariateTPEAgent",
                "uniform": "autoprune.agents.uniform:UniformAgent",
            }
        ),
        "search space": MappingProxyType(
            {
                "group": "autoprune.search_spaces.per_group:PerGroup",
                "stage": "autoprune.search_spaces.per_stage:PerStage",
                "uniform": "autoprune.search_spaces.uniform:Uniform",
            }
        ),
        "criterion": MappingProxyType(
            {
                "identity": "autoprune.scoring.identity:Identity",
                "l1": "autoprune.scoring.l1:L1",
                "l2": "autoprune.scoring.l2:L2",
                "obs": "autoprune.scoring.obs:OBS",
                "random": "autoprune.scoring.random:Random",
                "taylor": "autoprune.scoring.taylor:Taylor",
            }
        ),
    }
)

_ENTRY_POINT_GROUPS = {
    "agent": "autoprune.agents",
    "search space": "autoprune.search_spaces",
    "criterion": "autoprune.scoring",
}


def _table(family: str) -> dict[str, str]:
    table = dict(FAMILIES[family])
    for entry in entry_points(group=_ENTRY_POINT_GROUPS[family]):
        if entry.name in table:
            raise ConfigError(f"{family} '{entry.name}' is defined twice: {table[entry.name]} and {entry.value}")
        table[entry.name] = entry.value
    return table


def names(family: str) -> list[str]:
    """Return the names of a family's members, sorted; imports none of them."""
    return sorted(_table(family))


def resolve(family: str, name: str) -> Any:
    """Import and return the class or function behind a name.

    Raises:
        UnknownNameError: The family has no such member.
    """
    table = _table(family)
    if name not in table:
        raise UnknownNameError(family, name, table)
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def make(family: str, name: str, settings: Mapping[str, Any]) -> Any:
    """Return what is behind a name, made with settings; the others have their defaults.

    Raises:
        UnknownNameError: The family has no such member, or the member no such setting.
    """
    member = resolve(family, name)
    known = inspect.signature(member).parameters
    for setting in settings:
        if setting not in known:
            raise UnknownNameError(f"setting of the {family} {name}", setting, known)
    return member(**settings)
