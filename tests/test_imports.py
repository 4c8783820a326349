"""Imports go down only, heavy libraries have one door each, and every module has what it says it has."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"autoprune": "autoprune", "agents": "autoprune.agents", "search_spaces": "autoprune.search_spaces"}

_BASE = "errors policy registry devices seeds threads progress processes run inputs"
_TASK = "data models task"
_NETWORK = f"{_BASE} structure cost"
_TRAINING = f"{_NETWORK} {_TASK} moments scoring scheduling"
_EVALUATION = f"{_TRAINING} finetuning evaluation"
_PREDICTION = f"{_EVALUATION} separable analytic"
_OUTPUT = "fidelity pareto report export finaliser tracking result"
_RESULT = f"_version {_PREDICTION} bounds rewards settings preparation sensitivity {_OUTPUT}"
_PARTS = f"{_RESULT} environment"
_ALL = f"{_PARTS} search standings compare search_spaces agents autoprune"

# The layers, low to high: a unit (a module or sub-package of autoprune; "autoprune" is the root), and the units that it
# may import when it runs. A row names only rows above it. Imports under `if TYPE_CHECKING` are free.
LAYERS = {
    "errors": "",
    "_version": "",
    "policy": "errors",
    "registry": "errors",
    "devices": "errors",
    "seeds": "",
    "threads": "devices",
    "progress": "",
    "processes": "errors",
    "run": "errors",
    "inputs": "",
    "data": _BASE,
    "models": _BASE,
    "task": f"{_BASE} data models",
    "structure": _BASE,
    "moments": f"{_BASE} structure",
    "cost": f"{_BASE} structure",
    "scoring": f"{_NETWORK} moments",
    "scheduling": f"{_NETWORK} {_TASK} scoring",
    "separable": f"{_BASE} structure cost",
    "analytic": f"{_NETWORK} moments scoring separable",
    "finetuning": _TRAINING,
    "pareto": "errors policy",
    "evaluation": f"{_TRAINING} finetuning pareto",
    "fidelity": _EVALUATION,
    "bounds": "errors structure",
    "rewards": _EVALUATION,
    "settings": f"{_EVALUATION} rewards",
    "sensitivity": _PREDICTION,
    "environment": f"{_PREDICTION} sensitivity",
    "report": "errors policy pareto run",
    "export": f"_version {_EVALUATION} sensitivity",
    "finaliser": f"{_EVALUATION} export",
    "tracking": f"_version {_EVALUATION} sensitivity",
    "preparation": f"{_PREDICTION} bounds settings",
    "result": f"{_EVALUATION} settings preparation rewards sensitivity pareto report finaliser tracking",
    "search": _PARTS,
    "standings": "errors pareto",
    "compare": f"{_PARTS} search standings",
    "search_spaces": f"{_NETWORK} sensitivity",
    "agents": f"{_NETWORK} scoring evaluation separable analytic sensitivity environment search_spaces pareto",
    "autoprune": f"{_PARTS} search standings compare",
    "testing": _ALL,
    "cli": _ALL,
}

# The only files that name a library when they run. `import autoprune` loads none of these libraries, but for scipy.
DOORS = {
    "cloudpickle": {"autoprune.processes"},
    "gymnasium": {"autoprune.environment", "autoprune.agents.amc"},
    "mlflow": {"autoprune.tracking"},
    "optuna": {"autoprune.agents.optuna"},
    "plotly": {"autoprune.report"},
    "ray": {"autoprune.evaluation.ray"},
    "rich": {"autoprune.cli"},
    "scipy": {
        "autoprune.agents.regression",
        "autoprune.evaluation.race",
        "autoprune.fidelity",
        "autoprune.standings",
        "autoprune.structure.labels",
    },
    "sklearn": {"autoprune.data"},
    "stable_baselines3": {"autoprune.agents.amc"},
    "torch_pruning": set(),
    "torchvision": {"autoprune.data", "autoprune.models", "autoprune.structure.torchvision_attention"},
    "typer": {"autoprune.cli"},
}


def module_names(root: Path) -> dict[str, Path]:
    """Return every module of the three folders under `root` by the name it is imported as, with its file."""
    names = {}
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            inner = path.relative_to(root / folder).with_suffix("").parts
            names[".".join([package, *(part for part in inner if part != "__init__")])] = path
    return names


MODULES = module_names(ROOT)


def is_type_checking(test: ast.expr) -> bool:
    """Say whether an `if` is `if TYPE_CHECKING` or `if typing.TYPE_CHECKING`."""
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of whatever is imported when the code runs, anywhere in it; `from a import b` is "a.b"."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and is_type_checking(node.test):
            yield from (name for other in node.orelse for name in imports(ast.Module([other], [])))
        else:
            yield from imports(node)


def unit_of(name: str) -> str:
    """Return the unit that a dotted name below autoprune belongs to; what is no unit is a name of the root's own."""
    first = name.removeprefix("autoprune").lstrip(".").split(".")[0]
    return first if first in LAYERS else "autoprune"


def layer_faults(module: str, source: str) -> list[str]:
    """Return the imports of a module's source that its row in the table does not allow."""
    unit = unit_of(module)
    allowed = {unit, *LAYERS[unit].split()}
    inner = [name for name in imports(ast.parse(source)) if name.split(".")[0] in ("autoprune", "")]
    return [f"{module} imports {name}" for name in inner if name.startswith(".") or unit_of(name) not in allowed]


def door_faults(module: str, source: str) -> list[str]:
    """Return the heavy libraries that a module's source names without being their door."""
    libraries = {name.split(".")[0] for name in imports(ast.parse(source))} & set(DOORS)
    return [
        f"{module} imports {library}"
        for library in sorted(libraries)
        if not any(module == door or module.startswith(f"{door}.") for door in DOORS[library])
    ]


def loaded_by(code: str, libraries: set[str]) -> set[str]:
    """Run code in a new process; return which of the libraries are loaded at its end."""
    report = f"{code}\nimport sys\nprint(*sorted({libraries!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", report], check=True, capture_output=True, text=True)
    return set(run.stdout.split())


class TestLayers:
    def test_every_module_has_a_row(self):
        units = {name.split(".")[1] for name in MODULES if name != "autoprune"}
        assert units - set(LAYERS) == set()

    def test_the_table_goes_down_only(self):
        rows = list(LAYERS)
        for unit, allowed in LAYERS.items():
            assert [other for other in allowed.split() if other not in rows[: rows.index(unit)]] == [], unit

    @pytest.mark.parametrize("module", MODULES)
    def test_a_module_imports_only_what_lies_below(self, module):
        assert layer_faults(module, MODULES[module].read_text()) == []

    @pytest.mark.parametrize(
        ("module", "source"),
        [
            ("autoprune.policy", "import autoprune.cli"),
            ("autoprune.policy", "from autoprune import cli"),
            ("autoprune.policy", "from autoprune import Task"),
            ("autoprune.policy", "import autoprune"),
            ("autoprune.policy", "from . import errors"),
            ("autoprune.cost.count", "from autoprune.task import Task"),
            ("autoprune.structure", "from autoprune.cost.count import macs"),
            ("autoprune.report.page", "from autoprune.evaluation.candidate import Candidate"),
            ("autoprune.search", "from autoprune.agents.base import Agent"),
            ("autoprune.search_spaces.base", "from autoprune.environment import Env"),
            ("autoprune.agents.amc", "from autoprune.search import search"),
            ("autoprune.agents.amc", "def late():\n    from autoprune.tracking import Tracker"),
            ("autoprune.agents.amc", "try:\n    pass\nexcept ImportError:\n    import autoprune.search"),
            ("autoprune.agents.amc", "if TYPE_CHECKING:\n    pass\nelse:\n    import autoprune.search"),
            ("autoprune.testing", "from autoprune.cli import main"),
        ],
    )
    def test_what_is_not_allowed_is_found(self, module, source):
        assert len(layer_faults(module, source)) == 1

    @pytest.mark.parametrize(
        ("module", "source"),
        [
            ("autoprune.policy", "from autoprune.errors import PolicyError"),
            ("autoprune.policy", "import torch, autopruner"),
            ("autoprune.cost.count", "from autoprune.cost.budget import Budget"),
            ("autoprune.structure", "import typing\nif typing.TYPE_CHECKING:\n    from autoprune.task import Task"),
            ("autoprune.agents.amc", "from autoprune.search_spaces.base import SearchSpace"),
        ],
    )
    def test_what_is_allowed_passes(self, module, source):
        assert layer_faults(module, source) == []

    def test_mapped_folders_are_seen_by_their_real_names(self):
        assert MODULES["autoprune.agents"] == ROOT / "agents" / "__init__.py"
        assert MODULES["autoprune.search_spaces"] == ROOT / "search_spaces" / "__init__.py"


class TestDoors:
    @pytest.mark.parametrize("module", MODULES)
    def test_a_module_names_no_library_that_has_its_door_elsewhere(self, module):
        assert door_faults(module, MODULES[module].read_text()) == []

    @pytest.mark.parametrize("library", sorted(DOORS))
    def test_a_library_at_the_wrong_door_is_found(self, library):
        assert door_faults("autoprune.policy", f"def late():\n    from {library}.inner import name") != []

    def test_a_door_is_open_to_what_is_inside_it(self):
        assert door_faults("autoprune.report.figures", "import plotly.graph_objects") == []
        assert door_faults("autoprune.reporting", "import plotly.graph_objects") != []

    def test_every_door_stands(self):
        assert {door for doors in DOORS.values() for door in doors} - set(MODULES) == set()

    def test_importing_the_package_loads_none_of_them(self):
        assert loaded_by("import autoprune", set(DOORS)) <= {"scipy"}

    def test_the_command_loads_only_its_own_until_it_runs(self):
        assert loaded_by("import autoprune.cli", set(DOORS)) <= {"rich", "scipy", "typer"}

    def test_a_library_that_is_loaded_is_seen(self):
        assert loaded_by("import autoprune, typer", set(DOORS)) >= {"typer"}


class TestDependencies:
    def test_they_are_what_the_package_imports_and_no_others(self):
        names = {name.split(".")[0] for path in MODULES.values() for name in imports(ast.parse(path.read_text()))}
        libraries = names - set(sys.stdlib_module_names) - {"autoprune", ""}
        needed = {"scikit-learn" if library == "sklearn" else library.replace("_", "-") for library in libraries}
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        optional = project["optional-dependencies"]["ray"]
        assert needed == {re.split(r"[>=]", requirement)[0] for requirement in [*project["dependencies"], *optional]}


class TestModules:
    @pytest.mark.parametrize("name", MODULES)
    def test_it_imports_and_has_what_it_lists(self, name):
        module = importlib.import_module(name)
        assert module.__doc__, "a module begins with what belongs in it"
        assert len(set(module.__all__)) == len(module.__all__)
        assert [listed for listed in module.__all__ if not hasattr(module, listed)] == []

    @pytest.mark.parametrize("name", MODULES)
    def test_its_examples_run(self, name):
        assert doctest.testmod(importlib.import_module(name)).failed == 0

    def test_an_example_that_is_wrong_is_seen(self, capsys):
        example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
        assert doctest.DocTestRunner().run(example).failed == 1
        assert "Expected:\n    3" in capsys.readouterr().out
