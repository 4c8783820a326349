import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from autoprune.agents.base import Agent
from autoprune.testing import AgentContract

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def output_of(script: Path, folder: Path) -> str:
    """Run an example as a user would, in a folder of its own, and return what it prints."""
    settings = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(folder / "run")]
    done = subprocess.run(command, cwd=folder, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("script", "prints"),
    [
        ("own_model.py", r"(?s)\d+\.\d% dense, \d+\.\d% at [\d,]+ MACs\nNet\("),
        ("own_agent.py", r"picked \d+\.\d%, uniform \d+\.\d%"),
    ],
)
def test_an_example_runs(script: str, prints: str, tmp_path: Path) -> None:
    assert re.match(prints, output_of(EXAMPLES / script, tmp_path))
    assert (tmp_path / "run" / "report.html").exists()


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"own_model.py", "own_agent.py"}


class TestOwnAgent(AgentContract):
    """The agent of an example keeps the contract."""

    @pytest.fixture
    def agent(self, monkeypatch: pytest.MonkeyPatch) -> Agent:
        monkeypatch.syspath_prepend(EXAMPLES)  # from where another process imports it, too
        own: Agent = importlib.import_module("own_agent").HillClimber()
        return own
