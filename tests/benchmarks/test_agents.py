"""The comparison of agents: its tables say what the searches left, seed by seed."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from autoprune.data import as_split


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("agents")


def row(agent: str, *tests: float) -> dict[str, object]:
    mean = {"mean": 0.9, "low": 0.89, "high": 0.91}
    return {
        "agent": agent,
        "accuracy": mean,
        "hypervolume": {"mean": 0.5},
        "evaluations_to_99": {"mean": 12.4},
        "evaluations": {"mean": 100.0},
        "test": {"values": list(tests), "mean": 0.86, "low": 0.86, "high": 0.86},
    }


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """A folder with a comparison of three seeds, and searches of another length with two of them."""
    document = {
        "task": {"name": "a network"},
        "search": {"budget": "macs<=50%"},
        "dense": {"accuracy": 0.97},
        "finalized": {"dense_test": {"accuracy": 0.92}},
        "seeds": 3,
        "evaluations": 100,
        "evaluated": 250,
        "fidelity": "reconstructed",
        "table": [
            row("surrogate", 0.88, 0.87, 0.89),
            row("random", 0.86, 0.85, 0.88),
            row("uniform", 0.84, 0.84, 0.84),
        ],
    }
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "compare.json").write_text(json.dumps(document))
    for seed, found, tested, evaluations in ((2, 0.91, 0.90, 40), (0, 0.89, 0.87, 38)):
        run = tmp_path / "digits-few" / str(seed)
        run.mkdir(parents=True)
        (run / "result.json").write_text(json.dumps({"picked": {"accuracy": found}, "candidates": evaluations}))
        (run / "final.json").write_text(json.dumps({"test": {"accuracy": tested}}))
    (tmp_path / "digits-few" / "1").mkdir()  # it is not done
    return tmp_path


def test_the_page_has_every_agent_and_what_others_lack(script: ModuleType, comparison: Path) -> None:
    lines = list(script.page(Namespace(tasks=["digits"], out=comparison)))
    assert lines[0] == "## a network, macs<=50%"
    assert "Dense 97.00% on validation, 92.00% on test; 3 seeds, 100 evaluations each, 250 policies" in lines[2]
    rows = {cells[1]: cells for cells in ([cell.strip() for cell in line.split("|")] for line in lines if "|" in line)}
    assert rows["surrogate"][2:7] == ["90.00% ± 1.00", "0.5000", "12", "100", "86.00%"]
    assert rows["surrogate"][7:9] == ["+1.67 ± 0.33", "+4.00 ± 0.58"]
    assert rows["random"][7] == ""  # not beside itself


def test_searches_of_another_length_are_paired_by_seed(script: ModuleType, comparison: Path) -> None:
    lines = list(script.page(Namespace(tasks=["digits"], out=comparison)))
    (few,) = ([cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| surrogate, 40"))
    assert few[1] == "surrogate, 40, 2 of the seeds"
    assert few[5] == "38 to 40"
    assert few[7:9] == ["+1.50 ± 0.50", "+4.50 ± 1.50"]  # 0.87 and 0.90 beside seeds 0 and 2


def test_fewer_images_are_the_first_of_a_shuffle(script: ModuleType) -> None:
    split = as_split((torch.arange(50.0)[:, None], torch.arange(50)))
    some, more, all_of_them = (
        set(torch.cat([targets for _, targets in script.first(split, number).batches(8)]).tolist())
        for number in (5, 20, 90)
    )
    assert len(some) == 5
    assert some < more < all_of_them == set(range(50))
