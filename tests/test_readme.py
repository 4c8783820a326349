"""What the README shows is there: its Python parses and uses names that exist, its commands and options have help."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from autoprune.testing import AgentContract, SearchSpaceContract

ROOT = Path(__file__).resolve().parent.parent
PYTHON_LANGUAGES = {"python", "py", "pycon"}
OTHER_LANGUAGES = {"bash", "sh", "console", "shell", "text", "toml", "json"}


def blocks(markdown: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of a Markdown text as (language, content)."""
    return re.findall(r"^```([\w-]*)[^\n]*\n(.*?)^```$", markdown, re.M | re.S)


def python_blocks(markdown: str) -> list[str]:
    """Return the Python blocks."""
    return [content for language, content in blocks(markdown) if language in PYTHON_LANGUAGES]


def names_used(source: str) -> set[str]:
    """Return the dotted names below autoprune that some Python uses, as `ap.x` or as `from autoprune.m import x`."""
    tree = ast.parse(source)
    aliases, used = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.split(".")[0] == "autoprune"]
            aliases.update({alias.asname or "autoprune": alias.name if alias.asname else "autoprune" for alias in ours})
            used.update(alias.name for alias in ours)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "autoprune":
            used.update(f"{node.module}.{alias.name}" for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            used.add(f"{aliases[node.value.id]}.{node.attr}")
    return used


def exists(dotted: str) -> bool:
    """Say whether a fresh process finds a dotted name, as a module or as an attribute of one."""
    code = f"import pkgutil; pkgutil.resolve_name({dotted!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def commands(markdown: str) -> list[list[str]]:
    """Return every `autoprune ...` command in fenced blocks and inline code, split into words without `…`."""
    text = re.sub(r"\\\n\s*", " ", markdown)
    lines = [
        line for language, content in blocks(text) if language not in PYTHON_LANGUAGES for line in content.split("\n")
    ]
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    matches = [re.match(r"\s*(?:\$ )?(?:\S*/)?(autoprune [a-z-].*)", line) for line in [*lines, *inline]]
    return [shlex.split(re.sub(r"…|\.\.\.", "", match[1]), comments=True) for match in matches if match]


@cache
def help_of(*words: str) -> str | None:
    """Return what `autoprune WORDS --help` prints, or None when it fails."""
    code = "import sys; from autoprune.cli import main; sys.argv[0] = 'autoprune'; sys.exit(main())"
    plain = {"COLUMNS": "250", "TERMINAL_WIDTH": "250", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-c", code, *words, "--help"]
    run = subprocess.run(command, env=os.environ | plain, capture_output=True, text=True, check=False)
    return None if run.returncode else run.stdout


def command_faults(words: list[str]) -> list[str]:
    """Return what a command names that its help doesn't."""
    command, arguments = words[1], words[2:]
    if command.startswith("--"):
        arguments, text = words[1:], help_of()
    else:
        text = help_of(command)
    if text is None:
        return [f"no command {command}"]
    options = [word.split("=")[0] for word in arguments if re.match(r"--?[a-z]", word)]
    return [f"{command} has no {option}" for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", text)]


def make_targets(text: str) -> set[str]:
    """Return the targets of `make TARGET` in fenced blocks and inline code."""
    return set(re.findall(r"(?:^|`|\$ |&& )make ([a-z-]+)", text, re.M))


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


class TestReadme:
    def test_every_block_says_its_language(self, readme):
        assert blocks(readme)
        assert {language for language, _ in blocks(readme)} - PYTHON_LANGUAGES - OTHER_LANGUAGES == set()

    def test_its_python_uses_what_exists(self, readme):
        used = {name for block in python_blocks(readme) for name in names_used(block)}
        assert {"autoprune.Task", "autoprune.search"} <= used
        assert [name for name in sorted(used) if not exists(name)] == []

    def test_its_commands_and_their_options_exist(self, readme):
        shown = commands(readme)
        assert "search" in {words[1] for words in shown}
        assert [fault for words in shown for fault in command_faults(words)] == []

    def test_its_links_lead_somewhere(self, readme):
        targets = re.findall(r"\]\(([^)#\s]+)", readme)
        assert [link for link in targets if "://" not in link and not (ROOT / link).exists()] == []

    def test_its_make_targets_exist(self, readme):
        shown = make_targets(readme)
        assert {"demo", "test"} <= shown
        makefile = (ROOT / "Makefile").read_text()
        assert [target for target in sorted(shown) if not re.search(rf"^{target}:", makefile, re.M)] == []


class TestTheTestsBite:
    """The functions above, on text that is wrong."""

    def test_python_that_does_not_parse(self):
        (block,) = python_blocks("text\n```python\nresult = = 1\n```\n")
        with pytest.raises(SyntaxError):
            names_used(block)

    def test_names(self):
        source = "import autoprune as ap\nfrom autoprune.policy import Policy\nap.nothing(ap.__version__)\nother.x"
        assert names_used(source) == {
            "autoprune",
            "autoprune.policy.Policy",
            "autoprune.nothing",
            "autoprune.__version__",
        }
        assert exists("autoprune.policy.Policy")
        assert not exists("autoprune.nothing")

    def test_commands_are_found_wherever_they_stand(self):
        text = (
            "Run `autoprune pick RUN --max-drop 0.01`, but autoprune finds more.\n\n"
            '```bash\n$ .venv/bin/autoprune search --budget "macs<=50%" \\\n    --agent tpe  # comment\n'
            "autoprune train … --epochs 3\nmake demo && make test\n```\n```python\nautoprune = 1\n```\n"
        )
        assert commands(text) == [
            ["autoprune", "search", "--budget", "macs<=50%", "--agent", "tpe"],
            ["autoprune", "train", "--epochs", "3"],
            ["autoprune", "pick", "RUN", "--max-drop", "0.01"],
        ]
        assert make_targets(text) == {"demo", "test"}

    def test_a_command_or_option_that_is_not_there(self):
        assert command_faults(["autoprune", "serach"]) == ["no command serach"]
        assert command_faults(["autoprune", "search", "--agent", "tpe", "--agents=tpe"]) == ["search has no --agents"]


class_blocks = [
    block
    for block in python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    if re.search(r"^class ", block, re.M)
]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """A module of the classes that the README shows; another process finds it as well."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "shown_in_readme.py").write_text("\n".join(class_blocks), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("shown_in_readme")


class TestReadmeSpace(SearchSpaceContract):
    """The search space that the README shows keeps the contract."""

    @pytest.fixture
    def make_space(self, shown):
        return shown.Quadratic


class TestReadmeAgent(AgentContract):
    """So does the agent."""

    @pytest.fixture
    def agent(self, shown):
        return shown.HillClimber()

    def test_an_agent_is_short(self):
        """With its imports, as it stands there."""
        (block,) = (block for block in class_blocks if "class HillClimber" in block)
        assert len(block.splitlines()) < 30
