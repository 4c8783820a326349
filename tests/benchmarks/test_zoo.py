"""The zoo's script: rows that tell sound networks from faulty ones, and a stranger's network from a file."""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.cost import Cost
from autoprune.structure import Structure
from autoprune.testing import TinyResNet

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "zoo.py"

STRANGER = '''
import torch
from torch import nn

class Stranger(nn.Module):
    """Two inputs by name, outputs in a dictionary, a parameter outside modules."""
    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.ones(16))
    def forward(self, a, b):
        hidden = torch.relu(self.first(a) + self.second(b)) * self.scale
        return {"logits": self.out(hidden)}

def make():
    return Stranger(), {"a": torch.randn(3, 6), "b": torch.randn(3, 6)}

def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 62 * 30, 5))

def broken():
    raise ValueError("no such weights")
'''


@pytest.fixture(scope="module")
def zoo(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("zoo")


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    file = tmp_path / "stranger.py"
    file.write_text(STRANGER)
    return file


def tiny(zoo: ModuleType) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = TinyResNet().eval()
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, 1, 8, 8, generator=generator)
    zoo._randomise(model, example, generator)
    return model, example


def run(*arguments: str, timeout: int = 100) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout)


def test_a_sound_network_passes(zoo: ModuleType) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    row = zoo.examine("tiny", *tiny(zoo))
    assert row.faults == []
    assert row.onnx == "equal"
    assert 0.99 < row.share < 1.0  # the last layer's bias belongs to no channel
    assert row.found == sum(row.offered.values()) + len(row.locked)
    assert 0.3 < row.macs <= 0.5
    assert row.precision == "float64"
    assert row.difference < 1e-9
    assert row.formula == row.counted
    written = json.dumps(asdict(row))
    assert json.dumps(asdict(zoo.Row(**json.loads(written)))) == written


def test_a_cut_of_the_wrong_elements_fails(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sizes, other elements: only the comparison with the masked network can see it."""
    real = zoo.plan

    def wrong(model: nn.Module, structure: Structure, removed: Mapping[str, Sequence[int]]) -> Any:
        turned = {group.name: [(e + 1) % group.size for e in removed[group.name]] for group in structure}
        return real(model, structure, turned)

    monkeypatch.setattr(zoo, "plan", wrong)
    row = zoo.examine("tiny", *tiny(zoo), onnx=False)
    assert len(row.faults) == 1
    assert row.faults[0].startswith("differs from the masked network by ")


def test_a_formula_that_is_off_by_one_fails(zoo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(zoo.CostModel):  # type: ignore[misc, name-defined]
        def cost(self, removed: Any) -> Cost:
            right: Cost = super().cost(removed)
            return replace(right, macs=right.macs + 1)

    monkeypatch.setattr(zoo, "CostModel", Off)
    row = zoo.examine("tiny", *tiny(zoo), onnx=False)
    assert [fault.split(":")[0] for fault in row.faults] == ["macs"]


def test_an_output_that_does_not_depend_on_the_input_proves_nothing(zoo: ModuleType) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.second(self.first(inputs) * 0.0)  # type: ignore[no-any-return]

    with torch.random.fork_rng(devices=[]):
        row = zoo.examine("constant", Constant(), torch.ones(2, 6), onnx=False)
    assert "does not depend on its input" in "; ".join(row.faults)


def test_parameters_in_no_group_are_not_covered(zoo: ModuleType) -> None:
    model, example = tiny(zoo)
    share, in_the_way = zoo._share(model, example, Structure(()))
    assert share == 0.0
    assert in_the_way == [f"{name}: in no group" for name in ("conv1", "conv2", "fc", "stem")]


def test_an_error_is_a_row(zoo: ModuleType) -> None:
    row = zoo.examine("tiny", tiny(zoo)[0], torch.ones(2, 5, 8, 8))
    assert len(row.faults) == 1
    assert "\n" not in row.faults[0]


def test_every_network_of_torchvision_is_walked(zoo: ModuleType) -> None:
    import torchvision

    options = Namespace(build=None, timm=False, only=None)
    assert list(zoo.sources(options)) == torchvision.models.list_models(module=torchvision.models)
    assert len(set(zoo.TIMM)) == 30
    with pytest.raises(SystemExit, match="no network 'resnet19'"):
        zoo.sources(Namespace(build=None, timm=False, only="resnet18,resnet19"))


def test_a_strangers_network_and_the_files(stranger: Path, tmp_path: Path) -> None:
    file, table = tmp_path / "zoo.json", tmp_path / "zoo.md"
    done = run("--build", f"{stranger}:make", "--no-onnx", "--json", str(file), "--markdown", str(table))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("1 of 1 passed; 1 of 1 covered")
    (row,) = json.loads(file.read_text())["rows"]
    assert row["input"] == [[3, 6], [3, 6]]
    assert row["offered"] == {"channels": 1}
    assert table.read_text().splitlines()[2].startswith(f"| {stranger}:make | 3×6, 3×6 |")


def test_a_network_is_built_from_a_file_or_is_a_row(zoo: ModuleType, stranger: Path) -> None:
    options = Namespace(row="x", source=f"{stranger}:plain", shape=(2, 3, 64, 32), seed=0, onnx=False)
    with torch.random.fork_rng(devices=[]):
        sound = zoo.one_row(options)
        options.source = f"{stranger}:broken"
        broken = zoo.one_row(options)
    assert sound.faults == []
    assert sound.input == [[2, 3, 64, 32]]
    assert broken.faults == ["can't be built: ValueError: no such weights"]


def test_a_process_that_ends_or_takes_too_long_is_a_row(zoo: ModuleType, stranger: Path) -> None:
    options = Namespace(seed=0, onnx=False, shape=None, limit_seconds=60)
    missing = zoo.in_own_process("missing", f"{stranger}:missing", options)
    assert missing.faults == [f"the process ended with exit status 1: {stranger} has no function 'missing'"]
    options.limit_seconds = 0.01
    assert zoo.in_own_process("late", f"{stranger}:plain", options).faults == ["took more than 0.01 s"]


def test_rows_are_kept(zoo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "zoo.json"
    zoo._write(Namespace(json=file, markdown=None), [zoo.Row("resnet18"), zoo.Row("alexnet", faults=["old"])])
    asked: list[str] = []
    monkeypatch.setattr(zoo, "in_own_process", lambda name, source, _: asked.append(name) or zoo.Row(name))
    monkeypatch.setattr(sys, "argv", ["zoo.py", "--resume", "--json", str(file), "--only", "alexnet"])
    with pytest.raises(SystemExit) as ended:
        zoo.main()
    assert ended.value.code == 0
    assert asked == ["alexnet"]
    assert [(row["name"], row["faults"]) for row in json.loads(file.read_text())["rows"]] == [
        ("alexnet", []),
        ("resnet18", []),
    ]
