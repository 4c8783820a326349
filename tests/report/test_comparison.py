"""The page of a comparison: made by formulas, as text, and drawn in a real browser."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from autoprune.errors import RunError
from autoprune.report import write_comparison
from autoprune.report.comparison import comparison_figures
from autoprune.standings import Trace, standings

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</script><img src=x onerror=boom()>%{x}"


def told(seeds: int = 4, names: tuple[str, ...] = ("evolution", "tpe"), tests: bool = True) -> dict[str, Any]:
    """Return the contents of a plausible `compare.json`."""
    gains = {name: 0.01 - 0.004 * place for place, name in enumerate(names)} | {"random": 0.0, "uniform": -0.02}
    traces, finals = {}, {}
    for place, (name, gain) in enumerate(gains.items()):
        traces[name] = [
            Trace(
                tuple(
                    0.9 + gain * (1 - math.exp(-n / 8)) + 0.002 * math.sin(7 * n + 3 * seed + place) for n in range(30)
                ),
                tuple(40.0 + (n * 7 + seed) % 10 for n in range(30)),
                12.5,
            )
            for seed in range(seeds)
        ]
        finals[name] = [0.88 + gain / 2 + 0.001 * math.sin(5 * seed + place) for seed in range(seeds)]
    found = standings(traces, 30, 100.0, tuned=finals if tests else None, tests=finals if tests else None)
    return found.to_dict() | {
        "format": 3,
        "task": {"name": "resnet20 on cifar10", "val": 5000},
        "search": {"budget": "macs<=50%", "candidates": 30},
        "dense": {"accuracy": 0.925, "accuracy_se": 0.004, "macs": 100, "params": 10},
        "fidelity": "reconstructed",
        "evaluated": 200,
        "shared_by_all": {"sensitivity_cells": 27, "file": "sensitivity.json"},
        "finalized": {"epochs": 3, "lr": 0.05, "dense_test": {"accuracy": 0.92, "accuracy_se": 0.003}}
        if tests
        else None,
        "versions": {"autoprune": "0.1.0"},
    }


def written(folder: Path, document: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(document))
    return write_comparison(folder)


class Text(HTMLParser):
    """Collects a page's visible text, its elements and the addresses it would load."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.inside = ""
        self.feed(page.read_text(encoding="utf-8"))
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.inside = tag
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.words.append(data)


def test_words_tables_and_settings_are_there(tmp_path: Path) -> None:
    document = told()
    page = Text(written(tmp_path / "run", document))
    for word in (*document["words"], "Agents on resnet20 on cifar10", "of 200 different policies"):
        assert word in page.text
    assert "480 in all" in page.text  # 4 agents, 4 seeds, 30 evaluations
    assert "Differences on the test split" in page.text
    assert "more than noise" in page.text
    assert "fine-tuned for 3 epochs at lr 0.05" in page.text
    assert page.addresses == []


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (
            27,
            "27 sensitivity cells were measured before the searches, once for all agents (sensitivity.json), and count",
        ),
        (1, "1 sensitivity cell was measured before the searches, once for all agents (sensitivity.json), and count"),
        (0, "No sensitivity was measured before the searches."),
    ],
)
def test_what_all_agents_knew_before_is_told(tmp_path: Path, cells: int, said: str) -> None:
    document = told() | {"shared_by_all": {"sensitivity_cells": cells, "file": "sensitivity.json" if cells else None}}
    assert said in Text(written(tmp_path / "run", document)).text


def test_without_a_test_split_nothing_is_said_of_it(tmp_path: Path) -> None:
    text = Text(written(tmp_path / "run", told(tests=False))).text
    assert "test split" not in text
    assert "fine-tuned" not in text


def test_one_seed_has_no_intervals(tmp_path: Path) -> None:
    document = told(seeds=1)
    text = Text(written(tmp_path / "run", document)).text
    assert "With one seed there are no intervals" in text
    assert "not known" in text
    assert "paired t test" not in text
    assert [len(figure.data) for figure in comparison_figures(document).values()] == [4, 4]  # lines without bands


def test_hypervolumes_have_differences_of_their_own(tmp_path: Path) -> None:
    document = told()
    text = Text(written(tmp_path / "run", document)).text
    (row,) = (one for one in document["differences"]["hypervolume"]["to_random"] if one["agent"] == "evolution")
    bounds = f"+{row['low']:.3f} to +{row['high']:.3f} {row['p']:.3f} {row['p_holm']:.3f} more than noise"
    assert row["low"] > 0
    section = text.split("Differences in hypervolume")[1].split("Differences on the test split")[0]
    assert f"evolution random +{row['mean']:.3f} {bounds}" in section
    assert "uniform random −0.0" in section


def test_a_line_with_its_band_for_every_agent() -> None:
    document = told()
    figure = comparison_figures(document)["accuracy"]
    lines = [trace for trace in figure.data if trace.showlegend is not False]
    assert [line.name for line in lines] == [row["agent"] for row in document["table"]]
    assert list(lines[0].y) == pytest.approx(
        [100 * value for value in document["curves"]["evolution"]["accuracy"]["mean"]]
    )
    assert len(figure.data) == 3 * len(lines)
    assert {trace.legendgroup for trace in figure.data} == {line.name for line in lines}


def test_no_two_agents_look_the_same() -> None:
    document = told(seeds=2, names=tuple(f"agent{number}" for number in range(12)), tests=False)
    lines = [trace for trace in comparison_figures(document)["accuracy"].data if trace.showlegend is not False]
    assert len({(line.line.color, line.line.dash) for line in lines}) == 14


@pytest.mark.parametrize(
    ("content", "said"), [(None, "holds no compare.json"), ("{", "can't be read"), ("[1", "can't be read")]
)
def test_what_is_no_comparison_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "compare.json").write_text(content)
    with pytest.raises(RunError, match=said):
        write_comparison(tmp_path)


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on the PATH")
def test_every_figure_is_drawn_in_a_browser_and_hostile_names_run_nothing(tmp_path: Path) -> None:
    document = told(names=("evolution", HOSTILE))
    document["task"]["name"] = HOSTILE
    page = written(tmp_path / "run", document)
    assert "img" not in Text(page).elements
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--v=0"]
    options += ["--virtual-time-budget=6000", "--enable-logging=stderr", "--window-size=1280,2000", "--dump-dom"]
    done = subprocess.run(
        [str(BROWSER), *options, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Uncaught" in line] == []
    seen = done.stdout.split("</head>")[-1]
    assert 'data-drawn="2"' in seen
    assert "<img" not in seen
    parts = seen.split('id="figure-')[1:]
    assert [len(re.findall(r'class="trace ', part)) for part in parts] == [
        12,
        12,
    ]  # a line and a band of two edges each
