"""Names of agents, search spaces and criteria, as text, so that listing them imports none of them.

A member is `"module:attribute"`. Packages of others add theirs through the entry-point groups `autoprune.agents`,
`autoprune.search_spaces` and `autoprune.scoring`. A name may be followed by what the member is made with, as in
`evolution:survivors=2:offspring=8`.
"""

import dataclasses
import importlib
import inspect
import json
import types
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, Literal, Union, get_args, get_origin

from autoprune.errors import ConfigError, UnknownNameError

__all__ = ["FAMILIES", "make", "names", "resolve", "spelt"]

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


def make(family: str, text: str, settings: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Return what is behind a name, made with settings; the others have their defaults.

    Args:
        family: Where to look.
        text: The name; it may bring settings, as in `tpe:warm_start=false:startup=5`, whose values are numbers, true,
            false, null or words. A URL, which may hold a password, is none of these: names are shown and written down.
        settings: Further settings, of any kind.

    Raises:
        UnknownNameError: The family has no such member, or the member no such setting.
        ConfigError: The text can't be read, a setting is given twice, or its value is wrong.
    """
    name, written = _read(family, text)
    member = resolve(family, name)
    known = _parameters(member)
    for setting in (*written, *settings):
        if setting not in known:
            raise UnknownNameError(f"setting of the {family} {name}", setting, known)
        if setting in written and setting in settings:
            raise ConfigError(f"`{setting}` of the {family} {name} is given twice: in its name and beside it")
    there = f"settings of the {family} {name}: {', '.join(sorted(known))}"
    for setting, value in written.items():
        kind = known[setting].annotation
        if not _fits(value, kind):
            raise ConfigError(
                f"`{setting}` of the {family} {name} must be {inspect.formatannotation(_bare(kind))}, but got "
                f"{setting}={_shown(value)}; {there}"
            )
    try:
        return member(**written, **settings)
    except ConfigError as error:
        raise (ConfigError(f"{error}; {there}") if written else error) from error


def spelt(family: str, text: str) -> str:
    """Return a name with its settings, the one way that all ways to write the same are spelt.

    Raises:
        ConfigError: The text can't be read.
    """
    name, settings = _read(family, text)
    return ":".join([name, *(f"{setting}={_shown(settings[setting])}" for setting in sorted(settings))])


def _read(family: str, text: str) -> tuple[str, dict[str, Any]]:
    name, *parts = (part.strip() for part in text.split(":"))
    settings: dict[str, Any] = {}
    for part in parts:
        setting, _, value = (side.strip() for side in part.partition("="))
        if not (setting.isidentifier() and value):
            raise ConfigError(
                f"can't read {part!r} in the {family} {text!r}; settings are written as in "
                "evolution:survivors=2:offspring=8"
            )
        if setting in settings:
            raise ConfigError(f"`{setting}` is given twice in the {family} {text!r}")
        settings[setting] = _scalar(value)
    return name, settings


def _scalar(text: str) -> Any:
    """Return what JSON makes of a number, true, false, null or quoted text; anything else is the text itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, list | dict) else value


def _shown(value: Any) -> str:
    """Return the text of which `_scalar` makes a value."""
    return value if isinstance(value, str) and _scalar(value) == value else json.dumps(value)


def _parameters(member: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(member, eval_str=True).parameters
    except NameError:  # annotations that only a type checker can read stay text
        return inspect.signature(member).parameters


def _fits(value: Any, kind: Any) -> bool:
    """Say whether a scalar is what a parameter is annotated with; without an annotation, anything is."""
    kind = _bare(kind)
    if kind is inspect.Parameter.empty or kind is Any or isinstance(kind, str):
        return True
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    return type(value) in ((int, float) if kind is float else (kind,))


def _bare(kind: Any) -> Any:
    return kind.type if isinstance(kind, dataclasses.InitVar) else kind
