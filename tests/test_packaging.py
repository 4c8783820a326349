"""The folder mapping and its fence: what the wheel holds, what the root hides, where the version is written."""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import autoprune

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"autoprune": "autoprune", "agents": "autoprune/agents", "search_spaces": "autoprune/search_spaces"}
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs")


def build_wheel(source: Path, target: Path) -> set[str]:
    """Build the wheel of the package at `source` into `target`, without an index; return the names in it."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def expected_files(root: Path) -> set[str]:
    """Return where every file of the three folders must lie in the wheel."""
    return {
        f"{place}/{path.relative_to(root / folder).as_posix()}"
        for folder, place in FOLDERS.items()
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the repository: building leaves folders behind."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "repository", ignore=NOT_SOURCE)


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> set[str]:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def small(tmp_path) -> Path:
    """A repository of the same shape with three files, all of which setup.py finds."""
    root = tmp_path / "small"
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").touch()
    shutil.copy(ROOT / "setup.py", root)
    (root / "pyproject.toml").write_text('[project]\nname = "autoprune"\nversion = "0"\n')
    return root


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/typecheck.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("typecheck", ROOT / "tools" / "typecheck.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_wheel_holds_every_file_of_the_three_folders(wheel):
    assert "autoprune/py.typed" in wheel
    assert "autoprune/agents/__init__.py" in wheel
    assert sorted(expected_files(ROOT) - wheel) == []


def test_the_wheel_holds_nothing_else(wheel):
    others = {name for name in wheel if not re.match(r"autoprune-[^/]+\.dist-info/", name)}
    assert {name.split("/")[0] for name in others} == {"autoprune"}
    assert sorted(others - expected_files(ROOT)) == []
    assert not [name for name in wheel if "test" in Path(name).stem.split("_") or "benchmark" in name]


def test_a_folder_without_init_is_missed_and_seen_to_be(small, tmp_path):
    """The comparison above can fail: discovery finds new packages, and passes over a folder that is none."""
    (small / "agents" / "found" / "inner").mkdir(parents=True)
    (small / "agents" / "found" / "__init__.py").touch()
    (small / "agents" / "found" / "inner" / "__init__.py").touch()
    (small / "agents" / "missed").mkdir()
    (small / "agents" / "missed" / "module.py").touch()
    assert expected_files(small) - build_wheel(small, tmp_path / "wheel") == {"autoprune/agents/missed/module.py"}


@pytest.mark.parametrize("name", ["agents", "search_spaces"])
def test_a_mapped_folder_is_no_package_of_its_own(name):
    code = f"import {name}"
    run = subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError")
    assert f"`import autoprune.{name}`" in last


@pytest.mark.parametrize("name", ["agents", "search_spaces"])
def test_the_fence_stands_before_any_import(name):
    source = (ROOT / name / "__init__.py").read_text()
    fence = source.index("if not __name__.startswith")
    assert fence < min((found.start() for found in re.finditer(r"^(import|from) ", source, re.M)), default=len(source))
    assert importlib.import_module(f"autoprune.{name}").__doc__


def test_the_version_stands_in_one_place():
    version = importlib.metadata.version("autoprune")
    assert autoprune.__version__ == version
    texts = [path for pattern in ("*.py", "*.toml", "autoprune/**/*.py") for path in ROOT.glob(pattern)]
    stated = re.compile(rf"""version\w*\s*=\s*["']{re.escape(version)}["']""")
    assert [path.name for path in texts if stated.search(path.read_text())] == ["_version.py"]


def test_entry_points_are_the_command_and_no_other():
    entries = importlib.metadata.distribution("autoprune").entry_points
    assert [(entry.group, entry.name, entry.value) for entry in entries] == [
        ("console_scripts", "autoprune", "autoprune.cli:main")
    ]


def test_dependencies_have_lower_bounds_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    bad = [
        requirement
        for requirement in project["dependencies"] + extras
        if not re.fullmatch(r"[a-z0-9-]+>=[0-9.]+", requirement)
    ]
    assert bad == []


class TestTypecheck:
    """tools/typecheck.py fails when mypy was shown less than the three folders hold."""

    @staticmethod
    def counting_mypy(tmp_path: Path) -> tuple[str, ...]:
        """A stand-in that finds no error in any file, and like mypy sees what lies in the working folder."""
        script = tmp_path / "mypy.py"
        script.write_text(
            "from pathlib import Path\n"
            "files = len(list(Path('autoprune').rglob('*.py')))\n"
            "print(f'Success: no issues found in {files} source files')\n"
        )
        return sys.executable, str(script)

    def test_all_files_seen(self, tool, small):
        assert tool.typecheck(small, self.counting_mypy(small)) is None

    def test_a_file_that_is_not_installed(self, tool, small):
        (small / "agents" / "inner").mkdir()
        (small / "agents" / "inner" / "module.py").touch()  # no __init__.py beside it
        wrong = tool.typecheck(small, self.counting_mypy(small))
        assert wrong == "mypy checked 3 files, but agents, autoprune, search_spaces hold 4: some are not installed"

    def test_a_file_left_over_from_an_earlier_build_does_not_count(self, tool, small):
        left_over = small / "build" / "lib" / "autoprune" / "old.py"
        left_over.parent.mkdir(parents=True)
        left_over.touch()
        self.test_a_file_that_is_not_installed(tool, small)

    def test_errors(self, tool, small):
        failing = (sys.executable, "-c", "print('x.py:1: error'); raise SystemExit(1)")
        assert tool.typecheck(small, failing) == "mypy found errors"

    @pytest.mark.parametrize(
        ("output", "count"),
        [
            ("Success: no issues found in 1 source file\n", 1),
            ("note: in 7 source files\nSuccess: no issues found in 83 source files\n", 83),
            ("Found 3 errors in 2 files (checked 83 source files)\n", 83),
            ("", 0),
        ],
    )
    def test_reading_what_mypy_says(self, tool, output, count):
        assert tool.checked_files(output) == count
